"""The same network in the operators that ONNX Runtime has fast CUDA kernels for; TensorRT fuses the plain ones itself.

Written out, attention moves its logits through memory again and again, and cuDNN runs the grouped convolution of
positions without tensor cores (on an H200, 30 of an encoder's 74 ms). Here

- attention is one MultiHeadAttention, which is given lengths and, in the trunk, the gated position bias. Its logits
  never leave the kernel, and are FP32 there;
- the bias is a product of rows and one number a row: of all that repeats one factor, ONNX Runtime does this fast;
- a gate, the sum of four outputs of a linear layer, is one output of its summed weights;
- the convolution is one matrix product a group (`_Blocks`).

Works on the FP32 graph; `to_half` then makes it half.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from aesanet.errors import ExportError
from aesanet.lengths import TOKENS_PER_PATCH

DOMAIN: Final = "com.microsoft"
"""Of ONNX Runtime's own operators."""

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def fuse(model: ir.Model) -> None:
    """Rewrite the FP32 graph of an encoder or a head in place.

    Raises ExportError for a graph that is not as this project exports it.
    """
    graph = model.graph
    made = _Nodes(graph)
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    convolutions = [node for node in graph if node.op_type == "Conv" and len(_input(node, 1).shape or ()) == 3]
    (num_tokens,) = (value for value in graph.inputs if value.name == "num_tokens")
    lengths = made.op("Cast", [num_tokens], ir.DataType.INT32, to=ir.DataType.INT32)
    rows: _Rows | None = None
    for softmax in softmaxes:
        above = _above(softmax, 0)
        if above.op_type == "Where":  # a head's: keys beyond a clip's own are filled with -inf
            _fuse_head_attention(made, softmax, above, lengths)
        else:  # the trunk's: logits + (gate * relative bias + keys' bias)
            gated = _above(_above(above, 1, "Add"), 0, "Mul")
            rows = rows or _Rows(made, _input(gated, 1), num_tokens)
            _sum_gate_weights(made, gated)
            _fuse_trunk_attention(made, softmax, above, lengths, rows.bias(_input(gated, 0)))
    for convolution in convolutions:
        _Blocks(made, convolution)
    made.insert()
    model.graph.opset_imports[DOMAIN] = 1


class _Nodes:
    """New nodes, each with one float or integer output that has a name."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: list[ir.Node] = []
        self._constants: dict[bytes, ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType = _FLOAT,
        shape: ir.Shape | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=1)
        (value,) = node.outputs
        value.name, value.dtype, value.shape = f"fused.{len(self._made)}.{op_type}", dtype, shape
        node.name = value.name
        self._made.append(node)
        return value

    def split(self, value: ir.Value, axis: int, parts: int) -> Sequence[ir.Value]:
        node = ir.node("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts)
        node.name = f"fused.{len(self._made)}.Split"
        for number, output in enumerate(node.outputs):
            output.name, output.dtype = f"{node.name}.{number}", _FLOAT
        self._made.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        key = repr((array.dtype.str, array.shape)).encode() + array.tobytes()
        if key not in self._constants:
            name = f"fused.constant.{len(self._constants)}"
            value = ir.Value(
                name=name,
                const_value=ir.tensor(array, name=name),
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def sizes(self, *sizes: int | ir.Value) -> ir.Value:
        """A shape of sizes that are known and sizes that are computed, int64 [1] each."""
        parts = [self.constant(np.array([size])) if isinstance(size, int) else size for size in sizes]
        return self.op("Concat", parts, _INT64, axis=0)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Shape", [value], _INT64, start=axis, end=axis + 1)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let whoever uses a value use a new one, under the old one's name: tensors are compared by it."""
        new.shape, name = old.shape, old.name
        ir.convenience.replace_all_uses_with(old, new)
        old.name, new.name = f"{name}.plain", name

    def insert(self) -> None:
        """Put all nodes into the graph, and take out what nobody uses any more."""
        self._graph.extend(self._made)
        outputs = set(self._graph.outputs)
        while unused := [
            node for node in self._graph if not any(value.uses() or value in outputs for value in node.outputs)
        ]:
            self._graph.remove(unused, safe=True)
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]
        self._graph.sort()


