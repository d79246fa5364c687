"""What InfLLM keeps of one layer: which blocks of distant tokens there are, and what represents each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mesart.evaluation.methods.infllm import InfLLM


class LayerMemory:
    """The blocks of one layer. Axes: K key-value heads, H heads, Q queries, D head size.

    The heads of a group share their key, so their queries may be summed first. The mean score of a token with the
    queries that follow it is a difference of two running sums of queries.
    """

    def __init__(self, method: InfLLM) -> None:
        self._method = method
        self._blocks: list[Tensor] = []
        """The sum of each block's representative keys, float32 ``[K, D]``."""
        self._sums: Tensor | None = None
        """Sums of all queries up to each token from ``_from`` on, float64 ``[K, n, D]``."""
        self._from = 0

    def look_up(self, query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
        """Sees the queries ``start .. stop - 1``, in this order and each once; finds blocks for them.

        Args:
            query: turned to the window's length, ``[1, H, Q, D]``.
            key: those of all tokens so far at 0, ``[1, K, stop or more, D]``.

        Returns:
            Indices of the chosen blocks' tokens, int64.
        """
        method = self._method
        summed = query[0].reshape(key.shape[1], -1, *query.shape[2:]).sum(dim=1)
        sums = summed.double().cumsum(dim=1)
        if self._sums is None:
            self._sums = sums
        else:
            self._sums = torch.cat([self._sums, self._sums[:, -1:] + sums], dim=1)
        complete = method.complete(start)
        while len(self._blocks) < complete:
            self._add_block(key)
        if not complete or not method.chosen:
            return torch.zeros(0, dtype=torch.int64, device=key.device)
        relevance = (torch.stack(self._blocks) * summed.sum(dim=1).float()).sum(dim=(1, 2))
        chosen = relevance.topk(min(method.chosen, complete)).indices
        inside = torch.arange(method.block, device=key.device)
        found: Tensor = (method.first_tokens + chosen[:, None] * method.block + inside).flatten()
        return found

    def _add_block(self, key: Tensor) -> None:
        assert self._sums is not None
        method = self._method
        start = method.first_tokens + len(self._blocks) * method.block
        self._sums, self._from = self._sums[:, start - self._from :], start
        followers = self._sums[:, method.window :][:, : method.block] - self._sums[:, : method.block]
        keys = key[0, :, start : start + method.block].float()
        scores = (keys.double() * followers).sum(dim=(0, 2))
        best = scores.topk(method.representatives).indices
        self._blocks.append(keys[:, best].sum(dim=1))
