"""TensorRT and TensorRT-RTX for a machine without a GPU: their runtimes' rules, on what stands in for CUDA.

A plan computes when its turn on a stream comes (see simulated_cuda), as ONNX Runtime computes its graph. What the
libraries refuse or leave undefined fails at once. The names are those of `tensorrt` and `tensorrt_rtx`.
"""

import copy
import enum
import json
import weakref
from functools import partial

import numpy as np
import onnxruntime

from aesanet.bundle import signature


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

    class Logger:
        def __init__(self, min_severity):
            self.min_severity = min_severity

    class IErrorRecorder:
        pass

    class ErrorCodeTRT(enum.Enum):
        UNSPECIFIED_ERROR, FAILED_ALLOCATION = range(1, 3)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, USER_MANAGED = range(2)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    def __init__(self, cuda, capturable=("fbank", "features", "scores"), tells="at once"):
        """What cannot be captured is told at once, by the next run too ("twice"), or when its capture ends ("late")."""
        self.cuda, self.capturable, self.logger = cuda, capturable, None
        self.tells, self.late_error = tells, False

    def Runtime(self, logger):  # noqa: N802
        """The first logger is that of all: one that is gone by then would be written to all the same."""
        assert isinstance(logger, self.Logger)
        assert self.logger in (None, logger)
        self.logger = logger
        return SimulatedRuntime(self)

    def _load(self, plan):
        return SimulatedEngine(self, json.loads(plan))


class Complaining:
    """What has a recorder of errors, of its own or of what it was made of."""

    def __init__(self, trt, error_recorder=None):
        self.trt, self.error_recorder = trt, error_recorder

    def _refuse(self, reason, code="UNSPECIFIED_ERROR", found=False):
        self.error_recorder.report_error(self.trt.ErrorCodeTRT[code], reason)
        return found


class SimulatedRuntime(Complaining):
    def deserialize_cuda_engine(self, plan):
        try:
            engine = self.trt._load(plan)
        except ValueError:
            return self._refuse("magic tag does not match", found=None)
        engine.error_recorder = self.error_recorder
        return engine


class SimulatedEngine(Complaining):
    def __init__(self, trt, plan):
        super().__init__(trt)
        self.shapes, self.output = plan["shapes"], plan["output"]
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


class SimulatedContext(Complaining):
    def __init__(self, engine):
        super().__init__(engine.trt, engine.error_recorder)
        self.engine, self.cuda = engine, engine.trt.cuda
        self.profile, self.given, self.addresses, self.memory, self.ran = None, {}, {}, (0, 0), None
        self.laid_out = None  # the shapes that working memory was last divided for
        self.changes = 0

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
        if self.trt.late_error:
            self.trt.late_error = False
            return self._refuse("operation failed due to a previous error during capture")
        capturable = self.engine.output in self.engine.trt.capturable
        if self.cuda.is_capturing(stream) and (self.ran != self.given or not capturable):
            self.cuda.spoil_capture(stream)
            self.trt.late_error = self.trt.tells != "at once"
            return self.trt.tells == "late" or self._refuse("operation not permitted when stream is capturing")
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

    def _load(self, plan):
        engine = super()._load(plan)
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
