"""A processor's fastest large matrix product, in TFLOP/s: `python -m aesanet.benchmarks.matrix_product bf16 2`."""

import sys
import time
from collections.abc import Callable
from typing import Final

import torch

_TYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SMALLEST: Final = 512
_LONG_SECONDS: Final = 0.1
_REPEATS: Final = 5


def best_tflops(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """10^12 operations a second, a multiply-add as two, of the fastest of PyTorch's products of square matrices.

    Sizes double until the fastest product of one takes a tenth of a second.
    """
    best, size, seconds = 0.0, _SMALLEST, 0.0
    while seconds < _LONG_SECONDS:
        seconds = _product_seconds(size, dtype, clock)
        best = max(best, 2 * size**3 / seconds / 1e12)
        size *= 2
    return best


def _product_seconds(size: int, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Of the fastest of some products of two matrices; the first of them also warms up."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    found = []
    for _ in range(_REPEATS):
        began = clock()
        left @ right
        found.append(clock() - began)
    return min(found)


def main() -> None:
    """Precision and threads in, one number out."""
    precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(best_tflops(_TYPES[precision]))


if __name__ == "__main__":
    main()
