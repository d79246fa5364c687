"""Checks of single numbers that a user gives, and the largest that are taken."""

from __future__ import annotations

from typing import Any, Final

from mesart.graphs.errors import InputError

MOST_POSITIONS: Final = 1 << 21
"""Rows of a position table, at most: one of 2 million takes 2 GB where 128 dimensions rotate."""

MOST_TOKENS: Final = 1 << 30
"""The longest text that may be asked for."""


def check_whole(name: str, value: Any, least: int, most: int = MOST_TOKENS) -> None:
    """Refuses a field that is no whole number, or outside of a range.

    Raises:
        MesaError: it is that.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {value!r:.40}; it must be a whole number")
    if value < least:
        raise InputError(f"{name} is {value!s:.40}; it must be at least {least}")
    if value > most:
        raise InputError(f"{name} is {value!s:.40}; it must be at most {most}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuses a field that is no finite number, or outside of a range.

    Raises:
        MesaError: it is that.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:  # NaN neither
        raise InputError(f"{name} is {value!r:.40}; it must be a number from {least} to {most}")


def check_flag(name: str, value: Any) -> None:
    """Refuses a field that is neither true nor false.

    Raises:
        MesaError: it is that.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be true or false")


def check_train_length(value: Any) -> None:
    """Refuses a trained length that is no whole number, too short to be cut, or too long for a position table.

    Raises:
        MesaError: it is that.
    """
    check_whole("train_length", value, least=1)
    if value < 16:
        raise InputError(f"train_length is {value}; a window of at least 16 tokens is needed")
    if value > MOST_POSITIONS:
        raise InputError(
            f"train_length is {value}, more than the {MOST_POSITIONS} positions that a bundle can "
            "hold; give the length that the model was trained on (--train-length)"
        )


__all__ = ["MOST_POSITIONS", "MOST_TOKENS", "check_flag", "check_number", "check_train_length", "check_whole"]
