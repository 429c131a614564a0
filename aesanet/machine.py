"""The machine that code runs on, in the words of reports."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

from aesanet.errors import BackendError

_GPU_QUERY: Final = ("--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver tells of it."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    driver: str
    memory: str
    """In MiB, or why it cannot be told: GPUs that share the processor's memory have none of their own."""


def list_gpus() -> list[Gpu]:
    """What NVIDIA's own tool lists, which comes with the driver; raises BackendError."""
    if (tool := shutil.which("nvidia-smi")) is None:
        raise BackendError("none (no nvidia-smi, so no NVIDIA driver)")
    try:
        found = subprocess.run([tool, *_GPU_QUERY], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        raise BackendError("nvidia-smi did not answer within 30 s") from None
    if found.returncode != 0:
        raise BackendError(f"nvidia-smi failed: {(found.stderr or found.stdout).strip()}")
    rows = [[cell.strip() for cell in line.split(",")] for line in found.stdout.splitlines() if line.strip()]
    if not rows or any(len(row) != 4 for row in rows):
        raise BackendError(f"nvidia-smi lists no GPU, but says {found.stdout.strip()!r}")
    return [Gpu(*row) for row in rows]


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
