"""Are these the checkpoint's scores? Engines against PyTorch in FP32, window by window on real audio."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from aesanet.axes import AXES
from aesanet.bundle import GRAPH_NAMES, AxisParity, Verification
from aesanet.errors import ClipError, InputError
from aesanet.export.half import session_as_written
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy, num_tokens
from aesanet.metrics import rank_metrics
from aesanet.models.aesanet import AESANet
from aesanet.runtime.backends.base import Backend, BundleFiles, Precision
from aesanet.runtime.decode import ClipReader
from aesanet.runtime.rows import Row
from aesanet.runtime.windows import pad_batch, split_windows

LIMITS: Final[dict[Precision, float]] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.02}
"""The largest difference of a score from PyTorch's, on the scale of 0-10."""
SRCC_LIMIT: Final = 0.9995
SRCC_FROM: Final = 30
"""Windows from which SRCC is held to its limit: of fewer, one swap of neighbours takes it below."""

# An engine's front end is rounded to FP32 in an order of its own, and may move a score as PyTorch's own rounding does.
_ROUNDINGS: Final = 4

_BATCH: Final = 8
_NUM_MATES: Final = 3  # beside a window that is scored at the edge of a profile


@dataclass(frozen=True)
class Window:
    """A window of a clip: what the network scores. `samples` are float32 [samples], 16 kHz."""

    name: str
    samples: np.ndarray


@dataclass(frozen=True)
class Reference:
    """PyTorch's scores, FP32 and eager, each window alone and unpadded: float64 [windows, 4].

    `rounding` float64 [windows] is by how much a score changes with a front end in float64.
    """

    windows: Sequence[Window]
    scores: np.ndarray
    rounding: np.ndarray


def read_windows(rows: Iterable[Row], policy: WindowPolicy) -> Iterator[Window]:
    """All windows of all clips that a network can see; raises InputError for a clip that cannot be read."""
    for row in rows:
        try:
            clip = row.clip()
            for number, samples in enumerate(split_windows(ClipReader(clip), policy)):
                if len(samples) >= MIN_SAMPLES:
                    yield Window(f"{clip.path}, window {number + 1}", samples)
        except ClipError as error:
            raise InputError(
                f"{row.given.get('path')}: {error.message}; what is verified on must be readable"
            ) from None


def reference_scores(model: AESANet, windows: Sequence[Window]) -> Reference:
    """Score every window with PyTorch, as it is and with a front end in float64."""
    exact_frontend = copy.deepcopy(model.frontend).double()
    scores, rounding = [], []
    with torch.inference_mode():
        for window in windows:
            waveform, tokens = torch.from_numpy(window.samples)[None], torch.tensor([num_tokens(len(window.samples))])
            own, exact = (
                model.head(model.encoder(fbank, tokens), tokens)[0].double().numpy()
                for fbank in (model.frontend(waveform), exact_frontend(waveform.double()).float())
            )
            scores.append(own)
            rounding.append(np.abs(own - exact).max())
    return Reference(windows, np.array(scores), np.array(rounding))


def verify(backend: Backend, precision: Precision, reference: Reference) -> tuple[Verification, np.ndarray]:
    """Hold an engine to the reference; returns its scores of each window alone too, float64 [windows, 4]."""
    windows = [window.samples for window in reference.windows]
    alone, again = (np.concatenate([_score(backend, [window]) for window in windows]) for _ in range(2))
    batch = np.max([np.abs(found - alone[number]).max() for number, found in _among_others(backend, windows)])
    repeat = float(np.abs(again - alone).max())
    limit = LIMITS[precision]
    axes = {axis: _axis(reference.scores[:, column], alone[:, column], limit) for column, axis in enumerate(AXES)}
    return (
        Verification(
            engine=backend.name,
            windows=len(windows),
            seconds=sum(map(len, windows)) / SAMPLE_RATE,
            axes=axes,
            reference_rounding=float(reference.rounding.max()),
            batch_max_abs=_number(batch),
            repeat_max_abs=_number(repeat),
            limit=limit,
            failures=tuple(_failures(reference, alone, axes, limit, float(batch), repeat)),
        ),
        alone,
    )


