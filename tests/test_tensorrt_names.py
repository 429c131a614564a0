"""TensorRT, TensorRT-RTX and CUDA have what is asked of them, and what stands in for them is called as they are.

It takes no GPU to see that. TensorRT's own Python module is loaded over empty libraries; the real ones NVIDIA has.
"""

import ast
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import simulated_cuda
import simulated_tensorrt
import tensorrt_names
from conftest import ROOT
from cuda.bindings import runtime as cuda

from aesanet.engines import load_library

BINDINGS = "tensorrt-cu13-bindings"
ASKS = (
    "aesanet/engines.py",
    "export/engine.py",
    "export/timing.py",
    "runtime/cuda/complaints.py",
    "runtime/cuda/kernels.py",
    "runtime/cuda/stage.py",
    "runtime/backends/compiled.py",
    "runtime/backends/tensorrt.py",
)
OF_RTX_ALONE = {
    ("", "CudaGraphStrategy"),
    ("", "DynamicShapesKernelSpecializationStrategy"),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "set_runtime_cache"),
}
STANDS_FOR = {
    "SimulatedEngine": "ICudaEngine",
    "SimulatedConfig": "IRuntimeConfig",
    "SimulatedContext": "IExecutionContext",
}
OF_RTX = {
    "SimulatedRTXConfig": "IRuntimeConfig",
    "SimulatedRTXContext": "IExecutionContext",
    "SimulatedCache": "IRuntimeCache",
}


@pytest.fixture(scope="session")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")
    return tensorrt_names.names(load_library("rtx"))


@pytest.fixture(scope="session")
def tensorrt(tmp_path_factory):
    try:
        major = importlib.metadata.version(BINDINGS).partition(".")[0]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{BINDINGS} has packages for Linux on x86-64 only")
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler, which makes TensorRT's libraries, empty")
    folder = tmp_path_factory.mktemp("libraries")
    tensorrt_names.empty_libraries(folder, compiler, major)
    found = subprocess.run(
        [sys.executable, tensorrt_names.__file__, "tensorrt_bindings"],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_all_that_is_asked_of_rtx_tensorrt_has_but_for_what_is_looked_up(rtx, tensorrt):
    """Of every class that both have, and of the modules themselves."""
    asked = {
        node.attr
        for path in ASKS
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute)
    }
    lacking = {
        (kind, name)
        for kind, has in rtx.items()
        for name in has
        if kind in tensorrt and name in asked and name not in tensorrt[kind]
    }
    assert lacking == OF_RTX_ALONE
    # What runs with RTX, or with what stands in for it, is called as TensorRT is.
    otherwise = {
        (kind, name): ways
        for kind, has in rtx.items()
        for name, ways in has.items()
        if name in asked and name in tensorrt.get(kind, {}) and not all(way in tensorrt[kind][name] for way in ways)
    }
    assert otherwise == {}
    assert {"execute_async_v3", "build_serialized_network", "set_timing_cache"} <= asked
    # Before 11 TensorRT has other networks, too.
    assert "STRONGLY_TYPED" in tensorrt["NetworkDefinitionCreationFlag"]


@pytest.mark.parametrize(
    ("library", "stand_in", "kind"),
    [
        *(("tensorrt", *pair) for pair in STANDS_FOR.items()),
        *(("rtx", *pair) for pair in (STANDS_FOR | OF_RTX).items()),
    ],
)
def test_what_stands_in_for_the_libraries_is_called_as_they_are(request, library, stand_in, kind):
    has = request.getfixturevalue(library)[kind]
    methods = {
        name: method
        for name, method in inspect.getmembers(getattr(simulated_tensorrt, stand_in), callable)
        if not name.startswith("_")
    }
    assert methods
    for name, method in methods.items():
        taken = len(inspect.signature(method).parameters) - (not isinstance(method, staticmethod))
        assert name in has, f"{kind} has no {name}"
        assert taken in map(len, has[name]), f"{kind}.{name} takes {has[name]}"


def test_what_stands_in_for_cuda_is_called_as_it_is():
    methods = {
        name: method
        for name, method in vars(simulated_cuda.SimulatedCuda).items()
        if name.startswith("cuda") and inspect.isfunction(method)
    }
    assert "cudaMemcpyAsync" in methods
    for name, method in methods.items():
        real = inspect.signature(getattr(cuda, name))
        assert len(inspect.signature(method).parameters) - 1 == len(real.parameters), f"{name}{real}"
