"""ONNX to a TensorRT plan: one code path for TensorRT and TensorRT-RTX, which share the names that it takes.

What only one has is looked up and not assumed: RTX builds for GPUs that are not here, TensorRT for the one that is.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from aesanet.bundle import GraphSpec
from aesanet.engines import known_capabilities
from aesanet.errors import CompileError
from aesanet.export.profiles import Profile
from aesanet.export.timing import TimingCache
from aesanet.interrupts import on_interrupt

RECIPE: Final = 2
"""A part of every engine's key: to be raised when `build_plan` builds otherwise than before."""

_SECONDS_BETWEEN_NEWS: Final = 5.0


class BuildSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan depends on beside its graph.

    capabilities  : of the GPUs to build for, such as "8.9", each one of `known_capabilities`; empty for those that the
                    library builds for by itself
    level         : how long the builder searches, 0 to 5, or None for its own choice
    workspace_gib : that a kernel may use, or None for all there is
    """

    profiles: tuple[Profile, ...]
    capabilities: tuple[str, ...] = ()
    level: int | None = None
    workspace_gib: float | None = None


class BuiltPlan(msgspec.Struct, frozen=True):
    """A plan and what is known of it. `layers` counts types of the parsed network, as "MATRIX_MULTIPLY HALF"."""

    plan: bytes
    seconds: float
    layers: dict[str, int]
    activation_bytes: tuple[int, ...]


def workspace_bytes(gib: float) -> int:
    """GiB in bytes."""
    return round(gib * 2**30)


def build_plan(
    trt: Any,
    path: Path,
    spec: GraphSpec,
    settings: BuildSettings,
    tf32: bool,
    log: list[str],
    progress: Callable[[str], None] = lambda step: None,
    timing: TimingCache | None = None,
) -> BuiltPlan:
    """Parse one ONNX file and build its plan, strongly typed: every tensor has the type that the file says.

    tf32   : whether FP32 products may round their factors to ten bits
    log    : receives every layer as the library parsed it, with its type, and the library's own lines
    timing : what earlier builds measured, and this one adds to

    Raises CompileError with the parser's or the builder's reason.
    """
    before = len(log)
    logger = _logger(trt, log)
    builder = _builder(trt, logger, log)
    network = parse(trt, builder, logger, path)
    layers = layer_types(network)
    log.extend(f"LAYER {name}: {kind} {dtype}" for name, kind, dtype in layers)
    config = builder.create_builder_config()
    # On by default, and it moves log-mel by up to 5.5.
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    # Both let a batch below a profile's largest run in as little working memory as it needs, and in ours alone.
    resize = getattr(getattr(trt, "PreviewFeature", None), "RUNTIME_ACTIVATION_RESIZE_10_10", None)
    if resize is not None:
        config.set_preview_feature(resize, True)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(settings.workspace_gib))
    for profile in settings.profiles:
        shapes = builder.create_optimization_profile()
        for given in spec.inputs:
            shapes.set_shape(given.name, *profile.shapes(given))
        if config.add_optimization_profile(shapes) < 0:
            raise CompileError(f"{path.name}: profile {profile} was refused: {_last(log[before:])}")
    if settings.capabilities:
        config.num_compute_capabilities = len(settings.capabilities)
    for index, capability in enumerate(settings.capabilities):
        if not config.set_compute_capability(known_capabilities(trt)[capability], index):
            raise CompileError(f"compute capability {capability} was refused by {trt.__name__} {trt.__version__}")
    if timing is not None:
        timing.attach(config)
    started = time.monotonic()
    with _interrupts() as pressed:
        config.progress_monitor = _monitor(trt, lambda phase: progress(f"{path.name}: {phase}"), pressed)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CompileError(f"{path.name} could not be built: {_last(log[before:])}")
    if timing is not None:
        timing.keep(config)
    return BuiltPlan(
        plan=bytes(plan),
        seconds=time.monotonic() - started,
        layers=dict(sorted(Counter(f"{kind} {dtype}" for _, kind, dtype in layers).items())),
        activation_bytes=tuple(
            int(n) for line in log[before:] for n in re.findall(r"Total Activation Memory: (\d+) bytes", line)
        ),
    )


def parse(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    """The network of an ONNX file; raises CompileError with node, operator and reason of each refusal."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows no other networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes(), str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {e.desc()}" for e in errors)
        raise CompileError(f"{path.name}: {trt.__name__} {trt.__version__} cannot take it: {reasons}")
    return network


def layer_types(network: Any) -> list[tuple[str, str, str]]:
    """Name, kind and output type of every layer of a parsed network."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [(layer.name, layer.type.name, layer.get_output(0).dtype.name) for layer in layers if layer.num_outputs]


def check_capabilities(trt: Any, capabilities: Sequence[str]) -> None:
    """Raise CompileError for the first that the library cannot build for."""
    known = known_capabilities(trt)
    if unknown := [capability for capability in capabilities if capability not in known]:
        can = f"builds for {', '.join(known)}" if known else "builds for the GPU that is here; --flavour rtx for others"
        raise CompileError(f"compute capability {', '.join(unknown)}: {trt.__name__} {trt.__version__} {can}")


def _builder(trt: Any, logger: Any, log: list[str]) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError:  # that pybind11 raises for a null pointer
        raise CompileError(f"{trt.__name__} {trt.__version__} did not start; is there a GPU? {_last(log)}") from None


def _last(log: Sequence[str]) -> str:
    """The library's last complaint."""
    complaints = [line for line in log if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    last = (complaints or ["no reason was given"])[-1]
    return f"{last}; smaller --profiles may do" if "OutOfMemory" in last else last


def _logger(trt: Any, log: list[str]) -> Any:
    """A logger that keeps what the library says, but for its details."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                log.append(f"{severity.name} {message}")

    return Logger()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C and SIGTERM until the block ends, as the library drops exceptions; yields what tells of them."""
    pressed = False

    def press() -> None:
        nonlocal pressed
        pressed = True

    with on_interrupt(press):
        yield lambda: pressed
    if pressed:
        raise KeyboardInterrupt


def _monitor(trt: Any, news: Callable[[str], None], stop: Callable[[], bool]) -> Any:
    """Tells of the outermost phases, at most every few seconds, and ends the build when it shall stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps and time.monotonic() - self.told >= _SECONDS_BETWEEN_NEWS:
                self.told = time.monotonic()
                news(f"{phase_name}, step {step + 1} of {self.steps[phase_name]} done")
            return not stop()

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
