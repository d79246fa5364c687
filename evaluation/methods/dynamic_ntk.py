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

from mesart.evaluation.methods.exported import Exported
from mesart.evaluation.methods.method import TOKEN, Part, arange, constant
from mesart.graphs.method.dynamic_ntk import DynamicNtkConfig


@dataclass(frozen=True)
class DynamicNTK(Exported[DynamicNtkConfig]):
    """See the module."""

    kind = DynamicNtkConfig
    name = DynamicNtkConfig.name
    rotary_only = DynamicNtkConfig.rotary_only
    turns_again = True

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        return [Part(TOKEN, constant(0, t), t + 1, t.astype(float))]
