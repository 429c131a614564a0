"""FP16 graphs: which types they hold, that their rounding is seen, and when they are refused."""

import json
import re
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import RECORDINGS
from helpers import typed
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from aesanet.axes import AXES
from aesanet.bundle import HALF_GRAPH_NAMES, read_manifest
from aesanet.cli.main import main
from aesanet.errors import BackendError, BundleError, ExportError
from aesanet.export import half, rounding
from aesanet.export.half import add_half
from aesanet.export.precision import to_half
from aesanet.export.rounding import round_as_written
from aesanet.hashing import file_sha256
from aesanet.lengths import num_tokens
from aesanet.models.demo import samples
from aesanet.padding import pad_batch
from aesanet.runtime import backends
from aesanet.runtime.backends.base import BundleFiles, EngineOptions, Support
from aesanet.runtime.backends.onnxruntime import OnnxRuntimeBackend, support
from aesanet.runtime.scorer import Scorer

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
ISLANDS = {"LayerNormalization", "Softmax", "LSTM", "ReduceSum", "Sigmoid"}


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


def test_an_onnxruntime_that_leaves_roundings_out_is_found_out(tiny_bundle, clips, tmp_path, monkeypatch):
    """As every one does on a CPU unless it is kept from it: that it rounds is first seen, bit by bit."""
    shutil.copytree(tiny_bundle, tmp_path / "b")
    monkeypatch.setattr(rounding, "round_as_written", lambda model: None)
    with pytest.raises(ExportError, match=r"onnxruntime [\d.]+ does not round half numbers on this processor"):
        half.add_half(tmp_path / "b", read_manifest(tiny_bundle).graphs, clips[:1])


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ("a = Tanh(x) y = MatMul(a, w)", "Tanh is an operator that FP16 has no rule for"),
        ("a = MatMul(x, w) b = Greater(a, x) y = Where(b, x, a)", "Greater is an operator that FP16 has no rule for"),
        ("a = MatMul(x, x) b = Mul(a, w) y = Softmax(b)", "1 softmaxes, but 0 products of queries and keys"),
    ],
)
def test_a_graph_of_another_shape_is_refused_and_not_guessed_at(nodes, told):
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[4,4] x) => (float[4,4] y) <float[4,4] w> {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    with pytest.raises(ExportError, match=told):
        to_half(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), "fp32")


def test_what_is_wrong_in_a_padded_batch_alone_is_seen():
    class Session:
        def __init__(self, name, off):
            self.name, self.off = name, off

        def run(self, names, inputs):
            if self.name == "frontend":
                return [np.ones((len(inputs["waveform"]), 32, 128), np.float32)]
            batch = len(inputs["num_tokens"])
            shape = (batch, 16, 8) if self.name == "encoder" else (batch, 4)
            return [np.ones(shape, np.float32) + self.off * (batch > 1)]

    clips = [np.zeros(5_360, np.float32), np.zeros(2_800, np.float32)]

    def worst(encoder=0.0, head=0.0):
        right = {name: Session(name, 0.0) for name in ("frontend", "encoder", "head")}
        alone = [half._run(right, [clip])[0] for clip in clips]
        off = {**right, "encoder": Session("encoder", encoder), "head": Session("head", head)}
        return half._worst_differences(off, clips, alone)

    assert worst() == (0.0, 0.0)
    assert worst(encoder=0.25) == pytest.approx((0.25, 0.0))
    assert worst(head=0.5) == pytest.approx((0.0, 0.5))
    assert np.isnan(worst(head=np.nan)[1])


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
    found = read_manifest(half_bundle).half
    assert found.clips == len(clips) == 8
    assert found.logits == {"encoder": "fp16", "head": "fp16"}
    assert found.seconds == pytest.approx(sum(map(len, clips)) / 16_000)
    assert 0 < found.features_relative <= found.features_limit == 5e-3
    assert 0 < found.scores_max_abs <= found.scores_limit == 0.02
    for name, spec in found.graphs.items():
        assert spec.file == f"{name}.fp16.onnx"
        assert spec.precision == "fp16"
        assert spec.sha256 == file_sha256(half_bundle / spec.file)


def logits_types(bundle, half):
    """The one type of all attention logits of encoder and head, as their files have it."""
    found = []
    for name in HALF_GRAPH_NAMES:
        graph = ir.load(bundle / half.graphs[name].file).graph
        types = {value.name: value.dtype.name for node in graph for value in node.outputs}
        (dtype,) = {types[logit] for logit in logits_of(ir.to_proto(graph))}
        found.append({"FLOAT": "fp32", "FLOAT16": "fp16"}[dtype])
    return found


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


ROUNDING = "rounding to FP16, attention logits in "
FUSING = "fusing for ONNX Runtime on a GPU"


