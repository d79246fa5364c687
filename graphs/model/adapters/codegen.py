"""CodeGen: GPT-J's rotation; queries, values and keys in one projection, in four parts, as four TPU cores held them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from mesart.graphs.model.adapters import become
from mesart.graphs.model.adapters.gptj import pair_table, rotate_pairs
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable

_PARTS = 4


class MesaCodeGenAttention(CodeGenAttention):
    """CodeGen's attention by way of Mesa attention."""

    table: RotaryTable

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[B, S, hidden]`` to the same."""
        parts = self.qkv_proj(hidden_states).unflatten(-1, (_PARTS, 3, -1, self.head_dim))
        query, value, key = (x.flatten(2, 3).transpose(1, 2) for x in parts.unbind(3))
        cos, sin = position_embeddings or self.table(hidden_states, position_ids)
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        output, _no_weights = mesa_attention(self, query, key, value)
        result: Tensor = self.out_proj(output.flatten(2))
        return result, None


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    config: Any = model.config
    table = pair_table(config.rotary_dim or config.n_embd // config.n_head, train_length)
    become(model, CodeGenAttention, MesaCodeGenAttention, table=table)
    return table
