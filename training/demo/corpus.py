"""The corpus on disk: the clips of the committed tables as audio files, made where they are missing."""

import hashlib
import inspect
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import soundfile

from aesanet.files import replacing
from aesanet.machine import usable_cores
from aesanet.training.demo import degrade, render
from aesanet.training.demo.plan import SEED, DemoClip, DemoSplit
from aesanet.training.demo.render import Reference, write_clip
from aesanet.training.demo.tables import LABELS_FILE, REFERENCES_FILE, read_table

NOISE_FLOOR_DB: Final = -50


def packages_folder(work: Path) -> Path:
    """Where unpacked packages and machine-made recordings lie."""
    return work / "packages"


def rendered(work: Path, splits: Collection[DemoSplit]) -> Path:
    """The folder with `ID.flac` of every clip of these splits.

    Its name is a hash of what the tables say of references and clips, and of the code that makes audio of it, so that
    audio of other tables or other code is never taken.
    """
    references, clips = read_table(REFERENCES_FILE, Reference), read_table(LABELS_FILE, DemoClip)
    code = [inspect.getsource(module) for module in (degrade, render)]
    key = hashlib.sha256(msgspec.json.encode((references, clips, code))).hexdigest()[:12]
    audio = work / f"audio-{key}"
    audio.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if clip.split in splits and not (audio / f"{clip.id}.flac").exists()]
    by_id = {one.id: one for one in references}
    with ProcessPoolExecutor(usable_cores()) as pool:
        list(pool.map(partial(_render_one, packages_folder(work), audio, by_id), missing, chunksize=16))
    return audio


def with_noise_floor(audio: Path, clips: Collection[DemoClip], folder: Path) -> Path:
    """Copies of clips with white noise at NOISE_FLOOR_DB relative to their RMS: none has digital silence any more."""
    folder.mkdir(exist_ok=True)
    for clip in clips:
        x, _ = soundfile.read(audio / f"{clip.id}.flac")
        noise = np.random.default_rng([SEED, 6]).standard_normal(len(x))
        write_clip(folder / f"{clip.id}.flac", x + noise * np.sqrt(np.square(x).mean()) * 10 ** (NOISE_FLOOR_DB / 20))
    return folder


def _render_one(packages: Path, audio: Path, references: Mapping[str, Reference], clip: DemoClip) -> None:
    with replacing(audio / f"{clip.id}.flac") as beside:
        write_clip(beside, render.render(packages, references, clip.references, clip.degradation, clip.level))
