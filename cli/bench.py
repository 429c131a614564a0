"""`aesanet bench`: how fast a bundle is here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aesanet.cli.measurements import compare, report
from aesanet.cli.options import FiniteRange, engine_arguments, engine_options, positive_numbers, whole_batches
from aesanet.cli.peers import peers
from aesanet.commands import extra, note

if TYPE_CHECKING:
    from aesanet.benchmarks.latency import Cell
    from aesanet.runtime.scorer import Scorer

_MOST_SECONDS = 100_000  # of audio in a batch; 6 GB of samples


def _cells(batches: Sequence[float], seconds: Sequence[float]) -> "list[Cell]":
    """All combinations, once they were seen to make sense."""
    from aesanet.benchmarks.latency import Cell
    from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE

    clips = whole_batches(batches)
    if max(clips) * max(seconds) > _MOST_SECONDS:
        raise click.UsageError(f"--batches times --seconds are at most {_MOST_SECONDS:,} s of audio")
    if min(seconds) < MIN_SAMPLES / SAMPLE_RATE:
        raise click.UsageError(f"--seconds must be {MIN_SAMPLES / SAMPLE_RATE} or more, the least that can be scored")
    return [Cell(batch, length) for batch in clips for length in seconds]


def _open(bundle: Path, engine: Mapping[str, Any]) -> "tuple[Scorer, dict[str, Any]]":
    """A bundle on the engine that was asked for, and what rows say of it."""
    from aesanet.benchmarks.records import provenance
    from aesanet.runtime.scorer import Scorer

    scorer = Scorer.open(bundle, **engine)
    note(f"{scorer.backend.name} ({scorer.reason})")
    return scorer, provenance(scorer, bundle, engine["threads"])


@click.group()
def bench() -> None:
    """Measure how fast a bundle is on this machine, and compare measurements.

    Everything is written to CSV files, with the machine, versions and bundle that it was measured on.
    """


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batches", callback=positive_numbers, default="1,4", show_default=True, help="Clips a batch.")
@click.option("--seconds", callback=positive_numbers, default="2,10", show_default=True, help="Lengths of clips.")
@click.option("--most", type=FiniteRange(min=0), default=30.0, show_default=True, help="Seconds a cell may take.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("latency.csv"), show_default=True)
@engine_options
def latency(
    bundle: Path,
    batches: list[float],
    seconds: list[float],
    most: float,
    out: Path,
    **engine: Any,
) -> None:
    """Time batches of BUNDLE's engine, from waveforms in memory to scores: p50, p90, p99 and the longest."""
    with extra("bench"):
        from aesanet.benchmarks.latency import LATENCY_COLUMNS, latency_row, measure_latency
        from aesanet.benchmarks.records import append_rows, check_columns, clocks

    check_columns(out, LATENCY_COLUMNS)
    cells = _cells(batches, seconds)
    scorer, where = _open(bundle, engine)
    found = measure_latency(scorer.backend, cells, most)
    where |= clocks() | {"engine": scorer.backend.name}  # which CUDA graphs may have failed meanwhile
    rows = [where | latency_row(cell, times) for cell, times in found.items()]
    append_rows(out, LATENCY_COLUMNS, rows)
    click.echo(" clips  seconds     p50 ms          95 % of p50       p90       p99       max  x real time")
    for row in rows:
        interval = f"{row['p50_low']:.2f} to {row['p50_high']:.2f}"
        click.echo(
            f"{row['batch']:6}{row['clip_seconds']:9g}{row['milliseconds_p50']:11.2f}{interval:>21}"
            f"{row['milliseconds_p90']:10.2f}{row['milliseconds_p99']:10.2f}{row['milliseconds_max']:10.2f}"
            f"{row['x_real_time']:13.1f}"
        )


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batches", callback=positive_numbers, default="4,64", show_default=True, help="Clips a batch.")
@click.option("--seconds", callback=positive_numbers, default="10", show_default=True, help="Lengths of clips.")
@click.option("--most", type=FiniteRange(min=0), default=60.0, show_default=True, help="Seconds a cell may take.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("throughput.csv"), show_default=True)
@engine_options
def throughput(
    bundle: Path,
    batches: list[float],
    seconds: list[float],
    most: float,
    out: Path,
    **engine: Any,
) -> None:
    """Count the audio a second that BUNDLE's engine scores from memory, and its share of the device's peak (MFU).

    Without --threads, here engine and peak are measured with one a core that may be used.
    """
    with extra("bench"):
        from aesanet.benchmarks.records import append_rows, check_columns, clocks
        from aesanet.benchmarks.throughput import THROUGHPUT_COLUMNS, throughput_rows
    from aesanet.gpu import gpu_memory_mib
    from aesanet.machine import usable_cores

    check_columns(out, THROUGHPUT_COLUMNS)
    cells = _cells(batches, seconds)
    engine["threads"] = engine["threads"] or usable_cores()
    gpu_memory_before_mib = gpu_memory_mib()
    scorer, where = _open(bundle, engine)
    rows = throughput_rows(scorer, cells, most, engine["threads"], gpu_memory_before_mib)
    where |= clocks() | {"engine": scorer.backend.name}  # which CUDA graphs may have failed meanwhile
    rows = [where | row for row in rows]
    append_rows(out, THROUGHPUT_COLUMNS, rows)
    click.echo(" clips  seconds    clips/s         95 % of clips/s   hours/s  x real time   TFLOP/s      peak    MFU")
    for row in rows:
        interval = f"{row['clips_per_second_low']:.2f} to {row['clips_per_second_high']:.2f}"
        peak, mfu = ("-", "-") if row["mfu"] is None else (f"{row['peak_tflops']:.3f}", f"{row['mfu']:.1%}")
        click.echo(
            f"{row['batch']:6}{row['clip_seconds']:9g}{row['clips_per_second']:11.2f}{interval:>24}"
            f"{row['hours_of_audio_per_second']:10.3f}{row['x_real_time']:13.1f}{row['useful_tflops']:10.3f}"
            f"{peak:>10}{mfu:>7}"
        )


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Fresh processes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("cold.csv"), show_default=True)
@engine_options
def cold(bundle: Path, repeats: int, out: Path, **engine: Any) -> None:
    """Time a fresh process until its first score: import, open BUNDLE, score one window."""
    with extra("bench"):
        from aesanet.benchmarks.latency import COLD_COLUMNS, measure_cold_start
        from aesanet.benchmarks.records import append_rows, check_columns, clocks

    check_columns(out, COLD_COLUMNS)
    where = _open(bundle, engine)[1]  # and no engine beside the fresh ones
    row = where | measure_cold_start(bundle, engine, repeats) | clocks()
    append_rows(out, COLD_COLUMNS, [row])
    click.echo(
        f"{row['engine']}: import {row['import_milliseconds']} ms, open {row['open_milliseconds']} ms, "
        f"first score {row['first_score_milliseconds']} ms (medians of {repeats})"
    )


