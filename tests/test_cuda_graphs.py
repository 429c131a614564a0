"""ONNX Runtime's CUDA graphs: the same scores, within bounds, and none where they cannot be had.

On what stands for its CUDA provider (see simulated_cuda_provider), and on a real one where there is one (`-m gpu`).
"""

import csv
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_cuda_provider import CudaProvider

from aesanet.benchmarks import latency, parity
from aesanet.bundle import read_manifest
from aesanet.cli.main import main
from aesanet.errors import BackendError
from aesanet.lengths import MIN_SAMPLES, num_frames, num_tokens
from aesanet.padding import pad_batch
from aesanet.runtime.backends import cuda_graphs, onnxruntime, open_exactly
from aesanet.runtime.backends.base import BundleFiles, EngineOptions
from aesanet.runtime.scorer import Scorer

REAL = ("cuda", "fp32") in onnxruntime.support().runs


@pytest.fixture
def provider(monkeypatch):
    """A machine with a GPU, whose onnxruntime has CUDA."""
    found = CudaProvider()
    monkeypatch.setitem(sys.modules, "onnxruntime", found)
    monkeypatch.setattr(onnxruntime, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "compute_capability", lambda: 9.0)
    return found


def test_a_cuda_provider_without_a_gpu_is_not_taken(provider, tiny_bundle, monkeypatch):
    def none():
        raise BackendError("none (no nvidia-smi, so no NVIDIA driver)")

    assert ("cuda", "fp32") in onnxruntime.support().runs
    monkeypatch.setattr(onnxruntime, "require_gpu", none)
    assert onnxruntime.support().runs == (("cpu", "fp32"),)
    with pytest.raises(BackendError, match=r"device=cuda.*on CUDA: none \(no nvidia-smi"):
        Scorer.open(tiny_bundle, "cuda", backend="onnxruntime")


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def bundle(request, tiny_bundle):
    if request.param == "real" and not REAL:
        pytest.skip("ONNX Runtime has no CUDA here")
    if request.param == "simulated":
        request.getfixturevalue("provider")
    return tiny_bundle


def opened(bundle, **options):
    return open_exactly(BundleFiles.open(bundle), "onnxruntime", EngineOptions("cuda", "fp32", **options))


def clips(rng, lengths):
    return pad_batch([rng.normal(0, 0.1, length).astype(np.float32) for length in lengths])


lengths = st.lists(st.integers(MIN_SAMPLES, 20_000), min_size=1, max_size=5)


def test_scores_are_those_without_graphs_however_shapes_come_again(bundle):
    with_graphs, without = opened(bundle, cuda_graphs=True), opened(bundle)

    @settings(max_examples=15)
    @given(st.lists(lengths, min_size=1, max_size=3), st.randoms(use_true_random=False))
    def check(shapes, random):
        rng = np.random.default_rng(random.getrandbits(32))
        for shape in (random.choice(shapes) for _ in range(8)):
            batch = clips(rng, shape)
            expected = without.scores(*batch)
            assert with_graphs.scores(*batch).shape == expected.shape
            assert np.allclose(with_graphs.scores(*batch), expected, atol=1e-4)
            ours, theirs = with_graphs.submit_embedded(*batch)(), without.submit_embedded(*batch)()
            assert np.allclose(ours[0], theirs[0], atol=1e-4)
            assert np.allclose(ours[1], theirs[1], atol=1e-3)

    check()


def test_a_shape_is_captured_when_it_comes_again_and_launched_from_then_on(provider, tiny_bundle):
    backend = opened(tiny_bundle, cuda_graphs=True)
    assert [(len(session.graphs), session.replays) for session in provider.sessions] == [(1, 1)] * 3  # of a window
    rng = np.random.default_rng(0)
    for turn, (graphs, replays) in enumerate([(1, 1), (2, 2), (2, 3), (2, 4)]):
        backend.scores(*clips(rng, [8_000 - turn, 3_000]))  # all of one shape, once they are padded
        found = [(len(session.graphs), session.replays) for session in provider.sessions]
        assert found == [(graphs, replays)] * 3


