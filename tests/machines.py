"""Machines with a GPU: a simulated one, and real ones whose engines are TensorRT's or PyTorch in its place."""

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedTensorRT, simulated_plan
from torch_engines import TorchTensorRT

from aesanet.bundle import GRAPH_NAMES
from aesanet.engines import ENGINES_FOLDER, load_library
from aesanet.export.compile import choose_flavour, compile_bundle
from aesanet.export.engine import BuildSettings
from aesanet.export.profiles import make_profiles
from aesanet.gpu import cuda_call, load_cuda, load_driver
from aesanet.padding import pad_batch
from aesanet.runtime.backends.tensorrt import TensorRTBackend
from aesanet.runtime.cuda.device import CudaDevice

PROFILES = make_profiles([(1.0, 20), (4.0, 3)])
LONGEST = 64_000


class Watched:
    """CUDA's functions, counted, with no more memory than `capacity` bytes at a time."""

    def __init__(self, cuda, capacity=None):
        self.cuda, self.capacity, self.calls, self.held = cuda, capacity, Counter(), {}

    def __getattr__(self, name):
        found = getattr(self.cuda, name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*arguments):
            self.calls[name] += 1
            return found(*arguments)

        return call

    def cudaMalloc(self, size):  # noqa: N802
        if self.capacity is not None and sum(self.held.values()) + size > self.capacity:
            return self.cuda.cudaError_t.cudaErrorMemoryAllocation, None
        error, address = self.cuda.cudaMalloc(size)
        self.held[int(address)] = size
        return error, address

    def cudaFree(self, address):  # noqa: N802
        del self.held[int(address)]
        return self.cuda.cudaFree(address)


class Lent:
    """An array that another library holds."""


class Simulated:
    """A machine whose GPU is simulated; FP32 graphs stand in the plans' place, so scores are compared closely."""

    tolerance = 1e-4

    def __init__(self, bundle):
        self.bundle = bundle

    def open(self, seed=0, capacity=None, trt=SimulatedTensorRT, profiles=PROFILES, **options):
        self.cuda = Watched(SimulatedCuda(np.random.default_rng(seed)), capacity)
        plans = {name: simulated_plan(self.bundle / f"{name}.onnx", name, profiles) for name in GRAPH_NAMES}
        return TensorRTBackend(plans, trt(self.cuda), CudaDevice(self.cuda, self.cuda), **options)

    def stream(self):
        return SimpleNamespace(handle=int(cuda_call(self.cuda, "cudaStreamCreateWithFlags", 1)))  # as PyCUDA has it

    def lend(self, waveform, stream, dlpack):
        """An array on the GPU that a stream fills, late."""
        address = cuda_call(self.cuda, "cudaMalloc", waveform.nbytes)
        memory = self.cuda.bytes_at(address, waveform.nbytes, self.cuda.device).view(np.float32)
        memory = memory.reshape(waveform.shape)
        lent = Lent()
        lent.memory = memory
        if dlpack:
            lent.__dlpack_device__ = lambda: (2, 0)
            lent.__dlpack__ = lambda stream=None, **options: memory.__dlpack__()
        else:
            lent.__cuda_array_interface__ = {
                "shape": waveform.shape,
                "typestr": "<f4",
                "data": (address, False),
                "strides": None,
                "version": 3,
            }
        self.cuda.give(stream.handle, lambda: np.copyto(memory, waveform))
        return lent

    def spoil(self, lent, stream):
        self.cuda.give(stream.handle, lambda: lent.memory.fill(np.nan))


class Real:
    """A machine with a GPU, and engines that were compiled for it."""

    tolerance = 0.02

    def __init__(self, bundle, model):
        self.bundle = bundle
        self.engine, _ = compile_bundle(bundle, choose_flavour("auto"), BuildSettings(PROFILES))

    def open(self, seed=0, capacity=None, **options):
        self.cuda = Watched(load_cuda(), capacity)
        folder = self.bundle / ENGINES_FOLDER / self.engine.key
        plans = {name: (folder / plan.file).read_bytes() for name, plan in self.engine.plans.items()}
        return TensorRTBackend(
            plans, load_library(self.engine.flavour), CudaDevice(self.cuda, load_driver()), **options
        )

    def stream(self):
        return torch.cuda.Stream()

    def lend(self, waveform, stream, dlpack):
        lent = torch.empty(waveform.shape, device="cuda")
        source = torch.from_numpy(waveform).pin_memory()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            lent.copy_(source, non_blocking=True)
        if dlpack:
            return SimpleNamespace(
                tensor=lent, __dlpack__=lent.__dlpack__, __dlpack_device__=lent.__dlpack_device__, source=source
            )
        return lent

    def spoil(self, lent, stream):
        with torch.cuda.stream(stream):
            getattr(lent, "tensor", lent).fill_(float("nan"))


class RealTorch(Real):
    """A machine with a GPU, on which PyTorch does what the engines would."""

    tolerance = 1e-3

    def __init__(self, bundle, model):
        self.bundle, self.model = bundle, copy.deepcopy(model).cuda()
        torch.backends.cudnn.allow_tf32 = False

    def open(self, seed=0, capacity=None, **options):
        self.cuda = Watched(load_cuda(), capacity)
        plans = {name: simulated_plan(self.bundle / f"{name}.onnx", name, PROFILES) for name in GRAPH_NAMES}
        return TensorRTBackend(plans, TorchTensorRT(self.model), CudaDevice(self.cuda, load_driver()), **options)


REAL = {"torch": RealTorch, "tensorrt": Real}


def noise(rng, lengths):
    return pad_batch([rng.normal(0, rng.uniform(0.02, 0.3), n).astype(np.float32) for n in lengths])
