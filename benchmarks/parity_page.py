"""What `aesanet verify` found, as one HTML page that needs nothing else: verdicts, tables, plots."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from aesanet.axes import AXES
from aesanet.benchmarks.page import AXIS_COLOURS, page, table, text
from aesanet.benchmarks.parity import SRCC_FROM, SRCC_LIMIT, allowed
from aesanet.benchmarks.reference import Reference
from aesanet.bundle import Fused, Half, Manifest, Parity, Verification
from aesanet.engines import Engine, short_key

_MANY_POINTS = 2000  # an axis, from which on they are drawn as a picture


def parity_page(
    bundle: str,
    manifest: Manifest,
    reference: Reference,
    found: Mapping[str, tuple[Verification, np.ndarray | None]],
    layers: Sequence[str],
    engines: Sequence[Engine],
) -> str:
    """The page: `found` has what was measured of each engine and its scores of each window, float64 [windows, 4].

    engines : that were compiled into the bundle
    """
    seconds = sum(len(window.samples) for window in reference.windows) / manifest.sample_rate
    parts = [
        f"<h1>Are the scores of {text(bundle)} the checkpoint's?</h1>",
        f"<p>{text(manifest.source.checkpoint)} (sha256 {manifest.source.sha256[:16]}…; {manifest.weights} weights), "
        f"{len(reference.windows)} windows, {seconds:.0f} s of audio. The reference is PyTorch in FP32, eager, each "
        f"window alone and unpadded. FP32 in a front end moves these scores by up to {reference.rounding.max():.1e}; a "
        f"window's limit is widened by twice what it is there, by .02 at most, and its point is hollow where that more "
        f"than doubles the limit. SRCC is held to {SRCC_LIMIT} from {SRCC_FROM} windows on.</p>",
    ]
    for name, (result, scores) in found.items():
        parts += [f"<h2>{text(name)}</h2>", _verdict(result)]
        if scores is not None:
            parts += [_table(result), _plot(reference, scores, result)]
    parts += _exported(manifest)
    for engine in engines:
        parts += _compiled(engine)
    if layers:
        parts += ["<h2>Layers</h2>", f"<ul>{''.join(f'<li>{text(line)}</li>' for line in layers)}</ul>"]
    return page(bundle, "".join(parts))


def _exported(manifest: Manifest) -> list[str]:
    """What `aesanet export` measured."""
    parity, half = manifest.parity, manifest.half
    measured: list[tuple[str, str, str, Parity | Half | Fused]] = [
        ("FP32", "PyTorch", f"{len(parity.cases)} batches", parity)
    ]
    if half is not None:
        audio = f"{half.clips} clips, {half.seconds:.0f} s"
        logits = ", ".join(f"{graph} {precision}" for graph, precision in half.logits.items())
        measured.append((f"FP16 (attention logits: {logits})", "FP32", audio, half))
        if half.fused is not None:
            measured.append(("FP16, fused", "FP32", audio, half.fused))
    rows = [(*told, f"{of.features_relative:.1e}", f"{of.scores_max_abs:.1e}") for *told, of in measured]
    return ["<h2>Graphs</h2>", table(("graphs", "held to", "on", "features, relative", "scores"), rows)]


def _compiled(engine: Engine) -> list[str]:
    """What went into an engine, and what came of it."""
    plans = []
    for name, plan in engine.plans.items():
        activations = ", ".join(f"{size / 2**20:.0f}" for size in plan.activation_bytes)
        plans.append((name, f"{plan.size_bytes / 2**20:.1f}", f"{plan.build_seconds:.1f}", activations))
    return [
        f"<h2>Engine {short_key(engine.key)}…</h2>",
        table(("key part", "value"), [(name, text(value)) for name, value in engine.parts.items()]),
        "<p>Its plans:</p>",
        table(("plan", "MiB", "built in, s", "activations, MiB, by profile"), plans),
    ]


def _verdict(result: Verification) -> str:
    if not result.failures:
        return f"<p class=passed><b>Passed</b>: {text(result.engine)}, limit {result.limit:g}</p>"
    lines = "".join(f"<li>{text(failure)}</li>" for failure in result.failures)
    return f"<p class=failed><b>Failed</b>: {text(result.engine)}, limit {result.limit:g}</p><ul>{lines}</ul>"


def _table(result: Verification) -> str:
    rows = []
    for axis, p in result.axes.items():
        differences = (_number(value, ".1e") for value in (p.max_abs, p.mean_abs, p.p99_abs))
        rows.append((axis, *differences, _number(p.srcc, ".5f"), _number(p.ktau, ".5f"), str(p.swapped_pairs)))
    heads = ("difference", "largest", "mean", "p99", "SRCC", "KTAU", "pairs in another order")
    return (
        f"{table(heads, rows)}<p>Among other clips: {_number(result.batch_max_abs, '.1e')} at most. "
        f"Scored again: {_number(result.repeat_max_abs, '.1e')}.</p>"
    )


def _plot(reference: Reference, found: np.ndarray, result: Verification) -> str:
    """Scores against scores, and differences against scores, as SVG."""
    expected = reference.scores
    widened = allowed(reference, result.limit) > 2 * result.limit
    figure = Figure(figsize=(10, 4), layout="constrained")
    scatter, difference = figure.subplots(1, 2)
    for column, axis in enumerate(AXES):
        ours, theirs, colour = found[:, column], expected[:, column], AXIS_COLOURS[axis]
        many = len(theirs) > _MANY_POINTS
        scatter.scatter(theirs, ours, s=14, color=colour, label=axis, rasterized=many)
        faces = np.where(widened, "none", colour)
        difference.scatter(theirs, ours - theirs, s=14, facecolors=faces, edgecolors=colour, rasterized=many)
    low, high = float(expected.min()), float(expected.max())
    scatter.plot([low, high], [low, high], color="#999", linewidth=0.8, zorder=0)
    for edge in (-result.limit, result.limit):
        difference.axhline(edge, color="#b3261e", linewidth=0.8, linestyle="--")
    scatter.set(xlabel="PyTorch", ylabel="engine")
    difference.set(xlabel="PyTorch", ylabel="difference (limit dashed)")
    scatter.legend()
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _number(value: float | None, layout: str) -> str:
    return "none" if value is None else format(value, layout)
