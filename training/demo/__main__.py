"""The demo checkpoint's recipe, one step a command; see `models/demo/README.md`.

python -m aesanet.training.demo train --work DIR      # from the committed labels to a checkpoint
python -m aesanet.training.demo evaluate --work DIR   # its table, beside a baseline's
python -m aesanet.training.demo label --work DIR      # the labels anew
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec
import torch

from aesanet.commands import run
from aesanet.machine import processor_name, usable_cores
from aesanet.models.checkpoint import load_checkpoint
from aesanet.training.demo import sources, synthetic
from aesanet.training.demo.baseline import Baseline
from aesanet.training.demo.corpus import NOISE_FLOOR_DB, packages_folder, rendered, with_noise_floor
from aesanet.training.demo.label import Label, label, measure
from aesanet.training.demo.ladders import Scores, TableRow, label_rows, ladder_rows, table_text
from aesanet.training.demo.plan import DemoClip, plan
from aesanet.training.demo.render import Reference
from aesanet.training.demo.tables import LABELS_FILE, REFERENCES_FILE, read_table, write_table
from aesanet.training.demo.train import CHECKPOINT, model_scores, train_demo

RESULTS = Path("benchmarks/results/demo.csv")

work_option = click.option(
    "--work", required=True, type=click.Path(path_type=Path), help="Folder for packages, audio and runs; 5 GB."
)


@click.group()
def recipe() -> None:
    """Make the demo checkpoint."""


@recipe.command("label")
@work_option
def make_labels(work: Path) -> None:
    """Draw the clips, measure each against its undamaged self, and write references.csv and labels.csv."""
    packages = packages_folder(work)
    sources.fetch(packages)
    synthetic.generate(packages)
    references, clips = plan(packages, sources.sources(packages))
    more_references, more_clips = synthetic.plan_synthetic(packages)
    references, clips = references + more_references, clips + more_clips
    click.echo(f"{len(references)} references, {len(clips)} clips")
    measured = measure(packages, {one.id: one for one in references}, clips, usable_cores())
    write_table(REFERENCES_FILE, ([one] for one in references))
    write_table(LABELS_FILE, zip(clips, measured, label(clips, measured), strict=True))


@recipe.command()
@work_option
@click.option("--out", default=CHECKPOINT, show_default=True, type=click.Path(path_type=Path))
def train(work: Path, out: Path) -> None:
    """Render the clips of the committed labels and train on them; a run that was stopped goes on."""
    versions = sources.fetch(packages_folder(work))
    audio = rendered(work, ("train", "validation"))
    clips, labels = read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label)
    train_demo(audio, clips, labels, work / "run", out, versions)


@recipe.command()
@work_option
@click.option("--checkpoint", default=CHECKPOINT, show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def evaluate(work: Path, checkpoint: Path, out: Path) -> None:
    """Score the held-out packages and the machine-made audio, with the checkpoint and with the baseline."""
    tell_other_versions(sources.fetch(packages_folder(work)), checkpoint.with_name("training.json"))
    synthetic.generate(packages_folder(work))
    audio = rendered(work, ("train", "test", "synthetic"))
    references = {one.id: one for one in read_table(REFERENCES_FILE, Reference)}
    clips, labels = read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label)
    model, baseline = load_checkpoint(checkpoint), Baseline(audio, clips, labels)

    def scores(audio: Path, clips: Sequence[DemoClip]) -> tuple[Scores, Scores]:
        return model_scores(model, audio, [clip.id for clip in clips]), baseline.scores(audio, clips)

    held_out = scores(audio, [clip for clip in clips if clip.split in ("test", "synthetic")])
    rows = ladder_rows("test", clips, references, *held_out)
    mixes = [clip for clip in clips if clip.split == "test" and clip.kind == "mix"]
    on_noise = with_noise_floor(audio, mixes, work / "audio-with-noise-floor")
    rows += ladder_rows("test", mixes, references, *scores(on_noise, mixes), f", {NOISE_FLOOR_DB} dB noise floor")
    rows += label_rows("test", clips, labels, *held_out)
    rows += ladder_rows("synthetic", clips, references, *held_out)
    rows += label_rows("synthetic", clips, labels, *held_out)
    write_results(rows, out)


def tell_other_versions(found: Mapping[str, str], account: Path) -> None:
    """What is measured on other packages than were trained on is said to be."""
    if account.exists():
        before = json.loads(account.read_text())["packages"]
        for name, version in found.items():
            if before.get(name) != version:
                click.echo(f"note: {name} is {version}; the checkpoint's audio was of {before.get(name)}", err=True)


def write_results(rows: Sequence[TableRow], out: Path) -> None:
    """The table as CSV, and to be read."""
    where = {"processor": processor_name(), "torch": torch.__version__}
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*TableRow.__struct_fields__, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(msgspec.structs.asdict(row) | where for row in rows)
    click.echo(table_text(rows))


if __name__ == "__main__":
    torch.set_num_threads(usable_cores())
    run(recipe, "python -m aesanet.training.demo")
