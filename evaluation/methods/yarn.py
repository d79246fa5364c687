"""YaRN: frequencies interpolated by parts, and a temperature.

Rule: pairs of dimensions that turn more than ``fast`` times within ``T_r`` stay, those that turn less than ``slow``
times turn ``factor`` times slower, those between are mixed, linearly in the pair's index; turned queries and keys are
multiplied by ``0.1 ln(factor) + 1``. Every key is seen at its own distance.
Parameters: ``factor`` s, default the longest prompt over ``T_r``; ``fast`` 32, ``slow`` 1.
Cost: ``T (T + 1) / 2`` scores at prefill; all keys are kept.
At ``factor`` 1 it is the plain model; at any other it differs from it within ``T_r`` too, and was meant to be
fine-tuned.
Source: Peng et al. (arXiv 2309.00071), sections 3.2 and 3.4; see
:func:`~mesart.graphs.method.frequencies.yarn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesart.evaluation.methods.exported import Exported
from mesart.evaluation.methods.method import TOKEN, Part, arange, constant
from mesart.graphs.method.yarn import YarnConfig


@dataclass(frozen=True)
class YaRN(Exported[YarnConfig]):
    """See the module."""

    kind = YarnConfig
    name = YarnConfig.name
    rotary_only = YarnConfig.rotary_only

    @classmethod
    def defaults(cls, train_length: int, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"factor": max_tokens / train_length}

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        return [Part(TOKEN, constant(0, t), t + 1, t.astype(float))]
