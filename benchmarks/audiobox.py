"""audiobox-aesthetics, as its users run it, with random weights: its own predictor, batches, windows and model.

pip install audiobox_aesthetics requests

Nothing of it is in this project. Of its code only the reader is replaced, and only where torchaudio cannot read, as it
needs torchcodec and FFmpeg's libraries for that.
"""

import logging
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import soundfile
import torch
from torch import Tensor

from aesanet.axes import AXES
from aesanet.benchmarks.contestants import About, Opened, Work, millions, versions

INSTALL: Final = "pip install audiobox_aesthetics requests"

_PUBLISHED: Final = {  # config.json of facebook/audiobox-aesthetics, 104 M parameters, but for the precision
    "proj_num_layer": 5,
    "proj_ln": True,
    "proj_act_fn": "gelu",
    "proj_dropout": 0,
    "nth_layer": 13,
    "use_weighted_layer_sum": True,
    "normalize_embed": True,
    "output_dim": 1,
}


def is_installed() -> bool:
    """Can it be run here?"""
    return find_spec("audiobox_aesthetics") is not None


def open_audiobox(precision: str, work: Work) -> Opened:
    """Its predictor, by way of a checkpoint as it loads them.

    precision : "32", which the published weights name, or "bf16" or "16", which its model can do by autocast
    """
    warnings.simplefilter("ignore")  # of its own use of PyTorch, every batch
    logging.disable(logging.INFO)
    torchaudio = _torchaudio()
    infer: Any = import_module("audiobox_aesthetics.infer")
    checkpoint = work.folder / f"audiobox-{precision}.pt"
    _save_untrained(infer, precision, checkpoint)
    predictor = infer.initialize_predictor(str(checkpoint))
    checkpoint.unlink()
    reader = "torchaudio"
    try:
        torchaudio.load(work.files[0])
    except (ImportError, OSError, RuntimeError):
        infer.read_wav = _read_wav
        reader = "soundfile"

    def files() -> np.ndarray:
        rows = [{"path": path} for path in work.files]
        found: list[dict[str, float]] = []
        for start in range(0, len(rows), work.batch):  # as its `main_predict` does
            found += predictor.forward(rows[start : start + work.batch])
        return np.array([[row[axis] for axis in AXES] for row in found])

    told = f"{versions('audiobox_aesthetics', 'torch', 'torchaudio')}, read with {reader}"
    return Opened(About(told, "untrained", millions(predictor.model), work.batch), files)


def _save_untrained(infer: Any, precision: str, path: Path) -> None:
    """A checkpoint of the published sizes, as its own loader takes it."""
    transform = {axis: {"mean": 5.0, "std": 2.0} for axis in AXES}
    torch.manual_seed(0)
    config = _PUBLISHED | {"precision": precision}
    model = infer.AesMultiOutput(**config, target_transform=transform)
    torch.save({"state_dict": model.state_dict(), "model_cfg": config, "target_transform": transform}, path)


def _torchaudio() -> ModuleType:
    """torchaudio, which audiobox-aesthetics resamples with, in PyTorch's own operations.

    PyPI has it for CUDA alone. Beside a PyTorch for CPUs its compiled part cannot be loaded; it also runs without.
    """
    try:
        return import_module("torchaudio")
    except OSError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        absent: Any = ModuleType("torchaudio._extension")
        absent._IS_TORCHAUDIO_EXT_AVAILABLE = False
        absent.fail_if_no_align = lambda function: function
        sys.modules[absent.__name__] = absent
        return import_module("torchaudio")


def _read_wav(row: Mapping[str, Any]) -> tuple[Tensor, int]:
    """In place of its `read_wav`, for whole files: float32 [1, samples], mono, and the rate in Hz."""
    samples, rate = soundfile.read(row["path"], dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T).mean(0, keepdim=True), rate
