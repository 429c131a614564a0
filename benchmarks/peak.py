"""What a device could compute at most: published for GPUs, measured for processors."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from aesanet.errors import BackendError
from aesanet.gpu import cuda_gpu, load_cuda
from aesanet.runtime.backends.base import Backend, Precision

# Dense FP16 products with FP32 sums on tensor cores, by the names that the driver gives: from NVIDIA's datasheets (for
# H100 and H200 half of what they tell, which is with sparsity) and, for GeForce, its whitepapers on GA102 and Ada. A
# slice of a GPU (MIG) and the GPUs of laptops have other names, and so no peak here.
FP16_TFLOPS: Final = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}


@dataclass(frozen=True)
class Peak:
    """The most that a device computes in one precision, in 10^12 operations a second, and who says so."""

    tflops: float | None
    source: str


def device_peak(backend: Backend, threads: int) -> Peak:
    """Of the device and in the precision of an engine; nothing for GPUs that are not listed, and FP32 on any.

    threads : of the processor, that are used for measuring it
    """
    if backend.device == "cpu":
        source = f"measured matrix product, {backend.precision}, {threads} threads"
        return Peak(_measured_tflops(backend.precision, threads), source)
    try:
        gpu = cuda_gpu(load_cuda()).name
    except BackendError:  # ONNX Runtime's CUDA needs no cuda-python
        gpu = ""
    if backend.precision != "fp16" or gpu not in FP16_TFLOPS:
        return Peak(None, "")
    return Peak(FP16_TFLOPS[gpu], "NVIDIA, dense FP16")


def _measured_tflops(precision: Precision, threads: int) -> float:
    """By a process of its own: PyTorch's memory and threads shall be none of the engine's."""
    command = [sys.executable, "-m", "aesanet.benchmarks.matrix_product", precision, str(threads)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        told = found.stderr.strip() or f"exit status {found.returncode}"
        raise BackendError(f"the peak cannot be measured: {told.splitlines()[-1]}")
    return float(found.stdout)
