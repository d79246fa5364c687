"""What is traced does not follow from the weights; the rotation of all layers' keys is that of each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mesart.export.forms import with_attention
from mesart.export.rerotation import rerotation_of_layers
from mesart.export.trace import trace_phases, trace_rerotation
from mesart.graphs import MesaConfig
from mesart.graphs.model.phase_module import PhaseModule


def described(graph: ir.Model) -> list[Any]:
    """Its nodes, and its weights by name."""
    nodes = [(node.op_type, [value and value.name for value in node.inputs]) for node in graph.graph]
    return [nodes, sorted(graph.graph.initializers)]


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_weights_are_neither_folded_nor_merged(make_model, family):
    """An export traces before it has them. Small weights that happen to be equal, or 0: biases of experts and routers,
    norms to which 1 is added."""
    graphs = []
    for number in (None, 0.0, 1.0):
        model = make_model(family)
        for parameter in model.parameters():
            if number is not None:
                torch.nn.init.constant_(parameter, number)
        # Parameters of a model's copy are the model's own.
        with torch.no_grad():
            traced = trace_phases(PhaseModule(model, MesaConfig(64), "traced"))
        graphs.append([described(traced), described(with_attention(traced, "unfused"))])
        names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
        assert names <= {name.removesuffix(".weight") for name in traced.graph.initializers}
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("smollm3", {}),  # its second layer turns no keys
        ("glm", {}),
    ],
)
def test_place_of_layers(make_model, family, changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = PhaseModule(make_model(family, **changes), MesaConfig(64), "traced")
    rotary = {layer: spec for layer, spec in enumerate(module.layers) if spec.layout is not None}
    with torch.no_grad():
        rerotations = {
            spec: trace_rerotation(module.rerotation(spec), spec.kv_heads, spec.key_size, torch.float32)
            for spec in rotary.values()
        }
    graph = rerotation_of_layers({layer: rerotations[spec] for layer, spec in rotary.items()})
    tables = [value for value in graph.graph.initializers.values() if value.shape is not None and len(value.shape) == 2]
    assert len(tables) == 2 * len(rerotations)
    assert [value.name for value in graph.graph.inputs] == [*(f"key.{i}" for i in rotary), "from_ids", "to_ids"]
    assert [value.name for value in graph.graph.outputs] == [f"rotated.{i}" for i in rotary]

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(64, (3, 7), generator=generator) for _ in range(2)]
    keys = {
        layer: torch.randn(3, spec.kv_heads, 7, spec.key_size, generator=generator) for layer, spec in rotary.items()
    }
    feeds = {f"key.{layer}": key.numpy() for layer, key in keys.items()}
    feeds |= {"from_ids": ids[0].numpy(), "to_ids": ids[1].numpy()}
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for rotated, (layer, spec) in zip(session.run(None, feeds), rotary.items(), strict=True):
        with torch.no_grad():
            expected = module.rerotation(spec)(keys[layer], *ids)
        assert np.abs(rotated - expected.numpy()).max() < 1e-5
        assert np.abs(rotated - keys[layer].numpy()).max() > 0.1
