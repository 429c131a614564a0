"""The file that a run writes, and how a run that was killed goes on: exactly where it can, from the same rows.

Beside the rows lies a small state file: what the run is, and how far it was when its last group of rows was whole. On
resuming, what was written after that is cut off and made again. The rows before it must be those of the input. Once the
run has come to its end the state stays, and says so: the same command once more has nothing to do, and another is told.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from aesanet.errors import InputError
from aesanet.files import lock, replacing
from aesanet.runtime.rows.row import Row, own_keys, row_line

_FORMAT: Final = 1


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a run: `rows` rows in the first `bytes` bytes are whole, and nothing after depends on them."""

    format: int
    run: dict[str, Any]
    rows: int
    bytes: int
    finished: bool = False


@dataclass
class Tally:
    """What the rows of a file are."""

    rows: int = 0
    failed: int = 0
    seconds: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one output row."""
        self.rows += 1
        self.failed += "error" in row
        self.seconds += row.get("seconds", 0.0)


class RowFile:
    """JSON lines, each written at once and whole but for a kill or a full disk; one run at a time.

    path : of the rows
    run  : what the run is, as plain JSON values: a run goes on only where they are the same
    name : of the output, where the rows are only on their way to it; the state lies beside this

    Raises InputError where another run is writing, and OSError.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], name: Path | None = None) -> None:
        self.path, self.name = path, name or path
        self.tally = Tally()
        self.finished = False
        """Had the run that is gone on with come to its end?"""
        self.marked_rows = 0
        """After how many rows a run that is resumed goes on."""
        self._run = json.loads(json.dumps(run))
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115  # held until `close`
        self._keeps_state = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)  # a pipe or a device has none
        lock(self._file.fileno(), self._busy)

    def _busy(self) -> None:
        self._file.close()
        raise InputError(f"{self.name}: another run is writing it") from None

    def begin(self) -> None:
        """Start anew: what was in the file is gone."""
        self._write_state(State(_FORMAT, self._run, 0, 0))  # before the cut: a kill between is one to go on from
        self._cut(0)

    def resume(self, rows: Iterator[Row], ordered: bool) -> bool:
        """Go on where an earlier run stopped, if one did; `rows` is then after those that are done. Was there one?

        Raises InputError where the run, its file or its input is another than it was, and names what differs.
        """
        # An empty file may be all that a run had come to, whatever state lies there of one before it.
        if not self._keeps_state or (self._file.tell() == 0 and (self.path == self.name or not self.name.exists())):
            self.begin()
            return False
        if (state := read_state(self.name)) is None:
            raise InputError(
                f"{self.name}: has no {state_of(self.name).name} beside it, which says what made it; "
                "give --overwrite to start anew"
            )
        for key in self._run.keys() | state.run.keys():
            before, now = state.run.get(key), self._run.get(key)
            if before != now:
                raise InputError(
                    f"{self.name}: was begun with {key} {json.dumps(before)}, and this is {json.dumps(now)}; "
                    "run as before to go on, or give --overwrite to start anew"
                )
        self.finished = state.finished
        self._compare(rows, state, ordered)
        if self.finished and next(rows, None) is not None:
            raise InputError(
                f"{self.name}: is finished with {state.rows} rows, and the input has more; score those on their own, "
                "or give --overwrite to start anew"
            )
        self._cut(state.bytes)
        self.marked_rows = state.rows
        return True

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; raises OSError where the disk is full."""
        line = memoryview(row_line(row).encode())
        while line:
            line = line[self._file.write(line) :]
        self.tally.add(row)

    def mark(self) -> None:
        """All rows so far are whole, and nothing that comes depends on them."""
        self.marked_rows = self.tally.rows
        if self._keeps_state:
            os.fsync(self._file)  # so that the state never tells of rows that a power cut took
            self._write_state(State(_FORMAT, self._run, self.tally.rows, self._file.tell()))

    def finish(self) -> None:
        """The run has come to its end."""
        if self._keeps_state and not self.finished:
            os.fsync(self._file)
            self._write_state(State(_FORMAT, self._run, self.tally.rows, self._file.tell(), finished=True))

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _done(self, state: State) -> Iterator[Mapping[str, Any]]:
        """The rows that are whole; raises InputError."""
        if self._file.tell() < state.bytes:
            raise InputError(
                f"{self.name}: has {self._file.tell()} bytes; it had {state.bytes} when the run stopped; "
                "give --overwrite to start anew"
            )
        with open(self.path, "rb") as file:
            for number in range(1, state.rows + 1):
                try:
                    yield msgspec.convert(json.loads(file.readline()), dict[str, Any])
                except ValueError as error:
                    raise InputError(
                        f"{self.name}: row {number} is no row ({error}); give --overwrite to start anew"
                    ) from None

    def _cut(self, num_bytes: int) -> None:
        if self._keeps_state and self._file.tell() != num_bytes:
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)

    def _write_state(self, state: State) -> None:
        if self._keeps_state:
            with replacing(state_of(self.name)) as beside:
                beside.write_bytes(msgspec.json.encode(state))

    def _compare(self, rows: Iterator[Row], state: State, ordered: bool) -> None:
        """See that the rows that are done are the input's first; counts them."""
        balance = 0
        for number, found in enumerate(self._done(state), start=1):
            self.tally.add(found)
            row = next(rows, None)
            if row is None:
                raise InputError(
                    f"{self.name}: has {state.rows} rows, and the input only {number - 1}; give the input as it was, "
                    "or --overwrite to start anew"
                )
            done, asked = self._comparable(found), self._comparable(row.given)
            if ordered and done != asked:
                raise InputError(
                    f"{self.name}: row {number} is of {done.strip()}, and the input has {asked.strip()}; give the "
                    "input as it was, or --overwrite to start anew"
                )
            balance += _digest(asked) - _digest(done)
        if balance:
            raise InputError(
                f"{self.name}: its {state.rows} rows are not the first of the input; give the input as it was, or "
                "--overwrite to start anew"
            )

    def _comparable(self, row: Mapping[str, Any]) -> str:
        """What of a row must be the same in the input and in the output."""
        return row_line(own_keys(row))


def read_state(name: Path) -> State | None:
    """The state beside an output, or None where there is none; raises InputError where it is damaged."""
    path = state_of(name)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: {error}; give --overwrite to start anew") from None
    if state.format != _FORMAT:
        raise InputError(f"{path}: of another version; give --overwrite to start anew")
    return state


def state_of(name: Path) -> Path:
    """Where the state of a run lies that writes a file of this name."""
    return name.with_name(name.name + ".state")


def _digest(line: str) -> int:
    """For rows whose order is not that of the input: sums of these are the same for the same rows."""
    return int.from_bytes(blake2b(line.encode(), digest_size=16).digest(), "little")
