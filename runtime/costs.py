"""What work has taken, and so will take: tokens of prompts, by how long the text before them is, and rotated keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Part: TypeAlias = "tuple[int, int]"
"""Tokens of a prompt that run together, and how many tokens are before them."""


class Costs:
    """Seconds of work on this machine, learnt from the steps that ran. No clocks.

    Attention looks at all that is before a token, so each doubling of that has a figure of its own. Where none is known
    yet, that of a shorter text serves, times how much longer this one is: more a token cannot take.
    """

    def __init__(self) -> None:
        self._token: dict[int, float] = {}
        self._key = 0.0

    @property
    def key(self) -> float:
        """Seconds to rotate a key; 0: not known."""
        return self._key

    def token(self, past: int) -> float:
        """Seconds that a token behind ``past`` others takes; 0: nothing is known."""
        size = past.bit_length()
        known = self._token.get(size)
        if known is not None:
            return known
        return min((seconds * 2.0 ** max(0, size - x) for x, seconds in self._token.items()), default=0.0)

    def observe(self, seconds: float, parts: Sequence[Part]) -> None:
        """Parts of prompts took so long together."""
        expected = [self.token(past) or 1.0 for _, past in parts]
        ratio = seconds / sum(count * cost for (count, _), cost in zip(parts, expected, strict=True))
        measured = {past.bit_length(): cost * ratio for (_, past), cost in zip(parts, expected, strict=True)}
        for size, cost in measured.items():
            self._token[size] = _mean(self._token.get(size, 0.0), cost)

    def observe_rotation(self, seconds: float, keys: int) -> None:
        """Rotating so many keys took so long."""
        self._key = _mean(self._key, seconds / keys)


def _mean(before: float, measured: float) -> float:
    """The last says most about the next: a machine has other work at times."""
    return (before + 3 * measured) / 4 if before else measured


__all__ = ["Costs", "Part"]
