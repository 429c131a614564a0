"""The file that a run writes, and how a run that was killed goes on: exactly where it can, from the same rows.

Beside the rows lies a small state file: what the run is, and how far it was when its last group of rows was whole. On
resuming, what was written after that is cut off and made again. The rows before it must be those of the input.
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
from aesanet.runtime.rows import Row, own_keys, row_line

try:
    import fcntl
except ImportError:  # Windows: two runs into one file are not noticed there
    fcntl = None  # type: ignore[assignment]

_FORMAT: Final = 1


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a run that may go on: `rows` rows in the first `bytes` bytes are whole, and nothing after depends on them."""

    format: int
    run: dict[str, Any]
    rows: int
    bytes: int


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

    path : of the rows; the state is beside it, as `path` + ".state"
    run  : what the run is, as plain JSON values: a run goes on only where they are the same

    Raises InputError where another run is writing, and OSError.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self.state_path = path, state_of(path)
        self.tally = Tally()
        self._run = json.loads(json.dumps(run))
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115  # held until `close`
        self._keeps_state = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)  # a pipe or a device has none
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise InputError(f"{path}: another run is writing it") from None
            except OSError:  # a file system without locks
                pass

    def begin(self) -> None:
        """Start anew: what was in the file is gone."""
        self._cut(0)
        self.mark()

    def resume(self, rows: Iterator[Row], ordered: bool) -> bool:
        """Go on where an earlier run stopped, if one did; `rows` is then after those that are done. Was there one?

        Raises InputError where the run, its file or its input is another than it was, and names what differs.
        """
        state = self._state() if self._keeps_state else None
        if state is None:
            if not self._keeps_state or self._file.tell() == 0:
                self.begin()
                return False
            state = State(_FORMAT, self._run, _count_lines(self.path), self._file.tell())
            complete = " It has no state beside it, and so can only be what a finished run wrote."
        else:
            complete = ""
        for key in self._run.keys() | state.run.keys():
            before, now = state.run.get(key), self._run.get(key)
            if before != now:
                raise InputError(
                    f"{self.path}: was begun with {key} {json.dumps(before)}, and this is {json.dumps(now)}; "
                    "run as before to go on, or give --overwrite to start anew"
                )
        if self._file.tell() < state.bytes:
            raise InputError(
                f"{self.path}: has {self._file.tell()} bytes; it had {state.bytes} when the run stopped; "
                "give --overwrite to start anew"
            )
        self._compare(rows, state, ordered, complete)
        if complete and next(rows, None) is not None:
            raise InputError(
                f"{self.path}: the input has more than its {state.rows} rows.{complete} Give --overwrite to start anew"
            )
        self._cut(state.bytes)
        return True

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; raises OSError where the disk is full."""
        line = memoryview(row_line(row).encode())
        while line:
            line = line[self._file.write(line) :]
        self.tally.add(row)

    def mark(self) -> None:
        """All rows so far are whole, and nothing that comes depends on them."""
        if not self._keeps_state:
            return
        os.fsync(self._file)  # so that the state never tells of rows that a power cut took
        state = State(_FORMAT, self._run, self.tally.rows, self._file.tell())
        beside = self.state_path.with_name(self.state_path.name + ".new")
        beside.write_bytes(msgspec.json.encode(state))
        os.replace(beside, self.state_path)

    def finish(self) -> None:
        """The run has come to its end: nothing is to be gone on with."""
        if self._keeps_state:
            self.state_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _cut(self, num_bytes: int) -> None:
        if self._keeps_state and self._file.tell() != num_bytes:
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)

    def _state(self) -> State | None:
        try:
            state = msgspec.json.decode(self.state_path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise InputError(f"{self.state_path}: {error}; give --overwrite to start anew") from None
        if state.format != _FORMAT:
            raise InputError(f"{self.state_path}: of another version; give --overwrite to start anew")
        return state

    def _compare(self, rows: Iterator[Row], state: State, ordered: bool, complete: str) -> None:
        """See that the rows that are done are the input's first; counts them."""
        balance = 0
        with open(self.path, "rb") as file:
            for number in range(1, state.rows + 1):
                try:
                    self.tally.add(found := msgspec.convert(json.loads(file.readline()), dict[str, Any]))
                except ValueError as error:
                    raise InputError(
                        f"{self.path}: row {number} is no row ({error}); give --overwrite to start anew"
                    ) from None
                row = next(rows, None)
                if row is None:
                    raise InputError(
                        f"{self.path}: has {state.rows} rows, and the input only {number - 1}.{complete} Give the "
                        "input as it was, or --overwrite to start anew"
                    )
                done, asked = row_line(own_keys(found)), row_line(own_keys(row.given))
                if ordered and done != asked:
                    raise InputError(
                        f"{self.path}: row {number} is of {done.strip()}, and the input has {asked.strip()}.{complete} "
                        "Give the input as it was, or --overwrite to start anew"
                    )
                balance += _digest(asked) - _digest(done)
        if balance:
            raise InputError(
                f"{self.path}: its {state.rows} rows are not the first of the input.{complete} Give the input as it "
                "was, or --overwrite to start anew"
            )


def state_of(path: Path) -> Path:
    """Where the state of an unfinished run lies."""
    return path.with_name(path.name + ".state")


def _digest(line: str) -> int:
    """For rows whose order is not that of the input: sums of these are the same for the same rows."""
    return int.from_bytes(blake2b(line.encode(), digest_size=16).digest(), "little")


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