class _Rows:
    """The relative bias of all heads once for each clip, as rows, which a layer's gates are multiplied with."""

    def __init__(self, made: _Nodes, relative: ir.Value, num_tokens: ir.Value) -> None:
        self._made = made
        tokens = made.size(relative, 2)
        self._full = made.sizes(made.size(num_tokens, 0), _size(relative, 0), tokens, tokens)
        repeated = made.op("Expand", [relative, self._full])
        self._rows = made.op("Reshape", [repeated, made.sizes(-1, tokens)])

    def bias(self, gate: ir.Value) -> ir.Value:
        """The bias of a layer, [batch, heads, tokens, tokens], of its gates, [batch, heads, tokens, 1]."""
        column = self._made.op("Reshape", [gate, self._made.constant(np.array([-1, 1]))])
        return self._made.op("Reshape", [self._made.op("Mul", [self._rows, column]), self._full])


def _fuse_trunk_attention(made: _Nodes, softmax: ir.Node, logits: ir.Node, lengths: ir.Value, bias: ir.Value) -> None:
    product = _above(logits, 0, "MatMul")
    query = _above(product, 0, "Mul")
    keys = _above(product, 1, "Transpose")
    weighted = _user(softmax.outputs[0], "MatMul")
    values = _above(weighted, 1, "Transpose")
    # Each comes out of a linear layer as [batch, tokens, width], and was split into heads.
    separate = [_above(query, 0, "Transpose"), keys, values]
    split = [_above(node, 0, "Reshape") for node in separate]
    heads = _size(split[0].outputs[0], 2)
    inputs = [_input(node, 0) for node in split]
    _attend(made, weighted, [*inputs, None, lengths, bias], heads, float(_weight(_input(query, 1))))


def _fuse_head_attention(made: _Nodes, softmax: ir.Node, where: ir.Node, lengths: ir.Value) -> None:
    query = _above(_above(where, 2, "MatMul"), 0, "Mul")
    weighted = _user(softmax.outputs[0], "MatMul")
    taken = _above(_above(query, 0, "Squeeze"), 0, "Slice")
    reshape = _above(_above(taken, 0, "Transpose"), 0, "Reshape")
    heads = _size(reshape.outputs[0], 3)
    inputs = made.split(_input(reshape, 0), axis=2, parts=3)
    _attend(made, weighted, [*inputs, None, lengths], heads, float(_weight(_input(query, 1))))


def _attend(made: _Nodes, weighted: ir.Node, inputs: Sequence[ir.Value | None], heads: int, scale: float) -> None:
    """In place of what puts the heads together again."""
    old = _user(_user(weighted.outputs[0], "Transpose").outputs[0], "Reshape").outputs[0]
    made.replace(old, made.op("MultiHeadAttention", inputs, domain=DOMAIN, num_heads=heads, scale=scale))


def _sum_gate_weights(made: _Nodes, gated: ir.Node) -> None:
    """Of what a layer's gates come from: `sigmoid(sum of parts of linear(query))`."""
    node = _above(gated, 0)
    while node.op_type != "Sigmoid":
        node = _above(node, 0)
    summed = _above(node, 0, "ReduceSum")
    parts = _above(summed, 0, "Reshape")
    linear = _above(parts, 0, "Add")
    product = _above(linear, 0, "MatMul")
    by_part = [_size(parts.outputs[0], axis) for axis in (-2, -1)]
    weight, bias = _weight(_input(product, 1)), _weight(_input(linear, 1))
    weight, bias = (array.reshape(*array.shape[:-1], *by_part).sum(axis=-1) for array in (weight, bias))
    ours = made.op("Add", [made.op("MatMul", [_input(product, 0), made.constant(weight)]), made.constant(bias)])
    made.replace(summed.outputs[0], ours)


