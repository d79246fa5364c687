"""BLOOM: ALiBi, queries, keys and values interleaved in one projection, the residual added by the attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from mesart.graphs.model.adapters import become
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable


class MesaBloomAttention(BloomAttention):
    """BLOOM's attention by way of Mesa attention."""

    slopes: list[float]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor | float = 0.0, **_: Any
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same, the residual added."""
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output, _no_weights = mesa_attention(self, query, key, value, alibi_slopes=self.slopes)
        return residual + self.dense(output.flatten(2)), None


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    del train_length
    config: Any = model.config
    # transformers' bias of positions 0 and 1.
    slopes = build_alibi_tensor(torch.ones(1, 2), config.n_head, torch.float32)[:, 0, 1].tolist()
    become(model, BloomAttention, MesaBloomAttention, slopes=slopes)
    return RotaryTable({})
