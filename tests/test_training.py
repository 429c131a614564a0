"""Training: the loop, what it leaves behind, and that it goes on exactly where it was stopped."""

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_model, tiny_config
from runs import ALONE, CONFIG, CPU, Heard, both_sides, changed, epochs, new_model, run, same_run

from aesanet import Scorer
from aesanet.errors import InputError, TrainingError
from aesanet.export.build import export_bundle
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import Calibration
from aesanet.training.batches import load_batch
from aesanet.training.config import TrainingConfig, learning_rate
from aesanet.training.labels import read_labels
from aesanet.training.learner import Learner, whole_clips
from aesanet.training.losses import ClipOutputs, training_loss
from aesanet.training.triplet import TripletBuffer

# What the network is given, and what becomes of whole clips


def test_the_cache_of_a_frozen_trunk_is_as_good_as_computing(labelled_clips, labelled):
    model = random_model(tiny_config(), seed=7)
    frozen, trained = (both_sides(model, trunk, labelled_clips, labelled)[1] for trunk in ("frozen", "trained"))
    scores = [
        whole_clips(Learner(model, trunk, False), data, 4, CPU, ALONE)
        for trunk, data in (("frozen", frozen), ("trained", trained))
    ]
    for cached, computed in zip(*scores, strict=True):
        assert np.abs(cached - computed).max() < 5e-3
    assert np.ptp(scores[0][0], axis=0).min() > 0.05


def test_training_on_the_cache_is_training_on_the_trunk(labelled_clips, labelled):
    """The same weights come out of a frozen trunk's FP16 states as of a trunk that is run, with its weights held."""
    model = new_model(dropout=0.0)
    frozen, trained = (both_sides(model, trunk, labelled_clips, labelled)[0] for trunk in ("frozen", "trained"))
    parts = [(clip, 0) for clip in range(6)]
    gradients = []
    for trunk, data in (("frozen", frozen), ("trained", trained)):
        model.zero_grad()
        batch = load_batch(data, parts, trunk)
        rows = Learner(model, trunk, False)(batch.inputs, batch.num_tokens, batch.labels)
        buffer = TripletBuffer("none")
        training_loss(ClipOutputs.of_rows(rows), batch.labels, torch.arange(6), buffer, CONFIG).total.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if not n.startswith("encoder.beats.")})
    for name, value in gradients[1].items():
        assert (gradients[0][name] - value).norm() <= 0.01 * value.norm() + 1e-6, name
    assert all(p.grad is not None for p in model.encoder.beats.parameters())  # and the trunk learns when it may


@pytest.mark.slow
def test_a_long_clip_is_validated_as_it_will_be_scored(labelled_clips, labelled, tmp_path):
    config = changed(epochs=1)
    result = run(labelled, labelled_clips, tmp_path / "out", trunk="trained", config=config)
    export_bundle(result.checkpoint, tmp_path / "bundle")
    scorer = Scorer.open(tmp_path / "bundle", backend="onnxruntime")
    model = load_checkpoint(result.checkpoint)
    assert model.config.window == config.window
    assert model.config.head.calibration == Calibration()
    _, validation = both_sides(model, "trained", labelled_clips, labelled)
    assert max(map(len, validation.windows)) == 3
    scores, _ = whole_clips(Learner(model, "trained", False), validation, 3, CPU, ALONE)
    errors = np.nanmean((scores - validation.labels) ** 2, axis=0)
    assert result.best_mse == pytest.approx(errors.mean(), abs=1e-4)  # without dropout, that is
    for clip, expected in zip(validation.clips, scores, strict=True):
        scored = scorer.score(clip.file)
        assert pytest.approx(expected, abs=1e-4) == [scored.CE, scored.CU, scored.PC, scored.PQ]
        samples = torch.from_numpy(soundfile.read(clip.file, dtype="float32")[0])
        windows = [w for w in samples.split(8000) if len(w) >= 2800]
        with torch.no_grad():
            each = torch.cat([model(w[None], torch.tensor([len(w)])) for w in windows])
        weights = torch.tensor([float(len(w)) for w in windows])
        assert (weights @ each / weights.sum()).tolist() == pytest.approx(expected, abs=1e-4)


