"""MPT: ALiBi, and one projection for queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from mesart.graphs.model.adapters import become
from mesart.graphs.model.attention import mesa_attention
from mesart.graphs.model.rotary import RotaryTable


class MesaMptAttention(MptAttention):
    """MPT's attention by way of Mesa attention."""

    slopes: list[float]

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """``[B, S, hidden]`` to the same."""
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=-1))
        output, _no_weights = mesa_attention(
            self, query, key, value, scaling=self.softmax_scale, alibi_slopes=self.slopes
        )
        result: Tensor = self.out_proj(output.flatten(2))
        return result, None


def install(model: nn.Module, train_length: int) -> RotaryTable:
    """See :mod:`mesart.graphs.model.adapters`."""
    del train_length
    config: Any = model.config
    # transformers' bias of positions -1 and 0, which is 0: the slope is what lies between.
    bias: Tensor = build_mpt_alibi_tensor(config.n_heads, 2)  # type: ignore[no-untyped-call]
    slopes = (-bias[:, 0, 0]).tolist()
    become(model, MptAttention, MesaMptAttention, slopes=slopes)
    return RotaryTable({})
