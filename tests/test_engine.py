"""Engines in a bundle, built by the real TensorRT-RTX: keys that miss nothing, what is refused and what left alone."""

import dataclasses
import errno
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import msgspec
import pytest
from conftest import RECORDINGS
from hypothesis import given
from hypothesis import strategies as st

from aesanet.benchmarks.parity import not_opened
from aesanet.bundle import GRAPH_NAMES, read_manifest
from aesanet.cli.main import main
from aesanet.engines import (
    known_capabilities,
    library_version,
    machine_parts,
    misfits,
    read_engine,
    runs_on,
)
from aesanet.errors import BackendError, BundleError, CompileError
from aesanet.export import half as half_room
from aesanet.export.build import export_bundle
from aesanet.export.compile import choose_flavour, compile_bundle, prune_engines
from aesanet.export.engine import BuildSettings, build_plan
from aesanet.export.profiles import make_profiles
from aesanet.export.writer import new_bundle, write_manifest
from aesanet.gpu import Gpu
from aesanet.hashing import file_sha256, parts_sha256
from aesanet.runtime.backends import supported_backends

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")


SMALL = BuildSettings(profiles=make_profiles([(1.0, 2)]))


SMALL_TWO = BuildSettings(profiles=make_profiles([(1.0, 2), (4.0, 3)]))


@pytest.fixture
def bundle(half_bundle, tmp_path):
    return shutil.copytree(half_bundle, tmp_path / "b")


def test_a_bundle_is_compiled_once_and_known_by_all_its_parts(bundle, tmp_path):
    engine, built = compile_bundle(bundle, "rtx", SMALL_TWO)
    assert built
    manifest = read_manifest(bundle)
    assert list(manifest.engines) == [engine.key] == [parts_sha256(engine.parts)]
    assert engine.parts["encoder graph"] == manifest.half.graphs["encoder"].sha256
    assert engine.parts["frontend graph"] == manifest.graphs["frontend"].sha256
    assert re.fullmatch(r"tensorrt_rtx 1\.[\d.]+, CUDA \d+", engine.parts["library"])
    assert engine.parts["profiles"] == "1 to 2 clips of 2800 to 16000 samples; 1 to 3 clips of 16000 to 64000 samples"
    named = {"library", "recipe", "platform", "GPU", "profiles", "TF32", "level", "workspace"}
    assert set(engine.parts) == {f"{name} graph" for name in GRAPH_NAMES} | named
    assert tuple(engine.plans) == GRAPH_NAMES
    for plan in engine.plans.values():
        assert (bundle / "engines" / engine.key / plan.file).stat().st_size == plan.size_bytes > 10_000
        assert len(plan.activation_bytes) == 2  # one a profile
    assert engine.plans["encoder"].layers["SOFTMAX FLOAT"] == 3
    assert read_engine(bundle, manifest, engine.key) == engine
    log = (bundle / "engines" / engine.key / "build.log").read_text()
    assert "Total Activation Memory" in log
    layers = [line for line in log.splitlines() if line.startswith("LAYER ")]
    assert len(layers) == sum(sum(plan.layers.values()) for plan in engine.plans.values())
    assert sum(line.endswith(": SOFTMAX FLOAT") for line in layers) == 3 + 4  # of layers and axes
    assert {path.name for path in (bundle / "engines").iterdir()} == {engine.key}

    said = []
    assert compile_bundle(bundle, "rtx", SMALL_TWO, said.append) == (engine, False)
    assert said == []
    for settings, part in (
        (SMALL, "profiles"),
        (BuildSettings(SMALL.profiles, capabilities=("8.9",)), "GPU"),
        (BuildSettings(SMALL.profiles, capabilities=("8.9",), level=1), "level"),
        (BuildSettings(SMALL.profiles, capabilities=("8.9",), level=1, workspace_gib=2.0), "workspace"),
    ):
        said.clear()
        other, built = compile_bundle(bundle, "rtx", settings, said.append)
        assert built
        assert said[0] == f"another engine than the last is needed: {part} changed"
        assert other.key != engine.key
    assert len(read_manifest(bundle).engines) == 5
    # What was asked for last is what those who score take, if it was there before, too.
    assert list(read_manifest(bundle).engines)[-1] == other.key
    assert compile_bundle(bundle, "rtx", SMALL_TWO) == (engine, False)
    assert list(read_manifest(bundle).engines)[-1] == engine.key
    assert len(read_manifest(bundle).engines) == 5
    # A last engine that is damaged has nothing to be compared with; the one before it has.
    (bundle / "engines" / engine.key / "engine.json").write_text("{")
    said.clear()
    compile_bundle(
        bundle, "rtx", BuildSettings(SMALL_TWO.profiles, capabilities=("8.9",), level=1, workspace_gib=2.0), said.append
    )
    assert said[0] == "another engine than the last is needed: profiles changed"


