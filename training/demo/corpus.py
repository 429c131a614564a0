"""The corpus on disk: the clips of the committed tables as audio files, made where they are missing."""

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from aesanet.machine import usable_cores
from aesanet.training.demo.plan import DemoClip, DemoSplit
from aesanet.training.demo.render import Reference, render, write_clip
from aesanet.training.demo.tables import LABELS_FILE, REFERENCES_FILE, read_table
from aesanet.training.files import replacing


def packages_folder(work: Path) -> Path:
    """Where unpacked packages and machine-made recordings lie."""
    return work / "packages"


def rendered(work: Path, splits: Collection[DemoSplit]) -> Path:
    """The folder with `ID.flac` of every clip of these splits.

    Its name is a hash of what the tables say of references and clips, so that audio of other tables is never taken.
    """
    references, clips = read_table(REFERENCES_FILE, Reference), read_table(LABELS_FILE, DemoClip)
    key = hashlib.sha256(msgspec.json.encode((references, clips))).hexdigest()[:12]
    audio = work / f"audio-{key}"
    audio.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if clip.split in splits and not (audio / f"{clip.id}.flac").exists()]
    by_id = {one.id: one for one in references}
    with ProcessPoolExecutor(usable_cores()) as pool:
        list(pool.map(partial(_render_one, packages_folder(work), audio, by_id), missing, chunksize=16))
    return audio


def _render_one(packages: Path, audio: Path, references: Mapping[str, Reference], clip: DemoClip) -> None:
    with replacing(audio / f"{clip.id}.flac") as beside:
        write_clip(beside, render(packages, references, clip.references, clip.degradation, clip.level))
