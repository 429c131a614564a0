"""Where a training run is, on disk: enough to go on as if it had never been stopped."""

import math
import os
from pathlib import Path
from typing import Any

import msgspec
import torch

from aesanet.errors import InputError
from aesanet.files import replacing
from aesanet.training.config import TrainingConfig
from aesanet.training.monitor import Signs

STATE_NAME = "state.pt"


_SAYS = {
    "initial_weights": " (of the BEATs file and the seed)",
    "training_data": " (audio and labels)",
    "validation_data": " (audio and labels)",
}


class Position(msgspec.Struct, kw_only=True):
    """How far a run has come.

    epoch from 1; batch: how many of this epoch are done; step: of all epochs; seconds: of this epoch so far
    sums: of this epoch's training losses, by name, times clips; rows: of epochs.csv; signs: of each epoch
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    signs: list[Signs] = []
    best_epoch: int = 0
    best_mse: float = math.inf
    finished: bool = False


def run_identity(config: TrainingConfig, **facts: str | int) -> dict[str, Any]:
    """All that decides a run's result, by name: the settings, and facts that they do not tell.

    Left out are the minutes between savings, which change nothing, and what "auto" settings were given as.
    """
    settings = msgspec.to_builtins(config)
    for name in ("save_minutes", "precision", "device"):
        del settings[name]
    return {**settings, **facts}


def save_state(out: Path, identity: dict[str, Any], position: Position, tensors: dict[str, Any]) -> None:
    """Write `state.pt` whole or not at all; `tensors` are the state dicts that belong to it."""
    content = {"identity": identity, "position": msgspec.to_builtins(position), **tensors}
    with replacing(out / STATE_NAME) as beside, open(beside, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # PyTorch's own, about the archive that it could not end, stands before the disk's.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())  # before it takes the old one's place: a power failure must leave one of them


def load_state(out: Path, identity: dict[str, Any]) -> tuple[Position, dict[str, Any]] | None:
    """The position and the state dicts of the run in this folder, or None where there is none.

    Raises InputError that names the first setting in which that run is another one than `identity`.
    """
    path = out / STATE_NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content.pop("identity")
        position = msgspec.convert(content.pop("position"), Position)
    except Exception:  # a damaged pickle raises whatever its bytes happen to say
        raise InputError(
            f"{path}: not a state that this version of aesanet can go on from; give another --out, or delete it"
        ) from None
    for name in [*identity, *found]:
        if found.get(name) != identity.get(name):
            raise InputError(
                f"{out}: holds a run with {name} {found.get(name)!r}{_SAYS.get(name, '')}, and this one has "
                f"{identity.get(name)!r}; "
                "give the same settings and data to go on with it, or another --out"
            )
    return position, content
