"""What is told of the machine: GPUs as their driver lists them, clocks."""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from simulated_cuda import SimulatedCuda

from aesanet import gpu, machine
from aesanet.benchmarks.records import clocks
from aesanet.cli.main import cli
from aesanet.errors import BackendError
from aesanet.gpu import Gpu, list_gpus

CPUINFO = "".join(
    f"processor\t: {number}\nmodel name\t: Some\ncpu MHz\t\t: {clock}.5\nflags\t\t: a b\n\n"
    for number, clock in ((0, 800), (1, 2000), (10, 2999))
)


def test_gpus_are_listed_by_their_driver(nvidia_smi):
    nvidia_smi("echo 'NVIDIA H200, 9.0, 580.1, 143771'; echo 'NVIDIA L4, 8.9, 580.1, 23034'")
    first, second = list_gpus()
    assert (first.name, first.capability, first.driver, first.memory) == ("NVIDIA H200", "9.0", "580.1", "143771")
    assert second.name == "NVIDIA L4"
    assert (
        "GPU: NVIDIA H200, compute capability 9.0, driver 580.1, 143771 MiB"
        in CliRunner().invoke(cli, ["doctor"]).output
    )


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo no driver >&2; exit 9", "nvidia-smi failed: no driver"),
        ("exit 0", "lists no GPU"),
        ("echo a, b", "says 'a, b'"),
    ],
)
def test_a_driver_without_a_gpu_is_told(nvidia_smi, script, told):
    nvidia_smi(script)
    with pytest.raises(BackendError, match=told):
        list_gpus()


def test_a_gpu_without_memory_of_its_own_is_listed(nvidia_smi):
    nvidia_smi("echo 'NVIDIA GB10, 12.1, 580.1, [N/A]'")
    assert list_gpus() == [Gpu("NVIDIA GB10", "12.1", "580.1", "[N/A]")]


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        ("echo 'NVIDIA H200, 9.0, 580.1, 143771'; echo 'NVIDIA L4, 8.9, 580.1, 23034'", 8.9),
        ("echo 'NVIDIA RTX PRO 6000, 12.0, 580.1, 97887'", 12.0),
        ("echo 'NVIDIA X, [N/A], 580.1, 1'", 0.0),
    ],
)
def test_where_only_the_driver_tells_the_least_capability_counts(nvidia_smi, monkeypatch, rows, least):
    def none():
        raise BackendError("no cuda-python")

    nvidia_smi(rows)
    monkeypatch.setattr(gpu, "load_cuda", none)
    assert gpu.compute_capability() == least


def test_the_capability_is_of_the_gpu_that_onnx_runtime_takes(monkeypatch):
    """Which is 0, whatever this thread's current one is."""
    cuda = SimulatedCuda(np.random.default_rng(0), ordinal=1)
    cuda.cudaSetDevice(1)
    monkeypatch.setattr(gpu, "load_cuda", lambda: cuda)
    assert gpu.compute_capability() == 9.0
    assert gpu.cuda_gpu(cuda).capability == "8.9"


def test_a_part_that_scripts_gpu_does_not_have_is_refused(tmp_path):
    command = [Path(__file__).parents[1] / "scripts" / "gpu", tmp_path / "out", "test"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no part test; there are bundle, tests, " in ended.stderr
    assert not (tmp_path / "out").exists()


def test_clocks_are_of_every_gpu_and_of_the_cores_that_may_be_used(nvidia_smi, monkeypatch):
    nvidia_smi('case "$*" in *=clocks.sm\\ *) echo 1980; echo "[N/A]";; *) exit 1;; esac')
    monkeypatch.setattr(machine, "open", lambda path, **_: io.StringIO(CPUINFO), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 10})
    assert clocks() == {"processor_mhz": 2500, "gpu_mhz": "1980; [N/A]"}


def test_the_clock_of_this_machine():
    clock = machine.processor_clock_mhz()
    assert clock is None or 100 < clock < 10_000


def test_a_gpu_is_seen_by_cuda_or_by_nvidias_tool(monkeypatch, nvidia_smi):
    """cuda-python may be of a newer CUDA than the driver, which others here may do with."""

    def too_old():
        raise BackendError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(gpu, "load_cuda", lambda: SimulatedCuda(np.random.default_rng(0)))
    nvidia_smi("exit 9")
    gpu.require_gpu()
    monkeypatch.setattr(gpu, "load_cuda", too_old)
    with pytest.raises(BackendError, match="nvidia-smi failed"):
        gpu.require_gpu()
    nvidia_smi('echo "NVIDIA L4, 8.9, 550.1, 23034"')
    gpu.require_gpu()
    old = SimulatedCuda(np.random.default_rng(0))
    old.cudaGetDeviceCount = lambda: (old.cudaError_t.cudaErrorInsufficientDriver, None)
    monkeypatch.setattr(gpu, "load_cuda", lambda: old)
    gpu.require_gpu()


@pytest.mark.parametrize("hidden", ["", "-1", " ,0"])
def test_a_gpu_that_is_hidden_from_cuda_is_none(monkeypatch, nvidia_smi, hidden):
    """NVIDIA's tool lists it all the same."""
    nvidia_smi('echo "NVIDIA L4, 8.9, 550.1, 23034"')
    monkeypatch.setattr(gpu, "load_cuda", lambda: SimulatedCuda(np.random.default_rng(0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(BackendError, match="CUDA_VISIBLE_DEVICES"):
        gpu.require_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    gpu.require_gpu()
