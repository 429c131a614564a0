"""Tables and plots of what `aesanet bench` measured, made from the CSV files alone.

A document says where a table stands: between a comment that names a CSV beside it and one that ends it. Such tables are
written by `update`, and a test sees to it that they are those of the files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from aesanet.benchmarks.records import measured_on, read_rows_of
from aesanet.errors import InputError

Row: TypeAlias = Mapping[str, str]

_BLOCK: Final = re.compile(r"(<!-- table of (?P<csv>[^ ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(path: Path, link: str | None = None) -> str:
    """A CSV as a Markdown table, with a line that says where it was measured, and perhaps a link to the file.

    Raises InputError for a CSV of another kind.
    """
    rows = read_rows_of(path)
    for columns, make in _KINDS.items():
        if columns <= rows[0].keys():
            with cells_of(path):
                header, cells = make(rows)
            lines = [header, ["---"] * len(header), *cells]
            return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (
                f"\n{_where(rows)}{f' [CSV]({link})' if link else ''}\n"
            )
    raise InputError(f"{path}: its columns are {', '.join(rows[0])}; that is no file of `aesanet bench`")


@contextmanager
def cells_of(path: Path) -> Iterator[None]:
    """One InputError of a cell of a CSV that is not the number that it should be, or is not there."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path}: a cell is not as `aesanet bench` writes it: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: has nothing for {error}; is a row missing?") from None


def update(document: Path) -> bool:
    """Write a document's tables anew; did anything change? Raises InputError."""
    try:
        before = document.read_text(encoding="utf-8")
        after = _BLOCK.sub(
            lambda block: f"{block[1]}\n{table(document.parent / block['csv'], block['csv'])}\n{block[3]}", before
        )
        if after != before:
            document.write_text(after, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{document}: {getattr(error, 'strerror', None) or error}") from None
    return after != before


def _where(rows: Sequence[Row]) -> str:
    """The machines of a table, and what its weights are."""
    machines = dict.fromkeys(f"{measured_on(row)}, {row.get('cores') or row.get('threads')} cores" for row in rows)
    weights = dict.fromkeys(row["weights"] for row in rows)
    dates = sorted({row["date"][:10] for row in rows})
    return f"{'; '.join(machines)}; {' and '.join(weights)} weights; {' and '.join(dates)}."


Table: TypeAlias = tuple[list[str], list[list[str]]]


def _cold(rows: Sequence[Row]) -> Table:
    names = ("import_milliseconds", "open_milliseconds", "first_score_milliseconds")
    cells = [[row["engine"], *(three_digits(row[name]) for name in names)] for row in rows]
    return ["engine", "import, ms", "open, ms", "first score, ms"], cells


def _latency(rows: Sequence[Row]) -> Table:
    names = ("milliseconds_p50", "milliseconds_p90", "milliseconds_p99", "milliseconds_max", "x_real_time")
    cells = [
        [row["engine"], row["batch"], f"{float(row['clip_seconds']):g}", *(three_digits(row[name]) for name in names)]
        for row in rows
    ]
    return ["engine", "clips", "seconds", "p50, ms", "p90", "p99", "longest", "x real time"], cells


def _throughput(rows: Sequence[Row]) -> Table:
    names = ("clips_per_second", "x_real_time", "useful_tflops")
    cells = [
        [
            row["engine"],
            row["batch"],
            f"{float(row['clip_seconds']):g}",
            *(three_digits(row[name]) for name in names),
            three_digits(row["peak_tflops"]) if row["peak_tflops"] else "",
            f"{float(row['mfu']):.1%}" if row["mfu"] else "",
        ]
        for row in rows
    ]
    return ["engine", "clips", "seconds", "clips/s", "x real time", "useful TFLOP/s", "peak", "share of peak"], cells


def _end_to_end(rows: Sequence[Row]) -> Table:
    cells = [
        [
            row["engine"],
            f"{row['clips']}, {three_digits(row['audio_seconds'])} s",
            *(three_digits(row[f"{part}_seconds"]) for part in ("decoding", "engine", "end_to_end")),
            f"{float(row['share_of_slower']):.1%}",
            three_digits(row["x_real_time"]),
            f"{float(row['padding']):.1%}",
        ]
        for row in rows
    ]
    parts = ["decoding alone, s", "engine alone, s", "files to rows, s"]
    return ["engine", "clips", *parts, "of the slower alone", "x real time", "padding"], cells


def _memory(rows: Sequence[Row]) -> Table:
    cells = [
        [row["case"], *(three_digits(row[name]) for name in ("seconds", "peak_memory_mib", "above_one_clip_mib"))]
        for row in rows
    ]
    return ["scored", "s", "peak memory, MiB", "above one clip, MiB"], cells


def _backends(rows: Sequence[Row]) -> Table:
    """An engine a line, a batch size two columns."""
    batches = dict.fromkeys(row["batch"] for row in rows)
    engines = dict.fromkeys(row["engine"] for row in rows)
    found = {(row["engine"], row["batch"]): row for row in rows}
    header = ["engine"]
    for batch in batches:
        header += [f"{batch} clip{'s' * (batch != '1')}, ms", "x PyTorch"]
    names = ("milliseconds_median", "x_pytorch")
    cells = [[engine, *(three_digits(found[engine, b][name]) for b in batches for name in names)] for engine in engines]
    return header, cells


def part_of(row: Row) -> str:
    """What contestants did, with the mean length of files, which need not be that of windows."""
    if row["part"] != "files":
        return row["part"]
    return f"files of {float(row['audio_seconds']) / int(row['clips']):.3g} s"


def _peers(rows: Sequence[Row]) -> Table:
    cells = [
        [
            f"{row['contestant']} {row['precision']}",
            part_of(row),
            row["batch"],
            f"{three_digits(row['seconds_median'])} for {three_digits(row['audio_seconds'])}",
            *(three_digits(row[name]) if row[name] else "" for name in ("x_real_time", "x_pytorch", "x_audiobox")),
        ]
        for row in rows
    ]
    names = ["contestant", "part", "batch", "s for s of audio", "x real time", "x PyTorch", "x audiobox-aesthetics"]
    return names, cells


_KINDS: Final[Mapping[frozenset[str], Callable[[Sequence[Row]], Table]]] = {
    frozenset({"import_milliseconds", "open_milliseconds", "first_score_milliseconds"}): _cold,
    frozenset({"milliseconds_p50", "milliseconds_p99", "batch", "clip_seconds"}): _latency,
    frozenset({"clips_per_second", "useful_tflops", "mfu"}): _throughput,
    frozenset({"share_of_slower", "end_to_end_seconds"}): _end_to_end,
    frozenset({"case", "peak_memory_mib"}): _memory,
    frozenset({"milliseconds_median", "x_pytorch"}): _backends,
    frozenset({"contestant", "x_audiobox"}): _peers,
}


def three_digits(text: str | float) -> str:
    """To three digits or more, with commas between thousands."""
    value = float(text)
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"
