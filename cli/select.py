"""`aesanet select`: the rows of score files that pass, as a manifest."""

import math
import os
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click

from aesanet.axes import AXES
from aesanet.cli.sinks import check_out
from aesanet.commands import note
from aesanet.errors import InputError

_SUFFIXES: Final = (".jsonl", ".ndjson", ".parquet")


def _limits(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """NAME=NUMBER, where the name is an axis or `seconds`."""
    from aesanet.runtime.rows.selection import LIMIT_NAMES

    limits = []
    for value in values:
        name, _, number = value.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if name not in LIMIT_NAMES or not math.isfinite(limit):
            raise click.BadParameter(f"{value!r}; it must be one of {', '.join(LIMIT_NAMES)}, = and a number: PQ=6.5")
        limits.append((name, limit))
    return tuple(limits)


def _rows_of(context: click.Context, option: click.Parameter, value: str | None) -> Callable[[int], int] | None:
    """A number of rows, or a share of them in percent, as a function of how many there are."""
    if value is None:
        return None
    try:
        number = Fraction(value.removesuffix("%"))  # exact: a tenth of 30 is 3
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if value.endswith("%") and 0 < number <= 100:
        return lambda rows: math.ceil(number * rows / 100)
    if not value.endswith("%") and number > 0 and number.denominator == 1:
        return lambda rows: min(rows, int(number))
    raise click.BadParameter(f"{value!r}; it must be a number of rows, as 500, or a share of them, as 10%")


@click.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path())
@click.option(
    "--min",
    "least",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=_limits,
    help="Keep rows from this on: PQ=6.5, seconds=1. May be given several times.",
)
@click.option(
    "--max",
    "most",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=_limits,
    help="Keep rows up to this: PC=4. May be given several times.",
)
@click.option("--no-truncated", is_flag=True, help="Leave out clips whose file ended before its header said.")
@click.option("--no-silent", is_flag=True, help="Leave out clips that are silent, or nearly.")
@click.option(
    "--top",
    metavar="ROWS|PERCENT%",
    callback=_rows_of,
    help="Keep only so many of what passes the rest: 500, or 10% (rounded up).",
)
@click.option("--by", type=click.Choice(AXES), help="The axis whose highest scores --top keeps.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this .jsonl or .parquet, not to stdout.")
@click.option("--overwrite", is_flag=True, help="Replace the --out file if it exists.")
def select(
    scores: tuple[str, ...],
    least: tuple[tuple[str, float], ...],
    most: tuple[tuple[str, float], ...],
    no_truncated: bool,
    no_silent: bool,
    top: Callable[[int], int] | None,
    by: str | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Keep the rows of SCORES that pass all conditions, as a manifest in the same order.

    SCORES are what `aesanet score` wrote, as JSON lines or .parquet: files, globs, or `-` for JSON lines on standard
    input. A kept row is as it was, scores and own keys, but for `windows` and `embedding`; `aesanet score` and
    audiobox-aesthetics read it. Rows with an error are never kept.

    --top comes last: of the rows that pass everything else, those with the highest scores; of equal ones, the earlier.
    The files are then read twice, with 8 bytes held for each row.

    Exit status: 0 the manifest is written (perhaps an empty one), 2 it could not be.
    """
    from aesanet.runtime.rows.results import score_files
    from aesanet.runtime.rows.selection import Conditions, Selection, Top

    if (top is None) != (by is None):
        raise InputError("--top and --by go together, as in: --top 10% --by PQ")
    files = score_files(scores)
    if out is not None and out.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{out}: a manifest is one of {', '.join(_SUFFIXES)}")
    check_out(out, overwrite, resume=False, inputs=tuple(files))
    conditions = Conditions(least, most, truncated=not no_truncated, silent=not no_silent)
    selection = Selection(files, conditions, Top(by, top) if top is not None and by is not None else None, note)
    try:
        _write(selection, out)
    except BrokenPipeError:
        # The reader of stdout has gone, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except OSError as error:
        raise InputError(f"{out or 'stdout'}: {error.strerror}") from None
    failed = f"; {selection.failed:,} have an error" if selection.failed else ""
    hours = f"{selection.kept_seconds / 3600:,.2f} of {selection.seconds / 3600:,.2f} h of audio"
    note(f"{selection.kept_rows:,} of {selection.rows:,} rows kept, {hours}{failed}")


def _write(rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    """JSON lines to stdout; or a file, which is there whole or not at all."""
    from aesanet.files import replacing
    from aesanet.runtime.rows.row import row_line, write_row

    if out is None:
        for row in rows:
            write_row(sys.stdout, row)
    elif out.suffix.lower() == ".parquet":
        from aesanet.runtime.rows.parquet import write_parquet

        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            lines = Path(folder, "rows.jsonl")
            _write(rows, lines)
            write_parquet(lines, out)
    else:
        with replacing(out) as beside, open(beside, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(row_line(row))
