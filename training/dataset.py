"""Labelled clips meet their audio: which files are there, what they hold, and who is kept for validation."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from aesanet.errors import ClipError, InputError
from aesanet.files import naming
from aesanet.hashing import file_sha256
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip, file_name
from aesanet.training.labels import LabelledClip
from aesanet.training.progress import Progress

FIRST_NAMES = 5
"""Missing files that an error names; the count tells of the others."""

ID_SUFFIXES = ("", ".wav", ".flac", ".mp3")
"""Of the files of labels that have an id and no path."""

Trunk = Literal["frozen", "trained"]
"""Whether BEATs is trained too, or only what stands on it."""


@dataclass(frozen=True)
class FoundClip:
    """A labelled clip whose audio can be decoded.

    file : where its audio is; sha256 : of that file's bytes; num_samples : decoded, at 16 kHz
    """

    label: LabelledClip
    file: str
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class MissingClip:
    """A labelled clip without audio that can be trained on; `code` is one of `CLIP_ERROR_CODES`."""

    id: str
    code: str
    message: str


@dataclass(frozen=True)
class Window:
    """A stretch of a clip, and the .npy that holds what the network takes in of it."""

    file: Path
    num_samples: int


@dataclass(frozen=True)
class Data:
    """Clips ready to be trained on or validated with.

    clips   : in the order of the label files
    windows : of each clip, at least one
    labels  : float32 [clips, 4], order CE, CU, PC, PQ, nan where an axis has no label
    """

    clips: tuple[FoundClip, ...]
    windows: tuple[tuple[Window, ...], ...]
    labels: np.ndarray

    def sha256(self) -> str:
        """Over ids, audio and labels, in order: the same hash is the same data, wherever the files lie."""
        rows = [[c.label.id, c.sha256, c.num_samples, list(map(str, c.label.scores))] for c in self.clips]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def split_clips(clips: Sequence[LabelledClip], share: float) -> tuple[list[LabelledClip], list[LabelledClip]]:
    """(training, validation): about `share` of the clips, in (0, 1), are kept for validation.

    A hash of the clip's path or id decides, or of its system where that is known: a system is then on one side only,
    and a clip stays on its side when others are added. Raises InputError where a side would be empty.
    """
    names = [clip.system or clip.path or clip.id for clip in clips]
    kept = [_fraction(name) < share for name in names]
    if all(kept) or not any(kept):
        groups = len(set(names))
        raise InputError(
            f"a validation share of {share:g} puts {sum(kept)} of {len(clips)} clips ({groups} systems or clips that "
            "are kept together) aside for validation; give another --validation-share, or --validation with a file"
        )
    pairs = list(zip(clips, kept, strict=True))
    return [clip for clip, aside in pairs if not aside], [clip for clip, aside in pairs if aside]


def find_audio(
    clips: Sequence[LabelledClip], root: str | Path, cache: Path, progress: Progress
) -> tuple[list[FoundClip], list[MissingClip]]:
    """Decode every clip's file under `root` once, to know that it can be and how long it is.

    `cache` is a folder that keeps the lengths, so that a second call only reads the files' bytes. The bytes name
    the audio, not path, size and time: a data set that was moved or copied keeps its cache, which takes far longer
    to make than to hash, and a file that was replaced never passes for the old one.
    """
    lengths = _Lengths(cache)
    found: list[FoundClip] = []
    missing: list[MissingClip] = []
    progress.start("finding audio", len(clips))
    for clip in clips:
        try:
            found.append(_find(clip, root, lengths))
        except ClipError as error:
            missing.append(MissingClip(clip.id, error.code, error.message))
        progress.step()
    progress.end()
    return found, missing


def check_missing(missing: Sequence[MissingClip], total: int) -> None:
    """Raise InputError that counts the clips without audio and names the first of them."""
    if missing:
        named = "; ".join(f"{clip.id} ({clip.code}: {clip.message})" for clip in missing[:FIRST_NAMES])
        more = "; ..." if len(missing) > FIRST_NAMES else ""
        raise InputError(
            f"{len(missing)} of {total} labelled clips have no usable audio ({counted(missing)}): {named}{more}; check "
            "--audio-root, or give --allow-missing to train without them"
        )


def counted(missing: Sequence[MissingClip]) -> str:
    """How many for each reason: `2 not_found, 1 too_short`."""
    counts = Counter(clip.code for clip in missing)
    return ", ".join(f"{counts[code]} {code}" for code in sorted(counts))


def window_lengths(num_samples: int, policy: WindowPolicy) -> list[int]:
    """Samples of the windows of a clip that the network can see, in order; hop must equal window.

    What `runtime.windows.split_windows` gives, less a last window without one patch of its own (0.175 s).
    """
    window = policy.window_samples
    lengths = [min(window, num_samples - start) for start in range(0, num_samples, window)]
    return [length for length in lengths if length >= MIN_SAMPLES]


def _fraction(name: str) -> float:
    """In [0, 1), even over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _find(clip: LabelledClip, root: str | Path, lengths: "_Lengths") -> FoundClip:
    file = _file(clip, root)
    if not os.path.lexists(file):
        raise ClipError("not_found", f"no such file: {file}")
    if not os.path.isfile(file):
        for _ in clip_blocks(Clip(file)):  # which says what is wrong
            pass
    try:
        sha256 = file_sha256(file)
    except OSError as error:
        raise ClipError("not_readable", str(error.strerror)) from None
    if sha256 not in lengths.known:
        lengths.add(sha256, _measure(file))
    return FoundClip(clip, file, sha256, lengths.known[sha256])


def _file(clip: LabelledClip, root: str | Path) -> str:
    """Where a clip's audio is to be; of one with an id alone, the first file of that name with a usual suffix."""
    if clip.path is not None:
        return file_name(os.path.join(root, clip.path))
    for suffix in ID_SUFFIXES:
        if os.path.isfile(file := file_name(os.path.join(root, clip.id + suffix))):
            return file
    raise ClipError("not_found", f"its label file gives no path, and {root} has no {clip.id} with .wav, .flac or .mp3")


def _measure(file: str) -> int:
    num_samples = sum(len(block) for block in clip_blocks(Clip(file)))
    if num_samples < MIN_SAMPLES:
        seconds = num_samples / SAMPLE_RATE
        raise ClipError("too_short", f"{seconds:.3f} s; the network needs {MIN_SAMPLES / SAMPLE_RATE} s")
    return num_samples


class _Length(msgspec.Struct):
    """One line of `lengths.jsonl`."""

    sha256: str
    num_samples: Annotated[int, msgspec.Meta(ge=MIN_SAMPLES)]


class _Lengths:
    """`lengths.jsonl`: decoded samples by the sha256 of the file's bytes.

    What went wrong is not kept: another libsndfile, or a disk that answers again, may decode the same bytes.
    """

    def __init__(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.path = cache / "lengths.jsonl"
        self.known: dict[str, int] = {}
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    length = msgspec.json.decode(line, type=_Length)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # torn by a kill; it is measured again
                self.known[length.sha256] = length.num_samples

    def add(self, sha256: str, num_samples: int) -> None:
        """Keep one more, in the file too."""
        self.known[sha256] = num_samples
        line = msgspec.json.encode(_Length(sha256, num_samples))
        with naming(self.path), open(self.path, "ab") as file:
            # A line of its own even after one that was torn.
            file.write(b"\n" * (file.tell() > 0) + line)
