"""Rows through the whole pipeline, with an engine whose scores are known beforehand."""

import gc
import weakref
from functools import partial
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.errors import ClipError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy
from aesanet.runtime import pipeline as pipeline_module
from aesanet.runtime.audio.decode import Heard
from aesanet.runtime.backends.base import Backend
from aesanet.runtime.jobs import Job
from aesanet.runtime.pipeline import GroupEnd, Pipeline, Scored, Settings
from aesanet.runtime.windows import WindowCutter

POLICY = WindowPolicy(window_seconds=0.5, hop_seconds=0.375)


class Known(Backend):
    """Scores a window by its own samples, and remembers the batches."""

    name = kind = "known"
    device, precision, form = "cpu", "fp32", "fp32"

    def __init__(self):
        self.batches = []

    def scores(self, waveform, num_samples):
        self.batches.append(num_samples.tolist())
        return np.stack([known_scores(w[:n]) for w, n in zip(waveform, num_samples, strict=True)])

    def submit_embedded(self, waveform, num_samples):
        scores = self.scores(waveform, num_samples)
        return lambda: (scores, np.repeat(scores[:, :1], 3, axis=1))


def known_scores(window):
    return np.array([window[0], window[-1], window.mean(), len(window) / 1000], np.float32)


def blocks_of(clips):
    """A job's blocks: its clips side by side, as segments that overlap come; errors after what they have."""
    pieces = [np.array_split(samples, 3) if len(samples) else [] for samples, _ in clips]
    for turn in range(3):
        for index, parts in enumerate(pieces):
            if turn < len(parts):
                yield index, parts[turn]
    for index, (samples, error) in enumerate(clips):
        if error:
            yield index, ClipError("undecodable", f"clip {index}")
        else:
            yield index, Heard(len(samples) / SAMPLE_RATE, None, SAMPLE_RATE, 1, None)


def jobs_of(files, seed=0):
    """Files of clips, given as (samples, fails) pairs; a row is its number."""
    rng = np.random.default_rng(seed)
    number = 0
    for file in files:
        clips = [(rng.normal(size=samples).astype(np.float32), fails) for samples, fails in file]
        yield Job(range(number, number + len(clips)), partial(blocks_of, clips)), clips
        number += len(clips)


def run(files, workers=2, batch_seconds=1.0, backend=None, **how):
    pipeline = Pipeline(
        (job for job, _ in jobs_of(files)), backend or Known(), POLICY, Settings(workers, batch_seconds, **how)
    )
    return list(pipeline.run()), pipeline


def expected_scores(samples):
    """The clip on its own, cut by hand."""
    window, hop = POLICY.window_samples, POLICY.hop_samples
    starts = range(0, max(1, len(samples) - window + hop), hop)
    parts = [part for start in starts if len(part := samples[start : start + window]) >= MIN_SAMPLES]
    return np.average([known_scores(p) for p in parts], axis=0, weights=[len(p) for p in parts]) if parts else None


clip = st.tuples(st.integers(0, 20_000), st.sampled_from([False, False, False, True]))
files_of_clips = st.lists(st.lists(clip, min_size=1, max_size=3), max_size=25)


@given(files=files_of_clips, workers=st.integers(0, 3), batch_seconds=st.sampled_from([0.1, 0.6, 2.5]))
@settings(max_examples=60)
def test_each_row_comes_out_once_in_order_with_its_own_scores(files, workers, batch_seconds):
    found, pipeline = run(files, workers, batch_seconds)
    rows = [f for f in found if not isinstance(f, GroupEnd)]
    clips = [clip for _, file in jobs_of(files) for clip in file]
    assert [number for number, _ in rows] == list(range(len(clips)))
    for (_, outcome), (samples, fails) in zip(rows, clips, strict=True):
        expected = expected_scores(samples)
        if fails:
            assert outcome.code == "undecodable"
        elif expected is None:
            assert outcome.code == "too_short"
        else:
            np.testing.assert_allclose(outcome.scores, expected, rtol=1e-5, atol=1e-5)
            assert outcome.heard.seconds == len(samples) / SAMPLE_RATE
            assert sum(window.seconds for window in outcome.windows) >= outcome.heard.seconds - 0.125 - 0.175
            assert [window.start_seconds for window in outcome.windows] == [
                number * POLICY.hop_seconds for number in range(len(outcome.windows))
            ]
    assert found[-1:] == ([GroupEnd(len(clips))] if clips else [])
    assert pipeline.spent.batches == len(pipeline._backend.batches)


