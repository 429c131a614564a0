import copy
import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import RECORDINGS
from helpers import make_loud, public_beats_file, random_model, tiny_config
from onnx import numpy_helper

from aesanet.benchmarks.layers import compare_layers
from aesanet.benchmarks.rounded_half import RoundedHalf
from aesanet.bundle import GRAPH_NAMES, read_manifest, signature
from aesanet.errors import BundleError, CheckpointError, ExportError
from aesanet.export import build, parity
from aesanet.export.build import export_bundle
from aesanet.export.graph import export_graph
from aesanet.export.writer import new_bundle
from aesanet.hashing import file_sha256
from aesanet.lengths import WindowPolicy, num_tokens
from aesanet.models.beats import BEATs
from aesanet.models.checkpoint import save_checkpoint
from aesanet.models.config import AESANetConfig
from aesanet.padding import pad_batch
from aesanet.runtime.backends.base import BundleFiles, EngineOptions
from aesanet.runtime.backends.onnxruntime import OnnxRuntimeBackend
from aesanet.runtime.scorer import Scorer


def onnx_scores(bundle, waveform, num_samples):
    """The three files through ONNX Runtime, by their names in the manifest alone."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    values = {"waveform": waveform, "num_tokens": num_tokens(num_samples)}
    for name in ("frontend", "encoder", "head"):
        graph = manifest["graphs"][name]
        session = onnxruntime.InferenceSession(bundle / graph["file"], providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {spec["name"]: values[spec["name"]] for spec in graph["inputs"]})
        values[graph["outputs"][0]["name"]] = out
    return values["scores"]


@pytest.mark.parametrize("lengths", [[2_800], [2_801, 160_000], [7_777, 3_000, 12_345, 50_000, 50_000], [400_000]])
def test_graphs_give_the_models_scores_at_other_shapes_than_were_exported(tiny_bundle, tiny_model, lengths):
    rng = np.random.default_rng(len(lengths))
    waveform = rng.normal(0, 0.1, (len(lengths), max(lengths))).astype(np.float32)
    num_samples = np.array(lengths)
    with torch.no_grad():
        expected = tiny_model(torch.from_numpy(waveform), torch.from_numpy(num_samples)).numpy()
    np.testing.assert_allclose(onnx_scores(tiny_bundle, waveform, num_samples), expected, atol=2e-5)


def test_the_manifest_tells_all(tiny_bundle, tiny_checkpoint, tiny_model):
    manifest = read_manifest(tiny_bundle)
    assert manifest.axes == ("CE", "CU", "PC", "PQ")
    assert manifest.weights == "untrained"
    assert manifest.window == tiny_model.config.window == WindowPolicy(4.0, 3.0)
    assert manifest.source.sha256 == file_sha256(tiny_checkpoint)
    assert manifest.source.config["beats"]["encoder_embed_dim"] == 32
    assert manifest.score_range == (0.5, 9.5)
    assert manifest.calibration["PC"] == {"scale": 1.25, "offset": -0.5}
    assert manifest.tools["torch"] == torch.__version__
    assert 0 < manifest.parity.scores_max_abs <= 1e-4
    assert len(manifest.parity.cases) >= 4
    for name in GRAPH_NAMES:
        proto = onnx.load(tiny_bundle / f"{name}.onnx")
        onnx.checker.check_model(proto, full_check=True)
        assert manifest.graphs[name].sha256 == file_sha256(tiny_bundle / f"{name}.onnx")
        assert proto.opset_import[0].version >= 20
        assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
        for specs, values in zip(signature(name, 32), (proto.graph.input, proto.graph.output), strict=True):
            for spec, value in zip(specs, values, strict=True):
                found = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert (spec.name, spec.shape) == (value.name, found)


def test_the_graphs_hold_weights_and_not_arithmetic_on_weights(tiny_bundle):
    """Engines want an LSTM's weights as constants, and its lengths as no input (see MaskedLSTM)."""
    head = onnx.load(tiny_bundle / "head.onnx").graph
    constants = {t.name for t in head.initializer}
    lstms = [node for node in head.node if node.op_type == "LSTM"]
    assert len(lstms) == 4  # two layers, two directions
    for node in lstms:
        assert len(node.input) == 4
        assert set(node.input[1:]) <= constants


