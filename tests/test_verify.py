"""`aesanet verify`: bundles that are broken on purpose fail with what is wrong; good ones pass, and it is kept."""

import errno
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from conftest import RECORDINGS
from onnx import numpy_helper

from aesanet.axes import AXES
from aesanet.benchmarks.reference import Reference, read_windows
from aesanet.bundle import read_manifest
from aesanet.cli.main import main
from aesanet.cli.verify import _worst
from aesanet.export.writer import write_manifest
from aesanet.hashing import file_sha256
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.inputs import read_rows
from aesanet.runtime.rows.row import Clip
from aesanet.runtime.windows import split_windows

RECORDING = str(RECORDINGS[4])


@pytest.fixture
def bundle(half_bundle, tmp_path):
    return shutil.copytree(half_bundle, tmp_path / "b")


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def check(bundle, checkpoint, *more):
    return run("verify", bundle, "--checkpoint", checkpoint, "--audio", RECORDING, *more)


def test_every_engine_here_passes_and_the_bundle_keeps_it(bundle, tiny_checkpoint, capsys):
    assert run("score", bundle, RECORDING, "--backend", "onnxruntime", "--precision", "fp32") == 0
    assert "this bundle was never verified on onnxruntime cpu fp32: `aesanet verify` does" in capsys.readouterr().err
    assert check(bundle, tiny_checkpoint) == 0
    out = capsys.readouterr().out.splitlines()
    kinds = ["onnxruntime cpu fp32", "onnxruntime cpu fp16", "openvino cpu fp32"]
    assert {line.partition(": passed (")[0] for line in out} >= set(kinds)
    kept = read_manifest(bundle).verified
    for kind in kinds:
        found = kept[kind]
        assert found.failures == ()
        assert found.windows == 2  # 6 s in windows of 4 s, every 3 s
        assert found.limit == (0.02 if "16" in kind else 1e-4)
        assert list(found.axes) == list(AXES)
        assert 0 <= found.worst_of_limit <= 1
        assert all(parity.max_abs <= found.limit + 2 * found.reference_rounding for parity in found.axes.values())
        assert found.batch_max_abs <= found.limit
    assert kept["onnxruntime cpu fp16"].axes["CE"].max_abs > kept["onnxruntime cpu fp32"].axes["CE"].max_abs
    assert run("score", bundle, RECORDING, "--backend", "onnxruntime", "--precision", "fp32") == 0
    assert "verif" not in capsys.readouterr().err


def test_one_backend_alone(bundle, tiny_checkpoint, capsys):
    assert check(bundle, tiny_checkpoint, "--backend", "openvino") == 0
    assert all(kind.startswith("openvino") for kind in read_manifest(bundle).verified)
    assert check(bundle, tiny_checkpoint, "--backend", "tensorrt") == 2
    assert re.search("tensorrt: .*(not installed|cannot run)", capsys.readouterr().err)