def test_a_damaged_engine_is_refused_and_built_anew(bundle):
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    plan = bundle / "engines" / engine.key / "head.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"head\.plan: sha256 is .* compile the bundle again"):
        read_engine(bundle, read_manifest(bundle), engine.key)
    manifest = read_manifest(bundle)
    found = not_opened("x", manifest, "fp16", "damaged")
    kinds = ("openvino cpu fp32", f"tensorrt cuda fp16 {engine.key[:16]}")
    write_manifest(bundle, msgspec.structs.replace(manifest, verified=dict.fromkeys(kinds, found)))
    said = []
    again, built = compile_bundle(bundle, "rtx", SMALL, said.append)
    assert built
    assert said[0].startswith("this engine is damaged, and is built anew (")
    assert list(read_manifest(bundle).verified) == ["openvino cpu fp32"]  # nothing is known of the new engine
    assert read_engine(bundle, read_manifest(bundle), again.key).parts == engine.parts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: e["parts"].update(GPU="another"), "is not the engine"),
        (lambda e: e.update(key="0" * 64), "is not the engine"),
        (lambda e: e["plans"].pop("head"), "is not the engine"),
        (lambda e: e["plans"]["head"].update(file="../head.plan"), r"plan is '\.\./head\.plan', not head\.plan"),
        (lambda e: e.update(news=1), "unknown field `news`"),
    ],
)
def test_an_engine_that_is_not_what_it_says_is_refused_and_built_anew(bundle, change, told):
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    path = bundle / "engines" / engine.key / "engine.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["engines"][engine.key] = file_sha256(path)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"engine\.json: .*{told}.*; compile the bundle again"):
        read_engine(bundle, read_manifest(bundle), engine.key)
    assert compile_bundle(bundle, "rtx", SMALL)[1]
    assert read_engine(bundle, read_manifest(bundle), engine.key).parts == engine.parts


def test_an_engine_that_the_bundle_does_not_know_is_refused(bundle):
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    manifest = msgspec.structs.replace(read_manifest(bundle), engines={})
    with pytest.raises(BundleError, match="but the bundle says nothing"):
        read_engine(bundle, manifest, engine.key)


def during_a_build(monkeypatch, action):
    def build(*arguments):
        action()
        return build_plan(*arguments)

    monkeypatch.setattr("aesanet.export.compile.build_plan", build)


def test_two_compiles_at_a_time_keep_both_engines(bundle, monkeypatch):
    def other():
        monkeypatch.undo()
        compile_bundle(bundle, "rtx", SMALL_TWO)

    during_a_build(monkeypatch, other)
    compile_bundle(bundle, "rtx", SMALL)
    manifest = read_manifest(bundle)
    assert len(manifest.engines) == 2
    assert len({read_engine(bundle, manifest, key).parts["profiles"] for key in manifest.engines}) == 2


