import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesanet.metrics import RankMetrics, rank_metrics, why_no_correlation

# Few values, so that ties are common; and any values at all, among them subnormal ones.
VALUES = st.one_of(
    st.integers(0, 4).map(float), st.floats(0, 10, allow_subnormal=True), st.sampled_from([5.0, np.nextafter(5.0, 6.0)])
)
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12).map(lambda rows: np.array(rows).T)


def average_ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / math.sqrt((a @ a) * (b @ b))


def tau_b(a, b):
    """Kendall's tau-b, written out over all pairs."""
    n = len(a)
    products = ties_a = ties_b = pairs = 0
    for i in range(n):
        for j in range(i):
            pairs += 1
            products += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
            ties_a += a[i] == a[j]
            ties_b += b[i] == b[j]
    return products / math.sqrt((pairs - ties_a) * (pairs - ties_b))


@given(PAIRS)
def test_metrics_are_those_written_out(pair):
    true, predicted = pair
    found = rank_metrics(true, predicted)
    assert found.mse == pytest.approx(sum((t - p) ** 2 for t, p in zip(true, predicted, strict=True)) / len(true))
    if len(set(true)) < 2 or len(set(predicted)) < 2:
        assert (found.lcc, found.srcc, found.ktau) == (None, None, None)
        assert why_no_correlation(true, predicted)
        return
    assert why_no_correlation(true, predicted) is None
    assert found.srcc == pytest.approx(pearson(average_ranks(true), average_ranks(predicted)), abs=1e-9)
    assert found.ktau == pytest.approx(tau_b(true, predicted), abs=1e-9)
    assert found.lcc is not None
    assert -1 <= found.lcc <= 1
    if true.std() > 1e-3 and predicted.std() > 1e-3:  # nearer to constant, rounding decides
        assert found.lcc == pytest.approx(pearson(true, predicted), abs=1e-6)


@given(PAIRS, st.randoms())
def test_the_order_of_clips_changes_nothing(pair, random):
    order = random.sample(range(pair.shape[1]), pair.shape[1])
    first, second = rank_metrics(*pair), rank_metrics(*pair[:, order])
    assert second.mse == pytest.approx(first.mse)
    for name in ("srcc", "ktau"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), abs=1e-9)


@given(PAIRS, st.floats(0.1, 10), st.integers(-5, 5))
def test_a_rising_line_keeps_ranks_and_a_falling_one_turns_them(pair, scale, offset):
    true, predicted = np.round(pair, 3)
    base = rank_metrics(true, predicted)
    rising = rank_metrics(true, scale * predicted + offset)
    falling = rank_metrics(true, -scale * predicted + offset)
    for name in ("srcc", "ktau"):
        value = getattr(base, name)
        assert getattr(rising, name) == pytest.approx(value, abs=1e-9)
        assert getattr(falling, name) == pytest.approx(None if value is None else -value, abs=1e-9)


@pytest.mark.parametrize(
    ("true", "predicted", "reason"),
    [
        ([1.0], [2.0], "needs 2 values or more; there is 1"),
        ([3.0, 3.0, 3.0], [1.0, 2.0, 3.0], "all 3 labels are 3,"),
        ([1.0, 2.0], [0.1, 0.1], "all 2 scores are 0.1,"),
    ],
)
def test_a_constant_has_no_correlation_and_a_reason(true, predicted, reason):
    true, predicted = np.array(true), np.array(predicted)
    mse = float(((true - predicted) ** 2).mean())
    assert rank_metrics(true, predicted) == RankMetrics(mse, None, None, None)
    assert reason in why_no_correlation(true, predicted)


def test_a_known_example_with_ties():
    found = rank_metrics(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 2.0]))
    assert found.mse == 0.5
    assert found.srcc == pytest.approx(1 / 2)  # ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: 2.25 / 4.5
    assert found.ktau == pytest.approx(2 / 5)  # 3 pairs agree, 1 does not, 1 tie on each side: 2 / sqrt(5 * 5)


@pytest.mark.parametrize(
    ("true", "predicted", "told"),
    [
        ([], [], "n >= 1"),
        ([1.0, 2.0], [1.0], r"\[2\] and predicted ones \[1\]"),
        ([[1.0]], [[1.0]], r"must be \[n\]"),
        ([1.0, math.nan], [1.0, 2.0], "must be finite"),
        ([1.0, 2.0], [1.0, math.inf], "must be finite"),
    ],
)
def test_what_is_no_pair_of_vectors_is_refused(true, predicted, told):
    with pytest.raises(ValueError, match=told):
        rank_metrics(np.array(true), np.array(predicted))
