"""Label files: human scores of clips, from the public files of audiobox-aesthetics or one's own tables."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES, AXIS_NAMES
from aesanet.errors import InputError

LABEL_SUFFIXES: Final = (".csv", ".tsv", ".jsonl")

PUBLIC_ROOT: Final = "/your_path/"
"""What the public files write for the folder that each user keeps the audio in."""

SCORE_RANGE: Final = (0.0, 10.0)
"""Of human ratings; the public files hold zeros too."""

ROUNDED: Final = 5e-4
"""Means may differ by this, of which one file has three decimals."""

_AXIS_OF: Final = {axis.casefold(): axis for axis in AXES} | {
    name.casefold().replace(" ", "_"): axis for axis, name in AXIS_NAMES.items()
}
_TRACK2_ID: Final = re.compile(r"audiomos2025-track2-(sys[^-]+)-utt[^-]+")


@dataclass(frozen=True, eq=False)
class LabelledClip:
    """A clip that people have rated.

    id      : `sample_id` where the file has it, else the path as in the file
    path    : below the audio root, `/your_path/` taken off; None where the file has only ids
    system  : what made the clip, or None
    scores  : mean human scores 0-10, order CE, CU, PC, PQ; nan on an axis without a value
    ratings : float64 [4, raters], nan on an axis without ratings; None where the file has only means
    """

    id: str
    path: str | None
    system: str | None
    scores: tuple[float, float, float, float]
    ratings: np.ndarray | None


def read_labels(files: Iterable[str | Path]) -> list[LabelledClip]:
    """All clips of all files, in order; one that stands twice, by id or by path, is given once with all that is known.

    The public files name the same clips twice: AudioMOS with ids and means, audiobox-aesthetics with ratings.

    A file is `.csv`, `.tsv` or `.jsonl`. Columns go by name, in any order: `sample_id`, `path` or `data_path`,
    `system`, and the axes by code (`PQ`) or name (`Production_Quality`); others are passed over. In JSON lines an
    axis may hold a list of ratings instead of their mean. A missing column, null or an empty cell is no value.

    Raises InputError that names the file, the line, the column, what was got and what is allowed.
    """
    clips: list[tuple[str, LabelledClip]] = []
    places: dict[str, int] = {}  # in clips, by id and by path
    for file in map(Path, files):
        empty = True
        for line, row in _rows(file):
            empty = False
            place = f"{file}: line {line}"
            clip = _clip(place, row)
            at = places.get(clip.id, places.get(clip.path or "", len(clips)))
            if at == len(clips):
                clips.append((place, clip))
            before, first = clips[at]
            if (both := _merged(first, clip)) is None:
                raise InputError(
                    f"{place}: {clip.id} stands at {before} too, with other values; a clip may have only one label"
                )
            clips[at] = before, both
            places |= dict.fromkeys((clip.id, *filter(None, [clip.path])), at)
        if empty:
            raise InputError(f"{file}: has no rows; give a file with a row for each clip")
    return [clip for _, clip in clips]


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows, values by column name as the file spells it."""
    suffix = file.suffix.lower()
    if suffix not in LABEL_SUFFIXES:
        raise InputError(f"{file}: its suffix is {suffix!r}; a label file is {', '.join(LABEL_SUFFIXES)}")
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: line {content[: error.start].count(10) + 1}: not UTF-8; save it as UTF-8") from None
    if suffix == ".jsonl":
        yield from _json_rows(file, text)
    else:
        yield from _table_rows(file, text, delimiter="," if suffix == ".csv" else "\t")


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, written in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not written.strip():
            continue
        try:
            row = json.loads(written, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: line {line}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}: line {line}: a JSON {type(row).__name__}; it must be an object")
        yield line, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def _table_rows(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise InputError(f"{file}: line 1: its columns are {header}; no name may stand twice")
        for fields in table:
            if not fields:
                continue
            place = f"{file}: line {table.line_num}"
            if len(fields) != len(header):
                raise InputError(f"{place}: {len(fields)} fields; the header has {len(header)}")
            yield (
                table.line_num,
                {
                    name: _number(place, name, field) if _column(name) in _AXIS_OF else field
                    for name, field in zip(header, fields, strict=True)
                },
            )
    except csv.Error as error:
        raise InputError(f"{file}: line {table.line_num}: {error}") from None


def _number(place: str, name: str, field: str) -> float | None:
    """A cell of an axis; an empty one is no value."""
    if not field.strip():
        return None
    try:
        return float(field)
    except ValueError:
        raise InputError(f"{place}: {name} is {field!r}; it must be {_allowed()} or empty") from None


def _column(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def _allowed() -> str:
    return f"a number from {SCORE_RANGE[0]:g} to {SCORE_RANGE[1]:g}"


def _clip(place: str, row: Mapping[str, Any]) -> LabelledClip:
    texts: dict[str, str | None] = {}
    values: dict[str, np.ndarray] = {}
    spelled: dict[str, str] = {}
    for name, value in row.items():
        column = _column(name)
        kind = _AXIS_OF.get(column, "path" if column == "data_path" else column)
        if kind not in (*AXES, "sample_id", "path", "system"):
            continue
        if kind in spelled:
            raise InputError(f"{place}: columns {spelled[kind]!r} and {name!r} both mean {kind}; leave one")
        spelled[kind] = name
        if kind not in AXES:
            texts[kind] = _text(place, name, value)
        elif value is not None:
            values[kind] = _values(place, name, value)
    given = texts.get("path")
    id_ = texts.get("sample_id") or given
    if id_ is None:
        raise InputError(f"{place}: has {list(row)}; it must have a sample_id, a path or a data_path")
    if not values:
        raise InputError(f"{place}: {id_} has no value on any axis; it must have one of {', '.join(AXES)} or more")
    sizes = {spelled[axis]: found.shape for axis, found in values.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{key} {shape[0] if shape else 'one number'}" for key, shape in sizes.items())
        raise InputError(f"{place}: numbers of ratings differ: {counts}; all axes of a clip must have as many")
    nothing = np.full(next(iter(sizes.values())), math.nan)
    ratings = np.array([values.get(axis, nothing) for axis in AXES])
    ce, cu, pc, pq = (ratings if ratings.ndim == 1 else ratings.mean(axis=1)).tolist()
    path = _below_root(given)
    return LabelledClip(
        id=id_,
        path=path,
        system=texts.get("system") or _system(id_, path),
        scores=(ce, cu, pc, pq),
        ratings=None if ratings.ndim == 1 else ratings,
    )


def _text(place: str, name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InputError(f"{place}: {name} is {value!r}; it must be text")
    return value


def _values(place: str, name: str, value: Any) -> np.ndarray:
    """float64 [] of a mean, or [raters] of a list of ratings."""
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        # JSON's true is an int to Python. The comparison refuses nan too.
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not plain or not SCORE_RANGE[0] <= number <= SCORE_RANGE[1]:
            raise InputError(f"{place}: {name} is {value!r}; it must be {_allowed()}, or in JSON a list of them")
    if not numbers:
        raise InputError(f"{place}: {name} is an empty list; it must have a rating, or be null")
    return np.array(value, dtype=np.float64)


def _below_root(path: str | None) -> str | None:
    """The path without the public root; None for what is no path but an id: no folder in it and no suffix."""
    if path is None or ("/" not in path and not PurePosixPath(path).suffix):
        return None
    return path.removeprefix(PUBLIC_ROOT)


def _system(name: str, path: str | None) -> str | None:
    """The system that public names tell: of AudioMOS Track 2 ids, and of PAM's folders."""
    if found := _TRACK2_ID.fullmatch(name):
        return found[1]
    parts = PurePosixPath(path or "").parts
    return parts[-2] if len(parts) > 2 and parts[0] == "PAM" else None


def _merged(first: LabelledClip, second: LabelledClip) -> LabelledClip | None:
    """What two rows of one clip say together, ratings rather than means; None where they contradict each other."""
    for a, b in ((first.path, second.path), (first.system, second.system)):
        if a and b and a != b:
            return None
    if not np.allclose(first.scores, second.scores, rtol=0, atol=ROUNDED, equal_nan=True):
        return None
    rated, other = first.ratings, second.ratings
    if rated is not None and other is not None and not np.array_equal(rated, other, equal_nan=True):
        return None
    return replace(
        second if rated is None and other is not None else first,
        id=first.id,
        path=first.path or second.path,
        system=first.system or second.system,
    )
