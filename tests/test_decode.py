"""Files of every kind, made by real codecs, through the reader that scoring uses."""

import os
import stat
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.errors import ClipError
from aesanet.runtime.audio.decode import clip_blocks, decode, resample
from aesanet.runtime.audio.segments import BLOCK_SAMPLES
from aesanet.runtime.rows.row import Clip

DECODABLE = [
    ("WAV", "PCM_U8", 8_000, 1),
    ("WAV", "PCM_16", 16_000, 1),
    ("WAV", "PCM_24", 44_100, 2),
    ("WAV", "PCM_32", 48_000, 2),
    ("WAV", "FLOAT", 22_050, 1),
    ("WAV", "DOUBLE", 96_000, 1),
    ("WAV", "ULAW", 8_000, 1),
    ("WAV", "ALAW", 8_000, 1),
    ("WAV", "IMA_ADPCM", 22_050, 1),
    ("WAV", "MS_ADPCM", 22_050, 2),
    ("WAV", "GSM610", 8_000, 1),
    ("WAVEX", "PCM_16", 48_000, 6),
    ("WAVEX", "PCM_16", 48_000, 8),
    ("FLAC", "PCM_16", 192_000, 2),
    ("OGG", "VORBIS", 44_100, 2),
    ("OGG", "OPUS", 48_000, 2),
    ("MP3", "MPEG_LAYER_III", 44_100, 2),
    ("AIFF", "PCM_16", 44_100, 1),
    ("CAF", "PCM_24", 44_100, 2),
    ("W64", "PCM_16", 44_100, 1),
    ("RF64", "PCM_16", 44_100, 1),
    ("CAF", "ALAC_16", 44_100, 2),
    ("AU", "G721_32", 8_000, 1),
    ("AU", "PCM_16", 11_025, 1),
]


def read(path, start=None, end=None):
    """All samples of a clip at 16 kHz, and what else is known of it then."""
    *blocks, heard = (part for _, part in decode([Clip(str(path), start, end)]))
    if isinstance(heard, ClipError):
        raise heard
    return np.concatenate(blocks), heard


def code(path, start=None, end=None):
    with pytest.raises(ClipError) as caught:
        read(path, start, end)
    assert caught.value.message
    return caught.value.code


def tone(rate, seconds=1.0, channels=1, hz=440.0):
    wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


@pytest.mark.parametrize(("container", "subtype", "rate", "channels"), DECODABLE)
def test_every_common_format_gives_the_tone_that_was_written(tmp_path, container, subtype, rate, channels):
    path = tmp_path / "a-name-without-a-suffix"
    soundfile.write(path, tone(rate, 1.5, channels), rate, format=container, subtype=subtype)
    samples, heard = read(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert not heard.truncated
    assert heard.seconds == pytest.approx(1.5, abs=0.1)  # mp3 pads to whole frames
    assert len(samples) == pytest.approx(16_000 * heard.seconds, abs=2)
    spectrum = np.abs(np.fft.rfft(samples[4_000:20_000]))
    assert np.argmax(spectrum) == 440
    assert np.abs(samples[4_000:20_000]).max() == pytest.approx(0.5, abs=0.04)


def test_channels_are_averaged(tmp_path):
    left_only = tone(16_000, channels=2) * [1, 0]
    soundfile.write(tmp_path / "a.wav", left_only, 16_000, subtype="FLOAT")
    samples, _ = read(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, left_only[:, 0] / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 192_000])
def test_resampling_as_a_stream_is_soxr_on_the_whole(tmp_path, rate):
    wave = np.random.default_rng(0).normal(size=4 * BLOCK_SAMPLES // 3).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    samples, _ = read(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, soxr.resample(wave, rate, 16_000, quality="HQ"), atol=2e-6)


@given(rate=st.sampled_from([8_000, 22_050, 48_000]), cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=6))
@settings(max_examples=25)
def test_blocks_of_any_size_give_the_same_samples(rate, cuts):
    wave = np.random.default_rng(1).normal(size=sum(cuts)).astype(np.float32)
    pieces = np.split(wave, np.cumsum(cuts)[:-1])
    whole = np.concatenate([*resample(iter([wave]), rate), np.zeros(0, np.float32)])
    streamed = np.concatenate([*resample(iter(pieces), rate), np.zeros(0, np.float32)])
    np.testing.assert_allclose(streamed, whole, atol=2e-6)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.75), (1.25, 2.0), (2.5, None), (None, 0.3), (0.1, 99.0)])