def allowed(reference: Reference, limit: float) -> np.ndarray:
    """The limit of each window, float64 [windows]: wider where FP32 in the front end moves PyTorch's own score."""
    return np.asarray(limit + _ROUNDINGS * reference.rounding)


def _failures(
    reference: Reference, found: np.ndarray, axes: dict[str, AxisParity], limit: float, batch: float, repeat: float
) -> Iterator[str]:
    """What is wrong, in words; the first says most."""
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        yield (
            f"{(~finite).sum()} of {len(found)} windows have scores that are no numbers, as where FP16 overflows; "
            "--layers says where"
        )
        return
    limits = allowed(reference, limit)[:, None]
    differences = np.abs(found - reference.scores)
    if (differences > limits).any():
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
        for axis, parity in axes.items():
            if parity.srcc is not None and parity.srcc < SRCC_LIMIT:
                yield f"{axis} ranks the windows otherwise: SRCC {parity.srcc:.4f}, limit {SRCC_LIMIT}"
    for value, what in ((batch, "with what else is in its batch"), (repeat, "when it is scored again")):
        if not value <= limit:
            yield f"a window's scores change by {value:.1e} {what} (limit {limit:.0e})"


def _axis(expected: np.ndarray, found: np.ndarray, limit: float) -> AxisParity:
    differences = np.abs(found - expected)
    finite = np.isfinite(found)
    metrics = rank_metrics(expected[finite], found[finite]) if finite.any() else None
    told_apart = np.triu(np.abs(expected[:, None] - expected) > limit)
    swapped = told_apart & ((expected[:, None] - expected) * (found[:, None] - found) < 0)
    return AxisParity(
        max_abs=_number(differences.max()),
        mean_abs=_number(differences.mean()),
        p99_abs=_number(np.percentile(differences, 99)),
        srcc=metrics.srcc if metrics else None,
        ktau=metrics.ktau if metrics else None,
        swapped_pairs=int(swapped.sum()),
    )


def _number(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if np.isfinite(value) else None


def _among_others(backend: Backend, windows: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and scores of windows that are scored together: in mixed batches, and at the edges of each profile."""
    order = np.random.default_rng(0).permutation(len(windows))
    for start in range(0, len(order), _BATCH):
        numbers = order[start : start + _BATCH]
        yield from zip(numbers, _score(backend, [windows[number] for number in numbers]), strict=True)
    longest = max(windows, key=len)
    shortest = min(range(len(windows)), key=lambda number: len(windows[number]))
    for samples in _edges(backend, len(longest)):
        mates = [np.resize(longest, samples)] * _NUM_MATES
        if len(windows[shortest]) <= samples:
            yield shortest, _score(backend, [windows[shortest], *mates])[0]


def _edges(backend: Backend, longest: int) -> list[int]:
    """Lengths at which an engine changes its profile; of engines without, the ends of what it takes."""
    profiles = getattr(backend, "profiles", ())
    ends = {length for profile in profiles for length in (profile.min_samples, profile.max_samples)}
    return sorted({*ends, *(length + 1 for length in ends if length < longest)} or {MIN_SAMPLES, longest})


def _score(backend: Backend, windows: Sequence[np.ndarray]) -> np.ndarray:
    return backend.scores(*pad_batch(windows)).astype(np.float64)


class RoundedHalf(Backend):
    """FP16 graphs on a processor, in ONNX Runtime, with every half tensor rounded as a GPU rounds it."""

    kind = "onnxruntime cpu fp16"

    def __init__(self, files: BundleFiles) -> None:
        self.name = f"onnxruntime {onnxruntime.__version__} cpu fp16, every half tensor rounded"
        graphs = {**files.fp32, **files.fp16}
        self._sessions = [session_as_written(ir.load(graphs[name])) for name in GRAPH_NAMES]

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        tokens = num_tokens(num_samples)
        frontend, encoder, head = self._sessions
        (fbank,) = frontend.run(["fbank"], {"waveform": waveform})
        (features,) = encoder.run(["features"], {"fbank": fbank, "num_tokens": tokens})
        (scores,) = head.run(["scores"], {"features": features, "num_tokens": tokens})
        return np.asarray(scores)
