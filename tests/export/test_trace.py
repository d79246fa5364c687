"""What is traced does not follow from the numbers of the weights: an export traces before it has them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from mesart.export.forms import with_attention
from mesart.export.trace import trace_roles
from mesart.graphs.role import RoleModule


def described(graph: ir.Model) -> list[Any]:
    """Its nodes, and its weights by name."""
    nodes = [(node.op_type, [value and value.name for value in node.inputs]) for node in graph.graph]
    return [nodes, sorted(graph.graph.initializers)]


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_weights_are_neither_folded_nor_merged(make_model, family):
    """Small weights that happen to be equal, or 0: biases of experts and routers, norms to which 1 is added."""
    graphs = []
    for number in (None, 0.0, 1.0):
        model = make_model(family)
        for parameter in model.parameters():
            if number is not None:
                torch.nn.init.constant_(parameter, number)
        # Parameters of a model's copy are the model's own.
        with torch.no_grad():
            traced = trace_roles(RoleModule(model, 64, "traced"))
        graphs.append([described(traced), described(with_attention(traced, "split"))])
        names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
        assert names <= {name.removesuffix(".weight") for name in traced.graph.initializers}
    assert graphs[0] == graphs[1] == graphs[2]
