"""ONNX Runtime: FP32 on every processor; FP32 and FP16 on NVIDIA GPUs where onnxruntime-gpu is installed."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from aesanet.bundle import GRAPH_NAMES
from aesanet.errors import BackendError
from aesanet.lengths import num_tokens
from aesanet.runtime.backends.base import (
    Backend,
    BundleFiles,
    Device,
    PendingEmbedded,
    Precision,
    Support,
    mean_over_tokens,
)

_GPU_BATCH_WINDOWS: Final = 64  # benchmarks/results/backends-h200.csv: with 8, one third of the speed


class OnnxRuntimeBackend(Backend):
    """Three sessions on one device."""

    def __init__(self, files: BundleFiles, device: Device, precision: Precision, threads: int | None) -> None:
        import onnxruntime

        if device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their packages, where they are installed as such
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: one a physical core
        options.log_severity_level = 3
        # TF32 would round the front end's sums to 10 bits, and log-mel by up to 5.
        providers: list[Any] = [("CUDAExecutionProvider", {"use_tf32": 0})] if device == "cuda" else []
        providers.append("CPUExecutionProvider")
        paths = {**files.fp32, **(files.fp16 if precision == "fp16" else {})}
        self._device = device
        self._frontend, self._encoder, self._head = (
            onnxruntime.InferenceSession(paths[name], options, providers=providers) for name in GRAPH_NAMES
        )
        # A provider that cannot start is passed over with no error.
        if device == "cuda" and self._encoder.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError("onnxruntime has a CUDA provider, but it did not start; see `aesanet doctor`")
        self.name = f"onnxruntime {onnxruntime.__version__} {device} {precision}"
        self.precision: Precision = precision
        self.kind = f"onnxruntime {device} {precision}"

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        return self._features_and_scores(waveform, num_samples)[1]

    def submit_embedded(self, waveform: np.ndarray, num_samples: np.ndarray) -> PendingEmbedded:
        """As `Backend.submit_embedded`."""
        features, scores = self._features_and_scores(waveform, num_samples)
        found = scores, mean_over_tokens(features.numpy(), num_tokens(num_samples))
        return lambda: found

    def features(self, fbank: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """As `Backend.features`."""
        found = _run(self._encoder, {"fbank": fbank, "num_tokens": num_tokens}, "features", "cpu")
        return np.asarray(found.numpy())

    def batch_seconds(self, window_seconds: float) -> float:
        """As `Backend.batch_seconds`."""
        return _GPU_BATCH_WINDOWS * window_seconds if self._device == "cuda" else super().batch_seconds(window_seconds)

    def _features_and_scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> tuple[Any, np.ndarray]:
        """The features as a value of ONNX Runtime, wherever they are, and the scores."""
        tokens = num_tokens(num_samples)
        fbank = _run(self._frontend, {"waveform": waveform}, "fbank", self._device)
        features = _run(self._encoder, {"fbank": fbank, "num_tokens": tokens}, "features", self._device)
        scores = _run(self._head, {"features": features, "num_tokens": tokens}, "scores", "cpu")
        return features, np.asarray(scores.numpy())


def _run(session: Any, inputs: Mapping[str, Any], output: str, device: Device) -> Any:
    """One graph's output as a value of ONNX Runtime that stays on the device; so does an input that is one."""
    binding = session.io_binding()
    for name, value in inputs.items():
        (binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input)(name, value)
    binding.bind_output(output, device)
    session.run_with_iobinding(binding)
    (value,) = binding.get_outputs()
    return value


def support() -> Support:
    """What ONNX Runtime can run here."""
    try:
        import onnxruntime
    except ImportError:
        return Support(None, (), "not installed: pip install 'aesanet[cpu]', or onnxruntime-gpu for CUDA")
    runs: list[tuple[Device, Precision]] = [("cpu", "fp32")]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        runs = [("cuda", "fp16"), ("cuda", "fp32"), *runs]
    return Support(
        onnxruntime.__version__, tuple(runs), "providers " + ", ".join(onnxruntime.get_available_providers())
    )
