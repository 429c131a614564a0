"""Labels of the demo corpus: what full-reference metrics and the making of each clip say about it.

PQ is the mean rank of ViSQOL and Zimtohrli among training clips (of speech, or of all else), on a scale of 1 to 9,
made to fall with severity within a ladder. PC is 2 * layers - 1 of speech and of mixes, and unknown for music and
effects, whose layers nobody counted.
CE and CU are stand-ins, so that four axes have labels, and say nothing of enjoyment or use.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import soxr
from scipy.optimize import isotonic_regression

from aesanet.lengths import SAMPLE_RATE
from aesanet.training.demo.plan import DemoClip
from aesanet.training.demo.render import Reference, active_share, render

LEAST_STEP: Final = 0.2
"""PQ falls by at least this much a level: where both metrics see no difference, as in strong low-pass, there is one."""

METRIC_RATE: Final = 48_000  # Hz, of Zimtohrli and of ViSQOL for anything but speech


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the metrics gave for one clip against its undamaged self, each on its own scale up to 5."""

    id: str
    visqol: float
    zimtohrli: float
    active: float
    """Share of 20 ms frames within 30 dB of the clip's RMS."""


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of a clip on the 0-10 scale, None where there is none."""

    id: str
    CE: float | None = None
    CU: float | None = None
    PC: float | None = None
    PQ: float | None = None

    @property
    def scores(self) -> tuple[float, float, float, float]:
        """In the order CE, CU, PC, PQ, nan for none."""
        ce, cu, pc, pq = (math.nan if score is None else score for score in (self.CE, self.CU, self.PC, self.PQ))
        return ce, cu, pc, pq


def measure(
    folder: Path, references: Mapping[str, Reference], clips: Sequence[DemoClip], processes: int
) -> list[Measured]:
    """Both metrics for every clip; about a third of a second each."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(partial(_measure_one, folder, references), clips, chunksize=16))


def label(clips: Sequence[DemoClip], measured: Sequence[Measured]) -> list[Label]:
    """Ranks are those among the training clips; clips of other splits are placed between them."""
    quality = _quality(clips, {m.id: m for m in measured})
    labels = []
    for clip, m in zip(clips, measured, strict=True):
        pq = quality[clip.id]
        pc = 2.0 * clip.layers - 1 if clip.kind in ("speech", "mix") else None
        ce = pq if pc is None else 0.7 * pq + 0.3 * pc
        labels.append(Label(id=clip.id, CE=round(ce, 3), CU=round(pq * m.active, 3), PC=pc, PQ=round(pq, 3)))
    return labels


def _measure_one(folder: Path, references: Mapping[str, Reference], clip: DemoClip) -> Measured:
    x = render(folder, references, clip.references, clip.degradation, clip.level)
    speech = clip.kind == "speech"
    if clip.degradation:
        visqol, zimtohrli = _metrics(render(folder, references, clip.references), x, speech)
    else:
        visqol, zimtohrli = _metrics_of_the_undamaged(speech)
    return Measured(
        id=clip.id, visqol=round(visqol, 4), zimtohrli=round(zimtohrli, 4), active=round(active_share(x), 3)
    )


@cache
def _metrics_of_the_undamaged(speech: bool) -> tuple[float, float]:
    """Of any sound against itself, which is the same for all sounds."""
    any_sound = np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE) * 0.05
    return _metrics(any_sound, any_sound, speech)


def _metrics(clean: np.ndarray, damaged: np.ndarray, speech: bool) -> tuple[float, float]:
    # Imported here, as only those who make labels anew have them.
    import zimtohrli

    full_rate = [soxr.resample(x, SAMPLE_RATE, METRIC_RATE) for x in (clean, damaged)]
    visqol_rate, (a, b) = (SAMPLE_RATE, (clean, damaged)) if speech else (METRIC_RATE, full_rate)
    visqol = _visqol(speech).measure_from_arrays(a, b, visqol_rate).moslqo
    return float(visqol), float(zimtohrli.mos_from_signals(*full_rate))


@cache
def _visqol(speech: bool):  # type: ignore[no-untyped-def]  # visqol is not always installed
    from visqol import VisqolApi

    api = VisqolApi()
    # All damage keeps the time line, so nothing need be aligned.
    api.create(
        mode="speech" if speech else "audio",
        use_lattice_model=False,
        search_window=2,
        disable_global_alignment=True,
        disable_realignment=True,
    )
    return api


def _quality(clips: Sequence[DemoClip], measured: Mapping[str, Measured]) -> dict[str, float]:
    """PQ of every clip by its id."""
    quality: dict[str, float] = {}
    for speech in (True, False):
        same = [clip for clip in clips if (clip.kind == "speech") == speech]
        # Mixes are placed among music and effects, as half of them are undamaged and would move all other ranks.
        ranked = np.array([clip.split == "train" and clip.kind != "mix" for clip in same], bool)
        shares = []
        for metric in ("visqol", "zimtohrli"):
            values = np.array([getattr(measured[clip.id], metric) for clip in same])
            trained = np.sort(values[ranked])
            # The middle of the places that a value could take among its equals.
            places = np.searchsorted(trained, values, "left") + np.searchsorted(trained, values, "right")
            shares.append(places / (2 * max(1, len(trained))))
        for clip, share in zip(same, np.mean(shares, axis=0), strict=True):
            quality[clip.id] = float(1 + 8 * share)
    ladders: dict[str, list[DemoClip]] = defaultdict(list)
    for clip in clips:
        if clip.level and clip.kind != "mix":
            ladders[clip.ladder].append(clip)
    for steps in ladders.values():
        # A better rank at a worse level is the metrics' error: severity is known.
        falling = isotonic_regression([quality[clip.id] for clip in steps], increasing=False).x
        above = quality[steps[0].references[0]]
        for clip, value in zip(steps, falling, strict=True):
            above = quality[clip.id] = min(float(value), above - LEAST_STEP)
    return quality
