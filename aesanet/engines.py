"""Compiled engines of a bundle: `engines/<key>/`, what each was made from, and its plans. Build and run agree on this.

An engine runs only where everything that went into it is the same. So its key is a hash over all of it, in words; a
key that left out a part would one day give a plan for another GPU or version.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from aesanet.bundle import GRAPH_NAMES, GraphName, Manifest
from aesanet.errors import BundleError
from aesanet.hashing import file_sha256

ENGINES_FOLDER: Final = "engines"
ENGINE_NAME: Final = "engine.json"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph's plan. `layers` counts kinds and types of layers as parsed; `activation_bytes` has one a profile."""

    file: str
    sha256: str
    size_bytes: int
    build_seconds: float
    activation_bytes: tuple[int, ...]
    layers: dict[str, int]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`engine.json`: every part of the key in words, and the plans."""

    key: str
    parts: dict[str, str]
    plans: dict[GraphName, Plan]


def engine_key(parts: Mapping[str, str]) -> str:
    """The sha256 over all parts, in the order of their names."""
    return hashlib.sha256(msgspec.json.encode(sorted(parts.items()))).hexdigest()


def read_engine(bundle: str | Path, manifest: Manifest, key: str) -> Engine:
    """An engine of the bundle, once its files were seen to be those that were built; raises BundleError."""
    folder = Path(bundle) / ENGINES_FOLDER / key
    path = folder / ENGINE_NAME
    _check(path, manifest.engines.get(key, "nothing"))
    try:
        engine = msgspec.json.decode(path.read_bytes(), type=Engine)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}: {error}; compile the bundle again") from None
    if engine.key != key or engine_key(engine.parts) != key or tuple(engine.plans) != GRAPH_NAMES:
        raise BundleError(f"{path}: is not the engine {key}; compile the bundle again")
    for name, plan in engine.plans.items():
        if plan.file != f"{name}.plan":
            raise BundleError(f"{path}: the {name}'s plan is {plan.file!r}, not {name}.plan; compile the bundle again")
        _check(folder / plan.file, plan.sha256)
    return engine


def _check(path: Path, sha256: str) -> None:
    found: Any = file_sha256(path) if path.is_file() else "missing"
    if found != sha256:
        raise BundleError(f"{path}: sha256 is {found}, but the bundle says {sha256}; compile the bundle again")
