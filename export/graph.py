"""PyTorch to ONNX: each of the three graphs, with its dynamic axes proved to be dynamic."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from aesanet.bundle import GraphName, GraphSpec, TensorSpec, signature
from aesanet.errors import ExportError
from aesanet.hashing import file_sha256
from aesanet.lengths import MIN_SAMPLES, PATCH_SIZE, TOKENS_PER_PATCH
from aesanet.models.aesanet import AESANet

OPSET = 20

# Upper ends are only what torch.export needs to reason with: 2^24 samples are 17 minutes.
_AXES = {
    "batch": Dim("batch", min=1, max=2**12),
    "samples": Dim("samples", min=MIN_SAMPLES, max=2**24),
    "frames": Dim("frames", min=PATCH_SIZE, max=2**17),
    "tokens": Dim("tokens", min=TOKENS_PER_PATCH, max=2**16),
}
_EXAMPLE_SIZES = {"batch": 2, "samples": 20_000, "frames": 122, "tokens": 56}
_INSIDE_BYTES = 2**26  # of a graph with its weights; beside a larger graph they are mapped, and need not be read
_FOLD_LIMIT = 2**30  # bytes: fold every constant, as engines want weights and not arithmetic on weights


def export_graph(model: AESANet, name: GraphName, path: Path) -> GraphSpec:
    """Write one graph of the model as ONNX, with large weights in a file beside it.

    Raises ExportError when an axis came out fixed.
    """
    inputs, outputs = signature(name, model.config.beats.encoder_embed_dim)
    module: nn.Module = getattr(model, name)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            tuple(_example(spec) for spec in inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple(
                {axis: _AXES[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs
            ),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        optimizer.optimize_ir(program.model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    proto = program.model_proto
    for spec, value in zip(inputs + outputs, (*proto.graph.input, *proto.graph.output), strict=True):
        _check_and_name_axes(name, spec, value)
    sha256, weights = write_graph(proto, path)
    return GraphSpec(path.name, sha256, "fp32", OPSET, inputs, outputs, weights)


def write_graph(proto: onnx.ModelProto, path: Path) -> tuple[str, str | None]:
    """Write a graph that onnx's checker takes, with large weights in a file beside it.

    Returns the sha256 of both, and that file's name where there is one.
    """
    weights = path.with_suffix(".weights")
    weights.unlink(missing_ok=True)  # to which onnx would add
    if proto.ByteSize() <= _INSIDE_BYTES:
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, path)
        return file_sha256(path), None
    onnx.save(proto, path, save_as_external_data=True, location=weights.name)
    onnx.checker.check_model(path, full_check=True)  # by its path, as bytes of more than 2 GiB cannot be
    weights.chmod(path.stat().st_mode)  # onnx leaves it to its owner alone
    return file_sha256(path, weights), weights.name


def _example(spec: TensorSpec) -> Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.full(shape, TOKENS_PER_PATCH) if spec.dtype == "int64" else torch.zeros(shape)


def _check_and_name_axes(graph: str, spec: TensorSpec, value: onnx.ValueInfoProto) -> None:
    """Compare the exporter's shape with the signature, and give computed axes (`frames//16*8`) their plain name."""
    dims = value.type.tensor_type.shape.dim
    found = [dim.dim_param or dim.dim_value for dim in dims]
    same_rank = len(dims) == len(spec.shape)
    if not same_rank or any(isinstance(f, str) != isinstance(s, str) for f, s in zip(found, spec.shape, strict=True)):
        raise ExportError(
            f"{graph}: {spec.name} was exported with shape {found}; it must be {list(spec.shape)}, "
            "where names are dynamic axes; export again in a fresh process"
        )
    for dim, size in zip(dims, spec.shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporters' notes on packages that are not needed and on themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
