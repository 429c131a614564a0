"""Half numbers as a graph writes them, on a processor.

ONNX Runtime computes half operators in FP32 there, and leaves out the roundings between them: tried, the product of two
half matrices came out with 24 bits. So what is run is the graph with two Identities after every half tensor, and
without optimisation: Identity has a half kernel, and what enters it is rounded. (One alone, between nodes that have no
such kernel, is computed in FP32 like them.) That it does is seen anew at each check.
"""

from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from aesanet.errors import ExportError

_PRODUCT_AND_BIAS: Final = """
<ir_version: 10, opset_import: ["" : 20]>
product_and_bias (float[8, 64] x, float16[64, 64] weight, float16[64] bias) => (float[8, 64] y) {
    half = Cast<to = 10>(x)
    product = MatMul(half, weight)
    sum = Add(product, bias)
    y = Cast<to = 1>(sum)
}
"""


def round_as_written(model: ir.Model) -> None:
    """Put two Identities after every half tensor that a node computes."""
    for node in list(model.graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT16:
                continue
            uses, last, after = value.uses(), value, node
            for number in (1, 2):
                identity = ir.node("Identity", [last])
                model.graph.insert_after(after, identity)
                (last,), after = identity.outputs, identity
                last.name, last.dtype, last.shape = f"{value.name}.rounded{number}", value.dtype, value.shape
            for user, position in uses:
                user.replace_input_with(position, last)


def session_as_written(model: ir.Model) -> onnxruntime.InferenceSession:
    """A session on the processor that rounds every half tensor of a graph; changes the graph (`round_as_written`)."""
    model = ir.external_data.load_to_model(model)
    round_as_written(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def check_rounding() -> None:
    """Raise ExportError where this ONNX Runtime does not round as the check needs: seen on a product and its bias."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 64)).astype(np.float32)
    weight, bias = (rng.normal(0, 20, size).astype(np.float16) for size in ((64, 64), 64))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(_PRODUCT_AND_BIAS)))
    (found,) = session_as_written(model).run(None, {"x": x, "weight": weight, "bias": bias})
    product = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64)
    if not np.array_equal(found, product.astype(np.float16) + bias):
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} does not round half numbers on this processor as the check of "
            "FP16 graphs needs; try onnxruntime 1.32 on x86-64, or export without --fp16"
        )
