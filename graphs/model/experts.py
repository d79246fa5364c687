"""Mixture of experts: every expert computes every token, and the router's weights decide what counts.

Registered with transformers' experts interface under the name ``"mesa"``. transformers' own ways sort tokens by
expert or fetch weights by token: sizes that depend on the data, which no engine with fixed shapes can run.

Axes: N tokens, k experts of a token, E experts, D hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "mesa"
"""The name of these experts in transformers' experts interface."""

_WIDTH = 1 << 14
"""Intermediate numbers a token may take at a time: experts are computed in groups as large as this allows."""


def mesa_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the chosen experts, by plain matrix products over all experts.

    It costs E / k times the products of the chosen experts alone, and a decoding step reads the weights of all experts;
    the memory is that of one group, N times ``_WIDTH`` numbers.

    Args:
        module: transformers' collection of experts, weights ``[E, out, in]`` or ``[E, in, out]``.
        hidden: ``[N, D]``.
        chosen: the experts of each token, int64 ``[N, k]``.
        weights: what the router gives them, ``[N, k]``.

    Returns:
        ``[N, D]`` in the type of ``hidden``.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, first), module.down_proj
    experts, width = up.shape[0], max(up.shape[1:])
    # The weight of each expert, 0 where a token has not chosen it: [E, N, 1].
    here = chosen.unsqueeze(0) == torch.arange(experts, device=chosen.device)[:, None, None]
    share = torch.where(here, weights.unsqueeze(0), torch.zeros((), dtype=weights.dtype)).sum(-1, keepdim=True)
    total = None
    size = max(1, _WIDTH // width)
    for start in range(0, experts, size):
        group = slice(start, min(start + size, experts)) if size < experts else slice(None)
        # Expanded, because OpenVINO takes a product with one left side for a batch of weights for a plain one.
        inner = _linear(module, hidden.expand(len(up[group]), -1, -1), first, group)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = _linear(module, inner, "down_proj", group)
        if module.has_post_expert_norm:
            outer = module.post_expert_norm(outer)
        # An expert may overflow for a token that has not chosen it, and infinity times 0 is no number.
        part = torch.where(share[group] != 0, outer * share[group], torch.zeros((), dtype=outer.dtype)).sum(0)
        total = part if total is None else total + part
    assert total is not None
    assert down.shape[0] == experts
    return total.to(hidden.dtype)


def _linear(module: nn.Module, x: Tensor, name: str, group: slice) -> Tensor:
    """One projection of a group of experts: ``[G, N, in]`` to ``[G, N, out]``."""
    weight: Any = getattr(module, name)
    bias: Any = getattr(module, f"{name}_bias", None)
    if group != slice(None):
        weight, bias = weight[group], None if bias is None else bias[group]
    x = x @ (weight if module.is_transposed else weight.transpose(-1, -2))
    return x if bias is None else x + bias.unsqueeze(1)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, mesa_experts)
