"""Kernels that TensorRT-RTX makes late: each once for all processes, whatever became of their file; and when.

TensorRT-RTX itself runs on RTX GPUs alone: here stands what keeps its rules (see simulated_tensorrt).
"""

import gc
import os

import numpy as np
import pytest
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedRTX, SimulatedTensorRT, simulated_plan

from aesanet.bundle import GRAPH_NAMES
from aesanet.export.profiles import make_profiles
from aesanet.files import CacheFile, replacing
from aesanet.runtime.backends.tensorrt import TensorRTBackend
from aesanet.runtime.cuda.device import CudaDevice
from aesanet.runtime.cuda.kernels import LateKernels

PROFILES = make_profiles([(1.0, 20), (4.0, 3)])


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return CacheFile("kernels", {"engine": "abc", "GPU": "Simulated"})


@pytest.fixture
def opened(half_bundle):
    def open_engine(kernels=None, trt=SimulatedRTX, **options):
        cuda = SimulatedCuda(np.random.default_rng(0))
        plans = {name: simulated_plan(half_bundle / f"{name}.onnx", name, PROFILES) for name in GRAPH_NAMES}
        module = trt(cuda)
        return TensorRTBackend(plans, module, CudaDevice(cuda, cuda), kernels=kernels, **options), module

    return open_engine


def score(backend, *lengths):
    waveform = np.random.default_rng(0).normal(0, 0.1, (len(lengths), max(lengths))).astype(np.float32)
    return backend.scores(waveform, np.array(lengths))


def made(opened, kernels, *lengths):
    """The kernels that one process makes for clips of these lengths, each scored alone."""
    backend, trt = opened(kernels)
    for length in lengths:
        score(backend, length)
    found = trt.made
    del backend
    gc.collect()
    return found


def test_kernels_are_made_once_for_all_processes(opened, file):
    assert len(made(opened, LateKernels(file=file), 9_000, 20_000, 9_000)) == 2 * 3
    assert made(opened, LateKernels(file=file), 20_000, 9_000) == []
    assert len(made(opened, LateKernels(file=file), 9_000, 40_000)) == 3
    assert made(opened, LateKernels(file=file), 9_000, 20_000, 40_000) == []
    assert len(made(opened, LateKernels(), 9_000)) == 3  # that keeps nothing


def test_two_that_write_one_file_at_a_time_leave_it_whole(tmp_path):
    """In one process, or in two containers that have the same number for theirs."""
    path = tmp_path / "a"
    with replacing(path) as first:
        first.write_bytes(b"first")
        with replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
        assert first.read_bytes() == b"first"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_of_one_engine_on_one_gpu(file):
    other = CacheFile("kernels", {"engine": "abc", "GPU": "Another"})
    assert other.path != file.path == CacheFile("kernels", {"GPU": "Simulated", "engine": "abc"}).path
    assert other.path.parent == file.path.parent


@pytest.mark.parametrize("place", ["relative", ""])
def test_a_cache_is_in_the_users_home_or_nowhere(tmp_path, monkeypatch, place):
    """A relative XDG_CACHE_HOME is to be ignored, as its standard says; and not every user has a home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = CacheFile("kernels", {})
    cache.write(b"kernels")
    assert cache.path.parent == tmp_path / "home" / ".cache" / "aesanet"
    assert CacheFile("kernels", {}).read() == b"kernels"
    monkeypatch.setenv("HOME", "~")
    homeless = CacheFile("kernels", {})
    homeless.write(b"kernels")
    assert homeless.read() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("content", [b"", b"damaged", b'["of another version"]'])
def test_a_file_that_is_refused_is_written_anew(opened, file, content):
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    assert len(made(opened, LateKernels(file=file), 9_000)) == 3
    assert made(opened, LateKernels(file=file), 9_000) == []
    assert list(file.path.parent.iterdir()) == [file.path]


def test_nothing_is_written_where_nothing_was_made(opened, file):
    made(opened, LateKernels(file=file), 9_000)
    before = file.path.stat().st_ino
    made(opened, LateKernels(file=file), 9_000)
    assert file.path.stat().st_ino == before


def test_the_files_last_used_are_kept(file, monkeypatch):
    monkeypatch.setattr("aesanet.files._CACHED_FILES", 3)
    timing = CacheFile("timing", {})
    timing.write(b"of another kind")
    killed, writing = (file.path.with_name(f".kernels-{number}.cache.{number:016x}") for number in (7, 8))
    for left in (killed, writing):
        left.touch()
    os.utime(killed, (0, 0))
    engines = [CacheFile("kernels", {"engine": name}) for name in "abcde"]
    for age, engine in enumerate(engines[:3]):
        engine.write(b"kernels")
        os.utime(engine.path, (age, age))
    assert engines[0].read() == b"kernels"  # in use
    for engine in engines[3:]:
        engine.write(b"kernels")
    assert [bool(engine.read()) for engine in engines] == [True, False, False, True, True]
    assert timing.read() == b"of another kind"
    assert writing.exists()
    assert not killed.exists()


def test_a_folder_that_cannot_be_written_only_costs_time(opened, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert len(made(opened, LateKernels(file=CacheFile("kernels", {})), 9_000)) == 3


@pytest.mark.parametrize("specialize", ["lazy", "eager", "none"])
def test_a_bundles_engines_share_kernels_and_when_they_are_made(opened, specialize):
    backend, trt = opened(LateKernels(specialize))
    strategies = {config.dynamic_shapes_kernel_specialization_strategy.name for config in trt.configs}
    assert strategies == {specialize.upper()}
    assert len({id(config.cache()) for config in trt.configs}) == 1
    told = "" if specialize == "lazy" else f" specialize={specialize}"
    assert backend.name == f"tensorrt_rtx 0.simulated cuda fp16{told}"


def test_tensorrt_has_no_such_kernels(opened, file):
    backend, _ = opened(LateKernels("eager", file), trt=SimulatedTensorRT)
    score(backend, 9_000)
    assert backend.name == "tensorrt 0.simulated cuda fp16"
    del backend
    gc.collect()
    assert not file.path.exists()


@pytest.mark.parametrize("graphs_kept", [32, 0])
def test_what_comes_again_is_captured_once_by_rtx_itself(opened, graphs_kept):
    """A context of it keeps one graph, so each of three slots has one for each shape; others never capture."""
    backend, trt = opened(graphs_kept=graphs_kept)
    expected = {length: score(backend, length, 7_000) for length in (20_000, 9_000)}
    assert trt.captured == 0
    for _ in range(9):
        for length, scores in expected.items():
            np.testing.assert_allclose(score(backend, length, 7_000), scores, atol=1e-6)
    # Of ten runs of each shape three go without, one a slot, three are captured, and four replayed.
    runs = [3 * 3 * 2, 3 * 4 * 2] if graphs_kept else [0, 0]
    assert [trt.captured, trt.replayed] == runs
    for _ in range(3):
        score(backend, 12_000)  # once in each slot
    assert [trt.captured, trt.replayed] == runs
    assert not trt.cuda.graphs


def test_memory_that_grows_leaves_no_graph_of_before(opened):
    backend, trt = opened()
    for _ in range(9):
        score(backend, 9_000)
    before = trt.captured
    score(backend, 40_000)
    expected = score(opened()[0], 9_000)
    for _ in range(9):
        np.testing.assert_allclose(score(backend, 9_000), expected, atol=1e-6)
    assert trt.captured == 2 * before
