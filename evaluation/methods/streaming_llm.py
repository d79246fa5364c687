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

from mesart.evaluation.methods.exported import Exported
from mesart.evaluation.methods.method import TOKEN, Part, arange, constant
from mesart.graphs.method.streaming_llm import StreamingLLMConfig


@dataclass(frozen=True)
class StreamingLLM(Exported[StreamingLLMConfig]):
    """See the module."""

    kind = StreamingLLMConfig
    name = StreamingLLMConfig.name

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        sinks = given.get("sinks", 4)
        return {"sinks": sinks, "window": train_length - sinks}

    def parts(self, start: int, stop: int) -> list[Part]:
        t, sinks, window = arange(start, stop), self.config.sinks, self.config.window
        edge = np.maximum(sinks, t - window + 1)
        in_cache = np.minimum(t, sinks + window - 1)
        return [
            Part(TOKEN, constant(0, t), np.minimum(t + 1, sinks), in_cache.astype(float)),
            Part(TOKEN, np.minimum(edge, t + 1), t + 1, t.astype(float)),
        ]

    def needed(self, start: int) -> tuple[int, int]:
        sinks = self.config.sinks
        return sinks, max(sinks, start - self.config.window + 1)
