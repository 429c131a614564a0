"""Does the triplet term help, how should its buffer be sampled, and what do features of a trunk add to log-mel?

Every head is trained on natural audio alone, and tested on packages that no training saw: of natural and of
machine-made audio. The trunk under it is frozen, as in the paper. It was trained by this command without the triplet
term, on other clips than the heads, so that nothing in it is owed to what is compared. But it was trained on the same
kind of labels: what it adds to log-mel is its features and three times as many labelled clips together.
"""

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click
import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from safetensors.torch import load_file
from torch import Tensor, nn

from aesanet.axes import AXES
from aesanet.lengths import MEL_BINS, PATCH_SIZE, TOKENS_PER_PATCH
from aesanet.metrics import rank_metrics
from aesanet.models.aesanet import AESANet
from aesanet.models.checkpoint import load_checkpoint
from aesanet.models.config import AESANetConfig, BEATsConfig
from aesanet.training.config import TrainingConfig
from aesanet.training.dataset import Data, Trunk
from aesanet.training.demo import train as demo
from aesanet.training.demo.corpus import rendered
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import DemoClip, DemoSplit
from aesanet.training.demo.tables import LABELS_FILE, read_table
from aesanet.training.learner import Learner, whole_clips
from aesanet.training.processes import Processes
from aesanet.training.trainer import train
from aesanet.training.triplet import Sampling

SEEDS: Final = (0, 1, 2)
HEADS_SHARE: Final = 4
"""Heads are trained on every fourth reference's clips of the training split, about as many as the paper has (2,700),
the trunk on all others."""

FRAMES_PER_TOKEN: Final = PATCH_SIZE // TOKENS_PER_PATCH

# Windows of half the demo's length, as thirteen trainings on two cores are long.
TRUNK_CONFIG: Final = msgspec.structs.replace(demo.CONFIG, max_seconds=3.0, triplet="none", epochs=3)
HEAD_CONFIG: Final = TrainingConfig(
    max_seconds=TRUNK_CONFIG.max_seconds,
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=50,
    schedule="cosine",
    epochs=4,
    patience=4,
    precision="bf16",
    device="cpu",
)
NATURES: Final[dict[DemoSplit, str]] = {"test": "natural", "synthetic": "machine-made"}


@dataclass(frozen=True)
class Variant:
    """One way to train a head."""

    features: Literal["trunk", "log-mel"]
    triplet: Sampling

    @property
    def name(self) -> str:
        """As in the plot."""
        return f"{self.features}, triplet {self.triplet}"

    @property
    def trunk(self) -> Trunk:
        """What the trainer and its cache call it: log-mel is what a trunk would be trained on."""
        return "frozen" if self.features == "trunk" else "trained"


VARIANTS: Final = (
    Variant("trunk", "random"),
    Variant("trunk", "hardest"),
    Variant("trunk", "none"),
    Variant("log-mel", "random"),
)


class LogMel(nn.Module):
    """Stands where the encoder stands: two frames of the filterbank, side by side, are one token."""

    def __init__(self) -> None:
        super().__init__()
        self.beats = nn.Module()  # nothing in it to train

    def forward(self, fbank: Tensor, num_tokens: Tensor) -> Tensor:
        """fbank float32 [batch, frames, 128] -> [batch, tokens, 256], as many tokens as BEATs makes."""
        frames = fbank.shape[1] // PATCH_SIZE * PATCH_SIZE
        tokens: Tensor = fbank[:, :frames].unflatten(1, (-1, FRAMES_PER_TOKEN)).flatten(2)
        return tokens


@dataclass(frozen=True)
class Corpus:
    """The demo corpus with its audio rendered in `audio`."""

    audio: Path
    clips: list[DemoClip]
    labels: list[Label]

    @classmethod
    def of(cls, work: Path) -> "Corpus":
        """All splits."""
        audio = rendered(work, ("train", "validation", *NATURES))
        return cls(audio, read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label))

    def for_training(self, of_heads: bool) -> "Corpus":
        """With the training clips of the heads, or with those of the trunk; other splits are whole.

        No reference that is damaged is on both sides; what layers of mixes were made from is, in other mixes.
        """
        groups = sorted({clip.references[0] for clip in self.clips if clip.split == "train"})
        heads = set(groups[::HEADS_SHARE])
        kept = [
            (clip, label)
            for clip, label in zip(self.clips, self.labels, strict=True)
            if clip.split != "train" or (clip.references[0] in heads) == of_heads
        ]
        return Corpus(self.audio, [clip for clip, _ in kept], [label for _, label in kept])

    def data(self, model: AESANet, trunk: Trunk, split: DemoSplit, cache: Path) -> Data:
        """One split as the trained part of the network takes it in."""
        return demo.demo_data(model, trunk, self.audio, self.clips, self.labels, split, cache, HEAD_CONFIG.window)


def trained_trunk(work: Path, corpus: Corpus) -> AESANet:
    """The network whose trunk stands under all heads."""
    model = demo.new_model()
    training, validation = (
        corpus.for_training(of_heads=False).data(model, "trained", split, work / "features")
        for split in ("train", "validation")
    )
    result = train(model, "trained", training, validation, TRUNK_CONFIG, work / "experiments" / "trunk", demo.Lines())
    return load_checkpoint(result.checkpoint)


