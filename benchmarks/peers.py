"""aesanet beside what people score audio with today: the same work in the same run, in turns.

In each round all contestants do the work once, in an order that moves on by one, so that a machine that slows down
slows all of them. Each is a process of its own. Rounds that warm up are not counted, and neither is padding.
"""

import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch

from aesanet.benchmarks import polygraphy
from aesanet.benchmarks.audiobox import INSTALL, is_installed, open_audiobox
from aesanet.benchmarks.contestants import Alone, Contestant, Part, Work, open_aesanet, open_pytorch
from aesanet.benchmarks.latency import WARM_UPS, median_interval
from aesanet.benchmarks.records import CLOCKS, MACHINE, clocks, machine
from aesanet.errors import BackendError, ClipError, InputError
from aesanet.export.build import export_bundle
from aesanet.export.compile import choose_flavour, compile_bundle
from aesanet.export.engine import BuildSettings
from aesanet.export.profiles import default_profiles
from aesanet.gpu import cuda_gpu, load_cuda
from aesanet.hashing import file_sha256
from aesanet.lengths import SAMPLE_RATE
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import AESANetConfig
from aesanet.models.demo import samples
from aesanet.models.untrained import untrained_model
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.backends import supported_backends
from aesanet.runtime.backends.base import CudaGraphs, Device
from aesanet.runtime.rows.inputs import read_rows
from aesanet.runtime.rows.row import Clip

PEERS_COLUMNS: Final = (
    *MACHINE,
    *CLOCKS,
    *"part device threads checkpoint_sha256 contestant precision versions weights parameters_millions batch".split(),
    *"clips audio_seconds rounds seconds_median seconds_low seconds_high".split(),
    *"x_real_time x_audiobox x_pytorch max_abs_difference".split(),
)
AUDIOBOX, PYTORCH = "audiobox-aesthetics fp32", "pytorch eager fp32"
"""What all others are held against: the one as its published weights are run, the other on the same network."""
CLIP_SECONDS: Final = 10.0

Notes = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to compare, and how often."""

    part: Part
    device: Device
    threads: int
    batches: tuple[int, ...]  # clips that are scored at once: one comparison after the other
    clips: int
    rounds: int
    checkpoint: Path | None  # None: an untrained network of the public base size


@dataclass
class Seen:
    """Of a contestant, in the rounds that count."""

    seconds: list[float] = field(default_factory=list)
    found: np.ndarray = field(default_factory=lambda: np.empty(0))


def measure_peers(inputs: Sequence[str], plan: Plan, note: Notes) -> Iterator[list[dict[str, Any]]]:
    """For each size of batch, a row of `PEERS_COLUMNS` for each contestant that runs; `note` hears why others do not.

    inputs : audio files and folders of them; without any, `plan.clips` clips of 10 s of the recordings that come
             with aesanet

    Raises InputError for inputs that some contestants could not read, and BackendError where nobody can run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _whole_files(inputs) if inputs else list(write_clips(samples(), plan.clips, folder))
        lengths = [_seconds(file) for file in files] if plan.part == "files" else []
        work = _prepare(plan, files, folder, note)
        for batch in plan.batches:
            of_batch = replace(work, batch=batch, waveform=work.waveform[:batch], fbank=work.fbank[:batch])
            yield _measure(plan, of_batch, lengths or [CLIP_SECONDS] * batch, note)


def _measure(plan: Plan, work: Work, lengths: Sequence[float], note: Notes) -> list[dict[str, Any]]:
    """The rows of one comparison, of clips of so many seconds each."""
    where = machine()
    contestants = list(_contestants(plan, note))
    with ExitStack() as processes:
        entered = _enter(contestants, work, processes, note)
        warm_ups = WARM_UPS if any("tensorrt" in told for told in entered) else 3
        seen = take_turns({told: alone.run for told, alone in entered.items()}, warm_ups, plan.rounds, note)
        if not seen:
            raise BackendError("no contestant could do the work")
        where |= clocks() | {
            "part": plan.part,
            "device": plan.device,
            "threads": plan.threads,
            "checkpoint_sha256": file_sha256(work.checkpoint)[:16],
            "clips": len(lengths),
            "audio_seconds": round(sum(lengths), 1),
            "rounds": plan.rounds,
        }
    speeds = compare(seen, sum(lengths))
    return [
        where | {"contestant": one.name, "precision": one.precision} | asdict(entered[told].about) | speeds[told]
        for one in contestants
        if (told := str(one)) in seen
    ]


