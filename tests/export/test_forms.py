"""Every form of attention in ONNX, run by onnxruntime, is the model in PyTorch; also what only some models have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mesart.export.forms import Form, with_attention
from mesart.export.trace import trace_phases
from mesart.graphs import MesaConfig
from mesart.graphs.model.phase_module import PhaseModule, PhaseOutputs

onnxruntime = pytest.importorskip("onnxruntime")

PAST, NEW, SLOTS = 20, 5, 32

# Between them: sinks, a window, ALiBi of grouped queries, capped scores.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": 6},
    "falcon": {},
    "gemma2": {"sliding_window": 6},
}


class Case:
    """A traced model, and new tokens behind random keys and values that stand on stairs."""

    def __init__(self, model: Any) -> None:
        module = PhaseModule(model, MesaConfig(64))
        with torch.no_grad():
            self.graph = trace_phases(PhaseModule(model, MesaConfig(64), "traced"))
        generator = torch.Generator().manual_seed(0)
        self.keys = [torch.randn(1, x.kv_heads, PAST, x.key_size, generator=generator) for x in module.layers]
        self.values = [torch.randn(1, x.kv_heads, PAST, x.value_size, generator=generator) for x in module.layers]
        self.past_positions = torch.arange(PAST)[None] // 2
        self.inputs = {
            "input_ids": torch.arange(NEW)[None] + 7,
            "position_ids": torch.arange(NEW)[None] + PAST // 2,
            "query_scale": torch.full((1, 1, NEW, 1), 1.3),
            "logits_at": torch.arange(NEW),
        }
        self.masks = {
            "past_mask": torch.zeros(1, 1, 1, PAST),
            "new_mask": torch.full((NEW, NEW), -1e9).triu(1)[None, None],
        }
        with torch.no_grad():
            self.expected: PhaseOutputs = module(
                **self.inputs,
                **self.masks,
                past_keys=self.keys,
                past_values=self.values,
                past_position_ids=self.past_positions,
            )

    def run(self, form: Form) -> dict[str, np.ndarray]:
        """The graph's outputs; those of the in-place form are whole caches."""
        graph = with_attention(self.graph, form)
        feeds = dict(self.inputs)
        slots = SLOTS if form == "kv_in_place" else PAST
        if form == "kv_in_place":
            feeds |= {"write_at": torch.tensor([PAST]), "attended": torch.arange(SLOTS - 4)}
            positions = torch.cat([self.past_positions, self.inputs["position_ids"]], dim=1)
            feeds["past_position_ids"] = torch.nn.functional.pad(positions, (0, SLOTS - PAST - NEW))
        else:
            feeds |= {**self.masks, "past_position_ids": self.past_positions}
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for kind, tensor in zip(("key", "value"), pair, strict=True):
                # Slots behind hold anything finite.
                padding = torch.full((*tensor.shape[:2], slots - PAST, tensor.shape[3]), 3.0)
                feeds[f"past_key_values.{layer}.{kind}"] = torch.cat([tensor, padding], dim=2)
        session = onnxruntime.InferenceSession(
            ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        wanted = {value.name for value in session.get_inputs()}
        results = session.run(None, {name: value.numpy() for name, value in feeds.items() if name in wanted})
        return dict(zip((value.name for value in session.get_outputs()), results, strict=True))


@pytest.fixture(scope="module", params=CHANGES)
def case(request, make_model) -> Case:
    return Case(make_model(request.param, **CHANGES[request.param]))


@pytest.mark.parametrize("form", ["unfused", "unfused_per_head", "attention_op", "kv_in_place"])
def test_equals_pytorch(case, form):
    got = case.run(form)
    assert np.abs(got["logits"] - case.expected.logits.numpy()).max() < 1e-5
    new = slice(PAST, PAST + NEW) if form == "kv_in_place" else slice(None)
    for layer, key in enumerate(case.expected.keys):
        assert np.abs(got[f"present.{layer}.key"][:, :, new] - key.numpy()).max() < 1e-5


def test_positions_are_an_input_where_they_matter(case, make_model):
    assert "past_position_ids" in {value.name for value in case.graph.graph.inputs}
    with torch.no_grad():
        plain = trace_phases(PhaseModule(make_model("tied_llama"), MesaConfig(64), "traced"))
    assert "past_position_ids" not in {value.name for value in plain.graph.inputs}


@pytest.mark.parametrize("form", ["unfused", "unfused_per_head", "attention_op", "kv_in_place"])
def test_positions_change_the_result(case, form):
    right = case.run(form)["logits"]
    case.past_positions = case.past_positions.flip(1)
    try:
        wrong = case.run(form)["logits"]
    finally:
        case.past_positions = case.past_positions.flip(1)
    assert np.abs(right - wrong).max() > 1e-2
