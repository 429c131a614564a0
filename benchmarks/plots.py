"""Plots of what `aesanet bench` measured: how many times faster than real time, engine by engine."""

from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure

from aesanet.benchmarks.records import measured_on, read_rows_of
from aesanet.benchmarks.report import cells_of, part_of, three_digits
from aesanet.errors import InputError

_COLOURS: Final = ("#0b6fa4", "#c65102", "#2f7d32", "#7b3fa0", "#8a8a00", "#a03060")


def plot_speeds(path: Path, out: Path) -> None:
    """A CSV with `x_real_time` as bars, one colour a shape of batch, into an SVG; raises InputError for another CSV."""
    rows = read_rows_of(path)
    if "x_real_time" not in rows[0] or not {"engine", "contestant"} & rows[0].keys():
        raise InputError(f"{path}: its columns are {', '.join(rows[0])}; a plot needs x_real_time of engines")
    with cells_of(path):
        shapes = dict.fromkeys(_shape(row) for row in rows)
        engines = dict.fromkeys(map(_name, rows))
        speeds = {(_name(row), _shape(row)): float(row["x_real_time"]) for row in rows}  # the last of each counts

    height = 0.8 / len(shapes)
    figure = Figure(figsize=(8, 0.7 + len(engines) * (0.25 + 0.22 * len(shapes))), layout="constrained")
    axes = figure.subplots()
    for number, shape in enumerate(shapes):
        places = [place + number * height for place, engine in enumerate(engines) if (engine, shape) in speeds]
        values = [speeds[engine, shape] for engine in engines if (engine, shape) in speeds]
        bars = axes.barh(places, values, height * 0.9, color=_COLOURS[number % len(_COLOURS)], label=shape)
        axes.bar_label(bars, [three_digits(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks([place + (len(shapes) - 1) * height / 2 for place in range(len(engines))], list(engines))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"x real time ({measured_on(rows[0]).partition(',')[0]})")  # its name; the rest has no room
    if any(shapes):
        axes.legend(frameon=False, loc="best")
    try:
        with mpl.rc_context({"svg.hashsalt": "aesanet"}):  # the same rows, the same file
            figure.savefig(out, format="svg", metadata={"Date": None})
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None


def _name(row: dict[str, str]) -> str:
    return row.get("engine") or f"{row['contestant']} {row['precision']}"


def _shape(row: dict[str, str]) -> str:
    """Of a row's batches, in words."""
    if not row.get("batch"):
        return ""
    if row.get("part"):
        return f"{part_of(row)}, batch {row['batch']}"
    of_seconds = f" of {float(row['clip_seconds']):g} s" if row.get("clip_seconds") else ""
    return f"{row['batch']} clip{'' if row['batch'] == '1' else 's'}{of_seconds}"
