"""Where a graph goes wrong: its tensors held to what they should be, in order, and the first that differs named."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from polygraphy import constants
from polygraphy.backend.onnx import modify_outputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from aesanet.bundle import GraphPrecision
from aesanet.export.parity import relative_error
from aesanet.export.rounding import round_as_written

LIMITS: Final[dict[GraphPrecision, float]] = {"fp32": 1e-3, "fp16": 5e-2}
"""The relative error of a tensor, as Euclidean norms, from which it counts as different."""

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layers:
    """How a graph compares. `first` is the first tensor past the limit, in the graph's order, or None."""

    graph: str
    precision: GraphPrecision
    compared: int
    first: tuple[str, float] | None
    largest: tuple[str, float]

    def __str__(self) -> str:
        what = f"{self.graph} {self.precision}"
        if self.first is None:
            return (
                f"{what}: none of {self.compared} layers differs by more than {LIMITS[self.precision]:.0e} (relative); "
                f"most {self.largest[1]:.1e}, at {self.largest[0]}"
            )
        where, error = self.first
        return f"{what}: the first of {self.compared} layers that differs is {where}, by {error:.1e} (relative)"


def compare_half(graph: str, fp32: onnx.ModelProto, half: ir.Model, inputs: Tensors) -> Layers:
    """An FP16 graph, with every half tensor rounded, held to the FP32 graph that it was made from; changes `half`.

    graph  : what it is called
    inputs : of both graphs, one batch
    """
    full = run_all(fp32, inputs)
    half = ir.external_data.load_to_model(half)
    round_as_written(half)
    places = _places(fp32)
    return compared(
        graph,
        "fp16",
        {
            f"{places.get(tensor, tensor)} ({tensor})": (found, full[tensor])
            for tensor, found in run_all(ir.to_proto(half), inputs).items()
            if tensor in full and full[tensor].dtype == np.float32
        },
    )


def compared(graph: str, precision: GraphPrecision, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Layers:
    """How pairs of what was found and what was expected compare, in their order."""
    errors = {}
    for name, (found, expected) in pairs.items():
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        error = relative_error(found, expected) if expected.any() else float(np.abs(found).max(initial=0.0))
        errors[name] = error if np.isfinite(error) else np.inf
    if not errors:
        return Layers(graph, precision, 0, None, ("no layer, as the graph does not name them", 0.0))
    first = next(((name, error) for name, error in errors.items() if error > LIMITS[precision]), None)
    return Layers(graph, precision, len(errors), first, max(errors.items(), key=lambda item: item[1]))


def run_all(model: onnx.ModelProto, inputs: Tensors) -> dict[str, np.ndarray]:
    """Every tensor that a graph computes, in its order."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked = modify_outputs(model, outputs=constants.MARK_ALL).SerializeToString()
        session = onnxruntime.InferenceSession(marked, options, providers=["CPUExecutionProvider"])
        with OnnxrtRunner(session) as runner:
            return dict(runner.infer(dict(inputs)))


def _places(graph: onnx.ModelProto) -> dict[str, str]:
    """The innermost module that computes each tensor."""
    return {output: scopes(node)[-1] for node in graph.graph.node if scopes(node) for output in node.output}


def scopes(node: onnx.NodeProto) -> list[str]:
    """The modules that a node lies in, from the whole network ("") to the innermost, as its exporter noted them."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return list(ast.literal_eval(noted)[:-1])  # the last is the operator
