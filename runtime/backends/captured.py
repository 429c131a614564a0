"""ONNX Runtime's three graphs as CUDA graphs: a shape that comes again is launched at once, and not kernel by kernel.

ONNX Runtime captures by itself where a session has `enable_cuda_graph`: a graph for each thread and `gpu_graph_id` that
a run names (-1: none), bound to the addresses of its inputs and outputs, and kept as long as the session. So all runs
are made in one thread, each graph has buffers of its own, and their number and size are bounded. While one is captured,
nobody else in the process may allocate memory of the GPU.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aesanet.axes import AXES
from aesanet.errors import BackendError
from aesanet.lengths import MEL_BINS, SAMPLE_RATE, TOKENS_PER_PATCH, num_frames, num_tokens
from aesanet.runtime.shapes import GRAPHS_KEPT, grid_batch, grid_samples

_SEEN_SHAPES: Final = 1024  # that are remembered as run once
_KEPT_SAMPLES: Final = 5120 * SAMPLE_RATE  # of all shapes that are kept: of base size, 1.3 GB of inputs and outputs
_LIMIT: Final = 5e-3  # of a clip's features, relatively: as far as FP16 graphs may be from FP32
_SCORES_LIMIT: Final = 0.02
_NO_GRAPH: Final = -1


@dataclass(frozen=True)
class _Captured:
    """A shape's buffers on the GPU, and the bindings of the three graphs to them, in their order."""

    waveform: Any
    tokens: Any
    features: Any
    scores: Any
    bindings: tuple[Any, ...]
    options: Any


class CapturedRuns:
    """Batches in shapes that come again. For one thread, which is done with a batch before it asks again.

    onnxruntime    : the module
    sessions       : its sessions of front end, encoder and head, with `enable_cuda_graph`
    window_samples : of a whole window, which is not padded; most batches have them
    """

    def __init__(self, onnxruntime: Any, sessions: Sequence[Any], window_samples: int) -> None:
        self._ort, self._sessions, self._window_samples = onnxruntime, sessions, window_samples
        (features,) = sessions[1].get_outputs()
        self._width = int(features.shape[2])
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def run(self, waveform: np.ndarray, tokens: np.ndarray) -> tuple[Any, np.ndarray] | None:
        """A batch's features as a value on the GPU, float32 [rows, tokens, width], and scores, float32 [rows, 4].

        Rows after its own mean nothing. None where the batch is to be run as it is: in a shape that is new, or one too
        many. Raises BackendError where a graph fails, or gives other numbers than its kernels one by one; no more calls
        then.
        """
        batch, samples = waveform.shape
        key = grid_batch(batch), samples if samples == self._window_samples else grid_samples(samples)
        known = self._captured.get(key)
        if known is None and not self._worth_it(key):
            return None
        counted = np.full(key[0], TOKENS_PER_PATCH, np.int64)
        counted[:batch] = tokens
        if waveform.shape == key:
            padded = np.ascontiguousarray(waveform)
        else:
            padded = np.zeros(key, np.float32)
            padded[:batch, :samples] = waveform
        try:
            captured = known or self._capture(key, number=1 + len(self._captured))
            captured.waveform.update_inplace(padded)
            captured.tokens.update_inplace(counted)
            self._run(captured, captured.options)
            if known is None:
                self._check(captured, counted)
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime raises what it likes
            raise BackendError(f"ONNX Runtime's CUDA graphs failed: {error}; do without --cuda-graphs") from None
        self._captured[key] = captured
        return captured.features, captured.scores.numpy()

    def _worth_it(self, key: tuple[int, int]) -> bool:
        """Whether a shape comes again, and there is room."""
        again = key in self._seen
        self._seen[key] = None
        if len(self._seen) > _SEEN_SHAPES:
            self._seen.popitem(last=False)
        kept = sum(rows * samples for rows, samples in (*self._captured, key))
        return again and kept <= _KEPT_SAMPLES and len(self._captured) < GRAPHS_KEPT

    def _capture(self, key: tuple[int, int], number: int) -> _Captured:
        """Capture the graphs on silence: a graph that kept what it was captured on would be found out by `_check`."""
        rows, samples = key
        value = self._ort.OrtValue
        waveform = value.ortvalue_from_numpy(np.zeros(key, np.float32), "cuda", 0)
        tokens = value.ortvalue_from_numpy(np.full(rows, TOKENS_PER_PATCH, np.int64), "cuda", 0)
        fbank = value.ortvalue_from_shape_and_type((rows, num_frames(samples), MEL_BINS), np.float32, "cuda", 0)
        shape = (rows, num_tokens(samples), self._width)
        features = value.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
        scores = value.ortvalue_from_shape_and_type((rows, len(AXES)), np.float32, "cuda", 0)
        given: list[tuple[dict[str, Any], tuple[str, Any]]] = [
            ({"waveform": waveform}, ("fbank", fbank)),
            ({"fbank": fbank, "num_tokens": tokens}, ("features", features)),
            ({"features": features, "num_tokens": tokens}, ("scores", scores)),
        ]
        captured = _Captured(
            waveform=waveform,
            tokens=tokens,
            features=features,
            scores=scores,
            bindings=tuple(_bound(session, *values) for session, values in zip(self._sessions, given, strict=True)),
            options=run_options(self._ort, number),
        )
        self._run(captured, captured.options)
        return captured

    def _run(self, captured: _Captured, options: Any) -> None:
        for session, binding in zip(self._sessions, captured.bindings, strict=True):
            session.run_with_iobinding(binding, options)

    def _check(self, captured: _Captured, tokens: np.ndarray) -> None:
        """Raise BackendError where the graphs left other numbers than the same kernels do one by one."""
        found, scores = captured.features.numpy(), captured.scores.numpy()
        self._run(captured, run_options(self._ort, _NO_GRAPH))
        expected = captured.features.numpy()
        same = [np.abs(scores - captured.scores.numpy()).max() <= _SCORES_LIMIT]
        for row, count in enumerate(tokens):
            ours, theirs = found[row, :count], expected[row, :count]
            same.append(np.linalg.norm(ours - theirs) <= _LIMIT * np.linalg.norm(theirs))
        if not all(same):
            raise BackendError(
                "a CUDA graph of ONNX Runtime gives other numbers than its kernels one by one; do without --cuda-graphs"
            )


def run_options(onnxruntime: Any, graph: int = _NO_GRAPH) -> Any:
    """For a run of a session with `enable_cuda_graph`: the graph that it is captured as, or none."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _bound(session: Any, inputs: Mapping[str, Any], output: tuple[str, Any]) -> Any:
    """A binding of a session to values on the GPU."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output(*output)
    return binding
