"""An engine at work: contexts, CUDA graphs of runs that come again, and what the library refuses.

Most tests run twice: on what stands for a GPU (see simulated_cuda), and on a real one where there is one (`-m gpu`).
"""

import gc
import math
from functools import partial

import numpy as np
import pytest
from machines import PROFILES, Real, noise
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedTensorRT

from aesanet.bundle import GRAPH_NAMES
from aesanet.engines import load_library
from aesanet.errors import BackendError
from aesanet.runtime.cuda.device import CudaDevice
from aesanet.runtime.cuda.kernels import LateKernels
from aesanet.runtime.cuda.stage import Stage


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
@pytest.mark.parametrize("tells", ["twice", "late"])
def test_an_error_of_capturing_that_is_told_late_costs_nothing(
    simulated, reference, caplog, monkeypatch, capturable, captured_samples, tells
):
    """Whichever engine hears of it, and whether or not that is to be captured."""
    if captured_samples is not None:
        monkeypatch.setattr("aesanet.runtime.backends.tensorrt.CAPTURED_SAMPLES", captured_samples)
    backend = simulated.open(trt=lambda cuda: SimulatedTensorRT(cuda, capturable, tells))
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
    cuda = SimulatedCuda(np.random.default_rng(0))
    device = CudaDevice(cuda, cuda)
    with pytest.raises(BackendError, match=r"tensorrt_rtx [\d.]+ refused the head's plan: .*magicTag"):
        Stage(load_library("rtx"), bytes(1000), "head", device, device.stream(), 0, LateKernels())
    assert capfd.readouterr() == ("", "")
