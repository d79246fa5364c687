"""Dynamic-NTK: the rotary base grows with the text.

Rule: of a text of n tokens, ``base' = base * (s n / T_r - (s - 1)) ** (R / (R - 2))`` for R turning dimensions,
unchanged up to ``T_r``; every key is seen at its own distance. In a prefill n is the whole prompt; each generated
token turns all keys again with the base of then, for which the cache keeps them unturned.
Parameters: ``factor`` s, default 2. Cost: ``T (T + 1) / 2`` scores at prefill; all keys are kept, and turned at every
step.
Within ``T_r`` equal to the plain model.
Source: arXiv 2410.15859, section 5; "NTK-aware" and "dynamic" scaling as in YaRN (arXiv 2309.00071), sections 3.1 and
3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesart.evaluation.methods.method import TOKEN, Method, Part, Positions, arange, constant
from mesart.graphs.baseline import BaselineConfig
from mesart.graphs.frequencies import dynamic_ntk


@dataclass(frozen=True)
class DynamicNTK(Method):
    """See the module."""

    name = "dynamic-ntk"
    rotary_only = True
    turns_again = True

    factor: float = 2.0

    def __post_init__(self) -> None:
        self.require(factor=1)

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        return [Part(TOKEN, constant(0, t), t + 1, t.astype(float))]

    def turn(self, frequencies: Positions, tokens: int) -> tuple[Positions, float]:
        if tokens <= self.train_length:
            return frequencies, 1.0
        return dynamic_ntk(frequencies, self.factor * tokens / self.train_length - (self.factor - 1)), 1.0

    def static(self) -> BaselineConfig:
        return BaselineConfig(self.train_length, log_n=self.log_n, method=self.name, factor=self.factor)
