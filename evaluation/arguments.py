"""Checks of the numbers that evaluations are asked for, each before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from mesart.graphs.errors import InputError

MOST: Final = 2**31 - 1
"""Of anything that is counted: more never ends, and does not fit everywhere."""


def require_whole(name: str, value: object, least: int = 1, most: int | None = MOST) -> None:
    """Raises a :class:`MesaError` unless ``value`` is a whole number in ``least .. most``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"at least {least:,}" if most in (None, MOST) else f"{least:,} to {most:,}"
        raise InputError(f"the number of {name} is {_short(value)}; it must be a whole number, {allowed}")


def require_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raises a :class:`MesaError` unless ``value`` is a finite number in ``least .. most`` and more than ``above``."""
    number = isinstance(value, int | float | np.number) and math.isfinite(value)
    if not number or value < least or value <= above or value > most:  # type: ignore[operator]
        bounds = ["a finite number"]
        bounds += [f"at least {least:g}"] if least > -math.inf else []
        bounds += [f"above {above:g}"] if above > -math.inf else []
        bounds += [f"at most {most:g}"] if most < math.inf else []
        raise InputError(f"{name} is {_short(value)}; it must be {', '.join(bounds)}")


def require_seed(seed: object) -> None:
    """Raises a :class:`MesaError` unless ``seed`` is a whole number that is not negative, however large."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"the seed is {_short(seed)}; it must be a whole number, 0 or more")


def require_lengths(lengths: Sequence[object] | None) -> None:
    """Raises a :class:`MesaError` unless each of ``lengths``, and at least one, is a number of tokens; None will do."""
    if lengths is None:
        return
    if len(lengths) == 0:
        raise InputError("name a length")
    for length in lengths:
        require_whole("tokens of a length", length)


def require_device(name: str) -> None:
    """Raises a :class:`MesaError` unless PyTorch can compute on the device ``name``, such as ``cuda``."""
    import torch  # noqa: PLC0415  (only where it is asked for)

    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # each kind of device has errors of its own, assertions among them
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise InputError(f"PyTorch has no device {_short(name)} here: {reason}") from error


def _short(value: object) -> str:
    try:
        text = str(value) if isinstance(value, int | float | np.number) else repr(value)
    except ValueError:  # an integer of thousands of digits
        return "too large"
    return text if len(text) <= 40 else f"{text[:30]}..."


__all__ = ["MOST", "require_device", "require_lengths", "require_number", "require_seed", "require_whole"]
