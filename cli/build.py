"""`aesanet export`: from checkpoint to bundle."""

from pathlib import Path

import click

from aesanet.cli.notes import extra, note


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--beats", type=click.Path(path_type=Path), help="The public BEATs file of a head-only checkpoint.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle folder to write.")
def export(checkpoint: Path, beats: Path | None, out: Path) -> None:
    """Export CHECKPOINT to a bundle of ONNX graphs.

    CHECKPOINT is an aesanet .safetensors (whole, or the head alone with --beats) or a training .pt. The graphs are
    compared with PyTorch before the bundle takes its place; a failed check leaves nothing behind.
    """
    with extra("export,cpu"):
        from aesanet.export.build import export_bundle
        from aesanet.models.public_beats import KNOWN_FILES

    manifest = export_bundle(checkpoint, out, beats, progress=note)
    if manifest.source.beats_sha256 is not None:
        known = KNOWN_FILES.get(manifest.source.beats_sha256)
        note(f"BEATs file: {f'the public {known}' if known else 'its sha256 is not one that aesanet knows by name'}")
    parity = manifest.parity
    click.echo(
        f"{out}: parity with PyTorch over {len(parity.cases)} batches: "
        f"features {parity.features_max_abs:.1e}, scores {parity.scores_max_abs:.1e} "
        f"(limit {parity.scores_limit:.0e}; scores of these clips span {parity.scores_spread:.2g} or more on each axis)"
    )
