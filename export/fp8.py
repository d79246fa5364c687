"""Linear layers in 8-bit floating point (E4M3), weights and inputs, for TensorRT's products of such numbers.

A weight ``W``, ``[out, in]``, is stored as ``[in, out]`` with one scale, a power of two. Inputs are rounded while a
graph runs, with a scale for each token, so nothing has to be calibrated and no token changes another::

    peaks = max |x|                                   of each token
    y = (DQ(Q(x / peaks)) @ DQ(W)) * peaks            Q, DQ: QuantizeLinear, DequantizeLinear

TensorRT makes one kernel of all from the norm before it to Q, one product of E4M3 numbers, and puts ``* peaks`` into
the kernel behind it (docs/fp8.md). All operators are standard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesart.graphs.model.torch_fp8 import FP8, UNIT
from mesart.graphs.model.torch_weights import Packed

_MOST = torch.finfo(FP8).max

_PRODUCT = "fp8/"
"""With which the names of the products begin, by which they are found in an engine."""


def quantise_fp8(weight: Tensor) -> Packed:
    """Rounds a weight to E4M3.

    Args:
        weight: ``[out, in]``, of any floating dtype, which the scale gets too.

    Returns:
        Numbers ``[in, out]``, and the scale, ``[]``: the smallest power of two with which none is out of range; 1 if
        all are zero. So what the numbers stand for is exact in every dtype that has the range.
    """
    numbers = weight.detach().float().t()
    peak = float(numbers.abs().max())
    scale = 2.0 ** math.ceil(math.log2(peak / _MOST)) if peak else 1.0
    return Packed((numbers / scale).to(FP8), torch.tensor(scale, dtype=weight.dtype), None)


def round_inputs(graph: ir.Graph, products: Sequence[ir.Node]) -> None:
    """Makes products with E4M3 weights products of E4M3 numbers, in place.

    Args:
        graph: the graph.
        products: its nodes ``MatMul(x, DequantizeLinear(W, scale))``; those of one ``x`` share what is made of it.
    """
    of_inputs: dict[ir.Value, list[ir.Node]] = {}
    for node in products:
        inputs = node.inputs[0]
        assert inputs is not None
        of_inputs.setdefault(inputs, []).append(node)
    for inputs, its in of_inputs.items():
        tape = ir.tape.Tape()
        rounded, peaks = _round(graph, tape, inputs)
        graph.insert_before(next(node for node in graph if node in its), tape.nodes)
        for node in its:
            output = node.outputs[0]
            product = ir.node("MatMul", [rounded, node.inputs[1]], name=f"{_PRODUCT}{output.name}")
            _describe(product.outputs[0], f"{output.name}.unscaled", output)
            graph.insert_before(node, product)
            # The node itself becomes the multiplication, so that all that reads its output, which may be one of the
            # graph's, reads the scaled product.
            node.op_type = "Mul"
            node.replace_input_with(0, product.outputs[0])
            node.replace_input_with(1, peaks)


def _round(graph: ir.Graph, tape: ir.tape.Tape, inputs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The rounded quotients, ``[..., in]``, and what they were divided by, ``[..., 1]``."""
    assert inputs.dtype is not None
    number = inputs.dtype.numpy()
    last = _constant(graph, "last", np.array([-1]))
    least = _constant(graph, f"least.{number}", np.array(_least(number), number))
    unit = _constant(graph, f"unit.{number}", np.array(UNIT, number))
    zero = _constant(graph, "zero", np.array(0, ml_dtypes.float8_e4m3fn))
    peaks = tape.op("ReduceMax", [tape.op("Abs", [inputs]), last], {"keepdims": 1})
    peaks = tape.op("Max", [peaks, least])
    quotients = tape.op("Div", [inputs, peaks])
    numbers = tape.op("QuantizeLinear", [quotients, unit, zero])
    rounded = tape.op("DequantizeLinear", [numbers, unit])
    for value, name in ((quotients, "quotients"), (rounded, "rounded")):
        _describe(value, f"{inputs.name}.{name}", inputs)
    return rounded, peaks


def _least(number: np.dtype[Any]) -> float:
    """The smallest normal number of a floating type."""
    return float(ml_dtypes.finfo(number).smallest_normal)  # type: ignore[no-untyped-call]


def pair_single_rows(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    """Gives products of one row of E4M3 numbers a second row, in place; the result is that of the first.

    TensorRT for RTX 1.7 multiplies a single row in a kernel that wants the weight in another order: it would copy a
    weight that is an input of the engine at each run.

    Args:
        graph: of an engine; values have their shapes.
        sizes: of the axes that are fixed.
    """
    zero, one, rows = (_constant(graph, f"rows.{i}", np.array([i])) for i in (0, 1, -2))
    for node in list(graph):
        quotients = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if quotients is None or quotients.shape is None:
            continue
        *leading, _ = (sizes.get(str(x.value)) if isinstance(x, ir.SymbolicDim) else x for x in quotients.shape)
        if not leading or any(extent != 1 for extent in leading):
            continue
        both = _constant(graph, f"pair.{len(leading)}", np.array([*leading[:-1], 2, 1]))
        pair = ir.node("Expand", [quotients, both])
        pair.outputs[0].type = quotients.type
        graph.insert_before(node, pair)
        node.replace_input_with(0, pair.outputs[0])
        for product in node.outputs[0].consumers()[0].outputs[0].consumers():
            first = ir.node("Slice", [product.outputs[0], zero, one, rows])
            first.outputs[0].type = product.outputs[0].type
            graph.insert_after(product, first)
            for scaled in product.outputs[0].consumers():
                if scaled is not first:
                    scaled.replace_input_with(0, first.outputs[0])


def _describe(value: ir.Value, name: str, like: ir.Value) -> None:
    value.name, value.type = name, like.type
    value.shape = None if like.shape is None else like.shape.copy()


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """An initializer, which all of a graph share."""
    name = f"fp8.{name}"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def count_products(graph: bytes) -> int:
    """How many products of E4M3 numbers a serialised graph has."""
    return sum(node.name.startswith(_PRODUCT) for node in onnx.load_model_from_string(graph).graph.node)


def computed_products(layers: Iterable[str]) -> int:
    """How many of them an engine computes so, by TensorRT's description of its layers; one layer may be several."""
    found = set()
    for layer in layers:
        if "LayerType: gemm" in layer and layer.split("Outputs:")[0].count("Datatype: FP8") == 2:
            found.update(re.findall(rf"\[ONNX Layer: ({_PRODUCT}[^\]]*)\]", layer))
    return len(found)


__all__ = ["computed_products", "count_products", "pair_single_rows", "quantise_fp8", "round_inputs"]
