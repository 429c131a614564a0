"""Labelled clips meet their audio: what is found, cut, kept on disk and put into batches."""

import dataclasses
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aesanet.errors import ClipError, InputError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy, num_tokens
from aesanet.runtime.windows import split_windows
from aesanet.training import cache as cache_module
from aesanet.training import dataset
from aesanet.training.batches import load_batch, training_batches, validation_batches
from aesanet.training.cache import cache_bytes, cached_data, window_bytes
from aesanet.training.dataset import check_missing, find_audio, split_clips, window_lengths
from aesanet.training.labels import LabelledClip, read_labels
from aesanet.training.progress import Progress
from aesanet.training.report import write_validation

SILENT = Progress()
HALF_SECOND = WindowPolicy(window_seconds=0.5, hop_seconds=0.5)
SECONDS = {"a.wav": 0.3, "b.wav": 0.5, "long.wav": 1.9, "tail.wav": 1.1}  # the tail of 0.1 s is left out


def clip(path, level=5.0, system=None):
    return LabelledClip(path or "nameless", path, system, (level, level, level, math.nan), None)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(5)
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, seconds in SECONDS.items():
        wave = 0.1 * rng.standard_normal(round(SAMPLE_RATE * seconds))
        soundfile.write(folder / name, wave.astype(np.float32), SAMPLE_RATE)
    return folder


@pytest.fixture
def found(root, tmp_path):
    clips, missing = find_audio([clip(name) for name in SECONDS], root, tmp_path / "cache", SILENT)
    assert not missing
    return clips


def test_missing_audio_is_counted_and_named(root, tmp_path):
    (root / "noise.wav").write_bytes(b"not audio at all")
    soundfile.write(root / "short.wav", np.zeros(MIN_SAMPLES - 1, np.float32), SAMPLE_RATE)
    (root / "folder").mkdir()
    names = ["a.wav", "gone.wav", "noise.wav", "short.wav", "folder", None, "nul\0.wav", "b.wav"]
    for _ in range(2):  # the second time with what is remembered
        clips, missing = find_audio([clip(name) for name in names], root, tmp_path / "cache", SILENT)
        assert [one.label.path for one in clips] == ["a.wav", "b.wav"]
        codes = ["not_found", "undecodable", "too_short", "not_a_file", "not_found", "bad_row"]
        assert [one.code for one in missing] == codes
    message = r"^6 of 8 labelled clips .* gone\.wav \(not_found: .*; \.\.\.; check --audio-root, .*--allow-missing"
    with pytest.raises(InputError, match=message):
        check_missing(missing, len(names))
    check_missing([], 2)


def test_a_label_with_an_id_alone_finds_its_file(root, tmp_path):
    """As AudioMOS names the clips of its evaluation."""
    names = ("sys1-utt1", "sys1-utt2", "sys1-utt3", "sys1-utt4")
    for name, suffix in zip(names, (".wav", ".flac", ".mp3", ".txt"), strict=True):
        file = root / f"{name}{suffix}"
        soundfile.write(file, np.zeros(8000, np.float32), SAMPLE_RATE, format="WAV" if suffix == ".txt" else None)
    clips = [LabelledClip(name, None, None, (5.0, 5.0, 5.0, 5.0), None) for name in names]
    found, missing = find_audio(clips, root, tmp_path / "cache", SILENT)
    assert [Path(one.file).name for one in found] == ["sys1-utt1.wav", "sys1-utt2.flac", "sys1-utt3.mp3"]
    assert [(one.id, one.code) for one in missing] == [("sys1-utt4", "not_found")]


def test_lengths_are_remembered_and_survive_a_torn_line(root, tmp_path, monkeypatch):
    clips = [clip(name) for name in SECONDS]
    find_audio(clips[:2], root, tmp_path / "cache", SILENT)
    path = tmp_path / "cache" / "lengths.jsonl"
    *first, last = path.read_bytes().splitlines()
    odd = [b"\xff\xfe", b"[]", *(re.sub(rb"\d+}", length, first[0]) for length in (b"-5}", b"5}", b'"b"}', b"1e5}"))]
    path.write_bytes(b"\n".join([*first, *odd, last[:-1]]))
    first, _ = find_audio(clips, root, tmp_path / "cache", SILENT)
    assert [one.num_samples for one in first] == [round(SAMPLE_RATE * s) for s in SECONDS.values()]
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    monkeypatch.setattr(dataset, "clip_blocks", None)  # nothing is decoded again
    again, _ = find_audio(clips, moved, tmp_path / "cache", SILENT)
    assert [(one.sha256, one.num_samples) for one in again] == [(one.sha256, one.num_samples) for one in first]


