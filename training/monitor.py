"""Signs that training goes wrong, read from the validation set after every epoch."""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist

from aesanet.axes import AXES
from aesanet.metrics import rank_metrics
from aesanet.training.config import TrainingConfig
from aesanet.training.triplet import Criterion, TripletCounters

PAIRED_CLIPS: Final = 512  # 130,816 pairs: enough for a correlation, and quick

# A healthy run is far from all of these. Ours.
LEAST_RANK, LEAST_DISTANCE = 2.0, 0.05
FEWEST_CLUSTERS, MOST_SKIPPED = 3, 0.9
FEWEST_CLIPS = 10  # whose embeddings can be told to collapse: of two, no healthy ones have a higher rank
LARGEST_SRCC_FALL = 0.02


class Signs(msgspec.Struct, frozen=True, kw_only=True):
    """Of one epoch; None where there is none, as for the correlation of a constant.

    mse, srcc, ktau   : an axis each, order CE, CU, PC, PQ; mean_mse and mean_srcc over the axes that have one
    effective_rank    : of the L2-normalised embeddings: exp of the entropy of their singular values' shares
    mean_distance     : between pairs of L2-normalised embeddings, 0-2; both None of fewer than 10 clips
    order_correlation : Spearman's, between the distances of pairs and how far their labels differ, as the triplet term
                        sees it
    """

    mse: tuple[float | None, ...]
    srcc: tuple[float | None, ...]
    ktau: tuple[float | None, ...]
    mean_mse: float
    mean_srcc: float | None
    effective_rank: float | None
    mean_distance: float | None
    order_correlation: float | None


def read_signs(scores: np.ndarray, embeddings: np.ndarray, labels: np.ndarray, criterion: Criterion = "mean") -> Signs:
    """float64 [clips, 4] scores, [clips, width] embeddings, [clips, 4] labels with nan for none -> Signs.

    criterion : by which the triplet term tells labels apart
    """
    found = []
    for axis in range(len(AXES)):
        labelled = ~np.isnan(labels[:, axis])
        found.append(rank_metrics(labels[labelled, axis], scores[labelled, axis]) if labelled.any() else None)
    mse = tuple(None if metrics is None else metrics.mse for metrics in found)
    srcc = tuple(None if metrics is None else metrics.srcc for metrics in found)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    some = np.linspace(0, len(unit) - 1, min(len(unit), PAIRED_CLIPS)).astype(int)
    distances = pdist(unit[some])
    enough = len(unit) >= FEWEST_CLIPS
    return Signs(
        mse=mse,
        srcc=srcc,
        ktau=tuple(None if metrics is None else metrics.ktau for metrics in found),
        mean_mse=float(np.mean([value for value in mse if value is not None])),
        mean_srcc=_mean([value for value in srcc if value is not None]),
        effective_rank=effective_rank(unit) if enough else None,
        mean_distance=float(distances.mean()) if enough else None,
        order_correlation=_order_correlation(distances, labels[some], criterion),
    )


def effective_rank(unit: np.ndarray) -> float:
    """Of rows [clips, width]: from 1, where all lie on one line through 0, to min(clips, width) (RankMe, 2210.02885).

    The mean is not taken out: embeddings that fell onto one point, give or take noise, must not look rich.
    """
    values = np.linalg.svd(unit, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def read_warnings(history: Sequence[Signs], counters: TripletCounters, config: TrainingConfig) -> list[str]:
    """What the newest of the epochs' signs, and its triplets, give reason to say; mostly nothing."""
    now = history[-1]
    warnings = []
    rank, distance = now.effective_rank, now.mean_distance
    if rank is not None and distance is not None and (rank < LEAST_RANK or distance < LEAST_DISTANCE):
        warnings.append(
            f"embeddings collapse: effective rank {rank:.2f}, mean distance {distance:.3f}; "
            "try a lower learning rate or a lower triplet weight"
        )
    if config.triplet != "none":
        warnings += _triplet_warnings(now, counters)
    ranked = [(signs.mean_srcc, signs.mean_mse) for signs in history if signs.mean_srcc is not None]
    srcc, mse = max(ranked, default=(-1.0, 0.0))
    if now.mean_srcc is not None and now.mean_srcc < srcc - LARGEST_SRCC_FALL and now.mean_mse < mse:
        warnings.append(
            f"ranks get worse while the MSE falls: mean SRCC {now.mean_srcc:.3f} after {srcc:.3f}, "
            f"MSE {now.mean_mse:.3f} after {mse:.3f}"
        )
    return warnings


def _triplet_warnings(now: Signs, counters: TripletCounters) -> list[str]:
    warnings = []
    if counters.skipped > MOST_SKIPPED * counters.anchors:
        warnings.append(
            f"{counters.skipped} of {counters.anchors} anchors found no positive or no negative; "
            "try another epsilon or a larger buffer"
        )
    elif len(counters.clusters) < FEWEST_CLUSTERS:
        warnings.append(
            f"all triplets come from {len(counters.clusters)} groups of labels, which order nothing but these; "
            "try a smaller epsilon, or the mean over axes"
        )
    if now.order_correlation is not None and now.order_correlation <= 0:
        warnings.append(
            f"clips with unlike labels do not lie farther apart (correlation {now.order_correlation:.3f}): "
            "the triplet term does not work"
        )
    return warnings


def _order_correlation(distances: np.ndarray, labels: np.ndarray, criterion: Criterion) -> float | None:
    """Spearman's between distances of pairs, as `pdist` orders them, and the labels' differences."""
    if criterion != "mean":
        labels = labels[:, [AXES.index(criterion)]]
    first, second = np.triu_indices(len(labels), 1)
    difference = np.abs(labels[first] - labels[second])
    shared = ~np.isnan(difference)
    comparable = shared.any(axis=1)
    mean = np.where(shared, difference, 0.0).sum(axis=1)[comparable] / shared.sum(axis=1)[comparable]
    distances = distances[comparable]
    if len(mean) < 2 or (mean == mean[0]).all() or (distances == distances[0]).all():
        return None
    return float(stats.spearmanr(distances, mean).statistic)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
