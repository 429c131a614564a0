"""Checkpoint to bundle: load, export, check, write."""

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch

from aesanet import __version__
from aesanet.bundle import GRAPH_NAMES, GraphName, GraphSpec, Manifest, Source
from aesanet.export.graph import export_graph
from aesanet.export.half import add_half
from aesanet.export.parity import measure_parity
from aesanet.export.writer import new_bundle, write_manifest
from aesanet.hashing import file_sha256
from aesanet.interrupts import interrupts_kept
from aesanet.models.checkpoint import load_checkpoint

_TOOLS = (torch, onnx, onnx_ir, onnxscript, onnxruntime)


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    beats: str | Path | None = None,
    half_on: Iterable[np.ndarray] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Export a checkpoint to a bundle folder at `out`, which takes its place only after it passed the parity check.

    checkpoint, beats : as `load_checkpoint` takes them
    half_on           : real audio, each clip float32 [samples] at 16 kHz: FP16 graphs are made too, and must give the
                        FP32 graphs' scores on each clip's first window; taken one by one, before anything is exported
    progress          : called with a line about each step as it begins

    Raises CheckpointError or ExportError; a bundle that was at `out` is then left as it was.
    """
    with new_bundle(out) as folder, interrupts_kept():
        progress(f"loading {checkpoint}")
        model = load_checkpoint(checkpoint, beats)
        windows = [clip[: model.config.window.window_samples] for clip in half_on]
        graphs: dict[GraphName, GraphSpec] = {}
        for name in GRAPH_NAMES:
            progress(f"exporting {name}")
            graphs[name] = export_graph(model, name, folder / f"{name}.onnx")
        progress("comparing ONNX Runtime with PyTorch")
        parity = measure_parity(model, folder)
        half = add_half(folder, graphs, windows, progress) if windows else None
        head = model.config.head
        manifest = Manifest(
            window=model.config.window,
            weights=model.config.weights,
            score_range=head.score_range,
            calibration=msgspec.to_builtins(head.calibration),
            graphs=graphs,
            source=Source(
                checkpoint=Path(checkpoint).name,
                sha256=file_sha256(checkpoint),
                beats_sha256=None if beats is None else file_sha256(beats),
                config=msgspec.to_builtins(model.config),
            ),
            tools={"aesanet": __version__, **{tool.__name__: str(tool.__version__) for tool in _TOOLS}},
            parity=parity,
            half=half,
        )
        write_manifest(folder, manifest)
    return manifest
