"""Star Attention: blocks that see an anchor block and themselves; then the query sees everything.

Rule: the context is cut into blocks; the tokens of a block see the first block (the anchor) and, causally, their own.
The query, the last tokens of the prompt, and all generated tokens see everything. All stand at their own index.
The paper prefixes each block with a copy of the anchor and throws the copy's keys away; they are those of the first
block, so one copy serves. Its hosts each attend to their own blocks and merge by log-sum-exp: here, one attention.
Parameters: ``block`` b, default a quarter of the longest prompt, at least of ``T_r`` (the paper's 32k blocks at 128k);
``query`` q, the tokens of the query, default ``T_r / 16``, at least 8: the method takes it as given, a prompt does
not say.
Cost: about ``3/2 T b`` scores for the context and ``q T`` for the query at prefill; all keys are kept.
It needs a model trained on the whole length: positions are real. Equal to the plain model up to ``b + q`` tokens.
Source: Acharya et al. (arXiv 2411.17116), phases 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, Method, Part, Positions, Rule, Span, arange, constant, cut


class StarRule(Rule):
    """Star Attention on one prompt, and on what is generated behind it."""

    def __init__(self, method: StarAttention, tokens: int) -> None:
        self._method = method
        self._context = max(0, tokens - method.query)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Span]:
        yield from cut(start, min(self._context, stop), size, 0, self._method.block)
        yield from cut(max(start, self._context), stop, size)

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        zero, position = constant(0, t), t.astype(float)
        if start >= self._context:
            return [Part(TOKEN, zero, t + 1, position)]
        own = t - t % self._method.block
        return [
            Part(TOKEN, zero, np.minimum(own, self._method.block), position),
            Part(TOKEN, own, t + 1, position),
        ]

    def query_scales(self, start: int, stop: int) -> Positions | None:
        return self._method.query_scales(start, stop)


@dataclass(frozen=True)
class StarAttention(Method):
    """See the module."""

    name = "star-attention"

    block: int
    query: int

    def __post_init__(self) -> None:
        self.require(block=1, query=1)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"block": -(-max_tokens // 4), "query": max(8, train_length // 16)}

    def for_prompt(self, tokens: int) -> StarRule:
        return StarRule(self, tokens)

    def logits_of(self, tokens: int) -> int:
        return tokens if tokens <= self.block + self.query else self.query
