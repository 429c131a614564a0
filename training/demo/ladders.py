"""Do scores follow the ladders? The mean within-ladder Spearman correlation, which no label can flatter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

import msgspec
import numpy as np

from aesanet.axes import AXES
from aesanet.metrics import rank_metrics
from aesanet.training.demo.degrade import HELD_OUT, TRAINED
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import SEED, DemoClip
from aesanet.training.demo.render import Reference
from aesanet.training.demo.sources import Kind

PC, PQ = AXES.index("PC"), AXES.index("PQ")
RESAMPLES: Final = 10_000

EFFECT_FOLDERS: Final = frozenset({"sounds", "sfx"})
"""Of games whose packages are of music otherwise."""

Scores = Mapping[str, np.ndarray]
"""float [4] by clip id, order CE, CU, PC, PQ."""


class TableRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the demo's table: rank correlations of `count` ladders, or of `count` clips with their labels.

    `above_low` and `above_high` bound 95 % of how far the model is above the baseline, by a bootstrap over what the
    ladders were made from: ladders of one reference are drawn together.
    """

    split: str
    what: str
    count: int
    model: float
    baseline: float
    above_low: float | None = None
    above_high: float | None = None


def ladder_rows(
    split: str,
    clips: Sequence[DemoClip],
    references: Mapping[str, Reference],
    model: Scores,
    baseline: Scores,
    condition: str = "",
) -> list[TableRow]:
    """A line for each kind of ladder among the clips of one split; `condition` ends what it says."""
    ladders: dict[str, list[DemoClip]] = defaultdict(list)
    for clip in clips:
        if clip.ladder and clip.split == split:
            ladders[clip.ladder].append(clip)
    found: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for steps in ladders.values():
        first = steps[0]
        for what, part in _lines_of(steps, references):
            pair = _ladder_rank(part, model), _ladder_rank(part, baseline)
            found[what + condition].append((first.references[0], *pair))
    return [_ladder_row(split, what, found[what]) for what in sorted(found)]


def label_rows(
    split: str, clips: Sequence[DemoClip], labels: Sequence[Label], model: Scores, baseline: Scores
) -> list[TableRow]:
    """SRCC and KTAU of all clips of one split with their labels, an axis."""
    rows = []
    for axis, name in enumerate(AXES):
        known = [
            (clip.id, getattr(label, name))
            for clip, label in zip(clips, labels, strict=True)
            if clip.split == split and getattr(label, name) is not None
        ]
        true = np.array([value for _, value in known], np.float64)
        of_model, of_baseline = (
            rank_metrics(true, np.array([scores[id_][axis] for id_, _ in known], np.float64))
            for scores in (model, baseline)
        )
        for metric in ("srcc", "ktau"):
            row = TableRow(
                split=split,
                what=f"{metric.upper()} with labels, {name}",
                count=len(known),
                model=round(getattr(of_model, metric) or 0.0, 4),
                baseline=round(getattr(of_baseline, metric) or 0.0, 4),
            )
            rows.append(row)
    return rows


def table_text(rows: Sequence[TableRow]) -> str:
    """Markdown, padded so that it can be read in a terminal."""
    lines = [
        f"| split     | {'what':62} | count | model | baseline | model above baseline, 95 % |",
        f"|-----------|{'-' * 64}|------:|------:|---------:|---------------------------:|",
    ]
    for row in rows:
        above = "" if row.above_low is None else f"{row.above_low:.3f} to {row.above_high:.3f}"
        lines.append(
            f"| {row.split:9} | {row.what:62} | {row.count:5} | {row.model:5.3f} | {row.baseline:8.3f} | {above:>26} |"
        )
    return "\n".join(lines)


def kind_heard(reference: Reference) -> Kind:
    """Its package's kind, but for the effects in packages of music."""
    folders = {folder for part in reference.parts for folder in PurePosixPath(part.file).parts}
    return "effect" if reference.kind == "music" and folders & EFFECT_FOLDERS else reference.kind


def _lines_of(steps: Sequence[DemoClip], references: Mapping[str, Reference]) -> list[tuple[str, Sequence[DemoClip]]]:
    """The lines of the table that a ladder counts in, and which of its steps."""
    first = steps[0]
    if first.kind == "mix":
        made_of = "instruments of one piece" if "midi" in str(first.ladder) else "voices and effects"
        return [(f"PC against {least}-5 layers, {made_of}", steps[least - 1 :]) for least in (1, 2)]
    if first.degradation in TRAINED:
        kind = kind_heard(references[first.references[0]])
        return [(f"PQ against severity, {what}", steps) for what in (kind, first.degradation)]
    if first.degradation in HELD_OUT:
        return [(f"PQ against severity of damage never trained on, {first.degradation}", steps)]
    return []


def _ladder_rank(steps: Sequence[DemoClip], scores: Scores) -> float:
    """Spearman of one ladder, 0 where the scores do not differ; of damage, the undamaged reference is a step too."""
    if steps[0].kind == "mix":
        true, predicted = [clip.layers for clip in steps], [scores[clip.id][PC] for clip in steps]
    else:
        names = (steps[0].references[0], *(clip.id for clip in steps))
        true, predicted = [0, *(-clip.level for clip in steps)], [scores[name][PQ] for name in names]
    return rank_metrics(np.array(true, np.float64), np.array(predicted, np.float64)).srcc or 0.0


def _ladder_row(split: str, what: str, found: Sequence[tuple[str, float, float]]) -> TableRow:
    """found : of each ladder what it was made from, and the ranks of the model and of the baseline."""
    ranks = np.array([pair for _, *pair in found])
    _, group = np.unique([name for name, *_ in found], return_inverse=True)
    sums = np.bincount(group, ranks[:, 0] - ranks[:, 1])
    draws = np.random.default_rng([SEED, 5]).integers(len(sums), size=(RESAMPLES, len(sums)))
    above = sums[draws].sum(axis=1) / np.bincount(group)[draws].sum(axis=1)
    model, baseline, low, high = (
        round(float(value), 4) for value in (*ranks.mean(axis=0), *np.quantile(above, (0.025, 0.975)))
    )
    return TableRow(
        split=split,
        what=what,
        count=len(found),
        model=model,
        baseline=baseline,
        above_low=low,
        above_high=high,
    )
