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

from mesart.evaluation.methods.exported import Exported
from mesart.evaluation.methods.method import TOKEN, ZERO, Part, arange, constant
from mesart.graphs.method.lm_infinite import LMInfiniteConfig


@dataclass(frozen=True)
class LMInfinite(Exported[LMInfiniteConfig]):
    """See the module."""

    kind = LMInfiniteConfig
    name = LMInfiniteConfig.name
    views = (TOKEN, ZERO)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"window": train_length, "first_tokens": min(100, max(4, train_length // 40))}

    def parts(self, start: int, stop: int) -> list[Part]:
        t, window = arange(start, stop), self.config.window
        edge = np.maximum(0, t - window + 1)
        return [
            Part(ZERO, constant(0, t), np.minimum(edge, self.config.first_tokens), np.full(len(t), float(window))),
            Part(TOKEN, edge, t + 1, t.astype(float)),
        ]

    def needed(self, start: int) -> tuple[int, int]:
        first = self.config.first_tokens
        return first, max(first, start - self.config.window + 1)
