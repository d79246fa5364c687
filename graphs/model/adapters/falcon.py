"""Falcon: rotary embeddings or ALiBi; a key for all heads, for groups of heads, or for each head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb, build_alibi_tensor

from mesart.graphs.model.adapters import become
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable, install_rotary_table


class MesaFalconAttention(FalconAttention):
    """Falcon's attention by way of Mesa attention; keys that heads share are kept once."""

    slopes: list[float] | None
    num_kv_heads: int

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same."""
        mixed = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:  # the heads of a group, their key, their value; and the next group
            group = self.num_heads // self.num_kv_heads
            grouped = mixed.unflatten(-1, (self.num_kv_heads, group + 2, self.head_dim))
            parts = (grouped[..., :group, :].flatten(2, 3), grouped[..., group, :], grouped[..., group + 1, :])
        else:
            parts = self._split_heads(mixed)
        query, key, value = (x.transpose(1, 2) for x in parts)
        if self.slopes is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
        output, _no_weights = mesa_attention(self, query, key, value, alibi_slopes=self.slopes)
        result: Tensor = self.dense(output.flatten(2))
        return result, None


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    config: Any = model.config
    slopes = None
    if config.alibi:
        # transformers' bias of positions 0 and 1, which Falcon scales like the scores.
        bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), config.num_attention_heads, torch.float32)
        slopes = (bias[:, 0, 1] / math.sqrt(config.head_dim)).tolist()
    become(model, FalconAttention, MesaFalconAttention, slopes=slopes)
    return RotaryTable({}) if config.alibi else install_rotary_table(model, train_length)
