"""What engines are held to: PyTorch's scores in FP32, window by window on real audio."""

import copy
import errno
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch

from aesanet.errors import ClipError, InputError
from aesanet.lengths import MIN_SAMPLES, WindowPolicy, num_tokens
from aesanet.models.aesanet import AESANet
from aesanet.models.fbank import FrontEnd
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Row
from aesanet.runtime.windows import split_windows
from aesanet.words import printable

# Coefficients of a filterbank in FP32 are off by up to 2^-24 of themselves, 2^-24 / sqrt(3) in the mean of squares.
_COEFFICIENT_ERROR: Final = 2.0**-25
_DRAWS: Final = 3


@dataclass(frozen=True)
class Window:
    """A window of a clip: what the network scores. `samples` are float32 [samples], 16 kHz."""

    name: str
    samples: np.ndarray


@dataclass(frozen=True)
class Reference:
    """PyTorch's scores, FP32 and eager, each window alone and unpadded: float64 [windows, 4].

    `rounding` float64 [windows] is how far FP32 in a front end moves a score (see docs/verify.md).
    """

    windows: Sequence[Window]
    scores: np.ndarray
    rounding: np.ndarray


def read_windows(rows: Iterable[Row], policy: WindowPolicy) -> list[Window]:
    """All windows of all clips that a network can see; raises InputError for a clip that cannot be read.

    Their samples lie in a file that is gone with them, and in memory only as long as the system has room to spare.
    """
    names, lengths = [], []
    with _room_told(), tempfile.TemporaryFile() as file:
        for row in rows:
            for name, samples in _windows_of(row, policy):
                file.write(samples.tobytes())
                names.append(name)
                lengths.append(len(samples))
        file.flush()
        # Writable, as PyTorch wants arrays to be; nobody writes.
        audio: np.ndarray = np.memmap(file, np.float32, "r+") if lengths else np.empty(0, np.float32)
    return [Window(name, part) for name, part in zip(names, np.split(audio, np.cumsum(lengths)[:-1]), strict=False)]


@contextmanager
def _room_told() -> Iterator[None]:
    """A full disk is told as that of temporary files, as nothing else is written meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{tempfile.gettempdir()}: the audio cannot be kept there: {error.strerror}; TMPDIR names another place"
        ) from None


def _windows_of(row: Row, policy: WindowPolicy) -> Iterator[tuple[str, np.ndarray]]:
    try:
        clip = row.clip()
        for number, samples in enumerate(split_windows(clip_blocks(clip), policy)):
            if len(samples) >= MIN_SAMPLES:
                yield printable(f"{clip.path}, window {number + 1}"), samples
    except ClipError as error:
        raise InputError(f"{row.given.get('path')}: {error.message}; what is verified on must be readable") from None


def reference_scores(model: AESANet, windows: Sequence[Window]) -> Reference:
    """Score every window with PyTorch: as it is, with a front end in float64, and with some that are slightly off."""
    frontend = cast(FrontEnd, model.frontend)
    exact = copy.deepcopy(frontend).double()
    rounded = [frontend, *(_rounded(exact, seed) for seed in range(_DRAWS))]
    scores, rounding = [], []
    with torch.inference_mode():
        for window in windows:
            waveform, tokens = torch.from_numpy(window.samples)[None], torch.tensor([num_tokens(len(window.samples))])
            fbanks = [exact(waveform.double()), *(f(waveform.to(f.fbank.basis.dtype)) for f in rounded)]
            best, own, *others = (
                model.head(model.encoder(fbank.float(), tokens), tokens)[0].double().numpy() for fbank in fbanks
            )
            if not np.isfinite([best, own, *others]).all():
                raise InputError(f"{window.name}: the checkpoint itself gives {own.tolist()} in PyTorch")
            scores.append(own)
            rounding.append(max(np.abs(found - best).max() for found in (own, *others)))
    return Reference(windows, np.array(scores), np.array(rounding))


def _rounded(frontend: FrontEnd, seed: int) -> FrontEnd:
    """A front end in float64 whose coefficients are off as FP32 has them."""
    off = copy.deepcopy(frontend)
    generator = torch.Generator().manual_seed(seed)
    basis = off.fbank.basis
    basis.mul_(1 + _COEFFICIENT_ERROR * torch.randn(basis.shape, generator=generator, dtype=basis.dtype))
    return off