# The loop


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_it_learns_loudness(trunk, labelled_clips, labelled, tmp_path):
    config = changed(epochs=10, patience=10, learning_rate=5e-3)
    progress = Heard()
    result = run(labelled, labelled_clips, tmp_path, trunk=trunk, config=config, progress=progress)
    rows = epochs(tmp_path)
    assert len(rows) == result.epochs == 10
    assert result.finished
    mses = [float(row["validation_mse"]) for row in rows]
    assert mses[0] > 2.5
    assert min(mses) == pytest.approx(result.best_mse, rel=1e-5)
    assert min(mses) < mses[0] / 2
    assert result.best_epoch == int(rows[np.argmin(mses)]["epoch"])
    assert float(rows[-1]["mean_srcc"]) > 0.8
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2
    assert [line.split(":")[0] for line in progress.lines if not line.startswith("warning")] == [
        f"epoch {epoch}" for epoch in range(1, 11)
    ]
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")
    assert sum(int(row["anchors"]) for row in rows) == 280
    assert json.loads((tmp_path / "training.json").read_text())["config"]["learning_rate"] == 5e-3
    # What validates is labels and manifest in one.
    labels = read_labels([tmp_path / "validation.jsonl"])
    assert [clip.id for clip in labels] == [clip.label.id for clip in labelled_clips[28:]]
    assert all(Path(clip.path).is_file() for clip in labels)


def test_early_stopping(labelled_clips, labelled, tmp_path):
    config = changed(epochs=30, patience=2, learning_rate=1.0)  # which spoils it at once
    result = run(labelled, labelled_clips, tmp_path, config=config)
    assert result.finished
    assert result.epochs == result.best_epoch + 2 < 30


@pytest.mark.parametrize("sampling", ["hardest", "none"])
def test_the_ablations_learn_too(sampling, labelled_clips, labelled, tmp_path):
    config = changed(triplet=sampling, epochs=6, learning_rate=5e-3)
    result = run(labelled, labelled_clips, tmp_path, config=config)
    rows = epochs(tmp_path)
    assert result.best_mse < float(rows[0]["validation_mse"]) / 2
    anchors, terms = sum(int(row["anchors"]) for row in rows), [float(row["train_triplet"]) for row in rows]
    assert (anchors > 0) == (max(terms) > 0) == (sampling == "hardest")


def test_only_the_head_learns_on_a_frozen_trunk(labelled_clips, labelled, tmp_path):
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(labelled, labelled_clips, tmp_path, config=changed(epochs=1), model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder.beats."), name


def test_bf16_stays_close(labelled_clips, labelled, tmp_path):
    mse = [
        run(labelled, labelled_clips, tmp_path / p, config=changed(precision=p, epochs=2)).best_mse
        for p in ("fp32", "bf16")
    ]
    assert mse[0] != mse[1]
    assert mse[1] == pytest.approx(mse[0], rel=0.1)


def test_learning_rates():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=3, schedule="cosine")
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:2] == pytest.approx([0.25, 0.5 * 0.5 * (1 + math.cos(math.pi / 100))])
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert {learning_rate(TrainingConfig(), step, 9) for step in range(9)} == {1e-4}


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("max_seconds", 0.1), ("seed", -1)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        TrainingConfig(**{field: value})


def test_a_loss_that_is_no_number_ends_the_run(labelled_clips, labelled, tmp_path):
    with pytest.raises(TrainingError, match=r"^step \d+ of epoch 1: the loss is .*try a lower learning rate"):
        run(labelled, labelled_clips, tmp_path, config=changed(learning_rate=1e30))
    with pytest.raises(TrainingError, match=r"^epoch 1: the weights that its last step left"):
        run(labelled, labelled_clips, tmp_path / "one step", config=changed(learning_rate=1e30, batch_size=28))


