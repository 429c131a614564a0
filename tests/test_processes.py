"""Training in several processes and on a GPU: as one process does on a processor."""

import socket
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from runs import CPU, ONE_THREAD, both_sides, changed, epochs, new_model, run
from safetensors.torch import load_file

from aesanet.errors import InputError
from aesanet.training.processes import Processes, own_device
from aesanet.training.trainer import train


@pytest.mark.slow
def test_two_processes_train_as_one(labelled_clips, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # as in two_processes.py
    # 28 clips: the last batch has one, and the second process no row of its own.
    config = changed(batch_size=3, epochs=2, learning_rate=1e-3, gradient_norm=1e9, triplet="hardest")
    runs = []
    for trunk in ("frozen", "trained"):
        model = new_model(dropout=0.0)
        runs.append((model, trunk, *both_sides(model, trunk, labelled_clips, labelled), config))
    torch.save(runs, tmp_path / "runs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "two_processes.py", tmp_path],
            env={**ONE_THREAD, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for given in runs:
        train(*given, tmp_path / f"{given[1]}-one")
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    for trunk in ("frozen", "trained"):
        outs = [tmp_path / f"{trunk}-{number}" for number in ("one", "two")]
        one, two = (load_file(out / "best.safetensors") for out in outs)
        for name, value in one.items():
            assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
        for row, other in zip(*map(epochs, outs), strict=True):
            for name in ("train_loss", "train_triplet", "validation_mse"):
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)
            for name in ("anchors", "skipped", "positive_clips", "label_clusters"):
                assert row[name] == other[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.filterwarnings("ignore:.*deterministic")  # of kernels that are not, which a run on a GPU tells of
@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_a_gpu_trains_as_a_cpu_does_and_goes_on(trunk, labelled_clips, labelled, tmp_path):
    config = changed(epochs=4, learning_rate=5e-3)
    for device in ("cpu", "cuda"):
        run(labelled, labelled_clips, tmp_path / device, trunk=trunk, config=changed(config, device=device))
    cpu, cuda = (epochs(tmp_path / device) for device in ("cpu", "cuda"))
    # Later epochs of a whole trunk drift apart: the best validation was .84 on an H200 and 1.15 on its processor.
    assert float(cuda[0]["train_loss"]) == pytest.approx(float(cpu[0]["train_loss"]), rel=0.05)
    assert float(cuda[-1]["train_loss"]) < 0.7 * float(cuda[0]["train_loss"])
    steps = count(1)
    half = changed(config, device="cuda", precision="bf16")
    stopped = run(
        labelled, labelled_clips, tmp_path / "parts", trunk=trunk, config=half, stop=lambda: next(steps) == 10
    )
    assert not stopped.finished
    assert run(labelled, labelled_clips, tmp_path / "parts", trunk=trunk, config=half).finished
    assert float(epochs(tmp_path / "parts")[-1]["mean_srcc"]) > 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    assert own_device("auto") == CPU
    with pytest.raises(InputError, match="process 0 has no GPU: PyTorch sees 0"):
        own_device("cuda")


def test_every_process_has_a_row_of_every_batch():
    for size in range(1, 6):
        for batch in range(1, 12):
            shares = [Processes(rank, size).share(batch) for rank in range(size)]
            assert len({len(share) for share in shares}) == 1
            assert [row for share in shares for row in share][:batch] == list(range(batch))
            assert Counter(map(bool, shares)) == {True: size}
