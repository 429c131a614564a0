"""`aesanet bench compare` and `report`: CSV files of measurements, read again."""

from pathlib import Path

import click

from aesanet.commands import extra, note


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Say how many times as long AFTER's latencies are as BEFORE's, cell by cell, with intervals of 95 %."""
    with extra("bench"):
        from aesanet.benchmarks.latency import compare as compared

    for row in compared(before, after):
        threads = f", {row['threads']} threads" if row["threads"] else ""
        verdict = "slower" if row["low"] > 1 else "faster" if row["high"] < 1 else "no difference shown"
        click.echo(
            f"{row['engine']}{threads}, {row['weights']}, {row['batch']} x {float(row['clip_seconds']):g} s: "
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {verdict}"
        )


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--update",
    "documents",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Write this document's tables anew, each from the CSV that it names.",
)
@click.option("--plot", is_flag=True, help="Draw the speeds of each CSV too, as an SVG beside it.")
def report(results: tuple[Path, ...], documents: tuple[Path, ...], plot: bool) -> None:
    """Make Markdown tables of RESULTS, CSV files that these commands wrote."""
    with extra("bench"):
        from aesanet.benchmarks.plots import plot_speeds
        from aesanet.benchmarks.report import table, update

    if not results and not documents:
        raise click.UsageError("give CSV files, or documents to --update")
    for path in results:
        click.echo(table(path))
        if plot:
            plot_speeds(path, path.with_suffix(".svg"))
            note(f"{path.with_suffix('.svg')}: written")
    for document in documents:
        note(f"{document}: {'written anew' if update(document) else 'as it was'}")
