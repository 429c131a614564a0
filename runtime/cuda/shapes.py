"""Which shape a batch is run in: one of a coarse grid, so that shapes come again and their CUDA graphs can be used.

Padding changes no score: a clip's tokens are counted, and what lies behind them is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from aesanet.errors import BackendError
from aesanet.lengths import HOP_SAMPLES, MIN_SAMPLES, PATCH_SIZE, SAMPLE_RATE

CAPTURED_SAMPLES: Final = 160 * SAMPLE_RATE
"""Of a batch, that are worth a CUDA graph of front end and encoder: with more, running kernels takes longer."""

GRAPHS_KEPT: Final = 32
"""CUDA graphs of each ONNX graph, that an engine keeps."""

_PATCH_SAMPLES: Final = PATCH_SIZE * HOP_SAMPLES
_EXACT_BATCH: Final = 16


@dataclass(frozen=True)
class Profile:
    """The batches that one profile of an engine takes: so many clips of so many samples each."""

    index: int
    min_samples: int
    max_samples: int
    min_batch: int
    max_batch: int

    def padded(self, batch: int, samples: int) -> tuple[int, int]:
        """The shape of the grid, within the profile, that holds a batch."""
        return min(max(grid_batch(batch), self.min_batch), self.max_batch), min(grid_samples(samples), self.max_samples)


def choose_profile(profiles: Sequence[Profile], samples: int, batch: int) -> Profile:
    """The profile for a batch of clips padded to `samples`; raises BackendError where none takes clips so long.

    Of those for the shortest clips that take them, the one for the smallest batches that takes so many (fewer than it
    takes are padded); and where none takes so many, the one for the largest, which takes them in parts.
    """
    if taking := [profile for profile in profiles if profile.min_samples <= samples <= profile.max_samples]:
        shortest = min(profile.max_samples for profile in taking)
        by_batch = sorted((p for p in taking if p.max_samples == shortest), key=lambda profile: profile.max_batch)
        return next((profile for profile in by_batch if batch <= profile.max_batch), by_batch[-1])
    spans = " and ".join(f"{p.min_samples / SAMPLE_RATE:g} to {p.max_samples / SAMPLE_RATE:g} s" for p in profiles)
    raise BackendError(
        f"clips of {samples / SAMPLE_RATE:g} s, but this engine takes {spans}; compile with --profiles for longer ones"
    )


def with_at_most(profiles: Sequence[Profile], max_samples: int, batch: int) -> tuple[Profile, ...]:
    """Profiles of which those for clips of up to `max_samples` take at most `batch` at a time; ones that cannot go."""
    return tuple(
        replace(profile, max_batch=min(profile.max_batch, batch)) if profile.max_samples == max_samples else profile
        for profile in profiles
        if profile.max_samples != max_samples or profile.min_batch <= batch
    )


def grid_batch(batch: int) -> int:
    """Up to 16 clips as they are, then steps of an eighth to a sixteenth of the batch."""
    if batch <= _EXACT_BATCH:
        return batch
    step = 1 << ((batch - 1).bit_length() - 4)
    return -(-batch // step) * step


def grid_samples(samples: int) -> int:
    """Up to the end of a patch of 16 frames (.16 s): frames that fill no patch have no token, and only cost."""
    return MIN_SAMPLES + max(0, -(-(samples - MIN_SAMPLES) // _PATCH_SAMPLES)) * _PATCH_SAMPLES
