"""Clips of one file, decoded together, are what each is alone; how they are told of, and which channel is heard."""

import os

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.errors import ClipError
from aesanet.runtime.audio import decoders
from aesanet.runtime.audio.decode import Heard, decode
from aesanet.runtime.rows.row import Clip

SECONDS = 12.0


def run(clips, channels="mean"):
    """(samples, end) of each clip."""
    samples, ends = [[] for _ in clips], {}
    for index, part in decode(clips, channels):
        assert index not in ends
        if isinstance(part, np.ndarray):
            samples[index].append(part)
        else:
            ends[index] = part
    assert ends.keys() == set(range(len(clips)))
    return [(np.concatenate([*parts, np.zeros(0, np.float32)]), ends[i]) for i, parts in enumerate(samples)]


def noise(rate, channels=1, seconds=SECONDS):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (round(rate * seconds), channels))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files whole, cut short and damaged inside."""
    folder = tmp_path_factory.mktemp("files")
    for container in ("WAV", "FLAC", "OGG", "MP3"):
        path = folder / f"whole.{container}"
        soundfile.write(path, noise(22_050, 2), 22_050, format=container)
        content = bytearray(path.read_bytes())
        (folder / f"cut.{container}").write_bytes(content[: len(content) // 2])
        content[len(content) // 2 : len(content) // 2 + 5_000] = bytes(5_000)
        (folder / f"damaged.{container}").write_bytes(content)
    return folder


segments = st.tuples(st.none() | st.floats(0, SECONDS + 2), st.none() | st.floats(0.001, 5))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
@given(
    asked=st.lists(segments, min_size=2, max_size=5),
    state=st.sampled_from(["whole", "cut", "damaged"]),
    channels=st.sampled_from(["mean", "left", "loudest"]),
)
@settings(max_examples=12)
def test_a_clip_among_others_is_bit_identical_to_the_clip_alone(files, container, asked, state, channels):
    path = str(files / f"{state}.{container}")
    clips = [Clip(path, start, None if length is None else (start or 0.0) + length) for start, length in asked]
    for clip, (samples, end) in zip(clips, run(clips, channels), strict=True):
        ((alone, alone_end),) = run([clip], channels)
        np.testing.assert_array_equal(samples, alone)
        if isinstance(end, ClipError):
            assert (end.code, end.message) == (alone_end.code, alone_end.message)
        else:
            assert end == alone_end


@pytest.mark.parametrize(
    ("container", "seconds"), [("OGG", 5.0), ("MP3", 5.0), ("WAV", 1.5 + 2.0 + 1.0 + 1.5), ("FLAC", 6.0)]
)
def test_no_more_is_decoded_than_must_be(files, container, seconds, monkeypatch):
    """What does not seek is read once, from the start to the last end; of the rest, each clip alone."""
    path = str(files / f"whole.{container}")
    frames = []
    read = decoders.SoundfileDecoder.read

    def counted(self, wanted):
        block = read(self, wanted)
        frames.append(len(block))
        return block

    monkeypatch.setattr(decoders.SoundfileDecoder, "read", counted)
    run([Clip(path, 0.5, 2.0), Clip(path, 1.0, 3.0), Clip(path, 4.0, 5.0), Clip(path, 0.0, 1.5)])
    assert seconds <= sum(frames) / 22_050 < seconds + 1


def test_an_error_in_one_clip_is_that_clips_alone(tmp_path):
    wave = noise(16_000)
    wave[5 * 16_000] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    path = str(tmp_path / "a.wav")
    clips = [Clip(path, 0, 4), Clip(path, 4.5, 6), Clip(path, 50, 51), Clip(path, 5.5, None)]
    (first, bad, behind, last) = run(clips)
    assert bad[1].code == "non_finite"
    assert behind[1].code == "no_audio"
    np.testing.assert_array_equal(first[0], wave[: 4 * 16_000, 0].astype(np.float32))
    np.testing.assert_array_equal(last[0], wave[round(5.5 * 16_000) :, 0].astype(np.float32))


def test_a_file_that_cannot_be_opened_is_each_clips_error(tmp_path):
    clips = [Clip(str(tmp_path / "none.wav"), start) for start in (None, 1.0, 2.0)]
    assert [end.code for _, end in run(clips)] == ["not_found"] * 3


@pytest.mark.parametrize("container", ["WAV", "OGG"])
def test_an_abandoned_file_is_closed(files, container):
    before = len(os.listdir("/proc/self/fd"))
    parts = decode([Clip(str(files / f"whole.{container}"), 0.0, None)])
    next(parts)
    assert len(os.listdir("/proc/self/fd")) > before
    parts.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_heard_is_told(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(44_100, 2), 44_100)
    path = str(tmp_path / "a.wav")
    assert run([Clip(path)])[0][1] == Heard(SECONDS, SECONDS, 44_100, 2, None)
    assert run([Clip(path, 2.0, 3.5)])[0][1] == Heard(1.5, 1.5, 44_100, 2, None)
    assert run([Clip(path, 11.0, 99.0)])[0][1] == Heard(1.0, 1.0, 44_100, 2, None)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_channel_policies_are_soxr_on_the_channel(tmp_path, rate):
    """The last is the loudest in the first half, and the middle one over all."""
    wave = noise(rate, 3).astype(np.float32)
    half = len(wave) // 2
    wave *= np.where(np.arange(len(wave))[:, None] < half, [0.1, 0.2, 0.3], [0.1, 0.9, 0.3]).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    path = str(tmp_path / "a.wav")

    def expected(samples):
        return samples if rate == 16_000 else soxr.resample(samples, rate, 16_000, quality="HQ")

    for policy, channel in (("left", wave[:, 0]), ("mean", wave.mean(axis=1)), ("loudest", wave[:, 1])):
        ((samples, end),) = run([Clip(path)], policy)
        np.testing.assert_allclose(samples, expected(channel), atol=2e-6)
        assert end.channels == 3
    whole, first = run([Clip(path), Clip(path, 0.0, SECONDS / 2)], "loudest")
    np.testing.assert_allclose(whole[0], expected(wave[:, 1]), atol=2e-6)
    np.testing.assert_allclose(first[0], expected(wave[:half, 2]), atol=2e-6)


def test_of_channels_equally_loud_the_first_is_heard(tmp_path):
    wave = noise(16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.concatenate([0 * wave, -wave, wave], axis=1), 16_000, subtype="FLOAT")
    ((samples, _),) = run([Clip(str(tmp_path / "a.wav"))], "loudest")
    np.testing.assert_array_equal(samples, -wave[:, 0])


STEP = 2.0**-15
SILENCES = [
    ("digital", np.zeros(16_000)),
    ("digital", np.full(16_000, 0.5)),
    ("digital", np.tile([0.25, 0.25 + 0.99 * STEP], 8_000)),
    ("near", np.tile([0.25, 0.25 + 1.01 * STEP], 8_000)),
    ("near", np.tile([0.5 - 0.99e-3, 0.5 + 0.99e-3], 8_000)),
    (None, np.tile([0.5 - 1.01e-3, 0.5 + 1.01e-3], 8_000)),
    (None, np.tile([-0.5, 0.5], 8_000)),
    ("near", np.append(np.zeros(200_000), 0.1)),  # a click
    (None, np.append(np.zeros(5_000), 0.1)),
]


@pytest.mark.parametrize(("kind", "wave"), SILENCES)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_silence_is_told(tmp_path, kind, wave, rate):
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="DOUBLE")
    assert run([Clip(str(tmp_path / "a.wav"))])[0][1].silence == kind


def test_silence_is_that_of_the_clip_and_of_what_is_heard_of_it(tmp_path):
    wave = np.zeros((96_000, 2))
    wave[48_000:, 0], wave[48_000:, 1] = 0.5 * np.sin(np.arange(48_000)), -0.5 * np.sin(np.arange(48_000))
    path = str(tmp_path / "a.wav")
    soundfile.write(path, wave, 16_000)
    clips = [Clip(path), Clip(path, 0, 3), Clip(path, 3, 6)]
    assert [end.silence for _, end in run(clips, "left")] == [None, "digital", None]
    assert [end.silence for _, end in run(clips, "mean")] == ["digital"] * 3
