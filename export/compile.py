"""A bundle's graphs to an engine in it: built under its key, or found there."""

import importlib.util
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Literal

import msgspec

from aesanet.bundle import GraphName, GraphSpec, Manifest, graph_file, read_manifest
from aesanet.engines import (
    ENGINE_NAME,
    ENGINES_FOLDER,
    MODULES,
    Engine,
    Flavour,
    Plan,
    engine_kind,
    load_library,
    machine_parts,
    read_engine,
    short_key,
)
from aesanet.errors import BackendError, BundleError, CompileError
from aesanet.export.engine import RECIPE, BuildSettings, BuiltPlan, build_plan, check_capabilities, workspace_bytes
from aesanet.export.timing import TimingCache
from aesanet.export.writer import change_manifest, changing, write_manifest
from aesanet.files import LEFT_OVER_SECONDS
from aesanet.gpu import Gpu, cuda_gpu, list_gpus, load_cuda
from aesanet.hashing import file_sha256, parts_sha256

_LOG_NAME = "build.log"


def choose_flavour(asked: Literal["auto"] | Flavour) -> Flavour:
    """The library asked for; of `auto`, TensorRT where both it and a GPU are here, and else RTX."""
    if asked != "auto":
        return asked
    try:
        list_gpus()
    except BackendError:
        return "rtx"
    return "tensorrt" if importlib.util.find_spec(MODULES["tensorrt"]) else "rtx"


