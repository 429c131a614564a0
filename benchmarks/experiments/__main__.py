"""The paper's experiments on the demo corpus, each a command that writes its CSV and its plot.

python -m aesanet.benchmarks.experiments heads --work DIR      # triplet term, buffer sampling, features
python -m aesanet.benchmarks.experiments languages --work DIR  # the demo checkpoint's scores by language
"""

from pathlib import Path

import click
import torch

from aesanet.benchmarks.experiments.heads import epoch_rows, head_rows, head_table, plot_heads
from aesanet.benchmarks.experiments.languages import language_rows, language_table, plot_languages
from aesanet.benchmarks.experiments.tables import provenance, write_rows
from aesanet.commands import run
from aesanet.machine import usable_cores
from aesanet.training.demo import sources, synthetic
from aesanet.training.demo.corpus import packages_folder

RESULTS = Path("benchmarks/results")

work_option = click.option(
    "--work", required=True, type=click.Path(path_type=Path), help="Folder for packages, audio and runs; 10 GB."
)
out_option = click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))


@click.group()
def experiments() -> None:
    """Repeat the paper's experiments on the demo corpus."""


@experiments.command()
@work_option
@out_option
def heads(work: Path, out: Path) -> None:
    """Train heads with and without the triplet term, on a trunk and on log-mel; what is done is not done again."""
    sources.fetch(packages_folder(work))
    synthetic.generate(packages_folder(work))
    rows = [row | provenance() for row in head_rows(work)]
    write_rows(out / "experiments.csv", rows)
    write_rows(out / "experiments-epochs.csv", [row | provenance() for row in epoch_rows(work)])
    plot_heads(rows, out / "experiments.svg")
    click.echo(head_table(rows))


@experiments.command()
@work_option
@out_option
def languages(work: Path, out: Path) -> None:
    """Score undamaged speech of each language with the demo checkpoint."""
    sources.fetch(packages_folder(work))
    rows = [row | provenance() for row in language_rows(work)]
    write_rows(out / "languages.csv", rows)
    plot_languages(rows, out / "languages.svg")
    click.echo(language_table(rows))


if __name__ == "__main__":
    torch.set_num_threads(usable_cores())
    run(experiments, "python -m aesanet.benchmarks.experiments")
