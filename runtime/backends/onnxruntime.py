"""ONNX Runtime: FP32 on every processor; FP32 and FP16 on NVIDIA GPUs where onnxruntime-gpu is installed."""

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from aesanet.bundle import GraphForm
from aesanet.errors import BackendError
from aesanet.gpu import compute_capability, require_gpu
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
from aesanet.runtime.backends.cuda_graphs import GridRuns
from aesanet.runtime.backends.sessions import Sessions

_GPU_BATCH_WINDOWS: Final = 64  # benchmarks/results/backends-h200.csv: with 8, one third of the speed
# Where fused graphs were seen to run (an H200), with attention by cuDNN. Others may write out half logits.
_FUSED_FROM: Final = (1, 31)
_FUSED_CAPABILITY: Final = 9

_Found = TypeVar("_Found")


class OnnxRuntimeBackend(Backend):
    """Three sessions on one device, on a GPU perhaps as CUDA graphs (see cuda_graphs.py).

    Raises BackendError where graphs are asked for and cannot be had. Where they are to be tried, a line on stderr says
    why there are none, or no more.
    """

    def __init__(self, files: BundleFiles, options: EngineOptions) -> None:
        import onnxruntime

        device, precision = options.device, options.precision
        self.device: Device = device
        self.form: GraphForm = "fp32"
        if device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN from their packages, where they are installed as such
        if precision == "fp16":
            self.form = "fused" if "fused" in files.forms and _runs_fused(onnxruntime) else "fp16"
        self.precision: Precision = precision
        self._onnxruntime = onnxruntime
        self._words = f"{device} {precision}{' fused' if self.form == 'fused' else ''}"
        self._open = partial(Sessions, onnxruntime, files.graphs(self.form), device, options.threads)
        self._window_samples = files.manifest.window.window_samples
        self._must_capture = options.cuda_graphs is True
        self._grid: GridRuns | None = None
        self._owner: ThreadPoolExecutor | None = None
        if device == "cuda" and options.cuda_graphs:
            self._owner = ThreadPoolExecutor(1)
            self._in_turn(self._try)
        else:
            self._begin(capturing=False)

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
        return super().batch_seconds(window_seconds) if self.device == "cpu" else _GPU_BATCH_WINDOWS * window_seconds

    def _in_turn(self, work: Callable[..., _Found], *given: Any) -> _Found:
        """Do work at once; with CUDA graphs, which ONNX Runtime keeps by thread, always in the same one."""
        return work(*given) if self._owner is None else self._owner.submit(work, *given).result()

    def _begin(self, capturing: bool) -> None:
        """Open sessions, once those that there were are gone, as their memory may be what is missing.

        Where graphs are wanted, batches are in shapes of the grid, also if there are none.
        """
        self._grid = None
        if vars(self).pop("_sessions", None) is not None:
            gc.collect()
        self._sessions = self._open(capturing=capturing)
        if self._owner is not None:
            self._grid = GridRuns(self._onnxruntime, self._sessions, self._window_samples, self.precision)
        graphs = " with CUDA graphs" if capturing else ""
        self.name = f"onnxruntime {self._onnxruntime.__version__} {self._words}{graphs}"
        self.kind = f"onnxruntime {self._words}{graphs}"

    def _try(self) -> None:
        """Capture a window of noise: who wants graphs hears now, and not after hours, that there are none."""
        self._begin_capturing()
        noise = np.random.default_rng(0).normal(0, 0.1, (1, self._window_samples)).astype(np.float32)
        for _ in range(2):  # the first time, nobody knows that a shape comes again
            self._score(noise, np.array([self._window_samples]), embedded=False)

    def _begin_capturing(self) -> None:
        reason = None
        try:
            self._begin(capturing=True)
        except Exception as error:  # ONNX Runtime raises what it likes
            reason = str(error)
        if reason is not None:
            self._do_without(reason)

    def _do_without(self, reason: str) -> None:
        """Sessions that do not capture, in place of those that failed to; BackendError where that will not do."""
        if self._must_capture:
            raise BackendError(f"ONNX Runtime's CUDA graphs failed: {reason}; do without --cuda-graphs")
        print(f"aesanet: no CUDA graphs from here on, which is slower: {reason}", file=sys.stderr)
        self._begin(capturing=False)

    def _score(self, waveform: np.ndarray, num_samples: np.ndarray, embedded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores of a batch, and embeddings or nothing."""
        batch, tokens = len(num_samples), num_tokens(num_samples)
        features, scores = self._run(waveform, tokens)
        embeddings = np.zeros((0, 0), np.float32)
        if embedded:
            embeddings = mean_over_tokens(features.numpy()[:batch], tokens)
        return scores[:batch], embeddings

    def _run(self, waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        if self._owner is None:
            return self._sessions.run(waveform, tokens)
        if self._grid is None or self._grid.outdated:
            self._begin_capturing()
        assert self._grid is not None
        if self._grid.capturing:
            reason = None
            try:
                return self._grid.run(waveform, tokens)
            except BackendError as error:
                reason = str(error)
            self._do_without(reason)
        return self._grid.run(waveform, tokens)


def _runs_fused(onnxruntime: Any) -> bool:
    """Whether fused graphs are what they are meant to be: attention in one kernel, with FP32 logits."""
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    try:
        return version >= _FUSED_FROM and int(compute_capability()) == _FUSED_CAPABILITY
    except BackendError:
        return False


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
