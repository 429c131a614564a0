"""Scores of undamaged speech by language, with the demo checkpoint.

No language should be better than another. What differs is the recordings: each language comes from its own packages,
microphones and codecs, and so the table also gives their bandwidth. Of the training packages, Asterisk's telephone-band
prompts were heard as undamaged layers of mixes, with a high PQ: read the languages of the other splits.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from aesanet.axes import AXES
from aesanet.models.checkpoint import load_checkpoint
from aesanet.training.demo import sources
from aesanet.training.demo.corpus import packages_folder
from aesanet.training.demo.degrade import bandwidth_hertz
from aesanet.training.demo.plan import SEED, draw_references
from aesanet.training.demo.render import render, write_clip
from aesanet.training.demo.train import CHECKPOINT, model_scores

CLIPS: Final = 16
"""Of each language and split."""

WIDE_KHZ: Final = 6.5
"""Speech below it lacks a part that 16 kHz could hold."""


def language_rows(work: Path) -> Iterator[dict[str, Any]]:
    """One row a language and split: means and deviations of each axis over its clips."""
    packages = packages_folder(work)
    sources.fetch(packages)
    speech = [source for source in sources.sources(packages) if source.kind == "speech" and source.language]
    audio = work / "languages"
    audio.mkdir(exist_ok=True)
    model = load_checkpoint(CHECKPOINT)
    keys = sorted({(source.language, source.package.split) for source in speech})
    for number, (language, split) in enumerate(keys):
        found = [source for source in speech if (source.language, source.package.split) == (language, split)]
        rng = np.random.default_rng([SEED, 4, number])
        references = draw_references(packages, found, CLIPS, f"{language}-{split}", rng, strict=False)
        if len(references) < CLIPS // 2:
            continue
        waveforms = [render(packages, {one.id: one}, [one.id]) for one in references]
        for one, x in zip(references, waveforms, strict=True):
            write_clip(audio / f"{one.id}.flac", x)
        scores = np.array(list(model_scores(model, audio, [one.id for one in references]).values()))
        yield {
            "language": language,
            "split": split,
            "clips": len(references),
            "packages": " ".join(sorted({source.package.name for source in found})),
            "bandwidth_khz": round(float(np.mean([bandwidth_hertz(x) for x in waveforms])) / 1000, 2),
            **{f"{axis}_mean": round(float(scores[:, i].mean()), 3) for i, axis in enumerate(AXES)},
            **{f"{axis}_deviation": round(float(scores[:, i].std()), 3) for i, axis in enumerate(AXES)},
        }


def language_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line a language and split: means and deviations over clips."""
    lines = [
        f"| language | packages of | clips | bandwidth, kHz | {' | '.join(AXES)} |",
        "|---|---|--:|--:|" + "--:|" * len(AXES),
    ]
    for row in rows:
        cells = [f"{float(row[f'{axis}_mean']):.2f} ± {float(row[f'{axis}_deviation']):.2f}" for axis in AXES]
        head = (row["language"], row["split"], str(row["clips"]), f"{float(row['bandwidth_khz']):.1f}")
        lines.append(f"| {' | '.join((*head, *cells))} |")
    return "\n".join(lines)


def plot_languages(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PQ of each language, hollow where its recordings are narrow-band."""
    languages = sorted({row["language"] for row in rows}, reverse=True)
    figure = Figure(figsize=(8, 9), layout="constrained")
    panel = figure.subplots()
    for split, colour, shift in (("train", "C0", 0.2), ("validation", "C2", 0.0), ("test", "C1", -0.2)):
        panel.plot([], [], "o", color=colour, label=f"packages of the {split} split")
        for row in rows:
            if row["split"] == split:
                face = colour if row["bandwidth_khz"] >= WIDE_KHZ else "white"
                place = languages.index(row["language"]) + shift
                panel.errorbar(row["PQ_mean"], place, xerr=row["PQ_deviation"], fmt="o", color=colour, mfc=face)
    panel.plot([], [], "o", color="black", mfc="white", label=f"mean bandwidth below {WIDE_KHZ:g} kHz")
    panel.set(xlabel="PQ: mean and deviation over clips", ylabel="language")
    panel.set_yticks(range(len(languages)), languages)
    panel.legend(loc="lower left")
    panel.grid(alpha=0.3)
    figure.savefig(path)