def test_all_engines_but_one_are_removed_and_nothing_else(bundle, capsys):
    first, _ = compile_bundle(bundle, "rtx", SMALL)
    kinds = ["openvino cpu fp32", f"tensorrt cuda fp16 {first.key[:16]}"]
    found = not_opened(kinds[0], read_manifest(bundle), "fp32", "no reason")
    manifest = msgspec.structs.replace(
        read_manifest(bundle),
        verified=dict.fromkeys(kinds, found),
        # As nobody's bundle has it, but one from a stranger may.
        engines=read_manifest(bundle).engines | {"../../kept": "0" * 64},
    )
    write_manifest(bundle, manifest)
    outside, under_way = bundle.parent / "kept", bundle / "engines" / ".0123abcd.of another build"
    outside.mkdir()
    under_way.mkdir()
    size = sum(file.stat().st_size for file in (bundle / "engines" / first.key).iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["compile", str(bundle), "--flavour", "rtx", "--profiles", "4:1", "--prune"])
    assert stopped.value.code == 0
    assert f"1 other engine removed, {size / 2**20:.1f} MiB" in capsys.readouterr().out
    manifest = read_manifest(bundle)
    (kept,) = manifest.engines
    assert kept != first.key
    assert read_engine(bundle, manifest, kept)
    assert {path.name for path in (bundle / "engines").iterdir() if path.is_dir()} == {kept, under_way.name}
    assert list(manifest.verified) == kinds[:1]
    assert outside.is_dir()


def test_no_engine_is_removed_for_one_that_is_gone(bundle):
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    with pytest.raises(CompileError, match="engine 0000000000000000 was removed meanwhile; none is removed now"):
        prune_engines(bundle, kept="0" * 64)
    assert read_engine(bundle, read_manifest(bundle), engine.key)


def test_an_engine_that_cannot_be_removed_is_told(bundle, monkeypatch):
    first, _ = compile_bundle(bundle, "rtx", SMALL)
    second, _ = compile_bundle(bundle, "rtx", SMALL_TWO)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("aesanet.export.compile.shutil.rmtree", refuse)
    with pytest.raises(CompileError, match=rf"engines cannot be removed: .*{first.key}: Permission denied"):
        prune_engines(bundle, kept=second.key)
    monkeypatch.undo()
    assert list(read_manifest(bundle).engines) == [second.key]
    assert prune_engines(bundle, kept=second.key)[0] == 1  # the folder that was left
    assert not (bundle / "engines" / first.key).exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_bundle_that_was_exported_anew_meanwhile_gets_no_old_engine(bundle, monkeypatch, replaced):
    def export():
        if replaced:  # as export does it, and with it goes where the engine is written
            with new_bundle(bundle) as folder:
                for file in bundle.iterdir():
                    if file.is_file():
                        shutil.copy(file, folder)
        path = bundle / "head.fp16.onnx"
        path.write_bytes(path.read_bytes() + b"\xfa\x07\x00")
        manifest = read_manifest(bundle)
        specs = manifest.half.graphs
        head = msgspec.structs.replace(specs["head"], sha256=file_sha256(path))
        half = msgspec.structs.replace(manifest.half, graphs={**specs, "head": head})
        write_manifest(bundle, msgspec.structs.replace(manifest, half=half))
        monkeypatch.undo()

    during_a_build(monkeypatch, export)
    with pytest.raises(CompileError, match="was exported anew meanwhile; compile it again"):
        compile_bundle(bundle, "rtx", SMALL)
    assert read_manifest(bundle).engines == {}


def test_a_full_disk_is_one_error_and_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    before = (bundle / "bundle.json").read_bytes()

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    during_a_build(monkeypatch, full)
    with pytest.raises(CompileError, match="the engine cannot be written: No space left on device"):
        compile_bundle(bundle, "rtx", SMALL)
    assert (bundle / "bundle.json").read_bytes() == before
    assert [path.name for path in (bundle / "engines").iterdir()] == ["build.log"]
    monkeypatch.undo()
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    assert [path.name for path in (bundle / "engines").iterdir()] == [engine.key]


