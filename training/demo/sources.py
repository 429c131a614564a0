"""Where the demo's audio comes from: Debian packages, each in one split, unpacked without being installed."""

import hashlib
import re
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import soundfile
import soxr

from aesanet.errors import InputError
from aesanet.lengths import SAMPLE_RATE

Split = Literal["train", "validation", "test"]
Kind = Literal["speech", "music", "effect"]

SUFFIXES: Final = frozenset({".wav", ".ogg", ".flac", ".opus"})  # not mp3, in which libsndfile seeks wrongly


@dataclass(frozen=True)
class Package:
    """A Debian package: all its audio is in one split, so that no speaker or album is on both sides."""

    name: str
    split: Split
    kind: Kind
    references: bool = True  # recordings good enough to be what degradations are measured against
    language: str | None = None  # of speech; None where the folder or file name says it


# Full-band recordings are references; telephone prompts, shouts and single words are only voices in mixes.
PACKAGES: Final = (
    Package("tuxpaint-stamps-default", "train", "speech"),
    Package("fillets-ng-data-nl", "train", "speech", language="nl"),
    Package("hedgewars-data", "train", "speech", references=False),
    # All of Asterisk's on one side: some of its speakers recorded several languages.
    *(
        Package(f"asterisk-core-sounds-{language}-wav", "train", "speech", references=False, language=language)
        for language in ("en", "es", "fr", "it", "ru")
    ),
    Package("wesnoth-1.16-music", "train", "music"),
    Package("warzone2100-music", "train", "music"),
    Package("drascula-music", "train", "music"),
    Package("fretsonfire-songs-sectoid", "train", "music"),
    Package("ufoai-sound", "train", "effect"),
    Package("minetest-data", "train", "effect"),
    Package("klettres-data", "validation", "speech"),
    Package("trackballs-data", "validation", "music"),
    Package("lmms-common", "validation", "effect"),
    Package("scratch", "validation", "effect"),
    Package("festvox-ru", "test", "speech", language="ru"),
    Package("fillets-ng-data-cs", "test", "speech", language="cs"),
    Package("ktuberling-data", "test", "speech", references=False),
    Package("singularity-music", "test", "music"),
    Package("hyperrogue-music", "test", "music"),
    Package("fretsonfire-songs-muldjord", "test", "music"),
    Package("sonic-pi-samples", "test", "effect"),
    Package("wordwarvi-sound", "test", "effect"),
)

TUXPAINT_LANGUAGES: Final = frozenset("be bg ca da el es fr lt nl ro ru".split())

MUSIC_BOX: Final = ("openttd-openmsx", "timgm6mb-soundfont")
"""MIDI files, and the instruments to play them with."""


@dataclass(frozen=True)
class Source:
    """One audio file of a package. `group` is its speaker or album: clips are joined from one group only."""

    package: Package
    file: str  # below the folder that packages are unpacked into
    kind: Kind
    group: str
    language: str


def fetch(folder: Path) -> dict[str, str]:
    """Download and unpack every package that is not there yet; returns the versions, by package.

    Raises InputError where apt-get or dpkg-deb is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for name in (*(package.name for package in PACKAGES), *MUSIC_BOX):
        marker = folder / name / ".version"
        if not marker.is_file():
            for left in folder.glob(f"{name}_*.deb*"):
                left.unlink()  # of a download that was cut off
            run("apt-get", "download", name, cwd=folder)
            (archive,) = folder.glob(f"{name}_*.deb")
            run("dpkg-deb", "-x", archive.name, name, cwd=folder)
            _unzip(folder / name)
            marker.write_text(archive.name.split("_")[1])
            archive.unlink()
        versions[name] = marker.read_text()
    return versions


def sources(folder: Path) -> list[Source]:
    """All audio files of the unpacked packages in a fixed order, without copies of the same bytes."""
    seen: set[bytes] = set()
    found = []
    for package in PACKAGES:
        for path in sorted((folder / package.name).rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            digest = hashlib.sha256(path.read_bytes()).digest()
            source = _source(package, path.relative_to(folder))
            if digest not in seen and source is not None:
                seen.add(digest)
                found.append(source)
    return found


@cache
def duration_seconds(path: Path) -> float:
    """By the file's header; 0 where it cannot be read."""
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return 0.0
    return float(info.frames / info.samplerate)


def read_mono(path: Path, start_seconds: float, seconds: float) -> np.ndarray:
    """float32 [samples], 16 kHz, the mean of the channels, of a part of a file."""
    with soundfile.SoundFile(path) as file:
        file.seek(min(file.frames, round(start_seconds * file.samplerate)))
        samples = file.read(round(seconds * file.samplerate), dtype="float32", always_2d=True).mean(axis=1)
        rate = file.samplerate
    return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), np.float32)


def _source(package: Package, file: Path) -> Source | None:
    """What a file is, by its name; None for what is no use."""
    kind, group, language = package.kind, package.name, package.language or ""
    if package.name == "tuxpaint-stamps-default":
        # NAME_desc_LANGUAGE.ogg are spoken; the others are the sounds of things, and some of their names.
        _, spoken, language = file.stem.partition("_desc_")
        if not spoken:
            kind, language = "effect", ""
        elif language not in TUXPAINT_LANGUAGES:
            return None
        group = f"{package.name}-{language or 'effects'}"
    elif package.name in ("klettres-data", "ktuberling-data"):
        language = (
            file.parent.name if package.name == "ktuberling-data" else file.parts[file.parts.index("klettres") + 1]
        )
        group = f"{package.name}-{language}"
    elif package.name == "hedgewars-data":
        if "voices" not in file.parts:
            return None
        _, _, language = file.parent.name.partition("_")
        group = f"{package.name}-{file.parent.name}"
    elif package.name.startswith("fillets"):
        if f"/{package.language}/" not in f"/{file}":
            return None  # music and effects of the game
        speaker = re.search(r"-([mv])-", file.stem)  # the two fish who talk most; all others together
        group = f"{package.name}-{speaker[1] if speaker else 'others'}"
    elif kind == "music":
        group = str(file)
    return Source(package, str(file), kind, group, language)


def _unzip(folder: Path) -> None:
    for archive in sorted(folder.rglob("*.pk3")):
        with zipfile.ZipFile(archive) as content:
            content.extractall(archive.with_suffix(""))
        archive.unlink()


def run(*command: str, cwd: Path) -> None:
    """Run a program; raises InputError where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(
            f"{command[0]} is not installed; the demo's recipe needs Debian 12 or a relative, and for machine-made "
            "audio: apt-get install espeak-ng flite fluidsynth"
        ) from None
    if done.returncode:
        raise InputError(f"{' '.join(command)}: {done.stderr.strip()}")


def by_split(found: list[Source], split: Split, kind: Kind) -> Iterator[Source]:
    """Those of one split and kind."""
    return (source for source in found if source.package.split == split and source.kind == kind)