class _Blocks:
    """A grouped convolution over tokens as one matrix product a group.

    Tokens come in blocks, the 8 of a patch. What a block's outputs need are the blocks around it: they are laid side by
    side, and multiplied by a Toeplitz matrix, the kernel once for each token of the block, each time one token later.
    """

    def __init__(self, made: _Nodes, convolution: ir.Node) -> None:
        transposed = _above(convolution, 0, "Transpose")
        gelu = _user(_user(convolution.outputs[0], "Slice").outputs[0], "Gelu")
        old = _user(gelu.outputs[0], "Transpose").outputs[0]
        outputs, self._inputs, self._taps = (_size(_input(convolution, 1), axis) for axis in range(3))
        self._groups = outputs // self._inputs
        self._width = self._inputs * TOKENS_PER_PATCH
        self._around = -(-(self._taps + TOKENS_PER_PATCH - 1) // TOKENS_PER_PATCH)  # blocks side by side
        windows = self._windows(made, _input(transposed, 0))
        product = made.op("MatMul", [windows, self._toeplitz(made, _input(convolution, 1))])
        batch = made.size(_input(transposed, 0), 0)
        blocks = made.sizes(self._groups, batch, -1, TOKENS_PER_PATCH, self._inputs)
        split = made.op("Reshape", [product, blocks])
        tokens = made.op("Transpose", [split], perm=[1, 2, 3, 0, 4])
        joined = made.op("Reshape", [tokens, made.constant(np.array([0, -1, outputs]))])
        made.replace(old, made.op("Gelu", [made.op("Add", [joined, _input(convolution, 2)])]))

    def _windows(self, made: _Nodes, x: ir.Value) -> ir.Value:
        """[batch, tokens, width] -> [groups, batch * blocks, tokens in a window * inputs of a group]."""
        before = self._taps // 2
        after = TOKENS_PER_PATCH * (self._around - 1) - before
        padded = made.op("Pad", [x, made.constant(np.array([0, before, 0, 0, after, 0]))])
        sizes = np.array([0, -1, TOKENS_PER_PATCH, self._groups, self._inputs])
        grouped = made.op("Transpose", [made.op("Reshape", [padded, made.constant(sizes)])], perm=[3, 0, 1, 2, 4])
        blocks = made.op("Reshape", [grouped, made.constant(np.array([0, 0, 0, self._width]))])
        count = made.op("Div", [made.size(x, 1), made.constant(np.array([TOKENS_PER_PATCH]))], _INT64)
        zero, one = made.constant(np.array(0)), made.constant(np.array(1))
        first = made.op("Range", [zero, made.op("Squeeze", [count], _INT64), one], _INT64)
        column = made.op("Unsqueeze", [first, made.constant(np.array([1]))], _INT64)
        places = made.op("Add", [column, made.constant(np.arange(self._around))], _INT64)
        flat = made.op("Reshape", [places, made.constant(np.array([-1]))], _INT64)
        side_by_side = made.op("Gather", [blocks, flat], axis=2)
        window = np.array([self._groups, -1, self._around * self._width])
        return made.op("Reshape", [side_by_side, made.constant(window)])

    def _toeplitz(self, made: _Nodes, kernel: ir.Value) -> ir.Value:
        """[outputs, inputs, taps] -> [groups, tokens in a window * inputs, tokens in a block * outputs of a group].

        Engines compute it when they load the graph: it is 17 times as large as the kernel.
        """
        later = np.arange(self._around * TOKENS_PER_PATCH) - np.arange(TOKENS_PER_PATCH)[:, None]
        taps = np.where((later >= 0) & (later < self._taps), later, self._taps)  # the last is zero
        sizes = np.array([self._groups, self._inputs, self._inputs, self._taps])
        by_tap = made.op("Transpose", [made.op("Reshape", [kernel, made.constant(sizes)])], perm=[3, 0, 2, 1])
        zero = made.constant(np.zeros((1, self._groups, self._inputs, self._inputs), np.float32))
        repeated = made.op("Gather", [made.op("Concat", [by_tap, zero], axis=0), made.constant(taps.T)], axis=0)
        ordered = made.op("Transpose", [repeated], perm=[2, 0, 3, 1, 4])
        matrix = np.array([self._groups, self._around * self._width, self._width])
        return made.op("Reshape", [ordered, made.constant(matrix)])


def _above(node: ir.Node, place: int, op_type: str | None = None) -> ir.Node:
    """The node that an input comes from, which must be of a type."""
    value = _input(node, place)
    found = value.producer()
    if found is None or op_type not in (None, found.op_type):
        raise ExportError(f"{value.name} comes from {found and found.op_type}, and should from {op_type}")
    return found


def _user(value: ir.Value, op_type: str) -> ir.Node:
    users = [node for node in value.consumers() if node.op_type == op_type]
    if len(users) != 1:
        raise ExportError(f"{value.name} has {len(users)} users that are a {op_type}, and should have one")
    return users[0]


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise ExportError(f"{node.name} should have an input {place}")
    return value


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(f"{value.name} should be of a known size along axis {axis}")
    return size


def _weight(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ExportError(f"{value.name} should be a constant")
    return value.const_value.numpy()
