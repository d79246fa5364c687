"""What a query sees under methods that drop keys: a sliding window, and the first tokens as attention sinks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SinkWindow:
    """A window of keys, and the first tokens, which are seen from anywhere, at a fixed distance.

    A key at position i is within the window of a query at t if ``t - max(i, min_position) < window``. A query sees a
    sink that is outside of its window as if it were itself at ``query_position``.
    """

    window: int
    """The number of last tokens that a query sees, itself among them."""
    sinks: int
    """The number of first tokens that every query sees."""
    min_position: int
    """Keys before this position count as if they were there: they stay in the window longer."""
    query_position: int
    """The position of a query when it looks at sinks outside of its window."""
    sinks_at_zero: bool
    """Whether such sinks are at position 0, all of them; else each is at its own."""

    @property
    def slots(self) -> int:
        """Keys that have to be kept."""
        return self.sinks + self.window
