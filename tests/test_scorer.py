import dataclasses
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO_CHECKPOINT, RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st

import aesanet
from aesanet.bundle import read_manifest
from aesanet.errors import BackendError, ClipError, InputError
from aesanet.lengths import MIN_SAMPLES, WindowPolicy, num_tokens
from aesanet.models.checkpoint import load_checkpoint
from aesanet.padding import pad_batch
from aesanet.runtime import backends
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.backends import supported_backends
from aesanet.runtime.backends.base import Backend
from aesanet.runtime.rows.row import Clip, Row
from aesanet.runtime.scorer import ClipScores, Scorer

# FP16 is of bundles that have it: see test_precision.
ENGINES = [(n, d, p) for n, support in supported_backends().items() for d, p in support.runs if p != "fp16"]
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}  # on the 0-10 scale


@pytest.fixture(scope="module", params=[e for e in ENGINES if e[2] == "fp32"], ids="-".join)
def exact_scorer(request, tiny_bundle):
    name, device, precision = request.param
    return Scorer.open(tiny_bundle, device, backend=name, precision=precision)


def pytorch_scores(model, waveform, num_samples):
    with torch.no_grad():
        return model(torch.from_numpy(waveform), torch.from_numpy(num_samples)).numpy()


def test_all_engines_of_this_project_run_in_its_tests():
    assert {name for name, _, _ in ENGINES} == {"onnxruntime", "openvino"}


