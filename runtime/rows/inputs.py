"""Inputs become rows: files, tars, folders, globs, manifests and standard input."""

import csv
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from aesanet.errors import ClipError, InputError
from aesanet.runtime.rows.files import is_audio
from aesanet.runtime.rows.row import Row, is_tar, parse_json
from aesanet.runtime.rows.tar import COMPRESSED_TAR_SUFFIXES, tar_rows

MANIFEST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"

# An object or a list, and no name that begins with a bracket, as those of recordings may: [live] a.wav
_JSON = re.compile(r'\s*(\{|\[(\s*$|\s*[\[{"]|.*\]\s*$))', re.DOTALL)
_FIELD_CHARACTERS = 2**24  # a transcript, or JSON of many segments

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # that some programs put before UTF-8


def read_rows(inputs: Sequence[str]) -> Iterator[Row]:
    """Rows of all inputs, in order.

    An input is an audio file, a tar of them (.tar), a folder (searched recursively, in the order of names), a glob,
    a manifest (.jsonl, .csv, .tsv, .parquet) or `-`: JSON lines or plain paths from standard input. A file that does
    not exist is a row, whose clip then has the error, and so is a folder or tar that cannot be read; a manifest that
    cannot, and a compressed tar, raise InputError.
    """
    for name in inputs:
        if name == "-":
            yield from _lines(sys.stdin.buffer)
        elif os.path.isdir(name):
            yield from _folder(name)
        elif _is_parquet(name):
            from aesanet.runtime.rows.parquet import parquet_rows

            yield from parquet_rows(name)
        elif name.lower().endswith(MANIFEST_SUFFIXES):
            yield from _manifest(name)
        elif glob.has_magic(name) and not os.path.lexists(name):
            for path in sorted(glob.glob(name, recursive=True)) or [name]:
                yield from _folder(path) if os.path.isdir(path) else _file(path)
        else:
            yield from _file(name)


def count_rows(inputs: Sequence[str]) -> int | None:
    """How many rows `read_rows` will give, or None where that cannot be known beforehand."""
    return None if "-" in inputs else sum(map(_count, inputs))


def _count(name: str) -> int:
    if _is_parquet(name):
        from aesanet.runtime.rows.parquet import count_parquet_rows

        return count_parquet_rows(name)  # which it says of itself
    return sum(1 for _ in read_rows([name]))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET_SUFFIX) and not os.path.isdir(name)


def _file(path: str) -> Iterator[Row]:
    if path.lower().endswith(COMPRESSED_TAR_SUFFIXES):
        raise InputError(f"{path}: a compressed tar, whose members cannot be read where they lie; uncompress it first")
    yield from tar_rows(path) if is_tar(path) else [Row({"path": path})]


def _folder(folder: str) -> Iterator[Row]:
    """Rows of a folder's audio files; a folder in it that cannot be read is a row too, with its error."""
    unread: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unread.append, followlinks=True):
        folders[:] = sorted(name for name in folders if not _leads_back(folder, os.path.join(parent, name)))
        for name in sorted(files):
            if is_audio(name) or is_tar(name):
                yield from _file(os.path.join(parent, name))
    for error in unread:
        yield Row({"path": error.filename}, ClipError("not_readable", f"a folder: {error.strerror}"))


def _leads_back(folder: str, path: str) -> bool:
    """Is this, below a folder that is searched, a link to where the search has come through?"""
    if not os.path.islink(path):
        return False
    there = os.path.realpath(path).rstrip(os.sep) + os.sep
    while len(path) > len(folder.rstrip(os.sep)):
        path = os.path.dirname(path)
        if f"{os.path.realpath(path)}{os.sep}".startswith(there):
            return True
    return False


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
            yield _json_row(text) if _JSON.match(text) else Row({"path": text})


def _json_row(text: str) -> Row:
    try:
        given = parse_json(text)
    except (ValueError, RecursionError) as error:
        return Row({"line": text}, ClipError("bad_row", f"not a JSON object: {error}"))
    if not isinstance(given, dict):
        return Row({"line": text}, ClipError("bad_row", f"a JSON {type(given).__name__}; it must be an object"))
    return Row(given)


def _table(name: str, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    file.seek(len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0)
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))
    text: Iterable[str] = (os.fsdecode(line) for line in file)
    table = csv.reader(text, delimiter=delimiter, strict=True)
    records = map(_record, text) if delimiter == "\t" else table
    try:
        header = [column.strip() for column in next(records, [])]
        if "path" not in header or len(set(header)) < len(header):
            raise InputError(f"{name}: its columns are {header}; it must have a `path`, and no name twice")
        for fields in records:
            if not fields:
                continue
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)))
            else:
                line = delimiter.join(fields)
                yield Row({"line": line}, ClipError("bad_row", f"{len(fields)} fields; the header has {len(header)}"))
    except csv.Error as error:
        raise InputError(f"{name}: line {table.line_num}: {error}") from None


def _record(line: str) -> list[str]:
    """A line of a TSV; one whose quotes are none of a spreadsheet's is taken as it is."""
    try:
        return next(csv.reader([line], delimiter="\t", strict=True), [])
    except csv.Error:
        return line.rstrip("\r\n").split("\t")
