import json
import shutil

import pytest

from aesanet.bundle import read_manifest
from aesanet.errors import BundleError
from aesanet.runtime.scorer import Scorer


@pytest.fixture
def bundle(half_bundle, tmp_path):
    shutil.copytree(half_bundle, tmp_path / "b")
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.update(schema_version=1), "schema_version is 1"),
        (lambda m: m.pop("schema_version"), "schema_version is None"),
        (lambda m: m.update(axes=["PQ", "PC", "CE", "CU"]), r"axes is \('PQ'"),
        (lambda m: m.update(sample_rate=44_100), "sample_rate is 44100"),
        (lambda m: m["graphs"].pop("head"), "graphs is"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["window"].update(window_seconds="ten"), r"\$\.window\.window_seconds"),
        (lambda m: m["window"].update(hop_seconds=20), "hop_seconds is 20"),
        (lambda m: m["graphs"]["head"].update(file="../head.onnx"), "no such file"),
        (lambda m: m["graphs"]["head"].update(inputs=[]), "graphs.head has other inputs or outputs"),
        (lambda m: m["graphs"]["encoder"].update(outputs=[]), "graphs.encoder has other inputs or outputs"),
        (lambda m: m["graphs"]["frontend"]["inputs"][0].update(shape=["b", "samples"]), "graphs.frontend has other"),
        (lambda m: m["graphs"]["encoder"]["outputs"][0].update(shape=["batch", "tokens", -1]), "graphs.encoder has"),
        (lambda m: m["half"].update(logits={}), r"half.logits is \(\)"),
        (lambda m: m["half"]["fused"]["graphs"]["head"]["inputs"][0].update(dtype="int64"), "half.fused.graphs.head"),
    ],
)
def test_a_manifest_that_is_wrong_names_the_field_and_the_remedy(bundle, change, told):
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{told}.*export"):
        Scorer.open(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"schema_version": 3, "weights": "\xe9"}']
)
def test_a_manifest_that_is_no_manifest(bundle, content):
    (bundle / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        read_manifest(bundle)


def test_a_graph_that_cannot_be_read_is_one_error(bundle):
    (bundle / "head.onnx").unlink()
    (bundle / "head.onnx").symlink_to("/proc/self/mem")  # of which the first bytes are nobody's, root's neither
    with pytest.raises(BundleError, match=r"head\.onnx: cannot be read: "):
        Scorer.open(bundle)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle here.*aesanet export"):
        Scorer.open(tmp_path / "nothing")


@pytest.mark.parametrize("graph", ["frontend", "encoder", "head"])
def test_a_changed_or_missing_graph_is_refused(bundle, graph):
    content = bytearray((bundle / f"{graph}.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / f"{graph}.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=f"{graph}.onnx: sha256 is"):
        Scorer.open(bundle)
    (bundle / f"{graph}.onnx").unlink()
    with pytest.raises(BundleError, match=f"{graph}.onnx: no such file"):
        Scorer.open(bundle)
