"""Formats that libsndfile does not know, and files of several parts, with ffmpeg and without."""

import os
import shutil
import subprocess
import threading
import time

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import soxr

from aesanet.errors import ClipError
from aesanet.runtime.audio import ffmpeg
from aesanet.runtime.audio.decode import Heard, decode
from aesanet.runtime.rows.row import Clip

RATE, SECONDS = 44_100, 3
FORMATS = {
    "aac.m4a": "-c:a aac",
    "alac.m4a": "-c:a alac",
    "a.aac": "-c:a aac",
    "a.mp4": "-c:a aac",
    "a.mov": "-c:a aac",
    "a.webm": "-c:a libopus",
    "a.mka": "-c:a libopus",
    "a.wma": "-c:a wmav2",
    "a.ac3": "-c:a ac3",
    "a.eac3": "-c:a eac3",
    "a.amr": "-ar 8000 -ac 1 -c:a libopencore_amrnb",
    "a.wv": "-c:a wavpack",
    "a.g722": "-ar 16000 -ac 1 -c:a g722",
    "a.tta": "-c:a tta",
    "flac.ogg": "-c:a flac",
}
LOSSLESS = ("alac.m4a", "a.wv", "a.tta", "flac.ogg")


def wave():
    """Two channels: 440 Hz and, less loud, 1 kHz."""
    time = np.arange(RATE * SECONDS) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0.1 * np.sin(2 * np.pi * 1000 * time)], axis=1)


