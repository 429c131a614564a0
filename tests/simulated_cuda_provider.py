"""onnxruntime for a machine without a GPU: its CUDA provider's CUDA graphs, by the rules that ONNX Runtime states.

Sessions compute on the processor. One with `enable_cuda_graph` captures every run but those with `gpu_graph_id` -1, in
each thread anew; a replay computes from and to the values that its graph was captured with, whatever is bound now. What
comes of breaking the rules is never a right score: memory that a graph works in may be anybody's outside it, so a
replay spoils what the session allocated itself, and values begin as NaN.
"""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import onnxruntime as real

CPU = "CPUExecutionProvider"


class OrtValue:
    """A value on the GPU, or on the processor."""

    def __init__(self, array, device):
        self.array, self.device = array, device

    @classmethod
    def ortvalue_from_numpy(cls, array, device, device_id):
        return cls(array.copy(), device)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, dtype, device, device_id):
        return cls(np.full(shape, np.nan, dtype), device)

    def update_inplace(self, array):
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        self.array[...] = array

    def shape(self):
        return list(self.array.shape)

    def numpy(self):
        return self.array.copy()


class RunOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, name, value):
        assert isinstance(value, str)
        real.RunOptions().add_run_config_entry(name, value)
        self.entries[name] = value


class Binding:
    def __init__(self):
        self.inputs, self.output, self.device, self.value = {}, None, None, None

    def bind_cpu_input(self, name, array):
        self.inputs[name] = OrtValue(array, "cpu")

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_output(self, name, device):
        self.output, self.device, self.value = name, device, None

    def bind_ortvalue_output(self, name, value):
        self.output, self.device, self.value = name, value.device, value

    def get_outputs(self):
        return [self.value]


class CudaProvider:
    """The module. `fault` is what goes wrong: sessions are "refused", captures "invalidated", graphs "stale"."""

    __version__ = real.__version__
    SessionOptions, OrtValue, RunOptions = real.SessionOptions, OrtValue, RunOptions

    def __init__(self, fault=None):
        self.fault, self.sessions = fault, []

    def preload_dlls(self):
        pass

    def get_available_providers(self):
        return ["CUDAExecutionProvider", CPU]

    def InferenceSession(self, path, options, providers):  # noqa: N802
        self.sessions.append(Session(self, path, options, providers))
        return self.sessions[-1]


class Session:
    def __init__(self, module, path, options, providers):
        *cuda, processor = providers
        assert ([name for name, _ in cuda], processor) in (([], CPU), (["CUDAExecutionProvider"], CPU))
        self.path = path
        self.module, self.captures = module, any(settings.get("enable_cuda_graph") for _, settings in cuda)
        if self.captures and module.fault == "refused":
            raise real.capi.onnxruntime_pybind11_state.Fail(
                "compute graph nodes have not been partitioned to the CUDA EP"
            )
        self.session = real.InferenceSession(path, options, providers=[processor])
        self.graphs, self.replays, self.allocated, self.busy = {}, 0, weakref.WeakSet(), threading.Lock()

    def get_providers(self):
        return ["CUDAExecutionProvider", CPU]

    def get_outputs(self):
        return self.session.get_outputs()

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options=None):
        if not self.captures:
            assert options is None
            return self._compute(binding)
        assert self.busy.acquire(blocking=False), "two runs at a time in a session that captures"
        try:
            graph = options.entries["gpu_graph_id"] if options else "0"
            if graph == "-1":
                return self._compute(binding)
            assert all(v.device == "cuda" for v in (*binding.inputs.values(), binding.value)), "not on the GPU"
            graph = threading.get_ident(), graph
            if graph not in self.graphs:
                if self.module.fault == "invalidated":
                    raise RuntimeError("CUDA failure 901: operation failed due to a previous error during capture")
                self._compute(binding)
                self.graphs[graph] = SimpleNamespace(
                    inputs=dict(binding.inputs), output=binding.output, value=binding.value, first=binding.value.numpy()
                )
                return None
            self._replay(self.graphs[graph])
        finally:
            self.busy.release()

    def _compute(self, binding):
        found = self._run(binding)
        if binding.value is None:
            binding.value = OrtValue(found, binding.device)
            if binding.device == "cuda":
                self.allocated.add(binding.value)
        else:
            binding.value.update_inplace(found)

    def _replay(self, graph):
        self.replays += 1
        for value in self.allocated:
            value.array[...] = np.nan
        graph.value.update_inplace(graph.first if self.module.fault == "stale" else self._run(graph))

    def _run(self, bound):
        inputs = {name: value.array for name, value in bound.inputs.items()}
        assert all(np.isfinite(array).all() for array in inputs.values()), "read before it was written, or spoilt"
        (found,) = self.session.run([bound.output], inputs)
        return found
