"""The demo checkpoint's recipe, one step a command; see `models/demo/README.md`.

python -m aesanet.training.demo train --work DIR      # from the committed labels to a checkpoint
python -m aesanet.training.demo evaluate --work DIR   # its table, beside a baseline's
python -m aesanet.training.demo label --work DIR      # the labels anew
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import torch

from aesanet.machine import processor_name, usable_cores
from aesanet.models.checkpoint import load_checkpoint
from aesanet.training.demo import sources, synthetic
from aesanet.training.demo.baseline import baseline_scores
from aesanet.training.demo.corpus import packages_folder, rendered
from aesanet.training.demo.label import Label, label, measure
from aesanet.training.demo.ladders import LadderRow, ladder_rows, ladder_table
from aesanet.training.demo.plan import DemoClip, plan
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
    sources.fetch(packages_folder(work))
    synthetic.generate(packages_folder(work))
    audio = rendered(work, ("train", "test", "synthetic"))
    clips, labels = read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label)
    held_out = [clip.id for clip in clips if clip.split in ("test", "synthetic")]
    model = model_scores(load_checkpoint(checkpoint), audio, held_out)
    baseline = baseline_scores(audio, clips, labels)
    rows = [row for split in ("test", "synthetic") for row in ladder_rows(split, clips, labels, model, baseline)]
    write_results(rows, out)


def write_results(rows: Sequence[LadderRow], out: Path) -> None:
    """The table as CSV, and to be read."""
    where = {"processor": processor_name(), "torch": torch.__version__}
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*LadderRow.__struct_fields__, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(msgspec.structs.asdict(row) | where for row in rows)
    click.echo(ladder_table(rows))


if __name__ == "__main__":
    torch.set_num_threads(usable_cores())
    recipe()