def _enter(contestants: Sequence[Contestant], work: Work, processes: ExitStack, note: Notes) -> dict[str, Alone]:
    """All who can be opened, by name; on a GPU at the same time, as its machine has memory and cores for all."""
    entered: dict[str, Alone] = {}
    with ThreadPoolExecutor(len(contestants) if work.device == "cuda" else 1) as opening:
        opened = {str(contestant): opening.submit(Alone, contestant, work) for contestant in contestants}
        for told, future in opened.items():
            note(f"opening {told}")
            try:
                entered[told] = future.result()
            except Exception as error:  # theirs may be anything
                note(f"left out: {told}: {error}")
            else:
                processes.callback(entered[told].close)
    return entered


def take_turns(
    entered: Mapping[str, Callable[[], tuple[float, np.ndarray]]], warm_ups: int, rounds: int, note: Notes
) -> dict[str, Seen]:
    """What is seen of all who last to the end; whoever fails, or finds what is not a number, is told of and left out.

    entered : by name, what does the work once and says its seconds and what came of it
    """
    seen = {told: Seen() for told in entered}
    for number in range(-warm_ups, rounds):
        if not seen:
            break
        order = deque(seen)
        order.rotate(-number)
        for told in order:
            try:
                seconds, found = entered[told]()
                if not np.isfinite(found).all():
                    raise ArithmeticError("not all that it finds are numbers")
            except Exception as error:  # theirs may be anything
                note(f"left out: {told}: {error}")
                del seen[told]
                continue
            if number >= 0:
                seen[told].seconds.append(seconds)
                seen[told].found = found
        note(f"round {number + 1} of {rounds}" if number >= 0 else "warmed up" if number == -1 else "warming up")
    return seen


def compare(seen: Mapping[str, Seen], audio_seconds: float) -> dict[str, dict[str, Any]]:
    """Of each: its median with an interval of 95 % (of 6 rounds or more), and how many times as fast it is as what."""
    medians = {told: statistics.median(one.seconds) for told, one in seen.items()}

    def times(told: str, other: str) -> float | str:
        return round(medians[other] / medians[told], 3) if other in medians else ""

    speeds: dict[str, dict[str, Any]] = {}
    for told, one in seen.items():
        low, high = median_interval(one.seconds)
        difference: float | str = ""
        if PYTORCH in seen and seen[PYTORCH].found.shape == one.found.shape and not told.startswith("audiobox"):
            difference = f"{np.abs(one.found - seen[PYTORCH].found).max():.2e}"
        speeds[told] = {
            "seconds_median": round(medians[told], 4),
            "seconds_low": round(low, 4),
            "seconds_high": round(high, 4),
            "x_real_time": round(audio_seconds / medians[told], 2),
            "x_audiobox": times(told, AUDIOBOX),
            "x_pytorch": times(told, PYTORCH),
            "max_abs_difference": difference,
        }
    return speeds