@bench.command("end-to-end")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--max-batch-seconds", type=FiniteRange(min=0, min_open=True, max=1e6), help="As of `aesanet score`.")
@click.option("--workers", type=click.IntRange(min=1), help="As of `aesanet score`.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("end-to-end.csv"), show_default=True)
@engine_options
def end_to_end(
    bundle: Path,
    inputs: tuple[str, ...],
    rounds: int,
    max_batch_seconds: float | None,
    workers: int | None,
    out: Path,
    **engine: Any,
) -> None:
    """Time INPUTS from files to rows with BUNDLE, beside decoding alone and the engine alone; all audio is held."""
    with extra("bench"):
        from aesanet.benchmarks.end_to_end import END_TO_END_COLUMNS, measure_end_to_end
        from aesanet.benchmarks.records import append_rows, check_columns, clocks
    from aesanet.runtime.rows.inputs import read_rows

    check_columns(out, END_TO_END_COLUMNS)
    scorer, where = _open(bundle, engine)
    settings = scorer.settings(workers, max_batch_seconds)
    row = where | measure_end_to_end(scorer, list(read_rows(inputs)), settings, rounds) | clocks()
    append_rows(out, END_TO_END_COLUMNS, [row])
    click.echo(
        f"{row['clips']} clips, {row['audio_seconds']} s of audio: decoding alone {row['decoding_seconds']} s, engine "
        f"alone {row['engine_seconds']} s, files to rows {row['end_to_end_seconds']} s ({row['x_real_time']} x real "
        f"time), which is {row['share_of_slower']:.1%} of what the slower one alone reaches"
    )
    click.echo(
        f"engine {row['engine_share']:.1%} of the time, waiting for audio {row['waiting_share']:.1%}; padding "
        f"{row['padding']:.1%} of {row['batches']} batches (medians of {rounds} rounds)"
    )


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(min=20), default=100_000, show_default=True, help="Of many short files.")
@click.option("--hours", type=FiniteRange(min=0, min_open=True), default=2.0, show_default=True, help="Of long files.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("memory.csv"), show_default=True)
@engine_options
def memory(bundle: Path, rows: int, hours: float, out: Path, **engine: Any) -> None:
    """Find the most memory that `aesanet score` takes with BUNDLE: on one clip, hours of audio, many rows."""
    with extra("bench"):
        from aesanet.benchmarks.memory import MEMORY_COLUMNS, measure_memory
        from aesanet.benchmarks.records import append_rows, check_columns

    check_columns(out, MEMORY_COLUMNS)
    where = _open(bundle, engine)[1]  # and no engine beside those that are measured
    found = measure_memory(bundle, rows, hours, engine_arguments(engine), note)
    append_rows(out, MEMORY_COLUMNS, [where | row for row in found])
    for row in found:
        click.echo(
            f"{row['case']}: {row['peak_memory_mib']} MiB, {row['above_one_clip_mib']} more than for one clip; "
            f"{row['audio_seconds']} s of audio in {row['seconds']} s"
        )


for command in (peers, compare, report):
    bench.add_command(command)
