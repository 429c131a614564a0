"""Times every engine on the same batches, in turn, against PyTorch, and writes a CSV.

python -m aesanet.benchmarks.backends --out benchmarks/results/backends.csv
"""

import argparse
import copy
import csv
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from aesanet.errors import BackendError
from aesanet.export.build import export_bundle
from aesanet.export.compile import choose_flavour, compile_bundle
from aesanet.export.engine import Settings
from aesanet.export.profiles import default_profiles
from aesanet.lengths import SAMPLE_RATE, num_tokens
from aesanet.machine import processor_name, usable_cores
from aesanet.models.aesanet import AESANet
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import AESANetConfig
from aesanet.models.demo import samples
from aesanet.models.untrained import untrained_model
from aesanet.runtime.backends import BackendName, supported_backends, tensorrt
from aesanet.runtime.backends.base import Device, Precision
from aesanet.runtime.decode import ClipReader
from aesanet.runtime.rows import Clip
from aesanet.runtime.scorer import Scorer

COLUMNS = (
    "date processor gpu threads python torch engine weights batch clip_seconds repeats"
    " milliseconds_median milliseconds_min x_real_time x_pytorch scores_spread scores_max_abs_difference"
).split()
CLIP_SECONDS = 10.0


def measure(
    checkpoint: Path, batches: list[int], passes: int, rounds: int, threads: int, device: Device
) -> list[dict[str, object]]:
    """One row an engine of a device and batch size, timed from waveforms in memory to scores.

    The engines take turns, `passes` times, each alone in the process: the waiting threads of one slow down another.
    """
    torch.set_num_threads(threads)
    model = load_checkpoint(checkpoint)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    scores: dict[tuple[str, int], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle")
        on_gpu = device == "cuda"
        recordings = [np.concatenate(list(ClipReader(Clip(str(path))))) for path in samples()] if on_gpu else []
        export_bundle(checkpoint, bundle, half_on=recordings)
        if on_gpu and tensorrt.support().runs:
            compile_bundle(bundle, choose_flavour("auto"), Settings(default_profiles(CLIP_SECONDS)))
        for _ in range(passes):
            for open_engine in _openers(model, bundle, threads, device):
                try:
                    name, engine = open_engine()
                except BackendError as error:
                    print(f"left out: {error}")
                    continue
                for batch in batches:
                    waveform, num_samples = _clips(batch)
                    scores[name, batch] = engine(waveform, num_samples)  # warms up too
                    for _ in range(rounds):
                        started = time.perf_counter()
                        engine(waveform, num_samples)
                        seconds[name, batch].append(time.perf_counter() - started)
                del engine
    where = {
        "date": date.today().isoformat(),
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": threads,
        "python": platform.python_version(),
        "torch": version("torch"),
        "weights": model.config.weights,
    }
    return [
        where | _row(name, batch, times, seconds[_eager(device), batch], scores, _eager(device))
        for (name, batch), times in seconds.items()
    ]


Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _openers(model: AESANet, bundle: Path, threads: int, device: Device) -> Iterator[Callable[[], tuple[str, Engine]]]:
    """PyTorch as people run it today, then every engine that this machine has for the device."""
    half = torch.float16 if device == "cuda" else torch.bfloat16
    yield partial(_pytorch, model, device, torch.float32, compiled=False)
    yield partial(_pytorch, model, device, half, compiled=False)
    if device == "cuda":
        yield partial(_pytorch, model, device, half, compiled=True)

    def opened(name: BackendName, precision: Precision) -> tuple[str, Engine]:
        backend = Scorer.open(bundle, device, backend=name, precision=precision, threads=threads).backend
        return backend.name, backend.scores

    for name, support in supported_backends().items():
        yield from (partial(opened, name, precision) for on, precision in support.runs if on == device)


def _eager(device: Device) -> str:
    """What all others are held against."""
    return f"pytorch eager {device} fp32"


def _pytorch(model: AESANet, device: Device, dtype: torch.dtype, compiled: bool) -> tuple[str, Engine]:
    """The model on a device; below FP32, autocast over all but the front end, which it would ruin."""
    there = copy.deepcopy(model).to(device)
    encoder, head = (
        (torch.compile(there.encoder), torch.compile(there.head)) if compiled else (there.encoder, there.head)
    )

    def scores(waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tokens = num_tokens(torch.from_numpy(num_samples)).to(device)
            fbank = there.frontend(torch.from_numpy(waveform).to(device))
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                result: np.ndarray = head(encoder(fbank, tokens), tokens).float().cpu().numpy()
        return result

    precision = {torch.float32: "fp32", torch.float16: "fp16 autocast", torch.bfloat16: "bf16 autocast"}[dtype]
    return f"pytorch {'compile' if compiled else 'eager'} {device} {precision}", scores


def _clips(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of every level and colour, so that clips differ: white at one end of the batch, brown at the other."""
    samples = round(CLIP_SECONDS * SAMPLE_RATE)
    noise = np.random.default_rng(batch).normal(0, 0.1, (batch, samples))
    smoothing = np.linspace(1, 64, batch).astype(int)
    rows = [np.convolve(row, np.full(n, n**-0.5), mode="same") for row, n in zip(noise, smoothing, strict=True)]
    return np.array(rows, np.float32), np.full(batch, samples)


def _row(
    name: str,
    batch: int,
    times: list[float],
    eager_times: list[float],
    scores: dict[tuple[str, int], np.ndarray],
    eager: str,
) -> dict[str, object]:
    median = statistics.median(times)
    return {
        "engine": name,
        "batch": batch,
        "clip_seconds": CLIP_SECONDS,
        "repeats": len(times),
        "milliseconds_median": round(1000 * median, 2),
        "milliseconds_min": round(1000 * min(times), 2),
        "x_real_time": round(batch * CLIP_SECONDS / median, 2),
        "x_pytorch": round(statistics.median(eager_times) / median, 3),
        # Over the clips of the batch, on the axis where it is least: what the difference is to be held against.
        "scores_spread": f"{np.ptp(scores[eager, batch], axis=0).min():.2e}" if batch > 1 else "",
        "scores_max_abs_difference": f"{np.abs(scores[name, batch] - scores[eager, batch]).max():.2e}",
    }


def main() -> None:
    """Command line; without --checkpoint, an untrained network of the public base size is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder, "untrained-base.safetensors")
            save_checkpoint(untrained_model(AESANetConfig(), seed=0), checkpoint)
        rows = measure(
            checkpoint, arguments.batches, arguments.passes, arguments.rounds, arguments.threads, arguments.device
        )
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep=", ")


if __name__ == "__main__":
    main()
