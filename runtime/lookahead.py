"""Work done ahead in threads, its results taken in order: decoding that never waits for the engine.

What was made and not yet taken is bounded by its weight, whatever comes; the stream that is being taken from may
always go on, so nothing can wait for itself.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, TypeVar

Task = TypeVar("Task")
Item = TypeVar("Item")

_AHEAD: Final = 1024  # of tasks' sizes; what they make is bounded by weight


class _Stream(Generic[Task, Item]):
    """One task and what it made so far."""

    def __init__(self, task: Task | None, size: int, failure: BaseException | None = None) -> None:
        self.task = task
        self.size = size
        self.made: deque[tuple[Item, int]] = deque()
        self.weight = 0
        self.ended = failure is not None
        self.failure = failure


class LookAhead(Generic[Task, Item]):
    """Iterates over (task, item) for the items of all tasks, in order, each made by `work` in one of the threads.

    tasks      : taken in the caller's thread, ahead as far as their sizes come to 1,024
    size       : of a task
    work       : a task to its items, one after the other
    weight     : of an item, in any unit
    max_weight : of what may wait to be taken, beside one item a thread
    workers    : threads; with 0 the work is done where it is taken

    What `work` raises is raised where its items would have come; what `tasks` raise, after the items of all before.
    `close` ends the threads after the item in hand, and the iteration.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        work: Callable[[Task], Iterator[Item]],
        weight: Callable[[Item], int],
        max_weight: int,
        workers: int,
        size: Callable[[Task], int] = lambda task: 1,
    ) -> None:
        self._tasks = iter(tasks)
        self._work, self._size, self._weight, self._max_weight = work, size, weight, max_weight
        self._changed = threading.Condition()
        self._waiting: deque[_Stream[Task, Item]] = deque()  # for a thread
        self._streams: deque[_Stream[Task, Item]] = deque()  # all that are not wholly taken, in order
        self._held = self._ahead = 0  # weights of items, sizes of tasks
        self._closed = self._exhausted = self._stopped = False
        self.working_seconds = 0.0
        """Of all threads together, in `work`."""
        self.waited_seconds = 0.0
        """Of the caller, for items."""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[Task, Item]]:
        return self._in_order() if self._threads else self._at_once()

    def _at_once(self) -> Iterator[tuple[Task, Item]]:
        for task in self._tasks:
            for item in self._work(task):
                yield task, item
            if self._exhausted:
                return

    def _in_order(self) -> Iterator[tuple[Task, Item]]:
        while True:
            self._give_tasks()
            if not self._streams:
                return
            stream = self._streams[0]
            while (item := self._take(stream)) is not None:
                assert stream.task is not None
                yield stream.task, item[0]
                self._give_tasks()
            with self._changed:
                self._streams.popleft()
                self._ahead -= stream.size
                self._changed.notify_all()  # the next one is first now, and may go on

    def stop(self) -> None:
        """Take no more tasks, and leave out those that no thread has begun. May be called by a signal's handler."""
        self._exhausted = self._stopped = True

    def close(self) -> None:
        """End the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _give_tasks(self) -> None:
        while not self._exhausted and self._ahead < _AHEAD and self._held < self._max_weight:
            stream: _Stream[Task, Item]
            try:
                task = next(self._tasks)
                stream = _Stream(task, self._size(task))
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                self._exhausted = True
                stream = _Stream(None, 0, error)
            with self._changed:
                self._streams.append(stream)
                self._ahead += stream.size
                if not stream.ended:
                    self._waiting.append(stream)
                self._changed.notify_all()  # threads wait for room, too: one alone might be the wrong one

    def _take(self, stream: _Stream[Task, Item]) -> tuple[Item, int] | None:
        """The next item of the first stream, or None at its end."""
        with self._changed:
            if not (stream.made or stream.ended):
                began = time.perf_counter()
                self._changed.wait_for(lambda: stream.made or stream.ended or self._closed)
                self.waited_seconds += time.perf_counter() - began
            if stream.made:
                item = stream.made.popleft()
                stream.weight -= item[1]
                self._held -= item[1]
                self._changed.notify_all()
                return item
            if stream.failure is not None:
                raise stream.failure
            return None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                stream, left_out = self._waiting.popleft(), self._stopped
                assert stream.task is not None
            began, blocked = time.perf_counter(), 0.0
            try:
                for item in () if left_out else self._work(stream.task):
                    blocked += self._put(stream, item)
                    if self._closed:
                        break
            except BaseException as error:  # the caller's to handle, in its order
                stream.failure = error
            with self._changed:
                self.working_seconds += time.perf_counter() - began - blocked
                stream.ended = True
                self._changed.notify_all()

    def _put(self, stream: _Stream[Task, Item], item: Item) -> float:
        """Hand an item over as soon as there is room; the seconds waited."""
        began = time.perf_counter()
        weight = self._weight(item)

        def room() -> bool:
            # The first stream has a share of its own, as nothing else is taken before it ends.
            first = self._streams and self._streams[0] is stream and stream.weight * 4 < self._max_weight
            return self._closed or self._held < self._max_weight or bool(first)

        with self._changed:
            self._changed.wait_for(room)
            stream.made.append((item, weight))
            stream.weight += weight
            self._held += weight
            self._changed.notify_all()
        return time.perf_counter() - began
