"""What every checkpoint reader needs: tensors from a pickle without running it, and keys checked by name."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aesanet.errors import CheckpointError
from aesanet.words import some

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def existing_file(path: str | Path) -> Path:
    """The path itself; raises CheckpointError unless it is a regular file that can be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb"):
            return Path(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The top-level dict of a `.pt` file, tensors and plain containers only; raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about a file that is refused next
            content = torch.load(existing_file(path), map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception:  # a damaged pickle raises whatever its bytes happen to say
        raise CheckpointError(
            f"{path}: not a PyTorch file, or one that holds more than tensors and plain values, all that is unpickled"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dict")
    return content


def check_dict(path: str | Path, state: Any) -> None:
    """Raise CheckpointError unless the weights are a dict with string keys."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: the weights are a {type(state).__name__}; expected a dict of named tensors")


def check_tensors(path: str | Path, state: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that names missing keys, unknown keys, or the first value of another shape."""
    check_dict(path, state)
    if missing := [key for key in expected if key not in state]:
        raise CheckpointError(f"{path}: {len(missing)} of {len(expected)} keys are missing: {some(missing)}")
    if unknown := [key for key in state if key not in expected]:
        raise CheckpointError(f"{path}: {len(unknown)} keys are unknown: {some(unknown)}")
    for key, shape in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}; expected a tensor {list(shape)}")
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{path}: {key} has shape {list(value.shape)}; the config asks for {list(shape)}")
        if value.dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{path}: {key} is {value.dtype}, {value.layout}; expected dense floating point")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinite values")
