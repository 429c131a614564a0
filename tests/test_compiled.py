"""A bundle's compiled engines, opened on a simulated GPU: which is taken, which are refused and why, who times them."""

import csv
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import polygraphy.backend.trt
import pytest
from conftest import RECORDINGS
from polygraphy import util
from polygraphy.common import TensorMetadata
from polygraphy.cuda import DeviceView
from polygraphy.datatype import DataType
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import SimulatedRTX, SimulatedTensorRT, simulated_plan

from aesanet import gpu
from aesanet.benchmarks import peak
from aesanet.benchmarks import polygraphy as runners
from aesanet.benchmarks.latency import compare
from aesanet.bundle import GRAPH_NAMES, read_manifest
from aesanet.cli.main import main
from aesanet.engines import ENGINES_FOLDER, MODULES, Engine, Plan, machine_parts, read_engine
from aesanet.errors import BackendError, EngineMisfitError, InputError
from aesanet.export.profiles import make_profiles
from aesanet.export.writer import write_manifest
from aesanet.gpu import cuda_gpu
from aesanet.hashing import file_sha256, parts_sha256
from aesanet.lengths import num_frames, num_tokens
from aesanet.runtime.backends import compiled as room
from aesanet.runtime.backends import open_exactly
from aesanet.runtime.backends.base import BundleFiles, EngineOptions
from aesanet.runtime.backends.compiled import open_tensorrt, support
from aesanet.runtime.cuda.complaints import process_logger
from aesanet.runtime.scorer import Scorer

PROFILES = make_profiles([(1.0, 20), (4.0, 3)])


@pytest.fixture
def compiled(half_bundle, tmp_path, monkeypatch, request):
    """A bundle with engines that the simulated machine can run, one for each `GPU` asked for."""
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    cuda = SimulatedCuda(np.random.default_rng(0))
    trt = getattr(request, "param", SimulatedTensorRT)(cuda)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "load_cuda", lambda: cuda)
    monkeypatch.setattr(room, "load_driver", lambda: cuda)
    monkeypatch.setattr(room, "load_library", lambda flavour: trt)
    here = cuda_gpu(cuda)

    def add(flavour="tensorrt", capabilities=(), profiles=PROFILES, **changed):
        parts = machine_parts(flavour, trt, capabilities, here) | {"profiles": str(profiles)} | changed
        key = parts_sha256(parts)
        folder = bundle / ENGINES_FOLDER / key
        folder.mkdir(parents=True)
        plans = {}
        for name in GRAPH_NAMES:
            plan = folder / f"{name}.plan"
            plan.write_bytes(simulated_plan(bundle / f"{name}.onnx", name, profiles))
            plans[name] = Plan(plan.name, file_sha256(plan), plan.stat().st_size, 1.0, (), {})
        (folder / "engine.json").write_bytes(msgspec.json.encode(Engine(key, flavour, capabilities, parts, plans)))
        manifest = read_manifest(bundle)
        engines = {**manifest.engines, key: file_sha256(folder / "engine.json")}
        write_manifest(bundle, msgspec.structs.replace(manifest, engines=engines))
        return key

    return bundle, add


def test_score_takes_the_engine_that_fits(compiled):
    bundle, add = compiled
    add(profiles=make_profiles([(30.0, 1)]))
    add()
    add(GPU="NVIDIA H200, compute capability 9.0, driver for CUDA 13.0, 143771 MiB")
    scorer = Scorer.open(bundle)
    assert scorer.backend.name == "tensorrt 0.simulated cuda fp16"
    assert re.fullmatch("tensorrt cuda fp16 [0-9a-f]{16}", scorer.backend.kind)
    assert scorer.reason == "the bundle has an engine for this GPU"
    assert [profile.max_batch for profile in scorer.backend.profiles] == [20, 3]  # the last that fits
    assert Scorer.open(bundle, backend="tensorrt").reason == "as asked"


def test_latencies_without_cuda_graphs_are_those_of_another_engine(compiled, tmp_path, capsys):
    bundle, add = compiled
    add()
    files = [tmp_path / "graphs.csv", tmp_path / "none.csv"]
    command = ["bench", "latency", str(bundle), "--batches", "1", "--seconds", "0.5", "--most", "0"]
    for path, more in zip(files, ([], ["--no-cuda-graphs"]), strict=True):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--backend", "tensorrt", "--out", str(path), *more])
        assert stopped.value.code == 0
    name = "tensorrt 0.simulated cuda fp16"
    assert [path.read_text().count(f",{name},") for path in files] == [1, 0]
    assert [path.read_text().count(f",{name} without CUDA graphs,") for path in files] == [0, 1]
    with pytest.raises(InputError, match="have no engine"):
        compare(*files)


