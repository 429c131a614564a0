"""Parquet: manifests and scores read as rows, and the JSON lines of a run written as columns."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.files import replacing
from aesanet.runtime.rows.row import OUTPUT_KEYS, Row

try:
    import pyarrow as pa
    from pyarrow import parquet as pq
except ModuleNotFoundError:
    raise InputError("Parquet needs pyarrow, which is not installed: pip install 'aesanet[parquet]'") from None

_READ_ROWS = 1000  # at a time: rows may hold long texts
_WRITE_ROWS = 1000
_GROUP_ROWS, _GROUP_BYTES = 2**16, 2**26  # of a row group, whichever is reached first
_EXACT_INTEGER = 2**53  # up to which a float64 holds every integer

_JSON: Final = pa.json_(pa.string())
_NUMBER: Final = pa.float64()
_OUTPUT_TYPES: Final = {
    **dict.fromkeys((*AXES, "start_seconds", "end_seconds", "seconds"), _NUMBER),
    "sample_rate": pa.int32(),
    "channels": pa.int32(),
    "truncated": pa.bool_(),
    "header_seconds": _NUMBER,
    "silence": pa.string(),
    "windows": pa.list_(pa.struct([(key, _NUMBER) for key in ("start_seconds", "end_seconds", *AXES)])),
    "embedding": pa.list_(pa.float32()),
    "error": pa.struct([("code", pa.string()), ("message", pa.string())]),
}
# Types of a row's own keys by the kinds of their values; any other mixture is JSON text.
_OWN_TYPES: Final = {
    frozenset(): pa.string(),
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({"long"}): pa.int64(),
    frozenset({"int", "long"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
    frozenset({"str"}): pa.string(),
}


def parquet_rows(name: str) -> Iterator[Row]:
    """Rows of a Parquet manifest, which must have a `path`; see `read_parquet` for its values.

    Raises InputError, as `read_parquet` does.
    """
    with _parquet_file(name) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        as_text = any(leaf.path == "path" and not _is_binary(leaf) for leaf in _leaves(file))
    if not as_text:
        raise InputError(f"{name}: its columns are {columns}; it must have a `path` of strings")
    for given in read_parquet(name):
        yield Row(given)


def count_parquet_rows(name: str) -> int:
    """How many rows a Parquet file says that it has; raises InputError."""
    with _parquet_file(name) as file:
        return int(file.metadata.num_rows)


def read_parquet(name: str, leave_out: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a batch at a time, with values that JSON can hold.

    leave_out : columns of lists that are not read

    NaN and infinities become None; dates, times and decimals text; JSON columns what they say. Binary columns, and
    binary fields of nested ones, are not read. Raises InputError for what is no Parquet file, for a damaged one and
    for a column that is there twice.
    """
    with _parquet_file(name) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise InputError(f"{name}: its columns are {names}; no name may be there twice")
        wanted = [leaf.path for leaf in _leaves(file) if not (_is_binary(leaf) or _is_of(leaf.path, leave_out))]
        try:
            for batch in file.iter_batches(_READ_ROWS, columns=wanted):
                columns = [_values(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, values, strict=True))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(f"{name}: a damaged Parquet file, or one that cannot be read here: {error}") from None


def write_parquet(jsonl_path: str | Path, parquet_path: str | Path) -> None:
    """Turn the JSON lines of a finished run into a Parquet file with the same rows, in order.

    What scoring wrote has columns of fixed types, always all of them, so that files of several runs fit together. A
    row's own key is bool, int64, float64 or string where all its values are, and else JSON text (Parquet's logical
    type JSON), as is a key whose strings UTF-8 cannot hold, such as paths with other bytes. A key that a row lacks is
    null, and so is one that is null.

    The lines are read twice and never held; the file is written beside and renamed. Raises InputError for a line that
    is no such row, and OSError.
    """
    schema = _schema(jsonl_path)
    with (
        replacing(Path(parquet_path)) as beside,
        open(beside, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        group: list[pa.RecordBatch] = []
        for batch in _batches(jsonl_path, schema):
            group.append(batch)
            if sum(map(len, group)) >= _GROUP_ROWS or sum(part.nbytes for part in group) >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))


@contextmanager
def _parquet_file(name: str) -> Iterator[pq.ParquetFile]:
    try:
        source = open(name, "rb")  # noqa: SIM115  (by Python, as Arrow takes no name that is not UTF-8)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    with source:
        try:
            file = pq.ParquetFile(source)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: not a Parquet file: {error}") from None
        yield file


def _leaves(file: pq.ParquetFile) -> Iterator[Any]:
    """Columns as they are stored: those within nested ones, each with its path and type."""
    return (file.schema.column(i) for i in range(len(file.schema)))


def _is_binary(leaf: Any) -> bool:
    return leaf.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and leaf.logical_type.type == "NONE"


def _is_of(path: str, columns: Collection[str]) -> bool:
    """Is the leaf within one of these columns of lists?"""
    return any(path.startswith(f"{column}.list.") for column in columns)


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)  # Python's own has no finer ones
    values: list[Any] = column.to_pylist()
    if column.type == _JSON:
        return [None if value is None else json.loads(value) for value in values]
    if pa.types.is_string(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return values
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # a map comes as pairs
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _lines(jsonl_path: str | Path) -> Iterator[dict[str, Any]]:
    with open(jsonl_path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(os.fsdecode(line))
            except ValueError as error:
                raise InputError(f"{jsonl_path}: line {number}: not a JSON object: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{jsonl_path}: line {number}: a JSON {type(row).__name__}; it must be an object")
            yield row


def _schema(jsonl_path: str | Path) -> pa.Schema:
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in _lines(jsonl_path):
        for key, value in row.items():
            if key not in OUTPUT_KEYS:
                found = kinds[utf8(key)]
                if value is not None:
                    found.add(_kind(value))
    own = {key: _OWN_TYPES.get(frozenset(found), _JSON) for key, found in kinds.items()}
    return pa.schema([*own.items(), *_OUTPUT_TYPES.items()])


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "str" if utf8(value) == value else "other"
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= _EXACT_INTEGER:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "other"
    return type(value).__name__ if isinstance(value, bool | float) else "other"


def _batches(jsonl_path: str | Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    as_json = {field.name for field in schema if field.type == _JSON}
    rows = (_cells(row, as_json) for row in _lines(jsonl_path))
    try:
        while some := list(islice(rows, _WRITE_ROWS)):
            yield pa.RecordBatch.from_pylist(some, schema)
    except pa.ArrowException as error:
        raise InputError(f"{jsonl_path}: a row that `aesanet score` did not write: {error}") from None


def _cells(row: dict[str, Any], as_json: set[str]) -> dict[str, Any]:
    cells = {utf8(key): value for key, value in row.items()}
    return {
        key: json.dumps(value) if key in as_json and value is not None else _told(value) for key, value in cells.items()
    }


def _told(value: Any) -> Any:
    """A value whose texts UTF-8 can hold: scoring's own messages may name a file that it cannot."""
    if isinstance(value, dict):
        return {key: _told(item) for key, item in value.items()}
    return utf8(value) if isinstance(value, str) else value


def utf8(text: str) -> str:
    """Text that UTF-8 can hold: what it cannot, as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
