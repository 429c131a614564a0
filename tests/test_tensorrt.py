"""The TensorRT runtime: scores in every order of work that CUDA allows, graphs, memory, arrays and streams of others.

Most tests run twice: on what stands for a GPU (see simulated_cuda), and on a real one where there is one (`-m gpu`).
"""

import copy
import gc
import math
import shutil
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from conftest import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_cuda import NOT_PERMITTED, SimulatedCuda
from simulated_tensorrt import SimulatedTensorRT, simulated_plan
from torch_engines import TorchTensorRT

from aesanet.bundle import GRAPH_NAMES, read_manifest
from aesanet.engines import ENGINES_FOLDER, load_library
from aesanet.errors import BackendError, DeviceMemoryError
from aesanet.export.compile import choose_flavour, compile_bundle
from aesanet.export.engine import Settings
from aesanet.export.profiles import make_profiles
from aesanet.lengths import MIN_SAMPLES, num_tokens
from aesanet.machine import cuda_call, load_cuda
from aesanet.runtime.arrays import device_array, stream_handle
from aesanet.runtime.backends.compiled import support
from aesanet.runtime.backends.tensorrt import TensorRTBackend
from aesanet.runtime.device import CudaDevice
from aesanet.runtime.kernels import LateKernels
from aesanet.runtime.scorer import Scorer
from aesanet.runtime.shapes import choose_profile, grid_batch, grid_samples
from aesanet.runtime.stage import Stage
from aesanet.runtime.windows import pad_batch

PROFILES = make_profiles([(1.0, 20), (4.0, 3)])
LONGEST = 64_000
WIDTH = 32


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
        return TensorRTBackend(plans, trt(self.cuda), CudaDevice(self.cuda), **options)

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
        self.engine, _ = compile_bundle(bundle, choose_flavour("auto"), Settings(PROFILES))

    def open(self, seed=0, capacity=None, **options):
        self.cuda = Watched(load_cuda(), capacity)
        folder = self.bundle / ENGINES_FOLDER / self.engine.key
        plans = {name: (folder / plan.file).read_bytes() for name, plan in self.engine.plans.items()}
        return TensorRTBackend(plans, load_library(self.engine.flavour), CudaDevice(self.cuda), **options)

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
        return TensorRTBackend(plans, TorchTensorRT(self.model), CudaDevice(self.cuda), **options)


REAL = {"torch": RealTorch, "tensorrt": Real}


@pytest.fixture(scope="module", params=["simulated", *(pytest.param(name, marks=pytest.mark.gpu) for name in REAL)])
def gpu(request, half_bundle, tiny_model, tmp_path_factory):
    if request.param == "simulated":
        return Simulated(half_bundle)
    if request.param == "torch" and not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch sees")
    if request.param == "tensorrt" and not support().runs:
        pytest.skip(f"no GPU with TensorRT: {support().detail}")
    return REAL[request.param](shutil.copytree(half_bundle, tmp_path_factory.mktemp("real") / "b"), tiny_model)


@pytest.fixture(scope="module")
def simulated(half_bundle):
    return Simulated(half_bundle)


class Crowded(SimulatedTensorRT):
    """A GPU with room for so many contexts of each engine; others are refused in a way that TensorRT's module has."""

    def __init__(self, cuda, room=math.inf, way="nothing"):
        super().__init__(cuda)
        self.room, self.way, self.refused = room, way, 0

    def _load(self, plan):
        engine, made = super()._load(plan), []
        create = engine.create_execution_context

        def created(runtime_config):
            context = create(runtime_config)
            if len(made) >= self.room:
                self.refused += 1
                if self.way == "nothing":
                    return engine._refuse("IExecutionContext: CUDA out of memory", found=None)
                context.set_optimization_profile_async = partial(profile, context)
            made.append(None)
            return context

        def profile(context, profile, stream):
            context._refuse("Requested amount of GPU memory could not be allocated", code="FAILED_ALLOCATION")
            raise RuntimeError("Error in set optimization profile async.")

        engine.create_execution_context = created
        return engine


