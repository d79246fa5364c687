"""GPT-J: each layer rotates neighbouring pairs of dimensions by angles from a buffer of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import GPTJAttention, create_sinusoidal_positions

from mesart.graphs.model.adapters import become
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable, rotate_quarter


class MesaGPTJAttention(GPTJAttention):
    """GPT-J's attention by way of Mesa attention."""

    table: RotaryTable

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (self.num_attention_heads, self.head_dim)
        query, key, value = (p(hidden_states).unflatten(-1, heads).transpose(1, 2) for p in projections)
        cos, sin = position_embeddings or self.table(hidden_states, position_ids)
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        output, _no_weights = mesa_attention(self, query, key, value)
        result: Tensor = self.out_proj(output.flatten(2))
        return result, None


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, H, S, D]``, of which the first R dimensions rotate, by ``[B, S, R]``."""
    size = cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    rotated = rotated * cos.unsqueeze(1) + rotate_quarter(rotated, "interleaved") * sin.unsqueeze(1)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def pair_table(rotary_dim: int, train_length: int) -> RotaryTable:
    """GPT-J's angles, each for a pair: ``[train_length, R]``."""
    sin, cos = create_sinusoidal_positions(train_length, rotary_dim).repeat_interleave(2, dim=1).chunk(2, dim=1)
    return RotaryTable({None: (cos.contiguous(), sin.contiguous())})


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    config: Any = model.config
    table = pair_table(config.rotary_dim or config.n_embd // config.n_head, train_length)
    become(model, GPTJAttention, MesaGPTJAttention, table=table)
    return table
