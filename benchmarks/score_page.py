"""The scores of many clips as one HTML page that needs nothing else: charts, tables, and clips to listen to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from aesanet import __version__
from aesanet.axes import AXES, AXIS_NAMES
from aesanet.benchmarks.charts import histogram, pairs, score_range
from aesanet.benchmarks.page import page, table, text
from aesanet.benchmarks.players import Players
from aesanet.benchmarks.score_summary import QUANTILES, Summary
from aesanet.errors import CLIP_ERROR_CODES

_STYLE = """
body { max-width: 68rem } h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } h3 { margin: 0 0 .3rem }
.faint, small, footer { color: var(--faint) } footer { margin-top: 3rem; border-top: 1px solid var(--line) }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0 }
.tiles div { background: var(--card); border-radius: 8px; padding: .6rem 1.1rem }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2 }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem 2rem }
.three { display: flex; flex-wrap: wrap; align-items: start; gap: 1.5rem 2rem } .wide { overflow-x: auto }
.two + .wide { margin-top: 1.5rem } .chart { display: block; width: 100% }
svg text { fill: var(--faint); font-size: 12px }
.chart text { paint-order: stroke; stroke: var(--back); stroke-width: 3px }
.grid { stroke: var(--line) } .axis { stroke: var(--faint) }
.median { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 4 3 }
.pairs { width: 40rem } .cell { fill: var(--card) } .density path, .strength { fill: var(--CE) }
.pairs text { text-anchor: middle } .pairs .name { font-size: 26px; font-weight: 600 }
.pairs .srcc { font-size: 26px; fill: var(--text) }
ol { list-style: none; padding: 0; margin: 0 } li { padding: .45rem 0; border-bottom: 1px solid var(--line) }
li b { float: left; width: 3.4rem } li > div { margin-left: 3.4rem; overflow-wrap: anywhere }
audio { width: 100%; height: 2rem; margin-top: .3rem; display: block } .none { display: block; font-style: italic }
.bar { text-align: left; min-width: 6rem } .bar i { display: block; height: .7rem; border-radius: 3px }
.bar i { background: var(--CE) } .examples { text-align: left; overflow-wrap: anywhere; font-size: .85rem }
td.left, th.left { text-align: left }
"""

_MANY_FILES = 5  # from which on the rest of their names is left out
_LONGEST_NAME = 90
_DURATIONS: Final = (0, 1, 3, 10, 30, 60, 300, 1800, np.inf)
_DURATION_NAMES: Final = ("under 1 s", "1-3 s", "3-10 s", "10-30 s", "30-60 s", "1-5 min", "5-30 min", "over 30 min")


def score_page(files: Sequence[str], summary: Summary, players: Players) -> str:
    """The page of a summary of score files; a summary of failed rows alone has neither charts nor clips."""
    parts = [f"<h1>Scores of {summary.scored:,} clips</h1>", _files(files), _tiles(summary)]
    if summary.scored:
        parts += [_distributions(summary), _correlations(summary), _clips(summary, players), _audio(summary)]
    if summary.failed:
        parts.append(_errors(summary))
    parts.append(f"<footer><p>Made by aesanet {__version__}.</p></footer>")
    return page(f"Scores of {summary.scored:,} clips", "".join(parts), _STYLE)


def clip_name(row: Mapping[str, Any]) -> str:
    """What a row is called: its path, what is meant within it, or the line that was no row."""
    name = str(row.get("path", row.get("line", "")))
    if row.get("member") is not None:
        name += f"/{row['member']}"
    start, end = row.get("start_time") or 0, row.get("end_time")
    if end not in (None, ""):
        return f"{name} [{start}-{end} s]"
    return f"{name} [from {start} s]" if start else name


def quantile_rows(summary: Summary) -> list[tuple[str, list[float]]]:
    """For each axis and for seconds: mean, standard deviation and `QUANTILES`."""
    columns = [*zip(AXES, summary.scores.T, strict=True), ("seconds", summary.seconds)]
    return [(name, [values.mean(), values.std(), *np.quantile(values, QUANTILES)]) for name, values in columns]


def _files(files: Sequence[str]) -> str:
    names = ", ".join(text(name) for name in files[:_MANY_FILES])
    more = f" and {len(files) - _MANY_FILES:,} more files" if len(files) > _MANY_FILES else ""
    return f"<p class=faint>{names}{more}</p>"


def _tiles(summary: Summary) -> str:
    hours = summary.seconds.sum() / 3600
    tiles = [
        (f"{summary.scored:,}", "clips scored"),
        (f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min", "of audio"),
        (f"{summary.failed:,}", "rows failed"),
        (f"{summary.truncated:,}", "truncated"),
        *(
            (f"{summary.silent[kind]:,}", f"silent ({text(kind)})")
            for kind in sorted({"digital", "near", *summary.silent})
        ),
    ]
    return f"<div class=tiles>{''.join(f'<div><b>{value}</b>{name}</div>' for value, name in tiles)}</div>"


def _distributions(summary: Summary) -> str:
    span = score_range(summary.scores)
    charts = "".join(
        f"<div><h3>{axis} <small>{AXIS_NAMES[axis]}, median {np.median(values):.2f}</small></h3>"
        f"{histogram(values, span, axis)}</div>"
        for axis, values in zip(AXES, summary.scores.T, strict=True)
    )
    heads = ["", "mean", "std", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in QUANTILES)]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in quantile_rows(summary)]
    return f"<h2>Distribution</h2><div class=two>{charts}</div><div class=wide>{table(heads, rows)}</div>"


def _correlations(summary: Summary) -> str:
    span = score_range(summary.scores)
    return (
        "<h2>How the axes go together</h2><p class=faint>Above the diagonal: Spearman's rank correlation, and "
        "Pearson's. Below: where clips lie, stronger where there are more; every square "
        f"goes from {span[0]:g} to {span[1]:g}.</p>{pairs(summary.scores, span, summary.srcc, summary.pearson)}"
    )


def _clips(summary: Summary, players: Players) -> str:
    if not summary.best(AXES[0]):
        return ""
    parts = [
        f"<h2>Best and worst</h2><p class=faint>Players have the first {players.seconds:g} s of a clip, as scoring "
        "hears it unless told otherwise: the mean of its channels, at 16 kHz.</p>"
    ]
    for axis in AXES:
        lists = "".join(
            f"<div><h3>{end} {axis} <small>{AXIS_NAMES[axis]}</small></h3>"
            f"<ol>{''.join(_clip(row, axis, players) for row in rows)}</ol></div>"
            for end, rows in (("Highest", summary.best(axis)), ("Lowest", summary.worst(axis)))
        )
        parts.append(f"<div class=two style='margin-bottom:2rem'>{lists}</div>")
    return "".join(parts)


def _clip(row: Mapping[str, Any], axis: str, players: Players) -> str:
    name = clip_name(row)
    shown = name if len(name) <= _LONGEST_NAME else "\u2026" + name[1 - _LONGEST_NAME :]
    about = [" ".join(f"{other}&nbsp;{row[other]:.2f}" for other in AXES if other != axis), f"{row['seconds']:.1f} s"]
    if row.get("truncated"):
        about.append("truncated")
    if row.get("silence"):
        about.append(f"{text(str(row['silence']))} silence")
    told = f"<span title='{text(name)}'>{text(shown)}</span><br><small>{', '.join(about)}</small>"
    score = f"<b style='color:var(--{axis})'>{row[axis]:.2f}</b>"
    return f"<li>{score}<div>{told}{players.player(row)}</div></li>"


def _audio(summary: Summary) -> str:
    durations, _ = np.histogram(summary.seconds, bins=_DURATIONS)
    tables = [
        _counted("seconds scored", zip(_DURATION_NAMES, durations.tolist(), strict=True)),
        _counted("sample rate", ((f"{rate:,} Hz", count) for rate, count in sorted(summary.sample_rates.items()))),
        _counted("channels", ((str(channels), count) for channels, count in sorted(summary.channels.items()))),
    ]
    return f"<h2>The audio</h2><div class=three>{''.join(tables)}</div>"


def _counted(head: str, rows: Iterable[tuple[str, int]]) -> str:
    """Counts with bars; nothing where there is nothing to count."""
    counts = [(name, count) for name, count in rows if count]
    if not counts:
        return ""
    most = max(count for _, count in counts)
    body = "".join(
        f"<tr><td>{name}</td><td>{count:,}</td><td class=bar><i style='width:{count / most:.1%}'></i></td></tr>"
        for name, count in counts
    )
    return f"<table><tr><th>{head}</th><th>clips</th><th></th></tr>{body}</table>"


def _errors(summary: Summary) -> str:
    body = "".join(
        f"<tr><td><b>{text(code)}</b><br><small>{text(CLIP_ERROR_CODES.get(code, ''))}</small></td><td>{count:,}</td>"
        f"<td class=examples>{'<br>'.join(text(clip_name(row)) for row in summary.error_examples[code])}</td></tr>"
        for code, count in summary.errors.most_common()
    )
    head = "<tr><th>code</th><th>rows</th><th class=left>for instance</th></tr>"
    return f"<h2>Errors</h2><div class=wide><table>{head}{body}</table></div>"