def test_a_segment_is_the_same_part_of_the_whole(tmp_path, container, start, end):
    rate, path = 16_000, tmp_path / "a"
    sweep = 0.5 * np.sin(2 * np.pi * 500 * np.linspace(0, 3, 3 * rate) ** 2)
    soundfile.write(path, sweep, rate, format=container)
    whole, _ = read(path)
    part, heard = read(path, start, end)
    expected = whole[round((start or 0) * rate) : None if end is None else round(end * rate)]
    assert len(part) == len(expected)
    assert heard.seconds == pytest.approx(len(expected) / rate)
    assert not heard.truncated
    np.testing.assert_allclose(part, expected, atol=1e-6)


def test_a_segment_behind_the_end_is_no_audio(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    assert code(tmp_path / "a.wav", 5.0, 6.0) == "no_audio"


def test_what_comes_before_the_damage_is_read_and_marked(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000)
    for container in ("FLAC", "OGG", "MP3", "WAV"):
        path = tmp_path / container
        soundfile.write(path, noise, 16_000, format=container)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
        samples, heard = read(path)
        assert 5 < heard.seconds < 8, container
        assert len(samples) == pytest.approx(16_000 * heard.seconds, abs=2)
        if container != "OGG":  # which says its length on its last page
            assert heard.truncated, container
            assert heard.header_seconds == 20, container


def test_a_flac_damaged_inside_gives_the_frames_before(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(content)
    _, heard = read(path)
    assert 8 < heard.seconds < 20
    assert heard.truncated


@pytest.mark.parametrize(
    "content",
    [b"", b"not audio, but text\n" * 100, bytes(range(256)) * 50, b"\x00" * 5_000, b"junk" * 10 + b"RIFF"],
    ids=["empty", "text", "bytes", "zeros", "junk before RIFF"],
)
@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac"])
def test_what_is_no_audio_is_an_error_of_our_own(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert code(tmp_path / name) in ("undecodable", "no_audio")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((0, 1)), 16_000)
    assert code(tmp_path / "a.wav") == "no_audio"
    soundfile.write(tmp_path / "b.wav", np.zeros(1_000), 16_000)
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:44])
    assert code(tmp_path / "b.wav") == "no_audio"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_no_waveform_has(tmp_path, bad):
    wave = tone(16_000)
    wave[12_345] = bad
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    assert code(tmp_path / "a.wav") == "non_finite"


@pytest.mark.parametrize("rate", [1, 15, 999])
def test_a_rate_that_is_no_audio(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), rate)
    assert code(tmp_path / "a.wav") == "bad_sample_rate"


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 2**32 - 9)
    path.write_bytes(content)
    samples, _ = read(path)
    assert len(samples) == 16_000