def test_a_loud_trunk_keeps_its_logits_in_float_and_the_head_does_not(tiny_bundle, clips, tmp_path):
    """As half they would be rounded to steps of .25; FP16 is then not given up, and not let through either."""
    loud = edited(tiny_bundle, tmp_path / "b", {"q_proj.bias": shared_direction, "k_proj.bias": shared_direction})
    said = []
    found = add_half(loud, read_manifest(loud).graphs, clips[:1], said.append)
    assert said == [f"{ROUNDING}fp16", f"{ROUNDING}fp32 in the encoder and fp16 in the head", FUSING]
    assert found.logits == {"encoder": "fp32", "head": "fp16"}
    assert logits_types(loud, found) == ["fp32", "fp16"]
    assert found.fused is not None  # whose logits are rounded nowhere


@pytest.mark.parametrize("tried", [1, 2, 3, 4])
def test_float_logits_are_tried_graph_by_graph(tiny_bundle, clips, tmp_path, monkeypatch, tried):
    """With a check that fails until then."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    measured = iter([(1e-2, 0.0), (1e-3, 0.1), (float("nan"), 0.0), (1e-3, 0.01), (2e-3, 0.01)][4 - tried :])
    monkeypatch.setattr(half, "_worst_differences", lambda *arguments: next(measured))
    found = add_half(bundle, read_manifest(bundle).graphs, clips[:1])
    expected = [("fp16", "fp16"), ("fp32", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")][tried - 1]
    assert tuple(found.logits.values()) == expected
    assert tuple(logits_types(bundle, found)) == expected


@pytest.mark.parametrize(
    ("weight", "factor", "told"),
    [
        ("layers.1.fc1.bias", 1e6, r"layers\.1\.fc1: \S+fc1\.bias holds [\d.e+]+; FP16 ends at 65504"),
        (
            "layers.1.final_layer_norm.weight",
            1e6,
            "FP16 does not keep this checkpoint's scores: .* nan and .* in fp16.* On the worst clip, encoder fp16: "
            r"the first of \d+ layers that differs is beats\.layers\.2\.self_attn\.q_proj \(\w+\), by inf "
            r"\(relative\); head fp16: none of",
        ),
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
        BundleFiles.open(tmp_path / "b").graphs("fp16")
    assert Scorer.open(tmp_path / "b").backend.precision != "fp16"  # which does not take it
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text())
    del manifest["half"]["graphs"]["head"]
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"half\.graphs is \('encoder',\)"):
        Scorer.open(tmp_path / "b")


def test_the_command_makes_half_graphs_and_says_what_was_measured(tiny_checkpoint, tmp_path, capsys):
    arguments = ["export", str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--fp16", "--audio", str(RECORDINGS[6])]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    told, fused = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(
        r"FP16 \(attention logits in fp16\) and FP32 on 1 clip, 4 s: features \d\.\de-0\d .*, scores \d", told
    )
    assert re.search(r"fused for ONNX Runtime on a GPU: features \d\.\de-0\d, scores \d", fused)
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


def test_fp16_says_what_it_needs(tiny_bundle, half_bundle):
    with pytest.raises(
        BackendError, match=r"fp16 needs a CUDA GPU.*no FP16 graphs, which `aesanet export --fp16` makes"
    ):
        Scorer.open(tiny_bundle, precision="fp16")
    with pytest.raises(BackendError, match=r"fp16 needs a CUDA GPU, and TensorRT or onnxruntime-gpu\)$"):
        Scorer.open(half_bundle, precision="fp16")


def test_onnx_runtime_runs_the_half_graphs(half_bundle, clips):
    """On a CPU, where it rounds less than a GPU; what differs there is told by -m gpu."""
    waveform, num_samples = pad_batch([clip[: 9_000 + 700 * number] for number, clip in enumerate(clips[:3])])
    fp32, fp16 = (
        OnnxRuntimeBackend(BundleFiles.open(half_bundle), EngineOptions("cpu", precision)).scores(waveform, num_samples)
        for precision in ("fp32", "fp16")
    )
    assert 0 < np.abs(fp32 - fp16).max() < 0.02


@pytest.mark.parametrize(("bundle", "taken"), [("half_bundle", "fp16"), ("tiny_bundle", "fp32")])
def test_a_gpu_takes_fp16_where_the_bundle_has_it(bundle, taken, request, monkeypatch):
    opened = []
    support = Support("1", (("cuda", "fp16"), ("cuda", "fp32"), ("cpu", "fp32")), "a GPU")
    engine = (lambda files, options: opened.append(options), lambda: support)
    monkeypatch.setitem(backends._ENGINES, "onnxruntime", engine)
    Scorer.open(request.getfixturevalue(bundle))
    assert opened == [EngineOptions("cuda", taken)]


@pytest.mark.gpu
@pytest.mark.skipif(("cuda", "fp16") not in support().runs, reason="ONNX Runtime has no CUDA here")
def test_fp16_on_a_gpu_keeps_the_scores(half_bundle):
    """Of whole recordings, whose windows are batched, against FP32 on the processor."""
    fp16, fp32 = (
        Scorer.open(half_bundle, device, backend="onnxruntime", precision=precision).score(list(RECORDINGS))
        for device, precision in (("cuda", "fp16"), ("cpu", "fp32"))
    )
    for ours, theirs in zip(fp16, fp32, strict=True):
        assert [getattr(ours, axis) for axis in AXES] == pytest.approx(
            [getattr(theirs, axis) for axis in AXES], abs=0.02
        )
