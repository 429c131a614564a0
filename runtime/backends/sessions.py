"""A bundle's three graphs in ONNX Runtime, on one device; what they hand each other stays there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from aesanet.bundle import GRAPH_NAMES, GraphName
from aesanet.errors import BackendError
from aesanet.runtime.backends.base import Device

NO_GRAPH: Final = -1


class Sessions:
    """One session a graph. To be used by one thread at a time where they can be captured.

    onnxruntime : the module
    capturing   : whether runs can be captured as CUDA graphs (see cuda_graphs.py); these here are not

    Raises BackendError where the CUDA provider does not start, and what ONNX Runtime raises.
    """

    def __init__(
        self,
        onnxruntime: Any,
        paths: Mapping[GraphName, Path],
        device: Device,
        threads: int | None,
        capturing: bool = False,
    ) -> None:
        of_sessions = onnxruntime.SessionOptions()
        of_sessions.intra_op_num_threads = threads or 0  # 0: one a physical core
        of_sessions.log_severity_level = 4 if capturing else 3  # what cannot be captured is told by us
        # TF32 would round the front end's sums to 10 bits, and log-mel by up to 5.
        cuda = {"use_tf32": 0, **({"enable_cuda_graph": 1} if capturing else {})}
        providers: list[Any] = [("CUDAExecutionProvider", cuda)] if device == "cuda" else []
        self.frontend, self.encoder, self.head = (
            onnxruntime.InferenceSession(paths[name], of_sessions, providers=[*providers, "CPUExecutionProvider"])
            for name in GRAPH_NAMES
        )
        # A provider that cannot start is passed over with no error.
        if device == "cuda" and self.encoder.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError("onnxruntime has a CUDA provider, but it did not start; see `aesanet doctor`")
        self.capturing, self._device = capturing, device
        self._options = run_options(onnxruntime, NO_GRAPH) if capturing else None

    def run(self, waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        """Features of a batch as a value on the device, float32 [batch, tokens, width], and scores, float32 [batch, 4].

        waveform : float32 [batch, samples]
        tokens   : int64 [batch]
        """
        fbank = self._run(self.frontend, {"waveform": waveform}, "fbank", self._device)
        features = self._run(self.encoder, {"fbank": fbank, "num_tokens": tokens}, "features", self._device)
        scores = self._run(self.head, {"features": features, "num_tokens": tokens}, "scores", "cpu")
        return features, np.asarray(scores.numpy())

    def features(self, fbank: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """What the encoder alone gives."""
        inputs = {"fbank": fbank, "num_tokens": tokens}
        return np.asarray(self._run(self.encoder, inputs, "features", "cpu").numpy())

    def _run(self, session: Any, inputs: Mapping[str, Any], output: str, device: Device) -> Any:
        """One graph's output as a value of ONNX Runtime; an input may be one, too."""
        binding = session.io_binding()
        for name, value in inputs.items():
            (binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input)(name, value)
        binding.bind_output(output, device)
        session.run_with_iobinding(binding, self._options)
        (value,) = binding.get_outputs()
        return value


def run_options(onnxruntime: Any, graph: int) -> Any:
    """For a run of a session that can capture: the graph that it is captured as, or `NO_GRAPH`."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
