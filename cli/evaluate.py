"""`aesanet evaluate` and `aesanet calibrate`: scores beside human labels."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aesanet.axes import AXES
from aesanet.commands import extra, note
from aesanet.errors import InputError
from aesanet.files import check_output

if TYPE_CHECKING:
    from aesanet.training.evaluation import Evaluation, Metric
    from aesanet.training.joining import ScoredClips

_labels = click.option(
    "--labels",
    "labels",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A label file (.csv, .tsv, .jsonl): a path or sample_id, and axes by name. May be given several times.",
)
_scores = click.option(
    "--scores",
    required=True,
    type=click.Path(path_type=Path),
    help="What `aesanet score` wrote: .jsonl, .parquet or `-`.",
)
_allow_missing = click.option("--allow-missing", is_flag=True, help="Leave labels without a score out.")


@click.command()
@_labels
@_scores
@_allow_missing
@click.option("--resamples", type=click.IntRange(min=1), default=1000, show_default=True, help="Of the bootstrap.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all numbers to this file too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw scores over labels: a .png or .svg.")
def evaluate(
    labels: tuple[Path, ...],
    scores: Path,
    allow_missing: bool,
    resamples: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Compare scores with human labels: MSE, LCC, SRCC, KTAU over clips and over systems, with 95 % intervals.

    A score belongs to a label by `sample_id` or `id`, else by the end of its path. The ceiling, where labels hold the
    ratings of each clip, is the SRCC between two halves of the raters.
    """
    with extra("train"):
        import msgspec

        from aesanet.training.evaluation import PLOT_SUFFIXES, write_scatter
        from aesanet.training.evaluation import evaluate as evaluate_pairs

    if plot is not None and plot.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{plot}: a plot is {' or '.join(PLOT_SUFFIXES)}")
    for out in (json_file, plot):
        if out is not None:
            check_output(out, [*labels, scores])
    pairs = _join(labels, scores, allow_missing)
    evaluation = evaluate_pairs(pairs, resamples)
    _print_table(evaluation)
    if json_file is not None:
        try:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(evaluation), indent=2) + b"\n")
        except OSError as error:
            raise InputError(f"{json_file}: {error.strerror}") from None
    if plot is not None:
        write_scatter(pairs, evaluation, plot)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_labels
@_scores
@_allow_missing
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .safetensors to write.")
def calibrate(checkpoint: Path, labels: tuple[Path, ...], scores: Path, allow_missing: bool, out: Path) -> None:
    """Move and stretch the scores of CHECKPOINT towards human labels, one line an axis; ranks stay as they are.

    CHECKPOINT is an aesanet .safetensors, whole or the head alone. The scores are those of its own bundle, on clips
    that it was not trained on.
    """
    with extra("train"):
        import numpy as np

        from aesanet.training.calibration import apply_calibration, calibrate_checkpoint, fit_calibration

    check_output(out, [*labels, scores])
    pairs = _join(labels, scores, allow_missing, None)  # a torn file is a part of a run, and no fit to it is one to all
    calibration = fit_calibration(pairs.true, pairs.scores)
    calibrate_checkpoint(checkpoint, out, calibration)
    calibrated = apply_calibration(calibration, pairs.scores)
    click.echo(f"{'':8}{'scale':>9}{'offset':>9}{'MSE before':>13}{'after':>9}")
    for a, axis in enumerate(AXES):
        labelled = ~np.isnan(pairs.true[:, a])
        if not labelled.any():
            click.echo(f"{axis:8} no labels, left as it is")
            continue
        line, true = getattr(calibration, axis), pairs.true[labelled, a]
        before, after = (float(np.mean((true - s[labelled, a]) ** 2)) for s in (pairs.scores, calibrated))
        click.echo(f"{axis:8}{line.scale:9.4f}{line.offset:9.4f}{before:13.4f}{after:9.4f}")
    note(f"{out}: calibrated; export it to score with it. The MSE after is of the clips that it was fitted to")


def _join(
    labels: tuple[Path, ...], scores: Path, allow_missing: bool, torn: Callable[[str], None] | None = note
) -> "ScoredClips":
    from aesanet.runtime.rows.results import STDIN

    with extra("train"):
        from aesanet.training.joining import join
        from aesanet.training.labels import read_labels

    pairs = join(read_labels(labels), scores, allow_missing, torn)
    if pairs.missing:
        note(f"{pairs.missing} labels have no score and are left out")
    if pairs.unused:
        name = "standard input" if str(scores) == STDIN else scores
        note(f"{pairs.unused} rows of {name} have no label and are left out")
    return pairs


def _print_table(evaluation: "Evaluation") -> None:
    click.echo(
        f"{evaluation.clips} clips, {evaluation.systems} systems; "
        f"95 % intervals of {evaluation.resamples} bootstrap resamples"
    )
    click.echo(f"{'axis':6}{'level':11}{'n':>6}" + "".join(f"  {name:<23}" for name in ("MSE", "LCC", "SRCC", "KTAU")))
    reasons: dict[str, list[str]] = {}
    for axis, levels in evaluation.axes.items():
        for name, level in (("utterance", levels.utterance), ("system", levels.system)):
            metrics = (level.mse, level.lcc, level.srcc, level.ktau)
            line = f"{axis:6}{name:11}{level.count:6}" + "".join(f"  {_cell(m):<23}" for m in metrics)
            click.echo(line.rstrip())
            for reason in dict.fromkeys(metric.reason for metric in metrics if metric.reason is not None):
                reasons.setdefault(reason, []).append(f"{axis} {name}")
    for name in ("utterance", "system"):
        ceilings = {axis: getattr(levels, name).ceiling_srcc for axis, levels in evaluation.axes.items()}
        if any(value is not None for value in ceilings.values()):
            shown = "".join(f"  {axis} {_number(value)}" for axis, value in ceilings.items())
            click.echo(f"{'ceiling':8}{name:9}  SRCC of two halves of the raters:{shown}")
    for reason, places in reasons.items():
        click.echo(f"- {', '.join(places)}: {reason}")


def _cell(metric: "Metric") -> str:
    interval = "" if metric.low is None else f" [{_number(metric.low)}, {_number(metric.high)}]"
    return _number(metric.value) + interval


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
