"""Two LSTMs as one: a GPU takes its time for steps, whatever their size, and both directions at once have half."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_GATES = 4
_AXIS_OF_INPUT, _AXIS_OF_HIDDEN = 2, 3  # of X [steps, batch, input] and Y [steps, 1, batch, hidden]


def join_lstms(graph: ir.Graph) -> None:
    """Join every two LSTMs of one size that do not wait for each other (two directions are, one reads backwards).

    Their inputs and states lie side by side, and all weights between the two are zero: only zeros are added to any sum.
    On a processor, where twice the products take their time, this is slower. Leaves the graph unsorted.
    """
    alone: list[ir.Node] = []
    for node in [node for node in graph if node.op_type == "LSTM"]:
        other = next((other for other in alone if _alike(other, node) and not _leads_to(other, node)), None)
        if other is None:
            alone.append(node)
        else:
            alone.remove(other)
            _join(graph, (other, node))


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """Whether both are plain (inputs, weights and biases; one direction; all states and no others) and of one size."""
    sizes = []
    for node in (one, other):
        plain = set(node.attributes) == {"hidden_size"} and not any(value.uses() for value in node.outputs[1:])
        weights = [None if value is None else value.const_value for value in node.inputs[1:]]
        if not plain or len(weights) != 3 or None in weights:
            return False
        sizes.append([weight.shape for weight in weights if weight is not None])
    return sizes[0] == sizes[1]


def _leads_to(one: ir.Node, other: ir.Node) -> bool:
    before, seen = [other], set()
    while before:
        for node in before.pop().predecessors():
            if node is one:
                return True
            if node not in seen:
                seen.add(node)
                before.append(node)
    return False


def _join(graph: ir.Graph, pair: tuple[ir.Node, ir.Node]) -> None:
    inputs, kinds = [node.inputs[0] for node in pair], ("W", "R", "B")
    weights = {kind: [_weight(node, place) for node in pair] for place, kind in enumerate(kinds, start=1)}
    hidden = weights["R"][0].shape[2]
    joined = {
        "W": _side_by_side(weights["W"]),
        "R": _side_by_side(weights["R"]),
        # Biases of inputs, then of states; of each, all gates.
        "B": np.concatenate([b.reshape(2, _GATES, hidden) for b in weights["B"]], axis=2).reshape(1, -1),
    }
    name = "+".join(str(node.outputs[0].name) for node in pair)
    values = []
    for kind, array in joined.items():
        value = ir.Value(
            name=f"{name}.{kind}",
            const_value=ir.tensor(array, name=f"{name}.{kind}"),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.register_initializer(value)
        values.append(value)
    both = ir.node("Concat", inputs, {"axis": _AXIS_OF_INPUT}, name=f"{name}/inputs")
    lstm = ir.node("LSTM", [both.outputs[0], *values], {"hidden_size": 2 * hidden}, name=name)
    split = ir.node(
        "Split", lstm.outputs, {"axis": _AXIS_OF_HIDDEN, "num_outputs": 2}, num_outputs=2, name=f"{name}/outputs"
    )
    for node in (both, lstm, split):
        node.metadata_props.update(pair[0].metadata_props)
    _describe(both.outputs[0], f"{name}.inputs", inputs[0], _AXIS_OF_INPUT)
    _describe(lstm.outputs[0], f"{name}.outputs", pair[0].outputs[0], _AXIS_OF_HIDDEN)
    graph.insert_after(pair[1], [both, lstm, split])
    for node, value in zip(pair, split.outputs, strict=True):
        old = node.outputs[0]
        value.name, value.type, value.shape = old.name, ir.TensorType(ir.DataType.FLOAT), old.shape
        ir.convenience.replace_all_uses_with(old, value)
    graph.remove(pair, safe=True)


def _weight(node: ir.Node, place: int) -> np.ndarray:
    value = node.inputs[place]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _side_by_side(pair: Sequence[np.ndarray]) -> np.ndarray:
    """[1, gates * hidden, columns] of each to [1, gates * 2 hidden, 2 columns], gate by gate."""
    one, other = (array.reshape(_GATES, -1, array.shape[2]) for array in pair)
    joined = np.zeros((_GATES, 2 * one.shape[1], 2 * one.shape[2]), one.dtype)
    joined[:, : one.shape[1], : one.shape[2]] = one
    joined[:, one.shape[1] :, one.shape[2] :] = other
    return joined.reshape(1, -1, joined.shape[2])


def _describe(value: ir.Value, name: str, like: ir.Value | None, doubled: int) -> None:
    """Name, type and shape of a value: as of another one, but for an axis of twice the size."""
    assert like is not None
    assert like.shape is not None
    size = like.shape[doubled]
    assert isinstance(size, int)
    value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape([2 * size if axis == doubled else other for axis, other in enumerate(like.shape)])
