"""`aesanet train`: labelled audio in, a checkpoint and the account of how it came to be out."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aesanet.axes import AXES
from aesanet.cli.options import Finite, FiniteRange
from aesanet.commands import EXIT_INTERRUPTED, extra, note
from aesanet.errors import InputError
from aesanet.files import LEFT_OVER_SECONDS, alone_in, sweep
from aesanet.interrupts import on_interrupt
from aesanet.words import some

if TYPE_CHECKING:
    from aesanet.models.aesanet import AESANet
    from aesanet.training.config import TrainingConfig
    from aesanet.training.dataset import FoundClip, MissingClip
    from aesanet.training.labels import LabelledClip
    from aesanet.training.processes import Processes
    from aesanet.training.progress import Progress
    from aesanet.training.trainer import TrainingResult


@click.command()
@click.option(
    "--labels",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A label file (.csv, .tsv, .jsonl): a path and axes by name. May be given several times.",
)
@click.option(
    "--audio-root", required=True, type=click.Path(path_type=Path), help="The folder that the labels' paths start at."
)
@click.option("--beats", required=True, type=click.Path(path_type=Path), help="The public BEATs file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of the run.")
@click.option(
    "--validation",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A label file of clips to validate with, not to train on. May be given several times.",
)
@click.option(
    "--validation-share",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Of --labels, without --validation; whole systems where the labels name them.",
)
@click.option("--unfreeze", is_flag=True, help="Train BEATs too; the paper keeps it frozen.")
@click.option(
    "--max-seconds", type=Finite(), default=10.0, show_default=True, help="Longer clips are cut into windows."
)
@click.option("--allow-missing", is_flag=True, help="Train without the clips whose audio is missing.")
@click.option("--cache", type=click.Path(path_type=Path), help="Of what is computed once.  [default: OUT/cache]")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--learning-rate", type=Finite(), default=1e-4, show_default=True)
@click.option("--epochs", type=int, default=100, show_default=True, help="At most.")
@click.option("--patience", type=int, default=10, show_default=True, help="Epochs without a lower validation MSE.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--triplet", type=click.Choice(["random", "hardest", "none"]), default="random", show_default=True)
@click.option("--triplet-axis", type=click.Choice(["mean", *AXES]), default="mean", show_default=True)
@click.option("--triplet-weight", type=Finite(), default=0.2, show_default=True)
@click.option("--triplet-margin", type=Finite(), default=0.3, show_default=True)
@click.option(
    "--triplet-epsilon", type=Finite(), default=0.5, show_default=True, help="What is near, on the 0-10 scale."
)
@click.option("--triplet-buffer", type=int, default=256, show_default=True, help="Clips that are kept to compare with.")
@click.option("--frame-weight", type=Finite(), default=1.0, show_default=True, help="Of the MSE of each token.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto is bf16 on CUDA and fp32 elsewhere.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--save-minutes", type=Finite(), default=10.0, show_default=True, help="Save at least this often.")
def train(
    labels: tuple[Path, ...],
    audio_root: Path,
    beats: Path,
    out: Path,
    validation: tuple[Path, ...],
    validation_share: float,
    unfreeze: bool,
    allow_missing: bool,
    cache: Path | None,
    **settings: Any,
) -> None:
    """Train an AESA-Net on clips that people have rated.

    OUT gets best.safetensors (the epoch with the lowest validation MSE), epochs.csv and its plot epochs.png,
    validation.jsonl, training.json and state.pt. The same command goes on with a run that was stopped or killed.
    `torchrun --nproc-per-node N -m aesanet.cli.main train ...` trains on N GPUs.

    Exit status: 0 the run has finished, 2 it could not start or go on, 130 interrupted.
    """
    with extra("train"):
        from aesanet.hashing import file_sha256
        from aesanet.training.cache import cache_bytes, cached_data
        from aesanet.training.dataset import Trunk, check_missing, find_audio
        from aesanet.training.processes import own_device, started_processes
        from aesanet.training.trainer import train as train_model

    config = _config(settings)
    training_labels, validation_labels = _labels(labels, validation, validation_share)
    cache = out / "cache" if cache is None else cache
    device = own_device(config.device)
    with _disk_errors(out), started_processes(device) as processes, ExitStack() as held:
        for place in (out, cache):  # before hours of work
            place.mkdir(parents=True, exist_ok=True)
        processes.refuse(held.enter_context(_taking(out)) if processes.rank == 0 else None, device)
        progress = _progress(processes)
        model = _new_model(beats, config).to(device)
        beats_sha256 = None if unfreeze else file_sha256(beats)
        sides = []
        missing: list[MissingClip] = []
        for name, clips in (("training", training_labels), ("validation", validation_labels)):
            with processes.first_alone():
                found, without = find_audio(clips, audio_root, cache, progress)
            _tell_found(name, found, without, progress)
            sides.append(found)
            missing += without
        if processes.rank == 0:
            _write_missing(missing, out, progress)
        if not allow_missing or not all(sides):
            check_missing(missing, len(training_labels) + len(validation_labels))
        _tell_leak(sides[0], sides[1], progress)
        trunk: Trunk = "trained" if unfreeze else "frozen"
        size = cache_bytes([clip for side in sides for clip in side], trunk, model.config.beats, config.window)
        progress.note(f"{cache}: the cache takes {size / 1e6:,.1f} MB")
        share = processes.rank, processes.size
        training_data, validation_data = (
            cached_data(model, trunk, side, config.window, cache, progress, share) for side in sides
        )
        processes.wait()
        with _interrupts(processes, progress) as interrupted:
            result = train_model(
                model,
                trunk,
                training_data,
                validation_data,
                config,
                out,
                progress,
                beats_sha256=beats_sha256,
                sources=[*labels, *validation],
                processes=processes,
                stop=interrupted,
            )
    _tell_end(result, out, None if unfreeze else beats, progress)


@contextmanager
def _taking(out: Path) -> "Iterator[InputError | None]":
    """Keep other runs from the folder, and remove what killed ones left in it; yields why that cannot be."""
    from aesanet.training.state import STATE_NAME
    from aesanet.training.trainer import BEST_NAME

    with ExitStack() as held:
        try:
            alone = held.enter_context(alone_in(out))
        except InputError as error:
            yield error
            return
        for name in (STATE_NAME, BEST_NAME):
            sweep(out, 0 if alone else LEFT_OVER_SECONDS, name)
        yield None


def _config(settings: dict[str, Any]) -> "TrainingConfig":
    from aesanet.training.config import TrainingConfig

    try:
        return TrainingConfig(**settings)
    except ValueError as error:
        raise InputError(str(error)) from None


def _labels(
    labels: tuple[Path, ...], validation: tuple[Path, ...], share: float
) -> "tuple[list[LabelledClip], list[LabelledClip]]":
    """(training, validation), with no clip in both."""
    from aesanet.training.dataset import split_clips
    from aesanet.training.labels import read_labels

    clips = read_labels(labels)
    if not validation:
        return split_clips(clips, share)
    aside = read_labels(validation)
    names = {name for clip in clips for name in (clip.id, clip.path)}
    if both := [clip.id for clip in aside if clip.id in names or (clip.path and clip.path in names)]:
        raise InputError(
            f"{len(both)} clips are in --labels and in --validation: {some(both)}; "
            "a clip that was trained on validates nothing, so leave it in one"
        )
    return clips, aside


def _new_model(beats: Path, config: "TrainingConfig") -> "AESANet":
    """The public BEATs file under a head whose weights the seed decides."""
    import torch

    from aesanet.models.aesanet import AESANet
    from aesanet.models.beats import BEATs
    from aesanet.models.config import AESANetConfig

    trunk = BEATs.from_checkpoint(beats)
    torch.manual_seed(config.seed)
    model = AESANet(AESANetConfig(beats=trunk.config, window=config.window, weights="trained"))
    model.encoder.beats = trunk
    return model


def _tell_found(
    name: str, found: "Sequence[FoundClip]", missing: "Sequence[MissingClip]", progress: "Progress"
) -> None:
    from aesanet.lengths import SAMPLE_RATE
    from aesanet.training.dataset import counted

    hours = sum(clip.num_samples for clip in found) / SAMPLE_RATE / 3600
    without = f"{len(missing)} without audio{f' ({counted(missing)})' if missing else ''}"
    progress.note(f"{name}: {len(found)} clips, {hours:.2f} h of audio; {without}")


def _write_missing(missing: "Sequence[MissingClip]", out: Path, progress: "Progress") -> None:
    """missing.jsonl: a line for each clip that is left out, or no such file."""
    file = out / "missing.jsonl"
    file.unlink(missing_ok=True)
    if missing:
        file.write_text("".join(json.dumps(dataclasses.asdict(clip)) + "\n" for clip in missing))
        progress.note(f"{file}: names the clips without audio")


def _tell_leak(training: "Sequence[FoundClip]", validation: "Sequence[FoundClip]", progress: "Progress") -> None:
    systems = [{clip.label.system for clip in side if clip.label.system} for side in (training, validation)]
    if shared := sorted(systems[0] & systems[1]):
        progress.note(f"warning: {len(shared)} systems are in training and in validation: {some(shared)}")
    known = {clip.sha256 for clip in training}
    if same := [clip.label.id for clip in validation if clip.sha256 in known]:
        progress.note(
            f"warning: {len(same)} validation clips hold the same audio as training clips, which makes the validation "
            f"MSE look better than it is: {some(same)}"
        )


def _progress(processes: "Processes") -> "Progress":
    """Of the first process on stderr; the others tell nothing."""
    from tqdm import tqdm

    from aesanet.training.progress import Progress

    class Shown(Progress):
        bar: tqdm | None = None

        def note(self, line: str) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                note(line)

        def start(self, what: str, total: int, done: int = 0) -> None:
            # disable=None: none where stderr is no terminal.
            self.bar = tqdm(total=total, initial=done, desc=what, disable=None, leave=False, file=sys.stderr)

        def step(self) -> None:
            if self.bar is not None:
                self.bar.update()

        def end(self) -> None:
            if self.bar is not None:
                self.bar.close()

    return Shown() if processes.rank == 0 else Progress()


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is one line; what was saved is still whole."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None


@contextmanager
def _interrupts(processes: "Processes", progress: "Progress") -> Iterator[Callable[[], bool]]:
    """Let the step in hand be finished on Ctrl-C or SIGTERM; yields a function that tells whether there was one."""
    pressed = False

    def press() -> None:
        nonlocal pressed
        # torchrun hands one Ctrl-C on to processes that had it from the terminal already, and ends them itself if
        # they take long.
        if pressed and processes.size == 1:
            raise KeyboardInterrupt
        if not pressed:
            once_more = "; Ctrl-C once more stops at once" if processes.size == 1 else ""
            progress.note(f"finishing the step in hand{once_more}")
        pressed = True

    with on_interrupt(press):
        yield lambda: pressed


def _tell_end(result: "TrainingResult", out: Path, beats: Path | None, progress: "Progress") -> None:
    if not result.finished:
        progress.note(f"interrupted; the state is in {out}, and the same command goes on from there")
        sys.exit(EXIT_INTERRUPTED)
    progress.note(f"{result.checkpoint}: epoch {result.best_epoch} of {result.epochs}, MSE {result.best_mse:.4f}")
    of_beats = "" if beats is None else f" --beats {shlex.quote(str(beats))}"
    checkpoint, bundle, labels, scores = (
        shlex.quote(str(out / name)) for name in (result.checkpoint.name, "bundle", "validation.jsonl", "scores.jsonl")
    )
    progress.note("next:")
    progress.note(f"  aesanet export {checkpoint}{of_beats} --out {bundle}")
    progress.note(f"  aesanet score {bundle} {labels} --out {scores}")
    progress.note(f"  aesanet evaluate --labels {labels} --scores {scores}")
