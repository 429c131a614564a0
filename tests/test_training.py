"""Training: the loss, the loop, what it leaves behind, and that it goes on exactly where it was stopped."""

import copy
import csv
import json
import math
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import get_args, get_type_hints

import click
import msgspec
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import RECORDINGS
from helpers import public_beats_file, random_model, tiny_config
from safetensors.torch import load_file

from aesanet import Scorer
from aesanet.axes import AXES
from aesanet.cli.main import cli, main
from aesanet.cli.train import train as train_command
from aesanet.errors import AesanetError, CheckpointError, InputError, TrainingError
from aesanet.export.build import export_bundle
from aesanet.lengths import SAMPLE_RATE
from aesanet.metrics import rank_metrics
from aesanet.models.aesanet import TRUNK_PREFIX, AESANet
from aesanet.models.beats import BEATs
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import Calibration
from aesanet.runtime.decode import ClipReader
from aesanet.runtime.rows import Clip
from aesanet.training.batches import load_batch
from aesanet.training.cache import cached_data
from aesanet.training.config import TrainingConfig, learning_rate
from aesanet.training.dataset import find_audio
from aesanet.training.demo.degrade import lowpass
from aesanet.training.joining import join
from aesanet.training.labels import read_labels
from aesanet.training.learner import Learner, whole_clips
from aesanet.training.losses import ClipOutputs, clip_outputs, training_loss
from aesanet.training.monitor import effective_rank, read_signs, read_warnings
from aesanet.training.processes import Processes, own_device
from aesanet.training.progress import Progress
from aesanet.training.trainer import train
from aesanet.training.triplet import TripletBuffer, TripletCounters

CPU, ALONE, SILENT = torch.device("cpu"), Processes(), Progress()
CONFIG = TrainingConfig(max_seconds=0.5, batch_size=4, epochs=3, learning_rate=2e-3, precision="fp32", device="cpu")


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def changed(config=CONFIG, **fields):
    return msgspec.structs.replace(config, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise from faint to loud, labelled with its loudness; PC falls as it rises, and every third clip has no PQ."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(3)
    with open(folder / "labels.csv", "w") as file:
        print("path,CE,CU,PC,PQ", file=file)
        for i in range(36):
            level, seconds = (i * 7 % 36) / 35, rng.uniform(0.2, 1.2)
            wave = 10 ** (-3 * (1 - level)) * 0.2 * rng.standard_normal(round(SAMPLE_RATE * seconds))
            soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), SAMPLE_RATE, subtype="FLOAT")
            score = 1 + 8 * level
            print(f"{i}.wav,{score},{score},{10 - score},{'' if i % 3 == 0 else score}", file=file)
    return folder


@pytest.fixture(scope="module")
def clips(folder):
    found, missing = find_audio(read_labels([folder / "labels.csv"]), folder, folder / "cache", SILENT)
    assert not missing
    return found


def new_model(seed=1, dropout=0.3):
    config = tiny_config()
    config = msgspec.structs.replace(config, head=msgspec.structs.replace(config.head, dropout=dropout))
    torch.manual_seed(seed)
    return AESANet(config)


def both_sides(model, trunk, clips, folder, config=CONFIG):
    def data(some):
        return cached_data(model, trunk, some, config.window, folder / "cache", SILENT)

    return data(clips[:28]), data(clips[28:])


def run(folder, clips, out, *, trunk="frozen", config=CONFIG, stop=lambda: False, progress=None, model=None):
    model = model or new_model()
    return train(model, trunk, *both_sides(model, trunk, clips, folder, config), config, out, progress, stop=stop)


def epochs(out):
    with open(out / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_run(out, other):
    """Byte for byte, but for the seconds that an epoch took."""
    assert (out / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in epochs(o)] for o in (out, other)]
    assert rows[0] == rows[1]


# The loss


@pytest.fixture(scope="module")
def head_batch():
    """A float64 head in eval mode, features of five unequal clips, labels and a buffer with something in it."""
    model = random_model(tiny_config(), seed=7).double()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor([24, 8, 16, 40, 32])
    features = torch.randn(5, 40, 32, generator=generator, dtype=torch.float64)
    labels = 10 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    buffer = TripletBuffer("hardest", epsilon=1.5)
    held = torch.randn(30, 16, generator=generator, dtype=torch.float64).abs()
    buffer.term(held, 10 * torch.rand(30, 4, generator=generator, dtype=torch.float64), torch.arange(100, 130))
    return model.head, features, tokens, labels, buffer


