"""`aesanet bench`: how fast a bundle is here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aesanet.cli.options import FiniteRange, engine_options
from aesanet.commands import extra, note

if TYPE_CHECKING:
    from aesanet.benchmarks.latency import Cell


_MOST_SECONDS = 100_000  # of audio in a batch; 6 GB of samples


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Positive numbers from text such as 1,8,64."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r}; give positive numbers, such as 1,8,64")
    return numbers


def _whole(batches: Sequence[float]) -> tuple[int, ...]:
    if any(batch != int(batch) for batch in batches):
        raise click.UsageError("--batches are whole numbers of clips")
    return tuple(map(int, batches))


def _cells(batches: Sequence[float], seconds: Sequence[float]) -> "list[Cell]":
    """All combinations, once they were seen to make sense."""
    from aesanet.benchmarks.latency import Cell
    from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE

    clips = _whole(batches)
    if max(clips) * max(seconds) > _MOST_SECONDS:
        raise click.UsageError(f"--batches times --seconds are at most {_MOST_SECONDS:,} s of audio")
    if min(seconds) < MIN_SAMPLES / SAMPLE_RATE:
        raise click.UsageError(f"--seconds must be {MIN_SAMPLES / SAMPLE_RATE} or more, the least that can be scored")
    return [Cell(batch, length) for batch in clips for length in seconds]


@click.group()
def bench() -> None:
    """Measure how fast a bundle is on this machine, and compare measurements.

    Everything is written to CSV files, with the machine, versions and bundle that it was measured on.
    """


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batches", callback=_numbers, default="1,4", show_default=True, help="Clips a batch.")
@click.option("--seconds", callback=_numbers, default="2,10", show_default=True, help="Lengths of clips.")
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
        from aesanet.benchmarks.records import append_rows, check_columns, clocks, provenance
    from aesanet.runtime.scorer import Scorer

    check_columns(out, LATENCY_COLUMNS)
    cells = _cells(batches, seconds)
    scorer = Scorer.open(bundle, **engine)
    note(f"{scorer.backend.name} ({scorer.reason})")
    where = provenance(scorer, bundle)
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
@click.option("--batches", callback=_numbers, default="4,64", show_default=True, help="Clips a batch.")
@click.option("--seconds", callback=_numbers, default="10", show_default=True, help="Lengths of clips.")
@click.option("--most", type=FiniteRange(min=0), default=60.0, show_default=True, help="Seconds a cell may take.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the processor.  [default: one a core that may be used]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("throughput.csv"), show_default=True)
@engine_options
def throughput(
    bundle: Path,
    batches: list[float],
    seconds: list[float],
    most: float,
    threads: int | None,
    out: Path,
    **engine: Any,
) -> None:
    """Count the audio a second that BUNDLE's engine scores from memory, and its share of the device's peak (MFU)."""
    with extra("bench"):
        from aesanet.benchmarks.records import append_rows, check_columns, clocks, provenance
        from aesanet.benchmarks.throughput import THROUGHPUT_COLUMNS, throughput_rows
    from aesanet.gpu import gpu_memory_mib
    from aesanet.machine import usable_cores
    from aesanet.runtime.scorer import Scorer

    check_columns(out, THROUGHPUT_COLUMNS)
    cells = _cells(batches, seconds)
    threads = threads or usable_cores()
    gpu_memory_before_mib = gpu_memory_mib()
    scorer = Scorer.open(bundle, threads=threads, **engine)
    note(f"{scorer.backend.name} ({scorer.reason})")
    where = provenance(scorer, bundle)
    rows = throughput_rows(scorer, cells, most, threads, gpu_memory_before_mib)
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
        from aesanet.benchmarks.records import append_rows, check_columns, clocks, provenance
    from aesanet.runtime.scorer import Scorer

    check_columns(out, COLD_COLUMNS)
    where = provenance(Scorer.open(bundle, **engine), bundle)
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
        from aesanet.benchmarks.records import append_rows, check_columns, clocks, provenance
    from aesanet.runtime.rows.inputs import read_rows
    from aesanet.runtime.scorer import Scorer

    check_columns(out, END_TO_END_COLUMNS)
    scorer = Scorer.open(bundle, **engine)
    note(f"{scorer.backend.name} ({scorer.reason})")
    where = provenance(scorer, bundle)
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
@click.argument("inputs", nargs=-1, type=click.Path())
@click.option(
    "--part",
    type=click.Choice(["files", "waveforms", "encoder"]),
    default="files",
    show_default=True,
    help="Files on disk to scores, waveforms in memory to scores, or the encoder alone (these on 10 s clips).",
)
@click.option(
    "--batches", callback=_numbers, default="4", show_default=True, help="Clips; from files, aesanet has its own."
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
    asked = Plan(threads=threads or usable_cores(), batches=_whole(batches), **plan)
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


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Say how many times as long AFTER's latencies are as BEFORE's, cell by cell, with intervals of 95 %."""
    with extra("bench"):
        from aesanet.benchmarks.latency import compare as compared

    for row in compared(before, after):
        verdict = "slower" if row["low"] > 1 else "faster" if row["high"] < 1 else "no difference shown"
        click.echo(
            f"{row['engine']}, {row['weights']}, {row['batch']} x {float(row['clip_seconds']):g} s: "
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {verdict}"
        )


@bench.command()
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
