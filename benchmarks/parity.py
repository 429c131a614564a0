"""Are these the checkpoint's scores? Engines against PyTorch in FP32, window by window on real audio."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Final

import numpy as np

from aesanet.axes import AXES
from aesanet.benchmarks.reference import Reference
from aesanet.bundle import AxisParity, Manifest, Verification, graph_hashes
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE
from aesanet.limits import SCORES_LIMIT
from aesanet.metrics import rank_metrics
from aesanet.padding import pad_batch
from aesanet.runtime.backends.base import Backend, Precision

SRCC_LIMIT: Final = 0.9995
SRCC_FROM: Final = 100
SRCC_SPREAD: Final = 50
"""SRCC is held to its limit from so many windows on whose scores have a standard deviation of so many limits: of fewer,
and of windows that sound alike, differences within the limit take it below."""

# An engine's front end rounds to FP32 in ways of its own, and may move a score as much as these roundings do.
_ROUNDINGS: Final = 2
_MOST_ROUNDING: Final = 0.02

_PAIRS_AT_ONCE: Final = 512  # rows of the table of all pairs of windows


def verify(backend: Backend, manifest: Manifest, reference: Reference) -> tuple[Verification, np.ndarray]:
    """Hold an engine to the reference; returns its scores of each window alone too, float64 [windows, 4].

    An engine that cannot score what it is given fails, with its own words.
    """
    windows = [window.samples for window in reference.windows]
    limit = SCORES_LIMIT[backend.precision]
    alone = np.full(reference.scores.shape, np.nan)
    limits = allowed(reference, limit)
    moved = [(np.nan, limit)]  # of each window among others: by how much, and how much is allowed
    repeat = np.nan
    raised = None
    try:
        alone, again = (np.concatenate([_score(backend, [window]) for window in windows]) for _ in range(2))
        repeat = np.abs(again - alone).max()
        # FP32 itself is as uncertain about a window alone as among others.
        both = 2 * limits - limit
        moved = [(float(change), float(both[place])) for place, change in _among_others(backend, windows)]
    except Exception as error:  # engines raise what they like
        raised = f"it cannot score what it is given: {error}"
    axes = {axis: _axis(reference.scores[:, column], alone[:, column], limit) for column, axis in enumerate(AXES)}
    failures = (raised,) if raised else tuple(_failures(reference, alone, axes, limit, [*moved, (repeat, limit)]))
    worst = (np.abs(alone - reference.scores).max(axis=1) / limits).max()
    result = Verification(
        engine=backend.name,
        graphs=graph_hashes(manifest, backend.form),
        windows=len(windows),
        seconds=sum(map(len, windows)) / SAMPLE_RATE,
        axes=axes,
        reference_rounding=float(reference.rounding.max()),
        worst_of_limit=_number(worst),
        batch_max_abs=_number(np.max([change for change, _ in moved])),
        repeat_max_abs=_number(repeat),
        limit=limit,
        failures=failures,
    )
    return result, alone


def not_opened(kind: str, manifest: Manifest, precision: Precision, reason: str) -> Verification:
    """What is kept of an engine that should run here and cannot load the bundle."""
    return Verification(
        engine=kind,
        graphs=graph_hashes(manifest, "fp16" if precision == "fp16" else "fp32"),
        windows=0,
        seconds=0.0,
        axes={},
        reference_rounding=0.0,
        worst_of_limit=None,
        batch_max_abs=None,
        repeat_max_abs=None,
        limit=SCORES_LIMIT[precision],
        failures=(f"it cannot load the bundle: {reason}",),
    )


def allowed(reference: Reference, limit: float) -> np.ndarray:
    """The limit of each window, float64 [windows]: wider where FP32 in a front end moves PyTorch's own score."""
    return np.asarray(limit + np.minimum(_ROUNDINGS * reference.rounding, _MOST_ROUNDING))


