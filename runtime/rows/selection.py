"""Which scored clips are kept: those within limits, and of these perhaps the best."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.runtime.rows.results import STDIN, Note, Result, read_results

LIMIT_NAMES: Final = (*AXES, "seconds")
"""What has limits."""


@dataclass(frozen=True)
class Conditions:
    """What a row must meet to be kept; limits are of `LIMIT_NAMES`, and are themselves allowed."""

    least: Sequence[tuple[str, float]] = ()
    most: Sequence[tuple[str, float]] = ()
    truncated: bool = True
    """May the clip's file have ended before its header said?"""
    silent: bool = True
    """May the clip be silent, or nearly?"""

    def met_by(self, result: Result) -> bool:
        """Whether a row passes; one with an error never does."""
        if result.error_code is not None:
            return False
        values = dict(zip(LIMIT_NAMES, (*result.scores, result.seconds), strict=True))
        return (
            all(values[name] >= limit for name, limit in self.least)
            and all(values[name] <= limit for name, limit in self.most)
            and (self.truncated or not result.row.get("truncated"))
            and (self.silent or not result.row.get("silence"))
        )


@dataclass(frozen=True)
class Top:
    """The rows with the highest scores of an axis, of all that meet the conditions; of equal ones, the first."""

    axis: str
    rows_of: Callable[[int], int]
    """How many, of so many."""

    def of(self, values: Sequence[float]) -> np.ndarray:
        """bool [values]: which of the scores are taken."""
        taken = np.zeros(len(values), bool)
        # A stable sort, so that equal scores stay in their order.
        taken[np.argsort(-np.array(values), kind="stable")[: self.rows_of(len(values))]] = True
        return taken


class Selection:
    """The kept rows of score files, in their order; what was read and kept is counted on the way.

    Rows are not held: with `top`, the files are read twice, and 8 bytes are held for each row.
    """

    def __init__(self, files: Sequence[str], conditions: Conditions, top: Top | None, note: Note) -> None:
        if top is not None and STDIN in files:
            raise InputError("the top is found by reading twice, which standard input cannot be; give it as a file")
        self.rows = self.failed = self.kept_rows = 0
        self.seconds = self.kept_seconds = 0.0
        self._files, self._conditions, self._top, self._note = files, conditions, top, note

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows as they were, but for their long lists; raises InputError as `read_results` does."""
        taken = None if self._top is None else self._taken(self._top)
        passed = 0
        for result in read_results(self._files, self._note if taken is None else lambda _: None):
            self.rows += 1
            self.failed += result.error_code is not None
            self.seconds += result.seconds
            if not self._conditions.met_by(result):
                continue
            passed += 1
            # A run that goes on may have written more since the first reading.
            if taken is None or (passed <= len(taken) and taken[passed - 1]):
                self.kept_rows += 1
                self.kept_seconds += result.seconds
                yield result.row
        if taken is not None and passed < len(taken):
            raise InputError(f"{', '.join(self._files)}: changed while they were read; try again")

    def _taken(self, top: Top) -> np.ndarray:
        axis = AXES.index(top.axis)
        results = read_results(self._files, self._note)
        return top.of(array("d", (result.scores[axis] for result in results if self._conditions.met_by(result))))
