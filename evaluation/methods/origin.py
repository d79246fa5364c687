"""Origin: the model as it is.

Rule: every query sees every key before it at its own distance, ``position = index``. It leaves the trained range at
``T_r``. Within it, equal to the plain model.
Parameters: none. Cost: ``T (T + 1) / 2`` scores at prefill; all keys are kept.
The name is the paper's (arXiv 2410.15859, section 5). On ALiBi and NoPE models this is the paper's ALiBi and NoPE.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesart.evaluation.methods.exported import Exported
from mesart.evaluation.methods.method import TOKEN, Part, arange, constant
from mesart.graphs.method.origin import OriginConfig


@dataclass(frozen=True)
class Origin(Exported[OriginConfig]):
    """See the module."""

    kind = OriginConfig
    name = OriginConfig.name

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        return [Part(TOKEN, constant(0, t), t + 1, t.astype(float))]
