"""CUDA for a machine without a GPU: what stands in for it does its work late, and in any order that it allows.

Work that is given to a stream waits there. When something is waited for, and now and then in between, streams take
turns at random, each in its own order and held back by the events that it waits for. Code that forgot to order its work
gives wrong scores, sooner or later; much else that CUDA leaves undefined (memory read before it was written or after it
was freed) fails at once.

The names are those of `cuda.bindings.runtime` and `cuda.bindings.driver`, whose own enumerations are used.
"""

import ctypes
import gc
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real

OK = (real.cudaError_t.cudaSuccess,)
OUT_OF_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation
NOT_PERMITTED = real.cudaError_t.cudaErrorStreamCaptureUnsupported


_collecting = set()  # threads that do


def _tell(phase, info):
    (_collecting.add if phase == "start" else _collecting.discard)(threading.get_ident())


gc.callbacks.append(_tell)


class Stream:
    def __init__(self, number):
        self.number, self.queue, self.captured, self.spoilt = number, deque(), None, False
        self.captured_by = None

    def __int__(self):
        return self.number


class Event:
    def __init__(self):
        self.recorded = self.completed = 0


class Graph:
    count = 0

    def __init__(self, work):
        self.work = tuple(work)
        Graph.count += 1
        self.number = Graph.count

    def __int__(self):
        return self.number


def _do(work):
    work()
    return True


