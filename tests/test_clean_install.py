"""The wheel as users get it, in a virtual environment that has neither torch nor onnx."""

import json
import shutil
import subprocess
import sys
import venv

import pytest
from conftest import RECORDINGS, ROOT


@pytest.mark.slow
def test_scoring_needs_neither_torch_nor_onnx(tiny_bundle, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a build leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("aesanet-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", f"{wheel}[cpu]"], check=True)

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    listing = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    packages = set(run(python, "-c", listing).split())
    assert "onnxruntime" in packages
    assert not packages & {"torch", "onnx", "onnxscript", "safetensors", "openvino"}
    tops = run(python, "-c", "import importlib.metadata as m; print(*{f.parts[0] for f in m.files('aesanet')})").split()
    assert {name for name in tops if not name.endswith(".dist-info") and name != ".."} == {"aesanet"}

    assert run(python, "-c", "from aesanet.models.demo import samples; print(len(samples()))").strip() == "8"
    assert wheel.stat().st_size < 3e6

    command = tmp_path / "venv" / "bin" / "aesanet"
    rows = [json.loads(line) for line in run(command, "score", tiny_bundle, *RECORDINGS).splitlines()]
    assert len(rows) == len(RECORDINGS)
    assert not any("error" in row for row in rows)
    assert "openvino: (not installed: pip install 'aesanet[openvino]')" in run(command, "doctor")
    refused = subprocess.run([command, "export", "x.pt", "--out", "y"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'aesanet[export,cpu]'" in refused.stderr
