"""ONNX Runtime: FP32 on every processor; FP32 and FP16 on NVIDIA GPUs where onnxruntime-gpu is installed."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

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
from aesanet.runtime.backends.captured import CapturedRuns
from aesanet.runtime.backends.sessions import Sessions

_GPU_BATCH_WINDOWS: Final = 64  # benchmarks/results/backends-h200.csv: with 8, one third of the speed

_Found = TypeVar("_Found")


class OnnxRuntimeBackend(Backend):
    """Three sessions on one device, on a GPU perhaps as CUDA graphs (see captured.py).

    Raises BackendError where graphs are asked for and cannot be had. Where they are to be tried, a line on stderr says
    why there are none, or no more.
    """

    def __init__(self, files: BundleFiles, options: EngineOptions) -> None:
        import onnxruntime

        device, precision = options.device, options.precision
        if device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their packages, where they are installed as such
        paths = {**files.fp32, **((files.fused or files.fp16) if precision == "fp16" else {})}
        self._open = partial(Sessions, onnxruntime, paths, device, options.threads)
        self._device = device
        self._graphs_or_none = options.cuda_graphs is True
        self._captured: CapturedRuns | None = None
        self._owner: ThreadPoolExecutor | None = None
        if device == "cuda" and options.cuda_graphs:
            self._owner = ThreadPoolExecutor(1)
            self._capture(onnxruntime, files.manifest.window.window_samples)
        else:
            self._sessions = self._open()
        graphs = " with CUDA graphs" if self._captured is not None else ""
        self.name = f"onnxruntime {onnxruntime.__version__} {device} {precision}{graphs}"
        self.precision: Precision = precision
        self.kind = f"onnxruntime {device} {precision}{graphs}"

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        """As `Backend.scores`."""
        return self._in_turn(self._score, waveform, num_samples, False)[0]

    def submit_embedded(self, waveform: np.ndarray, num_samples: np.ndarray) -> PendingEmbedded:
        """As `Backend.submit_embedded`."""
        found = self._in_turn(self._score, waveform, num_samples, True)
        return lambda: found

    def features(self, fbank: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """As `Backend.features`, never as a CUDA graph."""
        return self._in_turn(lambda: self._sessions.features(fbank, num_tokens))

    def batch_seconds(self, window_seconds: float) -> float:
        """As `Backend.batch_seconds`."""
        return super().batch_seconds(window_seconds) if self._device == "cpu" else _GPU_BATCH_WINDOWS * window_seconds

    def _in_turn(self, work: Callable[..., _Found], *given: Any) -> _Found:
        """Do work at once; with CUDA graphs, which ONNX Runtime keeps by thread, always in the same one."""
        return work(*given) if self._owner is None else self._owner.submit(work, *given).result()

    def _capture(self, onnxruntime: Any, window_samples: int) -> None:
        """Sessions that capture, and a window of noise: who wants graphs hears now, not after hours, of none."""
        noise = np.random.default_rng(0).normal(0, 0.1, (1, window_samples)).astype(np.float32)
        try:
            self._sessions = self._open(capturing=True)
            self._captured = CapturedRuns(onnxruntime, self._sessions, window_samples)
        except Exception as error:  # ONNX Runtime raises what it likes
            self._do_without(error)
        for _ in range(2):  # the first time, nobody knows that a shape comes again
            self.scores(noise, np.array([window_samples]))

    def _do_without(self, error: Exception) -> None:
        """Sessions that do not capture, in place of those that failed to; raises the error where that will not do."""
        if self._graphs_or_none:
            raise error
        print(f"aesanet: no CUDA graphs from here on, which is slower: {error}", file=sys.stderr)
        self._captured = None
        self._sessions = self._open()

    def _score(self, waveform: np.ndarray, num_samples: np.ndarray, embedded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores of a batch, and embeddings or nothing."""
        batch, tokens = len(num_samples), num_tokens(num_samples)
        features, scores = self._run(waveform, tokens)
        embeddings = np.zeros((0, 0), np.float32)
        if embedded:
            embeddings = mean_over_tokens(features.numpy()[:batch], tokens)
        return scores[:batch], embeddings

    def _run(self, waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        if self._captured is not None:
            try:
                return self._captured.run(waveform, tokens)
            except BackendError as error:
                self._do_without(error)
        return self._sessions.run(waveform, tokens)


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
