"""Calibration: one straight line an axis, fitted to human labels, that moves scores and never changes their order."""

from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from aesanet.axes import AXES, AXIS_NAMES
from aesanet.errors import InputError
from aesanet.files import replacing
from aesanet.models.checkpoint import rewrite_config
from aesanet.models.config import AESANetConfig, Affine, Calibration

MIN_CLIPS: Final = 10  # with fewer, a line follows their raters' whims


def fit_calibration(true: np.ndarray, scores: np.ndarray) -> Calibration:
    """The least-squares `scale * score + offset` of each axis.

    true   : human scores, float64 [clips, 4], order CE, CU, PC, PQ; nan where a clip has no label on an axis
    scores : what the checkpoint gave the same clips, float64 [clips, 4]

    An axis without any label stays as it is. Raises InputError where one has fewer than 10 labelled clips, labels or
    scores that are all the same, or scores that fall as the labels rise.
    """
    return Calibration(**{axis: _fit(axis, true[:, a], scores[:, a]) for a, axis in enumerate(AXES)})


def _fit(axis: str, true: np.ndarray, scores: np.ndarray) -> Affine:
    name = f"{axis} ({AXIS_NAMES[axis]})"
    labelled = ~np.isnan(true)
    true, scores = true[labelled], scores[labelled]
    if not len(true):
        return Affine()
    if len(true) < MIN_CLIPS:
        raise InputError(f"{name}: {len(true)} clips have a label; a calibration needs {MIN_CLIPS} or more, or none")
    for what, values in (("labels", true), ("scores", scores)):
        if (values == values[0]).all():
            raise InputError(f"{name}: all {len(values)} {what} are {values[0]:g}; a line needs two that differ")
    deviations = scores - scores.mean()
    scale = float(deviations @ (true - true.mean()) / (deviations @ deviations))
    if not scale > 0:
        raise InputError(
            f"{name}: the best line has the slope {scale:.3g}, so this checkpoint ranks clips the wrong way; a slope "
            "must be above 0, or the order would change. Are these the labels of the scored clips? Else train anew"
        )
    return Affine(scale=scale, offset=float(true.mean() - scale * scores.mean()))


def apply_calibration(calibration: Calibration, scores: np.ndarray) -> np.ndarray:
    """Calibrated scores, float64 [clips, 4], of scores [clips, 4]."""
    affine = [getattr(calibration, axis) for axis in AXES]
    moved: np.ndarray = scores * [a.scale for a in affine] + [a.offset for a in affine]
    return moved


def calibrate_checkpoint(checkpoint: str | Path, out: str | Path, calibration: Calibration) -> None:
    """Write the `.safetensors` at `checkpoint` to `out`, calibrated further; nothing else in it changes.

    The calibration is one of the checkpoint's own scores, so the new line is applied after the one in its config. The
    checkpoint may be the head alone; the BEATs file is not needed. `out` is there whole or not at all.

    Raises InputError where `out` is no new `.safetensors` or cannot be written, CheckpointError for a checkpoint that
    is no readable `.safetensors`.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: its suffix is {out.suffix!r}; a checkpoint is known by .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"{out}: {out.parent} is no folder; make it first")
    if out.exists():
        raise InputError(
            f"{out}: exists; give another name (a checkpoint calibrated twice by the same scores is wrong)"
        )

    def change(config: AESANetConfig) -> AESANetConfig:
        old = config.head.calibration
        both = {axis: _after(getattr(calibration, axis), getattr(old, axis)) for axis in AXES}
        head = msgspec.structs.replace(config.head, calibration=Calibration(**both))
        return msgspec.structs.replace(config, head=head)

    try:
        with replacing(out) as beside:
            rewrite_config(checkpoint, beside, change)
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None


def _after(new: Affine, old: Affine) -> Affine:
    """new(old(score)) as one line."""
    return Affine(scale=new.scale * old.scale, offset=new.scale * old.offset + new.offset)