@pytest.mark.parametrize("compiled", [SimulatedRTX], indirect=True)
def test_kernels_that_rtx_makes_are_on_disk_before_the_first_row(compiled, tmp_path):
    """Killed at any instant after, a process has spared the next one the making of them."""
    bundle, add = compiled
    add(flavour="rtx")
    scorer = Scorer.open(bundle)
    (file,) = (tmp_path / "cache" / "aesanet").iterdir()
    _, *kernels = json.loads(file.read_bytes())
    assert sorted(kernel.split()[0] for kernel in kernels) == ["fbank", "features", "scores"]
    add(flavour="rtx", profiles=make_profiles([(2.0, 1), (4.0, 3)]))
    assert Scorer.open(bundle).backend.kind != scorer.backend.kind
    assert len(list(file.parent.iterdir())) == 2  # another engine has its own


@pytest.mark.parametrize("compiled", [SimulatedRTX], indirect=True)
def test_a_run_is_resumed_with_kernels_made_as_they_were(compiled, tmp_path, capsys):
    bundle, add = compiled
    add(flavour="rtx")
    command = ["score", str(bundle), str(RECORDINGS[0]), "--out", str(tmp_path / "scores.jsonl"), "--resume"]
    status = []
    for more in (["--specialize", "eager"], ["--specialize", "eager"], []):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *more])
        status.append(stopped.value.code)
    assert status == [0, 0, 2]
    told = capsys.readouterr().err
    assert "tensorrt_rtx 0.simulated cuda fp16 specialize=eager (the bundle has an engine for this GPU)" in told
    assert "nothing to do" in told
    assert "the engine" in told.splitlines()[-1]


def test_the_gpus_memory_goes_with_the_scorer(compiled):
    """And not when Python next looks for garbage, long after the next engine wanted that memory."""
    bundle, add = compiled
    add()
    cuda = room.load_cuda()
    gc.collect()
    gc.disable()
    try:
        scorer = Scorer.open(bundle, backend="tensorrt")
        rows = list(scorer.stream([{"path": str(path)} for path in RECORDINGS[:3]]))
        rows += [scorer.score(str(RECORDINGS[0])), *scorer.score([str(RECORDINGS[0]), "none.wav"])]
        assert len(rows) == 6
        assert cuda.device
        del scorer
        assert not cuda.device
    finally:
        gc.enable()


def test_throughput_tells_the_gpus_memory_and_its_published_peak(compiled, tmp_path, monkeypatch):
    """Which is of the GPU's name and of FP16."""
    bundle, add = compiled
    add()
    for module in (gpu, peak):
        monkeypatch.setattr(module, "load_cuda", room.load_cuda)
    command = ["bench", "throughput", str(bundle), "--batches", "2", "--seconds", "0.5", "--most", "0"]
    rows = []
    for tflops in ({}, {"Simulated": 2.0}):
        monkeypatch.setattr(peak, "FP16_TFLOPS", tflops)
        out = tmp_path / f"{len(rows)}.csv"
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--out", str(out)])
        assert stopped.value.code == 0
        with open(out, newline="") as file:
            rows += csv.DictReader(file)
    unknown, known = rows
    assert [unknown[name] for name in ("peak_tflops", "peak_source", "mfu")] == ["", "", ""]
    assert (known["peak_tflops"], known["peak_source"]) == ("2.0", "NVIDIA, dense FP16")
    assert float(known["mfu"]) == pytest.approx(float(known["useful_tflops"]) / 2, rel=1e-2)
    for row in rows:
        assert int(row["gpu_memory_after_mib"]) > int(row["gpu_memory_before_mib"]) >= 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"GPU": "NVIDIA H200"},
            "it was built for GPU NVIDIA H200, and here is Simulated, compute capability 8.9, driver",
        ),
        (
            {"library": "tensorrt 10.12"},
            "it was built for library tensorrt 10.12, and here is tensorrt 0.simulated, CUDA",
        ),
        ({"platform": "win32 AMD64"}, "it was built for platform win32 AMD64, and here is linux"),
        (
            {"flavour": "rtx", "capabilities": ("12.0",)},
            "it was built for compute capability 12.0, and here is Simulated",
        ),
        ({"profiles": make_profiles([(2.0, 4)])}, "clips of 4 s, but this engine takes 0.175 to 2 s"),
    ],
)
def test_an_engine_for_another_machine_is_refused_with_what_mends_it(compiled, changed, told):
    bundle, add = compiled
    key = add(**changed)
    with pytest.raises(EngineMisfitError if "profiles" not in changed else BackendError):
        open_exactly(BundleFiles.open(bundle), "tensorrt", EngineOptions("cuda", "fp16"))
    with pytest.raises(BackendError) as refused:
        Scorer.open(bundle, backend="tensorrt")
    assert f"engine {key[:16]}: {told}" in str(refused.value)
    assert f"`aesanet compile {bundle}` makes one for this machine" in str(refused.value)
    scorer = Scorer.open(bundle)
    assert "cpu" in scorer.backend.name
    assert told in scorer.reason


