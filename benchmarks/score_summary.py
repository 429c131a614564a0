"""What many scored clips have in common, counted as they come: a million of them fit in a few dozen megabytes."""

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.runtime.rows.results import Result

QUANTILES: Final = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_EXAMPLES = 3  # rows that are kept of each error


class Summary:
    """Counts, four scores and seconds of each clip, and the rows at both ends of each axis.

    results   : as `read_results` gives them
    num_clips : how many of the best and of the worst are kept for each axis; of equals, the earlier ones
    """

    def __init__(self, results: Iterable[Result], num_clips: int) -> None:
        self.truncated = 0
        self.silent: Counter[str] = Counter()
        self.sample_rates: Counter[int] = Counter()
        self.channels: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.error_examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._scores, self._seconds = array("d"), array("d")
        self._best = [_Largest(num_clips) for _ in AXES]
        self._worst = [_Largest(num_clips) for _ in AXES]
        for result in results:
            self._add(result)

    def _add(self, result: Result) -> None:
        row = result.row
        if result.error_code is not None:
            self.errors[result.error_code] += 1
            if len(examples := self.error_examples[result.error_code]) < _EXAMPLES:
                examples.append(row)
            return
        self._scores.extend(result.scores)
        self._seconds.append(result.seconds)
        for score, best, worst in zip(result.scores, self._best, self._worst, strict=True):
            best.add(score, row)
            worst.add(-score, row)
        self.truncated += bool(row.get("truncated"))
        _count(self.silent, row.get("silence"), str)
        _count(self.sample_rates, row.get("sample_rate"), int)
        _count(self.channels, row.get("channels"), int)

    @property
    def scored(self) -> int:
        """Clips with scores."""
        return len(self._seconds)

    @property
    def failed(self) -> int:
        """Rows with an error."""
        return self.errors.total()

    @cached_property
    def scores(self) -> np.ndarray:
        """float64 [clips, 4], order CE, CU, PC, PQ."""
        return np.frombuffer(self._scores).reshape(-1, len(AXES))

    @cached_property
    def seconds(self) -> np.ndarray:
        """float64 [clips], of audio that was scored."""
        return np.frombuffer(self._seconds)

    def best(self, axis: str) -> list[dict[str, Any]]:
        """Rows with the highest scores of an axis, the highest first."""
        return self._best[AXES.index(axis)].rows()

    def worst(self, axis: str) -> list[dict[str, Any]]:
        """Rows with the lowest scores of an axis, the lowest first."""
        return self._worst[AXES.index(axis)].rows()

    @cached_property
    def pearson(self) -> np.ndarray:
        """Pearson's correlations between the axes, float64 [4, 4]; nan where there is none."""
        return _correlations(self.scores)

    @cached_property
    def srcc(self) -> np.ndarray:
        """Spearman's correlations between the axes, with average ranks for ties, float64 [4, 4]; nan where none."""
        return _correlations(np.stack([_ranks(column) for column in self.scores.T], axis=1))


def _count(counter: Counter[Any], value: Any, kind: type) -> None:
    """Count a value that a row has; one of another kind is not ours."""
    if isinstance(value, kind):
        counter[value] += 1


class _Largest:
    """The rows with the largest values of all that were added."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._added = 0
        self._heap: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, value: float, row: dict[str, Any]) -> None:
        self._added += 1
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, (value, -self._added, row))
        elif self._heap and value > self._heap[0][0]:
            heapq.heapreplace(self._heap, (value, -self._added, row))

    def rows(self) -> list[dict[str, Any]]:
        return [row for *_, row in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _correlations(columns: np.ndarray) -> np.ndarray:
    """float64 [n, 4] -> [4, 4]; nan for a column without spread, and for fewer than two rows."""
    found = np.full((len(AXES), len(AXES)), np.nan)
    if len(columns) and len(usable := np.flatnonzero(np.ptp(columns, axis=0))):
        found[np.ix_(usable, usable)] = np.corrcoef(columns[:, usable], rowvar=False)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]
