"""Rows in and rows out: files, folders, globs and manifests become rows; rows become JSON lines."""

import csv
import glob
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from aesanet.axes import AXES
from aesanet.errors import ClipError, InputError

MANIFEST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")

# What a folder is searched for; other files in it are not audio. A file named outright is opened whatever its name.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64"
    " .m4a .mp4 .aac .wma .webm .amr .gsm".split()
)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # that some programs put before UTF-8
MAX_SECONDS = 1e9  # 31 years: past it, times of a sample are no longer exact

OUTPUT_KEYS = (*AXES, "seconds", "truncated", "error")
"""Keys that scoring writes; an input row's own values under these names are replaced."""


@dataclass(frozen=True)
class Row:
    """One input row: the keys that it came with, or what was wrong with it."""

    given: Mapping[str, Any]
    error: ClipError | None = None

    def clip(self) -> "Clip":
        """The clip that the row asks for; raises ClipError."""
        if self.error is not None:
            raise self.error
        path = file_name(self.given.get("path"))
        start, end = (_seconds(name, self.given.get(name)) for name in ("start_time", "end_time"))
        if end is not None and end <= (start or 0.0):
            raise ClipError("bad_segment", f"end_time is {end} s; it must be after start_time, {start or 0.0} s")
        return Clip(path, start, end)


@dataclass(frozen=True)
class Clip:
    """A file, or the part of it from `start_seconds` to `end_seconds`."""

    path: str
    start_seconds: float | None = None
    end_seconds: float | None = None


def file_name(path: Any) -> str:
    """A path that the system can look up, as str; raises ClipError."""
    try:
        name = os.fsdecode(os.fspath(path))
        if name and "\0" not in name and os.fsencode(name):
            return name
    except (TypeError, UnicodeError):
        pass
    raise ClipError("bad_row", f"path is {path!r}; it must be the name of a file")


def read_rows(inputs: Sequence[str]) -> Iterator[Row]:
    """Rows of all inputs, in order.

    An input is an audio file, a folder (searched recursively, in the order of names), a glob, a manifest
    (.jsonl, .csv, .tsv) or `-`: JSON lines or plain paths from standard input. A file that does not exist is a row,
    whose clip then has the error, and so is a folder that cannot be read; a manifest that cannot raises InputError.
    """
    for name in inputs:
        if name == "-":
            yield from _lines(sys.stdin.buffer)
        elif os.path.isdir(name):
            yield from _folder(name)
        elif name.lower().endswith(MANIFEST_SUFFIXES):
            yield from _manifest(name)
        elif glob.has_magic(name) and not os.path.lexists(name):
            for path in sorted(glob.glob(name, recursive=True)) or [name]:
                if os.path.isdir(path):
                    yield from _folder(path)
                else:
                    yield Row({"path": path})
        else:
            yield Row({"path": name})


def count_rows(inputs: Sequence[str]) -> int | None:
    """How many rows `read_rows` will give, or None where that cannot be known beforehand."""
    return None if "-" in inputs else sum(1 for _ in read_rows(inputs))


def failed_row(row: Row, error: ClipError) -> dict[str, Any]:
    """The output row of a clip that could not be scored."""
    return {**_own(row.given), "error": {"code": error.code, "message": error.message}}


def scored_row(row: Row, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The output row of a scored clip: the row's own keys, then what was measured."""
    return {**_own(row.given), **scores}


def write_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """One JSON line, flushed."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        file.write(text + "\n")
    except UnicodeEncodeError:
        # A path that is not UTF-8, or a terminal that is not: as escapes, which read back the same.
        file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _own(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in OUTPUT_KEYS}


def _seconds(name: str, value: Any) -> float | None:
    """A time of a row: a number, or a string of one as CSV has them; missing, null and empty are None."""
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise ClipError("bad_segment", f"{name} is {value!r}; it must be a number of seconds from 0 to {MAX_SECONDS:g}")
    return seconds


def _folder(folder: str) -> Iterator[Row]:
    """Rows of a folder's audio files; a folder in it that cannot be read is a row too, with its error."""
    unread: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unread.append):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                yield Row({"path": os.path.join(parent, name)})
    for error in unread:
        yield Row({"path": error.filename}, ClipError("not_readable", f"a folder: {error.strerror}"))


def _manifest(name: str) -> Iterator[Row]:
    try:
        with open(name, "rb") as file:
            if name.lower().endswith((".csv", ".tsv")):
                yield from _table(name, file, "\t" if name.lower().endswith(".tsv") else ",")
            else:
                yield from _lines(file)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _lines(file: BinaryIO) -> Iterator[Row]:
    """JSON objects or plain paths, one a line; empty lines are no rows."""
    for line in file:
        text = os.fsdecode(line.removeprefix(BYTE_ORDER_MARK)).strip("\r\n")
        if text.strip():
            yield _json_row(text) if text.lstrip().startswith(("{", "[")) else Row({"path": text})


def _json_row(text: str) -> Row:
    try:
        given = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        return Row({"line": text}, ClipError("bad_row", f"not a JSON object: {error}"))
    if not isinstance(given, dict):
        return Row({"line": text}, ClipError("bad_row", f"a JSON {type(given).__name__}; it must be an object"))
    return Row(given)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a number that JSON can hold")
    return number


def _table(name: str, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    file.seek(len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0)
    text: Iterable[str] = (os.fsdecode(line) for line in file)
    table = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        if "path" not in header or len(set(header)) < len(header):
            raise InputError(f"{name}: its columns are {header}; it must have a `path`, and no name twice")
        for fields in table:
            if not fields:
                continue
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)))
            else:
                line = delimiter.join(fields)
                yield Row({"line": line}, ClipError("bad_row", f"{len(fields)} fields; the header has {len(header)}"))
    except csv.Error as error:
        raise InputError(f"{name}: line {table.line_num}: {error}") from None
