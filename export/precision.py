"""FP32 ONNX to FP16 with FP32 islands, every cast written out, so that strongly typed engines build just this.

Which type a node computes in follows from its operator and from who uses it:

- matrix products and convolutions are half: they are nearly all of the work. Their weights are stored as half.
- islands are float: what sums many terms (LayerNorm, softmax, LSTM, means), and sigmoids, which are gates and scores.
- all else (reshapes, biases, GELU, sums) is half where a half node uses it, and float where only islands do: so are
  residuals before their norm, logits and their bias, and the mix of layers. What enters an island is thus cast where it
  was made. (TensorRT-RTX 1.7 fails on a half tensor that is cast right before an LSTM.)

Attention logits are the one choice. As half they have steps of .25 at 500, and softmax then weighs keys by up to 13 %
too much or too little. As FP32 nothing of their product is rounded; its operands are half all the same, so that a GPU's
TF32 multiplies them exactly.

Inputs and outputs of a graph keep their types: a bundle's graphs have one signature in every precision.
"""

import ast
from typing import Final

import numpy as np
import onnx_ir as ir

from aesanet.bundle import GraphPrecision
from aesanet.errors import ExportError
from aesanet.export.lstm import join_lstms

PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv", "MultiHeadAttention"})
ISLANDS: Final = frozenset({"LayerNormalization", "Softmax", "LSTM", "ReduceSum", "ReduceMean", "Sigmoid"})
CARRIED: Final = frozenset(
    "Add Sub Mul Div Gelu Relu Clip Where Pad Reshape Transpose".split()
    + "Concat Split Slice Squeeze Unsqueeze Gather Expand".split()
)
"""Operators that may be half or float."""
# What stands between the product of queries and keys and its softmax.
_BEFORE_SOFTMAX: Final = frozenset({"Add", "Where"})

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def to_half(model: ir.Model, logits: GraphPrecision) -> None:
    """Rewrite an FP32 graph in place; raises ExportError for a weight that half cannot hold, or an unknown operator.

    logits : how attention logits leave their matrix product
    """
    graph = model.graph
    join_lstms(graph)  # as what is half is for GPUs
    computes_in = _types(graph, logits)
    casts = _Casts(graph)
    for node, dtype in computes_in.items():
        for position, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_HALF, _FLOAT):
                # The operands of FP32 logits are rounded to half all the same.
                value = casts.to(_HALF, value) if node.op_type in PRODUCTS else value
                node.replace_input_with(position, casts.to(dtype, value))
        for value in node.outputs:
            if value.dtype == _FLOAT:
                value.dtype = dtype
    for position, value in enumerate(graph.outputs):
        if value.dtype == _HALF:
            graph.outputs[position] = casts.to_output(value)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    graph.sort()


def _types(graph: ir.Graph, logits: GraphPrecision) -> dict[ir.Node, ir.DataType]:
    """What each node that computes floats computes in, in the graph's order."""
    types: dict[ir.Node, ir.DataType] = {}
    nodes = [node for node in graph if any(value.dtype == _FLOAT for value in node.outputs)]
    for node in graph:
        takes_floats = any(value is not None and value.dtype == _FLOAT for value in node.inputs)
        if takes_floats and node.op_type != "Shape" and all(value.dtype != _FLOAT for value in node.outputs):
            raise ExportError(f"{_place(node)}: {node.op_type} is an operator that FP16 has no rule for")
    products = sum(_is_logits(node) for node in nodes)
    softmaxes = sum(node.op_type == "Softmax" for node in nodes)
    if products != softmaxes:
        raise ExportError(f"{softmaxes} softmaxes, but {products} products of queries and keys were found before them")
    for node in reversed(nodes):
        if node.op_type in PRODUCTS:
            half = not (logits == "fp32" and _is_logits(node))
        elif node.op_type in ISLANDS or node.op_type == "Cast":
            half = False
        elif node.op_type not in CARRIED:
            raise ExportError(f"{_place(node)}: {node.op_type} is an operator that FP16 has no rule for")
        else:
            users = [user for value in node.outputs for user in value.consumers()]
            half = any(types[user] == _HALF or user.op_type in PRODUCTS for user in users if user in types)
        types[node] = _HALF if half else _FLOAT
    return {node: types[node] for node in nodes}


def _is_logits(node: ir.Node) -> bool:
    """Whether a node is the product of queries and keys: of two computed tensors, with a softmax soon after it."""
    of_computed = not any(value is None or value.is_initializer() for value in node.inputs)
    return node.op_type == "MatMul" and of_computed and _leads_to_softmax(node)


def _leads_to_softmax(node: ir.Node) -> bool:
    return any(
        user.op_type == "Softmax" or (user.op_type in _BEFORE_SOFTMAX and _leads_to_softmax(user))
        for user in node.outputs[0].consumers()
    )


def _place(node: ir.Node) -> str:
    """The module of the network that a node comes from, as its exporter noted it, or the node's name."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return next((scope for scope in reversed(scopes) if "." in scope), node.name or node.op_type)


class _Casts:
    """Each tensor in the other type, made once: a weight is converted, a computed tensor gets a Cast after it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def to(self, dtype: ir.DataType, value: ir.Value) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            made = self._weight(value) if value.is_initializer() and dtype == _HALF else self._cast(value, dtype)
            self._made[value, dtype] = made
        return self._made[value, dtype]

    def to_output(self, value: ir.Value) -> ir.Value:
        """A float output that has the name of the half one."""
        made = self._cast(value, _FLOAT)
        made.name, value.name = value.name, f"{value.name}.fp16"
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}.{'fp16' if dtype == _HALF else 'fp32'}"
        node = ir.node("Cast", [value], {"to": dtype}, name=f"{name}/cast")
        made = node.outputs[0]
        made.name, made.dtype, made.shape = name, dtype, value.shape
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return made

    def _weight(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        weight = value.const_value.numpy()
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
        if not np.isfinite(half).all():
            (place, *_) = [_place(user) for user in value.consumers()]
            raise ExportError(
                f"{place}: {value.name} holds {np.abs(weight).max():.3g}; FP16 ends at {np.finfo(np.float16).max:.0f}: "
                "this checkpoint runs in fp32 or bf16 only"
            )
        name = f"{value.name}.fp16"
        made = ir.Value(name=name, const_value=ir.tensor(half, name=name), shape=value.shape, type=ir.TensorType(_HALF))
        self._graph.register_initializer(made)
        return made