@given(lengths=st.lists(st.integers(2_800, 40_000), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_every_fp32_engine_gives_pytorchs_scores_of_each_clip_alone(exact_scorer, tiny_model, lengths, seed):
    """One property for two promises: the scores are the checkpoint's, and they do not change with the batch."""
    rng = np.random.default_rng(seed)
    clips = [rng.normal(0, rng.uniform(0.02, 0.3), n).astype(np.float32) for n in lengths]
    together = exact_scorer.backend.scores(*pad_batch(clips))
    assert together.dtype == np.float32
    assert together.shape == (len(lengths), 4)
    for scores, clip in zip(together, clips, strict=True):
        np.testing.assert_allclose(scores, pytorch_scores(tiny_model, *pad_batch([clip]))[0], atol=1e-4)


@pytest.fixture(scope="module")
def demo_model():
    return load_checkpoint(DEMO_CHECKPOINT)


@pytest.mark.parametrize(("backend", "device", "precision"), ENGINES)
def test_recordings_score_as_in_pytorch_window_by_window(demo_bundle, demo_model, measured, backend, device, precision):
    scorer = Scorer.open(demo_bundle, device, backend=backend, precision=precision)
    window = demo_model.config.window.window_samples
    spread, difference = [], []
    for path, scores in zip(RECORDINGS, scorer.score(list(RECORDINGS)), strict=True):
        samples = np.concatenate(list(clip_blocks(Clip(str(path)))))
        windows = [w for w in np.split(samples, range(window, len(samples), window)) if len(w) >= MIN_SAMPLES]
        each = [pytorch_scores(demo_model, *pad_batch([window]))[0] for window in windows]
        expected = np.average(each, axis=0, weights=[len(window) for window in windows])
        found = np.array([scores.CE, scores.CU, scores.PC, scores.PQ])
        # Where mel bins are nearly empty, as above a low-pass or under pure tones, any two FP32 filterbanks round them
        # differently. Given the same filterbank, these scores too agree to 1e-5.
        empty_bins = any(name in path.name for name in ("telephone", "guitar", "piano", "vinyl"))
        tolerance = max(TOLERANCE[precision], 1e-2 if empty_bins else 0)  # 8.3e-3 with CUDA on an H200
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=str(path))
        assert scores.seconds == pytest.approx(soundfile.info(path).duration, abs=1e-3)
        spread.append(found)
        difference.append(np.abs(found - expected).max())
    assert (np.std(spread, axis=0) > 0.1).all()  # a comparison of constants would prove nothing
    assert (max(difference) > 5e-3) == (precision == "bf16")  # it really ran in what it says
    measured[f"demo recordings, {scorer.backend.name} against PyTorch FP32"] = f"{max(difference):.1e} at most"


def test_arrays_paths_and_lists(demo_bundle):
    scorer = Scorer.open(demo_bundle, backend="onnxruntime")
    path = next(p for p in RECORDINGS if p.name == "music-piano.flac")
    samples, rate = soundfile.read(path, dtype="float32")
    assert samples.shape[1] == 2
    one = scorer.score(path)
    assert scorer.score(str(path)) == one
    assert dataclasses.astuple(scorer.score((samples, rate))) == pytest.approx(dataclasses.astuple(one), abs=1e-5)
    mixed = scorer.score([path, "nothing.wav", (samples.mean(axis=1).astype(np.float64), rate), (samples[:50], rate)])
    assert isinstance(mixed[0], ClipScores)
    assert [getattr(m, "code", None) for m in mixed] == [None, "not_found", None, "too_short"]
    assert pytest.approx(one.PQ, abs=1e-5) == mixed[2].PQ
    with pytest.raises(ClipError):
        scorer.score("nothing.wav")
    assert aesanet.Scorer is Scorer


@pytest.mark.parametrize(
    "samples",
    [np.zeros(16_000, np.int16), np.zeros((2, 16_000), np.float32), np.zeros((2, 3, 4), np.float32)],
    ids=["integers", "channels first", "three axes"],
)
def test_arrays_that_would_be_misread_are_refused(tiny_bundle, samples):
    with pytest.raises(ValueError, match="samples are"):
        Scorer.open(tiny_bundle).score((samples, 16_000))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_arrays_of_no_waveform(tiny_bundle, bad):
    scorer = Scorer.open(tiny_bundle)
    for samples in (np.full(16_000, bad, np.float32), np.zeros(0)):
        with pytest.raises(ClipError):
            scorer.score((samples, 16_000))


def test_long_audio_is_the_length_weighted_mean_of_its_windows(demo_bundle):
    scorer = Scorer.open(demo_bundle, backend="onnxruntime")
    window = scorer.manifest.window.window_samples
    samples = np.random.default_rng(0).normal(0, 0.1, 5 * window + 50_000).astype(np.float32)
    parts = np.split(samples, range(window, len(samples), window))
    each = [dataclasses.astuple(scorer.score((part, 16_000)))[:4] for part in parts]
    expected = np.average(each, axis=0, weights=[len(part) for part in parts])
    whole = scorer.score((samples, 16_000))
    np.testing.assert_allclose(dataclasses.astuple(whole)[:4], expected, atol=1e-5)

    # A last window below one patch is left out; the seconds stay those of the clip.
    short_tail = scorer.score((samples[: window + 2_799], 16_000))
    assert dataclasses.astuple(short_tail)[:4] == pytest.approx(each[0], abs=1e-5)
    assert short_tail.seconds == pytest.approx((window + 2_799) / 16_000, abs=1e-6)


def test_silence_and_constant_offsets_are_scored_alike(demo_bundle):
    """The mean of every frame is taken out, so digital silence with an offset is digital silence, on every engine."""
    for name, device, precision in ENGINES:
        scorer = Scorer.open(demo_bundle, device, backend=name, precision=precision)
        silence, *offsets = (
            scorer.score((np.full(32_000, value, np.float32), 16_000)) for value in (0, 0.5, 0.1234567)
        )
        for offset in offsets:
            assert dataclasses.astuple(offset) == pytest.approx(dataclasses.astuple(silence), abs=1e-4)


def test_every_row_gives_one_row_in_order(demo_bundle, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(2_799), 16_000)
    rows = [
        {"path": str(RECORDINGS[0]), "id": 1},
        {"path": str(tmp_path / "nothing.wav"), "id": 2},
        {"id": 3},
        Row({"path": str(RECORDINGS[1]), "start_time": 0.5, "end_time": 1.5, "id": 4}),
        {"path": str(tmp_path / "short.wav"), "id": 5},
    ]
    out = list(Scorer.open(demo_bundle).stream(rows))
    assert [row["id"] for row in out] == [1, 2, 3, 4, 5]
    assert [row.get("error", {}).get("code") for row in out] == [None, "not_found", "bad_row", None, "too_short"]
    measured = ["start_seconds", "end_seconds", "seconds", "sample_rate", "channels", "truncated"]
    assert list(out[0]) == ["path", "id", "CE", "CU", "PC", "PQ", *measured]
    info = soundfile.info(RECORDINGS[0])
    assert [out[0][key] for key in measured] == [
        0.0,
        *[pytest.approx(info.duration, abs=1e-6)] * 2,
        info.samplerate,
        info.channels,
        False,
    ]
    assert [out[3][key] for key in measured[:3]] == [0.5, 1.5, 1.0]


def test_auto_takes_the_fastest_and_says_why(tiny_bundle):
    scorer = Scorer.open(tiny_bundle)
    bf16 = ("cpu", "bf16") in supported_backends()["openvino"].runs
    assert scorer.backend.name.startswith("openvino") or "cuda" in scorer.backend.name
    assert scorer.backend.name.endswith("bf16" if bf16 else "fp32")
    assert scorer.reason
    assert Scorer.open(tiny_bundle, backend="onnxruntime", precision="fp32").reason == "as asked"


def test_what_no_engine_can_do_says_what_they_can(tiny_bundle):
    with pytest.raises(BackendError, match=r"backend=onnxruntime, device=auto, precision=bf16.*openvino: CPU"):
        Scorer.open(tiny_bundle, backend="onnxruntime", precision="bf16")
    if not any(device == "cuda" for _, device, _ in ENGINES):
        with pytest.raises(BackendError, match="device=cuda"):
            Scorer.open(tiny_bundle, "cuda")


@pytest.mark.parametrize(("name", "device", "precision"), ENGINES)
def test_threads_may_share_a_scorer(tiny_bundle, name, device, precision):
    scorer = Scorer.open(tiny_bundle, device, backend=name, precision=precision, threads=1)
    rng = np.random.default_rng(0)
    clips = [(rng.normal(0, 0.1, n).astype(np.float32), 16_000) for n in (5_000, 9_000, 20_000, 31_000)]
    alone = [scorer.score(clip) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(scorer.score, clips * 15))
    for found, expected in zip(together, alone * 15, strict=True):
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_threads_of_the_engine_are_those_asked_for(tiny_bundle, name):
    backend = Scorer.open(tiny_bundle, backend=name, threads=1).backend
    if name == "onnxruntime":
        assert backend._sessions.encoder.get_session_options().intra_op_num_threads == 1
    else:
        assert backend._encoder.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1


class Recorder(Backend):
    """Stands for an engine: remembers the lengths of its windows, and scores a window by its first sample."""

    name = kind = "recorder"
    device, precision, form = "cpu", "fp32", "fp32"

    def __init__(self):
        self.lengths = []

    def scores(self, waveform, num_samples):
        self.lengths += num_samples.tolist()
        return np.repeat(waveform[:, :1], 4, axis=1)


def test_the_window_policy_is_the_bundles(tiny_bundle):
    recorder = Recorder()
    manifest = read_manifest(tiny_bundle)
    assert manifest.window == WindowPolicy(4.0, 3.0)
    samples = np.arange(9 * 16_000, dtype=np.float32)
    scores = Scorer(manifest, recorder).score((samples, 16_000))
    assert recorder.lengths == [64_000, 64_000, 48_000]
    assert pytest.approx(np.average([0, 48_000, 96_000], weights=recorder.lengths)) == scores.CE


@pytest.mark.parametrize(("name", "device", "precision"), [e for e in ENGINES if e[2] == "fp32"])
def test_embeddings_are_the_encoders_features_over_a_clips_own_tokens(tiny_bundle, tiny_model, name, device, precision):
    backend = Scorer.open(tiny_bundle, device, backend=name, precision=precision).backend
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, n).astype(np.float32) for n in (9_000, 31_000, 2_800)]
    scores, embeddings = backend.submit_embedded(*pad_batch(clips))()
    np.testing.assert_allclose(scores, backend.scores(*pad_batch(clips)), atol=1e-6)
    for clip, embedding in zip(clips, embeddings, strict=True):
        with torch.no_grad():
            fbank = tiny_model.frontend(torch.from_numpy(clip[None]))
            features = tiny_model.encoder(fbank, num_tokens(torch.tensor([len(clip)])))
        np.testing.assert_allclose(embedding, features[0].mean(dim=0), atol=1e-4)


