"""YaRN: frequencies interpolated by parts, and a temperature.

Rule: pairs of dimensions that turn more than ``fast`` times within ``T_r`` stay, those that turn less than ``slow``
times turn ``factor`` times slower, those between are mixed, linearly in the pair's index; turned queries and keys are
multiplied by ``0.1 ln(factor) + 1``. Every key is seen at its own distance.
Parameters: ``factor`` s, default the longest prompt over ``T_r``; ``fast`` 32, ``slow`` 1.
Cost: ``T (T + 1) / 2`` scores at prefill; all keys are kept.
At ``factor`` 1 it is the plain model; at any other it differs from it within ``T_r`` too, and was meant to be
fine-tuned.
Source: Peng et al. (arXiv 2309.00071), sections 3.2 (NTK-by-parts) and 3.4; the ramp over the index, with its ends
rounded to whole pairs, is that of the authors' and transformers' code (the paper's text has it over the number of
turns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import TOKEN, Method, Part, Positions, arange, constant


@dataclass(frozen=True)
class YaRN(Method):
    """See the module."""

    name = "yarn"
    exportable = True
    rotary_only = True

    factor: float
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        self.require(factor=1, slow=0.01, fast=self.slow)

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"factor": max_tokens / train_length}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        return [Part(TOKEN, constant(0, t), t + 1, t.astype(float))]

    def turn(self, frequencies: Positions, tokens: int) -> tuple[Positions, float]:
        pairs = len(frequencies)
        low = max(math.floor(self._pair(frequencies, self.fast)), 0)
        high = min(math.ceil(self._pair(frequencies, self.slow)), 2 * pairs - 1)
        slowed = ((np.arange(pairs) - low) / max(high - low, 0.001)).clip(0, 1)
        return frequencies * (slowed / self.factor + 1 - slowed), 0.1 * math.log(self.factor) + 1

    def _pair(self, frequencies: Positions, turns: float) -> float:
        """The index, not whole, of the pair that turns so often within T_r; from the ratio of the first two."""
        first = abs(frequencies[0])
        ratio = first / abs(frequencies[1]) if len(frequencies) > 1 else math.e
        return math.log(self.train_length * first / (2 * math.pi * turns)) / math.log(ratio)
