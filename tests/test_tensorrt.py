"""The TensorRT runtime: scores in every order of work that CUDA allows.

Most tests run twice: on what stands for a GPU (see simulated_cuda), and on a real one where there is one (`-m gpu`).
"""

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import msgspec
import numpy as np
import pytest
from conftest import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LONGEST, PROFILES, noise
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedContext, SimulatedTensorRT, simulated_plan

from aesanet.bundle import GRAPH_NAMES, read_manifest
from aesanet.errors import BackendError, DeviceMemoryError
from aesanet.runtime.backends.base import mean_over_tokens
from aesanet.runtime.backends.tensorrt import TensorRTBackend
from aesanet.runtime.cuda.device import CudaDevice
from aesanet.runtime.scorer import Scorer

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


def test_embeddings_are_there_as_soon_as_scores_are(simulated, monkeypatch):
    """Also for a thread that waits while another, which takes the batch's slot, is about to compute them."""
    backend = simulated.open()
    batch = noise(np.random.default_rng(0), [9_000, 12_000])
    expected = backend.submit_embedded(*batch)()[1]
    pending = backend.submit_embedded(*batch)
    found = []
    waiting = Thread(target=lambda: found.append(pending()[1]))

    def slow(*arguments):
        monkeypatch.undo()
        waiting.start()
        waiting.join(0.2)  # it has nothing to wait for but this
        return mean_over_tokens(*arguments)

    monkeypatch.setattr("aesanet.runtime.backends.tensorrt.mean_over_tokens", slow)
    for _ in range(3):
        backend.scores(*batch)
    waiting.join()
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_a_stream_is_of_arrays_on_the_gpu_alone(simulated, reference):
    """Whoever names his stream each time may have an array on the host too."""
    batch = noise(np.random.default_rng(0), [9_000])
    found = simulated.open().submit(*batch, stream=simulated.stream())()
    np.testing.assert_allclose(found, reference(*batch), atol=1e-4)


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


def test_an_engine_is_on_the_gpu_that_was_current_then(simulated, reference):
    """Whatever is current later, and in other threads; and that is left as it was: another GPU is not begun with."""
    cuda = SimulatedCuda(np.random.default_rng(0), ordinal=1)
    cuda.cudaSetDevice(1)
    plans = {name: simulated_plan(simulated.bundle / f"{name}.onnx", name, PROFILES) for name in GRAPH_NAMES}
    backend = TensorRTBackend(plans, SimulatedTensorRT(cuda), CudaDevice(cuda, cuda))
    cuda.cudaSetDevice(0)
    cuda.begun.discard(0)
    batch = noise(np.random.default_rng(0), [9_000, 12_000])
    with ThreadPoolExecutor(1) as other:
        for _ in range(9):
            np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)
            np.testing.assert_allclose(other.submit(backend.scores, *batch).result(), reference(*batch), atol=1e-4)
        assert other.submit(cuda.cudaGetDevice).result()[1] == 0
    assert cuda.begun == {1}
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


@pytest.mark.parametrize(
    ("reason", "error"), [("IExecutionContext: CUDA out of memory", DeviceMemoryError), ("misaligned", BackendError)]
)
def test_tensorrts_own_reason_is_told_and_the_next_batch_is_scored(simulated, reference, monkeypatch, reason, error):
    backend = simulated.open()
    first, second = noise(np.random.default_rng(0), [9_000]), noise(np.random.default_rng(1), [9_000])
    waiting = backend.submit(*first)
    execute = SimulatedContext.execute_async_v3

    def refused(context, stream):
        return context._refuse(reason) if context.engine.output == "scores" else execute(context, stream)

    # In all contexts, as others are made where the memory is full.
    monkeypatch.setattr(SimulatedContext, "execute_async_v3", refused)
    with pytest.raises(error, match=reason):
        backend.scores(*second)
    assert not any(stream.queue for stream in simulated.cuda.streams)  # nothing of the caller's is read any more
    monkeypatch.undo()
    np.testing.assert_allclose(waiting(), reference(*first), atol=1e-4)
    np.testing.assert_allclose(backend.scores(*second), reference(*second), atol=1e-4)


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
