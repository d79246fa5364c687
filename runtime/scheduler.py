"""Who waits, who runs, and how much of a prompt is read at a time. No arrays, no clocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from mesart.runtime.costs import Costs, Part

T = TypeVar("T")

_FIRST_TOKENS, _FIRST_PAST = 16, 2048
_FIRST_KEYS = 256
"""What is tried where nobody knows how long it takes: so many tokens behind up to so many, fewer behind more; keys."""

_LEAST_KEYS, _MOST_KEYS = 32, 4096
"""Fewer or more at a time gain nothing."""

_SHARE = 4
"""At least the time that decoding takes, divided by this, is for prompts, however many texts decode."""

_EVERY = 32
"""Steps after which one leaves prompts alone: what decoding takes by itself changes as texts grow."""


class Budget:
    """What a step may do besides decoding. It is spent as work is taken from it; the first piece is always granted.

    Args:
        tokens: of prompts, at most.
        seconds: that they may take; infinite where no text waits for its next token.
    """

    def __init__(self, costs: Costs, tokens: int, seconds: float) -> None:
        self._costs, self._tokens, self._seconds = costs, tokens, seconds
        self._is_whole = tokens > 0

    @property
    def is_spent(self) -> bool:
        """Whether there is time for nothing more."""
        return not self._is_whole and (self._tokens <= 0 or self._seconds <= 0)

    def tokens(self, past: int) -> int:
        """Tokens that there is time for behind so many others."""
        least = 1 if self._is_whole else 0
        if math.isinf(self._seconds):
            return max(least, self._tokens)
        cost = self._costs.token(past)
        count = int(self._seconds / cost) if cost else _FIRST_TOKENS * _FIRST_PAST // max(past, _FIRST_PAST)
        # Engines prepare each number of tokens once, which takes as long as some tokens: so there are few numbers.
        return max(least, min(self._tokens, count if count < _FIRST_TOKENS else count // 8 * 8))

    def take(self, most: int, past: int) -> int:
        """Spends up to ``most`` tokens behind ``past`` others; how many it is, if there is time for one."""
        count = min(most, self.tokens(past))
        self.spend(count, past)
        return count

    def spend(self, tokens: int, past: int) -> None:
        """For a part that has to be whole."""
        self._is_whole = False
        self._tokens -= tokens
        cost = self._costs.token(past)
        left = self._seconds - tokens * cost
        self._seconds = left if left > cost else 0.0  # in which also nothing is known

    def take_keys(self) -> int:
        """Keys to rotate; where a text waits, that is then all there is time for."""
        if math.isinf(self._seconds):
            return _MOST_KEYS
        seconds, self._seconds, self._is_whole = self._seconds, 0.0, False
        count = int(seconds / self._costs.key) if self._costs.key else _FIRST_KEYS
        return min(max(_LEAST_KEYS, count), _MOST_KEYS)


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
        self.costs = Costs()
        self._decoding = 0.0  # seconds of it alone
        self._steps = 0  # since that was measured

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

    def budget(self, decoding: int) -> Budget:
        """For a step beside ``decoding`` texts that wait for their next token."""
        if not decoding:
            return Budget(self.costs, self.most, math.inf)
        if self._steps >= _EVERY:
            return Budget(self.costs, 0, 0.0)
        left = max(self.pause - self._decoding, self._decoding / _SHARE)
        return Budget(self.costs, self.most, left)

    def observe(self, seconds: float, read: Sequence[Part], decoded: int) -> None:
        """How long a step took that read such parts of prompts, and decoded so many texts."""
        if not read:
            self._decoding, self._steps = seconds, 0
            return
        if decoded:
            self._steps += 1
            if seconds <= self._decoding:  # which something has disturbed then
                self._decoding = seconds
                return
            seconds -= self._decoding
        self.costs.observe(seconds, read)


__all__ = ["Budget", "Scheduler"]
