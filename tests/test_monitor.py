"""What a run watches: collapse, triplets that do not work, ranks that fall."""

import math

import msgspec
import numpy as np
import pytest
from runs import CONFIG, changed

from aesanet.training.monitor import effective_rank, read_signs, read_warnings
from aesanet.training.triplet import TripletCounters


def signs_of(embeddings, labels, scores=None):
    return read_signs(labels.copy() if scores is None else scores, embeddings, labels)


@pytest.fixture
def healthy():
    """Embeddings that follow the labels, in several directions."""
    rng = np.random.default_rng(4)
    labels = rng.uniform(1, 9, (80, 4))
    embeddings = np.abs(labels @ rng.standard_normal((4, 16)) + 0.5 * rng.standard_normal((80, 16)))
    return embeddings, labels


def working(clusters=6, skipped=5):
    counters = TripletCounters()
    counters.anchors, counters.skipped, counters.clusters = 100, skipped, set(range(clusters))
    return counters


def test_a_healthy_run_is_not_warned_of(healthy):
    signs = signs_of(*healthy)
    assert signs.effective_rank > 3
    assert signs.order_correlation > 0.3
    assert signs.srcc == pytest.approx((1.0,) * 4)
    assert signs.ktau == pytest.approx((1.0,) * 4)
    assert read_warnings([signs], working(), CONFIG) == []


def test_collapse_is_warned_of(healthy):
    _, labels = healthy
    noise = np.random.default_rng(1).standard_normal((80, 16))
    for collapsed in (5 + 0.01 * noise, np.outer(np.linspace(1, 2, 80), np.arange(16)), np.zeros((80, 16))):
        signs = signs_of(collapsed, labels)
        assert any("embeddings collapse" in warning for warning in read_warnings([signs], working(), CONFIG))
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((7, 5))) == pytest.approx(1)


def test_a_few_clips_do_not_collapse(healthy):
    embeddings, labels = healthy
    for few in (1, 2, 9):
        signs = signs_of(embeddings[:few], labels[:few])
        assert signs.effective_rank is signs.mean_distance is None
        assert not any("collapse" in warning for warning in read_warnings([signs], working(), CONFIG))


def test_triplets_that_do_not_work_are_warned_of(healthy):
    embeddings, labels = healthy
    signs = signs_of(embeddings, labels)
    assert "91 of 100 anchors" in read_warnings([signs], working(skipped=91), CONFIG)[0]
    assert "2 groups of labels" in read_warnings([signs], working(clusters=2), CONFIG)[0]
    inverted = signs_of(np.abs(np.random.default_rng(2).standard_normal((80, 16))), labels)
    inverted = msgspec.structs.replace(inverted, order_correlation=-0.01)
    assert "do not lie farther apart" in read_warnings([inverted], working(), CONFIG)[0]
    assert read_warnings([inverted], working(clusters=0, skipped=100), changed(triplet="none")) == []


def test_order_is_judged_by_what_the_triplets_are_made_by():
    """PC has nothing to do with the other axes; embeddings lie along the one or along the others."""
    rng = np.random.default_rng(3)
    others, pc = rng.uniform(1, 9, (2, 200))
    labels = np.stack([others, others + 0.1, pc, others - 0.1], axis=1)
    for axis, along, less in (("PC", pc, others), ("PQ", others, pc)):
        order = [
            read_signs(labels, np.stack([np.cos(x / 10), np.sin(x / 10)], axis=1), labels, axis).order_correlation
            for x in (along, less)
        ]
        assert order[0] > 0.99
        assert abs(order[1]) < 0.1


def test_ranks_that_fall_while_the_mse_falls_are_warned_of(healthy):
    signs = signs_of(*healthy)
    epochs = [
        msgspec.structs.replace(signs, mean_srcc=srcc, mean_mse=mse)
        for srcc, mse in ((None, 9.0), (0.5, 3.0), (0.7, 2.0), (0.69, 1.9), (0.67, 2.1), (0.67, 1.8))
    ]
    warned = [read_warnings(epochs[: n + 1], working(), CONFIG) for n in range(len(epochs))]
    assert warned[:5] == [[]] * 5
    assert "ranks get worse while the MSE falls: mean SRCC 0.670 after 0.700" in warned[5][0]


def test_signs_know_missing_labels(healthy):
    embeddings, labels = healthy
    labels = labels.copy()
    labels[:, 1], labels[::2, 0], labels[3] = math.nan, math.nan, math.nan
    scores = np.nan_to_num(labels) + np.array([1.0, 0.0, 2.0, -3.0])
    signs = signs_of(embeddings, labels, scores)
    assert signs.mse == pytest.approx((1.0, None, 4.0, 9.0))
    assert signs.mean_mse == pytest.approx(14 / 3)
    assert signs.srcc[1] is signs.ktau[1] is None
    assert signs.order_correlation > 0.3
    assert read_signs(scores[:1] + 1, embeddings[:1], healthy[1][:1]).order_correlation is None
