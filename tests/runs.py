"""Training runs, small enough for tests, and what they leave behind."""

import csv
import os

import msgspec
import torch
from helpers import tiny_config

from aesanet.models.aesanet import AESANet
from aesanet.training.cache import cached_data
from aesanet.training.config import TrainingConfig
from aesanet.training.processes import Processes
from aesanet.training.progress import Progress
from aesanet.training.trainer import train

CPU, ALONE, SILENT = torch.device("cpu"), Processes(), Progress()
CONFIG = TrainingConfig(max_seconds=0.5, batch_size=4, epochs=3, learning_rate=2e-3, precision="fp32", device="cpu")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def changed(config=CONFIG, **fields):
    return msgspec.structs.replace(config, **fields)


def new_model(seed=1, dropout=0.3):
    config = tiny_config()
    config = msgspec.structs.replace(config, head=msgspec.structs.replace(config.head, dropout=dropout))
    torch.manual_seed(seed)
    return AESANet(config)


def both_sides(model, trunk, clips, folder, config=CONFIG):
    def data(some):
        return cached_data(model, trunk, some, config.window, folder / "cache", SILENT)

    return data(clips[:28]), data(clips[28:])


def run(folder, clips, out, *, trunk="frozen", config=CONFIG, stop=lambda: False, progress=None, model=None):
    model = model or new_model()
    return train(model, trunk, *both_sides(model, trunk, clips, folder, config), config, out, progress, stop=stop)


def epochs(out):
    with open(out / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_run(out, other):
    """Byte for byte, but for the seconds that an epoch took."""
    assert (out / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in epochs(o)] for o in (out, other)]
    assert rows[0] == rows[1]
