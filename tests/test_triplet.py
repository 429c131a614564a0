"""The triplet term against plain Python, and what its buffer and its counters say."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.axes import AXES
from aesanet.training.triplet import TripletBuffer

EPSILON, MARGIN = 0.5, 0.3


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def label_difference(one, other, criterion):
    pairs = [(a, b) for axis, a, b in zip(AXES, one, other, strict=True) if criterion in ("mean", axis)]
    found = [abs(a - b) for a, b in pairs if not math.isnan(a) and not math.isnan(b)]
    return sum(found) / len(found) if found else math.nan


class Plain:
    """Lists and loops, by the words of the specification."""

    def __init__(self, criterion, capacity):
        self.criterion, self.capacity, self.held = criterion, capacity, []
        self.skipped = self.active = 0

    def candidates(self, label, clip):
        positives, negatives = [], []
        for embedding, other, held_clip in self.held:
            difference = label_difference(label, other, self.criterion)
            if held_clip != clip and difference < EPSILON:
                positives.append(embedding)
            if held_clip != clip and difference > EPSILON:
                negatives.append(embedding)
        return positives, negatives

    def losses(self, embeddings, labels, clips):
        """Of every anchor, all that a choice of positive and negative could give; [] where it is skipped."""
        possible = []
        for embedding, label, clip in zip(embeddings, labels, clips, strict=True):
            anchor = unit(embedding)
            positives, negatives = self.candidates(label, clip)
            terms = [
                max(0.0, math.dist(anchor, p) - math.dist(anchor, n) + MARGIN) for p in positives for n in negatives
            ]
            possible.append(terms)
        self.held += [(unit(e), label, clip) for e, label, clip in zip(embeddings, labels, clips, strict=True)]
        self.held = self.held[-self.capacity :]
        return possible


# Eighths are exact in float32, so that a difference of exactly epsilon is one here and there.
scores = st.integers(0, 24).map(lambda n: n / 8) | st.just(math.nan)
rows = st.lists(st.tuples(st.tuples(scores, scores, scores, scores), st.integers(0, 12)), min_size=1, max_size=5)


def tensors(rng, batch):
    embeddings = torch.from_numpy(rng.standard_normal((len(batch), 3)))
    labels = torch.tensor([label for label, _ in batch], dtype=torch.float64)
    return embeddings, labels, torch.tensor([clip for _, clip in batch])


@settings(max_examples=60)
@given(st.lists(rows, min_size=1, max_size=8), st.sampled_from(["mean", *AXES]), st.integers(1, 12), st.integers(0, 99))
def test_term_is_that_of_plain_python(batches, criterion, capacity, seed):
    rng = np.random.default_rng(seed)
    plain = Plain(criterion, capacity)
    made = {
        name: TripletBuffer(name, criterion, capacity=capacity, margin=MARGIN, epsilon=EPSILON)
        for name in ("hardest", "random")
    }
    skipped = 0
    for batch in batches:
        embeddings, labels, clips = tensors(rng, batch)
        terms = {name: float(buffer.term(embeddings, labels, clips)) for name, buffer in made.items()}
        possible = plain.losses(embeddings.tolist(), labels.tolist(), clips.tolist())
        skipped += sum(not losses for losses in possible)
        hardest = sum(max(losses, default=0.0) for losses in possible) / len(batch)
        easiest = sum(min(losses, default=0.0) for losses in possible) / len(batch)
        # The farthest positive with the nearest negative is the largest loss of all choices.
        assert terms["hardest"] == pytest.approx(hardest, abs=1e-9)
        assert easiest - 1e-9 <= terms["random"] <= hardest + 1e-9
        if len(batch) == 1 and possible[0]:
            assert min(abs(terms["random"] - one) for one in possible[0]) < 1e-9
    for buffer in made.values():
        assert buffer.counters.skipped == skipped
        assert buffer.counters.anchors == sum(map(len, batches))
        assert np.allclose(buffer.embeddings, [e for e, _, _ in plain.held])
        assert buffer.clips.tolist() == [clip for _, _, clip in plain.held]


def filled(sampling, levels, *, epsilon=EPSILON, capacity=256, seed=0):
    """A buffer that holds a clip at each of these label levels, embeddings random; clips 0, 1, ..."""
    buffer = TripletBuffer(sampling, capacity=capacity, epsilon=epsilon, seed=seed)
    embeddings = torch.randn(len(levels), 8, generator=torch.Generator().manual_seed(1))
    buffer.term(embeddings, torch.tensor(levels)[:, None].repeat(1, 4), torch.arange(len(levels)))
    return buffer


def test_the_buffer_is_first_in_first_out():
    buffer = TripletBuffer("random", capacity=5)
    for first in range(0, 12, 3):
        buffer.term(torch.randn(3, 2), torch.zeros(3, 4), torch.arange(first, first + 3))
    assert buffer.clips.tolist() == [7, 8, 9, 10, 11]
    assert len(buffer) == len(buffer.embeddings) == len(buffer.labels) == 5
    assert torch.allclose(buffer.embeddings.norm(dim=1), torch.ones(5))


def test_a_batch_does_not_see_itself():
    buffer = filled("hardest", [5.0, 5.1, 9.0])
    assert buffer.counters.skipped == buffer.counters.anchors == 3


def test_a_clip_of_an_epoch_ago_is_no_positive_of_its_own():
    buffer = filled("random", [5.0, 9.0])
    buffer.term(torch.randn(1, 8), torch.full((1, 4), 5.0), torch.tensor([0]))
    assert buffer.counters.skipped == 3
    buffer.term(torch.randn(1, 8), torch.full((1, 4), 5.0), torch.tensor([2]))
    assert buffer.counters.skipped == 3


def test_counters():
    buffer = filled("random", [1.0, 1.1, 7.0, 7.1])
    batch = torch.randn(2, 8), torch.tensor([1.2, 4.0])[:, None].repeat(1, 4), torch.tensor([8, 9])
    buffer.term(*batch)  # the second has no positive
    counters = buffer.counters
    assert (counters.anchors, counters.skipped) == (6, 5)
    assert counters.clips["anchor"] == {8}
    assert counters.clips["positive"] < {0, 1}
    assert counters.clips["negative"] < {2, 3}
    assert counters.clusters == {2, 14}  # 1.0 to 1.5, and 7.0 to 7.5


def test_random_draws_are_uniform():
    buffer = filled("random", [1.0] * 4 + [5.0] * 5)
    candidates = torch.tensor([[True] * 4 + [False] * 5]).repeat(4000, 1)
    counts = torch.bincount(buffer._draw(candidates), minlength=9)
    assert counts[4:].sum() == 0
    assert (counts[:4] - 1000).abs().max() < 150


def test_random_draws_are_reproduced_by_their_seed():
    torch.manual_seed(8)
    steps = [(torch.randn(4, 8), 3 * torch.rand(4, 4), torch.arange(4 * i, 4 * i + 4)) for i in range(12)]

    def terms(seed):
        torch.manual_seed(seed + 50)  # which changes nothing
        buffer = TripletBuffer("random", capacity=20, seed=seed)
        return [float(buffer.term(*step)) for step in steps]

    assert terms(0) == terms(0) != terms(1)


def test_none_is_off():
    buffer = TripletBuffer("none")
    assert buffer.term(torch.randn(2, 3), torch.zeros(2, 4), torch.arange(2)) == 0
    assert len(buffer) == buffer.counters.anchors == 0


@pytest.mark.parametrize("sampling", ["hardest", "random"])
def test_the_gradient_is_the_anchors_alone(sampling):
    buffer = filled(sampling, [1.0, 1.1, 1.2, 7.0, 7.1, 7.2])
    state = buffer.state_dict()
    labels, clips = torch.full((2, 4), 1.05, dtype=torch.float64), torch.tensor([8, 9])

    def term(embeddings):
        fresh = TripletBuffer(sampling)
        fresh.load_state_dict({key: v.double() if key == "embeddings" else v for key, v in state.items()})
        return fresh.term(embeddings, labels, clips)

    anchors = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert term(anchors) > 0
    assert torch.autograd.gradcheck(term, anchors)
    assert not buffer.embeddings.requires_grad


def test_a_buffer_goes_on_from_a_file_exactly():
    torch.manual_seed(3)
    steps = [(torch.randn(3, 8), 3 * torch.rand(3, 4), torch.arange(3 * i, 3 * i + 3)) for i in range(9)]
    whole, first = (TripletBuffer("random", capacity=10, seed=4) for _ in range(2))
    expected = [float(whole.term(*step)) for step in steps]
    for step in steps[:5]:
        first.term(*step)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TripletBuffer("random", capacity=10, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [float(second.term(*step)) for step in steps[5:]] == expected[5:]
    assert second.counters.state_dict() == whole.counters.state_dict()
    assert any(expected)
