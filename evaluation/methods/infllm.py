"""InfLLM: a sliding window, and blocks of distant tokens that are looked up.

Rule: a query sees the last ``window`` tokens at their own distance. Tokens that have left the window are kept in
blocks of ``block`` tokens, behind the first ``first_tokens``. Queries are taken in groups of ``group``: each group
looks up the ``chosen`` blocks that are most relevant to all its queries together, over all heads, in each layer. It
sees these, the first tokens, and what has left the window but makes no whole block yet, all at distance ``window``.
The relevance of a block is the sum of the scores of the group's queries with its ``representatives`` tokens: those
with the highest mean score with the ``window`` queries that follow each. Queries stand at ``window`` and keys at 0 in
both.
Parameters, for a ``T_r`` of 8k those of the paper's setting for it, smaller in proportion: ``window`` ``T_r / 2``;
``first_tokens`` ``T_r / 64``, at least 4; ``block`` ``T_r / 64``, at least 16; ``chosen`` ``T_r / 2`` tokens' worth;
``representatives`` 4; ``group`` ``T_r / 16``.
Cost: at most ``window + group + block + first_tokens + chosen * block`` scores a query, and those of the look-up
(``representatives`` a block); all keys are kept, in two views (the paper moves blocks to the host's memory).
Equal to the plain model up to ``window + 1`` tokens. Decoding looks up for every token.
Source: Xiao et al. (arXiv 2402.04617), its context memory and its positional encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, ZERO, Method, Part, Span, arange, constant, cut
from mesart.graphs.errors import InputError


@dataclass(frozen=True)
class InfLLM(Method):
    """See the module."""

    name = "infllm"
    rotary_only = True
    views = (TOKEN, ZERO)

    window: int
    first_tokens: int
    block: int
    chosen: int
    representatives: int
    group: int

    def __post_init__(self) -> None:
        self.require(window=1, first_tokens=0, block=1, chosen=0, representatives=1, group=1)
        if self.representatives > self.block:
            raise InputError(
                f"{self.name}: a block of {self.block} tokens has no {self.representatives} representatives"
            )

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        block = int(given.get("block", max(16, train_length // 64)))
        return {
            "window": train_length // 2,
            "first_tokens": max(4, train_length // 64),
            "block": block,
            "chosen": max(1, train_length // 2 // block),
            "representatives": min(4, block),
            "group": max(1, train_length // 16),
        }

    def runs(self, start: int, stop: int, size: int) -> Iterator[Span]:
        yield from cut(start, stop, max(1, size // self.group) * self.group)  # no group across two runs

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Span]:
        yield from cut(start, stop, self.group, 0, self.group)

    def complete(self, start: int) -> int:
        """The number of whole blocks that have left the window of query ``start`` and of all behind it."""
        return max(0, start - self.window + 1 - self.first_tokens) // self.block

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(0, t - self.window + 1)
        far = np.full(len(t), float(self.window))
        zero, blocks = constant(0, t), self.complete(start)
        first = np.minimum(edge, self.first_tokens)
        pending = np.minimum(edge, self.first_tokens + blocks * self.block)
        return [
            # Looked up even where nothing can be found yet: the memory sees all queries.
            Part(ZERO, zero, constant(min(self.chosen, blocks) * self.block, t), far, looked_up=True),
            Part(ZERO, zero, first, far),
            Part(ZERO, pending, edge, far),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]

    def memory(self) -> Any:
        from mesart.evaluation.methods.infllm_memory import LayerMemory  # noqa: PLC0415  (the rules need no torch)

        return LayerMemory(self)