def test_a_stream_keeps_windows_and_embeddings_where_asked(tiny_bundle):
    scorer = Scorer.open(tiny_bundle, backend="onnxruntime")
    row = {"path": str(RECORDINGS[2]), "start_time": 0.5, "end_time": 9.0}
    (plain,) = scorer.stream([row])
    (kept,) = scorer.stream([row], per_window=True, embeddings=True)
    windows, embedding = kept.pop("windows"), kept.pop("embedding")
    assert kept == plain
    assert [(w["start_seconds"], w["end_seconds"]) for w in windows] == [(0.5, 4.5), (3.5, 7.5), (6.5, 9.0)]
    weights = [w["end_seconds"] - w["start_seconds"] for w in windows]
    for axis in ("CE", "CU", "PC", "PQ"):
        assert kept[axis] == pytest.approx(np.average([w[axis] for w in windows], weights=weights), abs=2e-6)
    assert len(embedding) == 32
    assert all(isinstance(value, float) for value in embedding)


def test_a_score_that_is_no_number_is_an_error_row(tiny_bundle):
    scorer = Scorer(read_manifest(tiny_bundle), Recorder())
    scorer.backend.scores = lambda waveform, num_samples: np.full((len(waveform), 4), np.nan, np.float32)
    (row,) = scorer.stream([{"path": str(RECORDINGS[0])}])
    assert row["error"]["code"] == "bad_score"


