"""Arrays and streams of others, on the GPU: read where they are, in their order, and alive until then.

Most tests run twice: on what stands for a GPU (see simulated_cuda), and on a real one where there is one (`-m gpu`).
"""

import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from machines import noise

from aesanet.errors import BackendError
from aesanet.runtime.cuda.arrays import device_array, stream_handle


def test_shapes_of_lent_arrays_are_not_remembered_for_ever(simulated, reference, monkeypatch):
    monkeypatch.setattr("aesanet.runtime.cuda.layout._SIZES_KNOWN", 2)
    backend, stream = simulated.open(), simulated.stream()
    for samples in range(9_000, 9_006):
        batch = noise(np.random.default_rng(samples), [samples])
        lent = simulated.lend(batch[0], stream, dlpack=False)
        np.testing.assert_allclose(backend.submit(lent, batch[1], stream)(), reference(*batch), atol=1e-4)
        assert len(backend._layout._sizes) <= 2


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
        device_array(SimpleNamespace(__cuda_array_interface__=interface | change), 16, in_order=False)


def test_one_row_of_any_stride_is_contiguous():
    interface = {
        "shape": (1, 5),
        "typestr": "<f4",
        "data": (256, False),
        "strides": (999, 4),
        "version": 3,
        "stream": 7,
    }
    found = device_array(SimpleNamespace(__cuda_array_interface__=interface), 16, in_order=False)
    assert (found.address, found.shape, found.stream) == (256, (1, 5), 7)
    assert found[0:1].address == 256


def test_a_lender_who_names_no_stream_orders_its_own_work():
    """As PyTorch, whose arrays have both descriptions; without its order they would be read before they are filled."""
    memory, asked = np.zeros((2, 5), np.float32), []

    def lend(stream=None, **options):
        asked.append(stream)
        return memory.__dlpack__()

    interface = {"shape": (2, 5), "typestr": "<f4", "data": (256, False), "strides": None, "version": 2}
    both = SimpleNamespace(__cuda_array_interface__=interface, __dlpack__=lend, __dlpack_device__=lambda: (2, 0))
    assert device_array(both, 16, in_order=False).address == memory.ctypes.data
    assert asked == [16]
    assert (
        device_array(both, 16, in_order=True).address == 256
    )  # the caller named its stream, and cuda-core is not needed
    assert asked == [16]
    both.__cuda_array_interface__ = interface | {"version": 3, "stream": 7}
    found = device_array(both, 16, in_order=False)
    assert (found.address, found.stream) == (256, 7)


def test_without_cuda_core_arrays_by_dlpack_are_told_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    lent = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 0))
    with pytest.raises(BackendError, match=r"cuda-core .*: pip install 'aesanet\[gpu\]'"):
        device_array(lent, 16, in_order=False)


@pytest.mark.parametrize("name", ["cuda_stream", "ptr", "handle"])
def test_streams_of_other_libraries(name):
    assert stream_handle(SimpleNamespace(**{name: 48})) == 48
    assert stream_handle(48) == 48
    assert stream_handle(SimpleNamespace(__cuda_stream__=lambda: (0, 48))) == 48