def test_what_went_wrong_is_not_remembered(root, tmp_path, monkeypatch):
    def broken(_):
        raise ClipError("not_readable", "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "clip_blocks", broken)
        assert [one.code for one in find_audio([clip("a.wav")], root, tmp_path, SILENT)[1]] == ["not_readable"]
    assert len(find_audio([clip("a.wav")], root, tmp_path, SILENT)[0]) == 1


@given(st.integers(1, 40_000), st.integers(MIN_SAMPLES, 20_000))
def test_windows_are_those_of_the_scorer(num_samples, window):
    seconds = window / SAMPLE_RATE
    policy = WindowPolicy(window_seconds=seconds, hop_seconds=seconds)
    windows = split_windows([np.zeros(num_samples, np.float32)], policy)
    assert window_lengths(num_samples, policy) == [len(w) for w in windows if len(w) >= MIN_SAMPLES]


def test_split_keeps_systems_together_and_clips_on_their_side():
    clips = [clip(f"{i}.wav", system=f"s{i % 40}" if i % 2 else None) for i in range(400)]
    training, validation = split_clips(clips, 0.2)
    assert len(training) + len(validation) == 400
    assert 40 < len(validation) < 130
    assert not {c.system for c in training if c.system} & {c.system for c in validation if c.system}
    more, _ = split_clips([*clips, clip("another.wav")], 0.2)
    assert [c.id for c in more if c.id != "another.wav"] == [c.id for c in training]
    with pytest.raises(InputError, match=r"puts 0 of 2 clips \(1 systems or clips"):
        split_clips([clip("a", system="x"), clip("b", system="x")], 1e-9)


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_the_cache_holds_what_the_network_takes_in(trunk, found, tiny_model, tmp_path):
    data = cached_data(tiny_model, trunk, found, HALF_SECOND, tmp_path / "cache", SILENT)
    files = list((tmp_path / "cache").rglob("*.npy"))
    expected = cache_bytes(found, trunk, tiny_model.config.beats, HALF_SECOND)
    assert sum(file.stat().st_size for file in files) == expected
    assert [len(windows) for windows in data.windows] == [1, 1, 4, 2]
    for one, windows in zip(found, data.windows, strict=True):
        samples = torch.from_numpy(soundfile.read(one.file, dtype="float32")[0])
        for index, window in enumerate(windows):
            wave = samples[8000 * index :][: window.num_samples][None]
            with torch.no_grad():
                states, _ = tiny_model.encoder.beats.hidden_states(wave, torch.tensor([wave.shape[1]]))
                fbank = tiny_model.frontend(wave)[0]
            values = np.load(window.file)
            if trunk == "trained":
                assert values.dtype == np.float32
                assert np.array_equal(values, fbank)
            else:
                assert values.dtype == np.float16
                assert values.shape == (3, num_tokens(window.num_samples), 32)
                assert np.array_equal(values, torch.cat(states[1:]).half())


def test_a_half_written_cache_is_completed(found, tiny_model, tmp_path):
    def fill():
        return cached_data(tiny_model, "frozen", found, HALF_SECOND, tmp_path / "cache", SILENT)

    files = sorted(window.file for windows in fill().windows for window in windows)
    content = {file: file.read_bytes() for file in files}
    files[0].unlink()
    files[3].write_bytes(content[files[3]][:-1])
    files[5].write_bytes(bytes(len(content[files[5]])))  # as a machine leaves it that lost its power
    killed, writing = (files[0].with_name(f".{files[0].name}.{number:016x}") for number in (7, 8))
    for left in (killed, writing):
        left.touch()
    os.utime(killed, (0, 0))
    kept = {file: file.stat().st_mtime_ns for file in files if file not in (files[0], files[3], files[5])}
    fill()
    assert {file: file.read_bytes() for file in files} == content
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert writing.exists()
    assert not killed.exists()


def test_processes_share_the_work(found, tiny_model, tmp_path):
    written = []
    for rank in (2, 0, 1):  # each finds what those before it have written
        before = set(tmp_path.rglob("*.npy"))
        cached_data(tiny_model, "frozen", found, HALF_SECOND, tmp_path / "cache", SILENT, (rank, 3))
        written.append({path.name.split("-")[0] for path in set(tmp_path.rglob("*.npy")) - before})
    names = [one.sha256 for one in found]
    assert written == [{names[2]}, {names[0], names[3]}, {names[1]}]


def test_a_cache_belongs_to_weights_trunk_and_window(found, tiny_model, tmp_path):
    def folder(model, trunk, policy=HALF_SECOND):
        return cached_data(model, trunk, found[:1], policy, tmp_path / "cache", SILENT).windows[0][0].file.parent

    other = random_model(tiny_config(), seed=8)
    one_second = WindowPolicy(window_seconds=1.0, hop_seconds=1.0)
    frozen = folder(tiny_model, "frozen"), folder(other, "frozen"), folder(tiny_model, "frozen", one_second)
    assert len({*frozen, folder(tiny_model, "trained")}) == 4
    assert folder(tiny_model, "trained") == folder(other, "trained")  # the front end has no weights


def test_audio_under_two_names_is_kept_once(root, tiny_model, tmp_path):
    shutil.copy(root / "a.wav", root / "again.wav")
    clips, _ = find_audio([clip("a.wav"), clip("again.wav")], root, tmp_path / "cache", SILENT)
    data = cached_data(tiny_model, "trained", clips, HALF_SECOND, tmp_path / "cache", SILENT)
    assert data.windows[0] == data.windows[1]
    beats = tiny_model.config.beats
    assert cache_bytes(clips, "trained", beats, HALF_SECOND) == window_bytes("trained", beats, clips[0].num_samples)


def test_a_full_disk_is_told_before_work(found, tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs 0\.00 GB more.*0\.00 GB free; give --cache"):
        cached_data(tiny_model, "frozen", found, HALF_SECOND, tmp_path / "cache", SILENT)
    assert not list(tmp_path.rglob("*.npy"))


def test_states_beyond_fp16_are_refused(found, tmp_path):
    model = random_model(tiny_config(), seed=7)
    with torch.no_grad():
        model.encoder.beats.layers[1].final_layer_norm.weight.mul_(1e5)
    with pytest.raises(InputError, match=r"a\.wav: BEATs' hidden states reach .*65504; --unfreeze"):
        cached_data(model, "frozen", found, HALF_SECOND, tmp_path / "cache", SILENT)


def test_audio_that_changed_meanwhile_is_refused(found, root, tiny_model, tmp_path):
    soundfile.write(root / "b.wav", np.zeros(5000, np.float32), SAMPLE_RATE)
    with pytest.raises(InputError, match=r"b\.wav: changed while it was read"):
        cached_data(tiny_model, "trained", found, HALF_SECOND, tmp_path / "cache", SILENT)


def test_the_hash_of_data_is_of_audio_and_labels(found, root, tiny_model, tmp_path):
    def sha256(folder, level=5.0):
        clips, _ = find_audio([clip(name, level) for name in SECONDS], folder, tmp_path / "cache", SILENT)
        return cached_data(tiny_model, "trained", clips, HALF_SECOND, tmp_path / "cache", SILENT).sha256()

    shutil.copytree(root, tmp_path / "moved")
    assert sha256(root) == sha256(tmp_path / "moved")
    assert sha256(root) != sha256(root, level=5.5)
    soundfile.write(root / "b.wav", np.zeros(8000, np.float32), SAMPLE_RATE)
    assert sha256(root) != sha256(tmp_path / "moved")


@pytest.fixture
def many(tmp_path, tiny_model):
    """90 clips of all lengths, some of several windows."""
    rng = np.random.default_rng(6)
    for i in range(90):
        wave = 0.1 * rng.standard_normal(round(SAMPLE_RATE * rng.uniform(0.2, 1.4)))
        soundfile.write(tmp_path / f"{i}.wav", wave.astype(np.float32), SAMPLE_RATE)
    clips, _ = find_audio([clip(f"{i}.wav", i / 10) for i in range(90)], tmp_path, tmp_path / "cache", SILENT)
    return cached_data(tiny_model, "trained", clips, HALF_SECOND, tmp_path / "cache", SILENT)


def test_an_epoch_takes_one_window_of_every_clip(many):
    first, second = (training_batches(many, 4, seed=1, epoch=epoch) for epoch in (1, 2))
    assert first == training_batches(many, 4, seed=1, epoch=1)
    assert first != second != training_batches(many, 4, seed=2, epoch=2)
    taken = [set(), set()]
    for batches, parts in zip((first, second), taken, strict=True):
        parts.update(part for batch in batches for part in batch)
        assert sorted(clip for batch in batches for clip, _ in batch) == list(range(90))
        assert sorted(map(len, batches)) == [2, *[4] * 22]
        lengths = [[many.windows[c][w].num_samples for c, w in batch] for batch in batches]
        padding = 1 - sum(map(sum, lengths)) / sum(max(batch) * len(batch) for batch in lengths)
        assert padding < 0.1
        assert lengths != sorted(lengths, key=max)  # the short ones do not all come first
    assert taken[0] != taken[1]


def test_validation_keeps_ratings(found, tiny_model, tmp_path):
    ratings = np.array([[1.0, 2.5], [3.0, 4.0], [math.nan] * 2, [9.0, 10.0]])
    labels = [
        LabelledClip("rated", "a.wav", "s", (1.75, 3.5, math.nan, 9.5), ratings),
        LabelledClip("means", "b.wav", None, (1.0, 2.0, math.nan, 4.0), None),
    ]
    clips = [dataclasses.replace(one, label=label) for one, label in zip(found[:2], labels, strict=True)]
    write_validation(cached_data(tiny_model, "trained", clips, HALF_SECOND, tmp_path / "cache", SILENT), tmp_path)
    rated, means = read_labels([tmp_path / "validation.jsonl"])
    np.testing.assert_array_equal(rated.ratings, ratings)
    assert (rated.system, means.system, means.ratings) == ("s", None, None)
    np.testing.assert_array_equal(means.scores, labels[1].scores)


def test_a_window_is_drawn_as_often_as_it_is_long(found, tiny_model, tmp_path):
    (long,) = [one for one in found if one.label.path == "long.wav"]  # 0.5, 0.5, 0.5 and 0.4 s
    data = cached_data(tiny_model, "trained", [long], HALF_SECOND, tmp_path / "cache", SILENT)
    taken = [training_batches(data, 1, seed=0, epoch=epoch)[0][0][1] for epoch in range(1900)]
    _, counts = np.unique(taken, return_counts=True)
    assert stats.chisquare(counts, [500, 500, 500, 400]).pvalue > 1e-3


def test_validation_takes_every_window(many):
    parts = [part for batch in validation_batches(many, 4) for part in batch]
    assert sorted(parts) == [(c, w) for c, windows in enumerate(many.windows) for w in range(len(windows))]


def test_batches_are_padded_with_zeros(many, found, tiny_model, tmp_path):
    batch = load_batch(many, [(3, 0), (7, 0), (11, 0)], "trained")
    for row, index in enumerate((3, 7, 11)):
        own = np.load(many.windows[index][0].file)
        assert np.array_equal(batch.inputs[row, : len(own)], own)
        assert not batch.inputs[row, len(own) :].any()
        assert batch.num_tokens[row] == num_tokens(many.windows[index][0].num_samples)
        assert batch.labels[row, :3].tolist() == [pytest.approx(index / 10)] * 3
        assert batch.labels[row, 3].isnan()
    frozen = cached_data(tiny_model, "frozen", found, HALF_SECOND, tmp_path / "cache", SILENT)
    batch = load_batch(frozen, [(0, 0), (2, 1)], "frozen")
    assert batch.inputs.dtype == torch.float16
    assert batch.inputs.shape == (3, 2, num_tokens(8000), 32)
    own = np.load(frozen.windows[0][0].file)
    assert np.array_equal(batch.inputs[:, 0, : own.shape[1]], own)
    assert not batch.inputs[:, 0, own.shape[1] :].any()