def _failures(
    reference: Reference,
    found: np.ndarray,
    axes: dict[str, AxisParity],
    limit: float,
    moved: Sequence[tuple[float, float]],
) -> Iterator[str]:
    """What is wrong, in words; the first says most.

    moved : changes of a window's scores, each with what is allowed: among others, and last when it is scored again
    """
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        yield (
            f"{(~finite).sum()} of {len(found)} windows have scores that are no numbers, as where FP16 overflows; "
            "--layers says where"
        )
        return
    limits = allowed(reference, limit)[:, None]
    differences = np.abs(found - reference.scores)
    if not (differences <= limits).all():
        for order in permutations(range(len(AXES))):
            if (np.abs(found[:, order] - reference.scores) <= limits).all():
                axes_found = ", ".join(AXES[order.index(column)] for column in range(len(AXES)))
                yield f"the axes are in another order: where {', '.join(AXES)} should be are {axes_found}"
                return
        row, column = np.unravel_index((differences - limits).argmax(), differences.shape)
        yield (
            f"{AXES[column]} is {found[row, column]:.4f} and not {reference.scores[row, column]:.4f} for "
            f"{reference.windows[row].name} (limit {limits[row, 0]:.1e}); --layers says where it begins"
        )
    if len(found) >= SRCC_FROM:
        spread = reference.scores.std(axis=0) >= SRCC_SPREAD * limit
        for (axis, parity), judged in zip(axes.items(), spread, strict=True):
            if judged and parity.srcc is not None and parity.srcc < SRCC_LIMIT:
                yield f"{axis} ranks the windows otherwise: SRCC {parity.srcc:.4f}, limit {SRCC_LIMIT}"
    *among_others, again = moved
    worst = max(among_others, key=lambda change: np.nan_to_num(change[0] / change[1], nan=np.inf))
    for (change, most), what in ((worst, "with what else is in its batch"), (again, "when it is scored again")):
        if not change <= most:
            yield f"a window's scores change by {change:.1e} {what} (limit {most:.1e})"


def _axis(expected: np.ndarray, found: np.ndarray, limit: float) -> AxisParity:
    differences = np.abs(found - expected)
    finite = np.isfinite(found)
    metrics = rank_metrics(expected[finite], found[finite]) if finite.any() else None
    swapped = 0
    for start in range(0, len(expected), _PAIRS_AT_ONCE):
        rows = slice(start, start + _PAIRS_AT_ONCE)
        theirs, ours = expected[rows, None] - expected[start:], found[rows, None] - found[start:]
        swapped += int(np.triu((np.abs(theirs) > limit) & (theirs * ours < 0)).sum())
    return AxisParity(
        max_abs=_number(differences.max()),
        mean_abs=_number(differences.mean()),
        p99_abs=_number(np.percentile(differences, 99)),
        srcc=metrics.srcc if metrics else None,
        ktau=metrics.ktau if metrics else None,
        swapped_pairs=swapped,
    )


def _number(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if np.isfinite(value) else None


def _among_others(backend: Backend, windows: Sequence[np.ndarray]) -> Iterator[tuple[int, float]]:
    """By how much a window's scores change in batches with shorter, longer, other ones, and at profiles' edges.

    Which window, and the largest change on any axis.
    """
    rng = np.random.default_rng(0)
    longest = max(map(len, windows))
    for number, window in enumerate(windows):
        other = windows[number - 1]
        noise = rng.normal(0, 0.1, longest).astype(np.float32)
        mates = [other[::-1], other[: max(MIN_SAMPLES, len(other) // 2)], noise[:MIN_SAMPLES], noise]
        yield number, _in_company(backend, window, mates, number % len(mates))
    profiles = getattr(backend, "profiles", ())
    rows = {length: p.max_batch for p in profiles for length in (p.min_samples, p.max_samples)}
    for samples in _edges(backend, longest):
        mates = [np.resize(rng.normal(0, 0.1, longest).astype(np.float32), samples)] * (rows.get(samples, 4) - 1)
        shortest = min(range(len(windows)), key=lambda number: len(windows[number]))
        yield shortest, _in_company(backend, windows[shortest][:samples], mates, len(mates) // 2)


def _in_company(backend: Backend, window: np.ndarray, mates: list[np.ndarray], row: int) -> float:
    batch = [*mates[:row], window, *mates[row:]]
    return float(np.abs(_score(backend, batch)[row] - _score(backend, [window])[0]).max())


def _edges(backend: Backend, longest: int) -> list[int]:
    """Lengths at which an engine changes its profile; of engines without, the ends of what it takes."""
    profiles = getattr(backend, "profiles", ())
    ends = {length for profile in profiles for length in (profile.min_samples, profile.max_samples)}
    return sorted({*ends, *(length + 1 for length in ends if length < longest)} or {MIN_SAMPLES, longest})


def _score(backend: Backend, windows: Sequence[np.ndarray]) -> np.ndarray:
    return backend.scores(*pad_batch(windows)).astype(np.float64)
