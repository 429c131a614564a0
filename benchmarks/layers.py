"""Where a graph goes wrong: each of its tensors held to what it should be, in order, and the first that differs named.

An FP32 graph is held to PyTorch, module by module; an FP16 graph, with every half tensor rounded, to the FP32 graph,
tensor by tensor. Both get the same input, so what one graph does wrong does not show in the next.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from polygraphy import constants
from polygraphy.backend.onnx import modify_outputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from aesanet.bundle import HALF_GRAPH_NAMES, GraphName, GraphPrecision
from aesanet.export.half import round_as_written
from aesanet.export.parity import relative_error
from aesanet.lengths import num_tokens
from aesanet.models.aesanet import AESANet
from aesanet.runtime.backends.base import BundleFiles

LIMITS: Final[dict[GraphPrecision, float]] = {"fp32": 1e-3, "fp16": 5e-2}
"""The relative error of a tensor, as Euclidean norms, from which it counts as different."""

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layers:
    """How a graph compares. `first` is the first tensor past the limit, in the graph's order, or None."""

    graph: GraphName
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


def compare_layers(model: AESANet, files: BundleFiles, waveform: np.ndarray) -> Iterator[Layers]:
    """Every graph of a bundle on one clip, float32 [samples]."""
    tokens = torch.tensor([num_tokens(len(waveform))])
    with torch.inference_mode():
        audio = torch.from_numpy(waveform)[None]
        fbank = model.frontend(audio)
        features = model.encoder(fbank, tokens)
    inputs: dict[GraphName, dict[str, torch.Tensor]] = {
        "frontend": {"waveform": audio},
        "encoder": {"fbank": fbank, "num_tokens": tokens},
        "head": {"features": features, "num_tokens": tokens},
    }
    for name, given in inputs.items():
        arrays = {key: value.numpy() for key, value in given.items()}
        graph = onnx.load(files.fp32[name])
        full = _run(graph, arrays)
        modules = _outputs_of_modules(getattr(model, name), list(given.values()))
        ends = _tensors_of_modules(graph)
        pairs = {
            (module or f"the {name}"): (full[tensor], modules[module])
            for module, tensor in ends.items()
            if module in modules and tensor in full and full[tensor].shape == modules[module].shape
        }
        yield _compared(name, "fp32", pairs)
        if name in HALF_GRAPH_NAMES and name in files.fp16:
            half = ir.external_data.load_to_model(ir.load(files.fp16[name]))
            round_as_written(half)
            rounded = _run(ir.to_proto(half), arrays)
            places = _places(graph)
            yield _compared(
                name,
                "fp16",
                {
                    f"{places.get(tensor, tensor)} ({tensor})": (found, full[tensor])
                    for tensor, found in rounded.items()
                    if tensor in full and full[tensor].dtype == np.float32
                },
            )


def _compared(
    graph: GraphName, precision: GraphPrecision, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Layers:
    errors = {}
    for name, (found, expected) in pairs.items():
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        error = relative_error(found, expected) if expected.any() else float(np.abs(found).max(initial=0.0))
        errors[name] = error if np.isfinite(error) else np.inf
    if not errors:
        return Layers(graph, precision, 0, None, ("no layer, as the graph does not name them", 0.0))
    first = next(((name, error) for name, error in errors.items() if error > LIMITS[precision]), None)
    return Layers(graph, precision, len(errors), first, max(errors.items(), key=lambda item: item[1]))


def _run(model: onnx.ModelProto, inputs: Tensors) -> dict[str, np.ndarray]:
    """Every tensor that a graph computes, in its order."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked = modify_outputs(model, outputs=constants.MARK_ALL).SerializeToString()
        session = onnxruntime.InferenceSession(marked, options, providers=["CPUExecutionProvider"])
        with OnnxrtRunner(session) as runner:
            return dict(runner.infer(dict(inputs)))


def _tensors_of_modules(graph: onnx.ModelProto) -> dict[str, str]:
    """For each module of the network, the last tensor that was computed in it, in the order of these tensors."""
    last: dict[str, str] = {}
    for node in graph.graph.node:
        for module in _scopes(node):
            last.pop(module, None)
            last[module] = node.output[0]
    return last


def _places(graph: onnx.ModelProto) -> dict[str, str]:
    """The innermost module that computes each tensor."""
    return {output: _scopes(node)[-1] for node in graph.graph.node if _scopes(node) for output in node.output}


def _scopes(node: onnx.NodeProto) -> list[str]:
    """The modules that a node lies in, from the whole network ("") to the innermost, as its exporter noted them."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return list(ast.literal_eval(noted)[:-1])  # the last is the operator


def _outputs_of_modules(network: torch.nn.Module, inputs: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """What each module of a network returns, for those that return one tensor and run once."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = output.numpy()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in network.named_modules()]
    try:
        with torch.inference_mode():
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
