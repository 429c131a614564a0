import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy
from aesanet.padding import pad_batch
from aesanet.runtime.windows import split_windows


@given(
    lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=8),
    window=st.integers(MIN_SAMPLES, 20_000),
    hop_share=st.floats(0.05, 1.0),
)
def test_windows_are_slices_at_every_hop_until_all_is_covered(lengths, window, hop_share):
    policy = WindowPolicy(window / SAMPLE_RATE, max(160, round(window * hop_share)) / SAMPLE_RATE)
    window, hop = policy.window_samples, policy.hop_samples
    wave = np.arange(sum(lengths), dtype=np.float32)
    found = list(split_windows(np.split(wave, np.cumsum(lengths)[:-1]), policy))

    starts = [0]
    while starts[-1] + window < len(wave):
        starts.append(starts[-1] + hop)
    assert len(found) == len(starts)
    for one, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(one, wave[start : start + window])


def test_no_audio_has_no_windows():
    assert list(split_windows([], WindowPolicy())) == []


def test_a_batch_is_padded_with_zeros_and_knows_its_lengths():
    waveform, num_samples = pad_batch([np.ones(3, np.float32), np.full(5, 2, np.float32)])
    np.testing.assert_array_equal(waveform, [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(num_samples, [3, 5])
    assert (waveform.dtype, num_samples.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(("window", "hop"), [(0.1, 0.1), (10, 0), (10, -1), (10, 11), (10, float("nan"))])
def test_policies_that_cannot_score_or_leave_audio_out(window, hop):
    with pytest.raises(ValueError, match="_seconds is"):
        WindowPolicy(window, hop)
