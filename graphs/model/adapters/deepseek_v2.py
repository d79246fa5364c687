"""DeepSeek V2: uses transformers' attention interface, but rotates by complex numbers, of which ONNX has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

from mesart.graphs.model.adapters import become
from mesart.graphs.model.adapters.gptj import rotate_pairs
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import CosSin, RotaryTable, rotary_table


class MesaDeepseekV2Attention(DeepseekV2Attention):
    """Latent attention, by way of Mesa attention with whole keys and values."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same."""
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)  # type: ignore[misc]
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))  # type: ignore[misc]
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        still, rotary = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((still, rotate_pairs(rotary, *position_embeddings)), dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, rotary = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        key, value = self.expand_kv(latent, rotate_pairs(rotary.unsqueeze(1), *position_embeddings))
        output, _no_weights = mesa_attention(self, query, key, value, scaling=self.scaling)
        result: Tensor = self.o_proj(output.flatten(2))
        return result, None


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    decoder: Any = model.model
    kind = type(decoder.rotary_emb)

    def cos_sin(positions: Tensor) -> CosSin:
        rotary = kind(config=model.config).to("cpu")  # on the meta device the model's own has no numbers
        found = rotary(torch.zeros(1), positions[None])[0].repeat_interleave(2, dim=-1)
        return {None: (found.real.contiguous(), found.imag.contiguous())}

    decoder.rotary_emb = table = rotary_table(cos_sin, train_length, kind.__name__)
    become(model, DeepseekV2Attention, MesaDeepseekV2Attention)
    return table