def test_no_graph_beyond_the_bounds(provider, tiny_bundle, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 3)
    monkeypatch.setattr(cuda_graphs, "_KEPT_SAMPLES", 200_000)
    backend = opened(tiny_bundle, cuda_graphs=True)
    _, encoder, _ = provider.sessions
    rng = np.random.default_rng(0)
    for _ in range(3):
        backend.scores(*clips(rng, [50_000] * 4))  # with the window that was captured on opening, too much
    assert len(encoder.graphs) == 1
    for length in (4_000, 8_000, 12_000, 16_000):
        for _ in range(3):
            backend.scores(*clips(rng, [length]))
    assert len(encoder.graphs) == 3
    assert encoder.replays == 1 + 2 + 2


def test_graphs_that_went_out_of_use_give_way_together(provider, tiny_bundle, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 4)
    monkeypatch.setattr(cuda_graphs, "_IDLE_RUNS", 10)
    backend, plain = opened(tiny_bundle, cuda_graphs=True), opened(tiny_bundle, cuda_graphs=False)
    first, others = list(provider.sessions[:3]), provider.sessions[3:]
    assert len(others) == 3
    rng = np.random.default_rng(0)
    old, new = ([clips(rng, [length]) for length in lengths] for lengths in ((4_000, 8_000, 12_000), (16_000, 19_000)))
    found = [backend.scores(*batch) for batch in old * 3]
    assert [len(session.graphs) for session in first] == [4, 4, 4]  # a window's, too
    for _ in range(10):  # two of four are in use
        found = [backend.scores(*batch) for batch in (*old[:2], *new)]
    assert provider.sessions == [*first, *others]
    gone = [weakref.ref(session) for session in first]
    first.clear()
    del provider.sessions[:3]
    for _ in range(10):
        again = [backend.scores(*batch) for batch in new]
    assert all(np.array_equal(*pair) for pair in zip(again, found[2:], strict=True))
    assert all(session() is None for session in gone)
    assert [(len(session.graphs), session.replays > 0) for session in provider.sessions[3:]] == [(2, True)] * 3
    for batch, scores in zip(new, again, strict=True):
        assert np.allclose(scores, plain.scores(*batch), atol=2e-5)


def test_sessions_stay_where_no_shape_lacks_room_or_one_never_fits(provider, tiny_bundle, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 3)
    monkeypatch.setattr(cuda_graphs, "_IDLE_RUNS", 10)
    monkeypatch.setattr(cuda_graphs, "_KEPT_SAMPLES", 150_000)
    backend = opened(tiny_bundle, cuda_graphs=True)
    rng = np.random.default_rng(0)
    small, refused, other, huge = (clips(rng, lengths) for lengths in ([4_000], [8_000], [12_000], [40_000] * 4))
    for batch in (small, other, refused):  # a window's is there, too
        for _ in range(2):
            backend.scores(*batch)
    for _ in range(30):
        backend.scores(*small)
    for _ in range(30):
        backend.scores(*huge)
    assert len(provider.sessions) == 3


@pytest.mark.parametrize("must", [True, "try"])
def test_where_sessions_cannot_be_had_anew_that_is_as_at_first(provider, tiny_bundle, monkeypatch, capsys, must):
    monkeypatch.setattr(cuda_graphs, "GRAPHS_KEPT", 1)
    monkeypatch.setattr(cuda_graphs, "_IDLE_RUNS", 2)
    backend = opened(tiny_bundle, cuda_graphs=must)
    batch = clips(np.random.default_rng(0), [8_000])
    expected = [backend.scores(*batch) for _ in range(3)]
    provider.fault = "refused"
    if must is True:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"have not been partitioned.*; do without --cuda-graphs"):
                backend.scores(*batch)
        provider.fault = None
        assert np.array_equal(backend.scores(*batch), expected[0])
    else:
        assert np.array_equal(backend.scores(*batch), expected[0])
        assert backend.kind == "onnxruntime cuda fp32"
        assert capsys.readouterr().err.count("no CUDA graphs from here on") == 1


