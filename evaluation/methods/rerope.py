"""ReRoPE: relative positions cut off at a window.

Rule: relative position ``min(d, w)`` for a distance ``d``. Two parts: keys less than ``w`` away at their own
distance; all others at 0, seen from ``w``.
Parameters: ``window`` w, default ``min(512, T_r / 2)``: 512 as in the paper's runs, half the trained range on smaller
models.
Cost: ``T (T + 1) / 2`` scores at prefill (implementations that compute both maps in full: twice that); all keys are
kept, in two views.
Within ``T_r`` it equals the plain model only up to ``w + 1`` tokens.
Source: arXiv 2410.15859, section 5; defined by J. Su, "Rectified Rotary Position Embeddings" (2023, ReRoPE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, ZERO, Method, Part, arange, constant


@dataclass(frozen=True)
class ReRoPE(Method):
    """See the module."""

    name = "rerope"
    rotary_only = True
    views = (TOKEN, ZERO)

    window: int

    def __post_init__(self) -> None:
        self.require(window=1)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"window": min(512, train_length // 2)}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(0, t - self.window + 1)  # the first key less than w away
        return [
            Part(ZERO, constant(0, t), edge, np.full(len(t), float(self.window))),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]