def loss_and_gradient(head, features, tokens, labels, buffer, rows):
    head.zero_grad()
    longest = int(tokens[rows].max())
    outputs = clip_outputs(head, features[rows, :longest], tokens[rows], labels[rows])
    loss = training_loss(outputs, labels[rows], torch.tensor(rows), copy.deepcopy(buffer), CONFIG)
    loss.total.backward()
    gradient = {name: value.grad.clone() for name, value in head.named_parameters()}
    return loss, gradient


def test_a_batch_is_the_mean_of_its_clips(head_batch):
    whole, gradient = loss_and_gradient(*head_batch, [0, 1, 2, 3, 4])
    alone = [loss_and_gradient(*head_batch, [row]) for row in range(5)]
    for name in ("total", "clip", "frame", "triplet"):
        assert getattr(whole, name).item() == pytest.approx(np.mean([getattr(a, name).item() for a, _ in alone]))
        assert getattr(whole, name) > 0
    for name, value in gradient.items():
        assert torch.allclose(value, torch.stack([g[name] for _, g in alone]).mean(0), rtol=1e-9, atol=1e-12), name


def test_the_terms_are_those_of_the_specification(head_batch):
    head, features, tokens, labels, buffer = head_batch
    labels = labels.clone()
    labels[0], labels[3, 1] = math.nan, math.nan
    outputs = clip_outputs(head, features, tokens, labels)
    loss = training_loss(outputs, labels, torch.arange(5), copy.deepcopy(buffer), changed(frame_weight=0.7))
    clip, frame = [], []
    with torch.no_grad():
        for row in range(5):
            own = features[row : row + 1, : tokens[row]]
            shared = head.shared_output(own, tokens[row : row + 1])
            scores = head.token_scores(shared, tokens[row : row + 1])[0]
            assert torch.allclose(outputs.embeddings[row], shared[0].mean(0))
            for axis in range(4):
                if not math.isnan(label := labels[row, axis].item()):
                    clip.append((scores[:, axis].mean().item() - label) ** 2)
                    frame.append(((scores[:, axis] - label) ** 2).mean().item())
    assert len(clip) == 15
    assert loss.clip.item() == pytest.approx(np.mean(clip))
    assert loss.frame.item() == pytest.approx(np.mean(frame))
    assert loss.total.item() == pytest.approx(np.mean(clip) + 0.7 * np.mean(frame) + 0.2 * loss.triplet.item())


def test_an_axis_without_labels_is_not_trained(head_batch):
    head, features, tokens, labels, buffer = head_batch
    labels = labels.clone()
    labels[:, 2] = math.nan
    loss, gradient = loss_and_gradient(head, features, tokens, labels, buffer, [0, 1, 2])
    assert loss.total.isfinite()
    for name, value in gradient.items():
        assert value.isfinite().all()
        assert value.any() != name.startswith("axes.PC."), name


# What the network is given, and what becomes of whole clips


def test_the_cache_of_a_frozen_trunk_is_as_good_as_computing(clips, folder):
    model = random_model(tiny_config(), seed=7)
    frozen, trained = (both_sides(model, trunk, clips, folder)[1] for trunk in ("frozen", "trained"))
    scores = [
        whole_clips(Learner(model, trunk, False), data, 4, CPU, ALONE)
        for trunk, data in (("frozen", frozen), ("trained", trained))
    ]
    for cached, computed in zip(*scores, strict=True):
        assert np.abs(cached - computed).max() < 5e-3
    assert np.ptp(scores[0][0], axis=0).min() > 0.05


