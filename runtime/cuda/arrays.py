"""Arrays that others hold on the GPU, and streams of theirs: PyCUDA's, CuPy's, PyTorch's, by the standard protocols."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aesanet.errors import BackendError

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous float32 array in the GPU's memory, as another library lent it."""

    address: int
    shape: tuple[int, ...]
    stream: int | None
    """The stream that fills it, where its library says so."""
    owner: Any
    """What must live as long as the array is read."""

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Rows of it, from `rows.start` to `rows.stop`."""
        start, stop, _ = rows.indices(self.shape[0])
        below = self.shape[1:]
        return replace(
            self, address=self.address + start * math.prod(below) * _FLOAT32.itemsize, shape=(stop - start, *below)
        )


def on_device(array: Any) -> bool:
    """Whether an array lies in a GPU's memory."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__cuda_array_interface__"):
        return True
    cuda, managed = 2, 13  # kDLCUDA and kDLCUDAManaged
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in (cuda, managed)


def device_array(array: Any, stream: int, in_order: bool) -> DeviceArray:
    """Look at an array without copying it.

    stream   : that the array will be read on
    in_order : whether the caller sees to the order of reading and filling. Where neither he does nor the array names
               its stream (PyTorch's), the lender is asked to by way of DLPack

    Raises TypeError for another dtype, ValueError where it is not contiguous, BackendError where cuda-core is missing.
    """
    described = getattr(array, "__cuda_array_interface__", None)
    in_order = in_order or (described is not None and described.get("stream") is not None)
    if described is not None and (in_order or not hasattr(array, "__dlpack__")):
        dtype, shape, strides = np.dtype(described["typestr"]), tuple(described["shape"]), described.get("strides")
        strides = strides and tuple(size // dtype.itemsize for size in strides)
        found = DeviceArray(int(described["data"][0]), shape, described.get("stream"), array)
    else:
        try:
            from cuda.core.utils import StridedMemoryView
        except ImportError as error:
            raise BackendError(f"arrays by DLPack need cuda-core ({error}): pip install 'aesanet[gpu]'") from None
        view = StridedMemoryView.from_dlpack(array, stream_ptr=stream)
        dtype, shape, strides = view.dtype, tuple(view.shape), view.strides
        found = DeviceArray(int(view.ptr), shape, None, view)
    if dtype != _FLOAT32:
        raise TypeError(f"an array of {dtype} on the GPU; give float32")
    if strides and any(size > 1 and step != own for size, step, own in zip(shape, strides, _rows(shape), strict=True)):
        raise ValueError(f"an array on the GPU of shape {shape} with strides {strides}; make it contiguous")
    return found


def stream_handle(stream: Any) -> int:
    """The CUDA handle of a stream: an integer, or what cuda.core, PyTorch, CuPy or PyCUDA call one."""
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    return int(stream)


def _rows(shape: tuple[int, ...]) -> list[int]:
    """Strides in items of a C-contiguous array."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
