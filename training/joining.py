"""Labels meet scores: which row of `aesanet score` belongs to which labelled clip."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.runtime.rows.results import Note, output_rows
from aesanet.training.labels import LabelledClip

LARGEST_SCORE: Final = 1e6  # far outside any scale, and small enough that its square is a number


@dataclass(frozen=True, eq=False)
class ScoredClips:
    """Labels and scores side by side, in the order of label ids, so that the order of the files changes nothing."""

    clips: list[LabelledClip]
    scores: np.ndarray
    """float64 [clips, 4], order CE, CU, PC, PQ."""
    missing: int
    unused: int

    @property
    def true(self) -> np.ndarray:
        """Human scores, float64 [clips, 4]; nan where a clip has no label on an axis."""
        return np.array([clip.scores for clip in self.clips])

    @property
    def systems(self) -> np.ndarray:
        """Names of the clips' systems, str [clips]; empty where a clip has none."""
        return np.array([clip.system or "" for clip in self.clips])


@dataclass(frozen=True)
class _Row:
    place: str
    names: tuple[str, ...]  # its sample_id and id
    path: str | None
    scores: tuple[float, ...] | None  # None of an error row

    def __str__(self) -> str:
        return f"{self.place} ({self.path or ', '.join(self.names)})"


def join(
    labels: Sequence[LabelledClip], scores: str | Path, allow_missing: bool = False, note: Note | None = None
) -> ScoredClips:
    """Find the score of each label in a file that `aesanet score` wrote (JSON lines, .parquet, or `-`: standard input).

    A row belongs to the label whose id is the row's `sample_id` or `id`, else to the one whose path below the audio
    root (or id, where it has no path) ends the row's path, folder by folder; where none does, file suffixes are left
    out of the comparison. With `allow_missing`, labels without a score are left out.

    note : is told of a last line that is torn, and left out; without, that is an error

    Raises InputError for a line that is no such row, a row that fits two labels, a label that fits two rows, labels
    without a score, and when nothing is left.
    """
    by_id = {label.id: label for label in labels}
    exact, loose = _paths(labels)
    found: dict[str, _Row] = {}
    unused = 0
    for row in starmap(_score_row, output_rows(str(scores), note)):
        ids = {name for name in row.names if name in by_id} or _by_path(row.path, exact, loose)
        if len(ids) > 1:
            both = " and ".join(sorted(ids)[:2])
            raise InputError(f"{row}: fits {len(ids)} labels, {both}; give the row the `sample_id` of its label")
        unused += not ids
        for name in ids:
            if name in found:
                raise InputError(f"{row}: fits label {name}, as {found[name]} does; leave one of the two rows")
            found[name] = row
    usable = {name: row.scores for name, row in found.items() if row.scores is not None}
    lost = [label.id for label in labels if label.id not in usable]
    if not usable or (lost and not allow_missing):
        failed = len(found) - len(usable)
        raise InputError(
            f"{scores}: {len(lost)} of {len(labels)} labels have no score ({failed} have an error row, "
            f"{len(lost) - failed} no row): {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}; "
            + ("score those clips, or allow missing ones" if usable else "are these the scores of other clips?")
        )
    clips = [by_id[name] for name in sorted(usable)]
    return ScoredClips(clips, np.array([usable[clip.id] for clip in clips]), missing=len(lost), unused=unused)


def _score_row(place: str, row: Mapping[str, Any]) -> _Row:
    names = tuple(row[key] for key in ("sample_id", "id") if isinstance(row.get(key), str))
    path = row.get("path")
    scores = None if "error" in row else tuple(_score(place, axis, row.get(axis)) for axis in AXES)
    return _Row(place, names, path if isinstance(path, str) and path else None, scores)


def _score(place: str, axis: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_SCORE:
        raise InputError(f"{place}: {axis} is {value!r}; it must be a finite score, or the row have an `error`")
    return float(value)


_Index = dict[tuple[str, ...], set[str]]


def _paths(labels: Sequence[LabelledClip]) -> tuple[_Index, _Index]:
    """Label ids by the components of their paths, and by those with and without the file suffix."""
    exact: _Index = defaultdict(set)
    loose: _Index = defaultdict(set)
    for label in labels:
        parts = _parts(label.path or label.id)
        exact[parts].add(label.id)
        loose[parts].add(label.id)
        loose[_stem(parts) if label.path else parts].add(label.id)
    return exact, loose


def _by_path(path: str | None, exact: _Index, loose: _Index) -> set[str]:
    parts = _parts(path or "")
    ends = [parts[i:] for i in range(len(parts))]
    return {name for end in ends for name in exact.get(end, ())} or {
        name for end in ends for key in (end, _stem(end)) for name in loose.get(key, ())
    }


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.lstrip("/")).parts


def _stem(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], PurePosixPath(parts[-1]).stem)
