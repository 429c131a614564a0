"""Engines, built by the real TensorRT-RTX: types as written, keys that miss nothing, refusals with their reason."""

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
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import RECORDINGS
from helpers import make_loud, typed
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aesanet.benchmarks.parity import not_opened
from aesanet.bundle import GRAPH_NAMES, HALF_GRAPH_NAMES, read_manifest, signature
from aesanet.cli.main import main
from aesanet.engines import (
    engine_key,
    known_capabilities,
    library_version,
    load_library,
    machine_parts,
    misfits,
    read_engine,
    runs_on,
)
from aesanet.errors import BackendError, BundleError, CompileError
from aesanet.export import engine as engine_room
from aesanet.export import half as half_room
from aesanet.export.build import export_bundle
from aesanet.export.compile import choose_flavour, compile_bundle, prune_engines
from aesanet.export.engine import Settings, build_plan, layer_types, parse
from aesanet.export.graph import export_graph, write_graph
from aesanet.export.half import add_half
from aesanet.export.precision import to_half
from aesanet.export.profiles import default_profiles, make_profiles
from aesanet.export.timing import TimingCache
from aesanet.export.writer import new_bundle, write_manifest
from aesanet.hashing import file_sha256
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, num_frames, num_tokens
from aesanet.machine import Gpu
from aesanet.models.config import AESANetConfig
from aesanet.models.untrained import untrained_model
from aesanet.runtime.backends import supported_backends

SMALL = Settings(profiles=make_profiles([(1.0, 2)]))
SMALL_TWO = Settings(profiles=make_profiles([(1.0, 2), (4.0, 3)]))
ISLANDS = {"NORMALIZATION", "SOFTMAX", "REDUCE", "LOOP_OUTPUT"}


pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")


@pytest.fixture(scope="module")
def trt():
    return load_library("rtx")


@pytest.fixture
def bundle(half_bundle, tmp_path):
    return shutil.copytree(half_bundle, tmp_path / "b")


def parsed(trt, path):
    """The network as TensorRT understood it; what made it must outlive it."""
    logger = engine_room._logger(trt, [])
    builder = trt.Builder(logger)
    return parse(trt, builder, logger, path), builder, logger


@pytest.mark.parametrize("logits", ["fp16", "fp32"])
@pytest.mark.parametrize("name", HALF_GRAPH_NAMES)
def test_tensorrt_reads_the_types_that_were_written(trt, tiny_bundle, tmp_path, name, logits):
    model = ir.load(tiny_bundle / f"{name}.onnx")
    to_half(model, logits)
    ir.save(model, tmp_path / "half.onnx")
    network, *_alive = parsed(trt, tmp_path / "half.onnx")
    graph = onnx.load(tmp_path / "half.onnx").graph
    operators = [node.op_type for node in graph.node]
    softmaxes, lstms = operators.count("Softmax"), operators.count("LSTM")
    layers = layer_types(network)
    products = [dtype for _, kind, dtype in layers if kind in ("MATRIX_MULTIPLY", "CONVOLUTION")]
    kept = softmaxes if logits == "fp32" else 0
    assert products.count("FLOAT") == kept + 2 * lstms  # a step of an LSTM multiplies input and state
    assert products.count("HALF") == operators.count("MatMul") + operators.count("Conv") - kept
    assert {dtype for _, kind, dtype in layers if kind in ISLANDS} == {"FLOAT"}
    assert sum(kind == "SOFTMAX" for _, kind, _ in layers) == softmaxes > 0
    inputs, outputs = signature(name, 32)
    for index, spec in enumerate(inputs):
        found = network.get_input(index)
        assert (found.name, found.dtype.name) == (spec.name, {"float32": "FLOAT", "int64": "INT64"}[spec.dtype])
        assert tuple(found.shape) == tuple(-1 if isinstance(size, str) else size for size in spec.shape)
    assert (network.get_output(0).name, network.get_output(0).dtype.name) == (outputs[0].name, "FLOAT")


