"""CUDA, as much of it as scoring needs: memory, copies, streams, events and captured graphs.

Addresses, streams and events are what cuda-python gives; `int()` of a stream is what TensorRT takes.
"""

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from aesanet.errors import BackendError, DeviceMemoryError
from aesanet.gpu import cuda_call


class CudaDevice:
    """The device that was CUDA's current one when this was made, in the context that CUDA's runtime has of it.

    Every method raises BackendError with CUDA's reason: DeviceMemoryError for a full memory.

    cuda   : `cuda.bindings.runtime`, or what stands for it in tests
    driver : `cuda.bindings.driver`, or the same
    """

    def __init__(self, cuda: Any, driver: Any) -> None:
        self._cuda, self._driver = cuda, driver
        self._ordinal = self._call("cudaGetDevice")
        self._drive("cuInit", 0)
        self._context = self._drive("cuDevicePrimaryCtxRetain", self._ordinal)  # for as long as the process lives
        self.spoilt = False
        """Whether the last that was to be captured could not be; for those who run what comes next."""

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let this thread's calls be on this device, and then on the one before: each thread has its own.

        By the driver, as the runtime cannot go back to none: it would begin on GPU 0, and take memory there.
        """
        self._drive("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._drive("cuCtxPopCurrent")

    def check_here(self, address: int) -> None:
        """Raise ValueError for memory that is not this device's."""
        found = self._call("cudaPointerGetAttributes", address)
        here = (self._cuda.cudaMemoryType.cudaMemoryTypeDevice, self._cuda.cudaMemoryType.cudaMemoryTypeManaged)
        if found.type not in here or found.device != self._ordinal:
            raise ValueError(
                f"an array of GPU {found.device} ({found.type.name}); the engine is on GPU {self._ordinal}"
            )

    def allocate(self, num_bytes: int) -> int:
        """The address of device memory, aligned to 256 bytes."""
        return int(self._call("cudaMalloc", num_bytes))

    def free(self, address: int) -> None:
        """Give memory back; waits for all work on the device."""
        self._call("cudaFree", address)

    def pin(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of page-locked host memory, which copies to and from the device need not wait for.

        It lives as long as the array that is returned, or a view of it.
        """
        try:
            address = int(self._call("cudaHostAlloc", num_bytes, self._cuda.cudaHostAllocDefault))
        except DeviceMemoryError as error:  # the host's, and smaller batches on the device are no help
            raise BackendError(f"no {num_bytes} bytes of page-locked memory: {error}") from None
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, self._unpin, address).atexit = False  # the system takes it back then
        return np.ctypeslib.as_array(memory)

    def _unpin(self, address: int) -> None:
        """In whichever thread an array's last user lets it go."""
        with suppress(BackendError), self.current():
            self._cuda.cudaFreeHost(address)

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def event(self) -> Any:
        """An event that orders work and takes no time."""
        return self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)

    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        """Copy a contiguous, pinned array to the device, in the stream's order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        """Copy from the device to a contiguous, pinned array, in the stream's order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def copy(self, to: int, source: int, num_bytes: int, stream: Any) -> None:
        """Copy within the device, in the stream's order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, num_bytes, kind, stream)

    def record(self, event: Any, stream: Any) -> None:
        """Let an event stand for all that was given to a stream so far."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is given to a stream from now on begin after an event's work."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize(self, event: Any) -> None:
        """Wait here for an event's work."""
        self._call("cudaEventSynchronize", event)

    def synchronize_stream(self, stream: Any) -> None:
        """Wait here for all work of a stream. (Waiting for the whole device would disturb what others capture.)"""
        self._call("cudaStreamSynchronize", stream)

    def free_bytes(self) -> int:
        """Memory of the device that nobody holds."""
        return int(self._call("cudaMemGetInfo")[0])

    @contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        """Collect what is given to a stream instead of running it; the list then holds one launchable graph.

        Raises BackendError for work that cannot be captured, and the stream is as before.
        """
        captured: list[Any] = []
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            with _nothing_collected:
                self._call("cudaStreamBeginCapture", stream, mode)
                try:
                    yield captured
                except BaseException:
                    _, graph = self._cuda.cudaStreamEndCapture(stream)  # which may complain once more
                    if graph is not None and int(graph):
                        self._call("cudaGraphDestroy", graph)
                    raise
                graph = self._call("cudaStreamEndCapture", stream)
            try:
                captured.append(self._call("cudaGraphInstantiate", graph, 0))
            finally:
                self._call("cudaGraphDestroy", graph)
        except BaseException:
            self.spoilt = True
            raise

    def launch(self, graph: Any, stream: Any) -> None:
        """Run a captured graph in a stream's order."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy(self, graph: Any) -> None:
        """Forget a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        self._call("cudaEventDestroy", event)

    def _call(self, name: str, *arguments: Any) -> Any:
        return cuda_call(self._cuda, name, *arguments)

    def _drive(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        results = self._driver.CUresult
        if error != results.CUDA_SUCCESS:
            full = error == results.CUDA_ERROR_OUT_OF_MEMORY
            raise (DeviceMemoryError if full else BackendError)(f"CUDA failed in {name}: {error.name}")
        return values[0] if values else None


class _NothingCollected:
    """Keeps Python from finding garbage meanwhile: a thread that captures cannot free memory of the GPU in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks, self._collects = 0, False  # several threads may be in one

    def __enter__(self) -> None:
        with self._lock:
            if not self._blocks:
                self._collects = gc.isenabled()
                gc.disable()
            self._blocks += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks and self._collects:
                gc.enable()


_nothing_collected = _NothingCollected()


class Blocks:
    """Blocks of device memory by name. Each grows when more is asked of it, and only `clear` makes them smaller."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._blocks: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> int:
        """The address of a block."""
        return self._blocks[name][0]

    def size(self, name: str) -> int:
        """Bytes of a block, 0 where there is none yet."""
        return self._blocks.get(name, (0, 0))[1]

    def hold(self, sizes: Mapping[str, int]) -> bool:
        """Whether every block is there and large enough."""
        return all(name in self._blocks and size <= self.size(name) for name, size in sizes.items())

    def grow(self, sizes: Mapping[str, int]) -> None:
        """Make every block at least so large; those that grow lose what they held, and no work may use them.

        Raises DeviceMemoryError, and all blocks are then gone.
        """
        small = [name for name, size in sizes.items() if name not in self._blocks or size > self.size(name)]
        for name in small:
            self._free(name)
        try:
            for name in small:
                self._blocks[name] = (self._device.allocate(max(1, sizes[name])), sizes[name])
        except BackendError:
            self.clear()
            raise

    def clear(self) -> None:
        """Give all memory back; a block that cannot be given back does not keep the others."""
        with ExitStack() as all_blocks:
            for name in list(self._blocks):
                all_blocks.callback(self._free, name)

    def _free(self, name: str) -> None:
        if name in self._blocks:
            self._device.free(self._blocks.pop(name)[0])
