"""The FP16 graphs of a bundle: written, and let in only if their scores are the FP32 graphs' on real audio."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from aesanet.bundle import HALF_GRAPH_NAMES, Fused, GraphName, GraphPrecision, GraphSpec, Half
from aesanet.errors import ExportError
from aesanet.export.fusion import fuse
from aesanet.export.graph import write_graph
from aesanet.export.layers import Layers, compare_half
from aesanet.export.parity import relative_error
from aesanet.export.precision import to_half
from aesanet.export.rounding import check_rounding, session_as_written
from aesanet.hashing import file_sha256
from aesanet.lengths import SAMPLE_RATE, num_tokens

FEATURES_LIMIT: Final = 5e-3
SCORES_LIMIT: Final = 0.02

_BATCH: Final = 4  # clips that are scored together too
# The faster first. Trunks are loud and heads hardly, and float logits keep engines from fusing attention, which costs a
# head the most memory.
_LOGITS: Final[tuple[dict[GraphName, GraphPrecision], ...]] = (
    {"encoder": "fp16", "head": "fp16"},
    {"encoder": "fp32", "head": "fp16"},
    {"encoder": "fp16", "head": "fp32"},
    {"encoder": "fp32", "head": "fp32"},
)

Sessions = Mapping[GraphName, onnxruntime.InferenceSession]


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
    reference = {name: _session(folder / spec.file) for name, spec in graphs.items()}
    tried = []
    for logits in _LOGITS:
        progress(f"rounding to FP16, attention logits in {in_words(logits)}")
        specs = {name: _write_half(folder, graphs[name], logits[name]) for name in HALF_GRAPH_NAMES}
        half = _as_written(folder, specs)
        features, scores = _worst_differences(reference, half, clips)
        if features <= FEATURES_LIMIT and scores <= SCORES_LIMIT:
            progress("fusing for ONNX Runtime on a GPU")
            return Half(
                graphs=specs,
                logits=logits,
                engine=f"onnxruntime {onnxruntime.__version__}, CPU, every half tensor rounded",
                clips=len(clips),
                seconds=sum(map(len, clips)) / SAMPLE_RATE,
                features_relative=features,
                scores_max_abs=scores,
                features_limit=FEATURES_LIMIT,
                scores_limit=SCORES_LIMIT,
                fused=_add_fused(folder, graphs, specs, reference, clips, progress),
            )
        tried.append(f"{features:.1e} and {scores:.1e} with logits in {in_words(logits)}")
    worst = max(clips, key=lambda clip: np.nan_to_num(_worst_differences(reference, half, [clip])[1], nan=np.inf))
    layers = "; ".join(map(str, _layers(folder, graphs, specs, reference, worst)))
    raise ExportError(
        f"FP16 does not keep this checkpoint's scores: features (relative) and scores differ by {', '.join(tried)}; "
        f"limits {FEATURES_LIMIT:.0e} and {SCORES_LIMIT:.0e}. On the worst clip, {layers}. Export without --fp16, and "
        "use fp32 or bf16"
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
    progress: Callable[[str], None],
) -> Fused | None:
    """The FP16 graphs fused; or None, and no files, where they do not keep the scores or cannot be had."""
    try:
        specs = {name: _write_fused(folder, graphs[name], spec) for name, spec in half.items()}
        features, scores = _worst_differences(reference, _as_written(folder, specs), clips)
        if features <= FEATURES_LIMIT and scores <= SCORES_LIMIT:
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


def _as_written(folder: Path, specs: Mapping[GraphName, GraphSpec]) -> Sessions:
    return {name: session_as_written(ir.load(folder / spec.file)) for name, spec in specs.items()}


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _worst_differences(reference: Sessions, half: Sessions, clips: Sequence[np.ndarray]) -> tuple[float, float]:
    """Relative error of features and largest difference of scores; a NaN anywhere makes its own NaN."""
    features, scores = [], []
    alone = [_run(reference, reference["frontend"], [clip])[0] for clip in clips]
    for batch in (*([number] for number in range(len(clips))), list(range(min(len(clips), _BATCH)))):
        found = _run(half, reference["frontend"], [clips[number] for number in batch])
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
    (fbank,) = reference["frontend"].run(["fbank"], {"waveform": clip[None]})
    (features,) = reference["encoder"].run(["features"], {"fbank": fbank, "num_tokens": tokens})
    given: dict[GraphName, dict[str, np.ndarray]] = {"encoder": {"fbank": fbank}, "head": {"features": features}}
    for name, arrays in given.items():
        inputs = {**arrays, "num_tokens": tokens}
        yield compare_half(name, onnx.load(folder / graphs[name].file), ir.load(folder / half[name].file), inputs)


def _run(
    sessions: Sessions, frontend: onnxruntime.InferenceSession, clips: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of its own tokens and scores of every clip, all in one padded batch."""
    lengths = np.array([len(clip) for clip in clips])
    waveform = np.zeros((len(clips), lengths.max()), np.float32)
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    tokens = num_tokens(lengths)
    (fbank,) = frontend.run(["fbank"], {"waveform": waveform})
    (features,) = sessions["encoder"].run(["features"], {"fbank": fbank, "num_tokens": tokens})
    (scores,) = sessions["head"].run(["scores"], {"features": features, "num_tokens": tokens})
    return [(own[:count], score) for own, count, score in zip(features, tokens, scores, strict=True)]
