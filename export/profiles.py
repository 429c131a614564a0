"""Which batches an engine is built for: a few profiles, each up to a full batch of its longest clips."""

from collections.abc import Sequence
from typing import Final

import msgspec

from aesanet.bundle import TensorSpec
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, num_frames, num_tokens

MAX_SECONDS: Final = 600.0
MAX_BATCH: Final = 4096

_FULL_BATCH_SECONDS: Final = 640.0
# Of base size, measured with TensorRT-RTX 1.7: up to 7.5 MiB of activations a second of audio (encoder, 20 clips of
# 30 s, FP32 logits); features and log-mel of three batches add .7.
_MIB_A_SECOND: Final = 8.0


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Batches of `min_batch` to `max_batch` clips, padded to `min_seconds` to `max_seconds`.

    Kernels are chosen for `best_batch` of the longest clips: the batch that runs most when many are scored.
    """

    min_seconds: float
    max_seconds: float
    min_batch: int
    best_batch: int
    max_batch: int

    def __str__(self) -> str:
        """Exact, as it is a part of an engine's key: in samples at 16 kHz."""
        short, long = self._samples()
        best = "" if self.best_batch == self.max_batch else f" (kernels for {self.best_batch})"
        return f"{self.min_batch} to {self.max_batch} clips{best} of {short} to {long} samples"

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, best and largest shape of an input."""
        short, long = self._samples()
        smallest, best, largest = (self.min_batch, short), (self.best_batch, long), (self.max_batch, long)
        return _shape(spec, *smallest), _shape(spec, *best), _shape(spec, *largest)

    def _samples(self) -> tuple[int, int]:
        return round(self.min_seconds * SAMPLE_RATE), round(self.max_seconds * SAMPLE_RATE)


def default_profiles(window_seconds: float, memory_mib: int | None = None) -> tuple[Profile, ...]:
    """Clips up to 2 s, a bundle's windows, clips up to 30 s whole; at most about ten minutes of audio a batch.

    memory_mib : of the GPU, where it is known: batches then take about half of it at most
    """
    seconds = _FULL_BATCH_SECONDS
    if memory_mib is not None:
        seconds = min(seconds, memory_mib / 2 / _MIB_A_SECOND)
    batch_of = {
        longest: max(1, min(128, round(min(seconds, at_most) / longest)))
        for longest, at_most in ((2.0, seconds), (30.0, 600.0), (window_seconds, seconds))
    }
    return make_profiles(list(batch_of.items()))


def make_profiles(bounds: Sequence[tuple[float, int] | tuple[float, int, int, int]]) -> tuple[Profile, ...]:
    """(longest seconds, largest batch) to profiles that follow each other; raises ValueError.

    Or (longest seconds, smallest, best and largest batch): else the smallest is one clip, and the best is the largest.
    Of one length there may be several, for small batches and large ones: kernels that suit 64 clips do not suit one.
    """
    profiles: list[Profile] = []
    start = MIN_SAMPLES / SAMPLE_RATE
    for seconds, smallest, best, largest in sorted(map(_whole, bounds), key=lambda bound: (bound[0], bound[3])):
        same = bool(profiles) and seconds == profiles[-1].max_seconds
        if same and largest == profiles[-1].max_batch:
            raise ValueError(f"two profiles up to {seconds:g} s and {largest} clips; give each once")
        if not start <= seconds <= MAX_SECONDS:
            raise ValueError(f"a profile up to {seconds:g} s; it must be from {start:g} to {MAX_SECONDS:g} s")
        if not 1 <= largest <= MAX_BATCH:
            raise ValueError(f"a profile of {largest} clips; it must be from 1 to {MAX_BATCH}")
        if not 1 <= smallest <= largest:
            raise ValueError(f"a profile of {smallest} to {largest} clips; the fewest must be from 1 to the most")
        if not smallest <= best <= largest:
            raise ValueError(
                f"a profile of {smallest} to {largest} clips that is best at {best}; that must be one of these"
            )
        profiles.append(Profile(profiles[-1].min_seconds if same else start, seconds, smallest, best, largest))
        start = seconds
    if not profiles:
        raise ValueError("no profile; give at least one, such as 10:64")
    return tuple(profiles)


def _whole(bound: tuple[float, int] | tuple[float, int, int, int]) -> tuple[float, int, int, int]:
    return (bound[0], 1, bound[1], bound[1]) if len(bound) == 2 else bound


def _shape(spec: TensorSpec, batch: int, samples: int) -> tuple[int, ...]:
    sizes = {"batch": batch, "samples": samples, "frames": num_frames(samples), "tokens": num_tokens(samples)}
    return tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
