"""Work ahead in threads: in order, bounded, and never stuck."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.runtime.lookahead import LookAhead


def threads():
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@given(
    weights=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=30),
    max_weight=st.integers(1, 12),
    workers=st.integers(0, 5),
)
@settings(max_examples=60)
def test_items_come_in_order_whatever_they_weigh(weights, max_weight, workers):
    ahead = LookAhead(weights, iter, lambda weight: weight, max_weight, workers)
    assert list(ahead) == [(task, item) for task in weights for item in task]
    ahead.close()


def test_no_more_is_held_than_was_allowed():
    made, lock = [0], threading.Lock()

    def work(task):
        for _ in range(50):
            with lock:
                made[0] += 1
            yield 1

    ahead = LookAhead(range(20), work, lambda weight: weight, max_weight=10, workers=3)
    taken = 0
    for _ in ahead:
        taken += 1
        time.sleep(0.0005)
        assert (
            made[0] - taken <= 10 + 10 / 4 + 1 + 3
        )  # what waits, the first one's share, and one in each thread's hand
    assert taken == 1_000
    ahead.close()


def test_an_error_comes_where_its_items_would_have():
    def work(task):
        yield task
        if task == 2:
            raise OSError("the third")
        yield task

    ahead = LookAhead(range(5), work, lambda weight: 1, 100, 2)
    taken = []

    def take():
        for _, item in ahead:
            taken.append(item)  # what came before the error counts

    with pytest.raises(OSError, match="the third"):
        take()
    assert taken == [0, 0, 1, 1, 2]
    ahead.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stop_finishes_what_is_begun_and_begins_nothing(workers):
    begun = []

    def work(task):
        begun.append(task)
        yield from (task, task)

    ahead = LookAhead(iter(range(10_000)), work, lambda weight: 1, 4, workers)
    taken = []
    for _, item in ahead:
        taken.append(item)
        if item == 3:
            ahead.stop()
    assert sorted(begun) == list(range(len(begun)))
    assert taken == [task for task in range(len(begun)) for _ in range(2)]
    assert 4 <= len(begun) <= 4 + 4 + workers
    ahead.close()


def test_close_ends_the_threads_with_items_and_tasks_left():
    before = threads()
    closed = []

    def work(task):
        try:
            yield from range(1_000)
        finally:
            closed.append(task)

    ahead = LookAhead(range(100), work, lambda weight: 1, 5, 3)
    next(iter(ahead))
    ahead.close()
    assert threads() == before
    assert closed  # what was begun gave back what it held


def test_time_is_told_by_who_spent_it():
    def slow(task):
        time.sleep(0.02)
        yield task

    ahead = LookAhead(range(10), slow, lambda weight: 1, 100, 2)
    for _ in ahead:
        pass
    ahead.close()
    assert ahead.working_seconds >= 0.2
    assert ahead.waited_seconds > 0


def test_whoever_becomes_first_may_go_on_though_there_is_no_room():
    full, trying = threading.Event(), threading.Event()

    def work(task):
        if task == 0:
            yield "a"
        if task == 1:
            full.wait()
            trying.set()
            yield "b"  # no room, and not the first
        if task == 2:
            yield from "cccc"
            full.set()

    ahead = LookAhead(range(3), work, lambda item: 1, 4, 3)
    items = iter(ahead)
    next(items)
    trying.wait()
    time.sleep(0.1)
    assert [item for _, item in items] == ["b", *"cccc"]
    ahead.close()


def test_tasks_are_taken_ahead_by_their_sizes_and_no_more_than_fit():
    taken = []

    def tasks():
        for task in range(10_000):
            taken.append(task)
            yield task

    ahead = LookAhead(tasks(), lambda task: iter([task]), lambda item: 0, 1, 2, size=lambda task: 100)
    items = iter(ahead)
    next(items)
    assert len(taken) <= 12
    assert [item for _, item in items] == list(range(1, 10_000))  # and none is left behind for having been so many
    ahead.close()
    taken.clear()
    ahead = LookAhead(tasks(), lambda task: iter([task]), lambda item: 1, 8, 2)
    items = iter(ahead)
    next(items)
    time.sleep(0.1)
    next(items)
    count = len(taken)
    time.sleep(0.05)
    next(items)
    assert len(taken) <= count + 2  # what waits is enough, and so nothing more is taken than was given away
    ahead.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_tasks_that_fail_do_so_after_what_came_before(workers):
    def tasks():
        yield from range(3)
        raise LookupError("the fourth")

    ahead = LookAhead(tasks(), lambda task: iter([task]), lambda item: 1, 100, workers)
    taken = []

    def take():
        for _, item in ahead:
            taken.append(item)

    with pytest.raises(LookupError, match="the fourth"):
        take()
    assert taken == [0, 1, 2]
    ahead.close()


def test_the_iteration_ends_when_it_is_closed():
    ahead = LookAhead(range(100), lambda task: iter([task] * 9), lambda item: 1, 5, 2)
    items = iter(ahead)
    next(items)
    ahead.close()
    assert len(list(items)) < 900
