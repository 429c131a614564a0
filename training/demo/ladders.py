"""Do scores follow the ladders? The mean within-ladder Spearman correlation, which no label can flatter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from aesanet.axes import AXES
from aesanet.metrics import rank_metrics
from aesanet.training.demo.degrade import HELD_OUT, TRAINED
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import SEED, DemoClip

PC, PQ = AXES.index("PC"), AXES.index("PQ")
RESAMPLES: Final = 10_000

Scores = Mapping[str, np.ndarray]
"""float [4] by clip id, order CE, CU, PC, PQ."""


class LadderRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the demo's table: rank correlations of `count` ladders, or of `count` clips with their labels.

    `above_low` and `above_high` bound 95 % of how far the model is above the baseline, by a bootstrap over ladders.
    """

    split: str
    what: str
    count: int
    model: float
    baseline: float
    above_low: float | None = None
    above_high: float | None = None


def ladder_rows(
    split: str, clips: Sequence[DemoClip], labels: Sequence[Label], model: Scores, baseline: Scores
) -> list[LadderRow]:
    """All lines of one split."""
    chosen = [(clip, label) for clip, label in zip(clips, labels, strict=True) if clip.split == split]
    ladders: dict[str, list[DemoClip]] = defaultdict(list)
    for clip, _ in chosen:
        if clip.ladder:
            ladders[clip.ladder].append(clip)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for steps in ladders.values():
        pair = _ladder_rank(steps, model), _ladder_rank(steps, baseline)
        for what in _lines_of(steps[0]):
            found[what].append(pair)
    rows = [_ladder_row(split, what, np.array(found[what])) for what in sorted(found)]
    for axis, name in enumerate(AXES):
        known = [(clip.id, getattr(label, name)) for clip, label in chosen if getattr(label, name) is not None]
        true = np.array([value for _, value in known], np.float64)
        of_model, of_baseline = (
            rank_metrics(true, np.array([scores[name][axis] for name, _ in known], np.float64))
            for scores in (model, baseline)
        )
        for metric in ("srcc", "ktau"):
            pair = tuple(round(getattr(one, metric) or 0.0, 4) for one in (of_model, of_baseline))
            what = f"{metric.upper()} with labels, {name}"
            rows.append(LadderRow(split=split, what=what, count=len(known), model=pair[0], baseline=pair[1]))
    return rows


def ladder_table(rows: Sequence[LadderRow]) -> str:
    """Markdown, padded so that it can be read in a terminal."""
    lines = [
        f"| split     | {'what':57} | count | model | baseline | model above baseline, 95 % |",
        f"|-----------|{'-' * 59}|------:|------:|---------:|---------------------------:|",
    ]
    for row in rows:
        above = "" if row.above_low is None else f"{row.above_low:.3f} to {row.above_high:.3f}"
        lines.append(
            f"| {row.split:9} | {row.what:57} | {row.count:5} | {row.model:5.3f} | {row.baseline:8.3f} | {above:>26} |"
        )
    return "\n".join(lines)


def _lines_of(first: DemoClip) -> list[str]:
    """Which lines of the table a ladder counts in, by its first step."""
    if first.kind == "mix":
        made_of = "instruments of one piece" if "midi" in str(first.ladder) else "voices and effects"
        return [f"PC against 1-5 layers, {made_of}"]
    if first.degradation in TRAINED:
        return [f"PQ against severity, {what}" for what in (first.kind, first.degradation)]
    if first.degradation in HELD_OUT:
        return [f"PQ against severity of damage never trained on, {first.degradation}"]
    return []


def _ladder_rank(steps: Sequence[DemoClip], scores: Scores) -> float:
    """Spearman of one ladder, 0 where the scores do not differ; of damage, the undamaged reference is a step too."""
    if steps[0].kind == "mix":
        true, predicted = [clip.layers for clip in steps], [scores[clip.id][PC] for clip in steps]
    else:
        names = (steps[0].references[0], *(clip.id for clip in steps))
        true, predicted = [0, *(-clip.level for clip in steps)], [scores[name][PQ] for name in names]
    return rank_metrics(np.array(true, np.float64), np.array(predicted, np.float64)).srcc or 0.0


def _ladder_row(split: str, what: str, ranks: np.ndarray) -> LadderRow:
    """ranks : float [ladders, 2], of the model and of the baseline."""
    draws = np.random.default_rng([SEED, 5]).integers(len(ranks), size=(RESAMPLES, len(ranks)))
    above = (ranks[:, 0] - ranks[:, 1])[draws].mean(axis=1)
    model, baseline, low, high = (
        round(float(value), 4) for value in (*ranks.mean(axis=0), *np.quantile(above, (0.025, 0.975)))
    )
    return LadderRow(
        split=split,
        what=what,
        count=len(ranks),
        model=model,
        baseline=baseline,
        above_low=low,
        above_high=high,
    )