def compile_bundle(
    bundle: str | Path,
    flavour: Flavour,
    settings: BuildSettings,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Engine, bool]:
    """Build the FP16 engine of a bundle, or find it there by its key; says whether it was built.

    The front end stays FP32. Raises BundleError, BackendError (no such library here), or CompileError with TensorRT's
    own reason; the bundle is then the same as before, but for the library's lines in `engines/build.log`.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    graphs = _graphs(bundle, manifest)
    trt = load_library(flavour)
    check_capabilities(trt, settings.capabilities)
    # FP32 logits are products of half numbers, which TF32 multiplies exactly; the encoder has no other FP32 product.
    tf32_graph = "encoder" if manifest.half and manifest.half.logits["encoder"] == "fp32" else None
    machine = machine_parts(flavour, trt, settings.capabilities, _gpu() if flavour == "tensorrt" else None)
    timing = TimingCache(machine) if flavour == "tensorrt" else None
    parts = {
        **{f"{name} graph": spec.sha256 for name, spec in graphs.items()},
        **machine,
        "recipe": str(RECIPE),
        "profiles": "; ".join(map(str, settings.profiles)),
        "TF32": tf32_graph or "no graph",
        "level": "the library's own" if settings.level is None else str(settings.level),
        "workspace": "all" if settings.workspace_gib is None else f"{workspace_bytes(settings.workspace_gib)} bytes",
    }
    key = parts_sha256(parts)
    if key in manifest.engines:
        try:
            engine = read_engine(bundle, manifest, key)
        except BundleError as error:
            progress(f"this engine is damaged, and is built anew ({error})")
        else:
            if list(manifest.engines)[-1] != key:
                _put_last(bundle, key)
            return engine, False
    elif (changed := _changed_parts(bundle, manifest, parts)) is not None:
        progress(f"another engine than the last is needed: {', '.join(changed)} changed")
    log: list[str] = []
    log_of_failure = bundle / ENGINES_FOLDER / _LOG_NAME
    finished = False
    try:
        with tempfile.TemporaryFile(dir=bundle):  # where the manifest goes: what cannot be written is known now
            pass
        (bundle / ENGINES_FOLDER).mkdir(exist_ok=True)
        _sweep(bundle / ENGINES_FOLDER)
        with tempfile.TemporaryDirectory(prefix=f".{key[:8]}.", dir=bundle / ENGINES_FOLDER) as temporary:
            folder = Path(temporary, "new")
            folder.mkdir()
            plans = {}
            for name, spec in graphs.items():
                progress(f"compiling {spec.file}")
                built = build_plan(trt, bundle / spec.file, spec, settings, name == tf32_graph, log, progress, timing)
                plans[name] = _write_plan(built, folder / f"{name}.plan")
            engine = Engine(key, flavour, settings.capabilities, parts, plans)
            (folder / _LOG_NAME).write_text(_lines(log), encoding="utf-8")
            (folder / ENGINE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(engine), indent=2) + b"\n")
            _add(bundle, engine, folder, graphs)
            finished = True
    except OSError as error:
        _check_same(bundle, read_manifest(bundle), graphs)  # of a bundle that was replaced, the folder is gone
        raise CompileError(f"{bundle}: the engine cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            if finished:
                log_of_failure.unlink(missing_ok=True)
            else:
                log_of_failure.write_text(_lines(log), encoding="utf-8")
    return engine, True


def _lines(log: list[str]) -> str:
    return "\n".join(log) + "\n"


def _sweep(engines: Path) -> None:
    """Remove what builds that were killed have left, once it is too old to be of one that still runs."""
    for left in engines.glob(".*.*"):
        if time.time() - left.stat().st_mtime > LEFT_OVER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _graphs(bundle: Path, manifest: Manifest) -> dict[GraphName, GraphSpec]:
    """The graphs that an engine is made of, their files checked; raises BundleError."""
    if manifest.half is None:
        raise BundleError(f"{bundle}: has no FP16 graphs; export the checkpoint again with --fp16")
    graphs = {"frontend": manifest.graphs["frontend"], **manifest.half.graphs}
    for spec in graphs.values():
        graph_file(bundle, spec)
    return graphs


def _check_same(bundle: Path, manifest: Manifest, graphs: Mapping[GraphName, GraphSpec]) -> None:
    """Raise CompileError for a bundle that has other graphs by now."""
    if _graphs(bundle, manifest) != graphs:
        raise CompileError(f"{bundle}: was exported anew meanwhile; compile it again")


def _add(bundle: Path, engine: Engine, folder: Path, graphs: Mapping[GraphName, GraphSpec]) -> None:
    """Move a finished engine to its place and enter it into the manifest as that is now: minutes have passed."""

    place = bundle / ENGINES_FOLDER / engine.key
    with changing(bundle):
        manifest = read_manifest(bundle)
        _check_same(bundle, manifest, graphs)
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)
        # What was found of an engine that is built anew says nothing of this one.
        manifest = _without_engine(manifest, engine.key)
        try:
            write_manifest(bundle, _with_engine_last(manifest, engine.key, file_sha256(place / ENGINE_NAME)))
        except OSError:
            shutil.rmtree(place, ignore_errors=True)  # nobody knows of it, but as one that was damaged
            raise


def _put_last(bundle: Path, key: str) -> None:
    """Have an engine that was there be taken before others; raises CompileError where it cannot be."""

    def reorder(manifest: Manifest) -> Manifest:
        if key not in manifest.engines:
            raise CompileError(f"{bundle}: engine {short_key(key)} was removed meanwhile; compile the bundle again")
        return _with_engine_last(manifest, key, manifest.engines[key])

    try:
        change_manifest(bundle, reorder)
    except OSError as error:
        raise CompileError(
            f"{bundle}: engine {short_key(key)} is there, but cannot be put first: {error.strerror or error}"
        ) from None


def prune_engines(bundle: str | Path, kept: str) -> tuple[int, int]:
    """Remove all engines of a bundle but the one with the key `kept`; returns how many, and their bytes.

    Raises BundleError, and CompileError where that one is not there, or another cannot be removed.
    """
    bundle = Path(bundle)
    count = size = 0
    with changing(bundle):
        manifest = read_manifest(bundle)
        if kept not in manifest.engines:
            raise CompileError(f"{bundle}: engine {short_key(kept)} was removed meanwhile; none is removed now")
        manifest = reduce(_without_engine, manifest.engines.keys() - {kept}, manifest)
        try:
            write_manifest(bundle, manifest)  # before the files: an engine that is told of must be there
            for folder in (bundle / ENGINES_FOLDER).iterdir():
                if re.fullmatch("[0-9a-f]{64}", folder.name) and folder.name != kept:
                    removed = sum(file.stat().st_size for file in folder.iterdir())
                    shutil.rmtree(folder)
                    count, size = count + 1, size + removed
        except OSError as error:
            raise CompileError(
                f"{bundle}: engines cannot be removed: {error.filename}: {error.strerror or error}"
            ) from None
    return count, size


def _with_engine_last(manifest: Manifest, key: str, sha256: str) -> Manifest:
    """The manifest with an engine at the end, from where those who score take the first that fits."""
    others = {other: digest for other, digest in manifest.engines.items() if other != key}
    return msgspec.structs.replace(manifest, engines=others | {key: sha256})


def _without_engine(manifest: Manifest, key: str) -> Manifest:
    """The manifest without an engine and what was found of it."""
    engines = {other: sha256 for other, sha256 in manifest.engines.items() if other != key}
    verified = {kind: found for kind, found in manifest.verified.items() if kind != engine_kind(key)}
    return msgspec.structs.replace(manifest, engines=engines, verified=verified)


def _gpu() -> Gpu:
    """The GPU that TensorRT builds for; raises CompileError where there is none."""
    try:
        return cuda_gpu(load_cuda())
    except BackendError as error:
        raise CompileError(
            f"TensorRT builds for the GPU that is here, and there is none: {error}; "
            "compile on the machine that will score, or for RTX GPUs with --flavour rtx"
        ) from None


def _changed_parts(bundle: Path, manifest: Manifest, parts: Mapping[str, str]) -> list[str] | None:
    """Names of the parts in which the last engine that is whole differs; None where there is none to compare."""
    for key in reversed(manifest.engines):
        with suppress(BundleError):
            before = read_engine(bundle, manifest, key).parts
            return [name for name, value in parts.items() if before.get(name) != value]
    return None


def _write_plan(built: BuiltPlan, out: Path) -> Plan:
    out.write_bytes(built.plan)
    return Plan(
        file=out.name,
        sha256=file_sha256(out),
        size_bytes=len(built.plan),
        build_seconds=round(built.seconds, 2),
        activation_bytes=built.activation_bytes,
        layers=built.layers,
    )
