"""FP16 graphs as a GPU rounds them, on a processor: what verify holds where there is no GPU."""

import numpy as np
import onnxruntime

from aesanet.bundle import GraphForm
from aesanet.export.sessions import open_as_written, run_graphs
from aesanet.lengths import num_tokens
from aesanet.runtime.backends.base import Backend, BundleFiles, Device, Precision


class RoundedHalf(Backend):
    """FP16 graphs on a processor, in ONNX Runtime, with every half tensor rounded as a GPU rounds it."""

    kind = "onnxruntime cpu fp16"
    device: Device = "cpu"
    precision: Precision = "fp16"
    form: GraphForm = "fp16"

    def __init__(self, files: BundleFiles) -> None:
        self.name = f"onnxruntime {onnxruntime.__version__} cpu fp16, every half tensor rounded"
        self._sessions = open_as_written(files.graphs(self.form))

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        return run_graphs(self._sessions, waveform, num_tokens(num_samples))[2]
