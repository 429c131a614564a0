"""The settings of a training run; they are stored beside what it makes."""

import math
from typing import Literal

import msgspec

from aesanet.lengths import WindowPolicy
from aesanet.training.triplet import Criterion, Sampling

_AT_LEAST = {
    "batch_size": 1,
    "epochs": 1,
    "patience": 1,
    "triplet_buffer": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "frame_weight": 0,
    "triplet_weight": 0,
    "triplet_margin": 0,
    "seed": 0,
}
_ABOVE_ZERO = ("learning_rate", "gradient_norm", "triplet_epsilon", "save_minutes")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is trained: values of the paper (arXiv 2509.03292) where it gives them, else ours.

    max_seconds    : window and hop; clips up to it stay whole, and it becomes the checkpoint's window policy
    learning_rate  : of Adam (AdamW where weight_decay > 0); rises linearly over `warmup_steps`, then stays, or
                     falls as a cosine to 0 over all `epochs`
    gradient_norm  : gradients are scaled down to this norm. Ours
    patience       : epochs without a lower validation MSE before the run ends
    frame_weight   : of the MSE of every token against its clip's label. Ours
    triplet_*      : see `training.triplet.TripletBuffer`; `triplet_weight` is the paper's
    precision      : of encoder and head; "auto" is bf16 on CUDA and fp32 elsewhere. Weights and losses are FP32
    save_minutes   : the state is saved at least this often; the one setting that may change when a run goes on
    """

    max_seconds: float = 10.0
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    epochs: int = 100
    patience: int = 10
    frame_weight: float = 1.0
    triplet: Sampling = "random"
    triplet_weight: float = 0.2
    triplet_margin: float = 0.3
    triplet_epsilon: float = 0.5
    triplet_axis: Criterion = "mean"
    triplet_buffer: int = 256
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        try:
            _ = self.window  # its limits are those of max_seconds
        except ValueError as error:
            raise ValueError(str(error).replace("window_seconds", "max_seconds")) from None

    @property
    def window(self) -> WindowPolicy:
        """How clips are cut, in training and by whoever scores with the checkpoint."""
        return WindowPolicy(window_seconds=self.max_seconds, hop_seconds=self.max_seconds)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Of the step with this number, from 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate
