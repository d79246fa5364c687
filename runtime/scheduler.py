"""Who waits, who runs, and how much of a prompt is read at a time. No arrays, no clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_LEAST = 16
"""Tokens of a prompt that are read at a time, however slow the machine is."""


class Scheduler(Generic[T]):
    """Turns that wait and turns that run, in the order in which they came.

    Each step takes every text that decodes, and as many tokens of prompts as keep it within ``pause``.

    Args:
        most: tokens of prompts in a step where no text decodes.
        pause: seconds that a decoding text may wait for its next token because of others' prompts.
    """

    def __init__(self, most: int = 1024, pause: float = 0.2) -> None:
        self.most, self.pause = most, pause
        self.waiting: deque[T] = deque()
        self.running: list[T] = []
        self._seconds_a_token = 0.0
        self._seconds_of_decoding = 0.0

    def add(self, turn: T) -> None:
        self.waiting.append(turn)

    def admit(self, fits: Callable[[T], bool]) -> Iterator[T]:
        """Turns that may begin now: none overtakes one that does not fit yet."""
        while self.waiting and fits(self.waiting[0]):
            turn = self.waiting.popleft()
            self.running.append(turn)
            yield turn

    def remove(self, turn: T) -> None:
        """A turn has ended, whether it ran or not."""
        if turn in self.running:
            self.running.remove(turn)
        elif turn in self.waiting:
            self.waiting.remove(turn)

    def pass_turn(self, turn: T) -> None:
        """Lets all others that run go first, next time."""
        if turn in self.running:
            self.running.remove(turn)
            self.running.append(turn)

    def budget(self, decoding: int) -> int:
        """Tokens of prompts for a step beside ``decoding`` texts that wait for their next token."""
        if not decoding:
            return self.most
        if not self._seconds_a_token:
            return _LEAST  # nothing is known yet
        left = max(0.0, self.pause - self._seconds_of_decoding)
        return max(_LEAST, min(self.most, int(left / self._seconds_a_token)))

    def observe(self, seconds: float, read: int, decoded: int) -> None:
        """How long a step took that read so many tokens of prompts, and decoded so many texts."""
        if not read:
            self._seconds_of_decoding = seconds
            return
        spent = max(0.0, seconds - (self._seconds_of_decoding if decoded else 0.0))
        measured = spent / read
        # A token costs more behind a longer text, so the last step says most about the next.
        self._seconds_a_token = (self._seconds_a_token + 3 * measured) / 4 if self._seconds_a_token else measured


__all__ = ["Scheduler"]
