"""LM-Infinite: a mask shaped like a lambda, and a ceiling for distances.

Rule: a query sees the first ``first_tokens`` tokens and the last ``window`` tokens, itself among them; distances beyond
``window`` count as ``window``.
Parameters: ``window``, default ``T_r``; ``first_tokens`` g, default ``T_r / 40`` between 4 and 100: the paper's 10 to
100, 100 at 4k.
Cost: about ``T (T_r + g)`` scores at prefill; ``T_r + g`` keys are kept.
Within ``T_r`` equal to the plain model.
Source: Han et al. (arXiv 2308.16137), its mask and its distance limit; arXiv 2410.15859, section 5. The paper's
optional re-introduction of a few middle tokens in higher layers is left out, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, ZERO, Method, Part, arange, constant
from mesart.graphs.baseline import BaselineConfig


@dataclass(frozen=True)
class LMInfinite(Method):
    """See the module."""

    name = "lm-infinite"
    views = (TOKEN, ZERO)

    window: int
    first_tokens: int

    def __post_init__(self) -> None:
        self.require(window=1, first_tokens=0)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"window": train_length, "first_tokens": min(100, max(4, train_length // 40))}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(0, t - self.window + 1)
        return [
            Part(ZERO, constant(0, t), np.minimum(edge, self.first_tokens), np.full(len(t), float(self.window))),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]

    def needed(self, start: int) -> tuple[int, int]:
        return self.first_tokens, max(self.first_tokens, start - self.window + 1)

    def static(self) -> BaselineConfig:
        return BaselineConfig(
            self.train_length, log_n=self.log_n, method=self.name, window=self.window, first_tokens=self.first_tokens
        )
