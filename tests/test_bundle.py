import json
import shutil

import pytest

from aesanet.bundle import read_manifest
from aesanet.errors import BundleError
from aesanet.runtime.scorer import Scorer


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "b")
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
    ],
)
def test_a_manifest_that_is_wrong_names_the_field_and_the_remedy(bundle, change, told):
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{told}.*export"):
        Scorer.open(bundle)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_no_manifest(bundle, content):
    (bundle / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        read_manifest(bundle)


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
