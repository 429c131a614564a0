"""`aesanet export`: from checkpoint to bundle."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aesanet.commands import extra, note
from aesanet.errors import ClipError, InputError

if TYPE_CHECKING:
    import numpy as np

AUDIO_SECONDS = 600.0  # of each clip that FP16 is checked on: the longest that a window can be


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--beats", type=click.Path(path_type=Path), help="The public BEATs file of a head-only checkpoint.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle folder to write.")
@click.option("--fp16", is_flag=True, help="Make FP16 graphs too, for GPUs; they must give the FP32 graphs' scores.")
@click.option(
    "--audio",
    multiple=True,
    type=click.Path(),
    help="Files, folders or manifests that --fp16 is checked on.  [default: eight recordings that come with aesanet]",
)
def export(checkpoint: Path, beats: Path | None, out: Path, fp16: bool, audio: tuple[str, ...]) -> None:
    """Export CHECKPOINT to a bundle of ONNX graphs.

    CHECKPOINT is an aesanet .safetensors (whole, or the head alone with --beats) or a training .pt. The graphs are
    compared with PyTorch before the bundle takes its place; a failed check leaves nothing behind.
    """
    with extra("export,cpu"):
        from aesanet.export.build import export_bundle
        from aesanet.export.half import in_words
        from aesanet.models.public_beats import KNOWN_FILES

    if audio and not fp16:
        raise click.UsageError("--audio is what --fp16 is checked on; give --fp16 too")
    manifest = export_bundle(checkpoint, out, beats, _clips(audio) if fp16 else (), progress=note)
    if manifest.source.beats_sha256 is not None:
        known = KNOWN_FILES.get(manifest.source.beats_sha256)
        note(f"BEATs file: {f'the public {known}' if known else 'its sha256 is not one that aesanet knows by name'}")
    parity = manifest.parity
    click.echo(
        f"{out}: parity with PyTorch over {len(parity.cases)} batches: "
        f"features {parity.features_relative:.1e} (relative), scores {parity.scores_max_abs:.1e} "
        f"(limit {parity.scores_limit:.0e}; scores of these clips span {parity.scores_spread:.2g} or more on each axis)"
    )
    if (half := manifest.half) is not None:
        clips = "clip" if half.clips == 1 else "clips"
        click.echo(
            f"{out}: FP16 (attention logits in {in_words(half.logits)}) and FP32 on {half.clips} {clips}, "
            f"{half.seconds:.0f} s: "
            f"features {half.features_relative:.1e} (relative; limit {half.features_limit:.0e}), "
            f"scores {half.scores_max_abs:.1e} (limit {half.scores_limit:.0e})"
        )
        if (fused := half.fused) is not None:
            click.echo(
                f"{out}: the same, fused for ONNX Runtime on a GPU: features {fused.features_relative:.1e}, "
                f"scores {fused.scores_max_abs:.1e}"
            )


def _clips(inputs: tuple[str, ...]) -> "Iterator[np.ndarray]":
    """The start of every clip, float32 [samples] at 16 kHz; raises InputError for one that cannot be read."""
    from dataclasses import replace

    import numpy as np

    from aesanet.lengths import MIN_SAMPLES
    from aesanet.models import demo
    from aesanet.runtime.audio.decode import clip_blocks
    from aesanet.runtime.rows.inputs import read_rows

    long_enough = too_short = 0
    for row in read_rows(inputs or [str(path) for path in demo.samples()]):
        try:
            clip = row.clip()
            start = clip.start_seconds or 0.0
            until = min(clip.end_seconds or math.inf, start + AUDIO_SECONDS)
            blocks = list(clip_blocks(replace(clip, end_seconds=until)))
        except ClipError as error:
            raise InputError(f"{row.given.get('path')}: {error.message}; --audio must be readable") from None
        if sum(map(len, blocks)) < MIN_SAMPLES:
            too_short += 1
            continue
        long_enough += 1
        yield np.concatenate(blocks)
    if not long_enough:
        raise InputError(f"no audio in {', '.join(inputs)} that is long enough; FP16 is checked on at least one clip")
    if too_short:
        note(f"{too_short} clips are shorter than 0.175 s; FP16 is checked on the other {long_enough}")
