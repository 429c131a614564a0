"""The bundle: a folder of graphs and the manifest that build and run must agree on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from aesanet.axes import AXES
from aesanet.errors import BundleError
from aesanet.hashing import file_sha256
from aesanet.lengths import MEL_BINS, SAMPLE_RATE, WindowPolicy

SCHEMA_VERSION: Final = 3
MANIFEST_NAME: Final = "bundle.json"

GraphName = Literal["frontend", "encoder", "head"]
GRAPH_NAMES: Final[tuple[GraphName, ...]] = ("frontend", "encoder", "head")
HALF_GRAPH_NAMES: Final[tuple[GraphName, ...]] = ("encoder", "head")
"""The front end has no FP16 graph: half precision moves log-mel by whole units."""

GraphPrecision = Literal["fp32", "fp16"]
GraphForm = Literal["fp32", "fp16", "fused"]
"""As which engines take a bundle's graphs; a graph that a form has none of is the FP32 one."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph; an axis is a size, or the name of a dynamic axis."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of a bundle: an ONNX file, and perhaps one with its weights, which engines map and need not read.

    `sha256` is of both, the weights after the graph.
    """

    file: str
    sha256: str
    precision: GraphPrecision
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: str | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that a bundle was made from, with its whole config."""

    checkpoint: str
    sha256: str
    beats_sha256: str | None
    config: dict[str, Any]


class ParityCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ONNX Runtime on one batch against PyTorch on each of its clips alone: the largest differences.

    `features_relative` is |ONNX Runtime - PyTorch| / |PyTorch| of a clip's features, as Euclidean norms.
    """

    num_samples: tuple[int, ...]
    fbank_max_abs: float
    features_relative: float
    scores_max_abs: float


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured after the export, the worst over all cases, and the limits that it had to keep.

    `scores_spread` is the range of scores over the clips, on the axis where it is least: a difference far below it
    means something, one near it nothing.
    """

    engine: str
    features_relative: float
    scores_max_abs: float
    features_limit: float
    scores_limit: float
    scores_spread: float
    cases: tuple[ParityCase, ...]


class Fused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FP16 graphs in operators of ONNX Runtime that are fast with CUDA, and how far they were from FP32: as `Half`."""

    graphs: dict[GraphName, GraphSpec]
    features_relative: float
    scores_max_abs: float


class Half(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The FP16 graphs of a bundle, and how far they were from its FP32 graphs on real audio: the worst over all clips.

    `logits` are the types in which each graph's attention logits leave their matrix product (see docs/precision.md);
    `features_relative` is |fp16 - fp32| / |fp32| of a clip's features, as Euclidean norms. Engines are compiled from
    `graphs`; ONNX Runtime runs `fused` on GPUs that it is fast on, where the bundle has it.
    """

    graphs: dict[GraphName, GraphSpec]
    logits: dict[GraphName, GraphPrecision]
    engine: str
    clips: int
    seconds: float
    features_relative: float
    scores_max_abs: float
    features_limit: float
    scores_limit: float
    fused: Fused | None = None


class AxisParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One axis of an engine against PyTorch, over all windows, on the scale of 0-10.

    Differences are None where a score is no number, `srcc` and `ktau` where there is no correlation. `swapped_pairs`
    counts pairs of windows that PyTorch tells apart by more than the limit and the engine orders the other way.
    """

    max_abs: float | None
    mean_abs: float | None
    p99_abs: float | None
    srcc: float | None
    ktau: float | None
    swapped_pairs: int


class Verification(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `aesanet verify` found of one engine: each window alone against PyTorch in FP32, and against itself.

    `graphs` are the sha256 of what it was found of, and `engine` has its version: of anything else it says nothing.
    `reference_rounding` is what FP32 in a front end moves PyTorch's own scores by, at most, and widens the limit of a
    window (see docs/verify.md); `worst_of_limit` is the largest difference as a share of its window's limit;
    `batch_max_abs` is a window among others against the same alone; `repeat_max_abs` the same twice. `failures` are
    empty where it passed.
    """

    engine: str
    graphs: dict[GraphName, str]
    windows: int
    seconds: float
    axes: dict[str, AxisParity]
    reference_rounding: float
    worst_of_limit: float | None
    batch_max_abs: float | None
    repeat_max_abs: float | None
    limit: float
    failures: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`bundle.json`."""

    schema_version: int = SCHEMA_VERSION
    axes: tuple[str, ...] = AXES
    sample_rate: int = SAMPLE_RATE
    window: WindowPolicy
    weights: Literal["trained", "demo", "untrained"]
    score_range: tuple[float, float]
    calibration: dict[str, dict[str, float]]
    graphs: dict[GraphName, GraphSpec]
    source: Source
    tools: dict[str, str]
    parity: Parity
    half: Half | None = None
    engines: dict[str, str] = {}
    """Of each compiled engine, by its key: the sha256 of `engines/<key>/engine.json`, which has those of its plans."""
    verified: dict[str, Verification] = {}
    """By backend, device and precision, such as "openvino cpu bf16": the last that was found of it."""


def signature(graph: GraphName, width: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph, the same in every engine; `width` is the trunk's."""
    fbank = TensorSpec("fbank", "float32", ("batch", "frames", MEL_BINS))
    tokens = TensorSpec("num_tokens", "int64", ("batch",))
    features = TensorSpec("features", "float32", ("batch", "tokens", width))
    if graph == "frontend":
        return (TensorSpec("waveform", "float32", ("batch", "samples")),), (fbank,)
    if graph == "encoder":
        return (fbank, tokens), (features,)
    return (features, tokens), (TensorSpec("scores", "float32", ("batch", len(AXES))),)