def test_training_on_the_cache_is_training_on_the_trunk(clips, folder):
    """The same weights come out of a frozen trunk's FP16 states as of a trunk that is run, with its weights held."""
    model = new_model(dropout=0.0)
    frozen, trained = (both_sides(model, trunk, clips, folder)[0] for trunk in ("frozen", "trained"))
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
def test_a_long_clip_is_validated_as_it_will_be_scored(clips, folder, tmp_path):
    config = changed(epochs=1)
    result = run(folder, clips, tmp_path / "out", trunk="trained", config=config)
    export_bundle(result.checkpoint, tmp_path / "bundle")
    scorer = Scorer.open(tmp_path / "bundle", backend="onnxruntime")
    model = load_checkpoint(result.checkpoint)
    assert model.config.window == config.window
    assert model.config.head.calibration == Calibration()
    _, validation = both_sides(model, "trained", clips, folder)
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
def test_it_learns_loudness(trunk, clips, folder, tmp_path):
    config = changed(epochs=10, patience=10, learning_rate=5e-3)
    progress = Heard()
    result = run(folder, clips, tmp_path, trunk=trunk, config=config, progress=progress)
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
    assert [clip.id for clip in labels] == [clip.label.id for clip in clips[28:]]
    assert all(Path(clip.path).is_file() for clip in labels)


def test_early_stopping(clips, folder, tmp_path):
    config = changed(epochs=30, patience=2, learning_rate=1.0)  # which spoils it at once
    result = run(folder, clips, tmp_path, config=config)
    assert result.finished
    assert result.epochs == result.best_epoch + 2 < 30


@pytest.mark.parametrize("sampling", ["hardest", "none"])
def test_the_ablations_learn_too(sampling, clips, folder, tmp_path):
    config = changed(triplet=sampling, epochs=6, learning_rate=5e-3)
    result = run(folder, clips, tmp_path, config=config)
    rows = epochs(tmp_path)
    assert result.best_mse < float(rows[0]["validation_mse"]) / 2
    anchors, terms = sum(int(row["anchors"]) for row in rows), [float(row["train_triplet"]) for row in rows]
    assert (anchors > 0) == (max(terms) > 0) == (sampling == "hardest")


