"""`aesanet report`: many scores as one page, and their main figures as text."""

import sys
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aesanet.axes import AXES
from aesanet.cli.options import PAGE_SUFFIXES, FiniteRange
from aesanet.cli.sinks import check_out
from aesanet.commands import note
from aesanet.errors import InputError

if TYPE_CHECKING:
    from aesanet.benchmarks.score_summary import Summary


@click.command()
@click.argument("scores", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .html to write.")
@click.option("--overwrite", is_flag=True, help="Replace the --out file if it exists.")
@click.option(
    "--clips",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="How many of the best and of the worst are shown for each axis, with players where their files are here.",
)
@click.option(
    "--clip-seconds",
    type=FiniteRange(min=0.1, max=60),
    default=6.0,
    show_default=True,
    help="How much of each can be heard.",
)
@click.option(
    "--audio-megabytes",
    type=FiniteRange(min=0, max=1e6),
    default=10.0,
    show_default=True,
    help="The most that players may add to the page; clips after that have their names only.",
)
def report(
    scores: tuple[str, ...], out: Path, overwrite: bool, clips: int, clip_seconds: float, audio_megabytes: float
) -> None:
    """Make one HTML page of SCORES, with nothing to load: distributions, correlations, clips to hear, errors.

    SCORES are what `aesanet score` wrote, as JSON lines or .parquet: files, globs, or `-` for JSON lines on standard
    input. They are read once and not held, so a million rows are fine. Paths of clips start at the current folder.

    Exit status: 0 the page is written, 2 it could not be.
    """
    from aesanet.benchmarks.players import Players
    from aesanet.benchmarks.score_page import score_page
    from aesanet.benchmarks.score_summary import Summary
    from aesanet.files import replacing
    from aesanet.runtime.rows.results import read_results, score_files

    files = score_files(scores)
    if out.suffix.lower() not in PAGE_SUFFIXES:
        raise InputError(f"{out}: a page is {' or '.join(PAGE_SUFFIXES)}; give it such a name")
    check_out(out, overwrite, resume=False, inputs=tuple(files))
    summary = Summary(read_results(files, note), clips)
    if not summary.scored and not summary.failed:
        raise InputError(f"no rows in {', '.join(scores)}")
    page = score_page(files, summary, Players(clip_seconds, round(audio_megabytes * 1e6)))
    try:
        with replacing(out) as beside:
            beside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None
    _print(summary, len(files))
    note(f"{out}: {len(page.encode()) / 1e6:.1f} MB")


def _print(summary: "Summary", num_files: int) -> None:
    from aesanet.benchmarks.score_page import clip_name, quantile_rows
    from aesanet.benchmarks.score_summary import QUANTILES
    from aesanet.words import printable

    click.echo(
        f"{summary.scored:,} clips scored, {summary.seconds.sum() / 3600:,.2f} h of audio, {summary.failed:,} rows "
        f"failed, {summary.truncated:,} truncated, {summary.silent.total():,} silent; {num_files} "
        f"file{'' if num_files == 1 else 's'}"
    )
    if summary.scored:
        names = ("mean", "std", *(f"{quantile:.0%}" for quantile in QUANTILES))
        click.echo(f"{'':8}" + "".join(f"{name:>9}" for name in names))
        for name, values in quantile_rows(summary):
            click.echo(f"{name:8}" + "".join(f"{value:9.3f}" for value in values))
        for name, found in (("SRCC", summary.srcc), ("Pearson", summary.pearson)):
            pairs = list(combinations(range(len(AXES)), 2))
            told = (f"{AXES[i]}-{AXES[j]} {found[i, j]:.3f}" for i, j in pairs if not isnan(found[i, j]))
            click.echo(f"{name:9}" + ("  ".join(told) or "of no two axes, as none varies"))
    for code, count in summary.errors.most_common():
        what = printable(f"{code}: {clip_name(summary.error_examples[code][0])}")
        what = what.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding)
        click.echo(f"{count:,} row{'' if count == 1 else 's'} {what}{' and others' if count > 1 else ''}")