@pytest.mark.parametrize("stated", [0, 2**31 - 1, 0x7FFFF000, 2**32 - 1])
def test_a_wav_that_was_written_into_a_pipe(tmp_path, stated):
    """Its size was not known when its header was written; the most that there can be claims nothing."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", stated)
    path.write_bytes(content)
    if stated:
        _, heard = read(path)
        assert (heard.seconds, heard.truncated) == (1.0, False)
    else:
        assert code(path) == "no_audio"


@pytest.mark.parametrize("stated", [1_000_000, 2**32 - 1])
def test_a_riff_file_over_4_gb_is_marked(tmp_path, stated):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000)
    content = bytearray(path.read_bytes()[:44])
    content[40:44] = struct.pack("<I", stated)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(2**32 + 44 + 1_000_000)  # sparse
    seconds, whole = stated / 32_000, (2**32 + 1_000_000) / 32_000
    _, heard = read(path, seconds - 2)
    assert heard.seconds == pytest.approx(2, abs=1e-3)
    assert heard.header_seconds == pytest.approx(whole - seconds + 2, abs=1e-3)
    assert heard.truncated
    assert not read(path, 0.0, 2.0)[1].truncated


def test_an_mp3_of_variable_bit_rate_that_does_not_say_its_length(tmp_path):
    """libsndfile alone takes the rate of its loud start for that of the whole, and reads 3 of 20 s."""
    path = tmp_path / "a.mp3"
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 44_100)
    wave[5 * 44_100 :] = 0
    soundfile.write(path, wave, 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    assert b"Xing" in content[:100]
    path.write_bytes(content[content.index(b"\xff\xfb", 4) :])
    assert soundfile.info(path).duration < 5
    samples, heard = read(path)
    assert heard.seconds == pytest.approx(20, abs=0.1)
    assert (heard.header_seconds, heard.truncated) == (None, False)
    assert np.abs(samples[:64_000]).min() < 0.1 < np.abs(samples[:64_000]).max()
    np.testing.assert_allclose(read(path, 3.0, 6.0)[0][1_000:40_000], samples[49_000:88_000], atol=1e-6)


def test_of_an_mp3_damaged_inside_little_is_lost(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000), 16_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5_000] = bytes(5_000)
    path.write_bytes(content)
    _, heard = read(path)
    assert 9.5 < heard.seconds < 20
    assert heard.truncated


def test_pipes_devices_folders_and_links(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe.wav").st_mode)
    assert code(tmp_path / "pipe.wav") == "not_a_file"
    assert code("/dev/zero") == "not_a_file"
    assert code(tmp_path) == "not_a_file"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert code(tmp_path / "loop") == "not_a_file"
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert code(tmp_path / "dangling") == "not_a_file"
    assert code(tmp_path / "nothing") == "not_found"
    assert code(tmp_path / "nothing" / "below.wav") == "not_found"


def test_a_link_and_a_name_that_is_not_utf8(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    (tmp_path / "link").symlink_to(tmp_path / "a.wav")
    odd = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    os.link(tmp_path / "a.wav", odd)
    for path in (tmp_path / "link", os.fsdecode(odd)):
        assert len(read(path)[0]) == 16_000


def test_descriptors_are_given_back(tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(16_000), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"no audio at all")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(tmp_path / "good.wav")
        code(tmp_path / "bad.wav")
        next(clip_blocks(Clip(str(tmp_path / "good.wav"))))  # abandoned
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_flac_that_does_not_say_its_length_is_read_to_the_end(tmp_path):
    """As encoders write it into a pipe: total samples, the low 36 bits of bytes 18 to 25, are 0."""
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000)
    soundfile.write(path, noise, 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert soundfile.info(path).frames > 2**60
    samples, heard = read(path)
    assert (len(samples), heard.seconds, heard.truncated) == (len(noise), 20.0, False)
    np.testing.assert_allclose(samples, noise, atol=1e-4)
    np.testing.assert_array_equal(read(path, 2.0, 3.0)[0], samples[32_000:48_000])
    assert code(path, 30.0) == "no_audio"


def test_memory_does_not_follow_the_header_of_a_low_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(2**19), 1_000)
    assert max(len(block) for block in clip_blocks(Clip(str(tmp_path / "a.wav")))) < 17 * BLOCK_SAMPLES


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_memory_does_not_follow_the_length(tmp_path, container):
    with soundfile.SoundFile(tmp_path / "a", "w", 16_000, 1, format=container) as file:
        for _ in range(600):
            file.write(np.full(16_000, 0.25))
    tracemalloc.start()
    num_samples = sum(len(block) for block in clip_blocks(Clip(str(tmp_path / "a"))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_samples == pytest.approx(600 * 16_000, rel=1e-3)  # 38 MB
    assert peak < 4e6


@pytest.mark.parametrize("container", ["MP3", "OGG", "FLAC"])
def test_blocks_join_to_what_one_read_gives(tmp_path, container):
    """python-soundfile seeks after every read, and in an mp3 of variable bit rate a seek changes what follows."""
    rate, path = 16_000, tmp_path / "a"
    sweep = 0.5 * np.sin(2 * np.pi * 50 * np.linspace(0, 40, 40 * rate) ** 2)
    with soundfile.SoundFile(path, "w", rate, 1, format=container) as file:
        for block in np.array_split(sweep, 64):
            file.write(block)
    blocks = list(clip_blocks(Clip(str(path))))
    assert len(blocks) > 2
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)
