"""ONNX Runtime's three graphs as CUDA graphs: a shape that comes again is launched at once, and not kernel by kernel.

ONNX Runtime captures by itself where a session has `enable_cuda_graph`: a graph for each thread and `gpu_graph_id` that
a run names (-1: none), bound to the addresses of its inputs and outputs, and kept as long as the session. So all runs
are made in one thread, each graph has buffers of its own, and their number and size are bounded; when most are of
shapes that no longer come, all go with their sessions. While one is captured, nobody else in the process may allocate
memory of the GPU.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.errors import BackendError
from aesanet.lengths import MEL_BINS, SAMPLE_RATE, TOKENS_PER_PATCH, num_frames, num_tokens
from aesanet.limits import FEATURES_LIMIT, SCORES_LIMIT
from aesanet.runtime.backends.base import Precision
from aesanet.runtime.backends.sessions import NO_GRAPH, Sessions, run_options
from aesanet.runtime.cuda.shapes import GRAPHS_KEPT, grid_batch, grid_samples

_SEEN_SHAPES: Final = 1024  # that are remembered as run once
_IDLE_RUNS: Final = 1024  # after which a shape is taken to come no more; a guess: nobody has timed new sessions
_KEPT_SAMPLES: Final = 5120 * SAMPLE_RATE  # of all shapes that are kept: of base size, 1.3 GB of inputs and outputs


@dataclass(eq=False)
class _Captured:
    """A shape's buffers on the GPU, the bindings of the three sessions to them, in their order, and its last run."""

    waveform: Any
    tokens: Any
    features: Any
    scores: Any
    bindings: tuple[tuple[Any, Any], ...]
    options: Any
    used: int = 0


class GridRuns:
    """Batches in shapes of a grid, as graphs once a shape came again. For one thread.

    A batch's shape, and so its numbers, are the same with its graph, before it has one, and where there are none.

    onnxruntime    : the module
    sessions       : that can be captured, or not, if there are to be no graphs
    window_samples : of a whole window, which is not padded; most batches have them
    """

    def __init__(self, onnxruntime: Any, sessions: Sessions, window_samples: int, precision: Precision) -> None:
        self._ort, self._sessions, self._window_samples = onnxruntime, sessions, window_samples
        self._limits = FEATURES_LIMIT[precision], SCORES_LIMIT[precision]  # from its own kernels one by one
        (features,) = sessions.encoder.get_outputs()
        self._width = int(features.shape[2])
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._runs = 0
        self._full = False
        self._failed: str | None = None

    @property
    def capturing(self) -> bool:
        """Whether there are graphs, or will be."""
        return self._sessions.capturing

    @property
    def outdated(self) -> bool:
        """Whether there is no room for a shape that comes again, and most graphs are of shapes that no longer do."""
        if not self._full:
            return False
        idle = [captured for captured in self._captured.values() if self._runs - captured.used > _IDLE_RUNS]
        return 2 * len(idle) > len(self._captured)

    def run(self, waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        """As `Sessions.run`. Rows after the batch's own mean nothing, and features are good until the next run.

        Raises BackendError where sessions that can be captured fail, or a graph gives other numbers than its kernels
        one by one; and from then on for each batch, as it is not known what such sessions are worth.
        """
        batch, samples = waveform.shape
        key = grid_batch(batch), samples if samples == self._window_samples else grid_samples(samples)
        counted = np.full(key[0], TOKENS_PER_PATCH, np.int64)
        counted[:batch] = tokens
        padded = np.ascontiguousarray(waveform)
        if waveform.shape != key:
            padded = np.zeros(key, np.float32)
            padded[:batch, :samples] = waveform
        if not self.capturing:
            return self._sessions.run(padded, counted)
        if self._failed is None:
            try:
                return self._run(key, padded, counted)
            except Exception as error:  # ONNX Runtime raises what it likes
                self._failed = str(error)
        raise BackendError(self._failed) from None

    def _run(self, key: tuple[int, int], waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        self._runs += 1
        self._full = False
        known = self._captured.get(key)
        if known is None and not self._worth_it(key):
            return self._sessions.run(waveform, tokens)
        captured = known or self._capture(key, number=1 + len(self._captured))
        captured.used = self._runs
        captured.waveform.update_inplace(waveform)
        captured.tokens.update_inplace(tokens)
        _launch(captured, captured.options)
        if known is None:
            self._check(captured, tokens)
            self._captured[key] = captured
        return captured.features, captured.scores.numpy()

    def _worth_it(self, key: tuple[int, int]) -> bool:
        """Whether a shape comes again, and there is room."""
        again = key in self._seen
        self._seen[key] = None
        if len(self._seen) > _SEEN_SHAPES:
            self._seen.popitem(last=False)
        kept = sum(rows * samples for rows, samples in (*self._captured, key))
        fits = kept <= _KEPT_SAMPLES and len(self._captured) < GRAPHS_KEPT
        self._full = again and not fits and key[0] * key[1] <= _KEPT_SAMPLES
        return again and fits

    def _capture(self, key: tuple[int, int], number: int) -> _Captured:
        """Capture the graphs on silence: one that kept what it was captured on would be found out by `_check`."""
        rows, samples = key
        value, sessions = self._ort.OrtValue, self._sessions
        waveform = value.ortvalue_from_numpy(np.zeros(key, np.float32), "cuda", 0)
        tokens = value.ortvalue_from_numpy(np.full(rows, TOKENS_PER_PATCH, np.int64), "cuda", 0)

        def empty(*shape: int) -> Any:
            return value.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)

        fbank = empty(rows, num_frames(samples), MEL_BINS)
        features, scores = empty(rows, num_tokens(samples), self._width), empty(rows, len(AXES))
        captured = _Captured(
            waveform=waveform,
            tokens=tokens,
            features=features,
            scores=scores,
            bindings=(
                _bound(sessions.frontend, {"waveform": waveform}, ("fbank", fbank)),
                _bound(sessions.encoder, {"fbank": fbank, "num_tokens": tokens}, ("features", features)),
                _bound(sessions.head, {"features": features, "num_tokens": tokens}, ("scores", scores)),
            ),
            options=run_options(self._ort, number),
        )
        _launch(captured, captured.options)
        return captured

    def _check(self, captured: _Captured, tokens: np.ndarray) -> None:
        """Raise BackendError where the graphs left other numbers than the same kernels do one by one."""
        found, scores = captured.features.numpy(), captured.scores.numpy()
        _launch(captured, run_options(self._ort, NO_GRAPH))
        expected = captured.features.numpy()
        of_features, of_scores = self._limits
        same = [np.abs(scores - captured.scores.numpy()).max() <= of_scores]
        for row, count in enumerate(tokens):
            ours, theirs = found[row, :count], expected[row, :count]
            same.append(np.linalg.norm(ours - theirs) <= of_features * np.linalg.norm(theirs))
        if not all(same):
            raise BackendError("a CUDA graph of ONNX Runtime gives other numbers than its kernels one by one")


def _launch(captured: _Captured, options: Any) -> None:
    for session, binding in captured.bindings:
        session.run_with_iobinding(binding, options)


def _bound(session: Any, inputs: Mapping[str, Any], output: tuple[str, Any]) -> tuple[Any, Any]:
    """A session with a binding to values on the GPU."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output(*output)
    return session, binding
