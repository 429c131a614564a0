"""The FP16 graphs of a bundle: written, and let in only if their scores are the FP32 graphs' on real audio."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from aesanet.bundle import HALF_GRAPH_NAMES, Fused, GraphName, GraphPrecision, GraphSpec, Half
from aesanet.errors import ExportError
from aesanet.export.fusion import fuse
from aesanet.export.graph import write_graph
from aesanet.export.layers import Layers, compare_half
from aesanet.export.parity import relative_error
from aesanet.export.precision import to_half
from aesanet.export.rounding import check_rounding
from aesanet.export.sessions import ENGINE, Sessions, open_as_written, open_sessions, run_graphs
from aesanet.hashing import file_sha256
from aesanet.lengths import SAMPLE_RATE, num_tokens
from aesanet.limits import FEATURES_LIMIT, SCORES_LIMIT
from aesanet.padding import pad_batch

_FEATURES_LIMIT, _SCORES_LIMIT = FEATURES_LIMIT["fp16"], SCORES_LIMIT["fp16"]
_BATCH: Final = 4  # clips that are scored together too
# The faster first. Trunks are loud and heads hardly, and float logits keep engines from fusing attention, which costs a
# head the most memory.
_LOGITS: Final[tuple[dict[GraphName, GraphPrecision], ...]] = (
    {"encoder": "fp16", "head": "fp16"},
    {"encoder": "fp32", "head": "fp16"},
    {"encoder": "fp16", "head": "fp32"},
    {"encoder": "fp32", "head": "fp32"},
)

Own: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Of one clip: features, float32 [its own tokens, width], and scores, float32 [4]."""


def add_half(
    folder: Path,
    graphs: Mapping[GraphName, GraphSpec],
    clips: Sequence[np.ndarray],
    progress: Callable[[str], None] = lambda step: None,
) -> Half:
    """Write `encoder.fp16.onnx` and `head.fp16.onnx` beside the FP32 graphs in `folder`, and both fused (`fuse`).

    clips : each float32 [samples], 16 kHz, real audio. FP32 scores each alone; FP16 each alone, and the first few
            together in one padded batch

    Attention logits are rounded to half if that keeps the limits, as it is faster, and else stay FP32: in the encoder
    first, then in the head. Raises ExportError, with what was measured each way, if nothing does. Fused graphs round
    logits nowhere; where they do not keep the limits all the same, the bundle does without.
    """
    check_rounding()
    reference = open_sessions(_paths(folder, graphs))
    alone = [_run(reference, [clip])[0] for clip in clips]
    tried = []
    for logits in _LOGITS:
        progress(f"rounding to FP16, attention logits in {in_words(logits)}")
        specs = {name: _write_half(folder, graphs[name], logits[name]) for name in HALF_GRAPH_NAMES}
        half = {**reference, **open_as_written(_paths(folder, specs))}
        features, scores = _worst_differences(half, clips, alone)
        if features <= _FEATURES_LIMIT and scores <= _SCORES_LIMIT:
            progress("fusing for ONNX Runtime on a GPU")
            return Half(
                graphs=specs,
                logits=logits,
                engine=f"{ENGINE}, every half tensor rounded",
                clips=len(clips),
                seconds=sum(map(len, clips)) / SAMPLE_RATE,
                features_relative=features,
                scores_max_abs=scores,
                features_limit=_FEATURES_LIMIT,
                scores_limit=_SCORES_LIMIT,
                fused=_add_fused(folder, graphs, specs, reference, clips, alone, progress),
            )
        tried.append(f"{features:.1e} and {scores:.1e} with logits in {in_words(logits)}")
    each = [_worst_differences(half, [clip], [own])[1] for clip, own in zip(clips, alone, strict=True)]
    worst = clips[int(np.nan_to_num(each, nan=np.inf).argmax())]
    layers = "; ".join(map(str, _layers(folder, graphs, specs, reference, worst)))
    raise ExportError(
        f"FP16 does not keep this checkpoint's scores: features (relative) and scores differ by {', '.join(tried)}; "
        f"limits {_FEATURES_LIMIT:.0e} and {_SCORES_LIMIT:.0e}. On the worst clip, {layers}. Export without --fp16, "
        "and use fp32 or bf16"
    )


def in_words(logits: Mapping[GraphName, GraphPrecision]) -> str:
    """The type of attention logits, for people."""
    if len(set(logits.values())) == 1:
        return logits["encoder"]
    return " and ".join(f"{precision} in the {graph}" for graph, precision in logits.items())