def test_only_the_head_learns_on_a_frozen_trunk(clips, folder, tmp_path):
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(folder, clips, tmp_path, config=changed(epochs=1), model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder.beats."), name


def test_bf16_stays_close(clips, folder, tmp_path):
    mse = [run(folder, clips, tmp_path / p, config=changed(precision=p, epochs=2)).best_mse for p in ("fp32", "bf16")]
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


def test_a_loss_that_is_no_number_ends_the_run(clips, folder, tmp_path):
    with pytest.raises(TrainingError, match=r"^step \d+ of epoch 1: the loss is .*try a lower learning rate"):
        run(folder, clips, tmp_path, config=changed(learning_rate=1e30))
    with pytest.raises(TrainingError, match=r"^epoch 1: the weights that its last step left"):
        run(folder, clips, tmp_path / "one step", config=changed(learning_rate=1e30, batch_size=28))


# Stopping and going on


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_a_run_that_is_stopped_goes_on_exactly(trunk, clips, folder, tmp_path):
    config = changed(epochs=2, weight_decay=0.01, schedule="cosine", warmup_steps=2)
    run(folder, clips, tmp_path / "whole", trunk=trunk, config=config)
    for start in range(5):  # 14 steps, three at a time
        steps = count(1)
        result = run(folder, clips, tmp_path / "parts", trunk=trunk, config=config, stop=lambda s=steps: next(s) == 3)
        assert result.finished == (start == 4)
    same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("epochs_in_all", "killed_at"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_killed_before_the_best_is_written_it_goes_on_with_it(
    epochs_in_all, killed_at, clips, folder, tmp_path, monkeypatch
):
    config = changed(epochs=epochs_in_all, learning_rate=5e-3)  # every epoch is better than the one before
    assert run(folder, clips, tmp_path / "whole", config=config).best_epoch == epochs_in_all
    calls = count(1)

    def killed(*arguments):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        save_checkpoint(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("aesanet.training.trainer.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, clips, tmp_path / "parts", config=config)
    assert (tmp_path / "parts" / "best.safetensors").exists() == (killed_at > 1)
    assert run(folder, clips, tmp_path / "parts", config=config).finished
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_does_nothing(clips, folder, tmp_path):
    result = run(folder, clips, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    progress = Heard()
    assert run(folder, clips, tmp_path, progress=progress) == result
    assert progress.lines == [f"{tmp_path}: this run has finished; nothing to do"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_another_run_is_not_gone_on_with(clips, folder, tmp_path):
    config = changed(epochs=1)
    run(folder, clips, tmp_path, config=config)
    other_labels = [replace(one, label=replace(one.label, scores=(1.0, 2.0, 3.0, 4.0))) for one in clips]
    for field, arguments in {
        "seed": {"config": changed(config, seed=3)},
        "triplet_axis": {"config": changed(config, triplet_axis="CE")},
        "trunk": {"trunk": "trained", "config": config},
        "initial_weights": {"model": new_model(seed=2), "config": config},
        "training_data": {"clips": other_labels, "config": config},
    }.items():
        with pytest.raises(InputError, match=f"holds a run with {field} "):
            run(folder, **{"clips": clips, "out": tmp_path} | arguments)
    run(folder, clips, tmp_path, config=changed(config, save_minutes=5.0))
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"state\.pt: not a state"):
        run(folder, clips, tmp_path, config=config)


@pytest.fixture(scope="module")
def command(folder):
    """A real `aesanet train`, as arguments; the state is saved after every step."""
    public_beats_file(folder / "beats.pt", tiny_config().beats, seed=3)
    return [
        *(sys.executable, "-m", "aesanet.cli.main", "train"),
        *("--labels", folder / "labels.csv", "--audio-root", folder, "--beats", folder / "beats.pt"),
        *("--max-seconds", "0.3", "--validation-share", "0.3", "--epochs", "6", "--batch-size", "4"),
        *("--device", "cpu", "--save-minutes", "1e-9"),
    ]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(command, out, *more):
    return subprocess.Popen(
        [*command, "--out", out, *more], env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of the same command, never disturbed, and what it told."""
    out = tmp_path_factory.mktemp("whole")
    process = started(command, out)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    return out, told


def wait_for(process, ready):
    while process.poll() is None and not ready():
        time.sleep(0.002)


def state_time(out):
    return (out / "state.pt").stat().st_mtime_ns if (out / "state.pt").exists() else 0


@pytest.mark.slow
def test_a_killed_command_goes_on_exactly(command, whole, tmp_path):
    rng = np.random.default_rng()
    kills = 0
    # As soon as so many epochs are told of, which is before the state says so; None is anywhere in an epoch.
    for rows in (None, 1, None, 3, 4):
        process = started(command, tmp_path)
        before = state_time(tmp_path)
        if rows is None:
            wait_for(process, lambda before=before: state_time(tmp_path) > before)
            time.sleep(rng.uniform(0, 0.15))
        else:
            wait_for(process, lambda rows=rows: (tmp_path / "epochs.csv").exists() and len(epochs(tmp_path)) >= rows)
        kills += process.poll() is None
        process.kill()
        told = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), told
    assert kills >= 2
    process = started(command, tmp_path)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    same_run(tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on_and_does(kind, command, whole, tmp_path):
    process = started(command, tmp_path)
    wait_for(process, lambda: state_time(tmp_path))
    process.send_signal(kind)
    told = process.communicate()[1]
    assert process.returncode == 130, told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert len(epochs(whole[0])) == 6
    process = started(command, tmp_path)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    assert f"{tmp_path}: going on in epoch 1, step" in told
    same_run(tmp_path, whole[0])


@pytest.mark.slow
def test_torchrun_starts_the_command(command, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *command[1:], "--epochs", "1", "--out", tmp_path], env=ONE_THREAD, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("aesanet: epoch 1: ") == 1
    assert json.loads((tmp_path / "training.json").read_text())["run"]["processes"] == 2
    load_checkpoint(tmp_path / "best.safetensors", command[command.index("--beats") + 1])


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """Real recordings, cut up, as they are and low-passed in four steps: PQ is the step, whole recordings a system."""
    folder = tmp_path_factory.mktemp("small corpus")
    rows = ["path,system,CE,CU,PC,PQ"]
    for recording in RECORDINGS:
        samples = np.concatenate(list(ClipReader(Clip(str(recording))))).astype(np.float64)
        pieces = [samples[start : start + SAMPLE_RATE] for start in range(0, len(samples) - 8000, 2 * SAMPLE_RATE)]
        for number, piece in enumerate(pieces[:5]):
            for level in range(5):
                name = f"{recording.stem}/{number}-{level}.{('wav', 'flac', 'mp3')[len(rows) % 3]}"
                damaged = lowpass(piece, level, np.random.default_rng(0)) if level else piece
                (folder / name).parent.mkdir(exist_ok=True)
                soundfile.write(folder / name, 0.1 * damaged / damaged.std(), SAMPLE_RATE)
                rows.append(f"{name},{recording.stem},{8 - level},{7 - level},,{9 - 2 * level}")
    (folder / "labels.csv").write_text("\n".join(rows))
    public_beats_file(folder / "beats.pt", tiny_config().beats, seed=3)
    return folder


@pytest.mark.slow
def test_from_labels_to_evaluated_scores(small_corpus, tmp_path):
    """Train on real audio, be killed, go on, then run the three commands that it says come next."""
    beats, out = small_corpus / "beats.pt", tmp_path / "a run"
    command = [
        *(sys.executable, "-m", "aesanet.cli.main", "train"),
        *("--labels", small_corpus / "labels.csv", "--audio-root", small_corpus, "--beats", beats),
        *("--validation-share", "0.4", "--max-seconds", "1", "--learning-rate", "3e-3", "--epochs", "10"),
        *("--device", "cpu", "--save-minutes", "1e-9"),
    ]
    process = started(command, out)
    wait_for(process, lambda: (out / "epochs.csv").exists() and len(epochs(out)) >= 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = started(command, out)
    told = process.communicate()[1].splitlines()
    assert process.returncode == 0, told
    assert any("going on in epoch" in line for line in told)
    whole = started(command, tmp_path / "whole", "--cache", out / "cache")
    assert "Traceback" not in whole.communicate()[1]
    assert whole.returncode == 0
    same_run(out, tmp_path / "whole")

    told = [line.removeprefix("aesanet: ") for line in told]
    next_commands = [shlex.split(line) for line in told[told.index("next:") + 1 :]]
    assert [command[1] for command in next_commands] == ["export", "score", "evaluate"]
    for command in next_commands:
        done = CliRunner().invoke(cli, command[1:])
        assert done.exit_code == 0, done.output
    pairs = join(read_labels([out / "validation.jsonl"]), out / "scores.jsonl")
    trained_on = {label.system for label in read_labels([small_corpus / "labels.csv"])} - set(pairs.systems)
    assert len(trained_on) >= 2
    assert len(set(pairs.systems)) >= 2
    # A random trunk, and recordings that it was not trained on: the order of damage comes through all the same.
    pq = AXES.index("PQ")
    assert rank_metrics(pairs.true[:, pq], pairs.scores[:, pq]).srcc > 0.5

    best = out / "best.safetensors"
    assert not any(name.startswith(TRUNK_PREFIX) for name in load_file(best))
    with pytest.raises(CheckpointError, match="holds the head alone"):
        load_checkpoint(best)
    public_beats_file(tmp_path / "other.pt", tiny_config().beats, seed=4)
    with pytest.raises(CheckpointError, match=r"other\.pt: sha256"):
        load_checkpoint(best, tmp_path / "other.pt")


def in_process(command, *more):
    return CliRunner().invoke(cli, [str(argument) for argument in [*command[3:], *more]])


def test_the_command_trains_the_trunk_too(command, folder, tmp_path):
    shutil.copy(folder / "labels.csv", tmp_path / "more.csv")
    lines = (tmp_path / "more.csv").read_text().splitlines()
    (tmp_path / "more.csv").write_text("\n".join([lines[0], "gone.wav,1,1,1,1", "sub/0.wav,2,2,2,2"]))
    (tmp_path / "audio" / "sub").mkdir(parents=True)
    for path in folder.glob("*.wav"):
        shutil.copy(path, tmp_path / "audio")
    shutil.copy(folder / "0.wav", tmp_path / "audio" / "sub")
    more = ("--audio-root", tmp_path / "audio", "--validation", tmp_path / "more.csv", "--out", tmp_path / "out")
    refused = in_process(command, *more)
    assert isinstance(refused.exception, InputError)
    assert "1 of 38 labelled clips have no usable audio (1 not_found): gone.wav" in str(refused.exception)
    choices = "--unfreeze --allow-missing --epochs 1 --triplet hardest --triplet-axis PQ --frame-weight 0".split()
    done = in_process(command, *more, *choices)
    assert done.exit_code == 0, done.output
    for told in (
        "training: 36 clips",
        "validation: 1 clips, 0.00 h of audio; 1 without audio (1 not_found)",
        "the cache takes",
        "warning: 1 validation clips hold the same audio as training clips",
        "epoch 1: ",
        f"aesanet export {tmp_path / 'out' / 'best.safetensors'} --out",
    ):
        assert told in done.output
    model = load_checkpoint(tmp_path / "out" / "best.safetensors")
    assert model.config.weights == "trained"
    assert model.config.window.window_seconds == 0.3
    started_from = BEATs.from_checkpoint(folder / "beats.pt")
    assert not torch.equal(model.encoder.beats.layers[0].fc1.weight, started_from.layers[0].fc1.weight)


def test_missing_audio_is_one_line_and_status_2(command, folder, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("path,PQ\ngone.wav,1\n" + "".join(f"{i}.wav,{i / 4}\n" for i in range(9)))
    arguments = [*command[3:], "--out", tmp_path / "out"]
    arguments[arguments.index("--labels") + 1] = tmp_path / "labels.csv"
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "labelled clips have no usable audio (1 not_found): gone.wav (not_found: no such file" in told
    assert told.endswith("check --audio-root, or give --allow-missing to train without them")
    (line,) = (tmp_path / "out" / "missing.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "gone.wav"
    whole = [*command[:3], *arguments, "--epochs", "1"]
    assert in_process(whole, "--allow-missing").exit_code == 0
    assert (tmp_path / "out" / "missing.jsonl").read_text().count("\n") == 1
    labels = tmp_path / "labels.csv"
    labels.write_text(labels.read_text().replace("gone.wav,1\n", ""))
    assert in_process(whole).exit_code == 0
    assert not (tmp_path / "out" / "missing.jsonl").exists()


@pytest.mark.parametrize(
    ("largest", "minutes", "file"),
    [(200, 10, "lengths.jsonl"), (5_000, 10, ".npy"), (20_000, 10, "epochs.png"), (20_000, 1e-9, "state.pt")],
)
def test_a_full_disk_is_one_line(largest, minutes, file, command, tmp_path):
    limit = largest  # of a file's size; a disk says the same in other words
    done = subprocess.run(
        [*command, "--out", tmp_path, "--epochs", "1", "--max-seconds", "1.2", "--save-minutes", str(minutes)],
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("aesanet: ")
    assert f"{file}: " in told, told
    assert "File too large" in told, told


def test_the_options_are_those_of_the_config():
    options = {option.name: option for option in train_command.params}
    config = TrainingConfig()
    shared = options.keys() & set(config.__struct_fields__)
    assert len(shared) > 10
    for name in shared:
        assert options[name].default == getattr(config, name), name
        if isinstance(options[name].type, click.Choice):
            assert set(options[name].type.choices) == set(get_args(get_type_hints(TrainingConfig)[name])), name


def test_the_command_refuses_what_cannot_be(command, folder, tmp_path):
    for more, message in (
        (("--validation", folder / "labels.csv"), "36 clips are in --labels and in --validation: 0.wav, "),
        (("--learning-rate", "0"), "learning_rate is 0.0; it must be above 0"),
        (("--max-seconds", "0.1"), "max_seconds is 0.1"),
        (("--beats", folder / "0.wav"), "0.wav: not a PyTorch file"),
        (("--out", folder / "0.wav"), "0.wav: File exists"),
        (("--cache", "/proc/cache"), "/proc/cache: No such file or directory"),
    ):
        result = in_process(command, "--out", tmp_path, *more)
        assert isinstance(result.exception, AesanetError)
        assert message in str(result.exception)


def test_the_command_keeps_the_sides_apart(command, folder, tmp_path):
    """The same audio under an id is refused; the same system, and the same bytes, are warned of."""
    (tmp_path / "named.csv").write_text("sample_id,path,PQ\nanother-name,/your_path/0.wav,1\n")
    refused = in_process(command, "--out", tmp_path / "out", "--validation", tmp_path / "named.csv")
    assert isinstance(refused.exception, InputError)
    assert "1 clips are in --labels and in --validation: another-name; a clip" in str(refused.exception)

    for side, numbers in (("labels", range(8)), ("validation", range(8, 12))):
        rows = "".join(f"{i}.wav,a-system,{i / 4}\n" for i in numbers)
        (tmp_path / f"{side}.csv").write_text(f"path,system,PQ\n{rows}")
    apart = [*command]
    apart[apart.index("--labels") + 1] = tmp_path / "labels.csv"
    done = in_process(apart, "--out", tmp_path / "out", "--validation", tmp_path / "validation.csv", "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert "warning: 1 systems are in training and in validation: a-system\n" in done.output


# Several processes


@pytest.mark.slow
def test_two_processes_train_as_one(clips, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # as in two_processes.py
    # 28 clips: the last batch has one, and the second process no row of its own.
    config = changed(batch_size=3, epochs=2, learning_rate=1e-3, gradient_norm=1e9, triplet="hardest")
    runs = []
    for trunk in ("frozen", "trained"):
        model = new_model(dropout=0.0)
        runs.append((model, trunk, *both_sides(model, trunk, clips, folder), config))
    torch.save(runs, tmp_path / "runs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "two_processes.py", tmp_path],
            env={**ONE_THREAD, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        train(*run, tmp_path / f"{run[1]}-one")
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    for trunk in ("frozen", "trained"):
        outs = [tmp_path / f"{trunk}-{number}" for number in ("one", "two")]
        one, two = (load_file(out / "best.safetensors") for out in outs)
        for name, value in one.items():
            assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
        for row, other in zip(*map(epochs, outs), strict=True):
            for name in ("train_loss", "train_triplet", "validation_mse"):
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)
            for name in ("anchors", "skipped", "positive_clips", "label_clusters"):
                assert row[name] == other[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.filterwarnings("ignore:.*deterministic")  # of kernels that are not, which a run on a GPU tells of
@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_a_gpu_trains_as_a_cpu_does_and_goes_on(trunk, clips, folder, tmp_path):
    config = changed(epochs=4, learning_rate=5e-3)
    for device in ("cpu", "cuda"):
        run(folder, clips, tmp_path / device, trunk=trunk, config=changed(config, device=device))
    cpu, cuda = (epochs(tmp_path / device) for device in ("cpu", "cuda"))
    # Later epochs of a whole trunk drift apart: the best validation was .84 on an H200 and 1.15 on its processor.
    assert float(cuda[0]["train_loss"]) == pytest.approx(float(cpu[0]["train_loss"]), rel=0.05)
    assert float(cuda[-1]["train_loss"]) < 0.7 * float(cuda[0]["train_loss"])
    steps = count(1)
    half = changed(config, device="cuda", precision="bf16")
    stopped = run(folder, clips, tmp_path / "parts", trunk=trunk, config=half, stop=lambda: next(steps) == 10)
    assert not stopped.finished
    assert run(folder, clips, tmp_path / "parts", trunk=trunk, config=half).finished
    assert float(epochs(tmp_path / "parts")[-1]["mean_srcc"]) > 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    assert own_device("auto") == CPU
    with pytest.raises(InputError, match="process 0 has no GPU: PyTorch sees 0"):
        own_device("cuda")


def test_every_process_has_a_row_of_every_batch():
    for size in range(1, 6):
        for batch in range(1, 12):
            shares = [Processes(rank, size).share(batch) for rank in range(size)]
            assert len({len(share) for share in shares}) == 1
            assert [row for share in shares for row in share][:batch] == list(range(batch))
            assert Counter(map(bool, shares)) == {True: size}


# The monitor


def signs_of(embeddings, labels, scores=None):
    return read_signs(labels.copy() if scores is None else scores, embeddings, labels)


@pytest.fixture
def healthy():
    """Embeddings that follow the labels, in several directions."""
    rng = np.random.default_rng(4)
    labels = rng.uniform(1, 9, (80, 4))
    embeddings = np.abs(labels @ rng.standard_normal((4, 16)) + 0.5 * rng.standard_normal((80, 16)))
    return embeddings, labels


def working(clusters=6, skipped=5):
    counters = TripletCounters()
    counters.anchors, counters.skipped, counters.clusters = 100, skipped, set(range(clusters))
    return counters


def test_a_healthy_run_is_not_warned_of(healthy):
    signs = signs_of(*healthy)
    assert signs.effective_rank > 3
    assert signs.order_correlation > 0.3
    assert signs.srcc == pytest.approx((1.0,) * 4)
    assert signs.ktau == pytest.approx((1.0,) * 4)
    assert read_warnings([signs], working(), CONFIG) == []


def test_collapse_is_warned_of(healthy):
    _, labels = healthy
    noise = np.random.default_rng(1).standard_normal((80, 16))
    for collapsed in (5 + 0.01 * noise, np.outer(np.linspace(1, 2, 80), np.arange(16)), np.zeros((80, 16))):
        signs = signs_of(collapsed, labels)
        assert any("embeddings collapse" in warning for warning in read_warnings([signs], working(), CONFIG))
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((7, 5))) == pytest.approx(1)


def test_a_few_clips_do_not_collapse(healthy):
    embeddings, labels = healthy
    for few in (1, 2, 9):
        signs = signs_of(embeddings[:few], labels[:few])
        assert signs.effective_rank is signs.mean_distance is None
        assert not any("collapse" in warning for warning in read_warnings([signs], working(), CONFIG))


def test_triplets_that_do_not_work_are_warned_of(healthy):
    embeddings, labels = healthy
    signs = signs_of(embeddings, labels)
    assert "91 of 100 anchors" in read_warnings([signs], working(skipped=91), CONFIG)[0]
    assert "2 groups of labels" in read_warnings([signs], working(clusters=2), CONFIG)[0]
    inverted = signs_of(np.abs(np.random.default_rng(2).standard_normal((80, 16))), labels)
    inverted = msgspec.structs.replace(inverted, order_correlation=-0.01)
    assert "do not lie farther apart" in read_warnings([inverted], working(), CONFIG)[0]
    assert read_warnings([inverted], working(clusters=0, skipped=100), changed(triplet="none")) == []


def test_order_is_judged_by_what_the_triplets_are_made_by():
    """PC has nothing to do with the other axes; embeddings lie along the one or along the others."""
    rng = np.random.default_rng(3)
    others, pc = rng.uniform(1, 9, (2, 200))
    labels = np.stack([others, others + 0.1, pc, others - 0.1], axis=1)
    for axis, along, less in (("PC", pc, others), ("PQ", others, pc)):
        order = [
            read_signs(labels, np.stack([np.cos(x / 10), np.sin(x / 10)], axis=1), labels, axis).order_correlation
            for x in (along, less)
        ]
        assert order[0] > 0.99
        assert abs(order[1]) < 0.1


def test_ranks_that_fall_while_the_mse_falls_are_warned_of(healthy):
    signs = signs_of(*healthy)
    epochs = [
        msgspec.structs.replace(signs, mean_srcc=srcc, mean_mse=mse)
        for srcc, mse in ((None, 9.0), (0.5, 3.0), (0.7, 2.0), (0.69, 1.9), (0.67, 2.1), (0.67, 1.8))
    ]
    warned = [read_warnings(epochs[: n + 1], working(), CONFIG) for n in range(len(epochs))]
    assert warned[:5] == [[]] * 5
    assert "ranks get worse while the MSE falls: mean SRCC 0.670 after 0.700" in warned[5][0]


def test_signs_know_missing_labels(healthy):
    embeddings, labels = healthy
    labels = labels.copy()
    labels[:, 1], labels[::2, 0], labels[3] = math.nan, math.nan, math.nan
    scores = np.nan_to_num(labels) + np.array([1.0, 0.0, 2.0, -3.0])
    signs = signs_of(embeddings, labels, scores)
    assert signs.mse == pytest.approx((1.0, None, 4.0, 9.0))
    assert signs.mean_mse == pytest.approx(14 / 3)
    assert signs.srcc[1] is signs.ktau[1] is None
    assert signs.order_correlation > 0.3
    assert read_signs(scores[:1] + 1, embeddings[:1], healthy[1][:1]).order_correlation is None