@pytest.mark.parametrize("name", HALF_GRAPH_NAMES)
def test_a_plan_is_the_same_with_weights_beside_the_graph(trt, half_bundle, tmp_path, monkeypatch, name):
    monkeypatch.setattr("aesanet.export.graph._INSIDE_BYTES", 0)
    spec = read_manifest(half_bundle).half.graphs[name]
    sizes = []
    for _ in range(2):  # as where float logits are tried after half ones
        _, weights = write_graph(onnx.load(half_bundle / spec.file), tmp_path / spec.file)
        sizes.append((tmp_path / weights).stat().st_size)
    assert sizes[0] == sizes[1] > 10_000
    ours, theirs = (build_plan(trt, folder / spec.file, spec, SMALL, False, []) for folder in (tmp_path, half_bundle))
    assert ours.layers == theirs.layers
    assert ours.activation_bytes == theirs.activation_bytes
    assert len(ours.plan) == len(theirs.plan)


@pytest.fixture(scope="module")
def demo_graphs(demo_bundle, clips, tmp_path_factory):
    """Folder and specs of the demo's FP32 front end and FP16 encoder and head."""
    folder = shutil.copytree(demo_bundle, tmp_path_factory.mktemp("demo") / "b")
    graphs = read_manifest(folder).graphs
    return folder, {"frontend": graphs["frontend"], **add_half(folder, graphs, clips[:2]).graphs}


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_tensor_of_the_demo_is_of_the_type_and_shape_that_onnx_gives_it(trt, demo_graphs, name):
    """All that TensorRT knows by a name of the graph, layer by layer; its own are of loops and of casts in products."""
    folder, specs = demo_graphs
    path = folder / specs[name].file
    network, *_alive = parsed(trt, path)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
    found = {tensor.name: tensor for tensor in outputs}
    graph, types = typed(path)
    floats = {TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF"}
    made = [value for node in graph.node for value in node.output if types[value] in floats]
    known = [value for value in made if value in found]
    assert {value: found[value].dtype.name for value in known} == {value: floats[types[value]] for value in known}
    assert len(known) > 0.9 * len(made)

    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph.value_info
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred if value.name in known}
    assert len(shapes) > 0.9 * len(known)
    for value, dims in shapes.items():
        assert len(found[value].shape) == len(dims), value
        for size, dim in zip(found[value].shape, dims, strict=True):
            assert size == dim.dim_value or not dim.HasField("dim_value"), value


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_the_demo_compiles_for_three_gpus_and_all_profiles(trt, demo_graphs, name):
    folder, specs = demo_graphs
    settings = Settings(default_profiles(6.0), capabilities=("8.0", "8.9", "12.0"))
    built = build_plan(trt, folder / specs[name].file, specs[name], settings, False, [])
    assert len(built.plan) > 10_000
    assert len(built.activation_bytes) == 3  # of profiles


def test_the_front_end_is_all_float(trt, tiny_bundle):
    network, *_alive = parsed(trt, tiny_bundle / "frontend.onnx")
    assert "HALF" not in {dtype for _, _, dtype in layer_types(network)}


def test_a_bundle_is_compiled_once_and_known_by_all_its_parts(bundle, tmp_path):
    engine, built = compile_bundle(bundle, "rtx", SMALL_TWO)
    assert built
    manifest = read_manifest(bundle)
    assert list(manifest.engines) == [engine.key] == [engine_key(engine.parts)]
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
        (Settings(SMALL.profiles, capabilities=("8.9",)), "GPU"),
        (Settings(SMALL.profiles, capabilities=("8.9",), level=1), "level"),
        (Settings(SMALL.profiles, capabilities=("8.9",), level=1, workspace=2.0), "workspace"),
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
        bundle, "rtx", Settings(SMALL_TWO.profiles, capabilities=("8.9",), level=1, workspace=2.0), said.append
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


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_which_is_on_by_default_is_what_was_asked(trt, tiny_bundle, tf32):
    found = []

    class Recording:
        """The real builder, and what the flag is when a build begins."""

        def __init__(self, logger):
            self.real = trt.Builder(logger)
            found.append(self.real.create_builder_config().get_flag(trt.BuilderFlag.TF32))

        def __getattr__(self, name):
            return getattr(self.real, name)

        def build_serialized_network(self, network, config):
            found.append(config.get_flag(trt.BuilderFlag.TF32))
            return self.real.build_serialized_network(network, config)

    library = types.SimpleNamespace(**(vars(trt) | {"Builder": Recording}))
    spec = read_manifest(tiny_bundle).graphs["frontend"]
    assert build_plan(library, tiny_bundle / spec.file, spec, SMALL, tf32, []).plan
    assert found == [True, tf32]