@pytest.fixture(scope="module")
def reference(half_bundle):
    """Scores of each clip alone, by ONNX Runtime."""
    backend = Scorer.open(half_bundle, "cpu", backend="onnxruntime").backend

    def scores(waveform, num_samples):
        alone = [backend.scores(row[None, :n], np.array([n])) for row, n in zip(waveform, num_samples, strict=True)]
        return np.concatenate(alone)

    return scores


def noise(rng, lengths):
    return pad_batch([rng.normal(0, rng.uniform(0.02, 0.3), n).astype(np.float32) for n in lengths])


batches_of_lengths = st.lists(
    st.lists(st.sampled_from([2_800, 2_801, 9_000, 16_000, 16_001, 40_000, LONGEST]), min_size=1, max_size=8),
    min_size=1,
    max_size=7,
)


@given(batches_of_lengths, st.integers(0, 2**32))
@settings(max_examples=25)
def test_scores_are_those_of_each_clip_alone_in_any_order_of_work(gpu, reference, batches, seed):
    """Batches overlap, and are split, padded and waited for in any order; a few shapes come again."""
    rng = np.random.default_rng(seed)
    backend = gpu.open(seed)
    given_batches = [noise(rng, lengths) for lengths in batches]
    waiting = [backend.submit(*batch) for batch in given_batches]
    for index in rng.permutation(len(waiting)):
        found = waiting[index]()
        np.testing.assert_allclose(found, reference(*given_batches[index]), atol=gpu.tolerance)
        assert found.dtype == np.float32
        assert np.array_equal(waiting[index](), found)


@given(batches_of_lengths, st.integers(0, 2**32))
@settings(max_examples=10)
def test_embeddings_are_those_of_each_clip_alone_in_any_order_of_work(gpu, half_bundle, batches, seed):
    """Beside batches without, whose slots they share."""
    rng = np.random.default_rng(seed)
    backend = gpu.open(seed)
    alone = Scorer.open(half_bundle, "cpu", backend="onnxruntime").backend
    given_batches = [noise(rng, lengths) for lengths in batches]
    kept = [bool(rng.integers(2)) for _ in batches]
    waiting = [
        (backend.submit_embedded if embedded else backend.submit)(*batch)
        for embedded, batch in zip(kept, given_batches, strict=True)
    ]
    for index in rng.permutation(len(waiting)):
        waveform, num_samples = given_batches[index]
        expected = [
            alone.submit_embedded(w[None, :n], np.array([n]))() for w, n in zip(waveform, num_samples, strict=True)
        ]
        found = waiting[index]()
        if kept[index]:
            np.testing.assert_allclose(found[1], np.concatenate([e for _, e in expected]), atol=gpu.tolerance)
            assert found[1].dtype == np.float32
        scores = found[0] if kept[index] else found
        np.testing.assert_allclose(scores, np.concatenate([s for s, _ in expected]), atol=gpu.tolerance)


def test_an_engine_names_the_batch_that_its_windows_profile_was_made_for(gpu):
    backend = gpu.open()
    assert backend.batch_seconds(LONGEST / 16_000) == backend.profiles[-1].max_batch * LONGEST / 16_000


@pytest.mark.parametrize("count", [16, 17, 19, 20, 21, 45])
def test_large_batches_are_padded_to_the_grid_and_split(gpu, reference, count):
    batch = noise(np.random.default_rng(count), [2_800 + 97 * n for n in range(count)])
    np.testing.assert_allclose(gpu.open(count).scores(*batch), reference(*batch), atol=gpu.tolerance)


def test_threads_share_an_engine(gpu, reference):
    backend = gpu.open()
    rng = np.random.default_rng(0)
    batches = [noise(rng, [3_000 + 500 * n, 12_000]) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: backend.scores(*batch), batches))
    for scores, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(scores, reference(*batch), atol=gpu.tolerance)


def test_the_callers_array_is_free_once_it_was_submitted(gpu, reference):
    backend = gpu.open()
    waveform, num_samples = noise(np.random.default_rng(1), [16_000, 9_000])
    expected = reference(waveform, num_samples)
    pending = backend.submit(waveform, num_samples)
    waveform.fill(np.nan)
    np.testing.assert_allclose(pending(), expected, atol=gpu.tolerance)


