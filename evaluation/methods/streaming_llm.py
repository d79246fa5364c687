"""Streaming-LLM: a few first tokens as attention sinks, and a sliding window.

Rule: a query sees the first ``sinks`` tokens and the last ``window`` tokens, itself among them. Positions are those
inside the cache: once tokens have been dropped, the sinks stand directly before the window. So distances in the window
are what they are, and a query sees sink i from position ``min(t, sinks + window - 1)``.
Parameters: ``sinks`` 4, ``window`` ``T_r - sinks``. Cost: about ``T (window + sinks)`` scores at prefill; ``T_r``
keys are kept.
Within ``T_r`` equal to the plain model.
Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, Method, Part, arange, constant
from mesart.graphs.baseline import BaselineConfig


@dataclass(frozen=True)
class StreamingLLM(Method):
    """See the module."""

    name = "streaming-llm"

    sinks: int
    window: int

    def __post_init__(self) -> None:
        self.require(sinks=0, window=1)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        sinks = given.get("sinks", 4)
        return {"sinks": sinks, "window": train_length - sinks}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        edge = np.maximum(self.sinks, t - self.window + 1)
        in_cache = np.minimum(t, self.sinks + self.window - 1)
        return [
            Part(TOKEN, constant(0, t), np.minimum(t + 1, self.sinks), in_cache.astype(float)),
            Part(TOKEN, np.minimum(edge, t + 1), t + 1, t.astype(float)),
        ]

    def needed(self, start: int) -> tuple[int, int]:
        return self.sinks, max(self.sinks, start - self.window + 1)

    def static(self) -> BaselineConfig:
        return BaselineConfig(
            self.train_length, log_n=self.log_n, method=self.name, window=self.window, first_tokens=self.sinks
        )
