"""Profiles: which batches engines are built for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesanet.bundle import GRAPH_NAMES, signature
from aesanet.export.profiles import default_profiles, make_profiles
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, num_frames, num_tokens

bounds = st.lists(
    st.tuples(st.integers(1, 600), *[st.integers(1, 4096)] * 3).map(lambda bound: (bound[0], *sorted(bound[1:]))),
    min_size=1,
    max_size=4,
    unique_by=lambda bound: (bound[0], bound[3]),
)


@given(bounds, st.data())
def test_profiles_cover_every_length_up_to_the_longest(pairs, data):
    profiles = make_profiles(pairs)
    longest = max(seconds for seconds, *_ in pairs)
    samples = data.draw(st.integers(MIN_SAMPLES, longest * SAMPLE_RATE))
    covering = [p for p in profiles if p.min_seconds * SAMPLE_RATE <= samples <= p.max_seconds * SAMPLE_RATE]
    assert covering
    batch = covering[0].min_batch
    inputs = {spec.name: spec for name in GRAPH_NAMES for spec in signature(name, 48)[0]}
    sizes = {
        "waveform": (batch, samples),
        "fbank": (batch, num_frames(samples), 128),
        "features": (batch, num_tokens(samples), 48),
        "num_tokens": (batch,),
    }
    for name, spec in inputs.items():
        smallest, best, largest = (np.array(shape) for shape in covering[0].shapes(spec))
        assert (smallest <= best).all()
        assert (best <= largest).all()
        assert (smallest <= sizes[name]).all()
        assert (sizes[name] <= largest).all()
        assert (covering[0].max_seconds, smallest[0], best[0], largest[0]) in pairs
        assert (best[1:] == largest[1:]).all()


def test_kernels_are_chosen_for_the_largest_batch_where_no_other_is_named():
    named, largest = make_profiles([(10.0, 4, 16, 64)]), make_profiles([(10.0, 64)])
    assert [str(*profiles) for profiles in (named, largest)] == [
        "4 to 64 clips (kernels for 16) of 2800 to 160000 samples",
        "1 to 64 clips of 2800 to 160000 samples",
    ]
    assert [(p.min_batch, p.best_batch) for (p,) in (named, largest)] == [(4, 16), (1, 64)]


@pytest.mark.parametrize("window", [0.175, 1.0, 2.0, 6.0, 10.0, 30.0, 600.0])
def test_default_profiles_hold_the_window(window):
    ends = [profile.max_seconds for profile in default_profiles(window)]
    assert window in ends
    assert ends == sorted(set(ends))


def test_default_batches_fit_the_gpus_memory():
    batches = {
        memory: [p.max_batch for p in default_profiles(10.0, memory)] for memory in (None, 143_771, 8_192, 2_048, 1)
    }
    assert batches == {
        None: [128, 64, 20],
        143_771: [128, 64, 20],
        8_192: [128, 51, 17],
        2_048: [64, 13, 4],
        1: [1, 1, 1],
    }


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(0.1, 4)],
        [(601, 4)],
        [(5, 0)],
        [(5, 5000)],
        [(5, 4), (5, 4)],
        [(5, 1, 5, 4)],
        [(5, 1, 0, 4)],
        [(5, 3, 2, 4)],
        [(5, 0, 4, 4)],
        [(5, 5, 4, 4)],
    ],
)
def test_profiles_that_make_no_sense(pairs):
    with pytest.raises(ValueError, match="profile"):
        make_profiles(pairs)