def graph_hashes(manifest: Manifest, form: GraphForm) -> dict[GraphName, str]:
    """The sha256 of the three graphs in a form; raises as `graph_specs`."""
    return {name: spec.sha256 for name, spec in graph_specs(manifest, form).items()}


def graph_specs(manifest: Manifest, form: GraphForm) -> dict[GraphName, GraphSpec]:
    """The three graphs in a form; raises BundleError where there are none."""
    if form == "fp32":
        return manifest.graphs
    half = manifest.half
    own = half.fused if half is not None and form == "fused" else half
    if own is None:
        raise BundleError(f"the bundle has no {form} graphs; export the checkpoint again with --fp16")
    return manifest.graphs | own.graphs


def read_manifest(bundle: str | Path) -> Manifest:
    """Read and check `bundle.json`; raises BundleError that names the field, what was found and what to do."""
    path = Path(bundle) / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{bundle}: no bundle here ({path}: {error.strerror}); make one with `aesanet export`"
        ) from None
    try:
        version = msgspec.convert(msgspec.json.decode(content), dict[str, Any]).get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version is {version!r}, not {SCHEMA_VERSION}; export the checkpoint again"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}; export the checkpoint again") from None
    half = manifest.half
    for field, found, expected in (
        ("axes", manifest.axes, AXES),
        ("sample_rate", manifest.sample_rate, SAMPLE_RATE),
        ("graphs", tuple(manifest.graphs), GRAPH_NAMES),
        ("half.graphs", tuple(half.graphs if half else HALF_GRAPH_NAMES), HALF_GRAPH_NAMES),
        ("half.logits", tuple(half.logits if half else HALF_GRAPH_NAMES), HALF_GRAPH_NAMES),
        ("half.fused", tuple(half.fused.graphs if half and half.fused else HALF_GRAPH_NAMES), HALF_GRAPH_NAMES),
    ):
        if found != expected:
            raise BundleError(f"{path}: {field} is {found}; expected {expected}; export the checkpoint again")
    _check_tensors(path, manifest)
    return manifest


def _check_tensors(path: Path, manifest: Manifest) -> None:
    """Raise BundleError for a graph whose inputs and outputs are not those of every bundle."""
    half = manifest.half
    parts: dict[str, Mapping[GraphName, GraphSpec]] = {"graphs": manifest.graphs}
    if half is not None:
        parts |= {"half.graphs": half.graphs} | ({"half.fused.graphs": half.fused.graphs} if half.fused else {})
    outputs = manifest.graphs["encoder"].outputs
    last = outputs[0].shape[-1] if outputs and outputs[0].shape else 0
    width = last if isinstance(last, int) else 0
    for part, specs in parts.items():
        for name, spec in specs.items():
            if (spec.inputs, spec.outputs) != signature(name, width) or (name == "encoder" and width < 1):
                raise BundleError(f"{path}: {part}.{name} has other inputs or outputs; export the checkpoint again")


def graph_file(bundle: str | Path, spec: GraphSpec) -> Path:
    """The path of a graph's ONNX file, once its hash, and its weights', was seen to be the manifest's.

    Raises BundleError.
    """
    names = [spec.file] if spec.weights is None else [spec.file, spec.weights]
    paths = [Path(bundle) / name for name in names]
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or not path.is_file():
            raise BundleError(f"{path}: no such file in the bundle; export the checkpoint again")
    told = " with ".join(map(str, paths))
    try:
        found = file_sha256(*paths)
    except OSError as error:
        raise BundleError(f"{told}: cannot be read: {error.strerror}") from None
    if found != spec.sha256:
        raise BundleError(
            f"{told}: sha256 is {found}, but the manifest says {spec.sha256}; export the checkpoint again"
        )
    return paths[0]
