"""Graphs that write keys and values where they lie: which models have them. Their numbers: tests/runtime."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from mesart.export.paged_forms import with_grouped_attention, with_paged_attention
from mesart.export.trace import trace_phases
from mesart.graphs import MesaConfig
from mesart.graphs.bundle.names import BLOCK, PAGED_INPUTS
from mesart.graphs.model.phase_module import PhaseModule

# Grouped queries, one key a query, normed queries, partial and interleaved rotary, a layer without positions, experts.
PLAIN = ("llama", "qwen3", "gpt_neox", "cohere", "glm", "smollm3", "gptj", "mixtral")
OTHERS = {
    "gemma2": "capped scores and windows",
    "gpt_oss": "sinks and windows",
    "mpt": "ALiBi",
    "deepseek_v3": "values of another size than the keys",
}


def traced(model: Any) -> ir.Model:
    with torch.no_grad():
        return trace_phases(PhaseModule(model, MesaConfig(64), "traced"))


@pytest.mark.parametrize("family", OTHERS)
def test_what_the_operators_cannot_say_has_no_such_graph(make_model, family):
    graph = traced(make_model(family))
    assert with_paged_attention(graph) is None, OTHERS[family]
    assert with_grouped_attention(graph) is None, OTHERS[family]


@pytest.mark.parametrize("family", PLAIN)
def test_no_mask_is_left_and_every_layer_is_one_operator(make_model, family):
    graph = traced(make_model(family))
    paged, grouped = with_paged_attention(graph), with_grouped_attention(graph)
    assert paged is not None
    assert grouped is not None
    layers = sum(node.domain == "mesart" for node in graph.graph)
    for form, operator in ((paged, "PagedAttention"), (grouped, "GroupQueryAttention")):
        kinds = [node.op_type for node in form.graph]
        assert kinds.count(operator) == layers
        assert "Softmax" not in kinds or family == "mixtral"  # which chooses its experts by one
        names = {value.name for value in form.graph.inputs}
        assert not names & {"past_mask", "new_mask", "past_position_ids"}
    assert {value.name for value in paged.graph.outputs} == {"logits"}
    assert set(PAGED_INPUTS) <= {value.name for value in paged.graph.inputs}
    key = next(value for value in paged.graph.inputs if value.name == "past_key_values.0.key")
    assert key.shape is not None
    assert key.shape[2] == BLOCK
