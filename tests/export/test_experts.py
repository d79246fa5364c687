"""Products of a group of experts, rewritten one by one and quantised: the numbers that onnxruntime makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from mesart.export.quantise import EXPERT, quantise, quantise_products
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Quantisation
from mesart.graphs.model.torch_weights import dequantise

EXPERTS, INPUTS, OUTPUTS = 5, 32, 6


def product(size: int, *, inputs_first: bool) -> ir.Model:
    """``y = x @ W`` of all experts, in groups of ``size``, as a traced graph has it; ``W`` has no numbers."""
    shape = (EXPERTS, INPUTS, OUTPUTS) if inputs_first else (EXPERTS, OUTPUTS, INPUTS)
    lines, parts = [], []
    for start in range(0, EXPERTS, size):
        stop = min(start + size, EXPERTS)
        x, w = f"x{start}", "w"
        lines.append(f"{x} = Slice(x, n{start}, n{stop}, n0, n1)")
        if size < EXPERTS:
            lines.append(f"w{start} = Slice(w, n{start}, n{stop}, n0, n1)")
            w = f"w{start}"
        if not inputs_first:
            lines.append(f"t{start} = Transpose<perm=[0, 2, 1]>({w})")
            w = f"t{start}"
        lines.append(f"y{start} = MatMul({x}, {w})")
        parts.append(f"y{start}")
    numbers = ", ".join(f"int64[1] n{i} = {{{i}}}" for i in range(EXPERTS + 1))
    text = f"""<ir_version: 11, opset_import: ["": 23]>
        g (float[{EXPERTS}, N, {INPUTS}] x) => (float[{EXPERTS}, N, {OUTPUTS}] y) <{numbers}>
        {{ {" ".join(lines)} y = Concat<axis=0>({", ".join(parts)}) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, np.nan, np.float32), "w"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    model.graph.initializers["w"].metadata_props["weight"] = "experts.w"
    return model


def run(model: ir.Model, weight: torch.Tensor, how: Quantisation, x: np.ndarray) -> np.ndarray:
    """With the parts of a quantised weight ``[E, out, in]`` for the initializers that stand for them."""
    packed = quantise(weight, how)
    parts = {"quantised": packed.numbers, "scales": packed.scales, "zero_points": packed.zero_points}
    for value in model.graph.initializers.values():
        if EXPERT in value.metadata_props:
            assert value.shape is not None
            assert value.dtype is not None
            part = parts[value.metadata_props["weight"].removeprefix("experts.w.")]
            assert part is not None
            numbers = part[int(value.metadata_props[EXPERT])].numpy()
            kind = ir.PackedTensor if value.dtype.bitwidth == 4 else ir.Tensor
            assert value.const_value is not None
            assert value.const_value.nbytes == numbers.nbytes
            value.const_value = kind(numbers, value.dtype, shape=ir.Shape(value.shape.numpy()), name=value.name)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # no rounded activations
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        Quantisation("int8", 8, None, symmetric=True),
        Quantisation("int8", 8, None, symmetric=False),
        Quantisation("int4", 4, 16, symmetric=False),
        Quantisation("int4", 4, 32, symmetric=True),
    ],
    ids=str,
)
def test_each_expert_is_multiplied(how, inputs_first, size):
    """Whichever way the weight lies; the last group may be smaller."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, OUTPUTS, INPUTS) * torch.arange(1, EXPERTS + 1)[:, None, None]
    x = torch.randn(EXPERTS, 3, INPUTS)
    model = product(size, inputs_first=inputs_first)
    assert quantise_products(model, how, {"experts.w": inputs_first}) == {"experts.w"}
    operators = [node.op_type for node in model.graph]
    assert operators.count("DequantizeLinear") == operators.count("MatMul") == EXPERTS
    assert "w" not in model.graph.initializers
    assert "Transpose" not in operators
    wanted = x @ dequantise(quantise(weight, how), tuple(weight.shape), how).transpose(1, 2)
    np.testing.assert_allclose(run(model, weight, how, x.numpy()), wanted.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_groups_that_do_not_divide(inputs_first):
    how = Quantisation("int4", 4, 64, symmetric=True)
    with pytest.raises(MesaError, match=r"^groups of 64 do not divide the 32 inputs of experts.w; 32 divides .*$"):
        quantise_products(product(2, inputs_first=inputs_first), how, {"experts.w": inputs_first})


def test_others_stay():
    model = product(2, inputs_first=True)
    assert quantise_products(model, Quantisation("int8", 8, None, symmetric=True), {}) == set()
    assert "w" in model.graph.initializers
