import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_model, tiny_config
from hypothesis import settings
from machines import REAL, Simulated

from aesanet.engines import load_library
from aesanet.export.build import export_bundle
from aesanet.lengths import SAMPLE_RATE
from aesanet.models.checkpoint import save_checkpoint
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.backends.compiled import support
from aesanet.runtime.rows.row import Clip
from aesanet.runtime.scorer import Scorer
from aesanet.training.dataset import find_audio
from aesanet.training.labels import read_labels
from aesanet.training.progress import Progress

ROOT = Path(__file__).parent.parent
DEMO_CHECKPOINT = ROOT / "models" / "demo" / "demo.safetensors"
RECORDINGS = sorted(p for p in (ROOT / "models" / "demo" / "samples").iterdir() if p.suffix != ".md")


# A busy machine is slow without being wrong.
settings.register_profile("aesanet", deadline=None)
settings.load_profile("aesanet")

_MEASURED = {}


@pytest.fixture(scope="session")
def measured():
    """What tests measured on the way, by name, to be printed at the end whether or not they passed."""
    return _MEASURED


def pytest_sessionfinish(session):
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # a process of several: to the first
        output["measured"] = _MEASURED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _MEASURED.update(getattr(node, "workeroutput", {}).get("measured", {}))


def pytest_terminal_summary(terminalreporter):
    for name, value in _MEASURED.items():
        terminalreporter.write_line(f"measured: {name}: {value}")


def pytest_configure():
    # A shell lets what runs in its background ignore interrupts, and so would all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in getattr(getattr(item, "callspec", None), "id", ""):
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def _compiled_anew(tmp_path_factory):
    # What torch.compile keeps for all processes, one that was killed leaves half written.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Two that wait for each other on a busy machine are many times slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model():
    return random_model(tiny_config(), seed=7)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory):
    """A small random network, exported; its four axes and its calibration all differ."""
    out = tmp_path_factory.mktemp("bundles") / "tiny.bundle"
    export_bundle(tiny_checkpoint, out)
    return out


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """The checkpoint that the project ships, exported."""
    out = tmp_path_factory.mktemp("bundles") / "demo.bundle"
    export_bundle(DEMO_CHECKPOINT, out)
    return out


@pytest.fixture(scope="session")
def clips():
    """The first two seconds of every recording, float32 [samples] at 16 kHz."""
    return [np.concatenate(list(clip_blocks(Clip(str(path), 0.0, 2.0)))) for path in RECORDINGS]


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint, clips, tmp_path_factory):
    """The small random network with FP16 graphs."""
    out = tmp_path_factory.mktemp("bundles") / "half.bundle"
    export_bundle(tiny_checkpoint, out, half_on=clips)
    return out


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Noise from faint to loud, labelled with its loudness; PC falls as it rises, and every third clip has no PQ."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(3)
    with open(folder / "labels.csv", "w") as file:
        print("path,CE,CU,PC,PQ", file=file)
        for i in range(36):
            level, seconds = (i * 7 % 36) / 35, rng.uniform(0.2, 1.2)
            wave = 10 ** (-3 * (1 - level)) * 0.2 * rng.standard_normal(round(SAMPLE_RATE * seconds))
            soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), SAMPLE_RATE, subtype="FLOAT")
            score = 1 + 8 * level
            print(f"{i}.wav,{score},{score},{10 - score},{'' if i % 3 == 0 else score}", file=file)
    return folder


@pytest.fixture(scope="session")
def labelled_clips(labelled):
    """What is in that folder, as training takes it."""
    found, missing = find_audio(read_labels([labelled / "labels.csv"]), labelled, labelled / "cache", Progress())
    assert not missing
    return found


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name that answers what it is told to, first in the path."""

    def answer(script):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    return answer


@pytest.fixture(scope="session")
def trt():
    """The real TensorRT-RTX, which builds engines without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")
    return load_library("rtx")


@pytest.fixture(scope="session", params=["simulated", *(pytest.param(name, marks=pytest.mark.gpu) for name in REAL)])
def gpu(request, half_bundle, tiny_model, tmp_path_factory):
    """A machine whose engines score: one that is simulated, and with `-m gpu` the one that is here."""
    if request.param == "simulated":
        return Simulated(half_bundle)
    if request.param == "torch" and not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch sees")
    if request.param == "tensorrt" and not support().runs:
        pytest.skip(f"no GPU with TensorRT: {support().detail}")
    return REAL[request.param](shutil.copytree(half_bundle, tmp_path_factory.mktemp("real") / "b"), tiny_model)


@pytest.fixture(scope="session")
def simulated(half_bundle):
    return Simulated(half_bundle)


@pytest.fixture(scope="session")
def reference(half_bundle):
    """Scores of each clip alone, by ONNX Runtime."""
    backend = Scorer.open(half_bundle, "cpu", backend="onnxruntime").backend

    def scores(waveform, num_samples):
        alone = [backend.scores(row[None, :n], np.array([n])) for row, n in zip(waveform, num_samples, strict=True)]
        return np.concatenate(alone)

    return scores
