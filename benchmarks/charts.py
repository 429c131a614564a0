"""Charts as inline SVG in a page's own colours, so that they are right in light and in dark."""

import numpy as np

from aesanet.axes import AXES

_BINS = 50
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 460, 190, 12, 24  # of a histogram, in its own units
_CELL, _GAP, _PAIR_BINS, _SHADES = 150, 10, 30, 6  # of the matrix of pairs
_NICE_SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def score_range(scores: np.ndarray) -> tuple[float, float]:
    """What all charts of scores [clips, 4] span: 0 to 10, or whole numbers around what lies outside."""
    return min(0.0, float(np.floor(scores.min()))), max(10.0, float(np.ceil(scores.max())))


def histogram(values: np.ndarray, span: tuple[float, float], axis: str) -> str:
    """Scores of one axis, float64 [clips], with their median, as SVG; each bar tells its count when pointed at."""
    counts, edges = np.histogram(values, bins=_BINS, range=span)
    peak, floor = int(counts.max()), _HEIGHT - _BOTTOM
    step = _WIDTH / _BINS

    def x(value: float) -> float:
        return (value - span[0]) / (span[1] - span[0]) * _WIDTH

    def y(count: float) -> float:
        return floor - count / peak * (floor - _TOP)

    bars = "".join(
        f"<rect x='{i * step + 0.5:.1f}' y='{y(count):.1f}' width='{step - 1:.1f}' height='{floor - y(count):.1f}'>"
        f"<title>{edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,} clips ({count / len(values):.1%})</title></rect>"
        for i, count in enumerate(counts)
        if count
    )
    ticks = np.linspace(*span, 6)
    labels = "".join(
        f"<text x='{x(tick):.1f}' y='{_HEIGHT - 6}' {_anchor(tick, span)}>{tick:g}</text>" for tick in ticks
    )
    share = next((nice for nice in _NICE_SHARES if nice * len(values) <= peak), 0.0)
    grid = y(share * len(values))
    median = x(float(np.median(values)))
    return (
        f"<svg class=chart viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='Histogram of {axis}'>"
        f"<line class=grid x1='0' x2='{_WIDTH}' y1='{grid:.1f}' y2='{grid:.1f}'/>"
        f"<g fill='var(--{axis})'>{bars}</g><text x='0' y='{grid - 4:.1f}'>{share:.0%} of clips</text>"
        f"<line class=axis x1='0' x2='{_WIDTH}' y1='{floor}' y2='{floor}'/>{labels}"
        f"<line class=median x1='{median:.1f}' x2='{median:.1f}' y1='{_TOP - 8}' y2='{floor}'/></svg>"
    )


def pairs(scores: np.ndarray, span: tuple[float, float], srcc: np.ndarray, pearson: np.ndarray) -> str:
    """How axes go together, as SVG: densities of scores [clips, 4] below the diagonal, correlations [4, 4] above."""
    size = len(AXES) * (_CELL + _GAP) - _GAP
    cells = []
    for row, vertical in enumerate(AXES):
        for column, horizontal in enumerate(AXES):
            left, top = column * (_CELL + _GAP), row * (_CELL + _GAP)
            if row == column:
                inside = f"<text class=name {_below(8)} style='fill:var(--{vertical})'>{vertical}</text>"
            elif row > column:
                inside = _density(scores[:, column], scores[:, row], span)
                inside += f"<title>{vertical} (upwards) against {horizontal}</title>"
            else:
                inside = _told(srcc[row, column], pearson[row, column])
            cells.append(
                f"<g transform='translate({left} {top})'>"
                f"<rect class=cell width='{_CELL}' height='{_CELL}' rx='6'/>{inside}</g>"
            )
    return f"<svg class=pairs viewBox='0 0 {size} {size}' role=img aria-label='Pairs of axes'>{''.join(cells)}</svg>"


def _density(across: np.ndarray, upwards: np.ndarray, span: tuple[float, float]) -> str:
    """Squares in shades of how many clips are in them, on a scale of logarithms: one path for each shade."""
    counts, _, _ = np.histogram2d(across, upwards, bins=_PAIR_BINS, range=(span, span))
    depth = np.log1p(counts) / np.log1p(counts.max())
    shades = np.ceil(depth * _SHADES).astype(int)
    paths = []
    for shade in range(1, _SHADES + 1):
        squares = "".join(f"M{i} {_PAIR_BINS - 1 - j}h1v1h-1z" for i, j in np.argwhere(shades == shade))
        paths.append(f"<path d='{squares}' fill-opacity='{shade / _SHADES:.2f}'/>" if squares else "")
    return f"<g class=density transform='scale({_CELL / _PAIR_BINS})'>{''.join(paths)}</g>"


def _told(srcc: float, pearson: float) -> str:
    if np.isnan(srcc):
        return f"<text class=pearson {_below(5)}>no spread</text>"
    return (
        f"<rect class=strength width='{_CELL}' height='{_CELL}' rx='6' fill-opacity='{abs(srcc) * 0.35:.3f}'/>"
        f"<text class=srcc {_below(4)}>{srcc:.2f}</text>"
        f"<text class=pearson {_below(26)}>Pearson {pearson:.2f}</text>"
    )


def _below(units: int) -> str:
    """A place so far below the centre of a cell."""
    return f"x='{_CELL / 2:g}' y='{_CELL / 2 + units:g}'"


def _anchor(tick: float, span: tuple[float, float]) -> str:
    """Labels at both ends stay inside the picture."""
    return f"text-anchor={'start' if tick == span[0] else 'end' if tick == span[1] else 'middle'}"
