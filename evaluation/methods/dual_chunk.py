"""Dual Chunk Attention: keys at their place within a chunk; the query's place depends on whose chunk it looks at.

Rule, for chunks of s tokens: key i stands at ``i mod s``. Query t stands at ``t mod s`` for the keys of its own
chunk, at ``min(s + t mod s, T_r - 1)`` for those of the chunk before (so that the last ``T_r - s`` tokens keep their
distance), and at ``T_r - 1`` for all chunks before that.
Parameters: ``chunk`` s, default ``3 T_r / 4`` as in the paper. Cost: ``T (T + 1) / 2`` scores at prefill; all keys
are kept, once.
Within ``T_r`` equal to the plain model.
Source: An et al. (arXiv 2402.17463), its intra-, successive- and inter-chunk attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import Indices, Method, Part, Positions, Span, arange, constant, cut
from mesart.graphs.errors import InputError

IN_CHUNK = "in chunk"
"""The view of the keys at ``i mod s``."""


@dataclass(frozen=True)
class DualChunk(Method):
    """See the module."""

    name = "dual-chunk"
    rotary_only = True
    views = (IN_CHUNK,)

    chunk: int

    def __post_init__(self) -> None:
        self.require(chunk=1)
        if self.chunk >= self.train_length:
            raise InputError(
                f"{self.name}: chunk is {self.chunk}; it must be below train_length = {self.train_length}, to leave "
                "positions for the chunk before"
            )

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"chunk": train_length * 3 // 4}

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Span]:
        yield from cut(start, stop, size, 0, self.chunk)

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        place = t % self.chunk
        own = t - place
        before = np.maximum(0, own - self.chunk)
        last = self.train_length - 1
        return [
            Part(IN_CHUNK, constant(0, t), before, np.full(len(t), float(last))),
            Part(IN_CHUNK, before, own, np.minimum(self.chunk + place, last).astype(float)),
            Part(IN_CHUNK, own, t + 1, place.astype(float)),
        ]

    def key_positions(self, view: str, tokens: Indices) -> Positions:
        return (tokens % self.chunk).astype(float)
