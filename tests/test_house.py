"""The floors of the house: who may import whom, read from the code's own import statements."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from aesanet.benchmarks.report import update

ROOMS = ("aesanet", "models", "export", "runtime", "benchmarks", "training", "cli")
MAY_IMPORT = {
    "aesanet": set(),
    "models": {"aesanet"},
    "runtime": {"aesanet"},
    "training": {"aesanet", "models", "runtime"},  # labels are of audio, which the runtime decodes
    "export": {"aesanet", "models"},
    "benchmarks": {"aesanet", "models", "runtime", "export", "training"},
    "cli": {"aesanet", "models", "runtime", "export", "training", "benchmarks"},
}
# Within the runtime; what is in none of these may import all.
RUNTIME_MAY_IMPORT = {"rows": set(), "audio": {"rows"}, "cuda": set(), "backends": {"cuda"}}
# aesanet/__init__.py hands on Scorer when it is asked for, and so looks up, once and lazily.
HANDS_ON = {("aesanet/__init__.py", "runtime")}


def imports(path):
    """Names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    first, _, rest = module.partition(".")
    if first != "aesanet":
        return None
    second = rest.partition(".")[0]
    return second if second in ROOMS else "aesanet"


def files(room):
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"{room} is empty"
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_up_a_floor(room):
    for path in files(room):
        name = str(path.relative_to(ROOT))
        for module in imports(path):
            other = room_of(module)
            assert other in {None, room, *MAY_IMPORT[room]} or (name, other) in HANDS_ON, f"{name} imports {module}"


def test_no_import_runs_up_within_the_runtime():
    for room, may_import in RUNTIME_MAY_IMPORT.items():
        for path in files(f"runtime/{room}"):
            for module in imports(path):
                if module.startswith("aesanet.runtime."):
                    assert module.split(".")[2] in {room, *may_import}, f"{path.relative_to(ROOT)} imports {module}"


def test_no_circles():
    modules = {}
    for room in ROOMS:
        for path in files(room):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join(parts if room == "aesanet" else ("aesanet", *parts))] = path
    graph = {name: set(imports(path)) & modules.keys() - {name, "aesanet"} for name, path in modules.items()}
    while graph:
        ready = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert ready, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in ready}


@pytest.mark.parametrize("package", ["torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "aesanet.models"])
def test_the_runtime_never_names_the_training_stack(package):
    for path in [*files("runtime"), *files("aesanet")]:
        assert not any(m == package or m.startswith(package + ".") for m in imports(path)), path


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_aesanet_is_light():
    heavy = "{'numpy', 'torch', 'onnx', 'onnxruntime', 'openvino', 'soundfile', 'soxr', 'click', 'msgspec'}"
    assert run(f"import sys, aesanet; print({heavy} & sys.modules.keys())").strip() == "set()"


def test_scoring_loads_neither_torch_nor_onnx(tiny_bundle, tmp_path):
    code = f"""
import sys
from aesanet import Scorer
for backend in ("onnxruntime", "openvino"):
    Scorer.open({str(tiny_bundle)!r}, backend=backend).score({str(RECORDING)!r})
print({{"torch", "onnx", "aesanet.models"}} & sys.modules.keys())
"""
    assert run(code).strip() == "set()"


def test_compiling_loads_neither_torch_nor_onnx():
    loaded = "{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'aesanet.models'} & sys.modules.keys()"
    assert run(f"import sys, aesanet.export.compile; print({loaded})").strip() == "set()"


def test_every_room_is_in_the_wheel_and_no_other_name():
    folders = {p.parent.relative_to(ROOT) for room in ROOMS[1:] for p in files(room)}
    setup = ast.parse((ROOT / "setup.py").read_text())
    (rooms,) = (node.value for node in setup.body if isinstance(node, ast.Assign) and node.targets[0].id == "ROOMS")
    assert {Path(room.replace(".", "/")) for room in ast.literal_eval(rooms)} == folders


RECORDING = ROOT / "models" / "demo" / "samples" / "speech-synthetic.wav"


def test_tables_in_the_documents_are_those_of_their_files(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    documents = [tmp_path / "README.md", *(tmp_path / "docs").iterdir()]
    assert not any(update(document) for document in documents)
    named = re.findall(r"<!-- table of (\S+) -->", "".join(document.read_text() for document in documents))
    assert len(named) >= 5


def test_what_needs_a_gpu_is_in_the_script_that_runs_on_one(request):
    needing = {item.path.stem for item in request.session.items if item.get_closest_marker("gpu")}
    (named,) = re.findall(r"tests/test_\{([\w,]+)\}\.py -m gpu", (ROOT / "scripts" / "gpu").read_text())
    assert needing <= {f"test_{name}" for name in named.split(",")}
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in named.split(","))
