"""Which windows share a batch: properties that hold for any input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesanet.lengths import SAMPLE_RATE
from aesanet.runtime.batching import Planner, Window

WINDOW = 1_000


def plan(clips, batch_samples, window=WINDOW):
    """Batches of (row, number, samples) for clips of so many samples each, and the rows at which groups ended."""
    planner, batches, ends = Planner(window, batch_samples), [], []
    for row, samples in enumerate(clips):
        for number, begin in enumerate(range(0, samples, window)):
            part = Window(np.empty(min(window, samples - begin), np.int8), number, row)
            batches += planner.add(part)
        if planner.end_rows(1):
            batches += planner.end_group()
            ends.append(row + 1)
    batches += planner.end_group()
    return [[(w.owner, w.number, len(w.samples)) for w in batch] for batch in batches], ends, planner


clip_lengths = st.lists(st.integers(1, 3_500), max_size=120)


@given(clips=clip_lengths, batch_samples=st.integers(1, 6_000))
def test_every_window_is_in_one_batch_that_is_not_too_large(clips, batch_samples):
    batches, _, planner = plan(clips, batch_samples)
    found = sorted((row, number, samples) for batch in batches for row, number, samples in batch)
    assert found == [
        (row, number, min(WINDOW, samples - number * WINDOW))
        for row, samples in enumerate(clips)
        for number in range(-(-samples // WINDOW))
    ]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(samples for _, _, samples in batch) <= batch_samples
    assert planner.useful_samples == sum(clips)
    assert planner.batches == len(batches)
    assert planner.padded_samples == sum(len(batch) * max(samples for _, _, samples in batch) for batch in batches)


@given(clips=clip_lengths, batch_samples=st.integers(1, 3_000))
def test_a_group_is_planned_as_if_nothing_came_before(clips, batch_samples):
    batches, ends, _ = plan(clips, batch_samples)
    for end in ends:
        rest = [batch for batch in batches if batch[0][0] >= end]
        assert all(row >= end for batch in rest for row, _, _ in batch)
        alone, _, _ = plan(clips[end:], batch_samples)
        assert [[(row + end, number, n) for row, number, n in batch] for batch in alone] == rest


@given(clips=clip_lengths, batch_samples=st.integers(1, 30_000))
def test_no_batch_is_ended_before_it_is_half_full_but_a_groups_last(clips, batch_samples):
    batches, ends, _ = plan(clips, batch_samples)
    bounds = [*ends, len(clips)]
    lasts = {max(i for i, batch in enumerate(batches) if batch[0][0] < end) for end in bounds if end and batches}
    for number, batch in enumerate(batches):
        if number not in lasts:
            assert 2 * (len(batch) + 1) * max(samples for _, _, samples in batch) > batch_samples


@pytest.mark.parametrize("batch_seconds", [40, 640])
@pytest.mark.parametrize("kind", ["uniform", "lognormal", "with long files"])
def test_less_than_a_twentieth_is_padding(kind, batch_seconds):
    rng = np.random.default_rng(0)
    clips = {
        "uniform": rng.uniform(0.2, 10, 8_000),
        "lognormal": np.clip(rng.lognormal(1.3, 0.8, 8_000), 0.2, 60),
        "with long files": np.where(rng.random(4_000) < 0.05, rng.uniform(60, 600, 4_000), rng.uniform(0.3, 9, 4_000)),
    }[kind]
    samples = (clips * SAMPLE_RATE).astype(int).tolist()
    _, _, planner = plan(samples, batch_seconds * SAMPLE_RATE, window=10 * SAMPLE_RATE)
    assert planner.useful_samples / planner.padded_samples > 0.95


def test_rows_of_no_audio_end_a_group_too():
    """So that a run over a million broken files can be resumed near where it stopped."""
    planner = Planner(WINDOW, 10 * WINDOW)
    assert not planner.end_rows(4_095)
    assert planner.end_rows(1)
