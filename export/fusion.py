"""The same network in the operators that ONNX Runtime has fast CUDA kernels for; TensorRT fuses the plain ones itself.

Written out, attention moves its logits through memory again and again, and cuDNN runs the grouped convolution of
positions without tensor cores (on an H200, some 22 of an encoder's 74 ms). Here

- attention is one MultiHeadAttention, which is given lengths and, in the trunk, the gated position bias. Its logits
  never leave the kernel, and are FP32 there;
- the bias is a product of rows and one number a row: of all that repeats one factor, ONNX Runtime does this fast;
- a gate, the sum of four outputs of a linear layer, is one output of its summed weights;
- convolutions are matrix products: of patches, and for positions one a group (`_Blocks`). With none left, ONNX Runtime
  has nothing to plan anew whenever a batch has another shape than the last.

Works on the FP32 graph; `to_half` then makes it half.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from aesanet.export.nodes import NewNodes, above, input_of, size_of, user, weight_of
from aesanet.lengths import TOKENS_PER_PATCH

DOMAIN: Final = "com.microsoft"
"""Of ONNX Runtime's own operators."""

_INT64 = ir.DataType.INT64


def fuse(model: ir.Model) -> None:
    """Rewrite the FP32 graph of an encoder or a head in place.

    Raises ExportError for a graph that is not as this project exports it.
    """
    graph = model.graph
    made = NewNodes(graph)
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    convolutions = [node for node in graph if node.op_type == "Conv"]
    (num_tokens,) = (value for value in graph.inputs if value.name == "num_tokens")
    lengths = made.op("Cast", [num_tokens], ir.DataType.INT32, to=ir.DataType.INT32)
    rows: _Rows | None = None
    for softmax in softmaxes:
        masked = above(softmax, 0)
        if masked.op_type == "Where":  # a head's: keys beyond a clip's own are filled with -inf
            _fuse_head_attention(made, softmax, masked, lengths)
        else:  # the trunk's: logits + (gate * relative bias + keys' bias)
            gated = above(above(masked, 1, "Add"), 0, "Mul")
            rows = rows or _Rows(made, input_of(gated, 1), num_tokens)
            _sum_gate_weights(made, gated)
            _fuse_trunk_attention(made, softmax, masked, lengths, rows.bias(input_of(gated, 0)))
    for convolution in convolutions:
        of_patches = len(input_of(convolution, 1).shape or ()) == 4
        (_multiply_patches if of_patches else _Blocks)(made, convolution)
    made.insert()
    model.graph.opset_imports[DOMAIN] = 1


class _Rows:
    """The relative bias of all heads once for each clip, as rows, which a layer's gates are multiplied with."""

    def __init__(self, made: NewNodes, relative: ir.Value, num_tokens: ir.Value) -> None:
        self._made = made
        tokens = made.size(relative, 2)
        self._full = made.sizes(made.size(num_tokens, 0), size_of(relative, 0), tokens, tokens)
        repeated = made.op("Expand", [relative, self._full])
        self._rows = made.op("Reshape", [repeated, made.sizes(-1, tokens)])

    def bias(self, gate: ir.Value) -> ir.Value:
        """The bias of a layer, [batch, heads, tokens, tokens], of its gates, [batch, heads, tokens, 1]."""
        column = self._made.op("Reshape", [gate, self._made.constant(np.array([-1, 1]))])
        return self._made.op("Reshape", [self._made.op("Mul", [self._rows, column]), self._full])


def _fuse_trunk_attention(made: NewNodes, softmax: ir.Node, logits: ir.Node, lengths: ir.Value, bias: ir.Value) -> None:
    product = above(logits, 0, "MatMul")
    query = above(product, 0, "Mul")
    keys = above(product, 1, "Transpose")
    weighted = user(softmax.outputs[0], "MatMul")
    values = above(weighted, 1, "Transpose")
    # Each comes out of a linear layer as [batch, tokens, width], and was split into heads.
    separate = [above(query, 0, "Transpose"), keys, values]
    split = [above(node, 0, "Reshape") for node in separate]
    heads = size_of(split[0].outputs[0], 2)
    inputs = [input_of(node, 0) for node in split]
    _attend(made, weighted, [*inputs, None, lengths, bias], heads, float(weight_of(input_of(query, 1))))


def _fuse_head_attention(made: NewNodes, softmax: ir.Node, where: ir.Node, lengths: ir.Value) -> None:
    query = above(above(where, 2, "MatMul"), 0, "Mul")
    weighted = user(softmax.outputs[0], "MatMul")
    taken = above(above(query, 0, "Squeeze"), 0, "Slice")
    reshape = above(above(taken, 0, "Transpose"), 0, "Reshape")
    heads = size_of(reshape.outputs[0], 3)
    inputs = made.split(input_of(reshape, 0), axis=2, parts=3)
    _attend(made, weighted, [*inputs, None, lengths], heads, float(weight_of(input_of(query, 1))))