def test_a_shape_that_comes_again_is_captured_then_launched(simulated, reference):
    """Three slots have addresses of their own: three runs of each graph as they are, three captured, then launched."""
    backend = simulated.open()
    rng = np.random.default_rng(0)
    for number in range(9):
        batch = noise(rng, [10_000, 9_000 + number])
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
        launched = max(0, number - 5) * 3
        captured = min(3, max(0, number - 2)) * 3
        assert simulated.cuda.calls["cudaGraphLaunch"] == launched
        assert simulated.cuda.calls["cudaGraphInstantiate"] == captured


@pytest.mark.parametrize("graphs_kept", [0, 2, 32])
def test_graphs_change_no_score(gpu, reference, graphs_kept, measured):
    rng = np.random.default_rng(graphs_kept)
    backend = gpu.open(graphs_kept=graphs_kept)
    for number in range(24):
        batch = noise(rng, [(9_000, 20_000)[number % 2]] * 2)
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=gpu.tolerance)
    made = gpu.cuda.calls["cudaGraphInstantiate"]
    kept = made - gpu.cuda.calls["cudaGraphExecDestroy"]
    if isinstance(gpu, Real):  # how much of it can be captured there is the library's affair
        measured[f"CUDA graphs, {type(gpu).__name__}, {graphs_kept} kept"] = f"{made} made in 24 batches"
    assert kept <= 3 * graphs_kept


def test_the_graphs_used_last_are_kept(simulated):
    backend = simulated.open(graphs_kept=6)
    shapes = [noise(np.random.default_rng(0), [n]) for n in (9_000, 20_000, 30_000)]
    for shape in (shapes[1], shapes[2], shapes[0]):  # the largest first, as growing memory drops all graphs
        for _ in range(6):
            backend.scores(*shape)
    simulated.cuda.calls.clear()
    for shape in (shapes[2], shapes[0]):
        for _ in range(3):
            backend.scores(*shape)
    assert simulated.cuda.calls["cudaGraphLaunch"] == 6 * 3
    assert simulated.cuda.calls["cudaGraphInstantiate"] == 0


def test_growing_memory_drops_the_graphs_of_before(simulated):
    backend = simulated.open()
    for _ in range(6):
        backend.scores(*noise(np.random.default_rng(0), [9_000]))
    assert simulated.cuda.calls["cudaGraphExecDestroy"] == 0
    backend.scores(*noise(np.random.default_rng(0), [20_000]))
    assert simulated.cuda.calls["cudaGraphExecDestroy"] == simulated.cuda.calls["cudaGraphInstantiate"] == 9


def test_a_graph_out_of_use_gives_way(simulated):
    backend = simulated.open(graphs_kept=6)
    largest, second, third = (noise(np.random.default_rng(0), [n]) for n in (40_000, 30_000, 20_000))
    for shape, times in ((largest, 6), (second, 6), (largest, 30), (third, 9)):
        for _ in range(times):
            backend.scores(*shape)
    assert simulated.cuda.calls["cudaGraphInstantiate"] == 3 * 9  # of each graph, three slots and three shapes
    assert simulated.cuda.calls["cudaGraphExecDestroy"] == 3 * 3
    simulated.cuda.calls.clear()
    for shape in (largest, third):
        for _ in range(3):
            backend.scores(*shape)
    assert simulated.cuda.calls["cudaGraphLaunch"] == 3 * 6  # the second is the one that went


def test_more_shapes_than_graphs_are_not_captured_over_and_over(simulated):
    """Each would push out the one that is needed next."""
    backend = simulated.open(graphs_kept=6)
    shapes = [noise(np.random.default_rng(0), [n]) for n in (60_000, 50_000, 40_000, 30_000)]
    for _ in range(12):
        for shape in shapes:
            backend.scores(*shape)
    assert simulated.cuda.calls["cudaGraphExecDestroy"] == 0
    assert simulated.cuda.calls["cudaGraphInstantiate"] == 6 * 3
    assert simulated.cuda.calls["cudaGraphLaunch"] == 6 * 3 * 2  # a shape comes to a slot four times


