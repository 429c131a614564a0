"""ONNX Runtime: FP32 on every processor; FP32 and FP16 on NVIDIA GPUs where onnxruntime-gpu is installed."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np

from aesanet.bundle import GRAPH_NAMES, GraphName
from aesanet.errors import BackendError
from aesanet.lengths import num_tokens
from aesanet.machine import require_gpu
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
from aesanet.runtime.backends.captured import CapturedRuns, run_options

_GPU_BATCH_WINDOWS: Final = 64  # benchmarks/results/backends-h200.csv: with 8, one third of the speed

_Found = TypeVar("_Found")


class OnnxRuntimeBackend(Backend):
    """Three sessions on one device.

    Raises BackendError where CUDA graphs are asked for (see captured.py) and cannot be had.
    """

    def __init__(self, files: BundleFiles, options: EngineOptions) -> None:
        import onnxruntime

        device, precision = options.device, options.precision
        window_samples = files.manifest.window.window_samples
        if device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their packages, where they are installed as such
        capturing = device == "cuda" and options.cuda_graphs is True
        of_sessions = onnxruntime.SessionOptions()
        of_sessions.intra_op_num_threads = options.threads or 0  # 0: one a physical core
        of_sessions.log_severity_level = 3
        paths = {**files.fp32, **((files.fused or files.fp16) if precision == "fp16" else {})}

        def session(name: GraphName) -> Any:
            # TF32 would round the front end's sums to 10 bits, and log-mel by up to 5.
            cuda = {"use_tf32": 0, **({"enable_cuda_graph": 1} if capturing else {})}
            providers: list[Any] = [("CUDAExecutionProvider", cuda)] if device == "cuda" else []
            return onnxruntime.InferenceSession(
                paths[name], of_sessions, providers=[*providers, "CPUExecutionProvider"]
            )

        self._device = device
        self._frontend, self._encoder, self._head = sessions = [session(name) for name in GRAPH_NAMES]
        # A provider that cannot start is passed over with no error.
        if device == "cuda" and self._encoder.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError("onnxruntime has a CUDA provider, but it did not start; see `aesanet doctor`")
        graphs = " with CUDA graphs" if capturing else ""
        self.name = f"onnxruntime {onnxruntime.__version__} {device} {precision}{graphs}"
        self.precision: Precision = precision
        self.kind = f"onnxruntime {device} {precision}{graphs}"
        self._captured = CapturedRuns(onnxruntime, sessions, window_samples) if capturing else None
        self._uncaptured = run_options(onnxruntime) if capturing else None
        self._owner = ThreadPoolExecutor(1) if capturing else None
        if capturing:
            self._try(window_samples)

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        return self._in_turn(self._score, waveform, num_samples, False)[0]

    def submit_embedded(self, waveform: np.ndarray, num_samples: np.ndarray) -> PendingEmbedded:
        """As `Backend.submit_embedded`."""
        found = self._in_turn(self._score, waveform, num_samples, True)
        return lambda: found

    def features(self, fbank: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """As `Backend.features`, never as a CUDA graph."""
        inputs = {"fbank": fbank, "num_tokens": num_tokens}
        return np.asarray(self._in_turn(_run, self._encoder, inputs, "features", "cpu", self._uncaptured).numpy())

    def batch_seconds(self, window_seconds: float) -> float:
        """As `Backend.batch_seconds`."""
        return super().batch_seconds(window_seconds) if self._device == "cpu" else _GPU_BATCH_WINDOWS * window_seconds

    def _in_turn(self, work: Callable[..., _Found], *given: Any) -> _Found:
        """Do work at once; with CUDA graphs, which ONNX Runtime keeps by thread, always in the same one."""
        return work(*given) if self._owner is None else self._owner.submit(work, *given).result()

    def _try(self, window_samples: int) -> None:
        """Capture a window of noise: who asked for graphs hears now, and not after hours, that there are none."""
        noise = np.random.default_rng(0).normal(0, 0.1, (1, window_samples)).astype(np.float32)
        for _ in range(2):  # the first time, nobody knows that a shape comes again
            self.scores(noise, np.array([window_samples]))

    def _score(self, waveform: np.ndarray, num_samples: np.ndarray, embedded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores of a batch, and embeddings or nothing."""
        batch, tokens = len(num_samples), num_tokens(num_samples)
        found = self._captured.run(waveform, tokens) if self._captured is not None else None
        if found is None:
            fbank = _run(self._frontend, {"waveform": waveform}, "fbank", self._device, self._uncaptured)
            inputs = {"fbank": fbank, "num_tokens": tokens}
            features = _run(self._encoder, inputs, "features", self._device, self._uncaptured)
            inputs = {"features": features, "num_tokens": tokens}
            found = features, _run(self._head, inputs, "scores", "cpu", self._uncaptured).numpy()
        features, scores = found
        embeddings = np.zeros((0, 0), np.float32)
        if embedded:
            embeddings = mean_over_tokens(features.numpy()[:batch], tokens)
        return np.asarray(scores)[:batch], embeddings


def _run(session: Any, inputs: Mapping[str, Any], output: str, device: Device, options: Any = None) -> Any:
    """One graph's output as a value of ONNX Runtime that stays on the device; so does an input that is one."""
    binding = session.io_binding()
    for name, value in inputs.items():
        (binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input)(name, value)
    binding.bind_output(output, device)
    session.run_with_iobinding(binding, options)
    (value,) = binding.get_outputs()
    return value


def support() -> Support:
    """What ONNX Runtime can run here."""
    try:
        import onnxruntime
    except ImportError:
        return Support(None, (), "not installed: pip install 'aesanet[cpu]', or onnxruntime-gpu for CUDA")
    providers = onnxruntime.get_available_providers()
    runs: list[tuple[Device, Precision]] = [("cpu", "fp32")]
    detail = f"providers {', '.join(providers)}"
    if "CUDAExecutionProvider" in providers:
        try:
            require_gpu()
            runs = [("cuda", "fp16"), ("cuda", "fp32"), *runs]
        except BackendError as error:
            detail += f"; on CUDA: {error}"
    return Support(onnxruntime.__version__, tuple(runs), detail)
