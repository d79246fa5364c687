"""GPT-NeoX Japanese: rotary embeddings of a part of each head; the last layer's bias is handed on to be added later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import (
    GPTNeoXJapaneseAttention,
    apply_rotary_pos_emb,
)

from mesart.graphs.model.adapters import become
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable, install_rotary_table


class MesaGPTNeoXJapaneseAttention(GPTNeoXJapaneseAttention):
    """The attention of GPT-NeoX Japanese by way of Mesa attention."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None, nn.Parameter | None]:
        """``[B, S, hidden]`` to the same, and the bias."""
        mixed = self.query_key_value(hidden_states).unflatten(-1, (self.num_attention_heads, -1))
        query, key, value = (x.transpose(1, 2) for x in mixed.chunk(3, dim=-1))
        size = self.rotary_ndims
        parts = (query[..., :size], key[..., :size])
        rotated = apply_rotary_pos_emb(*parts, *position_embeddings)  # type: ignore[no-untyped-call]
        query, key = (torch.cat((t, x[..., size:]), dim=-1) for t, x in zip(rotated, (query, key), strict=True))
        output, _no_weights = mesa_attention(self, query, key, value)
        return self.dense(output.flatten(2)), None, self.dense_bias


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    become(model, GPTNeoXJapaneseAttention, MesaGPTNeoXJapaneseAttention)
    return install_rotary_table(model, train_length)
