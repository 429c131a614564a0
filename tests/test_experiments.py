"""The paper's experiments, small: every variant is trained and tested, and nothing leaks from trunk to heads."""

import csv
import itertools
from collections import defaultdict

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

from aesanet.axes import AXES
from aesanet.benchmarks.experiments import heads
from aesanet.benchmarks.experiments.languages import language_table, plot_languages
from aesanet.lengths import num_frames, num_tokens
from aesanet.training.demo import train as demo
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import DemoClip
from aesanet.training.demo.tables import LABELS_FILE, read_table


@pytest.fixture
def corpus(tmp_path):
    """Noise from faint to loud in all splits; CE is the loudness, CU and PC are the same for all."""
    rng = np.random.default_rng(1)
    clips, labels = [], []
    for split in ("train", "validation", "test", "synthetic"):
        for index in range(36):
            name, level = f"{split}-{index}", (index * 7 % 36) / 35
            wave = 0.2 * 10 ** (-3 * (1 - level)) * rng.standard_normal(4800 + 100 * index)
            soundfile.write(tmp_path / f"{name}.flac", wave, 16_000)
            clips.append(DemoClip(id=name, split=split, kind="speech", references=(f"{split}-{index // 2}",)))
            labels.append(Label(id=name, CE=1 + 8 * level, CU=5.0, PC=1.0, PQ=9 - 8 * level))
    return heads.Corpus(tmp_path, clips, labels)


@pytest.fixture
def small(corpus, monkeypatch):
    beats = msgspec.structs.replace(demo.BEATS, encoder_layers=1, encoder_embed_dim=32, encoder_ffn_embed_dim=32)
    monkeypatch.setattr(heads.Corpus, "of", classmethod(lambda cls, work: corpus))
    monkeypatch.setattr(heads, "SEEDS", (0, 1))
    monkeypatch.setattr(heads, "HEADS_SHARE", 2)
    for name in ("TRUNK_CONFIG", "HEAD_CONFIG"):
        config = msgspec.structs.replace(getattr(heads, name), epochs=3, batch_size=4, precision="fp32")
        monkeypatch.setattr(heads, name, config)
    new_model = demo.new_model
    monkeypatch.setattr(demo, "new_model", lambda: new_model(beats))


def test_trunk_and_heads_share_no_reference(corpus):
    trunk, head = (corpus.for_training(of_heads=of_heads) for of_heads in (False, True))
    sides = [{c.references[0] for c in side.clips if c.split == "train"} for side in (trunk, head)]
    assert sides[0].isdisjoint(sides[1])
    assert (len(sides[0]), len(sides[1])) == (13, 5)
    assert [c for c in trunk.clips if c.split == "test"] == [c for c in corpus.clips if c.split == "test"]
    assert [one.id for one in head.labels] == [clip.id for clip in head.clips]


def test_no_damaged_reference_of_the_committed_corpus_is_on_both_sides(tmp_path):
    corpus = heads.Corpus(tmp_path, read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label))
    trunk, head = (
        [c for c in corpus.for_training(of_heads=of_heads).clips if c.split == "train"] for of_heads in (False, True)
    )
    assert {clip.id for clip in trunk}.isdisjoint(clip.id for clip in head)
    assert 2000 < len(head) < len(trunk) / 2
    damaged = [{c.references[0] for c in side if c.kind != "mix"} for side in (trunk, head)]
    assert damaged[0].isdisjoint(damaged[1])


def test_log_mel_has_a_token_where_beats_has_one():
    fbank = torch.arange(num_frames(9_000) * 128.0).view(1, -1, 128)
    tokens = heads.LogMel()(fbank, torch.tensor([0]))
    assert tokens.shape == (1, num_tokens(9_000), 256)
    assert torch.equal(tokens[0, 3], fbank[0, 6:8].flatten())


@pytest.mark.slow
def test_every_variant_is_trained_and_tested(small, tmp_path):
    rows = list(heads.head_rows(tmp_path / "work"))
    keys = [(row["features"], row["triplet"], row["seed"], row["tested_on"], row["axis"]) for row in rows]
    assert len(set(keys)) == len(keys) == len(heads.VARIANTS) * 2 * 2 * 4
    assert all(row["clips"] == 36 and row["mse"] >= 0 for row in rows)
    assert all(row["srcc"] is row["ktau"] is None for row in rows if row["axis"] in ("PC", "CU"))
    known = [row for row in rows if row["axis"] in ("CE", "PQ")]
    assert all(-1 <= row[metric] <= 1 for row in known for metric in ("srcc", "ktau"))
    runs = defaultdict(list)
    for row in known:
        runs[row["features"], row["triplet"], row["seed"]].append(row["mse"])
    assert len(set(map(tuple, runs.values()))) == len(runs) == len(heads.VARIANTS) * 2  # no two runs are one
    epochs = list(heads.epoch_rows(tmp_path / "work"))
    assert len(epochs) == len(runs) * 3
    assert {(e["features"], e["triplet"], e["seed"]) for e in epochs} == set(runs)
    heads.plot_heads(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("triplet hardest") == 1
    loudness = [row["srcc"] for row in rows if row["features"] == "log-mel" and row["axis"] == "CE"]
    lines = heads.head_table(rows).splitlines()
    assert len(lines) == 2 + 2 * 2 * len(heads.VARIANTS)
    mean, deviation = np.mean(loudness[::2]), np.std(loudness[::2], ddof=1)
    assert f"| SRCC | natural | log-mel | random | {mean:.3f} ± {deviation:.3f} | - | - |" in "\n".join(lines)


def test_the_committed_experiments_are_whole_and_documented():
    with open(ROOT / "benchmarks" / "results" / "experiments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = {(row["features"], row["triplet"], row["seed"], row["tested_on"], row["axis"]) for row in rows}
    expected = itertools.product(heads.VARIANTS, heads.SEEDS, heads.NATURES.values(), AXES)
    assert keys == {(v.features, v.triplet, str(seed), nature, axis) for v, seed, nature, axis in expected}
    assert len(rows) == len(keys)
    assert all(row["processor"] and row["torch"] and int(row["clips"]) > 300 for row in rows)
    with open(ROOT / "benchmarks" / "results" / "experiments-epochs.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == len(heads.VARIANTS) * len(heads.SEEDS) * heads.HEAD_CONFIG.epochs
    last = [e for e in epochs if e["features"] == "trunk" and int(e["epoch"]) == heads.HEAD_CONFIG.epochs]
    assert all(0.445 < float(e["order_correlation"]) < 0.515 for e in last)  # as the document says
    random = [int(e["active"]) / int(e["anchors"]) for e in last if e["triplet"] == "random"]
    assert all(0.4 < share < 0.45 for share in random)
    assert heads.head_table(rows) in (ROOT / "docs" / "experiments.md").read_text()


def test_the_committed_languages_can_be_drawn(tmp_path):
    with open(ROOT / "benchmarks" / "results" / "languages.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["processor"] and row["torch"] for row in rows)
    assert len({row["language"] for row in rows}) >= 14
    assert language_table(rows) in (ROOT / "docs" / "experiments.md").read_text()
    numbers = [{key: float(value) if "_" in key else value for key, value in row.items()} for row in rows]
    plot_languages(numbers, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
