"""Scores are read back: the JSON lines or the Parquet files that `aesanet score` wrote."""

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeAlias

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.runtime.rows.inputs import BYTE_ORDER_MARK, PARQUET_SUFFIX
from aesanet.runtime.rows.row import parse_json

STDIN: Final = "-"
LONG_KEYS: Final = ("windows", "embedding")
"""Lists of a row, which are many times as long as the rest of it and are left out in reading."""

_LARGEST: Final = 1e9  # of a score, or of seconds: far outside any scale; not so for NaN

Note: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """A row as scoring wrote it, without its long lists: with scores and seconds, or with an error's code."""

    row: dict[str, Any]
    scores: tuple[float, ...]
    """CE, CU, PC, PQ; empty where the row has an error."""
    seconds: float
    """Of audio that was scored; 0.0 where the row has an error."""
    error_code: str | None = None


def score_files(names: Sequence[str]) -> list[str]:
    """Names of files, globs among them found, in the order of names; `-` is standard input.

    Raises InputError for a file that is not there or is a folder, and for a glob that finds nothing.
    """
    files: list[str] = []
    for name in names:
        is_glob = name != STDIN and glob.has_magic(name) and not os.path.lexists(name)
        found = sorted(glob.glob(name, recursive=True)) if is_glob else [name]
        if not found:
            raise InputError(f"{name}: no such files")
        for file in found:
            if os.path.isdir(file):
                raise InputError(f"{file}: a folder; give the score files in it, as {os.path.join(file, '*.jsonl')}")
            if file != STDIN and not os.path.exists(file):
                raise InputError(f"{file}: no such file")
        files += found
    return files


def read_results(files: Sequence[str], note: Note = lambda _: None) -> Iterator[Result]:
    """Results of all files (JSON lines, .parquet, `-`), in order, one at a time.

    note : is told of a file whose last line is torn, as it is while a run goes on; that line is left out

    Raises InputError for a file that cannot be read, any other line that is no JSON object, and a row with neither
    four finite scores and its seconds nor an error.
    """
    for name in files:
        for place, row in output_rows(name, note):
            yield _result(place, row)


def output_rows(name: str, note: Note | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a file stands, and the row without its long lists, whatever is in it; as `read_results`.

    A last line that is torn is an error where nobody is told of it, and where it is the only one.
    """
    if name.lower().endswith(PARQUET_SUFFIX):
        from aesanet.runtime.rows.parquet import read_parquet

        for number, row in enumerate(read_parquet(name, leave_out=LONG_KEYS), start=1):
            yield f"{name}: row {number}", {key: value for key, value in row.items() if value is not None}
    elif name == STDIN:
        yield from _json_rows("standard input", sys.stdin.buffer, note)
    else:
        try:
            with open(name, "rb") as file:
                yield from _json_rows(name, file, note)
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}") from None


def _json_rows(name: str, file: BinaryIO, note: Note | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        text = os.fsdecode(line.removeprefix(BYTE_ORDER_MARK))
        if not text.strip():
            continue
        place = f"{name}: line {number}"
        try:
            row = parse_json(text)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and number > 1 and note is not None:
                note(f"{place}, the last, is torn and left out; is a run still writing it?")
                return
            raise InputError(f"{place}: not a JSON object: {error}; give what `aesanet score` wrote") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{place}: a JSON {type(row).__name__}; it must be an object, as `aesanet score` writes it"
            )
        for key in LONG_KEYS:
            row.pop(key, None)
        yield place, row


def _result(place: str, row: dict[str, Any]) -> Result:
    if "error" in row:
        error = row["error"]
        if not (isinstance(error, dict) and isinstance(error.get("code"), str)):
            raise InputError(f"{place}: error is {error!r}; it must be an object with a `code`")
        return Result(row, (), 0.0, error["code"])
    scores = tuple(_number(place, row, axis) for axis in AXES)
    seconds = _number(place, row, "seconds")
    if seconds < 0:
        raise InputError(f"{place}: seconds is {seconds}; it must be 0 or more")
    return Result(row, scores, seconds)


def _number(place: str, row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    raise InputError(f"{place}: {key} is {value!r}; it must be a number, or the row have an `error`")