@pytest.mark.parametrize("seed", range(4))
def test_what_cannot_be_captured_runs_as_it_is(simulated, reference, caplog, seed):
    backend = simulated.open(seed, trt=lambda cuda: SimulatedTensorRT(cuda, capturable=()))
    batch = noise(np.random.default_rng(0), [9_000])
    for _ in range(9):
        pending = backend.submit(*batch)
        gc.collect()  # what was made to be captured, and is at work, must not go yet
        np.testing.assert_allclose(pending(), reference(*batch), atol=1e-4)
    assert simulated.cuda.calls["cudaGraphLaunch"] == 0
    assert simulated.cuda.calls["cudaStreamBeginCapture"] == 9  # three times a graph, and then no more
    for _ in range(9):
        backend.scores(*batch)
    assert simulated.cuda.calls["cudaStreamBeginCapture"] == 9
    assert [r.getMessage() for r in caplog.records if r.name == "aesanet"] == [
        f"the {name} runs without CUDA graphs: tensorrt 0.simulated refused the {name}'s run: operation not permitted "
        "when stream is capturing"
        for name in GRAPH_NAMES
    ]


def test_of_large_batches_only_the_head_is_captured(simulated, reference, monkeypatch):
    """Its LSTM has as many kernels for one clip as for a hundred."""
    monkeypatch.setattr("aesanet.runtime.backends.tensorrt.CAPTURED_SAMPLES", 20_000)
    backend = simulated.open()
    batch = noise(np.random.default_rng(0), [10_000, 12_000])
    for _ in range(9):
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
    assert simulated.cuda.calls["cudaGraphInstantiate"] == 3  # one a slot
    assert simulated.cuda.calls["cudaGraphLaunch"] == 3


def test_a_memory_too_full_for_another_context_goes_without_its_graph(simulated, reference, caplog):
    """And without giving up, time and again, all that is there."""

    backend = simulated.open(trt=lambda cuda: Crowded(cuda, room=len(PROFILES)))
    batch = noise(np.random.default_rng(0), [9_000])
    backend.scores(*batch)
    held = dict(simulated.cuda.held)
    for seed in range(9):
        batch = noise(np.random.default_rng(seed), [9_000])
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
    assert simulated.cuda.held == held
    told = [record.getMessage() for record in caplog.records if record.name == "aesanet"]
    assert len(told) == 3
    assert all("runs without CUDA graphs: tensorrt 0.simulated refused the" in line for line in told)


@pytest.mark.parametrize("way", ["nothing", "raises"])
@pytest.mark.parametrize("seed", range(4))
def test_graphs_of_before_memory_was_full_stay(simulated, reference, seed, way):
    """And none gives way while it is at work: nothing more is captured, also when there is room again."""
    trt = None

    def crowded(cuda):
        nonlocal trt
        trt = Crowded(cuda, way=way)
        return trt

    backend = simulated.open(seed, trt=crowded)
    rng = np.random.default_rng(seed)
    large, small = noise(rng, [15_000]), noise(rng, [9_000])
    for _ in range(6):
        backend.scores(*large)
    trt.room = 0
    for _ in range(12):
        backend.scores(*small)
    trt.room = math.inf
    refused = trt.refused
    waiting = [(backend.submit(*batch), batch) for batch in (small, large, small, small) * 6]
    for pending, batch in waiting:
        np.testing.assert_allclose(pending(), reference(*batch), atol=1e-4)
    assert refused == trt.refused == 3 * 3
    assert simulated.cuda.calls["cudaGraphInstantiate"] == 3 * 3
    assert simulated.cuda.calls["cudaGraphExecDestroy"] == 0


@pytest.mark.parametrize("capturable", [(), ("fbank", "features")])
@pytest.mark.parametrize("captured_samples", [None, 0])
def test_an_error_of_capturing_that_is_told_late_costs_nothing(
    simulated, reference, caplog, monkeypatch, capturable, captured_samples
):
    """Whichever engine hears of it, and whether or not that is to be captured."""
    if captured_samples is not None:
        monkeypatch.setattr("aesanet.runtime.backends.tensorrt.CAPTURED_SAMPLES", captured_samples)
    backend = simulated.open(trt=lambda cuda: SimulatedTensorRT(cuda, capturable, tells_late=True))
    rng = np.random.default_rng(0)
    for samples in (15_000, 9_000):
        batch = noise(rng, [samples])
        for _ in range(9):
            np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
    told = [record.getMessage().split()[1] for record in caplog.records if record.name == "aesanet"]
    able = {"fbank": "frontend", "features": "encoder"}
    assert not {able[output] for output in capturable} & set(told)


