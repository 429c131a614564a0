"""What a run leaves for people and for the next commands: epochs.csv, its plot, validation.jsonl, training.json."""

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aesanet import __version__
from aesanet.axes import AXES
from aesanet.files import replacing
from aesanet.training.dataset import Data
from aesanet.training.monitor import Signs
from aesanet.training.triplet import TripletCounters

LOSSES: Final = ("loss", "clip_mse", "frame_mse", "triplet")


def epoch_row(
    epoch: int,
    learning_rate: float,
    train: Mapping[str, float],
    signs: Signs,
    counters: TripletCounters,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """One row of epochs.csv but for `seconds`; None is an empty cell.

    `train_*` are means over the epoch's clips, `validation_*`, `srcc_*` and `ktau_*` of the whole validation clips,
    and `anchors` to `label_clusters` say what the triplets were made of.
    """
    row: dict[str, Any] = {"epoch": epoch, "learning_rate": learning_rate}
    row |= {f"train_{name}": train[name] for name in LOSSES}
    row["validation_mse"] = signs.mean_mse
    for name, values in (("validation_mse", signs.mse), ("srcc", signs.srcc), ("ktau", signs.ktau)):
        row |= {f"{name}_{axis}": value for axis, value in zip(AXES, values, strict=True)}
    row["mean_srcc"] = signs.mean_srcc
    row |= {"anchors": counters.anchors, "skipped": counters.skipped, "active": counters.active}
    row |= {f"{role}_clips": len(clips) for role, clips in counters.clips.items()}
    row["label_clusters"] = len(counters.clusters)
    for name in ("effective_rank", "mean_distance", "order_correlation"):
        row[name] = getattr(signs, name)
    row["warnings"] = "; ".join(warnings)
    return row


def epoch_lines(row: Mapping[str, Any], best: bool, warnings: Sequence[str]) -> list[str]:
    """What a person is told of an epoch: one line, and one for each warning."""
    srcc = "none" if row["mean_srcc"] is None else f"{row['mean_srcc']:.3f}"
    terms = ", ".join(f"{name} {row[f'train_{name}']:.3f}" for name in LOSSES)
    told = (
        f"epoch {row['epoch']}: {terms}; validation MSE {row['validation_mse']:.4f}, SRCC {srcc}; "
        f"{row['seconds']:.1f} s{', the best so far' if best else ''}"
    )
    return [told, *(f"warning: {warning}" for warning in warnings)]


def write_epochs(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """epochs.csv, a row an epoch."""
    with replacing(out / "epochs.csv") as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def plot_epochs(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """epochs.png: losses, ranks, and the health of the embeddings, over epochs."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    curves = (
        ("MSE", ("train_clip_mse", "train_frame_mse", "validation_mse")),
        ("validation MSE", tuple(f"validation_mse_{axis}" for axis in AXES)),
        ("validation SRCC", tuple(f"srcc_{axis}" for axis in AXES)),
        ("embeddings", ("mean_distance", "order_correlation", "train_triplet")),
    )
    for panel, (title, names) in zip(panels.flat, curves, strict=True):
        for name in names:
            _draw(panel, rows, name)
        panel.set(title=title, xlabel="epoch")
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    rank = panels[1, 1].twinx()  # tens, where the others are ones
    _draw(rank, rows, "effective_rank", color="black", linestyle=":")
    rank.set_ylabel("effective_rank (dotted)")
    rank.set_ylim(bottom=0)
    with replacing(out / "epochs.png") as beside:
        figure.savefig(beside, format="png")


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    values = [math.nan if row[name] is None else row[name] for row in rows]
    panel.plot([row["epoch"] for row in rows], values, label=name, marker="." if len(rows) < 30 else None, **style)


def write_validation(data: Data, out: Path) -> None:
    """validation.jsonl: a manifest that `aesanet score` takes, and the labels that `aesanet evaluate` takes."""
    with replacing(out / "validation.jsonl") as beside, open(beside, "w") as file:
        for clip in data.clips:
            given = clip.label.scores if clip.label.ratings is None else clip.label.ratings
            scores = {axis: _known(values) for axis, values in zip(AXES, np.array(given).tolist(), strict=True)}
            row = {"path": clip.file, "sample_id": clip.label.id, "system": clip.label.system, **scores}
            file.write(json.dumps(row) + "\n")


def write_account(account: Mapping[str, Any], out: Path) -> None:
    """training.json: what the run was made from, and with which versions."""
    versions = {tool.__name__: tool.__version__ for tool in (torch, np, scipy, matplotlib)}
    versions |= {"aesanet": __version__, "python": platform.python_version()}
    with replacing(out / "training.json") as beside:
        beside.write_text(json.dumps({**account, "versions": versions}, indent=2) + "\n")


def _known(value: float | list[float]) -> float | list[float] | None:
    """A mean, or ratings; None for no value."""
    return None if np.isnan(value).any() else value


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