def test_a_disk_that_is_full_at_the_very_end_leaves_no_engine_that_nobody_knows(bundle, monkeypatch):
    before = (bundle / "bundle.json").read_bytes()

    def full(folder, manifest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aesanet.export.compile.write_manifest", full)
    with pytest.raises(CompileError, match="the engine cannot be written: No space left on device"):
        compile_bundle(bundle, "rtx", SMALL)
    assert (bundle / "bundle.json").read_bytes() == before
    assert [path.name for path in (bundle / "engines").iterdir()] == ["build.log"]


def test_an_engine_that_cannot_be_read_does_not_keep_others_from_being_built(bundle):
    first, _ = compile_bundle(bundle, "rtx", SMALL)
    plan = bundle / "engines" / first.key / "head.plan"
    plan.unlink()
    plan.symlink_to("/proc/self/mem")
    with pytest.raises(BundleError, match=r"head\.plan: cannot be read: "):
        read_engine(bundle, read_manifest(bundle), first.key)
    second, built = compile_bundle(bundle, "rtx", SMALL_TWO)
    assert built
    assert list(read_manifest(bundle).engines) == [first.key, second.key]


def test_a_manifest_that_cannot_be_written_is_known_before_anything_is_built(bundle, monkeypatch):
    def read_only(dir):
        assert dir == bundle
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    during_a_build(monkeypatch, lambda: pytest.fail("it was built"))
    with pytest.raises(CompileError, match="the engine cannot be written: Read-only file system"):
        compile_bundle(bundle, "rtx", SMALL)
    assert read_manifest(bundle).engines == {}


def test_tf32_is_allowed_where_it_is_exact_and_nowhere_else(tiny_checkpoint, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(half_room, "_LOGITS", ({"encoder": "fp32", "head": "fp16"},))
    out = tmp_path / "b"
    assert export_bundle(tiny_checkpoint, out, half_on=clips[:1]).half.logits["encoder"] == "fp32"
    allowed = []

    def build(trt, path, spec, settings, tf32, *rest):
        allowed.append((path.name, tf32))
        return build_plan(trt, path, spec, settings, tf32, *rest)

    monkeypatch.setattr("aesanet.export.compile.build_plan", build)
    engine, _ = compile_bundle(out, "rtx", SMALL)
    assert engine.parts["TF32"] == "encoder"
    assert allowed == [("frontend.onnx", False), ("encoder.fp16.onnx", True), ("head.fp16.onnx", False)]
    # All float products of that encoder are logits, whose factors are half numbers (see test_precision).
    assert engine.plans["encoder"].layers["MATRIX_MULTIPLY FLOAT"] == 3


def test_capabilities_are_the_librarys(trt, bundle):
    assert {"8.0", "8.9", "12.0"} <= known_capabilities(trt).keys()
    with pytest.raises(CompileError, match=r"compute capability 9\.0: tensorrt_rtx [\d.]+ builds for 8\.0, 8\.6"):
        compile_bundle(bundle, "rtx", BuildSettings(SMALL.profiles, capabilities=("8.9", "9.0")))
    assert read_manifest(bundle).engines == {}
    assert not (bundle / "engines").exists()


INTERRUPTED = """
import os, signal, sys
from aesanet.export import engine
from aesanet.export.compile import compile_bundle
from aesanet.export.profiles import make_profiles
from aesanet.interrupts import interrupt_on_sigterm

engine._SECONDS_BETWEEN_NEWS = 0.0

def progress(news):
    print(news, flush=True)
    if news.startswith("frontend.onnx: "):  # as TensorRT calls back
        os.kill(os.getpid(), number)

interrupt_on_sigterm()
number = signal.Signals[sys.argv[2]]
try:
    compile_bundle(sys.argv[1], "rtx", engine.BuildSettings(make_profiles([(1.0, 2)])), progress)
except KeyboardInterrupt:
    assert signal.getsignal(number) is signal.default_int_handler
    sys.exit(130)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_a_compile_at_once(name, bundle):
    """TensorRT drops exceptions of what it calls back, and would go on to the end."""
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", INTERRUPTED, str(bundle), name]
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=reset)
    assert found.returncode == 130, found.stderr
    assert "Exception caught" not in found.stderr
    news = found.stdout.splitlines()
    assert news[0] == "compiling frontend.onnx"
    assert news[1].startswith("frontend.onnx: ")
    assert len(news) == 2
    assert read_manifest(bundle).engines == {}
    assert [path.name for path in (bundle / "engines").iterdir()] == ["build.log"]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("7.0", False), ("7.5", False), ("8.0", True), ("9.0", False), ("10.0", False), ("12.0", True), ("13.0", True)],
)
def test_rtx_runs_where_it_has_kernels(trt, bundle, monkeypatch, capsys, capability, runs):
    """TensorRT-RTX 1.7.1 says on an H200 (9.0): "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0"."""
    gpu = Gpu("NVIDIA X", capability, "for CUDA 13.0", "8192")
    assert runs_on(trt, gpu) == runs
    assert runs_on(types.SimpleNamespace(), gpu)  # TensorRT, which names none
    monkeypatch.setattr("aesanet.gpu.cuda_gpu", lambda cuda: gpu)
    with pytest.raises(SystemExit):
        main(["compile", str(bundle), "--flavour", "rtx", "--profiles", "4:1"])
    assert ("does not run on NVIDIA X" in capsys.readouterr().err) != runs


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_cu12", "tensorrt_cu13"])
def test_a_library_is_known_by_any_of_its_packages(monkeypatch, capsys, package):
    def version(name):
        if name != package:
            raise importlib.metadata.PackageNotFoundError(name)
        return "10.13"

    monkeypatch.setattr("aesanet.engines.version", version)
    assert library_version("tensorrt") == "10.13"
    assert library_version("rtx") is None
    assert machine_parts("tensorrt", types.SimpleNamespace(__version__="10.13"), (), None)["library"] == (
        f"tensorrt 10.13, CUDA {package.partition('_cu')[2] or 'unknown'}"
    )
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "tensorrt 10.13" in capsys.readouterr().out


def test_a_bundle_without_half_graphs_says_how_to_get_them(tiny_bundle):
    with pytest.raises(BundleError, match="has no FP16 graphs; export the checkpoint again with --fp16"):
        compile_bundle(tiny_bundle, "rtx", SMALL)


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.text()))
def test_keys_are_alike_only_if_all_parts_are(some, others):
    assert (parts_sha256(some) == parts_sha256(others)) == (some == others)
    assert parts_sha256(dict(reversed(some.items()))) == parts_sha256(some)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_tensorrt_only_where_it_and_a_gpu_are(nvidia_smi, monkeypatch, installed, gpu):
    nvidia_smi("echo 'NVIDIA L4, 8.9, 580.1, 23034'" if gpu else "exit 9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: (installed and name == "tensorrt") or None)
    assert choose_flavour("auto") == ("tensorrt" if installed and gpu else "rtx")
    assert choose_flavour("tensorrt") == "tensorrt"


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_a_plan_of_tensorrt_is_for_the_gpu_and_driver_that_are_here(bundle, tmp_path, monkeypatch, trt):
    """Built with RTX in TensorRT's place, which cannot build without a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("aesanet.export.compile.load_library", lambda flavour: trt)

    def on(gpu):
        monkeypatch.setattr("aesanet.export.compile.load_cuda", lambda: None)
        monkeypatch.setattr("aesanet.export.compile.cuda_gpu", lambda cuda: gpu)

    h200, mig = Gpu("NVIDIA H200", "9.0", "for CUDA 13.0", "143771"), Gpu("NVIDIA H200 MIG 1g.18gb", "9.0", "", "18000")
    keys = set()
    for gpu in (h200, mig, dataclasses.replace(h200, driver="for CUDA 13.1")):
        on(gpu)
        engine, built = compile_bundle(bundle, "tensorrt", SMALL)
        assert built
        assert engine.parts["GPU"] == str(gpu)
        assert misfits(engine, trt, gpu) == []
        keys.add(engine.key)
    assert len(keys) == 3
    (told,) = misfits(engine, trt, h200)
    assert told == f"it was built for GPU {gpu}, and here is {h200}"


def test_without_a_gpu_tensorrt_says_where_to_compile(bundle, monkeypatch, trt):
    monkeypatch.setattr("aesanet.export.compile.load_library", lambda flavour: trt)

    def none():
        raise BackendError("no driver")

    monkeypatch.setattr("aesanet.export.compile.load_cuda", none)
    with pytest.raises(CompileError, match="there is none: no driver; compile on the machine that will score"):
        compile_bundle(bundle, "tensorrt", SMALL)


def test_the_command_says_what_went_into_the_engine(bundle, capsys):
    for expected in ("built", "was there"):
        with pytest.raises(SystemExit) as stopped:
            main(["compile", str(bundle), "--profiles", "4:2@1,4:3-3", "--capability", "12.0, 8.9,8.9"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].endswith(f": {expected}")
        assert "GPU: compute capability 8.9, 12.0" in out
        of_them = "of 2800 to 64000 samples"
        assert f"profiles: 1 to 2 clips (kernels for 1) {of_them}; 3 to 3 clips {of_them}" in out
        assert re.search(r"encoder\.plan: [\d.]+ MiB in [\d.]+ s; activations \d+, \d+ MiB", out)


def test_a_checkpoint_becomes_engines_in_one_command(tiny_checkpoint, tmp_path, capsys):
    command = ["build", str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--capability", "9.0"])
    assert stopped.value.code == 2
    assert "compute capability 9.0" in capsys.readouterr().err
    for more, told in (
        (["--html", str(tmp_path / "none" / "x.html")], "not a place for a page"),
        (["--backend", "tensorrt"], "tensorrt: "),
        (["--workspace", "nan"], "not a finite number"),
    ):
        if told == "tensorrt: " and "tensorrt" in {name for name, can in supported_backends().items() if can.runs}:
            continue
        with pytest.raises(SystemExit) as stopped:
            main([*command, *more])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # before anything was exported
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--capability", "8.9", "--profiles", "4:2", "--html", str(tmp_path / "page.html")])
    assert stopped.value.code == 0
    page = (tmp_path / "page.html").read_text()
    for part in ("compute capability 8.9", "1 to 2 clips of 2800 to 64000 samples", "encoder</td>", "FP16, fused"):
        assert part in page
    out = capsys.readouterr().out
    told = ("parity with PyTorch", "FP16 (attention logits in fp16)", ": built", "onnxruntime cpu fp16: passed")
    assert [word in out for word in told] == [True] * 4
    manifest = read_manifest(tmp_path / "b")
    assert "onnxruntime cpu fp32" in manifest.verified
    assert read_engine(tmp_path / "b", manifest, *manifest.engines).parts["GPU"] == "compute capability 8.9"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profiles", "ten"], "give longest seconds and largest batch, such as 2:128,10:64"),
        (["--profiles", "10:0"], "a profile of 0 clips"),
        (["--profiles", "10:4@"], "after an @ the batch that kernels are chosen for, if it is another: 10:64@16"),
        (["--profiles", "10:4@5"], "a profile of 1 to 4 clips that is best at 5; that must be one of these"),
        (["--profiles", "10:5-4"], "a profile of 5 to 4 clips; the fewest must be from 1 to the most"),
        (["--profiles", "10:-4"], "before a dash the smallest, if it is not one clip: 10:32-64"),
        (["--profiles", "5:4,5:4"], "two profiles up to 5 s and 4 clips; give each once"),
        (
            ["--profiles", "1:2"],
            "the longest is 1 s, and this bundle's windows have 4 s: add one of these, such as 4:2",
        ),
        (["--profiles", "700:1"], "a profile up to 700 s; it must be from 0.175 to 600 s"),
        (["--capability", " ,"], "--capability: ' ,' names none; give some, such as 8.0,8.9,12.0"),
        (["--workspace", "nan"], "'nan' is not a finite number"),
        (["--workspace", "inf"], "inf is not in the range 0<x<=1024|is not a finite number"),
        (["--capability", "7.5"], r"compute capability 7\.5: tensorrt_rtx [\d.]+ builds for 8\.0"),
    ],
)
def test_the_command_refuses_with_a_reason(bundle, capsys, arguments, told):
    with pytest.raises(SystemExit) as stopped:
        main(["compile", str(bundle), *arguments])
    assert stopped.value.code == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorrt")), reason="TensorRT is here")
def test_a_library_that_is_missing_is_named_with_its_extra(bundle):
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*: pip install 'aesanet\[gpu\]'"):
        compile_bundle(bundle, "tensorrt", SMALL)


def test_what_a_killed_build_left_is_removed_a_day_later(bundle):
    engines = bundle / "engines"
    for name, age in ((".old.abc", 2 * 86_400), (".new.abc", 60)):
        (engines / name).mkdir(parents=True)
        then = time.time() - age
        os.utime(engines / name, (then, then))
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    assert {path.name for path in engines.iterdir()} == {".new.abc", engine.key}
