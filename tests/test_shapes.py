"""Which shape a batch is run in, and in which of an engine's profiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import LONGEST, noise

from aesanet.export.profiles import make_profiles
from aesanet.lengths import MIN_SAMPLES, num_tokens
from aesanet.runtime.cuda.shapes import choose_profile, grid_batch, grid_samples


@given(st.integers(1, 4096), st.integers(MIN_SAMPLES, 30 * 16_000))
def test_the_grid_holds_every_batch_and_wastes_little(batch, samples):
    rows, length = grid_batch(batch), grid_samples(samples)
    assert batch <= rows <= batch * 1.125
    assert samples <= length < samples + 2_560
    assert num_tokens(length) <= num_tokens(samples) + 8
    assert (grid_batch(rows), grid_samples(length)) == (rows, length)  # a shape of the grid stays


def test_the_grid_has_few_shapes():
    assert len({grid_batch(batch) for batch in range(1, 129)}) == 16 + 3 * 8


def test_profiles_are_chosen_by_length(simulated):
    profiles = simulated.open().profiles
    assert [choose_profile(profiles, n, 1).index for n in (2_800, 16_000, 16_001, LONGEST)] == [0, 0, 1, 1]
    assert profiles[1].padded(3, 63_999) == (3, LONGEST)
    assert profiles[0].padded(17, 15_999) == (18, 16_000)
    assert profiles[0].padded(99, 15_999) == (20, 16_000)


def test_of_profiles_of_one_length_a_batch_takes_the_smallest_that_holds_it(simulated, reference, monkeypatch):
    bounds = make_profiles([(4.0, 1), (4.0, 6), (1.0, 20), (4.0, 3)])
    backend = simulated.open(profiles=bounds)
    assert [(p.min_samples, p.max_samples, p.max_batch) for p in backend.profiles] == [
        (2_800, 16_000, 20),
        (16_000, LONGEST, 1),
        (16_000, LONGEST, 3),
        (16_000, LONGEST, 6),
    ]
    chosen = [choose_profile(backend.profiles, 30_000, count).index for count in (1, 2, 3, 4, 6, 7, 100)]
    assert chosen == [1, 2, 2, 3, 3, 3, 3]
    assert choose_profile(backend.profiles, 16_000, 21).index == 0  # in parts, and not with kernels for longer ones
    assert backend.batch_seconds(4.0) == 6 * 4.0
    rng = np.random.default_rng(0)
    taken = []

    def choose(profiles, samples, batch):
        taken.append(choose_profile(profiles, samples, batch))
        return taken[-1]

    monkeypatch.setattr("aesanet.runtime.backends.tensorrt.choose_profile", choose)
    backend.scores(*noise(rng, [20_000] * 8))
    assert [profile.max_batch for profile in taken] == [6, 3]  # what is left over, too
    for count in (1, 2, 5, 7, 13):
        batch = noise(rng, [20_000 + 97 * number for number in range(count)])
        np.testing.assert_allclose(backend.scores(*batch), reference(*batch), atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 20])
def test_fewer_clips_than_a_profile_takes_are_padded(simulated, reference, count):
    """Those of others, too, which are read where they are if they are enough."""
    bounds = make_profiles([(4.0, 1), (4.0, 4, 4, 6), (1.0, 8, 8, 20)])
    batch = noise(np.random.default_rng(count), [15_000 + 97 * number for number in range(count)])
    for waveform, num_samples in (batch, (batch[0][:, :15_000], np.full(count, 15_000))):
        backend = simulated.open(profiles=bounds)
        expected = reference(waveform, num_samples)
        np.testing.assert_allclose(backend.scores(waveform, num_samples), expected, atol=1e-4)
        stream = simulated.stream()
        lent = simulated.lend(waveform, stream, dlpack=False)
        np.testing.assert_allclose(backend.submit(lent, num_samples, stream)(), expected, atol=1e-4)
