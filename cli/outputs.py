"""Files that commands write: never over an input, and never over another file by chance."""

import os
from collections.abc import Sequence
from pathlib import Path

from aesanet.errors import InputError


def check_out(out: Path, overwrite: bool, inputs: Sequence[str]) -> None:
    """Raise InputError where `out` is one of the inputs, or is there and must not be replaced."""
    if any(os.path.exists(name) and out.exists() and os.path.samefile(name, out) for name in inputs):
        raise InputError(f"{out}: is one of the inputs; give --out another name")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; give --overwrite to replace it, or another name")