def changed_graph(bundle, name, change, precision="fp32"):
    """Rewrite one of a bundle's graphs, its hash too, as somebody may who means no harm."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    spec = (manifest["graphs"] if precision == "fp32" else manifest["half"]["graphs"])[name]
    proto = onnx.load(bundle / spec["file"])
    change(proto)
    onnx.save(proto, bundle / spec["file"])
    spec["sha256"] = file_sha256(bundle / spec["file"])
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def weight(ending, change):
    def edit(proto):
        (tensor,) = (t for t in proto.graph.initializer if t.name.endswith(ending))
        value = numpy_helper.to_array(tensor).copy()
        change(value)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    return edit


def test_one_changed_weight_is_found_and_its_layer_named(bundle, tiny_checkpoint, capsys):
    changed_graph(bundle, "encoder", weight("layers.1.fc1.bias", lambda value: value.__setitem__(3, 9.0)))
    assert check(bundle, tiny_checkpoint, "--layers") == 1
    out = capsys.readouterr().out
    told = r"onnxruntime cpu fp32: FAILED; (CE|CU|PC|PQ) is \d\.\d+ and not \d\.\d+ for .*audiobook\.wav, window \d \("
    assert re.search(told, out)
    assert "encoder fp32: the first of" in out
    assert "layers that differs is beats.layers.1.fc1, by" in out
    assert "head fp32: none of" in out  # what the encoder does wrong is not the head's
    assert run("score", bundle, RECORDING, "--backend", "onnxruntime", "--precision", "fp32") == 0
    assert "on onnxruntime cpu fp32 this bundle FAILED `aesanet verify`: " in capsys.readouterr().err


def test_an_overflow_in_half_is_found_and_its_layer_named(bundle, tiny_checkpoint, capsys):
    """Within a product of half numbers, all of which are finite."""

    def overflow(proto):
        weight("layers.1.fc1.bias.fp16", lambda value: value.fill(60_000))(proto)
        scopes = {node.name: str(node.metadata_props) for node in proto.graph.node}
        (fc2,) = (n for n in proto.graph.node if n.op_type == "MatMul" and "layers.1.fc2" in scopes[n.name])
        weight(fc2.input[1], lambda value: value.fill(1))(proto)

    changed_graph(bundle, "encoder", overflow, "fp16")
    assert check(bundle, tiny_checkpoint, "--layers", "--backend", "onnxruntime") == 1
    out = capsys.readouterr().out
    assert "onnxruntime cpu fp32: passed" in out
    # ONNX Runtime's LSTM makes numbers of NaN.
    assert re.search(
        r"onnxruntime cpu fp16: FAILED; .. is \d.\d+ and not \d.\d+ for .*; --layers says where it begins", out
    )
    assert re.search(r"encoder fp16: the first of \d+ layers that differs is beats\.layers\.1\.fc1 \(", out)


def test_axes_in_another_order_are_found(bundle, tiny_checkpoint, capsys):
    def swap(proto):
        (output,) = proto.graph.output
        for node in proto.graph.node:
            node.output[:] = ["before" if name == output.name else name for name in node.output]
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 0, 3]), "order"))
        proto.graph.node.append(onnx.helper.make_node("Gather", ["before", "order"], [output.name], axis=1))

    changed_graph(bundle, "head", swap)
    assert check(bundle, tiny_checkpoint, "--backend", "openvino") == 1
    assert "the axes are in another order: where CE, CU, PC, PQ should be are CU, PC, CE, PQ" in capsys.readouterr().out


def test_what_is_not_the_bundles_is_refused(bundle, tiny_checkpoint, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    shutil.copy(tiny_checkpoint, other)
    other.write_bytes(other.read_bytes() + b" ")
    assert check(bundle, other) == 2
    assert "was exported from tiny.safetensors with" in capsys.readouterr().err
    path = bundle / "head.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    assert check(bundle, tiny_checkpoint) == 2
    assert "head.onnx: sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize(("audio", "told"), [("missing.wav", "no such file"), ("EMPTY", "long enough")])
def test_audio_that_cannot_be_used(bundle, tiny_checkpoint, tmp_path, capsys, audio, told):
    (tmp_path / "empty").mkdir()
    given_audio = tmp_path / "empty" if audio == "EMPTY" else audio
    assert run("verify", bundle, "--checkpoint", tiny_checkpoint, "--audio", given_audio) == 2
    assert told in capsys.readouterr().err


def test_a_bundle_that_cannot_be_written_is_verified_all_the_same(bundle, tiny_checkpoint, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aesanet.export.writer.write_manifest", full)  # as on a full disk
    assert check(bundle, tiny_checkpoint, "--backend", "openvino") == 0
    assert "what was found cannot be kept in it: No space left on device" in capsys.readouterr().err


def test_what_decides_scores_in_the_manifest_is_the_checkpoints(bundle, tiny_checkpoint, capsys):
    """Windows and weights' worth are not in the graphs, and would be wrong in silence."""
    whole = json.loads((bundle / "bundle.json").read_text())
    for field, value in (("window", {"window_seconds": 1.0, "hop_seconds": 1.0}), ("weights", "trained")):
        (bundle / "bundle.json").write_text(json.dumps(whole | {field: value}))
        assert check(bundle, tiny_checkpoint) == 2
        assert re.search(
            rf"b: {field} is .*, but the checkpoint's is .*; export the checkpoint again", capsys.readouterr().err
        )


def test_what_was_found_of_other_graphs_says_nothing_of_these(bundle, tiny_checkpoint, capsys):
    score = ["score", bundle, RECORDING, "--backend", "openvino", "--precision", "fp32"]
    assert check(bundle, tiny_checkpoint, "--backend", "openvino") == 0
    changed_graph(bundle, "head", lambda proto: setattr(proto, "doc_string", "another"))
    capsys.readouterr()
    assert run(*score) == 0
    assert "this bundle was never verified on openvino cpu fp32" in capsys.readouterr().err
    assert check(bundle, tiny_checkpoint, "--backend", "openvino") == 0
    manifest = read_manifest(bundle)
    older = {kind: msgspec.structs.replace(found, engine="openvino 1") for kind, found in manifest.verified.items()}
    write_manifest(bundle, msgspec.structs.replace(manifest, verified=older))
    capsys.readouterr()
    assert run(*score) == 0
    assert "this bundle was verified on openvino 1, and this is openvino 2" in capsys.readouterr().err


def test_a_graph_that_no_engine_can_load_fails(bundle, tiny_checkpoint, capsys):
    def unknown(proto):
        proto.graph.node[-1].op_type = "Sigmoidish"

    changed_graph(bundle, "head", unknown)
    assert check(bundle, tiny_checkpoint) == 1
    out = capsys.readouterr().out
    assert re.search(r"onnxruntime cpu fp32: FAILED; it cannot load the bundle: .*Sigmoidish", out)
    assert "onnxruntime cpu fp16: passed" in out
    assert read_manifest(bundle).verified["openvino cpu fp32"].failures


