"""Graphs in operators of ONNX Runtime: the same numbers as the plain ones, and what they are made of."""

import json
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from simulated_cuda_provider import CudaProvider

from aesanet.bundle import HALF_GRAPH_NAMES, graph_hashes, read_manifest
from aesanet.errors import BundleError, ExportError
from aesanet.export import half
from aesanet.export.fusion import DOMAIN, fuse
from aesanet.export.half import add_half
from aesanet.export.precision import to_half
from aesanet.export.writer import write_manifest
from aesanet.hashing import file_sha256
from aesanet.lengths import MEL_BINS
from aesanet.runtime.backends import onnxruntime as onnxruntime_backend
from aesanet.runtime.backends import open_exactly
from aesanet.runtime.backends.base import BundleFiles, EngineOptions


def fused(path):
    model = ir.load(path)
    fuse(model)
    return model


def session(model):
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions(tiny_bundle):
    """Of encoder and head, plain and fused."""
    return {
        name: (onnxruntime.InferenceSession(path), session(fused(path)))
        for name in HALF_GRAPH_NAMES
        for path in [tiny_bundle / f"{name}.onnx"]
    }


def proto_of(spec, bundle):
    return onnx.load(bundle / spec.file).graph.initializer


def inputs_of(name, width, patches, rng):
    """A padded batch of clips of so many patches of 8 tokens each."""
    tokens = 8 * np.array(patches)
    if name == "encoder":
        # Frames that fill no patch have no token.
        first = rng.normal(0, 0.5, (len(patches), 16 * max(patches) + rng.integers(16), MEL_BINS))
        return {"fbank": first.astype(np.float32), "num_tokens": tokens}
    first = rng.normal(0, 1, (len(patches), tokens.max(), width))
    return {"features": first.astype(np.float32), "num_tokens": tokens}


