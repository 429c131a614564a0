"""FP16 graphs: which types they hold, that their rounding is seen, and when they are refused."""

import copy
import json
import re
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import RECORDINGS
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from aesanet.bundle import HALF_GRAPH_NAMES, read_manifest
from aesanet.cli.main import main
from aesanet.errors import BackendError, BundleError, ExportError
from aesanet.export.build import export_bundle
from aesanet.export.half import add_half, round_as_written
from aesanet.export.precision import to_half
from aesanet.hashing import file_sha256
from aesanet.lengths import num_tokens
from aesanet.models.demo import samples
from aesanet.runtime.decode import ClipReader
from aesanet.runtime.rows import Clip
from aesanet.runtime.scorer import Scorer

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
ISLANDS = {"LayerNormalization", "Softmax", "LSTM", "ReduceSum", "Sigmoid"}


@pytest.fixture(scope="module")
def clips():
    """The first two seconds of every recording."""
    return [np.concatenate(list(ClipReader(Clip(str(path), 0.0, 2.0)))) for path in RECORDINGS]


@pytest.fixture(scope="module")
def half_bundle(tiny_checkpoint, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "tiny.bundle"
    said = []
    export_bundle(tiny_checkpoint, out, half_on=clips, progress=said.append)
    assert said[-1] == "rounding to FP16, attention logits in fp16"
    return out


def typed(path_or_model):
    """The graph, and the type of every tensor in it as onnx itself infers it, from inputs and weights alone."""
    proto = copy.deepcopy(path_or_model) if isinstance(path_or_model, onnx.ModelProto) else onnx.load(path_or_model)
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return proto.graph, types | {t.name: t.data_type for t in proto.graph.initializer}


def logits_of(graph):
    """Names of the products of queries and keys, found backwards from each softmax."""
    made_by = {name: node for node in graph.node for name in node.output}
    found = []
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        node = made_by[softmax.input[0]]
        while node.op_type != "MatMul":
            node = next(
                made_by[n]
                for n in node.input
                if n in made_by and made_by[n].op_type in ("MatMul", "Where", "Add", "Cast")
            )
        found.append(node.output[0])
    return found


@pytest.mark.parametrize("logits", ["fp16", "fp32"])
@pytest.mark.parametrize("name", HALF_GRAPH_NAMES)
def test_products_are_half_and_islands_are_float(tiny_bundle, name, logits):
    model = ir.load(tiny_bundle / f"{name}.onnx")
    to_half(model, logits)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    graph, types = typed(proto)
    of_queries_and_keys = set(logits_of(graph))
    assert len(of_queries_and_keys) == {"encoder": 3, "head": 4}[name]  # layers, axes
    products = {node.output[0] for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")}
    assert of_queries_and_keys < products
    for node in graph.node:
        if node.output[0] in products:
            kept = logits == "fp32" and node.output[0] in of_queries_and_keys
            assert types[node.output[0]] == (FLOAT if kept else HALF), node.name
        elif node.op_type in ISLANDS:
            assert types[node.output[0]] == FLOAT, node.name
    weights = {t.name for t in graph.initializer}
    # Residuals, logits and their bias, the mix of layers.
    sums_of_two = [node for node in graph.node if node.op_type == "Add" and not weights & set(node.input)]
    assert HALF not in {types[node.output[0]] for node in sums_of_two}
    # Half weights for products, and none that nothing uses.
    used = {name for node in graph.node for name in node.input}
    assert weights <= used
    matrices = [n for node in graph.node if node.op_type in ("MatMul", "Conv") for n in node.input if n in weights]
    assert matrices
    assert {types[name] for name in matrices} == {HALF}
    # No tensor is cast twice, and no cast is cast back.
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    assert len(set(casts.values())) == len(casts)
    assert not casts.keys() & casts.values()
    before = onnx.load(tiny_bundle / f"{name}.onnx").graph
    for ours, theirs in zip((*graph.input, *graph.output), (*before.input, *before.output), strict=True):
        assert ours.name == theirs.name
        assert ours.type == theirs.type


def test_operands_of_float_logits_are_half_numbers(tiny_bundle):
    """So that TF32, which keeps ten bits of a factor, multiplies them exactly."""
    model = ir.load(tiny_bundle / "encoder.onnx")
    to_half(model, "fp32")
    graph, types = typed(ir.to_proto(model))
    made_by = {name: node for node in graph.node for name in node.output}
    for name in logits_of(graph):
        for operand in made_by[name].input:
            assert made_by[operand].op_type == "Cast"
            assert types[made_by[operand].input[0]] == HALF


def test_the_graph_that_is_checked_is_rounded_where_it_is_half():
    """ONNX Runtime on a CPU leaves roundings out; with two Identities after each half tensor it does not."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(0, 20, (64, 64)).astype(np.float16), "w")
    bias = numpy_helper.from_array(rng.normal(0, 20, 64).astype(np.float16), "b")
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=HALF),
        helper.make_node("MatMul", ["half", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, [8, 64]) for name in "xy")
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight, bias]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    given = {"x": rng.normal(size=(8, 64)).astype(np.float32)}
    half = given["x"].astype(np.float16).astype(np.float64)
    product = (half @ numpy_helper.to_array(weight).astype(np.float64)).astype(np.float16)
    expected = product + numpy_helper.to_array(bias)  # NumPy rounds each of the two to half

    def run(proto):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(["y"], given)[0]

    assert (run(proto) != expected).any()
    model = ir.from_proto(proto)
    round_as_written(model)
    np.testing.assert_array_equal(run(ir.to_proto(model)), expected)


@pytest.mark.parametrize("name", HALF_GRAPH_NAMES)
def test_rounding_agrees_with_the_reference_evaluator(half_bundle, clips, name):
    """onnx's own evaluator computes each node in its own type, in NumPy."""
    clip = clips[0][:8_000]
    tokens = num_tokens(np.array([len(clip)]))
    path = half_bundle / f"{name}.fp16.onnx"

    def session(proto, level="ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        return onnxruntime.InferenceSession(proto, options)

    (fbank,) = session(half_bundle / "frontend.onnx").run(None, {"waveform": clip[None]})
    (features,) = session(half_bundle / "encoder.onnx").run(None, {"fbank": fbank, "num_tokens": tokens})
    inputs = {"fbank": fbank} if name == "encoder" else {"features": features}
    inputs["num_tokens"] = tokens
    rounded = ir.load(path)
    round_as_written(rounded)
    (ours,) = session(ir.to_proto(rounded).SerializeToString()).run(None, inputs)
    (theirs,) = ReferenceEvaluator(onnx.load(path)).run(None, inputs)
    (full,) = session(half_bundle / f"{name}.onnx").run(None, inputs)
    # Both have rounded, each in its own order of summation.
    assert np.abs(ours - theirs).max() < np.abs(theirs - full).max()
    assert np.linalg.norm(theirs - full) / np.linalg.norm(full) < 5e-3


def test_the_manifest_tells_what_was_measured(half_bundle, clips):
    half = read_manifest(half_bundle).half
    assert half.clips == len(clips) == 8
    assert half.seconds == pytest.approx(sum(map(len, clips)) / 16_000)
    assert 0 < half.features_relative <= half.features_limit == 5e-3
    assert 0 < half.scores_max_abs <= half.scores_limit == 0.02
    for name, spec in half.graphs.items():
        assert spec.file == f"{name}.fp16.onnx"
        assert spec.precision == "fp16"
        assert spec.sha256 == file_sha256(half_bundle / spec.file)


def edited(bundle, folder, changes):
    """A copy of the bundle in which the encoder's weights that end in a name are what a function makes of them."""
    shutil.copytree(bundle, folder)
    proto = onnx.load(folder / "encoder.onnx")
    for tensor in proto.graph.initializer:
        for name, change in changes.items():
            if tensor.name.endswith(name):
                changed = change(numpy_helper.to_array(tensor)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(proto, folder / "encoder.onnx")
    return folder


def shared_direction(bias):
    """Queries and keys of a head have this in common, which raises the logits of all keys by 300 alike."""
    heads = 4
    direction = np.random.default_rng(0).normal(size=(heads, len(bias) // heads))
    length = np.sqrt(300 * np.sqrt(direction.shape[1]))
    return bias + (length * direction / np.linalg.norm(direction, axis=1, keepdims=True)).ravel()


def test_loud_attention_keeps_its_logits_in_float(tiny_bundle, clips, tmp_path):
    """As half they would be rounded to steps of .25; FP16 is then not given up, and not let through either."""
    loud = edited(tiny_bundle, tmp_path / "b", {"q_proj.bias": shared_direction, "k_proj.bias": shared_direction})
    said = []
    half = add_half(loud, read_manifest(loud).graphs, clips[:1], said.append)
    assert said == ["rounding to FP16, attention logits in fp16", "rounding to FP16, attention logits in fp32"]
    assert half.logits == "fp32"


@pytest.mark.parametrize(
    ("weight", "factor", "told"),
    [
        ("layers.1.fc1.bias", 1e6, r"layers\.1\.fc1\.bias holds [\d.e+]+; FP16 ends at 65504"),
        ("layers.1.final_layer_norm.weight", 1e6, "FP16 does not keep this checkpoint's scores: .* nan and .* in fp16"),
    ],
)
def test_a_checkpoint_that_overflows_half_is_refused(tiny_bundle, clips, tmp_path, weight, factor, told):
    big = edited(tiny_bundle, tmp_path / "b", {weight: lambda value: factor * value})
    with pytest.raises(ExportError, match=told):
        add_half(big, read_manifest(big).graphs, clips[:1])


def test_a_changed_half_graph_is_refused(half_bundle, tmp_path):
    shutil.copytree(half_bundle, tmp_path / "b")
    path = tmp_path / "b" / "head.fp16.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"head\.fp16\.onnx: sha256 is"):
        Scorer.open(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text())
    del manifest["half"]["graphs"]["head"]
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"half\.graphs is \('encoder',\)"):
        Scorer.open(tmp_path / "b")


def test_the_command_makes_half_graphs_and_says_what_was_measured(tiny_checkpoint, tmp_path, capsys):
    arguments = ["export", str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--fp16", "--audio", str(RECORDINGS[0])]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert re.search(
        r"FP16 \(attention logits in fp16\) and FP32 on 1 clip, 3 s: features \d\.\de-0\d .*, scores \d", told
    )
    assert read_manifest(tmp_path / "b").half.clips == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--audio", "a.wav"], "--audio is what --fp16 is checked on; give --fp16 too"),
        (["--fp16", "--audio", "nothing.wav"], "nothing.wav: no such file.*; --audio must be readable"),
        (["--fp16", "--audio", "EMPTY"], "no audio in .* that is long enough"),
    ],
)
def test_audio_to_check_on_that_cannot_be_used(tiny_checkpoint, tmp_path, capsys, arguments, told):
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "empty") if argument == "EMPTY" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tiny_checkpoint), "--out", str(tmp_path / "b"), *given])
    assert stopped.value.code == 2
    assert re.search(told, capsys.readouterr().err)


def test_the_samples_come_with_the_package():
    assert samples() == RECORDINGS


def test_a_bundle_without_half_graphs_says_how_to_get_them(tiny_bundle):
    with pytest.raises(BackendError, match="the bundle has no FP16 graphs: export the checkpoint again with --fp16"):
        Scorer.open(tiny_bundle, precision="fp16")