# Stopping and going on


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_a_run_that_is_stopped_goes_on_exactly(trunk, labelled_clips, labelled, tmp_path):
    config = changed(epochs=2, weight_decay=0.01, schedule="cosine", warmup_steps=2)
    run(labelled, labelled_clips, tmp_path / "whole", trunk=trunk, config=config)
    for start in range(5):  # 14 steps, three at a time
        steps = count(1)
        result = run(
            labelled, labelled_clips, tmp_path / "parts", trunk=trunk, config=config, stop=lambda s=steps: next(s) == 3
        )
        assert result.finished == (start == 4)
    same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("epochs_in_all", "killed_at"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_killed_before_the_best_is_written_it_goes_on_with_it(
    epochs_in_all, killed_at, labelled_clips, labelled, tmp_path, monkeypatch
):
    config = changed(epochs=epochs_in_all, learning_rate=5e-3)  # every epoch is better than the one before
    assert run(labelled, labelled_clips, tmp_path / "whole", config=config).best_epoch == epochs_in_all
    calls = count(1)

    def killed(*arguments):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        save_checkpoint(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("aesanet.training.trainer.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(labelled, labelled_clips, tmp_path / "parts", config=config)
    assert (tmp_path / "parts" / "best.safetensors").exists() == (killed_at > 1)
    assert run(labelled, labelled_clips, tmp_path / "parts", config=config).finished
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_does_nothing(labelled_clips, labelled, tmp_path):
    result = run(labelled, labelled_clips, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    progress = Heard()
    assert run(labelled, labelled_clips, tmp_path, progress=progress) == result
    assert progress.lines == [f"{tmp_path}: this run has finished; nothing to do"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("left", [None, 0, 1000])
@pytest.mark.parametrize("when", ["its weights are the last", "others follow", "none follow"])
def test_a_best_checkpoint_that_is_gone_is_made_anew_or_told(left, when, labelled_clips, labelled, tmp_path):
    """Nobody is told of a checkpoint that is not there."""
    steps = count(1)
    config = changed(epochs=2, learning_rate=1e4)  # no epoch is better than the first
    if when == "its weights are the last":
        config = changed(epochs=2, learning_rate=5e-3)  # every epoch is better than the one before
    run(labelled, labelled_clips, tmp_path, config=config, stop=lambda: when == "others follow" and next(steps) == 9)
    best = tmp_path / "best.safetensors"
    content = best.read_bytes()
    if left is None:
        best.unlink()
    else:
        best.write_bytes(content[:left])
    progress = Heard()
    if when != "none follow":
        assert run(labelled, labelled_clips, tmp_path, config=config, progress=progress).best_epoch == 2
        noted = any("it was the best so far, whose place the next epoch takes" in line for line in progress.lines)
        assert noted == (when == "others follow")
        load_checkpoint(best)
        assert noted or best.read_bytes() == content
        return
    with pytest.raises(InputError, match=r"best\.safetensors: .*; it was the best, of epoch 1, and .*another --out"):
        run(labelled, labelled_clips, tmp_path, config=config)


def test_another_run_is_not_gone_on_with(labelled_clips, labelled, tmp_path):
    config = changed(epochs=1)
    run(labelled, labelled_clips, tmp_path, config=config)
    other_labels = [replace(one, label=replace(one.label, scores=(1.0, 2.0, 3.0, 4.0))) for one in labelled_clips]
    for field, arguments in {
        "seed": {"config": changed(config, seed=3)},
        "triplet_axis": {"config": changed(config, triplet_axis="CE")},
        "trunk": {"trunk": "trained", "config": config},
        "initial_weights": {"model": new_model(seed=2), "config": config},
        "training_data": {"clips": other_labels, "config": config},
    }.items():
        with pytest.raises(InputError, match=f"holds a run with {field} "):
            run(labelled, **{"clips": labelled_clips, "out": tmp_path} | arguments)
    run(labelled, labelled_clips, tmp_path, config=changed(config, save_minutes=5.0))
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"state\.pt: not a state"):
        run(labelled, labelled_clips, tmp_path, config=config)
