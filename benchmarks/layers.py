"""The layers of a bundle's graphs: FP32 ones held to PyTorch, module by module, FP16 ones to FP32, tensor by tensor.

Both get the same input, so what one graph does wrong does not show in the next.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from aesanet.bundle import GraphName
from aesanet.export.layers import Layers, compare_half, compared, run_all, scopes
from aesanet.lengths import num_tokens
from aesanet.models.aesanet import AESANet
from aesanet.runtime.backends.base import BundleFiles


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
    graphs = {form: files.graphs(form) for form in files.forms}
    for name, given in inputs.items():
        arrays = {key: value.numpy() for key, value in given.items()}
        graph = onnx.load(graphs["fp32"][name])
        full = run_all(graph, arrays)
        modules = _outputs_of_modules(getattr(model, name), list(given.values()))
        ends = _tensors_of_modules(graph)
        pairs = {
            (module or f"the {name}"): (full[tensor], modules[module])
            for module, tensor in ends.items()
            if module in modules and tensor in full and full[tensor].shape == modules[module].shape
        }
        yield compared(name, "fp32", pairs)
        for form in files.forms:
            if (half := graphs[form][name]) != graphs["fp32"][name]:
                yield compare_half(f"fused {name}" if form == "fused" else name, graph, ir.load(half), arrays)


def _tensors_of_modules(graph: onnx.ModelProto) -> dict[str, str]:
    """For each module of the network, the last tensor that was computed in it, in the order of these tensors."""
    last: dict[str, str] = {}
    for node in graph.graph.node:
        for module in scopes(node):
            last.pop(module, None)
            last[module] = node.output[0]
    return last


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
