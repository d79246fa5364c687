"""SelfExtend: positions of distant tokens in groups.

Rule: relative position ``d`` if ``d < w``, else ``w - w // G + t // G - i // G``. Two parts: keys less than ``w``
away at their own distance; all others at ``i // G``, seen from ``w - w // G + t // G``.
Parameters: ``window`` w, default ``T_r / 4`` (1,024 for the paper's 4k models); ``group`` G, default the least that
keeps the longest prompt's positions below ``T_r``.
Cost: ``T (T + 1) / 2`` scores at prefill (the authors' code computes both maps in full: twice that); all keys are kept,
in two views.
Within ``T_r`` it equals the plain model only up to ``w + 1`` tokens.
Source: Jin et al. (arXiv 2401.01325), its grouped and neighbour attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, Indices, Method, Part, Positions, arange, constant

GROUPED = "grouped"
"""The view of the keys at ``i // G``."""


@dataclass(frozen=True)
class SelfExtend(Method):
    """See the module."""

    name = "self-extend"
    rotary_only = True
    views = (TOKEN, GROUPED)

    window: int
    group: int

    def __post_init__(self) -> None:
        self.require(window=1, group=1)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        window = int(given.get("window", train_length // 4))
        last = max_tokens - 1
        # The farthest position is w - w // G + (L - 1) // G; it falls with G, though not at every G.
        group = next(
            (g for g in range(1, max_tokens + 1) if window - window // g + last // g < train_length), max_tokens
        )
        return {"window": window, "group": group}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(0, t - self.window + 1)
        grouped = self.window - self.window // self.group + t // self.group
        return [
            Part(GROUPED, constant(0, t), edge, grouped.astype(float)),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]

    def key_positions(self, view: str, tokens: Indices) -> Positions:
        return (tokens // self.group if view == GROUPED else tokens).astype(float)
