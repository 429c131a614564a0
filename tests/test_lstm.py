"""LSTMs that are joined for GPUs: the same numbers as apart, and none that waits for the other."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aesanet.export.lstm import join_lstms


def graph(nodes, weights, inputs, outputs):
    """An ONNX model of LSTMs: (output, input, weights, hidden size, more inputs)."""
    made, tensors = [], []
    for name, source, key, hidden, *more in nodes:
        if key not in {tensor.name[2:] for tensor in tensors}:
            for kind, array in zip("wrb", weights[key], strict=True):
                tensors.append(helper.make_tensor(f"{kind}_{key}", TensorProto.FLOAT, array.shape, array.ravel()))
        given = [source, *(f"{kind}_{key}" for kind in "wrb"), *more]
        made.append(helper.make_node("LSTM", given, [f"{name}.4d"], hidden_size=hidden))
        made.append(helper.make_node("Squeeze", [f"{name}.4d", "one"], [name]))
    tensors.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    declared += [helper.make_tensor_value_info("lengths", TensorProto.INT32, ["b"])] if nodes[0][4:] else []
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", "b", size]) for name, size in outputs]
    model = helper.make_model(
        helper.make_graph(made, "g", declared, results, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model)


def joined(model):
    changed = ir.from_proto(model)
    join_lstms(changed.graph)
    changed.graph.sort()
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def count(model):
    return [node.op_type for node in model.graph.node].count("LSTM")


def random_weights(rng, hidden, inputs):
    return (
        rng.normal(0, 0.5, (1, 4 * hidden, inputs)).astype(np.float32),
        rng.normal(0, 0.5, (1, 4 * hidden, hidden)).astype(np.float32),
        rng.normal(0, 0.5, (1, 8 * hidden)).astype(np.float32),
    )


def of_pytorch(x, weights):
    """PyTorch's LSTM, whose gates lie in another order: input, forget, cell, output."""
    w, r, b = (torch.from_numpy(array[0]) for array in weights)

    def reordered(gates):
        i, o, f, c = gates.chunk(4)
        return torch.cat([i, f, c, o])

    net = torch.nn.LSTM(w.shape[1], r.shape[1])
    biases = b.chunk(2)
    for name, values in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), (w, r, *biases), strict=True):
        getattr(net, f"{name}_l0").data = reordered(values)
    with torch.no_grad():
        return net(torch.from_numpy(x))[0].numpy()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_two_as_one_give_what_each_gives_alone(hidden, size, steps, batch, seed):
    rng = np.random.default_rng(seed)
    weights = {key: random_weights(rng, hidden, size) for key in "ab"}
    given_inputs = {name: rng.normal(size=(steps, batch, size)).astype(np.float32) for name in "xy"}
    shapes = {key: ["t", "b", size] for key in "xy"}
    model = joined(
        graph([("p", "x", "a", hidden), ("q", "y", "b", hidden)], weights, shapes, [("p", hidden), ("q", hidden)])
    )
    assert count(model) == 1
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        ["p", "q"], given_inputs
    )
    for result, name, key in zip(found, "xy", "ab", strict=True):
        np.testing.assert_allclose(result, of_pytorch(given_inputs[name], weights[key]), atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ([("p", "x", "a", 3), ("q", "p", "a", 3)], 2),  # one waits for the other
        ([("p", "x", "a", 3), ("q", "x", "b", 3), ("r", "p", "a", 3), ("s", "q", "b", 3)], 2),
        ([("p", "x", "a", 3), ("q", "x", "b", 3), ("r", "p", "a", 3)], 2),
        ([("p", "x", "a", 3), ("q", "x", "c", 2)], 2),  # of two sizes
        ([("p", "x", "a", 3, "lengths"), ("q", "x", "b", 3, "lengths")], 2),  # which joined ones cannot have
        ([("p", "x", "a", 3)], 1),
    ],
)
def test_only_those_that_can_run_at_once_are_joined(nodes, left):
    rng = np.random.default_rng(0)
    weights = {"a": random_weights(rng, 3, 3), "b": random_weights(rng, 3, 3), "c": random_weights(rng, 2, 3)}
    outputs = [(name, weights[key][1].shape[2]) for name, _, key, *_ in nodes]
    model = graph(nodes, weights, {"x": ["t", "b", 3]}, outputs)
    assert count(joined(model)) == left
    given_inputs = {"x": rng.normal(size=(5, 2, 3)).astype(np.float32), "lengths": np.array([5, 2], np.int32)}
    sessions = [
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"])
        for each in (model, joined(model))
    ]
    names = {value.name for value in sessions[0].get_inputs()}
    ours, theirs = (
        session.run(None, {name: array for name, array in given_inputs.items() if name in names})
        for session in sessions
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