def test_what_the_parser_cannot_take_is_told_with_its_node(trt, tmp_path):
    """TensorRT has no DFT."""
    node = helper.make_node("DFT", ["x"], ["y"], name="spectrum")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 2])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "dft.onnx")
    with pytest.raises(CompileError, match=r"dft\.onnx: tensorrt_rtx [\d.]+ cannot take it: node spectrum \(DFT\): \S"):
        parsed(trt, tmp_path / "dft.onnx")


def test_capabilities_are_the_librarys(trt, bundle):
    assert {"8.0", "8.9", "12.0"} <= known_capabilities(trt).keys()
    with pytest.raises(CompileError, match=r"compute capability 9\.0: tensorrt_rtx [\d.]+ builds for 8\.0, 8\.6"):
        compile_bundle(bundle, "rtx", Settings(SMALL.profiles, capabilities=("8.9", "9.0")))
    assert read_manifest(bundle).engines == {}
    assert not (bundle / "engines").exists()


INTERRUPTED = """
import os, signal, sys
from aesanet.export import engine
from aesanet.export.compile import compile_bundle
from aesanet.export.profiles import make_profiles

engine._SECONDS_BETWEEN_NEWS = 0.0

def progress(news):
    print(news, flush=True)
    if news.startswith("frontend.onnx: "):  # as TensorRT calls back
        os.kill(os.getpid(), signal.SIGINT)

try:
    compile_bundle(sys.argv[1], "rtx", engine.Settings(make_profiles([(1.0, 2)])), progress)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.exit(130)
"""


def test_ctrl_c_ends_a_compile_at_once(bundle):
    """TensorRT drops exceptions of what it calls back, and would go on to the end."""
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", INTERRUPTED, str(bundle)]
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
    monkeypatch.setattr("aesanet.machine.cuda_gpu", lambda cuda: gpu)
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
    assert (engine_key(some) == engine_key(others)) == (some == others)
    assert engine_key(dict(reversed(some.items()))) == engine_key(some)


bounds = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 4096)), min_size=1, max_size=4, unique=True)


@given(bounds, st.data())
def test_profiles_cover_every_length_up_to_the_longest(pairs, data):
    profiles = make_profiles(pairs)
    longest = max(seconds for seconds, _ in pairs)
    samples = data.draw(st.integers(MIN_SAMPLES, longest * SAMPLE_RATE))
    covering = [p for p in profiles if p.min_seconds * SAMPLE_RATE <= samples <= p.max_seconds * SAMPLE_RATE]
    assert covering
    inputs = {spec.name: spec for name in GRAPH_NAMES for spec in signature(name, 48)[0]}
    sizes = {
        "waveform": (1, samples),
        "fbank": (1, num_frames(samples), 128),
        "features": (1, num_tokens(samples), 48),
        "num_tokens": (1,),
    }
    for name, spec in inputs.items():
        smallest, best, largest = (np.array(shape) for shape in covering[0].shapes(spec))
        assert (smallest <= best).all()
        assert (best <= largest).all()
        assert (smallest <= sizes[name]).all()
        assert (sizes[name] <= largest).all()
        assert largest[0] == covering[0].max_batch


@pytest.mark.parametrize("window", [0.175, 1.0, 2.0, 6.0, 10.0, 30.0, 600.0])
def test_default_profiles_hold_the_window(window):
    ends = [profile.max_seconds for profile in default_profiles(window)]
    assert window in ends
    assert ends == sorted(set(ends))


def test_default_batches_fit_the_gpus_memory():
    batches = {
        memory: [p.max_batch for p in default_profiles(10.0, memory)] for memory in (None, 143_771, 8_192, 2_048, 1)
    }
    assert batches == {
        None: [128, 64, 20],
        143_771: [128, 64, 20],
        8_192: [128, 51, 17],
        2_048: [64, 13, 4],
        1: [1, 1, 1],
    }


