"""Leaky-ReRoPE: relative positions that grow more slowly beyond a window.

Rule: relative position ``d`` if ``d < w``, else ``w + (d - w) / k``. Two parts: keys less than ``w`` away at their own
distance; all others at ``i / k``, seen from ``w + (t - w) / k``.
Parameters: ``window`` w, default ``min(512, T_r / 2)`` as ReRoPE's; ``slowdown`` k, default the least whole number
that keeps the longest prompt's positions below ``T_r``.
Cost: ``T (T + 1) / 2`` scores at prefill (implementations that compute both maps in full: twice that); all keys are
kept, in two views.
Within ``T_r`` it equals the plain model only up to ``w + 1`` tokens.
Source: arXiv 2410.15859, section 5; defined by J. Su, "Rectified Rotary Position Embeddings" (2023, ReRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, Indices, Method, Part, Positions, arange, constant

SLOW = "slow"
"""The view of the keys at ``i / k``."""


@dataclass(frozen=True)
class LeakyReRoPE(Method):
    """See the module."""

    name = "leaky-rerope"
    rotary_only = True
    views = (TOKEN, SLOW)

    window: int
    slowdown: float

    def __post_init__(self) -> None:
        self.require(window=1, slowdown=1)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        window = given.get("window", min(512, train_length // 2))
        return {"window": window, "slowdown": slowdown(window, train_length, max_tokens)}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(0, t - self.window + 1)
        return [
            Part(SLOW, constant(0, t), edge, self.window + (t - self.window) / self.slowdown),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]

    def key_positions(self, view: str, tokens: Indices) -> Positions:
        return tokens / self.slowdown if view == SLOW else tokens.astype(float)


def slowdown(window: int, train_length: int, max_tokens: int) -> int:
    """The least whole k with ``w + (max_tokens - 1 - w) / k <= T_r - 1``."""
    return max(1, math.ceil((max_tokens - 1 - window) / max(1, train_length - 1 - window)))