def _write_half(folder: Path, spec: GraphSpec, logits: GraphPrecision) -> GraphSpec:
    model = ir.external_data.load_to_model(ir.load(folder / spec.file))
    to_half(model, logits)
    path = folder / f"{Path(spec.file).stem}.fp16.onnx"
    sha256, weights = write_graph(ir.to_proto(model), path)
    return msgspec.structs.replace(spec, file=path.name, sha256=sha256, precision="fp16", weights=weights)


def _add_fused(
    folder: Path,
    graphs: Mapping[GraphName, GraphSpec],
    half: Mapping[GraphName, GraphSpec],
    reference: Sessions,
    clips: Sequence[np.ndarray],
    alone: Sequence[Own],
    progress: Callable[[str], None],
) -> Fused | None:
    """The FP16 graphs fused; or None, and no files, where they do not keep the scores or cannot be had."""
    try:
        specs = {name: _write_fused(folder, graphs[name], spec) for name, spec in half.items()}
        fused = {**reference, **open_as_written(_paths(folder, specs))}
        features, scores = _worst_differences(fused, clips, alone)
        if features <= _FEATURES_LIMIT and scores <= _SCORES_LIMIT:
            return Fused(specs, features, scores)
        reason = f"features (relative) and scores differ by {features:.1e} and {scores:.1e}"
    except ExportError as error:
        reason = str(error)
    progress(f"no fused graphs: {reason}")
    for name in half:
        _fused_path(folder, graphs[name]).unlink(missing_ok=True)
    return None


def _fused_path(folder: Path, spec: GraphSpec) -> Path:
    return folder / f"{Path(spec.file).stem}.fused.onnx"


def _write_fused(folder: Path, spec: GraphSpec, half: GraphSpec) -> GraphSpec:
    """A graph fused; what weights it has in common with the FP16 graph are that graph's file, if that has one."""
    model = ir.external_data.load_to_model(ir.load(folder / spec.file))
    fuse(model)
    to_half(model, "fp16")
    theirs = ir.load(folder / half.file).graph.initializers
    for name, value in model.graph.initializers.items():
        if name in theirs and isinstance(theirs[name].const_value, ir.ExternalTensor):
            value.const_value = theirs[name].const_value
    path = _fused_path(folder, spec)
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    sha256 = file_sha256(path, *([folder / half.weights] if half.weights else []))
    return msgspec.structs.replace(half, file=path.name, sha256=sha256)


def _paths(folder: Path, specs: Mapping[GraphName, GraphSpec]) -> dict[GraphName, Path]:
    return {name: folder / spec.file for name, spec in specs.items()}


def _worst_differences(half: Sessions, clips: Sequence[np.ndarray], alone: Sequence[Own]) -> tuple[float, float]:
    """Relative error of features and largest difference of scores; a NaN anywhere makes its own NaN.

    alone : what FP32 makes of each clip
    """
    features, scores = [], []
    for batch in (*([number] for number in range(len(clips))), list(range(min(len(clips), _BATCH)))):
        found = _run(half, [clips[number] for number in batch])
        for (own_features, own_scores), number in zip(found, batch, strict=True):
            expected_features, expected_scores = alone[number]
            features.append(relative_error(own_features, expected_features))
            with np.errstate(invalid="ignore"):
                scores.append(np.abs(own_scores - expected_scores).max())
    return float(np.max(features)), float(np.max(scores))  # of anything and NaN, NaN


def _layers(
    folder: Path,
    graphs: Mapping[GraphName, GraphSpec],
    half: Mapping[GraphName, GraphSpec],
    reference: Sessions,
    clip: np.ndarray,
) -> Iterator[Layers]:
    """Where the FP16 graphs go wrong on a clip; each is given what the FP32 graph before it makes."""
    tokens = np.array([num_tokens(len(clip))])
    fbank, features, _ = run_graphs(reference, clip[None], tokens)
    given: dict[GraphName, dict[str, np.ndarray]] = {"encoder": {"fbank": fbank}, "head": {"features": features}}
    for name, arrays in given.items():
        inputs = {**arrays, "num_tokens": tokens}
        yield compare_half(name, onnx.load(folder / graphs[name].file), ir.load(folder / half[name].file), inputs)


def _run(sessions: Sessions, clips: Sequence[np.ndarray]) -> list[Own]:
    """What becomes of every clip, all in one padded batch."""
    waveform, num_samples = pad_batch(clips)
    tokens = num_tokens(num_samples)
    _, features, scores = run_graphs(sessions, waveform, tokens)
    return [(own[:count], score) for own, count, score in zip(features, tokens, scores, strict=True)]