def write_clips(recordings: Sequence[Path], count: int, folder: Path) -> Iterator[str]:
    """Files of 10 s, each with the format, rate and channels of one of the recordings, which take turns.

    A short recording is repeated, a long one cut; each time that its turn comes, it starts a second later.
    """
    for number in range(count):
        recording = recordings[number % len(recordings)]
        with soundfile.SoundFile(recording) as file:
            rate, audio = file.samplerate, file.read(always_2d=True)
            later = np.roll(audio, -rate * (number // len(recordings)), axis=0)
            path = folder / f"{number}{recording.suffix}"
            clip = np.resize(later, (round(CLIP_SECONDS * rate), file.channels))
            soundfile.write(path, clip, rate, format=file.format, subtype=file.subtype)
        yield str(path)


def _whole_files(inputs: Sequence[str]) -> list[str]:
    """The files that inputs name; raises InputError for segments and members of tars, which scripts do not read."""
    try:
        clips = [row.clip() for row in read_rows(inputs)]
    except ClipError as error:
        raise InputError(str(error)) from None
    if not clips:
        raise InputError(f"{', '.join(inputs)}: no audio files")
    for clip in clips:
        if clip != Clip(clip.path):
            raise InputError(f"{clip.path}: a row asks for a part of it; only whole files can be compared")
    return [clip.path for clip in clips]


def _seconds(file: str) -> float:
    """As decoded, whatever the header says."""
    try:
        with soundfile.SoundFile(file) as opened:
            return sum(len(block) for block in opened.blocks(2**20)) / float(opened.samplerate)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{file}: {error.error_string} All contestants but aesanet read with libsndfile") from None


def _samples(file: str) -> np.ndarray:
    try:
        return np.concatenate(list(clip_blocks(Clip(file))))
    except ClipError as error:
        raise InputError(f"{file}: {error.message}") from None


def _prepare(plan: Plan, files: Sequence[str], folder: Path, note: Notes) -> Work:
    """The checkpoint, its bundle with all that engines of the device need, and audio for the largest batch."""
    checkpoint, bundle = plan.checkpoint, folder / "bundle"
    largest = max(plan.batches)
    clips = [_samples(path) for path in files[:largest]]
    if checkpoint is None:
        checkpoint = folder / "untrained-base.safetensors"
        save_checkpoint(untrained_model(AESANetConfig(), seed=0), checkpoint)
    on_gpu = plan.device == "cuda"
    recordings = [_samples(str(path)) for path in samples()[:2]] if on_gpu else []
    export_bundle(checkpoint, bundle, half_on=recordings, progress=note)
    if on_gpu and supported_backends()["tensorrt"].runs:
        profiles = default_profiles(CLIP_SECONDS, int(cuda_gpu(load_cuda()).memory))
        compile_bundle(bundle, choose_flavour("auto"), BuildSettings(profiles), progress=note)
    model = load_checkpoint(checkpoint)
    length = round(CLIP_SECONDS * SAMPLE_RATE)
    waveform = np.stack([np.resize(clips[number % len(clips)], length) for number in range(largest)])
    with torch.inference_mode():
        fbank = model.frontend(torch.from_numpy(waveform)).numpy()
    return Work(
        part=plan.part,
        device=plan.device,
        threads=plan.threads,
        batch=largest,
        checkpoint=checkpoint,
        bundle=bundle,
        folder=folder,
        files=tuple(files),
        waveform=waveform,
        fbank=fbank,
    )


def _contestants(plan: Plan, note: Notes) -> Iterator[Contestant]:
    """All who can do the work, as far as is known before they are opened."""
    for backend, support in supported_backends().items():
        for device, precision in support.runs:
            if device != plan.device:
                continue
            graphs: dict[str, CudaGraphs] = {"": "try"}
            if (backend, device, plan.part) == ("onnxruntime", "cuda", "waveforms"):
                graphs = {"": False, " CUDA graphs": True}
            for how, wanted in graphs.items():
                opened = partial(open_aesanet, backend, precision, wanted)
                yield Contestant(f"aesanet {backend}{how}", precision, opened)
    if plan.part != "files":  # it runs graphs and reads no files
        if plan.device == "cpu":
            yield Contestant("polygraphy onnxruntime", "fp32", polygraphy.open_onnxruntime)
        elif supported_backends()["tensorrt"].runs:
            yield Contestant("polygraphy tensorrt", "fp16", polygraphy.open_tensorrt)
    reduced, dtype = ("fp16", torch.float16) if plan.device == "cuda" else ("bf16", torch.bfloat16)
    for compiled in (False, True):
        name = "pytorch compile" if compiled else "pytorch eager"
        if compiled and plan.device == "cuda":
            note(f"left out: {name} fp32, which on a GPU takes longer to compile than it is worth")
        else:
            yield Contestant(name, "fp32", partial(open_pytorch, torch.float32, compiled))
        yield Contestant(name, f"{reduced} autocast", partial(open_pytorch, dtype, compiled))
    if plan.part != "files":
        return  # its parts are not ours
    if not is_installed():
        note(f"left out: audiobox-aesthetics, which is not installed: {INSTALL}")
        return
    yield Contestant("audiobox-aesthetics", "fp32", partial(open_audiobox, "32"))
    yield Contestant("audiobox-aesthetics", f"{reduced} autocast", partial(open_audiobox, reduced.removeprefix("fp")))
