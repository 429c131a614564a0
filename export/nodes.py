"""Rewriting an ONNX graph: new nodes for it, and what is found around a node.

What looks for something that is not there raises ExportError.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from aesanet.errors import ExportError

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class NewNodes:
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
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=1)
        (value,) = node.outputs
        value.name, value.dtype = f"fused.{len(self._made)}.{op_type}", dtype
        node.name = value.name
        self._made.append(node)
        return value

    def split(self, value: ir.Value, axis: int, parts: int) -> Sequence[ir.Value]:
        """Equal parts of a float value along an axis."""
        node = ir.node("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts)
        node.name = f"fused.{len(self._made)}.Split"
        for number, output in enumerate(node.outputs):
            output.name, output.dtype = f"{node.name}.{number}", _FLOAT
        self._made.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """An array as an initializer, once however often it is asked for."""
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
        """The size of a value along an axis, int64 [1]."""
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


def above(node: ir.Node, place: int, op_type: str | None = None) -> ir.Node:
    """The node that an input comes from, which must be of a type."""
    value = input_of(node, place)
    found = value.producer()
    if found is None or op_type not in (None, found.op_type):
        raise ExportError(f"{value.name} comes from {found and found.op_type}, and should from {op_type}")
    return found


def user(value: ir.Value, op_type: str) -> ir.Node:
    """The one node of a type that uses a value."""
    users = [node for node in value.consumers() if node.op_type == op_type]
    if len(users) != 1:
        raise ExportError(f"{value.name} has {len(users)} users that are a {op_type}, and should have one")
    return users[0]


def input_of(node: ir.Node, place: int) -> ir.Value:
    """An input of a node, which must have it."""
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise ExportError(f"{node.name} should have an input {place}")
    return value


def size_of(value: ir.Value, axis: int) -> int:
    """The size of a value along an axis, which must be known."""
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ExportError(f"{value.name} should be of a known size along axis {axis}")
    return size


def weight_of(value: ir.Value) -> np.ndarray:
    """The array of a value, which must be a constant."""
    if value.const_value is None:
        raise ExportError(f"{value.name} should be a constant")
    return value.const_value.numpy()
