"""Times every engine on the same batches, in turn, against PyTorch eager, and writes a CSV.

python -m aesanet.benchmarks.backends --out benchmarks/results/backends.csv
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from aesanet.export.build import export_bundle
from aesanet.lengths import SAMPLE_RATE
from aesanet.models.aesanet import AESANet
from aesanet.models.checkpoint import load_checkpoint, save_checkpoint
from aesanet.models.config import AESANetConfig
from aesanet.runtime.backends import supported_backends
from aesanet.runtime.scorer import Scorer

COLUMNS = (
    "date processor cores python torch engine weights batch clip_seconds rounds"
    " milliseconds_median milliseconds_min x_real_time x_pytorch scores_max_abs_difference"
).split()
CLIP_SECONDS = 10.0


def measure(checkpoint: Path, batches: list[int], rounds: int, threads: int) -> list[dict[str, object]]:
    """One row an engine and batch size: waveforms ready in memory to scores, rounds interleaved over the engines."""
    torch.set_num_threads(threads)
    model = load_checkpoint(checkpoint)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle")
        export_bundle(checkpoint, bundle)
        engines = _engines(model, bundle, threads)
        for batch in batches:
            rows += _one_batch_size(engines, batch, rounds)
    where = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": threads,
        "python": platform.python_version(),
        "torch": version("torch"),
        "weights": model.config.weights,
    }
    return [where | row for row in rows]


Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _engines(model: AESANet, bundle: Path, threads: int) -> dict[str, Engine]:
    def eager(waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(waveform), torch.from_numpy(num_samples)).numpy())

    engines: dict[str, Engine] = {"pytorch eager cpu fp32": eager}
    for name, support in supported_backends().items():
        for device, precision in support.runs:
            scorer = Scorer.open(bundle, device, backend=name, precision=precision, threads=threads)
            engines[scorer.backend.name] = scorer.backend.scores
    return engines


def _one_batch_size(engines: dict[str, Engine], batch: int, rounds: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(batch)
    waveform = rng.normal(0, 0.1, (batch, round(CLIP_SECONDS * SAMPLE_RATE))).astype(np.float32)
    num_samples = np.full(batch, waveform.shape[1])
    scores = {name: engine(waveform, num_samples) for name, engine in engines.items()}  # warms up too
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine(waveform, num_samples)
            seconds[name].append(time.perf_counter() - started)
    eager = next(iter(engines))
    return [
        {
            "engine": name,
            "batch": batch,
            "clip_seconds": CLIP_SECONDS,
            "rounds": rounds,
            "milliseconds_median": round(1000 * statistics.median(times), 2),
            "milliseconds_min": round(1000 * min(times), 2),
            "x_real_time": round(batch * CLIP_SECONDS / statistics.median(times), 2),
            "x_pytorch": round(statistics.median(seconds[eager]) / statistics.median(times), 3),
            "scores_max_abs_difference": f"{np.abs(scores[name] - scores[eager]).max():.2e}",
        }
        for name, times in seconds.items()
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Command line; without --checkpoint, an untrained network of the public base size is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            torch.manual_seed(0)
            checkpoint = Path(folder, "untrained-base.safetensors")
            save_checkpoint(AESANet(AESANetConfig(weights="untrained")), checkpoint)
        rows = measure(checkpoint, arguments.batches, arguments.rounds, arguments.threads)
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep=", ")


if __name__ == "__main__":
    main()