def test_threads_take_turns(provider, tiny_bundle):
    backend = opened(tiny_bundle, cuda_graphs=True)
    plain = opened(tiny_bundle)
    batches = [clips(np.random.default_rng(n), [3_000 + 2_000 * (n % 5), 4_000]) for n in range(40)]
    fbank = np.random.default_rng(0).normal(0, 1, (2, num_frames(9_000), 128)).astype(np.float32)
    tokens = num_tokens(np.array([9_000, 4_000]))
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(backend.scores, *batch) for batch in batches]
        features = [pool.submit(backend.features, fbank, tokens) for _ in range(4)]
        for batch, future in zip(batches, found, strict=True):
            assert np.allclose(future.result(), plain.scores(*batch), atol=2e-5)
        for future in features:
            assert np.allclose(future.result(), plain.features(fbank, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("refused", "have not been partitioned"),
        ("invalidated", "ONNX Runtime's CUDA graphs failed: CUDA failure 901.*; do without --cuda-graphs"),
        ("stale", "a CUDA graph of ONNX Runtime gives other numbers than its kernels one by one; do without --cuda"),
    ],
)
def test_who_asks_for_graphs_that_cannot_be_had_is_told_at_once(provider, tiny_bundle, fault, told):
    provider.fault = fault
    engine = {"backend": "onnxruntime", "device": "cuda", "precision": "fp32"}
    with pytest.raises(BackendError, match=f"onnxruntime cuda fp32 could not load the bundle: .*{told}"):
        Scorer.open(tiny_bundle, **engine, cuda_graphs=True)
    for graphs in (None, False):
        assert Scorer.open(tiny_bundle, **engine, cuda_graphs=graphs).backend.kind == "onnxruntime cuda fp32"


@pytest.mark.parametrize("fault", ["refused", "invalidated", "stale"])
def test_where_graphs_are_tried_in_vain_kernels_run_one_by_one(provider, tiny_bundle, capsys, fault):
    provider.fault = fault
    backend = opened(tiny_bundle, cuda_graphs="try")
    assert backend.kind == "onnxruntime cuda fp32"
    assert capsys.readouterr().err.count("aesanet: no CUDA graphs from here on, which is slower: ") == 1
    batch = clips(np.random.default_rng(0), [8_000, 3_000])
    for _ in range(3):
        assert np.allclose(backend.scores(*batch), opened(tiny_bundle).scores(*batch), atol=2e-5)
    assert capsys.readouterr().err == ""
    assert "--cuda-graphs" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["invalidated", "stale"])
def test_where_graphs_are_tried_a_later_failure_costs_speed_and_no_score(
    provider, tiny_bundle, capsys, monkeypatch, fault
):
    backend = opened(tiny_bundle, cuda_graphs="try")
    assert backend.kind == "onnxruntime cuda fp32 with CUDA graphs"
    old = [weakref.ref(session) for session in provider.sessions]
    provider.sessions.clear()
    alive, opening = [], provider.InferenceSession

    def open_session(*arguments, **options):
        alive.append(sum(session() is not None for session in old))
        return opening(*arguments, **options)

    monkeypatch.setattr(provider, "InferenceSession", open_session)
    provider.fault = fault
    batch = clips(np.random.default_rng(0), [8_000, 3_000])
    first = backend.scores(*batch)
    assert backend.kind == "onnxruntime cuda fp32 with CUDA graphs"
    others = [backend.scores(*batch) for _ in range(3)]
    assert all(np.array_equal(other, first) for other in others)  # in the same shape
    assert alive == [0, 0, 0]  # their memory may be what is missing
    assert np.allclose(first, opened(tiny_bundle).scores(*batch), atol=2e-5)
    assert backend.kind == backend.name.replace(f" {provider.__version__}", "") == "onnxruntime cuda fp32"
    assert capsys.readouterr().err.count("no CUDA graphs from here on") == 1


def test_what_failed_once_fails_from_then_on_where_graphs_are_asked_for(provider, tiny_bundle):
    backend = opened(tiny_bundle, cuda_graphs=True)
    batch = clips(np.random.default_rng(0), [8_000, 3_000])
    backend.scores(*batch)
    provider.fault = "invalidated"
    captured = len(provider.sessions[0].graphs)
    for fault in ("invalidated", None, None):
        provider.fault = fault
        with pytest.raises(BackendError, match="CUDA failure 901"):
            backend.scores(*batch)
    assert len(provider.sessions[0].graphs) == captured


def test_a_shape_gives_the_same_bytes_with_its_graph_and_before(bundle):
    """So a run that is resumed gives what the whole one would have."""
    batch = clips(np.random.default_rng(0), [8_000, 3_000, 5_000])
    backend = opened(bundle, cuda_graphs=True)
    first, *others = (backend.scores(*batch) for _ in range(4))
    assert all(np.array_equal(other, first) for other in others)


