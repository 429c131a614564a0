"""Scores against human labels: 4 axes x 2 levels x 4 metrics, with bootstrap intervals and the human ceiling."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from matplotlib.figure import Figure

from aesanet.axes import AXES, AXIS_NAMES
from aesanet.errors import InputError
from aesanet.metrics import rank_metrics, why_no_correlation
from aesanet.training.joining import ScoredClips
from aesanet.training.labels import LabelledClip

INTERVAL: Final = (2.5, 97.5)  # percentiles of the bootstrap that bound 95 %
MIN_SYSTEMS: Final = 3  # two always correlate by 1 or -1
MIN_RATINGS: Final = 4  # of a clip, so that a half has two
CEILING_SPLITS: Final = 50
PLOT_SUFFIXES: Final = (".png", ".svg")


class Metric(msgspec.Struct, frozen=True):
    """One number and its 95 % percentile bootstrap interval; None with the reason where there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Level(msgspec.Struct, frozen=True):
    """The metrics of one axis over `count` clips or systems.

    `ceiling_srcc` is the human ceiling: the SRCC between the means of two random halves of each clip's raters, mean
    of 50 splits. None where a clip has fewer than 4 ratings, or where there is no SRCC.
    """

    count: int
    mse: Metric
    lcc: Metric
    srcc: Metric
    ktau: Metric
    ceiling_srcc: float | None = None


class AxisLevels(msgspec.Struct, frozen=True):
    """One axis over clips, and over systems by the plain mean of each system's clips."""

    utterance: Level
    system: Level


class Evaluation(msgspec.Struct, frozen=True):
    """What `evaluate` found, by axis code. `missing` labels had no score; `unused` score rows had no label."""

    clips: int
    systems: int
    missing: int
    unused: int
    resamples: int
    seed: int
    axes: dict[str, AxisLevels]


def evaluate(pairs: ScoredClips, resamples: int = 1000, seed: int = 0) -> Evaluation:
    """All 32 numbers, each with the 95 % percentile interval of `resamples` (at least 1) seeded bootstrap draws.

    Clips are drawn at the utterance level, whole systems at the system level; draws without a correlation are left
    out of its interval. Clips without a label on an axis are left out on that axis alone.
    """
    true, systems = pairs.true, pairs.systems
    halves = _rater_halves(pairs.clips, seed)
    axes = {}
    for a, axis in enumerate(AXES):
        labelled = ~np.isnan(true[:, a])
        columns = np.array([true[labelled, a], pairs.scores[labelled, a], *(half[labelled, a] for half in halves)])
        means = _system_means(columns, systems[labelled])
        few = f"the system level needs {MIN_SYSTEMS} systems or more; the labels of this axis name {means.shape[1]}"
        axes[axis] = AxisLevels(
            utterance=_level(columns, resamples, seed, None if labelled.any() else "no clip has a label on this axis"),
            system=_level(means, resamples, seed, few if means.shape[1] < MIN_SYSTEMS else None),
        )
    return Evaluation(len(true), len(set(systems) - {""}), pairs.missing, pairs.unused, resamples, seed, axes)


def _system_means(columns: np.ndarray, systems: np.ndarray) -> np.ndarray:
    """Means [columns, systems] of columns [columns, clips]; clips of no system are left out."""
    names = [name for name in np.unique(systems) if name]
    means = np.array([columns[:, systems == name].mean(axis=1) for name in names]).reshape(len(names), len(columns)).T
    return means.round(9)  # so that equal means are ties, whatever the order in which they were summed


def _level(columns: np.ndarray, resamples: int, seed: int, reason: str | None) -> Level:
    """The metrics of columns [labels, scores, halves of raters..., count], or the reason why there are none."""
    (true, scores), halves = columns[:2], columns[2:]
    if reason is not None:
        none = Metric(reason=reason)
        return Level(len(true), none, none, none, none)
    rng = np.random.default_rng(seed)  # anew for each level: axes are resampled by the same draws
    chosen = (rng.integers(len(true), size=len(true)) for _ in range(resamples))
    draws = [rank_metrics(true[drawn], scores[drawn]) for drawn in chosen]
    found = {}
    for name, value in asdict(rank_metrics(true, scores)).items():
        drawn_values = [getattr(draw, name) for draw in draws if getattr(draw, name) is not None]
        if value is None:
            found[name] = Metric(reason=why_no_correlation(true, scores))
        elif not drawn_values:
            found[name] = Metric(value, reason="all bootstrap draws were constant, so there is no interval")
        else:
            found[name] = Metric(value, *np.percentile(drawn_values, INTERVAL).tolist())
    ceilings = [rank_metrics(first, second).srcc for first, second in zip(halves[::2], halves[1::2], strict=True)]
    known = [srcc for srcc in ceilings if srcc is not None]
    return Level(len(true), **found, ceiling_srcc=float(np.mean(known)) if known else None)


def _rater_halves(clips: Sequence[LabelledClip], seed: int) -> list[np.ndarray]:
    """Means [clips, 4] of the first and the second half of each clip's raters, for 50 random orders of them.

    Empty where a clip has too few ratings. A rater's four ratings stay together; columns of two clips are not the
    same people, so each clip has its own order.
    """
    ratings = [clip.ratings for clip in clips if clip.ratings is not None and clip.ratings.shape[1] >= MIN_RATINGS]
    if len(ratings) < len(clips):
        return []
    counts = np.array([[of_clip.shape[1]] for of_clip in ratings])
    exists = np.arange(counts.max()) < counts
    padded = np.zeros((len(ratings), len(AXES), counts.max()))
    for row, of_clip in zip(padded, ratings, strict=True):
        row[:, : of_clip.shape[1]] = of_clip
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(CEILING_SPLITS):
        order = np.where(exists, rng.random(exists.shape), 2.0).argsort(axis=1).argsort(axis=1)  # padding last
        first = order < counts // 2
        chosen = (first, exists & ~first)
        halves += [(padded * half[:, None]).sum(axis=2) / half.sum(axis=1)[:, None] for half in chosen]
    return halves


def write_scatter(pairs: ScoredClips, evaluation: Evaluation, path: str | Path) -> None:
    """Plot scores over labels, an axis a panel, as the PNG or SVG that the suffix of `path` names.

    Clips are light dots, systems dark ones; the line is where both are equal. Raises InputError where the suffix is
    another or the file cannot be written.
    """
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{path}: a plot is {' or '.join(PLOT_SUFFIXES)}")
    figure = Figure(figsize=(9, 9), layout="constrained")
    true, systems = pairs.true, pairs.systems
    for a, (axis, plot) in enumerate(zip(AXES, figure.subplots(2, 2).flat, strict=True)):
        labelled = ~np.isnan(true[:, a])
        columns = np.array([true[labelled, a], pairs.scores[labelled, a]])
        plot.scatter(*columns, s=8, color="tab:blue", alpha=0.25, linewidths=0, label="clips")
        if (means := _system_means(columns, systems[labelled])).size:
            plot.scatter(*means, s=24, color="black", label="systems")
        plot.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        level = evaluation.axes[axis].utterance
        srcc, mse = ("-" if m.value is None else f"{m.value:.3f}" for m in (level.srcc, level.mse))
        plot.set(xlabel="label", ylabel="score", aspect="equal", title=f"{AXIS_NAMES[axis]}: SRCC {srcc}, MSE {mse}")
        plot.legend(loc="upper left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
