"""Do scores follow the ladders? The mean within-ladder Spearman correlation, which no label can flatter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from aesanet.axes import AXES
from aesanet.metrics import rank_metrics
from aesanet.training.demo.degrade import HELD_OUT, TRAINED
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import DemoClip

PC, PQ = AXES.index("PC"), AXES.index("PQ")


class LadderRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the demo's table: `scorer` is `model` or `baseline`, `value` a rank correlation."""

    scorer: str
    split: str
    what: str
    count: int
    value: float


def ladder_rows(
    scorer: str, split: str, clips: Sequence[DemoClip], labels: Sequence[Label], scores: Mapping[str, np.ndarray]
) -> list[LadderRow]:
    """All lines of one scorer on the clips of one split.

    scores : float [4] by clip id, order CE, CU, PC, PQ
    """
    chosen = [(clip, label) for clip, label in zip(clips, labels, strict=True) if clip.split == split]
    ladders: dict[str, list[DemoClip]] = defaultdict(list)
    for clip, _ in chosen:
        if clip.ladder:
            ladders[clip.ladder].append(clip)
    found: dict[str, list[float]] = defaultdict(list)
    for steps in ladders.values():
        first = steps[0]
        if first.kind == "mix":
            predicted = [float(scores[clip.id][PC]) for clip in steps]
            made_by = "instruments of one piece" if "midi" in first.ladder else "voices and effects"
            found[f"PC against 1-5 layers, {made_by}"].append(_spearman([c.layers for c in steps], predicted))
            continue
        predicted = [float(scores[name][PQ]) for name in (first.references[0], *(clip.id for clip in steps))]
        rank = _spearman([0, *(-clip.level for clip in steps)], predicted)
        if first.degradation in TRAINED:
            found[f"PQ against severity, {first.kind}"].append(rank)
            found[f"PQ against severity, {first.degradation}"].append(rank)
        elif first.degradation in HELD_OUT:
            found[f"PQ against severity of damage never trained on, {first.degradation}"].append(rank)
    rows = [
        LadderRow(scorer=scorer, split=split, what=what, count=len(ranks), value=round(float(np.mean(ranks)), 4))
        for what, ranks in sorted(found.items())
    ]
    for axis, name in enumerate(AXES):
        known = [
            (getattr(label, name), scores[clip.id][axis]) for clip, label in chosen if getattr(label, name) is not None
        ]
        metrics = rank_metrics(*np.array(known, np.float64).T)
        for metric in ("srcc", "ktau"):
            value = getattr(metrics, metric)
            rows.append(
                LadderRow(
                    scorer=scorer,
                    split=split,
                    what=f"{metric.upper()} with labels, {name}",
                    count=len(known),
                    value=round(value or 0.0, 4),
                )
            )
    return rows


def _spearman(true: Sequence[int], predicted: Sequence[float]) -> float:
    """0 where the scores do not differ."""
    return rank_metrics(np.array(true, np.float64), np.array(predicted, np.float64)).srcc or 0.0