@pytest.mark.parametrize("pairs", [[], [(0.1, 4)], [(601, 4)], [(5, 0)], [(5, 5000)], [(5, 4), (5, 4)]])
def test_profiles_that_make_no_sense(pairs):
    with pytest.raises(ValueError, match="profile"):
        make_profiles(pairs)


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
            main(["compile", str(bundle), "--profiles", "4:2", "--capability", "12.0, 8.9,8.9"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert out.splitlines()[0].endswith(f": {expected}")
        assert "GPU: compute capability 8.9, 12.0" in out
        assert re.search(r"encoder\.plan: [\d.]+ MiB in [\d.]+ s; activations \d+ MiB", out)


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
        main([*command, "--capability", "8.9", "--profiles", "4:2"])
    assert stopped.value.code == 0
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


@pytest.mark.slow
def test_a_loud_checkpoint_of_base_size_keeps_its_scores_and_compiles(trt, clips, tmp_path, measured):
    """Twelve layers with outlying channels and attention logits of 400; all graphs and profiles, for three GPUs."""
    model = make_loud(untrained_model(AESANetConfig(), seed=0), logit=400.0)
    graphs = {name: export_graph(model, name, tmp_path / f"{name}.onnx") for name in GRAPH_NAMES}
    del model
    half = add_half(tmp_path, graphs, clips[4:5])
    measured["base size, loud, FP16"] = (
        f"logits in {half.logits}, features {half.features_relative:.1e}, scores {half.scores_max_abs:.1e}"
    )
    assert half.logits["encoder"] == "fp32"
    settings = Settings(default_profiles(10.0), capabilities=("8.0", "8.9", "12.0"))
    for name, spec in {**graphs, **half.graphs}.items():
        built = build_plan(trt, tmp_path / spec.file, spec, settings, name == "encoder", [])
        measured[f"base size, {name}, RTX"] = (
            f"{built.seconds:.0f} s, activations {[size // 2**20 for size in built.activation_bytes]} MiB"
        )
        assert len(built.activation_bytes) == 3


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorrt")), reason="TensorRT is here")
def test_a_library_that_is_missing_is_named_with_its_extra(bundle):
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*: pip install 'aesanet\[gpu\]'"):
        compile_bundle(bundle, "tensorrt", SMALL)


# TensorRT's timing cache. RTX has the calls too, and says that they do nothing.
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_timings_are_kept_for_each_gpu_and_version_and_a_damaged_file_is_no_harm(
    trt, tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = {"library": "tensorrt 11", "GPU": "NVIDIA L4"}
    cache = TimingCache(machine)
    path = cache.file.path
    assert TimingCache(machine).file.path == path != TimingCache(machine | {"GPU": "NVIDIA H200"}).file.path
    spec = read_manifest(tiny_bundle).graphs["frontend"]
    build = functools.partial(build_plan, trt, tiny_bundle / spec.file, spec, SMALL, False, [], timing=cache)
    assert build().plan
    kept = path.read_bytes()
    assert kept
    taken = []
    real = cache.attach
    monkeypatch.setattr(cache, "attach", lambda config: (real(config), taken.append(config.get_timing_cache())))
    for content in (kept, b"damaged", b""):
        path.write_bytes(content)
        assert build().plan
    assert len(taken) == 3
    assert None not in taken
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, in which no folder can be made
    assert build_plan(trt, tiny_bundle / spec.file, spec, SMALL, False, [], timing=TimingCache(machine)).plan


def test_what_a_killed_build_left_is_removed_a_day_later(bundle):
    engines = bundle / "engines"
    for name, age in ((".old.abc", 2 * 86_400), (".new.abc", 60)):
        (engines / name).mkdir(parents=True)
        then = time.time() - age
        os.utime(engines / name, (then, then))
    engine, _ = compile_bundle(bundle, "rtx", SMALL)
    assert {path.name for path in engines.iterdir()} == {".new.abc", engine.key}
