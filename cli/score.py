"""`aesanet score`: rows of audio in, rows of scores out."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from aesanet.axes import AXES
from aesanet.cli.notes import EXIT_INTERRUPTED, EXIT_ROWS_FAILED, note
from aesanet.cli.options import engine_options
from aesanet.errors import InputError

if TYPE_CHECKING:
    from aesanet.runtime.scorer import Scorer

# What is said of scores by what their weights were made from.
_WORTH = {
    "untrained": "the weights of this bundle are untrained (random): its scores say nothing about the audio",
    "demo": "these are demo weights, trained on the demo's own labels and not on human ratings: see their model card",
    "trained": None,
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the rows to this file as JSON lines, not to stdout."
)
@click.option("--overwrite", is_flag=True, help="Replace the --out file if it exists.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "jsonl", "table"]),
    default="auto",
    show_default=True,
    help="Of stdout; auto is a table on a terminal.",
)
@engine_options
@click.option("--threads", type=click.IntRange(min=1), help="Of the engine.  [default: the engine's own]")
def score(
    bundle: Path,
    inputs: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    layout: str,
    threads: int | None,
    **engine: Any,
) -> None:
    """Score audio with BUNDLE, one output row an input row, in order.

    INPUTS are audio files, folders, globs, manifests (.jsonl, .csv, .tsv with a `path` and perhaps `start_time` and
    `end_time` in seconds) or `-` for JSON lines or plain paths on standard input.

    Exit status: 0 all rows were scored, 1 some have an error, 2 the run could not start or go on, 130 interrupted.
    """
    from tqdm import tqdm

    from aesanet.runtime.inputs import count_rows, read_rows
    from aesanet.runtime.rows import write_row
    from aesanet.runtime.scorer import Scorer

    if out is not None:
        _check_out(out, overwrite, inputs)
    total = count_rows(inputs)
    if total == 0:
        raise InputError(f"no audio in {', '.join(inputs)}")
    scorer = Scorer.open(bundle, threads=threads, **engine)
    note(f"{scorer.backend.name} ({scorer.reason})")
    for line in (_WORTH[scorer.manifest.weights], _checked(scorer)):
        if line is not None:
            note(line)

    rows = failed = 0
    seconds = 0.0
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            file = sys.stdout if out is None else stack.enter_context(_create(out))
            table = out is None and (layout == "table" or (layout == "auto" and file.isatty()))
            if table:
                _write_header(file)
            bar = stack.enter_context(tqdm(total=total, unit=" clip", disable=None, leave=False, file=sys.stderr))
            interrupted = stack.enter_context(_interrupts())
            for row in scorer.stream(read_rows(inputs)):
                with tqdm.external_write_mode(file=file):
                    (_write_line if table else write_row)(file, row)
                rows += 1
                failed += "error" in row
                seconds += row.get("seconds", 0.0)
                bar.set_postfix_str(f"{seconds / 3600 / (time.monotonic() - started):.3f} h of audio/s", refresh=False)
                bar.update()
                if interrupted():
                    break
    except BrokenPipeError:
        # The reader of stdout has gone, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ROWS_FAILED)
    except OSError as error:
        raise InputError(f"{out or 'stdout'}: {error.strerror} after {rows} rows") from None

    took = time.monotonic() - started
    speed = f"{seconds:.1f} s of audio in {took:.1f} s ({seconds / took:.0f} x real time)"
    note(f"{rows - failed} of {rows} clips scored, {speed}")
    if interrupted():
        note(f"interrupted after {rows} rows{'' if total is None else f' of {total}'}, all of them written")
        sys.exit(EXIT_INTERRUPTED)
    if failed:
        sys.exit(EXIT_ROWS_FAILED)


def _checked(scorer: "Scorer") -> str | None:
    """What is to be said of how this engine's scores compare with the checkpoint's."""
    from aesanet.bundle import graphs_used

    kind = scorer.backend.kind
    found = scorer.manifest.verified.get(kind)
    if found is None or found.graphs != graphs_used(scorer.manifest, scorer.backend.precision):
        return f"this bundle was never verified on {kind}: `aesanet verify` does"
    if not found.failures and found.engine != scorer.backend.name:
        return f"this bundle was verified on {found.engine}, and this is {scorer.backend.name}: `aesanet verify` does"
    if found.failures:
        return f"on {kind} this bundle FAILED `aesanet verify`: {found.failures[0]}"
    return None


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Let the row in hand be finished when Ctrl-C is pressed; yields a function that tells whether it was."""
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        note("finishing the clip in hand; Ctrl-C once more stops at once")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _check_out(out: Path, overwrite: bool, inputs: tuple[str, ...]) -> None:
    if any(os.path.exists(name) and out.exists() and os.path.samefile(name, out) for name in inputs):
        raise InputError(f"{out}: is one of the inputs; give --out another name")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; give --overwrite to replace it, or another name")


def _create(out: Path) -> TextIO:
    try:
        return open(out, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None


_NAME_WIDTH = 48


def _write_header(file: TextIO) -> None:
    file.write(f"{'clip':{_NAME_WIDTH}}" + "".join(f"{axis:>7}" for axis in AXES) + f"{'seconds':>10}\n")
    file.flush()


def _write_line(file: TextIO, row: dict[str, Any]) -> None:
    """One line for people; a long path keeps its end."""
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(row.get("path", row.get("line", ""))))
    name = name.encode(file.encoding, "backslashreplace").decode(file.encoding)
    name = name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]
    if "error" in row:
        what = f"  {row['error']['code']}: {row['error']['message']}"
    else:
        what = "".join(f"{row[axis]:7.3f}" for axis in AXES) + f"{row['seconds']:10.2f}"
        if "truncated" in row:
            what += f"  truncated: the header says {row['truncated']['header_seconds']:.2f} s"
    file.write(f"{name:{_NAME_WIDTH}}{what}\n")
    file.flush()
