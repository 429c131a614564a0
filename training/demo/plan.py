"""Which clips the demo corpus has: references, and ladders of degradations and of layers built on them.

Everything follows from the packages and one seed; `references.csv` and `labels.csv` keep the outcome, so that
training needs no metric and the same clips can be made again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from aesanet.lengths import SAMPLE_RATE
from aesanet.training.demo.degrade import HELD_OUT, LEVELS, TRAINED
from aesanet.training.demo.render import GAP_SAMPLES, Part, Reference, active_share, is_fit, render_reference
from aesanet.training.demo.sources import Kind, Source, Split, by_split, duration_seconds

SEED: Final = 2509
MAX_LAYERS: Final = 5
SECONDS: Final = (3.0, 6.0)  # shortest and longest reference
LEAST_ACTIVE: Final = 0.5  # share of its time that a layer must be heard, to be one of several at the same time
SINGLE_SECONDS: Final = 10.0  # longer effects are mostly places or songs

DemoSplit = Literal["train", "validation", "test", "synthetic"]


class DemoClip(msgspec.Struct, frozen=True, kw_only=True):
    """One clip of the corpus. `references` holds one reference a layer; level 0 is undamaged."""

    id: str
    split: DemoSplit
    ladder: str = ""
    kind: Kind | Literal["mix"]
    references: tuple[str, ...]
    degradation: str = ""
    level: int = 0

    @property
    def layers(self) -> int:
        """Sounds at the same time, as mixed."""
        return len(self.references)


class Counts(msgspec.Struct, frozen=True):
    """How much a split has: references by kind, ladders of damage on each of them, and ladders of layers.

    `voices` and `sounds` are speech and effects for the layers alone, of which mixes need many different ones; they
    are played at a speed within `speeds`, which makes new voices of the few that there are to train on.
    """

    speech: int
    music: int
    effect: int
    types: int
    held_out_types: int
    voices: int
    sounds: int
    layer_ladders: int
    speeds: tuple[float, float] = (1.0, 1.0)


COUNTS: Final[dict[Split, Counts]] = {
    "train": Counts(
        speech=200,
        music=200,
        effect=70,
        types=2,
        held_out_types=0,
        voices=700,
        sounds=250,
        layer_ladders=950,
        speeds=(0.85, 1.18),
    ),
    "validation": Counts(
        speech=24, music=24, effect=10, types=1, held_out_types=0, voices=40, sounds=20, layer_ladders=40
    ),
    "test": Counts(speech=40, music=40, effect=20, types=2, held_out_types=1, voices=80, sounds=50, layer_ladders=120),
}


def plan(folder: Path, found: Sequence[Source]) -> tuple[list[Reference], list[DemoClip]]:
    """References and clips of the three splits of recordings, in a fixed order."""
    references: list[Reference] = []
    clips: list[DemoClip] = []
    for number, (split, counts) in enumerate(COUNTS.items()):
        rng = np.random.default_rng([SEED, number])
        layers: list[Reference] = []
        for kind in ("speech", "music", "effect"):
            fit = [s for s in by_split(list(found), split, kind) if s.package.references]
            drawn = draw_references(folder, fit, getattr(counts, kind), f"{split}-{kind}", rng)
            for reference in drawn:
                clips += quality_ladders(reference, split, counts, rng)
            references += drawn
            layers += drawn if kind == "speech" else []
        # Voices without the band or the silence of a reference are still voices; music and ambience are many things.
        pools = {"voice": list(by_split(list(found), split, "speech")), "sound": []}
        pools["sound"] = [s for s in by_split(list(found), split, "effect") if is_single(folder, s)]
        for name, pool in pools.items():
            drawn = draw_references(
                folder, pool, getattr(counts, f"{name}s"), f"{split}-{name}", rng, strict=False, speeds=counts.speeds
            )
            references += drawn
            layers += drawn
        layers = [one for one in layers if active_share(render_reference(folder, one)) >= LEAST_ACTIVE]
        for index in range(counts.layer_ladders):
            clips += layer_ladder(layers, split, f"{split}-layers-{index:03}", rng)
    return references, clips


def quality_ladders(
    reference: Reference, split: DemoSplit, counts: Counts, rng: np.random.Generator
) -> Iterable[DemoClip]:
    """The reference itself, then five levels of each of some types of damage, drawn at random."""
    yield DemoClip(id=reference.id, split=split, kind=reference.kind, references=(reference.id,))
    names = [*rng.permutation(list(TRAINED))[: counts.types], *rng.permutation(list(HELD_OUT))[: counts.held_out_types]]
    for name in names:
        for level in LEVELS:
            yield DemoClip(
                id=f"{reference.id}-{name}-{level}",
                split=split,
                ladder=f"{reference.id}-{name}",
                kind=reference.kind,
                references=(reference.id,),
                degradation=str(name),
                level=level,
            )


def layer_ladder(
    pool: Sequence[Reference], split: DemoSplit, name: str, rng: np.random.Generator
) -> Iterable[DemoClip]:
    """One to five sounds at once, each of one speaker or one package of things; about every second ladder is damaged.

    Damage is alike at all steps and ends at the middle level: beyond it, layers can no longer be heard apart.
    """
    chosen: dict[str, Reference] = {}
    for index in rng.permutation(len(pool)):
        chosen.setdefault(pool[index].group, pool[index])
        if len(chosen) == MAX_LAYERS:
            break
    ids = tuple(reference.id for reference in chosen.values())
    damaged = rng.integers(2) == 1
    degradation, level = (str(rng.choice(list(TRAINED))), int(rng.integers(1, 4))) if damaged else ("", 0)
    for layers in range(1, MAX_LAYERS + 1):
        yield DemoClip(
            id=f"{name}-{layers}",
            split=split,
            ladder=name,
            kind="mix",
            references=ids[:layers],
            degradation=degradation,
            level=level,
        )


def is_single(folder: Path, source: Source) -> bool:
    """Is an effect likely to be one thing? Loops and what is long are mostly several."""
    return "loop" not in source.file.lower() and duration_seconds(folder / source.file) <= SINGLE_SECONDS


def draw_references(
    folder: Path,
    found: Sequence[Source],
    count: int,
    prefix: str,
    rng: np.random.Generator,
    strict: bool = True,
    speeds: tuple[float, float] = (1.0, 1.0),
) -> list[Reference]:
    """`count` references, or fewer where so many are not fit.

    Each is of one group: a part of a long recording, or short ones joined.
    """
    groups: dict[str, list[Source]] = defaultdict(list)
    for source in found:
        if duration_seconds(folder / source.file) > 0.3:
            groups[source.group].append(source)
    names = sorted(groups)
    drawn: list[Reference] = []
    for _ in range(30 * count):
        if len(drawn) == count or not names:
            break
        group = groups[names[rng.integers(len(names))]]
        reference = Reference(
            id=f"{prefix}-{len(drawn):03}",
            kind=group[0].kind,
            group=group[0].group,
            language=group[0].language,
            level_db=round(float(rng.uniform(-30, -22)), 1),
            speed=round(float(rng.uniform(*speeds)), 3),
            parts=_parts(folder, group, rng),
        )
        if is_fit(render_reference(folder, reference), reference.kind, strict):
            drawn.append(reference)
    return drawn


def _parts(folder: Path, group: Sequence[Source], rng: np.random.Generator) -> tuple[Part, ...]:
    wanted = rng.uniform(*SECONDS)
    parts: list[Part] = []
    for index in rng.permutation(len(group)):
        source = group[index]
        there = duration_seconds(folder / source.file)
        seconds = round(min(there, wanted), 2)
        start = round(float(rng.uniform(0, there - seconds)), 2) if there > seconds + 0.01 else 0.0
        parts.append(Part(source.file, start, seconds))
        wanted -= seconds + GAP_SAMPLES / SAMPLE_RATE
        if wanted < 0.3:
            break
    return tuple(parts)
