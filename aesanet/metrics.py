"""How well predicted scores follow human ones: the four metrics of the VoiceMOS and AudioMOS challenges."""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class RankMetrics:
    """Of n values: the mean squared error, and three correlations in [-1, 1], None where there is none."""

    mse: float
    lcc: float | None
    srcc: float | None
    ktau: float | None


def rank_metrics(true: np.ndarray, predicted: np.ndarray) -> RankMetrics:
    """MSE, LCC (Pearson), SRCC (Spearman, average ranks for ties) and KTAU (Kendall's tau-b).

    true, predicted : float64 [n], n at least 1, finite

    Correlations are None where `why_no_correlation` gives a reason. Raises ValueError for anything else than two
    finite vectors of one length.

    >>> rank_metrics(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    RankMetrics(mse=1.0, lcc=1.0, srcc=1.0, ktau=1.0)
    """
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError(
            f"true values are {list(true.shape)} and predicted ones {list(predicted.shape)}; both must be [n], n >= 1"
        )
    if not (np.isfinite(true).all() and np.isfinite(predicted).all()):
        raise ValueError("true and predicted values must be finite; leave clips without a value out")
    mse = float(np.mean((true - predicted) ** 2))
    if why_no_correlation(true, predicted) is not None:
        return RankMetrics(mse, None, None, None)
    with warnings.catch_warnings():
        # Of nearly constant vectors: Pearson's then has few digits, which its interval shows better than a warning.
        warnings.simplefilter("ignore")
        found = [measure(true, predicted).statistic for measure in (stats.pearsonr, stats.spearmanr, stats.kendalltau)]
    lcc, srcc, ktau = (float(value) if np.isfinite(value) else None for value in found)
    return RankMetrics(mse, lcc, srcc, ktau)


def why_no_correlation(true: np.ndarray, predicted: np.ndarray) -> str | None:
    """The reason in words why two vectors [n] have no correlation, or None where they have one."""
    if len(true) < 2:
        return f"a correlation needs 2 values or more; there is {len(true)}"
    for name, values in (("labels", true), ("scores", predicted)):
        if (values == values[0]).all():
            return f"all {len(values)} {name} are {values[0]:g}, and a constant has no correlation"
    return None
