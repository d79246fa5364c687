"""Fused attention that also gives the log-sum-exp of its scores, and the merging of parts of the keys by it.

Axes: K key-value heads, R rows (the queries of the heads of a group one after the other), N keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_aten = torch.ops.aten
_WIDEST_FLASH = 256


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention on the fused kernel of the device, or by plain mathematics where there is none.

    Args:
        query: ``[1, K, R, D]``.
        key: ``[1, K, N, D]``; it may be a strided slice.
        value: ``[1, K, N, Dv]``.
        bias: added to the scores, ``[1, 1 or K, R, N]`` in the queries' dtype; finite.
        scale: multiplies the scores.
        softcap: scores are bent to stay within it; no fused kernel does that.

    Returns:
        The result ``[1, K, R, Dv]``, and the log-sum-exp of the rows' scores, float32 ``[1, K, R]``.
    """
    if softcap is not None or query.device.type not in ("cpu", "cuda"):
        return _plain(query, key, value, bias, scale, softcap)
    rows, size, value_size = query.shape[2], query.shape[-1], value.shape[-1]
    width = max(size, value_size)
    if query.device.type == "cuda":
        width = -(-width // 8) * 8  # what its kernels want
    # Zeros more in queries and keys add nothing to the scores; in values, columns that are cut off again.
    query, key, value = (
        x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)
    )
    if query.device.type == "cpu":
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    elif bias is None and query.dtype != torch.float32 and width <= _WIDEST_FLASH:
        output, lse = _aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    else:
        bias = None if bias is None else _aligned(bias).expand(1, query.shape[1], -1, -1)
        output, lse = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)[:2]
    return output[..., :value_size], lse[..., :rows].float()


def _aligned(bias: Tensor) -> Tensor:
    """The same numbers with rows that start at multiples of 16 elements, which CUDA's kernel reads."""
    keys = bias.shape[-1]
    return nn.functional.pad(bias, (0, -keys % 16))[..., :keys]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse


class Merged:
    """Attention over the union of disjoint sets of keys, from attention over each."""

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, output: Tensor, lse: Tensor) -> None:
        """``[..., R, Dv]`` and float32 ``[..., R]``; -inf, or far below any score, for a row that saw no key."""
        if self.output is None or self.lse is None:
            self.output, self.lse = output, lse
            return
        # Finite even for a row that has seen nothing yet, whose output then counts nothing.
        total = torch.logaddexp(self.lse, lse).clamp_min(torch.finfo(torch.float32).min)
        before, now = (self.lse - total).exp().unsqueeze(-1), (lse - total).exp().unsqueeze(-1)
        self.output, self.lse = self.output.float() * before + output.float() * now, total

    def result(self, dtype: torch.dtype, sinks: Tensor | None = None) -> Tensor:
        """``[..., R, Dv]``. ``sinks``: one more score a row, for a key without value, float32 ``[..., R]``."""
        assert self.output is not None
        assert self.lse is not None
        if sinks is None:
            return self.output.to(dtype)
        share = (self.lse - torch.logaddexp(self.lse, sinks)).exp().unsqueeze(-1)
        return (self.output.float() * share).to(dtype)
