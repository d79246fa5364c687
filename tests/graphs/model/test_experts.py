"""Our experts compute what transformers' own do, in each of the layouts that transformers knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from mesart.graphs.model import experts

KINDS = {
    "mixtral": (MixtralExperts, {"num_local_experts": 6}),
    "gpt_oss": (GptOssExperts, {"num_local_experts": 6}),  # weights [E, in, out], biases, a gate of its own
    "nemotron_h": (NemotronHExperts, {"n_routed_experts": 6, "moe_intermediate_size": 24}),  # no gate
}


@pytest.mark.parametrize("width", [1, 100, 1 << 14])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, width, monkeypatch):
    """One expert at a time, two, and all at once."""
    monkeypatch.setattr(experts, "_WIDTH", width)
    cls: Any = KINDS[kind][0]
    fields: Any = KINDS[kind][1]
    config = AutoConfig.for_model(kind, hidden_size=16, intermediate_size=24, **fields)
    module, generator = cls(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    hidden = torch.randn(7, 16, generator=generator)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator)
    config._experts_implementation = "eager"
    with torch.no_grad():
        expected = module(hidden, chosen, weights)
        config._experts_implementation = experts.EXPERTS
        got = module(hidden, chosen, weights)
    assert expected.std() > 0.05
    assert (got - expected).abs().max() < 1e-5
