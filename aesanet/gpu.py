"""NVIDIA's GPUs here: what their driver tells of them, and CUDA itself."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from aesanet.errors import BackendError, DeviceMemoryError

_GPU_FIELDS: Final = ("name", "compute_cap", "driver_version", "memory.total")  # as `Gpu` has them


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver tells of it."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    driver: str
    """Its version, or the CUDA that it is for."""
    memory: str
    """In MiB, or why it cannot be told: GPUs that share the processor's memory have none of their own."""

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}, driver {self.driver}, {self.memory} MiB"


def list_gpus() -> list[Gpu]:
    """What NVIDIA's own tool lists, which comes with the driver; raises BackendError."""
    return [Gpu(*row) for row in _nvidia_smi(_GPU_FIELDS)]


def gpu_clocks_mhz() -> list[str]:
    """Of each GPU that NVIDIA's tool lists, the clock of its multiprocessors now; raises BackendError.

    In MHz, or why it cannot be told: where many share a GPU they may not see its clock.
    """
    return [clock for (clock,) in _nvidia_smi(("clocks.sm",))]


def _nvidia_smi(fields: Sequence[str]) -> list[list[str]]:
    """A row of fields for each GPU; raises BackendError."""
    if (tool := shutil.which("nvidia-smi")) is None:
        raise BackendError("none (no nvidia-smi, so no NVIDIA driver)")
    query = (f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    try:
        found = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        raise BackendError("nvidia-smi did not answer within 30 s") from None
    if found.returncode != 0:
        raise BackendError(f"nvidia-smi failed: {(found.stderr or found.stdout).strip()}")
    rows = [[cell.strip() for cell in line.split(",")] for line in found.stdout.splitlines() if line.strip()]
    if not rows or any(len(row) != len(fields) for row in rows):
        raise BackendError(f"nvidia-smi lists no GPU, but says {found.stdout.strip()!r}")
    return rows


def load_cuda() -> Any:
    """CUDA's runtime by way of cuda-python, which needs no toolkit; raises BackendError where it is not installed.

    Where CUDA has not begun in this process, it will take four times as many launches before one has to wait: about a
    thousand, as users have counted, are fewer than the head's LSTM has, and who waits cannot launch the next encoder.
    """
    os.environ.setdefault("CUDA_SCALE_LAUNCH_QUEUES", "4x")
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(f"cuda-python cannot be imported ({error}): pip install 'aesanet[gpu]'") from None
    return runtime


def load_driver() -> Any:
    """CUDA's driver by way of cuda-python; for those who have its runtime already."""
    from cuda.bindings import driver

    return driver


def cuda_call(cuda: Any, name: str, *arguments: Any) -> Any:
    """What a function of CUDA's runtime returns beside its error; raises BackendError, or DeviceMemoryError."""
    error, *values = getattr(cuda, name)(*arguments)
    if error != cuda.cudaError_t.cudaSuccess:
        reason = f"CUDA failed in {name}: {error.name} ({cuda.cudaGetErrorString(error)[1].decode()})"
        if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
            reason += "; is there an NVIDIA driver, and is it new enough?"
        raise (DeviceMemoryError if error == cuda.cudaError_t.cudaErrorMemoryAllocation else BackendError)(reason)
    return values[0] if len(values) == 1 else tuple(values)


def cuda_gpu(cuda: Any, ordinal: int | None = None) -> Gpu:
    """A GPU, or the slice of one (MIG), by CUDA's number; None for this thread's current one, which is 0 if not set.

    Raises BackendError where there is none.
    """
    found = cuda_call(cuda, "cudaGetDeviceProperties", cuda_call(cuda, "cudaGetDevice") if ordinal is None else ordinal)
    driver = cuda_call(cuda, "cudaDriverGetVersion")
    return Gpu(
        found.name.decode(),
        f"{found.major}.{found.minor}",
        f"for CUDA {driver // 1000}.{driver % 1000 // 10}",
        str(found.totalGlobalMem // 2**20),
    )


def require_gpu() -> None:
    """Raise BackendError, with what NVIDIA's tool says, where there is no GPU at all, or no driver for it."""
    _gpus_here()


def compute_capability() -> float:
    """Of CUDA's GPU 0, which ONNX Runtime takes; where only NVIDIA's tool tells, the least of all. Raises BackendError.

    0 where a tool does not tell it.
    """
    try:
        return min(float(gpu.capability) for gpu in _gpus_here())
    except ValueError:
        return 0.0


def _gpus_here() -> list[Gpu]:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        raise BackendError("none (CUDA_VISIBLE_DEVICES hides all)")  # from CUDA, but not from NVIDIA's tool
    try:
        cuda = load_cuda()
    except BackendError:
        return list_gpus()
    if cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaErrorInsufficientDriver:
        return list_gpus()  # it wants a newer driver than others here do
    return [cuda_gpu(cuda, ordinal=0)]


def gpu_memory_mib() -> int | None:
    """In use on the GPU that CUDA takes first, by all processes and this one's CUDA context; None without a GPU."""
    try:
        free_bytes, all_bytes = cuda_call(load_cuda(), "cudaMemGetInfo")
    except BackendError:
        return None
    return int(all_bytes - free_bytes) // 2**20
