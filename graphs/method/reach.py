"""What a query sees under methods that drop keys: a window, and the first tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """What a query sees where that is not all: a window, and the first tokens from a fixed distance.

    A key at index i is within the window of a query at t if ``t - max(i, floor) < window``. A first token that is not
    is seen all the same, by a query that stands at ``far``.
    """

    window: int
    sinks: int
    """The number of first tokens."""
    floor: int
    far: int
    at_zero: bool
    """Whether the first tokens then stand at 0, or at their own index."""

    @property
    def slots(self) -> int:
        """Keys that have to be kept."""
        return self.sinks + self.window