def test_an_axis_that_came_out_fixed_is_refused(tiny_model, tmp_path):
    """The exporter has been seen to turn a dynamic axis into a constant without an error."""

    class Fixed(torch.nn.Module):
        def forward(self, features, num_tokens):
            return torch.zeros(2, 4)

    model = copy.deepcopy(tiny_model)
    model.head = Fixed()
    with pytest.raises(ExportError, match=r"scores was exported with shape \[2, 4\]"):
        export_graph(model, "head", tmp_path / "head.onnx")


@pytest.mark.parametrize(("weights", "value"), [("encoder.beats.layer_norm.weight", 1e38), ("", 0.0)])
def test_a_checkpoint_that_is_of_no_use_itself_is_told_so(tmp_path, weights, value):
    model = random_model(tiny_config(), seed=7)
    for name, parameter in model.named_parameters():
        if weights in name:
            parameter.data.fill_(value)
    save_checkpoint(model, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=r"this checkpoint's own features or scores of noise, .* are no numbers"):
        export_bundle(tmp_path / "x.safetensors", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_name_that_is_not_utf8_is_told_before_anything_is_exported(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="not all of this is UTF-8"):
        export_bundle(tiny_checkpoint, tmp_path / os.fsdecode(b"x\xff.bundle"))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_no_bundle(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_SCORES_LIMIT", 1e-12)
    with pytest.raises(ExportError, match="do not give the model's scores"):
        export_bundle(tiny_checkpoint, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_stays_whole_until_the_new_one_is(tiny_bundle, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)

    def interrupted():
        with new_bundle(old) as folder:
            (folder / "bundle.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (old / "bundle.json").read_bytes() == (tiny_bundle / "bundle.json").read_bytes()
    with new_bundle(old) as folder:
        (folder / "bundle.json").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert [p.name for p in old.iterdir()] == ["bundle.json"]
    assert (old / "bundle.json").read_text() == "whole"


@pytest.mark.parametrize(
    ("graph", "weight", "change", "told"),
    [
        ("head", "adapter.bias", 0.01, r"scores by [\d.]+e-0[0-3]"),
        ("head", "adapter.bias", np.nan, r"scores by [\d.]+e\+"),
        (
            "encoder",
            "layers.2.fc2.bias",
            0.05 * np.arange(32),
            r"features differ by [\d.]+e-0[0-3] \(relatively; limit 1e-04\)",
        ),
        ("encoder", "layers.2.fc2.bias", np.nan, "features differ by nan"),
    ],
)
def test_the_check_sees_a_wrong_weight(tiny_bundle, tiny_model, tmp_path, graph, weight, change, told):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    proto = onnx.load(tmp_path / "b" / f"{graph}.onnx")
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(weight))
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + change).astype(np.float32).tobytes()
    onnx.save(proto, tmp_path / "b" / f"{graph}.onnx")
    with pytest.raises(ExportError, match=told):
        parity.measure_parity(tiny_model, tmp_path / "b")


def test_what_fp32_leaves_of_large_activations_is_no_error(tmp_path, measured):
    """Attention logits of 400, as trained transformers have: FP32 has steps of 3e-5 there."""
    save_checkpoint(make_loud(random_model(tiny_config(), seed=7), logit=400.0), tmp_path / "loud.safetensors")
    parity = export_bundle(tmp_path / "loud.safetensors", tmp_path / "b").parity
    measured["loud, parity"] = f"features {parity.features_relative:.1e}, scores {parity.scores_max_abs:.1e}"


def test_nothing_but_a_bundle_is_replaced(tiny_checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more")
    for name in ("folder", "file"):
        with pytest.raises(ExportError, match="is not a bundle"):
            export_bundle(tiny_checkpoint, tmp_path / name)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"


def test_what_is_not_the_old_bundles_own_is_not_removed_with_it(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    key = "0" * 64
    (bundle / "engines" / key).mkdir(parents=True)
    for name in (
        ".bundle.json.17",
        ".bundle.json.0123456789abcdef",
        ".DS_Store",
        "encoder.fp16.weights",
        "engines/build.log",
        f"engines/{key}/engine.json",
    ):
        (bundle / name).touch()
    link = tmp_path / "link"
    link.symlink_to(bundle)
    with pytest.raises(ExportError, match=f"link: is a link; give the folder itself, {bundle}"):
        export_bundle(tiny_checkpoint, link)
    for name in ("scores.jsonl", "engines/notes.txt", "bundle.json.bad"):
        (bundle / name).write_text("years of work")
        with pytest.raises(ExportError, match=f"holds what is no bundle's: {name}; move that away"):
            export_bundle(tiny_checkpoint, bundle)
        (bundle / name).unlink()
    monkeypatch.chdir(bundle / "engines")
    with pytest.raises(ExportError, match="is the folder that this runs in"):
        export_bundle(tiny_checkpoint, bundle)
    monkeypatch.chdir(tmp_path)
    export_bundle(tiny_checkpoint, bundle)
    assert not (bundle / "engines").exists()


def test_an_export_onto_a_full_disk_says_where(tiny_checkpoint, tmp_path, monkeypatch):
    def full(*given):  # as onnx has it: which file it was is not said
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx.save", full)
    with pytest.raises(ExportError, match=f"{tmp_path}/b: cannot be written: No space left on device"):
        export_bundle(tiny_checkpoint, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_another_programs_bundle_json_is_not_ours(tiny_checkpoint, tmp_path):
    for content in ('{"dependencies": {}}', "half"):
        (tmp_path / "bundle.json").write_text(content)
        with pytest.raises(ExportError, match="is not a bundle"):
            export_bundle(tiny_checkpoint, tmp_path)
        assert (tmp_path / "bundle.json").read_text() == content


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropped", ["wholly", "as another error"])
def test_an_interrupt_that_somebody_drops_ends_an_export(tiny_checkpoint, tmp_path, monkeypatch, kind, dropped):
    """As Python itself does in callbacks of weak references, and PyTorch where it tells what it was at."""
    monkeypatch.setattr(build, "export_graph", interrupted := Interrupted(kind, dropped, export_graph))
    before = signal.signal(kind, signal.default_int_handler)  # other libraries leave their own
    try:
        with pytest.raises(KeyboardInterrupt):
            export_bundle(tiny_checkpoint, tmp_path / "b")
    finally:
        signal.signal(kind, before)
    assert interrupted.times
    assert list(tmp_path.iterdir()) == []


class Interrupted:
    """Exports, and hears of a signal meanwhile, as Python tells of one."""

    def __init__(self, kind, dropped, export):
        self.kind, self.dropped, self.export, self.times = kind, dropped, export, 0

    def __call__(self, *given):
        self.times += 1
        try:
            signal.getsignal(self.kind)(self.kind, None)
        except KeyboardInterrupt:
            if self.dropped != "wholly":
                raise RuntimeError("while executing") from None
        return self.export(*given)


def test_a_folder_that_appeared_during_the_export_is_kept(tmp_path):
    out = tmp_path / "out"

    def export():
        with new_bundle(out) as folder:
            (folder / "bundle.json").write_text("new")
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")

    with pytest.raises(ExportError, match="is not a bundle"):
        export()
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("out", ["/proc/nothing/bundle", "FILE/bundle"])
def test_a_place_that_cannot_be_written_is_one_error(tiny_checkpoint, tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written"):
        export_bundle(tiny_checkpoint, out.replace("FILE", str(tmp_path / "file")))


def test_a_bad_checkpoint_leaves_nothing(tmp_path):
    (tmp_path / "x.pt").write_text("no")
    with pytest.raises(CheckpointError):
        export_bundle(tmp_path / "x.pt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.fixture(scope="module")
def weights_beside(tiny_checkpoint, clips, tmp_path_factory):
    """The tiny network with the weights of all three graphs beside them, as large ones have them."""
    out = tmp_path_factory.mktemp("bundles") / "beside.bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aesanet.export.graph._INSIDE_BYTES", 0)
        export_bundle(tiny_checkpoint, out, half_on=clips)
    return out


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_beside_a_graph_change_no_score(weights_beside, half_bundle, backend):
    assert {spec.weights for spec in read_manifest(half_bundle).graphs.values()} == {None}
    ours, theirs = (
        [dataclasses.astuple(scores) for scores in Scorer.open(bundle, backend=backend).score(list(RECORDINGS))]
        for bundle in (weights_beside, half_bundle)
    )
    assert np.allclose(ours, theirs, atol=1e-6)


def test_every_weight_is_in_the_one_file_or_the_other(weights_beside, half_bundle):
    manifest = read_manifest(weights_beside)
    specs = (*manifest.graphs.values(), *manifest.half.graphs.values())
    assert [spec.weights for spec in specs] == [
        "frontend.weights",
        "encoder.weights",
        "head.weights",
        "encoder.fp16.weights",
        "head.fp16.weights",
    ]
    for spec in specs:
        graph, weights = weights_beside / spec.file, weights_beside / spec.weights
        assert weights.stat().st_mode == graph.stat().st_mode
        assert spec.sha256 == hashlib.sha256(graph.read_bytes() + weights.read_bytes()).hexdigest()
        whole = (half_bundle / spec.file).stat().st_size
        assert whole * 0.9 < graph.stat().st_size + weights.stat().st_size < whole * 1.5
        ours, theirs = (
            {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
            for path in (graph, half_bundle / spec.file)
        )
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[tensor], theirs[tensor]) for tensor in ours)


@pytest.mark.parametrize("graph", ["frontend", "encoder", "head", "encoder.fp16", "head.fp16"])
def test_changed_or_missing_weights_are_refused(weights_beside, tmp_path, graph):
    bundle = shutil.copytree(weights_beside, tmp_path / "b")
    weights, form = bundle / f"{graph}.weights", "fp16" if "fp16" in graph else "fp32"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{graph}\.onnx with .*{graph}\.weights: sha256 is"):
        BundleFiles.open(bundle).graphs(form)
    weights.unlink()
    with pytest.raises(BundleError, match=rf"{graph}\.weights: no such file in the bundle; export"):
        BundleFiles.open(bundle).graphs(form)


def test_half_weights_beside_a_graph_change_no_score(weights_beside, half_bundle):
    """Neither as ONNX Runtime has them nor with every half tensor rounded."""
    rng = np.random.default_rng(0)
    waveform, num_samples = pad_batch([rng.normal(0, 0.1, count).astype(np.float32) for count in (9_000, 20_000)])
    for engine in (lambda files: OnnxRuntimeBackend(files, EngineOptions("cpu", "fp16")), RoundedHalf):
        ours, theirs = (
            engine(BundleFiles.open(b)).scores(waveform, num_samples) for b in (weights_beside, half_bundle)
        )
        assert np.array_equal(ours, theirs)


def test_every_layer_agrees_with_weights_beside(weights_beside, tiny_model):
    waveform = np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    found = list(compare_layers(tiny_model, BundleFiles.open(weights_beside), waveform))
    assert len(found) == 7
    assert all(layers.first is None for layers in found)


@pytest.mark.slow
def test_base_size_with_a_public_beats_file_exports_and_scores(tmp_path, measured):
    """The real thing in size: a head trained on a (random) BEATs file in the public layout, 361 MB."""
    beats, head = tmp_path / "beats.pt", tmp_path / "head.safetensors"
    config = AESANetConfig(weights="untrained")
    public_beats_file(beats, config.beats, seed=0)
    assert 350e6 < beats.stat().st_size < 380e6
    model = random_model(config, seed=0)
    model.encoder.beats.load_state_dict(BEATs.from_checkpoint(beats).state_dict())
    save_checkpoint(model, head, beats_sha256=file_sha256(beats))
    assert head.stat().st_size < 10e6
    del model

    started = time.monotonic()
    manifest = export_bundle(head, tmp_path / "base.bundle", beats)
    took = time.monotonic() - started
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    measured["base size, export"] = f"{took:.0f} s, at most {memory_gb:.1f} GB"
    measured["base size, parity"] = (
        f"features {manifest.parity.features_relative:.1e}, scores {manifest.parity.scores_max_abs:.1e}, "
        f"scores span {manifest.parity.scores_spread:.1e} or more"
    )
    assert memory_gb < 6
    assert manifest.source.beats_sha256 == file_sha256(beats)

    assert manifest.graphs["encoder"].weights == "encoder.weights"
    assert {name: spec.weights for name, spec in manifest.graphs.items() if name != "encoder"} == {
        "frontend": None,
        "head": None,
    }

    scorers = [Scorer.open(tmp_path / "base.bundle", backend=b, precision="fp32") for b in ("onnxruntime", "openvino")]
    results = [scorer.score(list(RECORDINGS)) for scorer in scorers]
    for recording, ours, theirs in zip(RECORDINGS, *results, strict=True):
        for axis in manifest.axes:
            assert getattr(ours, axis) == pytest.approx(getattr(theirs, axis), abs=1e-3), recording
