"""What may be varied, and which values are tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from mesart.evaluation.arguments import require_whole
from mesart.evaluation.tuning.measure import spread
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig

PARAMETERS: Final = ("log_n", "linear_window", "head_length", "chunk_length", "tail_max", "rho", "stair_width")
"""What may be varied, in the order of the search: what decides most comes first."""

COST_PARAMETERS: Final = ("chunk_length", "tail_max")
"""Those that decide how long a prompt takes."""

_MULTIPLES: Final = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2)
_RHOS: Final = (0.25, 0.375, 0.5, 0.625, 0.75)


def grid(config: MesaConfig, parameter: str, longest: int) -> list[Any]:
    """Values of a parameter around a configuration. Some may not go together with the rest: that is asked of it.

    Args:
        longest: tokens of the longest prompt, which stair widths must fit.
    """
    if parameter == "log_n":
        return [True, False]
    if parameter == "rho":
        return sorted({*_RHOS, config.rho})
    if parameter == "stair_width":
        # The smallest that fits leaves no room to spare; the paper's is 50 whatever the length.
        least = replace(config, stair_width=None).fitting_width(longest)
        return [None, *sorted({50, *(math.ceil(least * share) for share in (0.5, 1, 1.5, 2, 4))})]
    if parameter == "tail_max":
        # Without a limit, the paper's rule, a tail has up to a chunk more than its least.
        base = config.chunk_length + config.tail_min if config.tail_max is None else config.tail_max
        return [*sorted({max(config.tail_min, round(base * share)) for share in _MULTIPLES}), None]
    value = getattr(config, parameter)
    found = {max(1, round(value * share)) for share in _MULTIPLES}
    if parameter == "chunk_length":
        found.add(config.train_length - config.head_length)  # the paper's
    return sorted(found)


def check_parameters(parameters: Sequence[str]) -> None:
    """Raises a :class:`MesaError` unless all can be varied."""
    for name in parameters:
        if name not in PARAMETERS:
            raise InputError(f"unknown parameter {name!r}; there are {', '.join(PARAMETERS)}")


def require_counts(searched: tuple[int, int], most: tuple[int, int]) -> None:
    """Raises a :class:`MesaError` unless so many prompts and places can be judged, and are some of the most."""
    for name, count, limit in zip(("prompts", "places"), searched, most, strict=True):
        require_whole(name, count, least=0)
        require_whole(name, limit, least=0)
        spread(count, limit)


__all__ = ["COST_PARAMETERS", "PARAMETERS", "check_parameters", "grid", "require_counts"]