def test_a_file_cut_short_says_so_in_its_row(tiny_bundle, tmp_path):
    path = tmp_path / "cut.mp3"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (row,) = Scorer.open(tiny_bundle).stream([{"path": str(path)}])
    assert row["truncated"] is True
    assert row["header_seconds"] == pytest.approx(20, abs=0.2)
    assert row["seconds"] == pytest.approx(10, abs=0.5)


def test_an_engine_that_cannot_load_the_bundle_gives_way_to_the_next(tiny_bundle, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(backends._ENGINES, "openvino", (broken, backends._ENGINES["openvino"][1]))
    scorer = Scorer.open(tiny_bundle, "cpu")
    assert scorer.backend.name.startswith("onnxruntime")
    assert "openvino cpu fp32 could not load the bundle: no kernel image" in scorer.reason
    with pytest.raises(BackendError, match="openvino cpu fp32 could not load the bundle: no kernel image"):
        Scorer.open(tiny_bundle, backend="openvino")


@pytest.mark.parametrize("shape", [(0,), (0, 2), (16_000, 0)])
def test_an_array_of_no_samples_is_an_error_in_its_place(tiny_bundle, shape):
    found = Scorer.open(tiny_bundle).score([(np.zeros(shape), 16_000), (np.full(16_000, 0.1), 16_000)])
    assert (found[0].code, found[1].seconds) == ("no_audio", 1.0)


@pytest.mark.parametrize("audio", [np.zeros(9), ("a.wav", "b.wav", 1), None, 5])
def test_what_is_no_audio_at_all(tiny_bundle, audio):
    with pytest.raises(TypeError, match="give a path"):
        Scorer.open(tiny_bundle).score(audio)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"backend": "x"}, "backend is 'x'; give one of 'auto', 'onnxruntime', 'openvino', 'tensorrt'"),
        ({"device": "gpu"}, "device is 'gpu'; give one of 'auto', 'cpu', 'cuda'"),
        ({"precision": "fp64"}, "precision is 'fp64'; give one of 'auto', 'fp32', 'fp16', 'bf16'"),
        ({"specialize": "x"}, "specialize is 'x'; give one of 'lazy', 'eager', 'none'"),
        ({"cuda_graphs": "yes"}, "cuda_graphs is 'yes'; give one of None, True, False, 'try'"),
        ({"threads": 0}, "threads is 0; give 1 or more"),
        ({"threads": -1}, "threads is -1; give 1 or more"),
    ],
)
def test_what_cannot_be_chosen_says_what_can(tiny_bundle, choice, told):
    with pytest.raises(InputError, match=re.escape(told)):
        Scorer.open(tiny_bundle, **choice)


def test_fewer_threads_than_none_are_refused(tiny_bundle):
    with pytest.raises(InputError, match="workers is -1; it must be"):
        next(Scorer.open(tiny_bundle).stream([], workers=-1))


def test_channels_that_cannot_be_chosen_are_refused_before_anything_is_read(tiny_bundle):
    scorer = Scorer.open(tiny_bundle)
    with pytest.raises(InputError, match="channels is 'right'; give one of 'mean', 'left', 'loudest'"):
        next(scorer.stream([{"path": "none.wav"}], channels="right"))


OPENED_TWICE = """
import gc, signal, sys
from aesanet.runtime.scorer import Scorer

signal.signal(signal.SIGINT, signal.default_int_handler)
scorers = [Scorer.open(sys.argv[1], backend=sys.argv[2]) for _ in range(2)]
while scorers:
    del scorers[0]
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.parametrize("backend", [name for name, support in supported_backends().items() if support.runs])
def test_engines_that_went_leave_signals_as_they_were(tiny_bundle, backend):
    """OpenVINO 2026.4 has them handled on a stack of its own, each time that it is opened."""
    command = [sys.executable, "-c", OPENED_TWICE, str(tiny_bundle), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