@pytest.mark.parametrize(("capabilities", "status"), [(("12.0",), 0), ((), 1)])
def test_verify_leaves_out_what_is_for_others_and_fails_what_is_broken(
    compiled, tiny_checkpoint, capsys, capabilities, status
):
    bundle, add = compiled
    key = add(flavour="rtx", capabilities=capabilities)
    if not capabilities:
        (bundle / ENGINES_FOLDER / key / "head.plan").write_bytes(b"broken")
    command = ["verify", str(bundle), "--checkpoint", str(tiny_checkpoint), "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == status
    out, err = capsys.readouterr()
    assert ("the bundle's compiled engines are left out: engine" in err) == (status == 0)
    assert ("tensorrt cuda fp16: FAILED; it cannot load the bundle: " in out) == (status == 1)
    if not capabilities:
        assert "tensorrt cuda fp16" in read_manifest(bundle).verified
        add()
        with pytest.raises(SystemExit):
            main(command)
        assert "tensorrt cuda fp16" not in read_manifest(bundle).verified  # which was said of no engine by its key
        manifest = read_manifest(bundle)
        (other,) = (found for kind, found in manifest.verified.items() if kind.startswith("tensorrt"))
        verified = {**manifest.verified, "tensorrt cuda fp16": other}  # by another machine, say
        write_manifest(bundle, msgspec.structs.replace(manifest, verified=verified))
        with pytest.raises(SystemExit):
            main(command)
        assert "tensorrt cuda fp16" in read_manifest(bundle).verified


@pytest.mark.usefixtures("compiled")
def test_a_library_that_is_broken_does_not_keep_the_other_from_running(monkeypatch):
    def load(flavour):
        if flavour == "tensorrt":
            raise BackendError("libnvinfer.so.11: cannot open shared object file")
        return working(flavour)

    working = room.load_library
    monkeypatch.setattr(room, "library_version", lambda flavour: "1.0")
    monkeypatch.setattr(room, "load_library", load)
    assert support().runs == (("cuda", "fp16"),)
    monkeypatch.setattr(room, "load_library", lambda flavour: load("tensorrt"))
    assert "cannot run: libnvinfer.so.11: cannot open" in support().detail


def test_verify_holds_a_compiled_engine_to_the_checkpoint(compiled, tiny_checkpoint, capsys):
    bundle, add = compiled
    key = add()
    command = ["verify", str(bundle), "--checkpoint", str(tiny_checkpoint), "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--backend", "tensorrt"])
    assert stopped.value.code == 0
    assert f"tensorrt cuda fp16 {key[:16]}: passed" in capsys.readouterr().out
    assert list(read_manifest(bundle).verified) == [f"tensorrt cuda fp16 {key[:16]}"]


def test_a_damaged_plan_is_never_loaded(compiled):
    bundle, add = compiled
    key = add()
    plan = bundle / ENGINES_FOLDER / key / "head.plan"
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(BackendError, match=rf"engine {key[:16]}: .*head\.plan: sha256 is .* but the bundle says"):
        Scorer.open(bundle, backend="tensorrt")


def test_a_plan_that_tensorrt_does_not_take_says_why(compiled):
    bundle, add = compiled
    key = add()
    folder = bundle / ENGINES_FOLDER / key
    (folder / "encoder.plan").write_bytes(b"no plan")
    engine = json.loads((folder / "engine.json").read_text())
    engine["plans"]["encoder"]["sha256"] = file_sha256(folder / "encoder.plan")
    (folder / "engine.json").write_text(json.dumps(engine))
    manifest = read_manifest(bundle)
    write_manifest(bundle, msgspec.structs.replace(manifest, engines={key: file_sha256(folder / "engine.json")}))
    assert read_engine(bundle, read_manifest(bundle), key)
    with pytest.raises(
        BackendError, match=r"tensorrt 0\.simulated refused the encoder's plan: magic tag does not match"
    ):
        Scorer.open(bundle, backend="tensorrt")


