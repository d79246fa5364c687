"""What keys and values are: numbers, words or UUIDs, in sizes of choice."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from mesart.evaluation.tasks.words import ADJECTIVES, NOUNS
from mesart.graphs.errors import InputError

_ATTEMPTS: Final = 1000
"""Draws of something new, of which all may be taken already."""


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of key or value."""

    noun: ClassVar[str]
    """What one is called."""

    @abstractmethod
    def draw(self, rng: random.Random) -> str: ...

    @abstractmethod
    def probes(self) -> Iterator[str]:
        """Texts that a tokenizer must tell from one another."""

    def draws(self, rng: random.Random) -> Iterator[str]:
        """Ones that are all different.

        Raises:
            MesaError: there are hardly any left.
        """
        seen: set[str] = set()
        while True:
            for _ in range(_ATTEMPTS):
                new = self.draw(rng)
                if new not in seen:
                    break
            else:
                raise InputError(f"the prompt needs more than {len(seen)} different {self.noun}s of this size")
            seen.add(new)
            yield new


@dataclass(frozen=True)
class Numbers(Kind):
    """Numbers of so many digits, the first not 0."""

    noun: ClassVar[str] = "number"
    digits: int = 7

    def draw(self, rng: random.Random) -> str:
        return str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))

    def probes(self) -> Iterator[str]:
        return (" " + digit * self.digits for digit in "0123456789")


@dataclass(frozen=True)
class Words(Kind):
    """An adjective and a noun, joined by a hyphen: of all, or of the first so many of each, which are short."""

    noun: ClassVar[str] = "word"
    pool: int | None = None

    def draw(self, rng: random.Random) -> str:
        return f"{rng.choice(ADJECTIVES[: self.pool])}-{rng.choice(NOUNS[: self.pool])}"

    def probes(self) -> Iterator[str]:
        return (" " + word for word in (*ADJECTIVES[: self.pool], *NOUNS[: self.pool]))


@dataclass(frozen=True)
class Uuids(Kind):
    """Groups of so many hexadecimal digits, joined by hyphens: like UUIDs of version 4, but random throughout."""

    noun: ClassVar[str] = "uuid"
    groups: tuple[int, ...] = (8, 4, 4, 4, 12)

    def draw(self, rng: random.Random) -> str:
        return "-".join("".join(rng.choices("0123456789abcdef", k=size)) for size in self.groups)

    def probes(self) -> Iterator[str]:
        return (" " + "-".join(digit * size for size in self.groups) for digit in "0123456789abcdef")


NUMBERS: Final = Numbers(7)
WORDS: Final = Words()
UUIDS: Final = Uuids()
"""RULER's sizes."""

FIVE_DIGITS: Final = Numbers(5)

SMALL_NUMBERS: Final = Numbers(4)
SMALL_WORDS: Final = Words(32)
SMALL_UUIDS: Final = Uuids((8,))
"""What small tasks use."""
