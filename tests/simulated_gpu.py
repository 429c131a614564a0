"""CUDA and TensorRT for a machine without a GPU: what stands in for them computes late, and in any order they allow.

Work that is given to a stream waits there. When something is waited for, and now and then in between, streams take
turns at random, each in its own order and held back by the events that it waits for. Code that forgot to order its work
gives wrong scores, sooner or later; much else that CUDA leaves undefined (memory read before it was written or after it
was freed, two layers' working memory in one place, a context destroyed at work) fails at once.

The names are those of `cuda.bindings.runtime`, whose own enumerations are used, and of `tensorrt`.
"""

import copy
import ctypes
import enum
import json
import threading
import weakref
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnxruntime
from cuda.bindings import runtime as real

from aesanet.bundle import signature

OK = (real.cudaError_t.cudaSuccess,)
OUT_OF_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation
NOT_PERMITTED = real.cudaError_t.cudaErrorStreamCaptureUnsupported


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
    """A GPU of `capacity` bytes, whose streams take turns as `rng` says."""

    cudaError_t = real.cudaError_t  # noqa: N815  (CUDA's own names)
    cudaMemoryType = real.cudaMemoryType  # noqa: N815
    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaStreamCaptureMode = real.cudaStreamCaptureMode  # noqa: N815
    cudaHostAllocDefault = real.cudaHostAllocDefault  # noqa: N815
    cudaStreamNonBlocking = real.cudaStreamNonBlocking  # noqa: N815
    cudaEventDisableTiming = real.cudaEventDisableTiming  # noqa: N815
    cudaGetErrorString = staticmethod(real.cudaGetErrorString)  # noqa: N815

    def __init__(self, rng, capacity=1 << 30):
        self.rng, self.capacity = rng, capacity
        self.device, self.host = {}, {}
        self.streams = [Stream(0)]
        self.graphs = set()
        self.haste, self.order = rng.choice([0.1, 1, 10]), []
        self.turn = threading.RLock()  # several threads may call

    # Memory

    def cudaMalloc(self, size):  # noqa: N802
        if self._captures_here():
            return NOT_PERMITTED, None
        if sum(map(len, self.device.values())) + size > self.capacity:
            return OUT_OF_MEMORY, None
        return *OK, self._allocate(self.device, size)

    def cudaFree(self, address):  # noqa: N802
        self._not_capturing()
        assert not any(stream.queue for stream in self.streams), "freed while there is work to do"
        del self.device[address]
        return OK

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        return *OK, self._allocate(self.host, size)

    def cudaFreeHost(self, address):  # noqa: N802
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
        self.streams.append(Stream(max(map(int, self.streams)) + 16))
        return *OK, self.streams[-1]

    def cudaEventCreateWithFlags(self, flags):  # noqa: N802
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
        return *OK, 0

    def cudaSetDevice(self, device):  # noqa: N802
        assert device == 0
        return OK

    def cudaPointerGetAttributes(self, address):  # noqa: N802
        inside = any(start <= address < start + len(block) for start, block in self.device.items())
        kind = self.cudaMemoryType.cudaMemoryTypeDevice if inside else self.cudaMemoryType.cudaMemoryTypeUnregistered
        return *OK, SimpleNamespace(type=kind, device=0)

    def cudaDriverGetVersion(self):  # noqa: N802
        return *OK, 13010

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        properties = SimpleNamespace(name=b"Simulated", major=8, minor=9, totalGlobalMem=self.capacity)
        return *OK, properties


def simulated_plan(onnx, name, profiles):
    """What `SimulatedTensorRT` takes for a plan: a graph's ONNX file and its profiles (of aesanet.export.profiles)."""
    inputs, outputs = signature(name, 32)
    shapes = {spec.name: [profile.shapes(spec) for profile in profiles] for spec in inputs}
    return json.dumps({"onnx": str(onnx), "shapes": shapes, "output": outputs[0].name}).encode()


class SimulatedTensorRT:
    """TensorRT's runtime; what a plan computes, ONNX Runtime does, when its turn comes."""

    __name__ = "tensorrt"
    __version__ = "0.simulated"

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, USER_MANAGED = range(2)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    def __init__(self, cuda, capturable=True):
        self.cuda, self.capturable = cuda, capturable

    def Runtime(self, logger):  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._load(logger, plan))

    def _load(self, logger, plan):
        try:
            return SimulatedEngine(self, logger, json.loads(plan))
        except ValueError:
            logger.log(self.ILogger.Severity.ERROR, "magic tag does not match")
            return None


class SimulatedEngine:
    def __init__(self, trt, logger, plan):
        self.trt, self.logger, self.shapes, self.output = trt, logger, plan["shapes"], plan["output"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # more would wait for each other, and spin
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.num_optimization_profiles = len(next(iter(self.shapes.values())))
        self.num_io_tensors = len(self.shapes) + 1

    def get_tensor_name(self, index):
        return (*self.shapes, self.output)[index]

    def get_tensor_location(self, name):
        assert name in (*self.shapes, self.output)
        return self.trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile):
        return self.shapes[name][profile]

    def get_tensor_shape(self, name):
        (found,) = (o for o in self.session.get_outputs() if o.name == name)
        return tuple(-1 if isinstance(size, str) else size for size in found.shape)

    def create_runtime_config(self):
        return SimulatedConfig()

    def create_execution_context(self, runtime_config):
        assert runtime_config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return SimulatedContext(self)


class SimulatedConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class SimulatedContext:
    def __init__(self, engine):
        self.engine, self.cuda = engine, engine.trt.cuda
        self.profile, self.given, self.addresses, self.memory, self.ran = None, {}, {}, (0, 0), None
        self.laid_out = None  # the shapes that working memory was last divided for
        self.changes = 0

    def _refuse(self, reason):
        self.engine.logger.log(self.engine.trt.ILogger.Severity.ERROR, reason)
        return False

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.shapes[name][self.profile]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return self._refuse(f"{name} {shape} is not within {least} and {most}")
        self.given[name] = tuple(shape)
        self.changes += 1
        return True

    def set_tensor_address(self, name, address):
        if address % 256:
            return self._refuse(f"the address of {name} is not aligned")
        self.addresses[name] = address
        self.changes += 1
        return True

    def set_device_memory(self, address, size):
        needed = self._needed(self.laid_out) if self.laid_out else self._needed_at_most()
        if size < needed:
            self._refuse("The provided memory size is too small")  # and nothing is returned
            return
        self.memory = (address, size)
        self.changes += 1

    def update_device_memory_size_for_shapes(self):
        assert self.given.keys() == self.engine.shapes.keys()
        self.laid_out = dict(self.given)
        return self._needed(self.given)

    @staticmethod
    def _needed(shapes):
        return 64 * int(np.prod(next(iter(shapes.values()))))

    def _needed_at_most(self):
        return self._needed({name: shapes[self.profile][2] for name, shapes in self.engine.shapes.items()})

    def execute_async_v3(self, stream):
        assert self.laid_out == self.given, "working memory is divided for other shapes"
        if self.memory[1] < self._needed(self.given):
            return self._refuse("the memory is too small for these shapes")
        if self.cuda.is_capturing(stream) and (self.ran != self.given or not self.engine.trt.capturable):
            self.cuda.spoil_capture(stream)
            return self._refuse("operation not permitted when stream is capturing")
        self.ran = dict(self.given)
        addresses, shapes, (memory, size) = dict(self.addresses), dict(self.given), self.memory
        cuda, session, output = self.cuda, self.engine.session, self.engine.output  # and not self, which may go
        alive = weakref.ref(self)
        changes = self.changes if self.cuda.is_capturing(stream) else None
        assert addresses.keys() == {*shapes, output}
        mark = np.frombuffer(np.random.default_rng(id(self)).bytes(8), np.uint8)

        def working_memory():
            context = alive()
            assert context is not None, "a context was destroyed before its work was done"
            assert changes in (None, context.changes), "a context was used otherwise after its graph was captured"
            return cuda.bytes_at(memory, size, cuda.device)

        def begin():
            working_memory()[:8] = mark

        def end():
            assert (working_memory()[:8] == mark).all(), "two runs share their working memory"
            inputs = {name: _tensor(cuda, addresses[name], name, shape) for name, shape in shapes.items()}
            (found,) = session.run([output], inputs)
            cuda.bytes_at(addresses[output], found.nbytes, cuda.device).view(np.float32)[:] = found.ravel()

        self.cuda.give(stream, begin, end)
        return True


def _tensor(cuda, address, name, shape):
    dtype = np.int64 if name == "num_tokens" else np.float32
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    values = cuda.bytes_at(address, size, cuda.device).view(dtype).reshape(shape)
    assert np.isfinite(values).all(), f"{name} was read before it was written"
    return values.copy()


class SimulatedRTX(SimulatedTensorRT):
    """TensorRT-RTX's runtime: engines make kernels where they run, unless their cache has them."""

    __name__ = "tensorrt_rtx"

    class CudaGraphStrategy(enum.Enum):
        DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        LAZY, EAGER, NONE = range(3)

    def __init__(self, cuda):
        super().__init__(cuda)
        self.configs, self.made, self.captured, self.replayed = [], [], 0, 0

    def _load(self, logger, plan):
        engine = super()._load(logger, plan)
        if engine is not None:
            engine.create_runtime_config = lambda: SimulatedRTXConfig(self)
            engine.create_execution_context = partial(SimulatedRTXContext, engine)
        return engine


class SimulatedRTXConfig(SimulatedConfig):
    def __init__(self, trt):
        trt.configs.append(self)
        self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self):
        return SimulatedCache()

    def set_runtime_cache(self, cache):
        self.cache = weakref.ref(cache)
        return True


class SimulatedCache:
    """Kernels by what they are made for; it takes only what another has written, whole."""

    def __init__(self):
        self.kernels = set()

    def serialize(self):
        return json.dumps(["kernels", *sorted(self.kernels)]).encode()

    def deserialize(self, blob):
        try:
            magic, *kernels = json.loads(blob)
        except ValueError:
            return False
        self.kernels.update(kernels)
        return magic == "kernels"


class SimulatedRTXContext(SimulatedContext):
    def __init__(self, engine, runtime_config):
        assert runtime_config.strategy == engine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        super().__init__(engine)
        self.cache = runtime_config.cache
        self.captures = runtime_config.cuda_graph_strategy == engine.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.graph = None

    def execute_async_v3(self, stream):
        """A context that captures keeps one graph, of the shapes and addresses that it was given last."""
        assert not self.cuda.is_capturing(stream), "it captures by itself"
        found = copy.deepcopy((self.given, self.addresses, self.memory))
        if self.captures:
            self.engine.trt.captured += self.graph != found
            self.engine.trt.replayed += self.graph == found
            self.graph = found
        cache = self.cache()
        assert cache is not None, "the cache is gone before a context of it"
        kernel = f"{self.engine.output} {self.given}"
        if kernel not in cache.kernels:
            cache.kernels.add(kernel)
            self.engine.trt.made.append(kernel)
        return super().execute_async_v3(stream)

    def __del__(self):
        assert self.cache() is not None, "the cache is gone before a context of it"