def test_a_bundle_without_engines_says_how_to_get_them(compiled):
    bundle, _ = compiled
    with pytest.raises(
        BackendError, match="tensorrt cuda fp16: the bundle has no engine, which `aesanet compile` makes"
    ):
        Scorer.open(bundle, backend="tensorrt")


@pytest.mark.skipif(bool(support().runs), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_what_is_missing(compiled, monkeypatch):
    monkeypatch.undo()
    bundle, add = compiled
    add()
    with pytest.raises(BackendError, match="cuda"):
        open_tensorrt(BundleFiles.open(bundle), EngineOptions("cuda", "fp16"))
    with pytest.raises(BackendError, match=r"tensorrt: .*(not installed|cannot run: )"):
        Scorer.open(bundle, backend="tensorrt")


# Polygraphy's runner


class Runner(polygraphy.backend.trt.TrtRunner):
    """Polygraphy's, whose engine ONNX Runtime stands for; what it leaves "on the GPU" only another runner can read."""

    def activate_impl(self):
        self.engine, self.left = self._engine_or_context, {}

    def get_input_metadata_impl(self):
        found = TensorMetadata()
        for node in self.engine.session.get_inputs():
            shape = tuple(-1 if isinstance(size, str) else size for size in node.shape)
            found.add(node.name, DataType.from_dtype(node.type, "onnxruntime"), shape)
        return found

    def infer_impl(self, feed_dict, copy_outputs_to_host=True):
        inputs = {name: on_host(array) for name, array in feed_dict.items()}
        for name, array in inputs.items():
            least, _, most = self.engine.shapes[name][self.optimization_profile]
            assert all(low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True))
        (found,) = self.engine.session.run(None, inputs)
        self.inference_time = 0.0
        if not copy_outputs_to_host:
            self.left[self.engine.output] = found
            found = DeviceView(found.ctypes.data, found.shape, DataType.FLOAT32)
        return {self.engine.output: found}


def on_host(array):
    if not isinstance(array, DeviceView):
        return array
    values = (ctypes.c_float * util.volume(array.shape)).from_address(array.ptr)
    return np.frombuffer(values, np.float32).reshape(array.shape).copy()


def test_polygraphy_itself_is_not_there_before_it_is_told_which_tensorrt():
    """Which it reads once."""
    code = "import sys, aesanet.benchmarks.polygraphy; print('polygraphy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("flavour", ["tensorrt", "rtx"])
def test_polygraphy_runs_the_engine_that_fits(compiled, tiny_checkpoint, monkeypatch, flavour):
    bundle, add = compiled
    add(flavour=flavour)
    add(GPU="NVIDIA H200")
    trt = room.load_library(flavour)
    monkeypatch.setattr(trt, "__name__", MODULES[flavour], raising=False)
    monkeypatch.setattr(runners, "load_cuda", room.load_cuda)
    monkeypatch.setattr(polygraphy.backend.trt, "TrtRunner", Runner)
    load = trt.Runtime(process_logger(trt)).deserialize_cuda_engine
    monkeypatch.setattr(polygraphy.backend.trt, "EngineFromBytes", lambda plan: lambda: load(plan))
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "")
    rng = np.random.default_rng(0)
    waveform = rng.normal(0, 0.1, (2, 50_000)).astype(np.float32)
    num_samples = np.full(2, 50_000)
    fbank = rng.normal(0, 1, (2, num_frames(50_000), 128)).astype(np.float32)
    given = {"bundle": bundle, "checkpoint": tiny_checkpoint, "batch": 2}
    work = SimpleNamespace(**given, waveform=waveform, num_samples=num_samples, fbank=fbank, part="waveforms")
    processor = Scorer.open(bundle, backend="onnxruntime", device="cpu").backend

    opened = runners.open_tensorrt(work)
    assert np.allclose(opened.run(), processor.scores(waveform, num_samples), atol=1e-5)
    assert opened.about.versions.endswith(f", {MODULES[flavour]} 0.simulated")
    assert opened.about.weights == "untrained"
    assert os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == {"tensorrt": "0", "rtx": "1"}[flavour]
    work.part = "encoder"
    found = runners.open_tensorrt(work).run()
    assert np.allclose(found, processor.features(fbank, num_tokens(num_samples)), atol=1e-4)
