"""The GPU's memory: batches are halved when it is full, and all of it is given back.

Most tests run twice: on what stands for a GPU (see simulated_cuda), and on a real one where there is one (`-m gpu`).
"""

import gc
import threading
import weakref

import numpy as np
import pytest
from machines import LONGEST, noise
from simulated_cuda import NOT_PERMITTED
from simulated_tensorrt import SimulatedTensorRT

from aesanet.errors import DeviceMemoryError
from aesanet.export.profiles import make_profiles


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


def test_a_full_memory_takes_that_of_contexts_too(simulated, reference):
    """Which hold some of their own, also those of lengths that do not come any more."""
    alive = weakref.WeakSet()

    class Counted(SimulatedTensorRT):
        def _load(self, plan):
            engine = super()._load(plan)
            create = engine.create_execution_context

            def created(runtime_config):
                alive.add(context := create(runtime_config))
                return context

            engine.create_execution_context = created
            return engine

    rng = np.random.default_rng(0)
    short, long = noise(rng, [9_000]), noise(rng, [LONGEST] * 3)
    backend = simulated.open(trt=Counted)
    backend.scores(*long)
    backend = simulated.open(trt=Counted, capacity=sum(simulated.cuda.held.values()) - 1)
    gc.collect()
    backend.scores(*short)
    assert len(alive) == 3
    np.testing.assert_allclose(backend.scores(*long), reference(*long), atol=1e-4)
    gc.collect()
    assert len(alive) == 3


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
        DeviceMemoryError, match=r"MiB are free, does not hold 1 clip of up to 4 s, the fewest .*or score shorter ones"
    ):
        backend.scores(*long)
    np.testing.assert_allclose(backend.scores(*short), reference(*short), atol=gpu.tolerance)


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


def test_a_full_memory_halves_the_profile_that_was_too_large_alone(simulated, reference):
    bounds = make_profiles([(4.0, 1), (4.0, 3)])
    batch = noise(np.random.default_rng(0), [LONGEST] * 3)
    backend = simulated.open(profiles=bounds)
    backend.scores(*batch)
    backend = simulated.open(profiles=bounds, capacity=sum(simulated.cuda.held.values()) - 1)
    for _ in range(3):
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)


def test_a_profile_whose_fewest_clips_do_not_fit_gives_way(simulated, reference, caplog):
    batch = noise(np.random.default_rng(0), [LONGEST] * 5)
    bounds = make_profiles([(4.0, 3), (4.0, 4, 6, 6)])
    backend = simulated.open(profiles=bounds)
    backend.scores(*batch)
    backend = simulated.open(profiles=bounds, capacity=sum(simulated.cuda.held.values()) - 1)
    for _ in range(3):
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
    told = [record.getMessage() for record in caplog.records if "memory is full" in record.getMessage()]
    assert told == ["the GPU's memory is full with 5 clips a batch; taking 2 from now on"]


def test_a_profile_of_longer_clips_takes_those_at_its_edge_where_the_memory_is_full(simulated, reference):
    """A window is often as long as a profile's longest clips, and as another's shortest."""
    bounds = make_profiles([(3.0, 6, 6, 6), (4.0, 1)])
    batch = noise(np.random.default_rng(0), [48_000])
    backend = simulated.open(profiles=bounds)
    backend.scores(*noise(np.random.default_rng(0), [48_001]))
    backend = simulated.open(profiles=bounds, capacity=int(1.2 * sum(simulated.cuda.held.values())))
    np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)


def test_where_the_fewest_clips_that_an_engine_takes_do_not_fit_that_is_said(simulated):
    bounds = make_profiles([(4.0, 4, 6, 6)])
    batch = noise(np.random.default_rng(0), [LONGEST] * 2)
    backend = simulated.open(profiles=bounds)
    backend.scores(*batch)
    backend = simulated.open(profiles=bounds, capacity=sum(simulated.cuda.held.values()) - 1)
    with pytest.raises(DeviceMemoryError, match=r"does not hold 4 clips of up to 4 s.*, or compile for fewer ones"):
        backend.scores(*batch)
