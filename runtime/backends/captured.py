"""ONNX Runtime's front end and encoder as CUDA graphs: a shape that comes again is launched at once, and not by kernel.

ONNX Runtime captures by itself where a session has `enable_cuda_graph`: a graph for each thread and `gpu_graph_id` that
a run names (-1: none), bound to the addresses of its inputs and outputs, and kept as long as the session. So all runs
are made in one thread, each graph has buffers of its own, and their number is bounded. While one is captured, nobody
else in the process may allocate memory of the GPU. The head stays out: its LSTM wants the lengths on the host.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aesanet.errors import BackendError
from aesanet.lengths import MEL_BINS, TOKENS_PER_PATCH, num_frames, num_tokens
from aesanet.runtime.shapes import CAPTURED_SAMPLES, GRAPHS_KEPT, grid_batch, grid_samples

_SEEN_SHAPES: Final = 1024  # that are remembered as run once
_LIMIT: Final = 5e-3  # of a clip's features, relatively: as far as FP16 graphs may be from FP32
_NO_GRAPH: Final = -1


@dataclass(frozen=True)
class _Captured:
    """A shape's buffers on the GPU, and the bindings of both graphs to them."""

    waveform: Any
    tokens: Any
    features: Any
    frontend: Any
    encoder: Any
    options: Any


class CapturedRuns:
    """Features of batches in shapes that come again. For one thread, which is done with them before it asks again.

    onnxruntime       : the module
    frontend, encoder : its sessions, with `enable_cuda_graph`
    """

    def __init__(self, onnxruntime: Any, frontend: Any, encoder: Any) -> None:
        self._ort, self._frontend, self._encoder = onnxruntime, frontend, encoder
        (features,) = encoder.get_outputs()
        self._width = int(features.shape[2])
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def features(self, waveform: np.ndarray, tokens: np.ndarray) -> Any | None:
        """A batch's features as a value on the GPU, float32 [rows, tokens, width]; rows after its own mean nothing.

        None where it is to be run as it is: too large to gain from a graph, in a shape that is new, or one too many.
        Raises BackendError where a graph fails, or gives other numbers than its kernels one by one; no more calls then.
        """
        batch, samples = waveform.shape
        key = grid_batch(batch), grid_samples(samples)
        known = self._captured.get(key)
        if known is None and not self._worth_it(key, waveform.size):
            return None
        padded, counted = np.zeros(key, np.float32), np.full(key[0], TOKENS_PER_PATCH, np.int64)
        padded[:batch, :samples], counted[:batch] = waveform, tokens
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
        return captured.features

    def __bool__(self) -> bool:
        """Is there any graph yet?"""
        return bool(self._captured)

    def _worth_it(self, key: tuple[int, int], samples: int) -> bool:
        """Whether a shape comes again, its batch is small enough, and there is room."""
        again = key in self._seen
        self._seen[key] = None
        if len(self._seen) > _SEEN_SHAPES:
            self._seen.popitem(last=False)
        return again and samples <= CAPTURED_SAMPLES and len(self._captured) < GRAPHS_KEPT

    def _capture(self, key: tuple[int, int], number: int) -> _Captured:
        """Capture both graphs on silence: a graph that kept what it was captured on would be found out by `_check`."""
        rows, samples = key
        value = self._ort.OrtValue
        waveform = value.ortvalue_from_numpy(np.zeros(key, np.float32), "cuda", 0)
        tokens = value.ortvalue_from_numpy(np.full(rows, TOKENS_PER_PATCH, np.int64), "cuda", 0)
        fbank = value.ortvalue_from_shape_and_type((rows, num_frames(samples), MEL_BINS), np.float32, "cuda", 0)
        shape = (rows, num_tokens(samples), self._width)
        features = value.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
        captured = _Captured(
            waveform=waveform,
            tokens=tokens,
            features=features,
            frontend=_bound(self._frontend, {"waveform": waveform}, ("fbank", fbank)),
            encoder=_bound(self._encoder, {"fbank": fbank, "num_tokens": tokens}, ("features", features)),
            options=run_options(self._ort, number),
        )
        self._run(captured, captured.options)
        return captured

    def _run(self, captured: _Captured, options: Any) -> None:
        self._frontend.run_with_iobinding(captured.frontend, options)
        self._encoder.run_with_iobinding(captured.encoder, options)

    def _check(self, captured: _Captured, tokens: np.ndarray) -> None:
        """Raise BackendError where the graphs left other features than the same kernels do one by one."""
        found = captured.features.numpy()
        self._run(captured, run_options(self._ort, _NO_GRAPH))
        expected = captured.features.numpy()
        for row, count in enumerate(tokens):
            ours, theirs = found[row, :count], expected[row, :count]
            if not np.linalg.norm(ours - theirs) <= _LIMIT * np.linalg.norm(theirs):
                raise BackendError(
                    "a CUDA graph of ONNX Runtime gives other features than its kernels one by one; "
                    "do without --cuda-graphs"
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
