"""The next thing is read from disk while the present one is worked on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def ahead(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Iterator[Loaded]:
    """`load` of each item, in order, one item ahead in one thread; what it raises is raised at its item's turn."""
    with ThreadPoolExecutor(1) as pool:
        present: Future[Loaded] | None = None
        for item in items:
            following = pool.submit(load, item)
            if present is not None:
                yield present.result()
            present = following
        if present is not None:
            yield present.result()
