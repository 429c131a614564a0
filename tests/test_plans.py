"""Graphs to plans, by the real TensorRT-RTX: types and shapes as written, refusals with their reason."""

import functools
import shutil
import types

import onnx
import onnx_ir as ir
import pytest
from helpers import make_loud, typed
from onnx import TensorProto, helper

from aesanet.bundle import GRAPH_NAMES, HALF_GRAPH_NAMES, read_manifest, signature
from aesanet.errors import CompileError
from aesanet.export import engine as engine_room
from aesanet.export.engine import BuildSettings, build_plan, layer_types, parse
from aesanet.export.graph import export_graph, write_graph
from aesanet.export.half import add_half
from aesanet.export.precision import to_half
from aesanet.export.profiles import default_profiles, make_profiles
from aesanet.export.timing import TimingCache
from aesanet.models.config import AESANetConfig
from aesanet.models.untrained import untrained_model

SMALL = BuildSettings(profiles=make_profiles([(1.0, 2)]))
ISLANDS = {"NORMALIZATION", "SOFTMAX", "REDUCE", "LOOP_OUTPUT"}


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
    settings = BuildSettings(default_profiles(6.0), capabilities=("8.0", "8.9", "12.0"))
    built = build_plan(trt, folder / specs[name].file, specs[name], settings, False, [])
    assert len(built.plan) > 10_000
    assert len(built.activation_bytes) == 3  # of profiles


def test_the_front_end_is_all_float(trt, tiny_bundle):
    network, *_alive = parsed(trt, tiny_bundle / "frontend.onnx")
    assert "HALF" not in {dtype for _, _, dtype in layer_types(network)}


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
    settings = BuildSettings(default_profiles(10.0), capabilities=("8.0", "8.9", "12.0"))
    for name, spec in {**graphs, **half.graphs}.items():
        built = build_plan(trt, tmp_path / spec.file, spec, settings, name == "encoder", [])
        measured[f"base size, {name}, RTX"] = (
            f"{built.seconds:.0f} s, activations {[size // 2**20 for size in built.activation_bytes]} MiB"
        )
        assert len(built.activation_bytes) == 3


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