def _attend(made: NewNodes, weighted: ir.Node, inputs: Sequence[ir.Value | None], heads: int, scale: float) -> None:
    """In place of what puts the heads together again."""
    old = user(user(weighted.outputs[0], "Transpose").outputs[0], "Reshape").outputs[0]
    made.replace(old, made.op("MultiHeadAttention", inputs, domain=DOMAIN, num_heads=heads, scale=scale))


def _sum_gate_weights(made: NewNodes, gated: ir.Node) -> None:
    """Of what a layer's gates come from: `sigmoid(sum of parts of linear(query))`."""
    node = above(gated, 0)
    while node.op_type != "Sigmoid":
        node = above(node, 0)
    summed = above(node, 0, "ReduceSum")
    parts = above(summed, 0, "Reshape")
    linear = above(parts, 0, "Add")
    product = above(linear, 0, "MatMul")
    by_part = [size_of(parts.outputs[0], axis) for axis in (-2, -1)]
    weight, bias = weight_of(input_of(product, 1)), weight_of(input_of(linear, 1))
    weight, bias = (array.reshape(*array.shape[:-1], *by_part).sum(axis=-1) for array in (weight, bias))
    ours = made.op("Add", [made.op("MatMul", [input_of(product, 0), made.constant(weight)]), made.constant(bias)])
    made.replace(summed.outputs[0], ours)


def _multiply_patches(made: NewNodes, convolution: ir.Node) -> None:
    """A convolution whose kernel is as large as its stride: patches of the filterbank, each times the kernels."""
    fbank = input_of(above(convolution, 0, "Unsqueeze"), 0)
    old = user(user(convolution.outputs[0], "Reshape").outputs[0], "Transpose").outputs[0]
    kernels = weight_of(input_of(convolution, 1))
    outputs, _, height, width = kernels.shape
    across = size_of(fbank, 2) // width
    step, axis = made.constant(np.array([height])), made.constant(np.array([1]))
    patches = made.op("Div", [made.size(fbank, 1), step], _INT64)
    end = made.op("Mul", [patches, step], _INT64)  # frames after it fill no patch
    frames = made.op("Slice", [fbank, made.constant(np.array([0])), end, axis])
    cut = made.op("Reshape", [frames, made.constant(np.array([0, -1, height, across, width]))])
    ordered = made.op("Transpose", [cut], perm=[0, 1, 3, 2, 4])
    flat = made.op("Reshape", [ordered, made.constant(np.array([0, -1, height * width]))])
    ours = made.op("MatMul", [flat, made.constant(np.ascontiguousarray(kernels.reshape(outputs, -1).T))])
    if len(convolution.inputs) > 2:
        ours = made.op("Add", [ours, input_of(convolution, 2)])
    made.replace(old, ours)


class _Blocks:
    """A grouped convolution over tokens as one matrix product a group.

    Tokens come in blocks, the 8 of a patch. What a block's outputs need are the blocks around it: they are laid side by
    side, and multiplied by a Toeplitz matrix, the kernel once for each token of the block, each time one token later.
    """

    def __init__(self, made: NewNodes, convolution: ir.Node) -> None:
        transposed = above(convolution, 0, "Transpose")
        gelu = user(user(convolution.outputs[0], "Slice").outputs[0], "Gelu")
        old = user(gelu.outputs[0], "Transpose").outputs[0]
        outputs, self._inputs, self._taps = (size_of(input_of(convolution, 1), axis) for axis in range(3))
        self._groups = outputs // self._inputs
        self._width = self._inputs * TOKENS_PER_PATCH
        self._around = -(-(self._taps + TOKENS_PER_PATCH - 1) // TOKENS_PER_PATCH)  # blocks side by side
        windows = self._windows(made, input_of(transposed, 0))
        product = made.op("MatMul", [windows, self._toeplitz(made, input_of(convolution, 1))])
        batch = made.size(input_of(transposed, 0), 0)
        blocks = made.sizes(self._groups, batch, -1, TOKENS_PER_PATCH, self._inputs)
        split = made.op("Reshape", [product, blocks])
        tokens = made.op("Transpose", [split], perm=[1, 2, 3, 0, 4])
        joined = made.op("Reshape", [tokens, made.constant(np.array([0, -1, outputs]))])
        made.replace(old, made.op("Gelu", [made.op("Add", [joined, input_of(convolution, 2)])]))

    def _windows(self, made: NewNodes, x: ir.Value) -> ir.Value:
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

    def _toeplitz(self, made: NewNodes, kernel: ir.Value) -> ir.Value:
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
