"""Where output rows go: JSON lines or a table on stdout, or a file that a run can be resumed in."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.files import check_output
from aesanet.runtime.rows.inputs import PARQUET_SUFFIX
from aesanet.runtime.rows.output import RowFile, State, Tally, read_state
from aesanet.runtime.rows.results import LONG_KEYS
from aesanet.runtime.rows.row import Row, own_keys, row_line, write_row
from aesanet.words import printable

_NAME_WIDTH = 48


class Sink(Protocol):
    """What takes the rows of a run."""

    tally: Tally
    finished: bool
    marked_rows: int
    """After how many rows a run that is resumed goes on."""

    def begin(self) -> None:
        """Start anew."""

    def resume(self, rows: Iterator[Row], ordered: bool) -> bool:
        """As `RowFile.resume`."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take a row."""

    def mark(self) -> None:
        """As `RowFile.mark`."""

    def finish(self) -> None:
        """The run has come to its end."""

    def close(self) -> None:
        """Give back what is held."""


class Stdout:
    """Rows for a pipe, or a table for people; there is nothing to go on with."""

    def __init__(self, table: bool) -> None:
        self.tally, self.finished, self.marked_rows = Tally(), False, 0
        self._write = _write_line if table else write_row
        self._table = table

    def begin(self) -> None:
        """As `Sink.begin`."""
        if self._table:
            sys.stdout.write(f"{'clip':{_NAME_WIDTH}}" + "".join(f"{axis:>7}" for axis in AXES) + f"{'seconds':>10}\n")
            sys.stdout.flush()

    def resume(self, rows: Iterator[Row], ordered: bool) -> bool:
        """Nothing ever is."""
        self.begin()
        return False

    def write(self, row: Mapping[str, Any]) -> None:
        """As `Sink.write`."""
        self._write(sys.stdout, row)
        self.tally.add(row)

    def mark(self) -> None:
        """As `Sink.mark`."""

    def finish(self) -> None:
        """As `Sink.finish`."""

    def close(self) -> None:
        """As `Sink.close`."""


class ParquetFile(RowFile):
    """JSON lines while the run goes on, which become a Parquet file at its end."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        from aesanet.runtime.rows import parquet  # which may not be installed: now, and not after the night

        self._parquet = parquet
        super().__init__(path.with_name(path.name + ".partial.jsonl"), run, name=path)

    def finish(self) -> None:
        """As `RowFile.finish`."""
        if not self.finished:
            self._parquet.write_parquet(self.path, self.name)
            super().finish()
            self.finished = True

    def close(self) -> None:
        """As `RowFile.close`."""
        if self.finished:
            self.path.unlink(missing_ok=True)
        super().close()

    def _done(self, state: State) -> Iterator[Mapping[str, Any]]:
        if not state.finished:
            yield from super()._done(state)
            return
        if not self.name.exists():
            raise InputError(f"{self.name}: was finished, and is gone; give --overwrite to start anew")
        for row in self._parquet.read_parquet(str(self.name), leave_out=LONG_KEYS):
            yield {key: value for key, value in row.items() if value is not None}

    def _cut(self, num_bytes: int) -> None:
        if not self.finished:
            super()._cut(num_bytes)

    def _comparable(self, row: Mapping[str, Any]) -> str:
        """As `RowFile._comparable`; of what comes from columns null is nothing, and one number like another."""
        if not self.finished:
            return super()._comparable(row)
        own = {self._parquet.utf8(key): value for key, value in own_keys(row).items() if value is not None}
        return row_line({key: _number(own[key]) for key in sorted(own)})


def open_sink(out: Path | None, layout: str, run: Mapping[str, Any]) -> Sink:
    """The sink of a run; raises InputError or OSError."""
    if out is None:
        return Stdout(table=layout == "table" or (layout == "auto" and sys.stdout.isatty()))
    try:
        return (ParquetFile if out.suffix.lower() == PARQUET_SUFFIX else RowFile)(out, run)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None


def check_out(out: Path | None, overwrite: bool, resume: bool, inputs: tuple[str, ...]) -> None:
    """See that nothing is replaced by chance; raises InputError."""
    if out is None:
        if overwrite or resume:
            raise InputError(f"--{'resume' if resume else 'overwrite'} is of a file: name one with --out")
        return
    if resume and overwrite:
        raise InputError("--resume and --overwrite: give one of them")
    if not out.name:
        raise InputError(f"{out}: no name of a file; give --out one, such as scores.jsonl")
    if out.suffix.lower() in (".csv", ".tsv"):
        raise InputError(f"{out}: rows are written as JSON lines, or as .parquet; give --out such a name")
    check_output(out, inputs)
    if overwrite or resume:
        return
    state = read_state(out)
    if state is not None and not state.finished:
        raise InputError(f"{out}: an unfinished run is there; give --resume to go on, or --overwrite to start anew")
    if out.exists():
        raise InputError(f"{out}: exists; give --overwrite to replace it, or another name")


def _number(value: Any) -> Any:
    """An integer as the float that a column has in its place where others of it are; anything else as it is."""
    return float(value) if type(value) is int and abs(value) <= 2**53 else value


def _write_line(file: TextIO, row: Mapping[str, Any]) -> None:
    """One line for people; a long path keeps its end."""
    name = str(row.get("path", row.get("line", "")))
    name = f"{name}/{row['member']}" if "member" in row else name
    name = printable(name).encode(file.encoding, "backslashreplace").decode(file.encoding)
    name = name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]
    if "error" in row:
        what = f"  {row['error']['code']}: {row['error']['message']}"
    else:
        what = "".join(f"{row[axis]:7.3f}" for axis in AXES) + f"{row['seconds']:10.2f}"
        if row["truncated"]:
            what += f"  truncated: the header says {row['header_seconds']:.2f} s"
        if "silence" in row:
            what += f"  {row['silence']} silence"
    file.write(f"{name:{_NAME_WIDTH}}{what}\n")
    file.flush()