class SimulatedCuda:
    """A GPU of `capacity` bytes, whose streams take turns as `rng` says; each thread has a current one of several."""

    CUresult = real_driver.CUresult
    cudaError_t = real.cudaError_t  # noqa: N815  (CUDA's own names)
    cudaMemoryType = real.cudaMemoryType  # noqa: N815
    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaStreamCaptureMode = real.cudaStreamCaptureMode  # noqa: N815
    cudaHostAllocDefault = real.cudaHostAllocDefault  # noqa: N815
    cudaStreamNonBlocking = real.cudaStreamNonBlocking  # noqa: N815
    cudaEventDisableTiming = real.cudaEventDisableTiming  # noqa: N815
    cudaGetErrorString = staticmethod(real.cudaGetErrorString)  # noqa: N815

    def __init__(self, rng, capacity=1 << 30, ordinal=0):
        self.rng, self.capacity, self.ordinal = rng, capacity, ordinal
        self.current = threading.local()
        self.device, self.host = {}, {}
        self.streams = [Stream(0)]
        self.graphs = set()
        self.haste, self.order = rng.choice([0.1, 1, 10]), []
        self.turn = threading.RLock()  # several threads may call
        self.begun = set()  # devices on which memory was taken, if only for a context

    # Memory

    def cudaMalloc(self, size):  # noqa: N802
        self._must_be_current()
        if self._captures_here():
            return NOT_PERMITTED, None
        if sum(map(len, self.device.values())) + size > self.capacity:
            return OUT_OF_MEMORY, None
        return *OK, self._allocate(self.device, size)

    def cudaFree(self, address):  # noqa: N802
        self._not_capturing()
        # CUDA waits then for all that the GPU has to do: nobody's aim, but Python finds garbage when it likes.
        assert _collecting or not any(stream.queue for stream in self.streams), "freed while there is work to do"
        del self.device[address]
        return OK

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        self._must_be_current()
        self._not_capturing()
        return *OK, self._allocate(self.host, size)

    def cudaFreeHost(self, address):  # noqa: N802
        self._must_be_current()
        self._not_capturing()
        del self.host[address]
        return OK

    def cudaMemGetInfo(self):  # noqa: N802
        return *OK, self.capacity - sum(map(len, self.device.values())), self.capacity

    @staticmethod
    def _allocate(memory, size):
        """Memory aligned to 256 bytes, which holds NaN as floats and -1 as integers."""
        around = (ctypes.c_uint8 * (size + 256))()
        block = (ctypes.c_uint8 * size).from_buffer(around, -ctypes.addressof(around) % 256)
        ctypes.memset(block, 0xFF, size)
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _captures_here(self):
        """Whether this thread captures a stream: in CUDA's thread-local mode others may do meanwhile as they like."""
        return any(
            stream.captured is not None and stream.captured_by == threading.get_ident() for stream in self.streams
        )

    def _not_capturing(self):
        assert not self._captures_here(), "not while a stream is captured"

    def bytes_at(self, address, size, memory):
        """uint8 [size] of live memory."""
        inside = any(start <= address and address + size <= start + len(block) for start, block in memory.items())
        assert inside, "memory that was never allocated, or was freed"
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):  # noqa: N802
        sides = {
            real.cudaMemcpyKind.cudaMemcpyDeviceToHost: (self.host, self.device),
            real.cudaMemcpyKind.cudaMemcpyHostToDevice: (self.device, self.host),
            real.cudaMemcpyKind.cudaMemcpyDeviceToDevice: (self.device, self.device),
        }[kind]

        def copy():
            self.bytes_at(to, size, sides[0])[:] = self.bytes_at(source, size, sides[1])

        return self.give(stream, copy)

    # Order

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == real.cudaStreamNonBlocking
        self._must_be_current()
        self.streams.append(Stream(max(map(int, self.streams)) + 16))
        return *OK, self.streams[-1]

    def cudaEventCreateWithFlags(self, flags):  # noqa: N802
        self._must_be_current()
        self._not_capturing()
        return *OK, Event()

    def cudaEventRecord(self, event, stream):  # noqa: N802
        event.recorded += 1
        ticket = event.recorded

        def complete():
            event.completed = max(event.completed, ticket)

        return self.give(stream, complete)

    def cudaStreamWaitEvent(self, stream, event, flags):  # noqa: N802
        assert not self.is_capturing(stream), "a captured stream would depend on work that is not captured"
        ticket = event.recorded
        self._of(stream).queue.append(lambda: event.completed >= ticket)  # stays in front until it is so
        return OK

    def cudaEventSynchronize(self, event):  # noqa: N802
        self._not_capturing()
        ticket = event.recorded
        while event.completed < ticket:
            with self.turn:
                assert event.completed >= ticket or self._step(), "nobody will ever complete this event"
        return OK

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        self._not_capturing()
        with self.turn:
            while self._of(stream).queue:
                assert self._step(), "streams wait for each other"
        return OK

    def cudaStreamDestroy(self, stream):  # noqa: N802
        assert not stream.queue
        self.streams.remove(stream)
        return OK

    def cudaEventDestroy(self, event):  # noqa: N802
        assert event.completed == event.recorded
        return OK

    def _of(self, stream):
        (found,) = (s for s in self.streams if int(s) == int(stream))
        return found

    def is_capturing(self, stream):
        return self._of(stream).captured is not None

    def give(self, stream, *work):
        """Hand work to a stream, or to the graph that it is captured for; then perhaps other work gets its turn."""
        self._must_be_current()
        with self.turn:
            found = self._of(stream)
            if found.captured is not None:
                found.captured.extend(work)
            else:
                found.queue.extend(partial(_do, piece) for piece in work)
                for _ in range(self.rng.poisson(self.haste)):
                    self._step()
        return OK

    def _step(self):
        """Do one piece of work of a stream that can go on; false if none can.

        For some time streams go before each other in the same order, so that some starve.
        """
        with self.turn:
            if len(self.order) != len(self.streams) or self.rng.random() < 0.1:
                self.order = self.rng.permutation(self.streams)
            for stream in self.order:
                queue = stream.queue
                if queue and queue[0]():
                    queue.popleft()
                    return True
            return False

    # Graphs

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        found = self._of(stream)
        found.captured, found.captured_by, found.spoilt = [], threading.get_ident(), False
        return OK

    def spoil_capture(self, stream):
        self._of(stream).spoilt = True

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        assert not gc.isenabled(), "what garbage holds cannot be freed meanwhile"
        graph, self._of(stream).captured = self._of(stream).captured, None
        if self._of(stream).spoilt:
            return real.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self.graphs.add(Graph(graph))
        return *OK, max(self.graphs, key=lambda graph: graph.number)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        executable = Graph(graph.work)
        self.graphs.add(executable)
        return *OK, executable

    def cudaGraphDestroy(self, graph):  # noqa: N802
        self.graphs.remove(graph)
        return OK

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        self.graphs.remove(graph)
        return OK

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        assert graph in self.graphs, "a graph that was destroyed"
        return self.give(stream, *graph.work)

    # What is here

    def cudaGetDevice(self):  # noqa: N802
        return *OK, self._pushed[-1] if self._pushed else getattr(self.current, "ordinal", 0)

    def cudaGetDeviceCount(self):  # noqa: N802
        return *OK, 2

    def cudaSetDevice(self, device):  # noqa: N802
        self.current.ordinal = device
        self.begun.add(device)
        return OK

    def cuInit(self, flags):  # noqa: N802
        return (real_driver.CUresult.CUDA_SUCCESS,)

    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        self.begun.add(device)
        return real_driver.CUresult.CUDA_SUCCESS, device

    def cuCtxPushCurrent(self, context):  # noqa: N802
        self._pushed.append(context)
        return (real_driver.CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):  # noqa: N802
        if not self._pushed:
            return real_driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return real_driver.CUresult.CUDA_SUCCESS, self._pushed.pop()

    @property
    def _pushed(self):
        """Of this thread: devices whose contexts the driver made current."""
        return self.current.__dict__.setdefault("pushed", [])

    def _must_be_current(self):
        assert self.cudaGetDevice()[1] == self.ordinal, "another GPU is this thread's current one"

    def cudaPointerGetAttributes(self, address):  # noqa: N802
        inside = any(start <= address < start + len(block) for start, block in self.device.items())
        kind = self.cudaMemoryType.cudaMemoryTypeDevice if inside else self.cudaMemoryType.cudaMemoryTypeUnregistered
        return *OK, SimpleNamespace(type=kind, device=self.ordinal)

    def cudaDriverGetVersion(self):  # noqa: N802
        return *OK, 13010

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        name, major, minor = (b"Simulated", 8, 9) if device == self.ordinal else (b"Another", 9, 0)
        return *OK, SimpleNamespace(name=name, major=major, minor=minor, totalGlobalMem=self.capacity)
