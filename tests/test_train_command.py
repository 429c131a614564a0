"""`aesanet train`: killed, interrupted, refused, and what comes after it."""

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args, get_type_hints

import click
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import RECORDINGS
from helpers import public_beats_file, tiny_config
from runs import ONE_THREAD, epochs, same_run
from safetensors.torch import load_file

from aesanet.axes import AXES
from aesanet.cli.main import cli, main
from aesanet.cli.train import train as train_command
from aesanet.errors import AesanetError, CheckpointError, InputError
from aesanet.files import alone_in
from aesanet.lengths import SAMPLE_RATE
from aesanet.metrics import rank_metrics
from aesanet.models.aesanet import TRUNK_PREFIX
from aesanet.models.beats import BEATs
from aesanet.models.checkpoint import load_checkpoint
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip
from aesanet.training.config import TrainingConfig
from aesanet.training.demo.degrade import lowpass
from aesanet.training.joining import join
from aesanet.training.labels import read_labels


@pytest.fixture(scope="module")
def command(labelled):
    """A real `aesanet train`, as arguments; the state is saved after every step."""
    public_beats_file(labelled / "beats.pt", tiny_config().beats, seed=3)
    return [
        *(sys.executable, "-m", "aesanet.cli.main", "train"),
        *("--labels", labelled / "labels.csv", "--audio-root", labelled, "--beats", labelled / "beats.pt"),
        *("--max-seconds", "0.3", "--validation-share", "0.3", "--epochs", "6", "--batch-size", "4"),
        *("--device", "cpu", "--save-minutes", "1e-9"),
    ]


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
    with alone_in(tmp_path):
        again = subprocess.run(
            [*torchrun, *command[1:], "--out", tmp_path], env=ONE_THREAD, capture_output=True, text=True
        )
    assert again.returncode != 0
    told = [line for line in again.stderr.splitlines() if line.startswith("aesanet: ")]
    assert sorted(told) == [
        f"aesanet: {tmp_path}: another run is writing it; wait for its end, or give another name",
        "aesanet: another of this run's processes cannot go on, and says why",
    ]
    load_checkpoint(tmp_path / "best.safetensors", command[command.index("--beats") + 1])


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """Real recordings, cut up, as they are and low-passed in four steps: PQ is the step, whole recordings a system."""
    folder = tmp_path_factory.mktemp("small corpus")
    rows = ["path,system,CE,CU,PC,PQ"]
    for recording in RECORDINGS:
        samples = np.concatenate(list(clip_blocks(Clip(str(recording))))).astype(np.float64)
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


def test_the_command_trains_the_trunk_too(command, labelled, tmp_path):
    shutil.copy(labelled / "labels.csv", tmp_path / "more.csv")
    lines = (tmp_path / "more.csv").read_text().splitlines()
    (tmp_path / "more.csv").write_text("\n".join([lines[0], "gone.wav,1,1,1,1", "sub/0.wav,2,2,2,2"]))
    (tmp_path / "audio" / "sub").mkdir(parents=True)
    for path in labelled.glob("*.wav"):
        shutil.copy(path, tmp_path / "audio")
    shutil.copy(labelled / "0.wav", tmp_path / "audio" / "sub")
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
    started_from = BEATs.from_checkpoint(labelled / "beats.pt")
    assert not torch.equal(model.encoder.beats.layers[0].fc1.weight, started_from.layers[0].fc1.weight)


def test_a_second_run_in_the_same_folder_is_refused(command, tmp_path):
    (tmp_path / ".state.pt.0123456789abcdef").write_bytes(b"of a run that was killed")
    with alone_in(tmp_path):
        refused = in_process(command, "--out", tmp_path)
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == f"{tmp_path}: another run is writing it; wait for its end, or give another name"
    assert in_process(command, "--out", tmp_path, "--epochs", "1").exit_code == 0
    assert (tmp_path / "best.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_missing_audio_is_one_line_and_status_2(command, labelled, tmp_path, capsys):
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


def test_the_command_refuses_what_cannot_be(command, labelled, tmp_path):
    for more, message in (
        (("--validation", labelled / "labels.csv"), "36 clips are in --labels and in --validation: 0.wav, "),
        (("--learning-rate", "0"), "learning_rate is 0.0; it must be above 0"),
        (("--max-seconds", "0.1"), "max_seconds is 0.1"),
        (("--beats", labelled / "0.wav"), "0.wav: not a PyTorch file"),
        (("--out", labelled / "0.wav"), "0.wav: File exists"),
        (("--cache", "/proc/cache"), "/proc/cache: No such file or directory"),
    ):
        result = in_process(command, "--out", tmp_path, *more)
        assert isinstance(result.exception, AesanetError)
        assert message in str(result.exception)


def test_the_command_keeps_the_sides_apart(command, labelled, tmp_path):
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
