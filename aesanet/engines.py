"""Compiled engines of a bundle: `engines/<key>/`, what each was made from, and its plans. Build and run agree on this.

An engine runs only where everything that went into it is the same. So its key is a hash over all of it, in words; a
key that left out a part would one day give a plan for another GPU or version.
"""

import importlib
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from aesanet.bundle import GRAPH_NAMES, GraphName, Manifest
from aesanet.errors import BackendError, BundleError
from aesanet.gpu import Gpu
from aesanet.hashing import file_sha256, parts_sha256

ENGINES_FOLDER: Final = "engines"
ENGINE_NAME: Final = "engine.json"

Flavour = Literal["tensorrt", "rtx"]
MODULES: Final[dict[Flavour, str]] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_EXTRAS: Final[dict[Flavour, str]] = {"tensorrt": "gpu", "rtx": "rtx"}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph's plan. `layers` counts kinds and types of layers as parsed; `activation_bytes` has one a profile."""

    file: str
    sha256: str
    size_bytes: int
    build_seconds: float
    activation_bytes: tuple[int, ...]
    layers: dict[str, int]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`engine.json`: every part of the key in words, and the plans.

    `capabilities` are the compute capabilities that RTX was told to build for; without any, it chose by itself.
    """

    key: str
    flavour: Flavour
    capabilities: tuple[str, ...]
    parts: dict[str, str]
    plans: dict[GraphName, Plan]


def short_key(key: str) -> str:
    """As much of a key as people and reports need."""
    return key[:16]


def engine_kind(key: str) -> str:
    """What an engine's backend is called, and `aesanet verify` keeps its findings by: see `Backend.kind`."""
    return f"tensorrt cuda fp16 {short_key(key)}"


def load_library(flavour: Flavour) -> Any:
    """TensorRT's or TensorRT-RTX's module; raises BackendError with what to install."""
    try:
        return importlib.import_module(MODULES[flavour])
    except ImportError as error:
        raise BackendError(
            f"{MODULES[flavour]} cannot be imported ({error}): pip install 'aesanet[{_EXTRAS[flavour]}]'"
        ) from None


def library_version(flavour: Flavour) -> str | None:
    """Of the installed library: its package may have the name of a CUDA, too. None where there is none."""
    return next((version for _, version in _packages(flavour)), None)


def _packages(flavour: Flavour) -> Iterator[tuple[str, str]]:
    """Names that the library's package may have and its versions, of those that are installed."""
    for name in (MODULES[flavour], *(f"{MODULES[flavour]}_cu{major}" for major in range(11, 20))):
        with suppress(PackageNotFoundError):
            yield name, version(name)


def known_capabilities(trt: Any) -> dict[str, Any]:
    """Compute capabilities that the library can build for without such a GPU: "8.9" and its own name for it.

    But for 7.5, for which TensorRT-RTX has no FP32 matrix product, and every bundle's front end has one.
    """
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in names.items() if re.fullmatch(r"SM(?!75)\d+", name)}


def machine_parts(flavour: Flavour, trt: Any, capabilities: tuple[str, ...], gpu: Gpu | None) -> dict[str, str]:
    """The parts of a key that are of the machine and its library; `gpu` is the one that TensorRT builds for."""
    if flavour == "tensorrt":
        where = str(gpu)
    else:
        where = f"compute capability {', '.join(capabilities)}" if capabilities else "the library's own choice"
    return {
        "library": f"{MODULES[flavour]} {trt.__version__}, CUDA {_cuda_of_library(flavour)}",
        "platform": f"{sys.platform} {platform.machine()}",
        "GPU": where,
    }


def runs_on(trt: Any, gpu: Gpu) -> bool:
    """Whether a library has kernels for a GPU: RTX leaves some out, and says which it knows; TensorRT takes all."""
    known = [float(capability) for capability in known_capabilities(trt)]
    return not known or float(gpu.capability) in known or float(gpu.capability) > max(known)


def misfits(engine: Engine, trt: Any, gpu: Gpu) -> list[str]:
    """What an engine was built for and is not here, in words; nothing where it can run."""
    here = machine_parts(engine.flavour, trt, engine.capabilities, gpu)
    found = [
        f"it was built for {name} {engine.parts.get(name)}, and here is {value}"
        for name, value in here.items()
        if engine.parts.get(name) != value
    ]
    if engine.capabilities and gpu.capability not in engine.capabilities:
        found.append(f"it was built for {here['GPU']}, and here is {gpu}")
    return found


def read_engine(bundle: str | Path, manifest: Manifest, key: str) -> Engine:
    """An engine of the bundle, once its files were seen to be those that were built; raises BundleError."""
    folder = Path(bundle) / ENGINES_FOLDER / key
    path = folder / ENGINE_NAME
    _check(path, manifest.engines.get(key, "nothing"))
    try:
        engine = msgspec.json.decode(path.read_bytes(), type=Engine)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: {error}; compile the bundle again") from None
    if engine.key != key or parts_sha256(engine.parts) != key or tuple(engine.plans) != GRAPH_NAMES:
        raise BundleError(f"{path}: is not the engine {key}; compile the bundle again")
    for name, plan in engine.plans.items():
        if plan.file != f"{name}.plan":
            raise BundleError(f"{path}: the {name}'s plan is {plan.file!r}, not {name}.plan; compile the bundle again")
        _check(folder / plan.file, plan.sha256)
    return engine


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: no such file; compile the bundle again")
    try:
        found = file_sha256(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
    if found != sha256:
        raise BundleError(f"{path}: sha256 is {found}, but the bundle says {sha256}; compile the bundle again")


def _cuda_of_library(flavour: Flavour) -> str:
    """CUDA's major version that the installed library is of, from its package's name; "unknown" if none says it."""
    majors = (name.partition("_cu")[2] for name, _ in _packages(flavour))
    return next(filter(None, majors), "unknown")
