"""`aesanet bench peers`: a bundle's engines beside what people score audio with today."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from aesanet.cli.options import positive_numbers, whole_batches
from aesanet.commands import extra, note


@click.command()
@click.argument("inputs", nargs=-1, type=click.Path())
@click.option(
    "--part",
    type=click.Choice(["files", "waveforms", "encoder"]),
    default="files",
    show_default=True,
    help="Files on disk to scores, waveforms in memory to scores, or the encoder alone (these on 10 s clips).",
)
@click.option(
    "--batches",
    callback=positive_numbers,
    default="4",
    show_default=True,
    help="Clips; from files, aesanet has its own.",
)
@click.option("--clips", type=click.IntRange(min=1), default=16, show_default=True, help="Of 10 s, without INPUTS.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="6 or more give intervals of 95 %.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of every contestant; by default, as many as cores.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="By default an untrained network of the base size, 90 M."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("peers.csv"), show_default=True)
def peers(inputs: tuple[str, ...], batches: list[float], threads: int | None, out: Path, **plan: Any) -> None:
    """Time aesanet's engines beside PyTorch, Polygraphy and audiobox-aesthetics, in turns, on INPUTS or recordings.

    PyTorch runs the same network, eager and compiled, in FP32 (on a GPU only eager) and by autocast. From files, it and
    audiobox-aesthetics read, resample and score one batch after the other, as scripts do. audiobox-aesthetics is its
    own package, with random weights of the published sizes, and takes part where it is installed:

        pip install audiobox_aesthetics requests
    """
    with extra("bench"):
        from aesanet.benchmarks.peers import PEERS_COLUMNS, Plan, measure_peers
        from aesanet.benchmarks.records import append_rows, check_columns
    from aesanet.machine import usable_cores

    check_columns(out, PEERS_COLUMNS)
    asked = Plan(threads=threads or usable_cores(), batches=whole_batches(batches), **plan)
    for rows in measure_peers(inputs, asked, note):
        append_rows(out, PEERS_COLUMNS, rows)
        _show_peers(rows)


def _show_peers(rows: Sequence[Mapping[str, Any]]) -> None:
    click.echo(
        f"{rows[0]['part']}: {rows[0]['clips']} clips, {rows[0]['audio_seconds']} s of audio, {rows[0]['threads']} "
        f"threads, medians of {rows[0]['rounds']} rounds"
    )
    click.echo(f"{'':36}batch  seconds         low to high  x real time  x audiobox  x PyTorch")
    for row in rows:
        interval = f"{row['seconds_low']:.3f} to {row['seconds_high']:.3f}"
        click.echo(
            f"{row['contestant'] + ' ' + row['precision']:36}{row['batch']:5}{row['seconds_median']:9.3f}{interval:>20}"
            f"{row['x_real_time']:13.1f}{row['x_audiobox']:>12}{row['x_pytorch']:>11}"
        )