def new_head(variant: Variant, seed: int, trunk: AESANet) -> AESANet:
    """A network with a random head of the default sizes, on the trunk of `trunk` or on the filterbank itself."""
    torch.manual_seed(seed)
    if variant.features == "trunk":
        model = AESANet(trunk.config)
        model.encoder.beats.load_state_dict(trunk.encoder.beats.state_dict())
        return model
    # Only its width counts: the trunk is thrown away.
    beats = BEATsConfig(encoder_embed_dim=FRAMES_PER_TOKEN * MEL_BINS, encoder_layers=1, encoder_attention_heads=1)
    model = AESANet(AESANetConfig(beats=beats, window=HEAD_CONFIG.window, weights="demo"))
    model.encoder = LogMel()  # type: ignore[assignment]
    return model


def head_rows(work: Path) -> Iterator[dict[str, Any]]:
    """One row a variant, seed, kind of test audio and axis."""
    everything = Corpus.of(work)
    trunk, corpus = trained_trunk(work, everything), everything.for_training(of_heads=True)
    for variant in VARIANTS:
        data = {
            split: corpus.data(trunk, variant.trunk, split, work / "features")
            for split in ("train", "validation", *NATURES)
        }
        for seed in SEEDS:
            model = new_head(variant, seed, trunk)
            config = msgspec.structs.replace(HEAD_CONFIG, seed=seed, triplet=variant.triplet)
            result = train(model, variant.trunk, data["train"], data["validation"], config, _run(work, variant, seed))
            model.load_state_dict(load_file(result.checkpoint))
            for split, nature in NATURES.items():
                yield from _axis_rows(Learner(model, variant.trunk, bf16=False), data[split], variant, seed, nature)
            click.echo(f"{variant.name}, seed {seed}: best validation MSE {result.best_mse:.3f}", err=True)


def epoch_rows(work: Path) -> Iterator[dict[str, Any]]:
    """What the trainer kept of every epoch of every head, under `head_rows`' names."""
    for variant, seed in itertools.product(VARIANTS, SEEDS):
        with open(_run(work, variant, seed) / "epochs.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {"features": variant.features, "triplet": variant.triplet, "seed": seed, **row}


def _run(work: Path, variant: Variant, seed: int) -> Path:
    return work / "experiments" / f"{variant.features}-{variant.triplet}-{seed}"


def _axis_rows(learner: Learner, data: Data, variant: Variant, seed: int, nature: str) -> Iterator[dict[str, Any]]:
    scores, _ = whole_clips(learner, data, HEAD_CONFIG.batch_size, torch.device("cpu"), Processes())
    for axis, name in enumerate(AXES):
        known = ~np.isnan(data.labels[:, axis])
        metrics = rank_metrics(data.labels[known, axis].astype(np.float64), scores[known, axis])
        yield {
            "features": variant.features,
            "triplet": variant.triplet,
            "seed": seed,
            "tested_on": nature,
            "axis": name,
            "clips": int(known.sum()),
            "srcc": _rounded(metrics.srcc),
            "ktau": _rounded(metrics.ktau),
            "mse": _rounded(metrics.mse),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def head_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, a line a metric, kind of test audio and variant."""
    lines = [
        f"| metric | tested on | features | triplet | {' | '.join(AXES)} |",
        "|---|---|---|---|" + "--:|" * len(AXES),
    ]
    for metric in ("srcc", "ktau"):
        for nature in NATURES.values():
            for variant in VARIANTS:
                cells = [_cell(_values(rows, variant, nature, name, metric)) for name in AXES]
                head = (metric.upper(), nature, variant.features, variant.triplet)
                lines.append(f"| {' | '.join((*head, *cells))} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "-"


def _values(rows: Sequence[Mapping[str, Any]], variant: Variant, nature: str, axis: str, metric: str) -> list[float]:
    """Of all seeds that have the metric."""
    this = (variant.features, variant.triplet, nature, axis)
    found = [row[metric] for row in rows if (row["features"], row["triplet"], row["tested_on"], row["axis"]) == this]
    return [float(value) for value in found if value not in (None, "")]


def plot_heads(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """SRCC and KTAU an axis: a bar for the mean over seeds, a dot for each seed."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for row_of_panels, metric in zip(panels, ("srcc", "ktau"), strict=True):
        for panel, nature in zip(row_of_panels, NATURES.values(), strict=True):
            for number, variant in enumerate(VARIANTS):
                for axis, name in enumerate(AXES):
                    values = _values(rows, variant, nature, name, metric)
                    if not values:
                        continue
                    place = axis + 0.2 * (number - 1.5)
                    panel.bar(place, np.mean(values), 0.18, color=f"C{number}", alpha=0.6)
                    panel.plot([place] * len(values), values, ".", color="black", markersize=4)
            panel.set(title=f"{metric.upper()}, tested on {nature} audio")
            panel.set_xticks(range(len(AXES)), AXES)
            panel.grid(axis="y", alpha=0.3)
    patches = [Patch(color=f"C{number}", alpha=0.6, label=variant.name) for number, variant in enumerate(VARIANTS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(VARIANTS))
    figure.savefig(path)