@pytest.mark.parametrize("fault", ["invalidated", "stale"])
def test_a_graph_that_fails_later_is_an_error_and_no_score(provider, tiny_bundle, fault):
    backend = opened(tiny_bundle, cuda_graphs=True)
    provider.fault = fault
    batch = clips(np.random.default_rng(0), [8_000, 3_000])
    assert np.allclose(backend.scores(*batch), opened(tiny_bundle).scores(*batch), atol=2e-5)
    with pytest.raises(BackendError, match=r"CUDA graph.*do without --cuda-graphs"):
        backend.scores(*batch)


@pytest.mark.usefixtures("provider")
def test_batches_are_as_large_with_graphs(tiny_bundle):
    assert [opened(tiny_bundle, cuda_graphs=graphs).batch_seconds(10.0) for graphs in (False, True)] == [640.0, 640.0]


def test_graphs_are_asked_for_and_another_engine_by_name(provider, tiny_bundle, tmp_path, capsys):
    command = ["bench", "latency", str(tiny_bundle), "--batches", "1", "--seconds", "0.5", "--most", "0"]
    engine = ["--backend", "onnxruntime", "--device", "cuda", "--precision", "fp32"]
    names = []
    for more in ([], ["--no-cuda-graphs"], ["--cuda-graphs"]):
        out = tmp_path / f"{len(names)}.csv"
        with pytest.raises(SystemExit) as stopped:
            main([*command, *engine, *more, "--out", str(out)])
        assert stopped.value.code == 0
        with open(out, newline="") as file:
            names += [row["engine"] for row in csv.DictReader(file)]
    name = f"onnxruntime {provider.__version__} cuda fp32"
    assert names == [f"{name} with CUDA graphs", name, f"{name} with CUDA graphs"]


def test_a_row_tells_the_engine_that_it_was_measured_on_at_last(provider, tiny_bundle, tmp_path, monkeypatch):
    def measure(*arguments):
        provider.fault = "stale"
        return measured(*arguments)

    measured = latency.measure_latency
    monkeypatch.setattr(latency, "measure_latency", measure)
    engine = ["--backend", "onnxruntime", "--device", "cuda", "--precision", "fp32", "--batches", "2", "--seconds", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "latency", str(tiny_bundle), *engine, "--most", "0", "--out", str(tmp_path / "latency.csv")])
    assert stopped.value.code == 0
    with open(tmp_path / "latency.csv", newline="") as file:
        assert [row["engine"] for row in csv.DictReader(file)] == [f"onnxruntime {provider.__version__} cuda fp32"]


@pytest.mark.usefixtures("provider")
def test_verify_holds_them_to_the_checkpoint(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    engine = ["--backend", "onnxruntime", "--device", "cuda", "--precision", "fp32"]

    def told():
        with pytest.raises(SystemExit):
            main(["score", str(bundle), str(RECORDINGS[0]), *engine])
        return "this bundle was never verified on onnxruntime cuda fp32 with CUDA graphs: " in capsys.readouterr().err

    assert told()
    command = ["verify", str(bundle), "--checkpoint", str(tiny_checkpoint), "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--backend", "onnxruntime"])
    assert stopped.value.code == 0
    kinds = ["onnxruntime cuda fp32", "onnxruntime cuda fp32 with CUDA graphs"]
    assert [kind for kind in read_manifest(bundle).verified if "cuda" in kind] == kinds
    capsys.readouterr()
    assert not told()


@pytest.mark.parametrize("later", [False, True])
def test_verify_does_without_where_there_are_none(
    provider, tiny_bundle, tiny_checkpoint, tmp_path, capsys, monkeypatch, later
):
    """From the start, or once another shape than a window's is captured."""

    def hold(backend, *others):
        provider.fault = "stale"
        return held(backend, *others)

    held = parity.verify
    if later:
        monkeypatch.setattr(parity, "verify", hold)
    else:
        provider.fault = "stale"
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    command = ["verify", str(bundle), "--checkpoint", str(tiny_checkpoint), "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--backend", "onnxruntime"])
    assert stopped.value.code == 0
    assert [kind for kind in read_manifest(bundle).verified if "cuda" in kind] == ["onnxruntime cuda fp32"]
    assert "no CUDA graphs from here on, which is slower: a CUDA graph of ONNX Runtime" in capsys.readouterr().err
