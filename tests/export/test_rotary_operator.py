"""The standard rotary operator stands where it computes what the model wrote out, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mesart.export.forms import with_attention
from mesart.export.rotary_operator import with_rotary_operator
from mesart.export.trace import trace_phases
from mesart.graphs import MesaConfig
from mesart.graphs.model.phase_module import PhaseModule

onnxruntime = pytest.importorskip("onnxruntime")

# How many of a layer's two rotations become the operator. gptj: interleaved pairs.
FAMILIES = {"tied_llama": 2, "gpt_neox": 2, "phi3": 2, "gemma2": 2, "gptj": 0, "bloom": 0}


def _operators(graph: ir.Model) -> int:
    return sum(node.op_type == "RotaryEmbedding" for node in graph.graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_model_rotates_halves(family, make_model):
    module = PhaseModule(make_model(family), MesaConfig(64), "traced")
    with torch.no_grad():
        plain = with_attention(trace_phases(module), "unfused_per_head")
    fused = plain.clone()
    with_rotary_operator(fused)
    assert _operators(fused) == FAMILIES[family] * len(module.layers)
    expected, got = _run(plain), _run(fused)
    for name, value in expected.items():
        assert np.abs(got[name] - value).max() < 1e-5, name


def test_unequal_halves_stay(make_model):
    with torch.no_grad():
        graph = with_attention(
            trace_phases(PhaseModule(make_model("tied_llama"), MesaConfig(64), "traced")), "unfused_per_head"
        )
    table = next(value for name, value in graph.graph.initializers.items() if "cos" in name)
    assert table.const_value is not None
    numbers = table.const_value.numpy().copy()
    numbers[:, 0] *= 2
    table.const_value = ir.tensor(numbers, name=table.name)
    with_rotary_operator(graph)
    assert _operators(graph) == 0


def test_other_sums_of_products_stay(make_model):
    """The sign on the other half is a turn in the other direction."""
    with torch.no_grad():
        graph = with_attention(
            trace_phases(PhaseModule(make_model("tied_llama"), MesaConfig(64), "traced")), "unfused_per_head"
        )
    for node in graph.graph:
        if node.op_type == "Concat" and node.inputs[0] is not None:
            producer = node.inputs[0].producer()
            if producer is not None and producer.op_type == "Neg":
                first, second = node.inputs
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
    with_rotary_operator(graph)
    assert _operators(graph) == 0


def _run(graph: ir.Model) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    sizes, random = {"B": 2, "S": 3, "P": 6, "M": 3}, np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        shape = [sizes.get(axis, axis) for axis in value.shape]
        if value.type == "tensor(int64)":
            feeds[value.name] = random.integers(0, 3, shape)
        else:
            feeds[value.name] = random.standard_normal(shape, np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