@given(files=files_of_clips, workers=st.integers(1, 3), ordered=st.booleans())
@settings(max_examples=40)
def test_the_order_and_the_batches_are_a_matter_of_the_input_alone(files, workers, ordered):
    first, second = Known(), Known()
    one, _ = run(files, workers, backend=first, ordered=ordered)
    other, _ = run(files, 0, backend=second, ordered=ordered)
    assert first.batches == second.batches
    assert [f if isinstance(f, GroupEnd) else f[0] for f in one] == [
        f if isinstance(f, GroupEnd) else f[0] for f in other
    ]


@given(files=st.lists(st.lists(clip, min_size=1, max_size=3), min_size=10, max_size=40), ordered=st.booleans())
@settings(max_examples=30)
def test_what_comes_after_a_group_needs_nothing_from_before(files, ordered):
    """The promise that a resumed run stands on: from the end of a group on, the same batches and rows."""
    whole, begun = Known(), Known()
    found, _ = run(files, backend=whole, batch_seconds=0.4, ordered=ordered)
    ends = [f.rows for f in found if isinstance(f, GroupEnd)]
    for end in ends:
        position = found.index(GroupEnd(end))
        assert sorted(f[0] for f in found[:position] if not isinstance(f, GroupEnd)) == list(range(end))
    middle = ends[len(ends) // 2]
    starts = np.cumsum([0, *(len(file) for file in files)]).tolist()
    assert middle in starts  # a group never ends inside a file
    begun.batches.clear()
    rest = Pipeline(
        (job for job, _ in jobs_of(files) if job.rows[0] >= middle),
        begun,
        POLICY,
        Settings(2, 0.4, ordered=ordered),
    )
    after = list(rest.run())
    assert whole.batches[len(whole.batches) - len(begun.batches) :] == begun.batches
    tail = found[found.index(GroupEnd(middle)) + 1 :]
    for one, other in zip(after, tail, strict=True):
        if isinstance(one, GroupEnd):
            assert one.rows + middle == other.rows
        else:
            assert one[0] == other[0]
            assert isinstance(one[1], ClipError) == isinstance(other[1], ClipError)
            if isinstance(one[1], Scored):
                np.testing.assert_array_equal(one[1].scores, other[1].scores)


def test_unordered_rows_come_as_soon_as_they_can():
    window = POLICY.window_samples
    files = [[(window - 1, False)], [(2 * window, False)], [(0, True)], [(window + 5, False)]]
    found, _ = run(files, ordered=False)
    order = [f[0] for f in found if not isinstance(f, GroupEnd)]
    assert sorted(order) == [0, 1, 2, 3]
    assert order.index(2) < order.index(0)  # the first waits for its group to be batched


def test_embeddings_are_means_weighted_like_the_scores():
    found, _ = run([[(20_000, False)], [(3_000, False)]], embeddings=True)
    for row in found[:2]:
        np.testing.assert_allclose(row[1].embedding, np.repeat(row[1].scores[0], 3), rtol=1e-5)
    (row, _), _ = run([[(3_000, False)]])
    assert row[1].embedding is None


def test_an_engine_that_gives_no_number_fails_that_row_alone():
    class Broken(Known):
        def scores(self, waveform, num_samples):
            scores = super().scores(waveform, num_samples)
            scores[num_samples == 3_000] = np.nan
            return scores

    found, _ = run([[(4_000, False)], [(3_000, False)], [(5_000, False)]], backend=Broken())
    codes = [getattr(f[1], "code", None) for f in found if not isinstance(f, GroupEnd)]
    assert codes == [None, "bad_score", None]


def test_an_engine_that_fails_ends_the_run_and_its_threads():
    class Failing(Known):
        def scores(self, waveform, num_samples):
            raise RuntimeError("the engine")

    pipeline = Pipeline((s for s, _ in jobs_of([[(9_000, False)]] * 500)), Failing(), POLICY, Settings(2, 1.0))
    with pytest.raises(RuntimeError, match="the engine"):
        list(pipeline.run())
    assert not any(thread.is_alive() for thread in pipeline.windows._threads)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_fail_to_come_lose_none_of_before(workers, ordered):
    """But end no group: a run that goes on after it makes the same batches as one that never failed."""

    def jobs():
        for job, _ in jobs_of([[(9_000, False), (20_000, False)]] * 5):
            yield job
        raise OSError("the database is gone")

    running = Pipeline(jobs(), Known(), POLICY, Settings(workers, 1e6, ordered=ordered)).run()
    found = list(islice(running, 10))
    with pytest.raises(OSError, match="the database is gone"):
        next(running)
    assert not any(isinstance(one, GroupEnd) for one in found)
    assert sorted(row for row, _ in found) == list(range(10))


def test_rows_that_fail_to_come_keep_no_engine():
    def jobs():
        yield from (job for job, _ in jobs_of([[(9_000, False)]]))
        raise OSError("the database is gone")

    backend = Known()
    alive, running = weakref.ref(backend), Pipeline(jobs(), backend, POLICY, Settings(0, 1.0)).run()
    del backend
    gc.disable()
    try:
        with pytest.raises(OSError, match="gone"):
            list(running)
        del running
        assert alive() is None
    finally:
        gc.enable()


def test_stop_ends_with_whole_rows():
    pipeline = Pipeline((s for s, _ in jobs_of([[(9_000, False)]] * 5_000)), Known(), POLICY, Settings(2, 1.0))
    rows = []
    for found in pipeline.run():
        if not isinstance(found, GroupEnd):
            rows.append(found[0])
            pipeline.stop()
    assert rows == list(range(len(rows)))
    assert len(rows) < 5_000


def test_memory_is_bounded_by_the_batch_and_not_by_a_long_clip():
    """An hour in one file: windows made and not yet scored are never more than the look-ahead and a group hold."""
    held = []

    def hour():
        for _ in range(3_600):
            yield 0, np.zeros(SAMPLE_RATE, np.float32)
        yield 0, Heard(3_600.0, None, SAMPLE_RATE, 1, None)

    class Watching(Known):
        def scores(self, waveform, num_samples):
            held.append(pipeline.windows._held / SAMPLE_RATE)
            return super().scores(waveform, num_samples)

    pipeline = Pipeline([Job([0], hour)], Watching(), POLICY, Settings(1, 1.0))
    ((_, outcome), end) = list(pipeline.run())
    assert end == GroupEnd(1)
    assert len(outcome.windows) == 9_600
    assert 0 < max(held) <= 16 * 1.0 * 1.25 + 0.5  # seconds: a group's, the first one's share, one in hand


def test_segments_of_one_file_hold_no_more_than_they_need():
    """A window's memory is taken by what is being heard, not by all rows of the file."""
    started = []

    def one_after_the_other():
        for index in range(500):
            yield index, np.zeros(3_000, np.float32)
            yield index, Heard(0.2, None, SAMPLE_RATE, 1, None)

    class Watched(WindowCutter):
        def __init__(self, policy):
            super().__init__(policy)
            started.append(weakref.ref(self))

        def push(self, block):
            assert sum(cutter() is not None for cutter in started) <= 3
            return super().push(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "WindowCutter", Watched)
        found = list(Pipeline([Job(range(500), one_after_the_other)], Known(), POLICY, Settings(0, 1.0)).run())
    assert len(started) == 500
    assert found[-1] == GroupEnd(500)


def test_rows_of_jobs_are_counted_one_by_one():
    """4,096 rows end a group, in however few jobs they come."""
    files = [[(0, True)] * 1_024] * 8
    found, _ = run(files)
    assert [f.rows for f in found if isinstance(f, GroupEnd)] == [4_096, 8_192]
