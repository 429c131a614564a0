"""`aesanet score`: rows of audio in, rows of scores out."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aesanet import __version__
from aesanet.cli.options import FiniteRange, engine_options
from aesanet.commands import EXIT_INTERRUPTED, EXIT_ROWS_FAILED, note
from aesanet.errors import InputError
from aesanet.interrupts import on_interrupt

if TYPE_CHECKING:
    from aesanet.runtime.audio.decode import ChannelPolicy
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
    "--out",
    type=click.Path(path_type=Path),
    help="Write the rows to this file, not to stdout: JSON lines, or Parquet where it ends so.",
)
@click.option("--overwrite", is_flag=True, help="Replace the --out file if it exists.")
@click.option(
    "--resume", is_flag=True, help="Go on where an earlier run into the --out file stopped, if there was one."
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "jsonl", "table"]),
    default="auto",
    show_default=True,
    help="Of stdout; auto is a table on a terminal.",
)
@click.option("--per-window", is_flag=True, help="Keep the scores of each window, with its start and end.")
@click.option("--embeddings", is_flag=True, help="Keep the mean of the encoder's features.")
@click.option(
    "--channels",
    type=click.Choice(["mean", "left", "loudest"]),
    default="mean",
    show_default=True,
    help="What of several channels is scored.",
)
@click.option("--unordered", is_flag=True, help="Write rows as they are done, not in the order of the input.")
@click.option(
    "--max-batch-seconds",
    type=FiniteRange(min=0, min_open=True, max=1e6),
    help="Of audio in a batch, padding included.  [default: what suits the engine]",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads that decode.  [default: one a core that may be used]"
)
@click.option("--profile", is_flag=True, help="Say at the end where the time went.")
@engine_options
def score(
    bundle: Path,
    inputs: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    resume: bool,
    layout: str,
    per_window: bool,
    embeddings: bool,
    channels: "ChannelPolicy",
    unordered: bool,
    max_batch_seconds: float | None,
    workers: int | None,
    profile: bool,
    **engine: Any,
) -> None:
    """Score audio with BUNDLE, one output row an input row, in order.

    INPUTS are audio files, folders, globs, tars of audio, manifests (.jsonl, .csv, .tsv, .parquet with a `path` and
    perhaps `start_time` and `end_time` in seconds) or `-` for JSON lines or plain paths on standard input.

    Exit status: 0 all rows were scored, 1 some have an error, 2 the run could not start or go on, 130 interrupted.
    """
    from aesanet.bundle import graph_hashes
    from aesanet.cli.sinks import check_out, open_sink
    from aesanet.cli.watch import Watch
    from aesanet.runtime.pipeline import GroupEnd
    from aesanet.runtime.rows.inputs import count_rows, read_rows
    from aesanet.runtime.scorer import Scorer, output_row

    check_out(out, overwrite, resume, inputs)
    total = count_rows(inputs)
    if total == 0:
        raise InputError(f"no audio in {', '.join(inputs)}")
    scorer = Scorer.open(bundle, **engine)
    settings = scorer.settings(workers, max_batch_seconds, ordered=not unordered, embeddings=embeddings)
    note(f"{scorer.backend.name} ({scorer.reason})")
    note(f"batches of up to {settings.batch_seconds:g} s of audio, decoded in {settings.workers} threads")
    for line in (_WORTH[scorer.manifest.weights], _checked(scorer)):
        if line is not None:
            note(line)
    run = {
        "the graphs": graph_hashes(scorer.manifest, scorer.backend.form),
        "the windows": [scorer.manifest.window.window_seconds, scorer.manifest.window.hop_seconds],
        "the engine": [scorer.backend.name, scorer.backend.kind, engine["threads"]],
        "--max-batch-seconds": settings.batch_seconds,
        "--channels": channels,
        "--unordered": unordered,
        "--per-window": per_window,
        "--embeddings": embeddings,
        "aesanet": __version__,
    }

    rows = read_rows(inputs)
    with ExitStack() as stack:
        sink = stack.enter_context(closing(open_sink(out, layout, run)))
        try:
            if not resume:
                sink.begin()
            elif sink.resume(rows, ordered=not unordered):
                done = f"{sink.tally.rows} rows that are done"
                note(f"nothing to do: {done}" if sink.finished else f"going on after {done}")
        except OSError as error:
            raise InputError(f"{out or 'stdout'}: {error.strerror}") from None
        pipeline = scorer.pipeline(rows, settings, channels=channels)
        interrupted = stack.enter_context(_interrupts(pipeline.stop))
        watch = stack.enter_context(Watch(pipeline, sink.tally, total, settings.workers))
        try:
            for found in pipeline.run():
                if isinstance(found, GroupEnd):
                    if not interrupted():  # what was cut short is made again
                        sink.mark()
                    continue
                with watch.quiet():
                    sink.write(output_row(*found, per_window))
                watch.tell()
            if not interrupted():
                sink.finish()
        except OSError as error:
            if out is not None or not isinstance(error, BrokenPipeError):
                go_on = "; with room again, --resume goes on" if out is not None else ""
                raise InputError(f"{out or 'stdout'}: {error.strerror} after {sink.tally.rows} rows{go_on}") from None
            # The reader of stdout has gone, as `head` does. Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_ROWS_FAILED)

    tally = sink.tally
    note(f"{tally.rows - tally.failed} of {tally.rows} clips scored, {watch.speed()}")
    if profile:
        for line in watch.profile():
            note(line)
    if interrupted():
        note(f"interrupted after {tally.rows} rows{'' if total is None else f' of {total}'}, all of them written")
        if out is not None:
            note(f"the same command with --resume, and without --overwrite, goes on after row {sink.marked_rows}")
        sys.exit(EXIT_INTERRUPTED)
    if not tally.rows:
        raise InputError("no audio on standard input")
    if tally.failed:
        sys.exit(EXIT_ROWS_FAILED)


def _checked(scorer: "Scorer") -> str | None:
    """What is to be said of how this engine's scores compare with the checkpoint's."""
    from aesanet.bundle import graph_hashes

    kind = scorer.backend.kind
    found = scorer.manifest.verified.get(kind)
    if found is None or found.graphs != graph_hashes(scorer.manifest, scorer.backend.form):
        return f"this bundle was never verified on {kind}: `aesanet verify` does"
    if not found.failures and found.engine != scorer.backend.name:
        return f"this bundle was verified on {found.engine}, and this is {scorer.backend.name}: `aesanet verify` does"
    if found.failures:
        return f"on {kind} this bundle FAILED `aesanet verify`: {found.failures[0]}"
    return None


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the rows in hand be finished on Ctrl-C or SIGTERM; yields a function that tells whether there was one."""
    pressed = False

    def press() -> None:
        nonlocal pressed
        if pressed:
            os._exit(EXIT_INTERRUPTED)  # any instant is one to go on from, and locks may be held here
        pressed = True
        stop()
        with suppress(OSError):  # and not by `note`, as the signal may have come in the middle of one
            os.write(2, b"aesanet: finishing the rows in hand; Ctrl-C once more stops at once\n")

    with on_interrupt(press):
        yield lambda: pressed