def test_a_library_that_does_not_start_is_one_error(simulated):
    """Its module raises TypeError for a runtime that is null; and what was taken for it is given back."""

    class Absent(SimulatedTensorRT):
        def Runtime(self, logger):  # noqa: N802
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(BackendError, match=r"tensorrt 0\.simulated refused to start: pybind11"):
        simulated.open(trt=Absent)
    gc.collect()
    assert simulated.cuda.calls["cudaStreamDestroy"] == simulated.cuda.calls["cudaStreamCreateWithFlags"] == 3


def test_the_real_library_says_what_is_wrong_with_a_plan(capfd):
    """TensorRT-RTX itself, which can read a plan without a GPU; and it says so to nobody else."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")
    device = CudaDevice(SimulatedCuda(np.random.default_rng(0)))
    with pytest.raises(BackendError, match=r"tensorrt_rtx [\d.]+ refused the head's plan: .*magicTag"):
        Stage(load_library("rtx"), bytes(1000), "head", device, device.stream(), 0, LateKernels())
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_freed_does_not_keep_the_rest(simulated, monkeypatch):
    backend = simulated.open()
    backend.scores(*noise(np.random.default_rng(0), [9_000]))
    cuda, free = simulated.cuda, simulated.cuda.cudaFree
    refusals = [True]
    monkeypatch.setattr(
        cuda, "cudaFree", lambda address: (NOT_PERMITTED,) if refusals and refusals.pop() else free(address)
    )
    del backend
    gc.collect()
    assert len(cuda.held) == 1
    assert cuda.calls["cudaStreamDestroy"] == 3
    assert cuda.calls["cudaEventDestroy"] == 3 * 4


def test_at_the_end_nothing_is_taken_from_a_thread_that_scores(simulated, monkeypatch):
    monkeypatch.setattr("aesanet.runtime.backends.tensorrt._CLOSING_SECONDS", 0.01)
    backend = simulated.open()
    lock, free = backend._lock, threading.Event()

    def score():
        with lock:
            held.set()
            free.wait(60)

    held = threading.Event()
    thread = threading.Thread(target=score)
    thread.start()
    held.wait(60)
    del backend
    gc.collect()
    assert simulated.cuda.calls["cudaStreamDestroy"] == 0
    free.set()
    thread.join()


def test_shapes_of_lent_arrays_are_not_remembered_for_ever(simulated, reference, monkeypatch):
    monkeypatch.setattr("aesanet.runtime.backends.tensorrt._SIZES_KNOWN", 2)
    backend, stream = simulated.open(), simulated.stream()
    for samples in range(9_000, 9_006):
        batch = noise(np.random.default_rng(samples), [samples])
        lent = simulated.lend(batch[0], stream, dlpack=False)
        np.testing.assert_allclose(backend.submit(lent, batch[1], stream)(), reference(*batch), atol=1e-4)
        assert len(backend._sizes) <= 2


def test_an_engine_is_on_the_gpu_that_was_current_then(simulated, reference):
    """Whatever is current later, and in other threads; and that is left as it was."""
    cuda = SimulatedCuda(np.random.default_rng(0), ordinal=1)
    cuda.cudaSetDevice(1)
    plans = {name: simulated_plan(simulated.bundle / f"{name}.onnx", name, PROFILES) for name in GRAPH_NAMES}
    backend = TensorRTBackend(plans, SimulatedTensorRT(cuda), CudaDevice(cuda))
    cuda.cudaSetDevice(0)
    batch = noise(np.random.default_rng(0), [9_000, 12_000])
    with ThreadPoolExecutor(1) as other:
        for _ in range(9):
            np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
            np.testing.assert_allclose(other.submit(backend.scores, *batch).result(), reference(*batch), atol=1e-4)
        assert other.submit(cuda.cudaGetDevice).result()[1] == 0
    del backend
    gc.collect()
    assert cuda.cudaGetDevice()[1] == 0
    assert not cuda.device


@pytest.mark.parametrize("seed", range(3))
def test_batches_that_wait_keep_their_shapes(gpu, reference, seed):
    """None has begun when the last is given: what an engine is told of a later one must not reach an earlier."""
    rng = np.random.default_rng(seed)
    backend = gpu.open(seed)
    stream = gpu.stream()
    batches = [noise(rng, lengths) for lengths in ([16_000] * 4, [2_800], [9_000, 16_000])]
    lent = [gpu.lend(waveform, stream, False) for waveform, _ in batches]
    waiting = [
        backend.submit(array, num_samples, stream) for array, (_, num_samples) in zip(lent, batches, strict=True)
    ]
    for pending, batch in zip(waiting, batches, strict=True):
        np.testing.assert_allclose(pending(), reference(*batch), atol=gpu.tolerance)


def test_a_full_memory_halves_the_batch_and_is_told_once(gpu, reference, caplog):
    rng = np.random.default_rng(0)
    batch = noise(rng, [LONGEST] * 3)
    backend = gpu.open()
    backend.scores(*batch)
    needed = sum(gpu.cuda.held.values())
    backend = gpu.open(capacity=needed - 1)
    for _ in range(3):
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=gpu.tolerance)
    told = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert [line for line in told if "CUDA graphs" not in line] == [
        "the GPU's memory is full with 3 clips a batch; taking 1 from now on"
    ]
    assert sum(gpu.cuda.held.values()) < needed


def test_batches_under_way_survive_a_full_memory(gpu, reference):
    rng = np.random.default_rng(0)
    small, large = noise(rng, [9_000, 12_000]), noise(rng, [LONGEST] * 3)
    backend = gpu.open()
    backend.scores(*large)
    backend = gpu.open(capacity=sum(gpu.cuda.held.values()) - 1)
    waiting = [(backend.submit(*batch), batch) for batch in (small, large, small, large)]
    for pending, batch in waiting:
        np.testing.assert_allclose(pending(), reference(*batch), atol=gpu.tolerance)


def test_a_clip_that_does_not_fit_at_all_is_one_error_and_the_next_is_scored(gpu, reference):
    short, long = noise(np.random.default_rng(0), [3_000]), noise(np.random.default_rng(0), [LONGEST])
    backend = gpu.open()
    backend.scores(*short)
    backend = gpu.open(capacity=sum(gpu.cuda.held.values()))
    with pytest.raises(
        DeviceMemoryError, match=r"one clip of up to 4 s does not fit into the GPU's memory, of which \d+"
    ):
        backend.scores(*long)
    np.testing.assert_allclose(backend.scores(*short), reference(*short), atol=gpu.tolerance)


@pytest.mark.parametrize(
    ("reason", "error"), [("IExecutionContext: CUDA out of memory", DeviceMemoryError), ("misaligned", BackendError)]
)
def test_tensorrts_own_reason_is_told_and_the_next_batch_is_scored(simulated, reference, monkeypatch, reason, error):
    backend = simulated.open()
    first, second = noise(np.random.default_rng(0), [9_000]), noise(np.random.default_rng(1), [9_000])
    waiting = backend.submit(*first)
    context = backend._head._context(0).trt
    monkeypatch.setattr(context, "execute_async_v3", lambda stream: context._refuse(reason))
    with pytest.raises(error, match=reason):
        backend.scores(*second)
    assert not any(stream.queue for stream in simulated.cuda.streams)  # nothing of the caller's is read any more
    monkeypatch.undo()
    np.testing.assert_allclose(waiting(), reference(*first), atol=1e-4)
    np.testing.assert_allclose(backend.scores(*second), reference(*second), atol=1e-4)


def test_memory_is_given_back_with_the_engine(gpu):
    backend = gpu.open()
    for _ in range(7):
        backend.submit(*noise(np.random.default_rng(0), [9_000]))
    assert gpu.cuda.held
    del backend
    gc.collect()
    assert not gpu.cuda.held
    assert gpu.cuda.calls["cudaGraphInstantiate"] == gpu.cuda.calls["cudaGraphExecDestroy"]
    assert gpu.cuda.calls["cudaHostAlloc"] == gpu.cuda.calls["cudaFreeHost"]


@pytest.mark.parametrize("dlpack", [False, True])
def test_an_array_on_the_gpu_is_read_where_it_is_in_its_streams_order(gpu, reference, dlpack):
    """It is filled late, and overwritten as soon as its stream is allowed to."""
    for number in range(12):
        backend = gpu.open(number)
        waveform, num_samples = noise(np.random.default_rng(number), [9_000, 16_000, 12_345])
        stream = gpu.stream()
        lent = gpu.lend(waveform, stream, dlpack)
        gpu.cuda.calls.clear()
        pending = backend.submit(lent, num_samples, stream)
        gpu.spoil(lent, stream)
        np.testing.assert_allclose(pending(), reference(waveform, num_samples), atol=gpu.tolerance)
        assert gpu.cuda.calls["cudaMemcpyAsync"] == 2  # token counts in, scores out


def test_an_array_on_the_gpu_lives_until_it_was_read(simulated):
    backend = simulated.open()
    stream = simulated.stream()
    lent = simulated.lend(*noise(np.random.default_rng(0), [9_000])[:1], stream, dlpack=False)
    alive = weakref.ref(lent)
    pending = backend.submit(lent, np.array([9_000]), stream)
    del lent
    assert alive() is not None
    pending()
    assert alive() is None


def test_a_large_array_on_the_gpu_is_taken_in_pieces(gpu, reference):
    backend = gpu.open()
    waveform, num_samples = noise(np.random.default_rng(0), [16_000 - 100 * n for n in range(45)])
    stream = gpu.stream()
    scores = backend.submit(gpu.lend(waveform, stream, dlpack=False), num_samples, stream)()
    np.testing.assert_allclose(scores, reference(waveform, num_samples), atol=gpu.tolerance)


def test_arrays_on_the_gpu_of_any_alignment_are_read_in_their_streams_order(gpu, reference):
    """In pieces of 20 rows of 9,001 samples, all but the first of which TensorRT would not take where they are."""
    for number in range(4):
        backend = gpu.open(number)
        waveform, num_samples = noise(np.random.default_rng(number), [9_001 - 10 * n for n in range(45)])
        stream = gpu.stream()
        lent = gpu.lend(waveform, stream, dlpack=False)
        pending = backend.submit(lent, num_samples, stream)
        gpu.spoil(lent, stream)
        np.testing.assert_allclose(pending(), reference(waveform, num_samples), atol=gpu.tolerance)


def test_an_array_that_is_not_on_this_gpu_is_refused(simulated):
    backend = simulated.open()
    host = np.zeros((1, 9_000), np.float32)
    interface = {"shape": host.shape, "typestr": "<f4", "data": (host.ctypes.data, False), "strides": None}
    with pytest.raises(ValueError, match="the engine is on GPU 0"):
        backend.submit(SimpleNamespace(__cuda_array_interface__=interface), np.array([9_000]))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"typestr": "<f2"}, TypeError, "an array of float16 on the GPU; give float32"),
        ({"strides": (4, 12)}, ValueError, r"shape \(3, 5\) with strides \(1, 3\); make it contiguous"),
    ],
)
def test_arrays_on_the_gpu_that_cannot_be_read_as_they_are(change, error, told):
    interface = {"shape": (3, 5), "typestr": "<f4", "data": (256, False), "strides": None, "version": 3}
    with pytest.raises(error, match=told):
        device_array(SimpleNamespace(__cuda_array_interface__=interface | change), 16)


def test_one_row_of_any_stride_is_contiguous():
    interface = {
        "shape": (1, 5),
        "typestr": "<f4",
        "data": (256, False),
        "strides": (999, 4),
        "version": 3,
        "stream": 7,
    }
    found = device_array(SimpleNamespace(__cuda_array_interface__=interface), 16)
    assert (found.address, found.shape, found.stream) == (256, (1, 5), 7)
    assert found[0:1].address == 256


@pytest.mark.parametrize("name", ["cuda_stream", "ptr", "handle"])
def test_streams_of_other_libraries(name):
    assert stream_handle(SimpleNamespace(**{name: 48})) == 48
    assert stream_handle(48) == 48
    assert stream_handle(SimpleNamespace(__cuda_stream__=lambda: (0, 48))) == 48


@pytest.mark.parametrize(
    ("waveform", "num_samples", "told"),
    [
        ((3_000,), [3_000], r"give \[batch, samples\]"),
        ((0, 3_000), [], r"give \[batch, samples\]"),
        ((2, 3_000), [3_000], r"give \[batch, samples\]"),
        ((1, 3_000), [3_001], "from 2800 to the waveform's"),
        ((1, 3_000), [2_799], "from 2800 to the waveform's"),
    ],
)
def test_batches_that_make_no_sense(simulated, waveform, num_samples, told):
    with pytest.raises(ValueError, match=told):
        simulated.open().submit(np.zeros(waveform, np.float32), np.array(num_samples, np.int64))


def test_a_clip_beyond_the_longest_profile_is_refused(gpu):
    with pytest.raises(BackendError, match=r"clips of 4\.00006 s, but this engine takes 0\.175 to 1 s and 1 to 4 s"):
        gpu.open().scores(*noise(np.random.default_rng(0), [LONGEST + 1]))


def test_recordings_score_as_in_onnx_runtime(gpu):
    backend, manifest = gpu.open(), read_manifest(gpu.bundle)
    expected = Scorer.open(gpu.bundle, "cpu", backend="onnxruntime").score(list(RECORDINGS))
    for found, wanted in zip(Scorer(manifest, backend).score(list(RECORDINGS)), expected, strict=True):
        assert msgspec.to_builtins(found) == pytest.approx(msgspec.to_builtins(wanted), abs=gpu.tolerance)


@given(st.integers(1, 4096), st.integers(MIN_SAMPLES, 30 * 16_000))
def test_the_grid_holds_every_batch_and_wastes_little(batch, samples):
    rows, length = grid_batch(batch), grid_samples(samples)
    assert batch <= rows <= batch * 1.125
    assert samples <= length < samples + 2_560
    assert num_tokens(length) <= num_tokens(samples) + 8
    assert (grid_batch(rows), grid_samples(length)) == (rows, length)  # a shape of the grid stays


def test_the_grid_has_few_shapes():
    assert len({grid_batch(batch) for batch in range(1, 129)}) == 16 + 3 * 8


def test_profiles_are_chosen_by_length(simulated):
    profiles = simulated.open().profiles
    assert [choose_profile(profiles, n, 1).index for n in (2_800, 16_000, 16_001, LONGEST)] == [0, 0, 1, 1]
    assert profiles[1].padded(3, 63_999) == (3, LONGEST)
    assert profiles[0].padded(17, 15_999) == (18, 16_000)
    assert profiles[0].padded(99, 15_999) == (20, 16_000)


def test_of_profiles_of_one_length_a_batch_takes_the_smallest_that_holds_it(simulated, reference, monkeypatch):
    bounds = make_profiles([(4.0, 1), (4.0, 6), (1.0, 20), (4.0, 3)])
    backend = simulated.open(profiles=bounds)
    assert [(p.min_samples, p.max_samples, p.max_batch) for p in backend.profiles] == [
        (2_800, 16_000, 20),
        (16_000, LONGEST, 1),
        (16_000, LONGEST, 3),
        (16_000, LONGEST, 6),
    ]
    chosen = [choose_profile(backend.profiles, 30_000, count).index for count in (1, 2, 3, 4, 6, 7, 100)]
    assert chosen == [1, 2, 2, 3, 3, 3, 3]
    assert choose_profile(backend.profiles, 16_000, 21).index == 0  # in parts, and not with kernels for longer ones
    assert backend.batch_seconds(4.0) == 6 * 4.0
    rng = np.random.default_rng(0)
    taken = []

    def choose(profiles, samples, batch):
        taken.append(choose_profile(profiles, samples, batch))
        return taken[-1]

    monkeypatch.setattr("aesanet.runtime.backends.tensorrt.choose_profile", choose)
    backend.scores(*noise(rng, [20_000] * 8))
    assert [profile.max_batch for profile in taken] == [6, 3]  # what is left over, too
    for count in (1, 2, 5, 7, 13):
        batch = noise(rng, [20_000 + 97 * number for number in range(count)])
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)


def test_a_full_memory_halves_the_profile_that_was_too_large_alone(simulated, reference):
    bounds = make_profiles([(4.0, 1), (4.0, 3)])
    batch = noise(np.random.default_rng(0), [LONGEST] * 3)
    backend = simulated.open(profiles=bounds)
    backend.scores(*batch)
    backend = simulated.open(profiles=bounds, capacity=sum(simulated.cuda.held.values()) - 1)
    for _ in range(3):
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
