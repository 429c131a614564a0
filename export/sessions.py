"""A bundle's graphs in ONNX Runtime on the processor, as export and verify check them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime

from aesanet.bundle import GraphName
from aesanet.export.rounding import session_as_written

Sessions: TypeAlias = Mapping[GraphName, onnxruntime.InferenceSession]

ENGINE: Final = f"onnxruntime {onnxruntime.__version__}, CPU"


def open_sessions(paths: Mapping[GraphName, Path]) -> Sessions:
    """Graphs as they are."""
    return {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for name, path in paths.items()
    }


def open_as_written(paths: Mapping[GraphName, Path]) -> Sessions:
    """Graphs with every half tensor rounded, as a GPU rounds it."""
    return {name: session_as_written(ir.load(path)) for name, path in paths.items()}


def run_graphs(
    sessions: Sessions, waveform: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-mel, features and scores of a padded batch: float32 [batch, frames, 128], [batch, tokens, width], [batch, 4].

    waveform : float32 [batch, samples]
    tokens   : int64 [batch], of each clip
    """
    (fbank,) = sessions["frontend"].run(["fbank"], {"waveform": waveform})
    (features,) = sessions["encoder"].run(["features"], {"fbank": fbank, "num_tokens": tokens})
    (scores,) = sessions["head"].run(["scores"], {"features": features, "num_tokens": tokens})
    return fbank, features, scores