@pytest.mark.parametrize("name", HALF_GRAPH_NAMES)
@settings(max_examples=25)
@given(patches=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_fused_graphs_give_the_same_numbers(sessions, name, patches, seed):
    plain, ours = sessions[name]
    width = plain.get_inputs()[0].shape[2]
    inputs = inputs_of(name, width, patches, np.random.default_rng(seed))
    (expected,), (found,) = (one.run(None, inputs) for one in (plain, ours))
    for row, count in enumerate(inputs["num_tokens"]):
        own = slice(count) if name == "encoder" else slice(None)
        scale = np.abs(expected[row, own]).max()
        assert np.abs(found[row, own] - expected[row, own]).max() < 2e-5 * scale


SIZES = [(1, 1, 4), (2, 2, 6), (5, 1, 3), (8, 4, 8), (9, 2, 4), (128, 2, 4)]


@pytest.mark.parametrize(("taps", "groups", "width"), SIZES)
def test_a_convolution_of_any_size_is_a_product(taps, groups, width):
    """Against PyTorch's: the positional one of a network of that size."""
    rng = np.random.default_rng(taps)
    kernel = rng.normal(size=(width, width // groups, taps)).astype(np.float32)
    bias = rng.normal(size=width).astype(np.float32)
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    positions (float[batch, tokens, {width}] x, int64[batch] num_tokens) => (float[batch, tokens, {width}] y)
    <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{
        turned = Transpose<perm = [0, 2, 1]>(x)
        around = Conv<group = {groups}, pads = [{taps // 2}, {taps // 2}]>(turned, kernel, bias)
        length = Shape<start = 1, end = 2>(x)
        cut = Slice(around, zero, length, two, one)
        bent = Gelu(cut)
        back = Transpose<perm = [0, 2, 1]>(bent)
        y = Add(x, back)
    }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(bias, "bias")])
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    fuse(model)
    assert not any(node.op_type == "Conv" for node in model.graph)
    x = rng.normal(size=(2, 24, width)).astype(np.float32)
    (found,) = session(model).run(None, {"x": x, "num_tokens": np.array([24, 24])})
    with torch.inference_mode():
        given_ = [torch.from_numpy(array) for array in (np.ascontiguousarray(x.transpose(0, 2, 1)), kernel, bias)]
        around = torch.nn.functional.conv1d(*given_, padding=taps // 2, groups=groups)[:, :, :24]
        expected = x + torch.nn.functional.gelu(around).transpose(1, 2).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution_of_patches_is_a_product(biased):
    rng = np.random.default_rng(0)
    kernel, bias = (rng.normal(size=size).astype(np.float32) for size in ((6, 1, 16, 16), 6))
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    patches (float[batch, frames, 64] x, int64[batch] num_tokens) => (float[batch, tokens, 6] y)
    <int64[1] one = {{1}}, int64[3] sizes = {{0, 6, -1}}> {{
        image = Unsqueeze(x, one)
        found = Conv<strides = [16, 16]>(image, kernel{", bias" if biased else ""})
        flat = Reshape(found, sizes)
        turned = Transpose<perm = [0, 2, 1]>(flat)
        y = Relu(turned)
    }}"""
    proto = onnx.parser.parse_model(text)
    weights = {"kernel": kernel, **({"bias": bias} if biased else {})}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    fuse(model)
    assert not any(node.op_type == "Conv" for node in model.graph)
    x = rng.normal(size=(3, 16 * 5 + 9, 64)).astype(np.float32)
    (found,) = session(model).run(None, {"x": x, "num_tokens": np.array([20] * 3)})
    with torch.inference_mode():
        image, *given_ = (torch.from_numpy(array) for array in (x[:, None], *weights.values()))
        expected = torch.nn.functional.conv2d(image, *given_, stride=16).flatten(2).transpose(1, 2).relu().numpy()
    assert found.shape == expected.shape == (3, 20, 6)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_is_slow_with_cuda_is_gone(tiny_bundle):
    layers = sum(node.op_type == "Softmax" for node in ir.load(tiny_bundle / "encoder.onnx").graph)
    for name, attentions in (("encoder", layers), ("head", 4)):
        nodes = list(fused(tiny_bundle / f"{name}.onnx").graph)
        ours = [node for node in nodes if node.domain == DOMAIN]
        assert [node.op_type for node in ours] == ["MultiHeadAttention"] * attentions
        assert not any(node.op_type == "Softmax" for node in nodes)
        assert sum(node.op_type == "ReduceSum" for node in nodes) == (name == "head")  # over a clip, of the gates none
        assert not any(node.op_type == "Conv" for node in nodes)


def test_a_bundles_fused_graphs_are_half_and_share_its_weights(half_bundle, tmp_path, monkeypatch, clips):
    found = read_manifest(half_bundle).half
    assert 0 < found.fused.features_relative <= found.features_limit
    assert 0 < found.fused.scores_max_abs <= found.scores_limit
    for name, spec in found.fused.graphs.items():
        assert (spec.file, spec.precision) == (f"{name}.fused.onnx", "fp16")
        assert (spec.inputs, spec.outputs) == (found.graphs[name].inputs, found.graphs[name].outputs)
        proto = onnx.load(half_bundle / spec.file)
        onnx.checker.check_model(proto, full_check=True)
        types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        products = [node for node in proto.graph.node if node.op_type == "MatMul"]
        assert {types[i] for node in products for i in node.input if i in types} == {TensorProto.FLOAT16}
    # A bundle whose weights lie beside their graphs has them once.
    monkeypatch.setattr("aesanet.export.graph._INSIDE_BYTES", 0)
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    beside = add_half(bundle, read_manifest(bundle).graphs, clips[:1])
    for name, spec in beside.fused.graphs.items():
        assert spec.weights == beside.graphs[name].weights == f"{name}.fp16.weights"
        weights = onnx.load(bundle / spec.file, load_external_data=False).graph.initializer
        inside = {tensor.name for tensor in weights if tensor.data_location != TensorProto.EXTERNAL}
        large = {
            tensor.name for tensor in proto_of(spec, half_bundle) if tensor.ByteSize() > 2048
        }  # onnx keeps the rest
        assert all(name.startswith("fused.") for name in inside & large)
        assert large - inside
        inside, outside = (onnxruntime.InferenceSession(folder / spec.file) for folder in (half_bundle, bundle))
        inputs = inputs_of(name, inside.get_inputs()[0].shape[2], [3], np.random.default_rng(0))
        assert np.array_equal(inside.run(None, inputs)[0], outside.run(None, inputs)[0])


def test_where_fused_graphs_do_not_keep_the_scores_the_bundle_does_without(half_bundle, clips, tmp_path, monkeypatch):
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    measured = iter([(1e-3, 0.01), (1e-2, 0.01)])
    monkeypatch.setattr(half, "_worst_differences", lambda *arguments: next(measured))
    found = add_half(bundle, read_manifest(bundle).graphs, clips[:1])
    assert found.fused is None
    assert not list(bundle.glob("*.fused.onnx"))


def test_engines_are_told_apart_by_their_graphs(half_bundle):
    manifest = read_manifest(half_bundle)
    half_graphs = manifest.half
    for form, graphs in (
        ("fp32", manifest.graphs),
        ("fp16", half_graphs.graphs),
        ("fused", half_graphs.fused.graphs),
    ):
        expected = {name: graphs.get(name, spec).sha256 for name, spec in manifest.graphs.items()}
        assert graph_hashes(manifest, form) == expected
    assert len({tuple(graph_hashes(manifest, form).values()) for form in ("fp32", "fp16", "fused")}) == 3


@pytest.mark.parametrize(
    ("version", "capability", "fused"),
    [
        ("1.31.1", 9.0, True),
        ("1.32.0", 9.0, True),
        ("2.0.0", 9.0, True),
        ("1.31.1", 8.9, False),
        ("1.32.0", 12.0, False),
        ("1.30.2", 9.0, False),
    ],
)
def test_fused_graphs_run_where_they_are_known_to_be_fast_and_exact(
    half_bundle, monkeypatch, version, capability, fused
):
    provider = CudaProvider()
    provider.__version__ = version
    monkeypatch.setitem(sys.modules, "onnxruntime", provider)
    monkeypatch.setattr(onnxruntime_backend, "compute_capability", lambda: capability)
    files = BundleFiles.open(half_bundle)
    backend = open_exactly(files, "onnxruntime", EngineOptions("cuda", "fp16"))
    assert backend.kind == f"onnxruntime cuda fp16{' fused' if fused else ''}"
    names = [Path(session.path).name for session in provider.sessions]
    assert names == ["frontend.onnx", *(f"{name}.{'fused' if fused else 'fp16'}.onnx" for name in HALF_GRAPH_NAMES)]
    assert graph_hashes(files.manifest, backend.form)["head"] == file_sha256(half_bundle / names[-1])


def test_a_bundle_without_fused_graphs_runs_the_plain_ones(half_bundle, tmp_path, monkeypatch):
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    manifest = read_manifest(bundle)
    write_manifest(bundle, msgspec.structs.replace(manifest, half=msgspec.structs.replace(manifest.half, fused=None)))
    provider = CudaProvider()
    monkeypatch.setitem(sys.modules, "onnxruntime", provider)
    monkeypatch.setattr(onnxruntime_backend, "compute_capability", lambda: 9.0)
    backend = open_exactly(BundleFiles.open(bundle), "onnxruntime", EngineOptions("cuda", "fp16"))
    assert backend.kind == "onnxruntime cuda fp16"


def test_a_manifest_with_half_of_the_fused_graphs_is_refused(half_bundle, tmp_path):
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    path = bundle / "bundle.json"
    content = json.loads(path.read_text())
    del content["half"]["fused"]["graphs"]["head"]
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"half\.fused is"):
        read_manifest(bundle)


def test_what_cannot_be_fused_is_exported_without(half_bundle, clips, tmp_path, monkeypatch):
    def none(model):
        raise ExportError("no such graph")

    monkeypatch.setattr(half, "fuse", none)
    bundle, said = shutil.copytree(half_bundle, tmp_path / "b"), []
    assert add_half(bundle, read_manifest(bundle).graphs, clips[:1], said.append).fused is None
    assert said[-1] == "no fused graphs: no such graph"
    assert not list(bundle.glob("*.fused.onnx"))


def test_a_damaged_fused_graph_is_refused(half_bundle, tmp_path):
    bundle = shutil.copytree(half_bundle, tmp_path / "b")
    with open(bundle / "head.fused.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"head\.fused\.onnx: sha256 is"):
        BundleFiles.open(bundle).graphs("fused")


def test_a_graph_of_another_shape_is_refused(tiny_bundle):
    model = ir.load(tiny_bundle / "encoder.onnx")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    between = ir.node("Identity", [softmax.inputs[0]])
    model.graph.insert_before(softmax, between)
    softmax.replace_input_with(0, between.outputs[0])
    with pytest.raises(ExportError, match="should have an input 1"):
        fuse(model)


def test_half_after_fusing_keeps_its_rules(tiny_bundle):
    for name in HALF_GRAPH_NAMES:
        model = fused(tiny_bundle / f"{name}.onnx")
        to_half(model, "fp16")
        for node in model.graph:
            types = {value.dtype for value in node.inputs if value is not None and value.dtype in (1, 10)}
            if node.op_type in ("MatMul", "MultiHeadAttention"):
                assert types == {ir.DataType.FLOAT16}
            if node.op_type in ("LayerNormalization", "LSTM", "Sigmoid"):
                assert types == {ir.DataType.FLOAT}