def convert(source, target, options):
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", "-i", source]
    subprocess.run([*program, *options.split(), target], check=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    soundfile.write(folder / "a.wav", wave(), RATE)
    for name, options in FORMATS.items():
        convert(folder / "a.wav", folder / name, options)
    return folder


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A real ffmpeg, by that name on the PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert shutil.which("ffmpeg") == f"{tmp_path}/bin/ffmpeg"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a script in ffmpeg's place."""

    def write(script):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ffmpeg").write_text("#!/bin/sh\n" + script)
        (tmp_path / "bin" / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    return write


@pytest.fixture
def none(tmp_path, monkeypatch):
    """No ffmpeg on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))


def run(path, start=None, end=None, channels="mean"):
    """Samples of a clip, and its end."""
    *parts, (_, last) = decode([Clip(str(path), start, end)], channels)
    return np.concatenate([np.zeros(0, np.float32), *(part for _, part in parts)]), last


@pytest.mark.parametrize("name", FORMATS)
def test_what_libsndfile_does_not_know_is_decoded(files, real, name):
    samples, end = run(files / name)
    assert isinstance(end, Heard)
    assert end.seconds == pytest.approx(SECONDS, abs=0.1)
    assert not end.truncated
    assert len(samples) == pytest.approx(end.seconds * 16_000, abs=2)
    assert end.sample_rate == {"a.amr": 8_000, "a.g722": 16_000, "a.webm": 48_000, "a.mka": 48_000}.get(name, RATE)
    assert end.channels == (1 if name in ("a.amr", "a.g722") else 2)
    spectrum = np.abs(np.fft.rfft(samples[16_000:32_000]))
    assert np.argsort(spectrum)[-2:].tolist() == [1_000, 440]
    np.testing.assert_array_equal(samples, run(files / name)[0])


def test_telephone_prompts_that_only_their_name_tells(tmp_path, real):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 8_000)
    soundfile.write(tmp_path / "a.gsm", tone, 8_000, format="RAW", subtype="GSM610")
    samples, end = run(tmp_path / "a.gsm")
    assert (end.sample_rate, end.channels) == (8_000, 1)
    assert np.argmax(np.abs(np.fft.rfft(samples[8_000:24_000]))) == 440


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_is_lossless_is_the_same_to_the_bit(files, real, name):
    for channels in ("mean", "left", "loudest"):
        np.testing.assert_array_equal(
            run(files / name, None, None, channels)[0], run(files / "a.wav", channels=channels)[0]
        )
        np.testing.assert_array_equal(
            run(files / name, 0.7, 1.9, channels)[0], run(files / "a.wav", 0.7, 1.9, channels)[0]
        )
    assert run(files / name, 5.0)[1].code == "no_audio"


@pytest.mark.parametrize("name", FORMATS)
def test_without_ffmpeg_the_error_says_that_it_would_help(files, none, name):
    _, end = run(files / name)
    assert end.code == "undecodable"
    assert "installing the program ffmpeg would decode" in end.message


@pytest.mark.parametrize("content", [b"", b"text\n" * 1_000, bytes(5_000), bytes(range(256)) * 50])
def test_what_neither_knows(tmp_path, real, content):
    (tmp_path / "a.m4a").write_bytes(content)
    assert run(tmp_path / "a.m4a")[1].code == "undecodable"


def test_a_file_cannot_make_ffmpeg_open_others(files, tmp_path, real):
    shutil.copy(files / "a.aac", tmp_path / "other.aac")
    shutil.copy(files / "a.wav", tmp_path / "other.wav")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile:{0}/other.aac\n#EXT-X-ENDLIST\n"
    for name, text in {
        "a.m3u8": playlist,
        "a.m4a": playlist,
        "b.m4a": "ffconcat version 1.0\nfile '{0}/other.aac'\n",
        "c.m4a": "ffconcat version 1.0\nfile other.aac\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    }.items():
        (tmp_path / name).write_text(text.format(tmp_path))
        assert run(tmp_path / name)[1].code == "undecodable", name


@pytest.mark.parametrize("name", [b"-i.m4a", b"caf\xe9 \xe4\xbd\xa0.m4a", b"http:x%03d;$(touch x)'.m4a", b"a\nb.m4a"])
def test_names_of_all_kinds(files, tmp_path, real, name):
    path = os.fsencode(tmp_path) + b"/" + name
    shutil.copy(files / "alac.m4a", path)
    assert run(os.fsdecode(path))[1].seconds == SECONDS


def test_what_was_cut_short_is_marked(files, tmp_path, real):
    convert(files / "a.wav", tmp_path / "a.m4a", "-c:a alac -movflags +faststart")
    content = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(content[: len(content) // 2])
    _, end = run(tmp_path / "a.m4a")
    assert 1 < end.seconds < 2
    assert end.header_seconds == SECONDS
    assert end.truncated
    assert not run(tmp_path / "a.m4a", 0.0, 1.0)[1].truncated


def test_with_video_the_length_of_the_file_says_nothing_of_the_audio(files, tmp_path, real):
    options = "-f lavfi -i color=size=16x16:rate=5:duration=6 -map 0:a -map 1:v -c:a aac -c:v mpeg4"
    convert(files / "a.wav", tmp_path / "a.mp4", options)
    _, end = run(tmp_path / "a.mp4")
    assert (end.seconds, end.header_seconds) == (SECONDS, None)


def test_without_audio(files, tmp_path, real):
    convert(files / "a.wav", tmp_path / "a.mp4", "-f lavfi -i color=size=16x16:rate=5:duration=1 -map 1:v -c:v mpeg4")
    assert run(tmp_path / "a.mp4")[1].code == "undecodable"


def test_an_ffmpeg_that_gives_nothing_is_ended(files, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(ffmpeg, "STALL_SECONDS", 0.3)
    fake(f"echo $$ > {tmp_path}/pid; echo says something >&2; exec sleep 60")
    start = time.monotonic()
    _, end = run(files / "aac.m4a")
    assert end.code == "timeout"
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_abandoned_ffmpeg_is_ended_and_reaped(tmp_path, fake):
    soundfile.write(tmp_path / "long.wav", np.zeros(200 * RATE), RATE)
    convert(tmp_path / "long.wav", tmp_path / "long.wv", "-c:a wavpack")
    fake(f'echo $$ > {tmp_path}/pid; exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"')
    descriptors = len(os.listdir("/proc/self/fd"))
    parts = decode([Clip(str(tmp_path / "long.wv"))])
    next(parts)
    os.kill(pid := int((tmp_path / "pid").read_text()), 0)
    parts.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_much_that_ffmpeg_says_does_not_stop_it(files, fake):
    said = "head -c 3000000 /dev/zero >&2"
    fake(f'{said}; {imageio_ffmpeg.get_ffmpeg_exe()} "$@"; {said}')
    assert run(files / "alac.m4a")[1].seconds == SECONDS


@pytest.mark.parametrize("script", ["exit 1", "exec /nowhere", "echo no audio", "yes no audio", "kill -9 $$"])
def test_an_ffmpeg_that_fails(files, fake, script):
    fake(script)
    assert run(files / "aac.m4a")[1].code == "undecodable"


def test_an_ffmpeg_that_cannot_be_started(files, fake, tmp_path):
    fake("")
    (tmp_path / "bin" / "ffmpeg").write_bytes(b"\x7fELF, or so it says")
    assert run(files / "aac.m4a")[1].code == "undecodable"


def test_several_threads(files, real):
    expected = run(files / "alac.m4a")[0]
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(files / "alac.m4a")[0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(np.array_equal(result, expected) for result in results)


PARTS = {  # container, subtype, rate and channels of each part; does ffmpeg decode them all?
    "vorbis": ("OGG", "VORBIS", [(48_000, 1), (48_000, 1), (48_000, 1)], True),
    "opus": ("OGG", "OPUS", [(48_000, 2), (48_000, 2)], True),
    "vorbis of two rates": ("OGG", "VORBIS", [(48_000, 1), (24_000, 1)], False),
    "opus of two numbers of channels": ("OGG", "OPUS", [(48_000, 1), (48_000, 2)], False),
    "mp3": ("MP3", "MPEG_LAYER_III", [(44_100, 1), (44_100, 1), (44_100, 1)], True),
}


def joined(path, kind, tags=True):
    """Writes parts of 3 s one after another; how many seconds they are."""
    container, subtype, parts, _ = PARTS[kind]
    content = b""
    for number, (rate, channels) in enumerate(parts):
        tone = 0.5 * np.sin(2 * np.pi * 400 * (number + 1) * np.arange(3 * rate) / rate)
        soundfile.write(path, np.repeat(tone[:, None], channels, 1), rate, format=container, subtype=subtype)
        part = path.read_bytes()
        content += part if tags else part[part.index(b"\xff\xfb", 4) :]
    path.write_bytes(content)
    return 3 * len(parts)


@pytest.mark.parametrize("kind", PARTS)
def test_joined_files_are_decoded_whole(tmp_path, real, kind):
    seconds = joined(tmp_path / "a", kind)
    samples, end = run(tmp_path / "a")
    if PARTS[kind][-1]:
        assert end.seconds == pytest.approx(seconds, abs=0.2)
        assert not end.truncated
        for number in range(seconds // 3):
            second = samples[(3 * number + 1) * 16_000 :][:16_000]
            assert np.argmax(np.abs(np.fft.rfft(second))) == pytest.approx(400 * (number + 1), abs=1)
    else:
        assert (end.seconds, end.truncated) == (3, True)


@pytest.mark.parametrize("kind", PARTS)
def test_joined_files_without_ffmpeg_are_marked(tmp_path, none, kind):
    seconds = joined(tmp_path / "a", kind)
    _, end = run(tmp_path / "a")
    assert end.seconds == 3
    assert end.header_seconds == pytest.approx(seconds, abs=0.2)
    assert end.truncated
    assert not run(tmp_path / "a", 0.0, 2.0)[1].truncated


def test_joined_mp3_that_do_not_say_their_length_are_decoded_whole(tmp_path, none):
    seconds = joined(tmp_path / "a", "mp3", tags=False)
    _, end = run(tmp_path / "a")
    assert end.seconds == pytest.approx(seconds, abs=0.3)
    assert not end.truncated


def test_a_whole_file_is_not_given_to_ffmpeg(tmp_path, fake):
    fake("exit 1")
    for container, subtype, parts, _ in PARTS.values():
        soundfile.write(tmp_path / "a", np.ones(3 * parts[0][0]) * 0.1, parts[0][0], format=container, subtype=subtype)
        assert run(tmp_path / "a")[1].seconds == 3


def test_one_pass_for_several_clips(files, fake, tmp_path):
    fake(f'echo run >> {tmp_path}/runs; exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"')
    clips = [Clip(str(files / "alac.m4a"), start, start + 1.0) for start in (1.5, 0.0, 0.25)]
    ends = {index: part for index, part in decode(clips) if isinstance(part, Heard | ClipError)}
    assert [ends[index].seconds for index in range(3)] == [1.0, 1.0, 1.0]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_the_reference_is_the_encoders_input(files, real):
    """Of what ffmpeg decodes, the whole way against soxr on the wave itself."""
    expected = soxr.resample(wave().mean(axis=1).astype(np.float32), RATE, 16_000, quality="HQ")
    np.testing.assert_allclose(run(files / "alac.m4a")[0], expected, atol=1e-4)
