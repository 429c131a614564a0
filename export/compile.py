"""A bundle's graphs to an engine in it: built under its key, or found there."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from aesanet.bundle import GraphSpec, Manifest, graph_file, read_manifest
from aesanet.engines import ENGINE_NAME, ENGINES_FOLDER, Engine, Plan, engine_key, read_engine
from aesanet.errors import BackendError, BundleError, CompileError
from aesanet.export.engine import MODULES, Flavour, Settings, build_plan, cuda_of_library, load_library
from aesanet.export.writer import write_manifest
from aesanet.hashing import file_sha256
from aesanet.machine import list_gpus


def choose_flavour(asked: str) -> Flavour:
    """The library asked for; of `auto`, TensorRT where both it and a GPU are here, and else RTX."""
    if asked != "auto":
        return "tensorrt" if asked == "tensorrt" else "rtx"
    try:
        list_gpus()
    except BackendError:
        return "rtx"
    return "tensorrt" if importlib.util.find_spec(MODULES["tensorrt"]) else "rtx"


def compile_bundle(
    bundle: str | Path,
    flavour: Flavour,
    settings: Settings,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Engine, bool]:
    """Build the FP16 engine of a bundle, or find it there by its key; says whether it was built.

    The front end stays FP32. Raises BundleError, or CompileError with TensorRT's own reason; nothing is then changed.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if manifest.half is None:
        raise BundleError(f"{bundle}: has no FP16 graphs; export the checkpoint again with --fp16")
    graphs = {"frontend": manifest.graphs["frontend"], **manifest.half.graphs}
    trt = load_library(flavour)
    # FP32 logits are products of half numbers, which TF32 multiplies exactly; the encoder has no other FP32 product.
    tf32_graph = "encoder" if manifest.half.logits == "fp32" else None
    parts = {
        **{f"{name} graph": spec.sha256 for name, spec in graphs.items()},
        "library": f"{MODULES[flavour]} {trt.__version__}, CUDA {cuda_of_library(flavour)}",
        "GPU": _gpu(flavour, settings),
        "profiles": "; ".join(f"{p.min_seconds:g} to {p.max_seconds:g} s x {p.max_batch}" for p in settings.profiles),
        "TF32": tf32_graph or "no graph",
        "level": "the builder's own" if settings.level is None else str(settings.level),
        "workspace": "all there is" if settings.workspace is None else f"{settings.workspace:g} GiB",
    }
    key = engine_key(parts)
    if key in manifest.engines:
        try:
            return read_engine(bundle, manifest, key), False
        except BundleError as error:
            progress(f"{error}; it is built anew")
    elif (changed := _changed_parts(bundle, manifest, parts)) is not None:
        progress(f"another engine than the last is needed: {', '.join(changed)} changed")
    (bundle / ENGINES_FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{key[:8]}.", dir=bundle / ENGINES_FOLDER) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        log: list[str] = []
        try:
            plans = {
                name: _write_plan(
                    trt,
                    graph_file(bundle, spec),
                    spec,
                    settings,
                    name == tf32_graph,
                    folder / f"{name}.plan",
                    log,
                    progress,
                )
                for name, spec in graphs.items()
            }
        finally:
            log_file = bundle / ENGINES_FOLDER / "build.log"
            log_file.write_text("\n".join(log) + "\n", encoding="utf-8")
        engine = Engine(key, parts, plans)
        (folder / ENGINE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(engine), indent=2) + b"\n")
        place = bundle / ENGINES_FOLDER / key
        shutil.rmtree(place, ignore_errors=True)
        folder.rename(place)
    engines = manifest.engines | {key: file_sha256(place / ENGINE_NAME)}
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=engines))
    return engine, True


def _gpu(flavour: Flavour, settings: Settings) -> str:
    """The GPUs that a plan is for, in words; raises CompileError where one has to be here and is not."""
    if settings.capabilities:
        return f"compute capability {', '.join(settings.capabilities)}"
    if flavour == "rtx":
        return "all that the library builds for by itself"
    try:
        gpu = list_gpus()[0]
    except BackendError as error:
        raise CompileError(
            f"TensorRT builds for the GPU that is here: {error}; compile on the machine that will score, "
            "or for RTX GPUs with --flavour rtx"
        ) from None
    return f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}"


def _changed_parts(bundle: Path, manifest: Manifest, parts: Mapping[str, str]) -> list[str] | None:
    """Names of the parts in which the newest engine of the bundle differs; None where it has none to compare."""
    try:
        before = read_engine(bundle, manifest, list(manifest.engines)[-1]).parts
    except (IndexError, BundleError):
        return None
    return [name for name, value in parts.items() if before.get(name) != value]


def _write_plan(
    trt: Any,
    graph: Path,
    spec: GraphSpec,
    settings: Settings,
    tf32: bool,
    out: Path,
    log: list[str],
    progress: Callable[[str], None],
) -> Plan:
    progress(f"compiling {graph.name}")
    built = build_plan(trt, graph, spec, settings, tf32, log, progress)
    out.write_bytes(built.plan)
    return Plan(
        file=out.name,
        sha256=file_sha256(out),
        size_bytes=len(built.plan),
        build_seconds=round(built.seconds, 2),
        activation_bytes=built.activation_bytes,
        layers=built.layers,
    )