def test_names_of_files_are_told_as_they_can_be(bundle, tiny_checkpoint, tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m.wav")
    shutil.copy(RECORDING, name)
    changed_graph(bundle, "encoder", weight("layers.1.fc1.bias", lambda value: value.__setitem__(3, 9.0)))
    assert run("verify", bundle, "--checkpoint", tiny_checkpoint, "--audio", name, "--backend", "openvino") == 1
    out = capsys.readouterr().out
    assert "\\x1b[31m.wav, window" in out
    assert "\x1b" not in out


def test_audio_is_kept_in_a_file_window_by_window(tiny_model):
    policy = tiny_model.config.window
    windows = read_windows(read_rows([str(path) for path in RECORDINGS]), policy)
    expected = [
        (f"{path}, window {number + 1}", samples)
        for path in RECORDINGS
        for number, samples in enumerate(split_windows(clip_blocks(Clip(str(path))), policy))
    ]
    assert [window.name for window in windows] == [name for name, _ in expected]
    for window, (_, samples) in zip(windows, expected, strict=True):
        assert isinstance(window.samples, np.memmap)
        assert np.array_equal(window.samples, samples)
        assert torch.from_numpy(window.samples).dtype == torch.float32  # and no complaint


def test_a_full_disk_of_temporary_files_is_told_as_that(bundle, tiny_checkpoint, monkeypatch, capsys):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    assert check(bundle, tiny_checkpoint) == 2
    assert "the audio cannot be kept there: No space left on device; TMPDIR names" in capsys.readouterr().err


# The page


class Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_all_and_needs_nothing_else(half_bundle, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    bundle = shutil.copytree(half_bundle, tmp_path / "a <b> & c")
    page = tmp_path / "page.html"
    assert check(bundle, tiny_checkpoint, "--html", page, "--layers") == 0
    parser = Parser()
    parser.feed(page.read_text())
    text = "".join(parser.text)
    assert "a <b> & c the checkpoint's?" in text
    count = len(read_manifest(bundle).verified)
    assert parser.tags.count("svg") == count >= 3
    assert parser.tags.count("table") == count + 1
    half = read_manifest(bundle).half
    for found in (read_manifest(bundle).parity, half, half.fused):
        assert f"{found.features_relative:.1e}{found.scores_max_abs:.1e}" in text
    assert text.count("Passed") == count
    assert parser.links == []
    assert not re.search(r"""(src|url)\s*[=(]\s*["']?https?:""", page.read_text())
    assert "none of" in text
    capsys.readouterr()
    assert check(bundle, tiny_checkpoint, "--html", tmp_path / "no" / "page.html", "--backend", "openvino") == 2
    assert "page.html: not a place for a page" in capsys.readouterr().err
    shutil.copy(tiny_checkpoint, tmp_path / "mine.safetensors")
    mine = (tmp_path / "mine.safetensors", "--html", tmp_path / "mine.safetensors", "--backend", "openvino")
    assert check(bundle, *mine) == 2
    assert "mine.safetensors: a page is .html or .htm; give it such a name" in capsys.readouterr().err
    assert (tmp_path / "mine.safetensors").read_bytes() == tiny_checkpoint.read_bytes()
    monkeypatch.chdir(bundle.parent)
    for place, where in ((bundle, bundle), (Path(bundle.name), bundle), (bundle, Path(bundle.name))):
        assert check(place, tiny_checkpoint, "--html", where / "page.html", "--backend", "openvino") == 2
        assert "outside the bundle" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "rounding", "worst"), [(0.5, 0.0, 3), (np.nan, 0.0, 3), (0.012, 0.01, 1)])
def test_layers_are_compared_on_the_window_that_is_furthest_off(value, rounding, worst):
    """As a share of what is allowed there, on whichever engine; one that could not be opened has no scores."""
    scores = np.zeros((5, 4))
    reference = Reference([], scores, np.array([0, 0, 0, rounding, 0]))
    one, two = scores.copy(), scores.copy()
    one[1, 2], two[3, 0] = 1e-3, value
    assert _worst(reference, [one, None, two]) == worst
    assert _worst(reference, [None]) == 0


def test_the_page_does_without_an_engine_that_is_damaged(half_bundle, tiny_checkpoint, tmp_path, capsys):
    bundle, page = shutil.copytree(half_bundle, tmp_path / "b"), tmp_path / "page.html"
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), engines={"0" * 64: "1" * 64}))
    assert check(bundle, tiny_checkpoint, "--html", page, "--backend", "openvino", "--audio", RECORDINGS[0]) == 0
    assert "left out of the page: " in capsys.readouterr().err
    assert "<h2>Graphs</h2>" in page.read_text()
