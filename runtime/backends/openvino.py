"""OpenVINO: the fastest on CPUs, in bf16 where the processor computes in it."""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from aesanet.bundle import GraphForm
from aesanet.lengths import num_tokens
from aesanet.runtime.backends.base import (
    Backend,
    BundleFiles,
    Device,
    EngineOptions,
    PendingEmbedded,
    Precision,
    Support,
    mean_over_tokens,
)

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVINOBackend(Backend):
    """Three compiled models; only the encoder's precision is a choice, the front end and head stay FP32."""

    form: GraphForm = "fp32"

    def __init__(self, files: BundleFiles, options: EngineOptions) -> None:
        self._turn = Lock()  # a request holds one call's tensors
        core = _core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads

        def request(path: Path, hint: str) -> Any:
            return core.compile_model(path, "CPU", settings | {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()

        graphs = files.graphs(self.form)
        self._frontend = request(graphs["frontend"], "f32")
        self._encoder = request(graphs["encoder"], _HINTS[options.precision])
        self._head = request(graphs["head"], "f32")
        self.name = f"openvino {version('openvino')} {options.device} {options.precision}"
        self.device: Device = options.device
        self.precision: Precision = options.precision
        self.kind = f"openvino {options.device} {options.precision}"

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        with self._turn:
            return self._features_and_scores(waveform, num_samples)[1].copy()

    def submit_embedded(self, waveform: np.ndarray, num_samples: np.ndarray) -> PendingEmbedded:
        """As `Backend.submit_embedded`."""
        with self._turn:
            features, scores = self._features_and_scores(waveform, num_samples)
            found = scores.copy(), mean_over_tokens(features, num_tokens(num_samples))
        return lambda: found

    def features(self, fbank: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """As `Backend.features`."""
        with self._turn:
            return _run(self._encoder, {"fbank": fbank, "num_tokens": num_tokens}).copy()

    def _features_and_scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = num_tokens(num_samples)
        fbank = _run(self._frontend, {"waveform": waveform})
        features = _run(self._encoder, {"fbank": fbank, "num_tokens": tokens})
        return features, _run(self._head, {"features": features, "num_tokens": tokens})


def support() -> Support:
    """What OpenVINO can run here; bf16 only where the processor has instructions for it."""
    try:
        core = _core()
    except ImportError:
        return Support(None, (), "not installed: pip install 'aesanet[openvino]'")
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    runs: tuple[tuple[Device, Precision], ...] = (("cpu", "fp32"),)
    if "BF16" in capabilities:
        runs = (("cpu", "bf16"), *runs)
    return Support(version("openvino"), runs, "CPU capabilities " + ", ".join(capabilities))


@cache
def _core() -> Any:
    """OpenVINO, once for the process.

    Each one has signals handled on a stack of its own, and when it goes puts back the one of before. Of two that go in
    the order in which they came, that is no longer there, and Ctrl-C ends the process with a segmentation fault.
    """
    from openvino import Core

    return Core()


def _run(request: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The one output of a graph; it is the request's own memory, good until the next call."""
    return np.asarray(request.infer(inputs, share_inputs=True, share_outputs=True)[0])
