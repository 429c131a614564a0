"""Who scores audio in a comparison, each in a process of its own: aesanet's engines and the same model in PyTorch."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Literal

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor, nn

from aesanet import __version__
from aesanet.axes import AXES
from aesanet.benchmarks.end_to_end import score_to_file
from aesanet.errors import InputError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy, num_tokens
from aesanet.models.checkpoint import load_checkpoint
from aesanet.padding import pad_batch
from aesanet.runtime.backends import BackendName
from aesanet.runtime.backends.base import CudaGraphs, Device, Precision
from aesanet.runtime.rows.row import Row
from aesanet.runtime.scorer import Scorer
from aesanet.runtime.windows import split_windows

_SETTLING_SECONDS: Final = 0.2  # ONNX Runtime's threads were seen to spin for 40 ms after their last call

Part = Literal["files", "waveforms", "encoder"]
"""What is timed: files on disk to scores, waveforms in memory to scores, or the encoder alone."""


@dataclass(frozen=True)
class Work:
    """What all contestants of a comparison are given, and all do once a round."""

    part: Part
    device: Device
    threads: int
    batch: int  # clips in memory; of files, what scripts take at once, while aesanet chooses for itself
    checkpoint: Path
    bundle: Path
    folder: Path  # to write in
    files: tuple[str, ...]
    waveform: np.ndarray  # float32 [batch, samples]: full clips, with no padding
    fbank: np.ndarray  # float32 [batch, frames, 128], of the waveform

    @property
    def num_samples(self) -> np.ndarray:
        """int64 [batch], of the waveform."""
        return np.full(len(self.waveform), self.waveform.shape[1])


@dataclass(frozen=True)
class About:
    """What a contestant says of itself, under the names of a row's columns."""

    versions: str
    weights: str
    parameters_millions: float
    batch: int


@dataclass(frozen=True)
class Opened:
    """A contestant with its weights loaded."""

    about: About
    run: Callable[[], np.ndarray]
    """Does the work once; returns scores, float [clips, 4], or what the encoder gives."""


@dataclass(frozen=True)
class Contestant:
    """By what name and precision a contestant is told, and how it is opened."""

    name: str
    precision: str
    open: Callable[[Work], Opened]

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


class Alone:
    """A contestant in a process of its own, where the waiting threads and the memory of others are none of its own."""

    def __init__(self, contestant: Contestant, work: Work) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._settling_seconds = _SETTLING_SECONDS if work.device == "cpu" else 0.0
        try:
            self.about = self._process.submit(_open, contestant, work).result()
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[float, np.ndarray]:
        """Do the work once: seconds that it took there, and what it gave."""
        time.sleep(self._settling_seconds)
        return self._process.submit(_run).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


_opened: Opened  # of a contestant's own process


def _open(contestant: Contestant, work: Work) -> About:
    global _opened
    if work.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or some would take a GPU without being asked
    torch.set_num_threads(work.threads)
    _opened = contestant.open(work)
    if work.device == "cuda":
        _opened.run()  # compiles what is to be compiled, while others are opened
    return _opened.about


def _run() -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    found = _opened.run()
    return time.perf_counter() - began, found


def millions(model: nn.Module) -> float:
    """Of parameters, in a network."""
    return round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1)


def versions(*packages: str) -> str:
    """Packages with their versions, as rows name them."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def open_aesanet(backend: BackendName, precision: Precision, cuda_graphs: CudaGraphs, work: Work) -> Opened:
    """One engine; from files, all that `aesanet score` does."""
    scorer = Scorer.open(
        work.bundle,
        work.device,
        backend=backend,
        precision=precision,
        threads=work.threads,
        cuda_graphs=cuda_graphs,
    )
    engine = scorer.backend
    settings = scorer.settings()
    written = work.folder / f"{engine.kind}.jsonl"
    tokens = num_tokens(work.num_samples)

    def files() -> np.ndarray:
        score_to_file(scorer, [Row({"path": path}) for path in work.files], settings, written)
        rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
        if failed := [row for row in rows if "error" in row]:
            raise InputError(f"{failed[0]['path']}: {failed[0]['error']['message']}")
        return np.array([[row[axis] for axis in AXES] for row in rows])

    runs: dict[Part, Callable[[], np.ndarray]] = {
        "files": files,
        "waveforms": lambda: engine.scores(work.waveform, work.num_samples),
        "encoder": lambda: engine.features(work.fbank, tokens),
    }
    own_batch = round(settings.batch_seconds / scorer.manifest.window.window_seconds)
    about = About(
        versions=f"aesanet {__version__}, {' '.join(engine.name.split()[:2])}",
        weights=scorer.manifest.weights,
        parameters_millions=millions(load_checkpoint(work.checkpoint)),
        batch=own_batch if work.part == "files" else work.batch,
    )
    return Opened(about, runs[work.part])


def open_pytorch(dtype: torch.dtype, compiled: bool, work: Work) -> Opened:
    """The network as a script runs it; below FP32, autocast over all but the front end, which it would ruin."""
    model = load_checkpoint(work.checkpoint).to(work.device)
    compile_ = torch.compile if compiled else lambda module: module
    encoder, head = compile_(model.encoder), compile_(model.head)
    reduced = partial(torch.autocast, work.device, dtype, enabled=dtype != torch.float32)

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(work.device)

    def features() -> np.ndarray:
        with torch.inference_mode(), reduced():
            found: Tensor = encoder(there(work.fbank), there(num_tokens(work.num_samples)))
        return found.float().cpu().numpy()

    def scores(waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        tokens = there(num_tokens(num_samples))
        with torch.inference_mode():
            fbank = model.frontend(there(waveform))
            with reduced():
                found: Tensor = head(encoder(fbank, tokens), tokens)
        return found.float().cpu().numpy()

    runs: dict[Part, Callable[[], np.ndarray]] = {
        "files": lambda: _score_files(work, model.config.window, scores),
        "waveforms": lambda: scores(work.waveform, work.num_samples),
        "encoder": features,
    }
    about = About(versions("torch", "soundfile", "soxr"), model.config.weights, millions(model), work.batch)
    return Opened(about, runs[work.part])


def _score_files(work: Work, policy: WindowPolicy, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Read, resample, cut into windows, score a full batch of them: one after the other, as a script does it."""
    sums, weights = np.zeros((len(work.files), len(AXES))), np.zeros((len(work.files), 1))
    waiting: list[tuple[int, np.ndarray]] = []

    def score_batch() -> None:
        batch = [waiting.pop(0) for _ in range(min(work.batch, len(waiting)))]
        scores = score(*pad_batch([window for _, window in batch]))
        for (index, window), found in zip(batch, scores, strict=True):
            sums[index] += len(window) * found
            weights[index] += len(window)

    for index, path in enumerate(work.files):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
        windows = split_windows([mono], policy)
        waiting += [(index, window) for window in windows if len(window) >= MIN_SAMPLES]
        while len(waiting) >= work.batch:
            score_batch()
    while waiting:
        score_batch()
    return sums / weights
