"""RULER's needles in a haystack: one or several keys, one or several values of each, some of them asked for.

Templates and sizes are those of the paper (arXiv 2404.06654, appendices); its essays are replaced by the writer's text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from mesart.evaluation.tasks.base import Piece, Sample, Task, Writer
from mesart.evaluation.tasks.draft import Haystack, fill, hay, hide, room, sample, scatter
from mesart.evaluation.tasks.values import NUMBERS, SMALL_NUMBERS, SMALL_UUIDS, SMALL_WORDS, UUIDS, WORDS, Kind

NEEDLE: Final = " One of the special magic {noun}s for {key} is: {value}."
ONE: Final = (
    "A special magic {noun} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun} afterwards.\n",
    "\nWhat is the special magic {noun} for {keys} mentioned in the provided text? "
    "The special magic {noun} for {keys} mentioned in the provided text is",
)
SEVERAL: Final = (
    "Some special magic {noun}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun}s afterwards.\n",
    "\nWhat are all the special magic {noun}s for {keys} mentioned in the provided text? "
    "The special magic {noun}s for {keys} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Niah(Task):
    """A member of the family.

    Attributes:
        haystack: what the needles lie in; "needles": nothing but more needles, of other keys.
        keys, values: their kinds.
        needles: number of keys, where the haystack is not made of them.
        values_each: number of values of each key.
        asked: number of keys asked for.
        most_tokens: to generate, if the answer does not need more.
    """

    source: ClassVar[str] = "RULER (arXiv 2404.06654)"

    haystack: Haystack | Literal["needles"] = "text"
    keys: Kind = WORDS
    values: Kind = NUMBERS
    needles: int = 1
    values_each: int = 1
    asked: int = 1
    most_tokens: int | None = 128

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        keys, values = self.keys.draws(rng), self.values.draws(rng)
        drawn = [
            (key, list(itertools.islice(values, self.values_each))) for key in itertools.islice(keys, self.needles)
        ]
        asked = rng.sample(drawn, self.asked)
        needles = [(key, value) for key, each in drawn for value in each]
        rng.shuffle(needles)
        # Values of one key are listed as they stand in the text, keys as they are asked for.
        references = [value for name, _ in asked for key, value in needles if key == name]
        names = _enumerate([key for key, _ in asked])
        opening, closing = ONE if len(references) == 1 else SEVERAL
        introduction = writer.piece(opening.format(noun=self.values.noun))
        question = writer.piece(closing.format(noun=self.values.noun, keys=names))
        pieces = {value: self._needle(writer, key, value) for key, value in needles}
        space = room(writer, length, [introduction, *pieces.values(), question])
        if self.haystack == "needles":
            body = fill(self._more(writer, keys, values), space)
        else:
            body = hay(writer, self.haystack, space, rng)
        facts: dict[str, float | str] = {"keys": names}
        if len(references) == 1:
            facts["depth"] = depth
            needle = pieces.pop(references[0])
            body = hide(needle, scatter([*pieces.values()], body, rng), depth)
        else:
            body = scatter([*pieces.values()], body, rng)
        new_tokens = self._new_tokens(writer, " " + ", ".join(references), self.most_tokens)
        return sample(writer, [introduction], body, question, references, new_tokens, facts)

    def _needle(self, writer: Writer, key: str, value: str) -> Piece:
        return writer.piece(NEEDLE.format(noun=self.values.noun, key=key, value=value))

    def _more(self, writer: Writer, keys: Iterator[str], values: Iterator[str]) -> Iterator[Piece]:
        return (self._needle(writer, key, value) for key, value in zip(keys, values, strict=False))

    def _probes(self) -> Iterable[str]:
        return [*self.keys.probes(), *self.values.probes()]


def _enumerate(names: Sequence[str]) -> str:
    """``a``; ``a and b``; ``a, b, and c``."""
    if len(names) < 3:
        return " and ".join(names)
    return ", ".join(names[:-1]) + f", and {names[-1]}"


@dataclass(frozen=True)
class NiahSingle1(Niah):
    """A number, between sentences that say nothing."""

    name: ClassVar[str] = "niah_single_1"
    title: ClassVar[str] = "NIAH, one needle in repeated sentences"

    haystack: Haystack | Literal["needles"] = "noise"

    @classmethod
    def small(cls) -> NiahSingle1:
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, most_tokens=None)


@dataclass(frozen=True)
class NiahSingle2(Niah):
    """A number, in a text."""

    name: ClassVar[str] = "niah_single_2"
    title: ClassVar[str] = "NIAH, one needle in a text"

    @classmethod
    def small(cls) -> NiahSingle2:
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, most_tokens=None)


@dataclass(frozen=True)
class NiahSingle3(Niah):
    """A UUID, in a text."""

    name: ClassVar[str] = "niah_single_3"
    title: ClassVar[str] = "NIAH, one UUID in a text"

    values: Kind = UUIDS

    @classmethod
    def small(cls) -> NiahSingle3:
        return cls(keys=SMALL_WORDS, values=SMALL_UUIDS, most_tokens=None)


@dataclass(frozen=True)
class NiahMultikey1(Niah):
    """One of four numbers, in a text."""

    name: ClassVar[str] = "niah_multikey_1"
    title: ClassVar[str] = "NIAH, one of four needles in a text"

    needles: int = 4

    @classmethod
    def small(cls) -> NiahMultikey1:
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, most_tokens=None)


@dataclass(frozen=True)
class NiahMultikey2(Niah):
    """One of as many numbers as the prompt can hold."""

    name: ClassVar[str] = "niah_multikey_2"
    title: ClassVar[str] = "NIAH, one needle in a stack of needles"

    haystack: Haystack | Literal["needles"] = "needles"

    @classmethod
    def small(cls) -> NiahMultikey2:
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, most_tokens=None)


@dataclass(frozen=True)
class NiahMultikey3(Niah):
    """One of as many UUIDs, with UUIDs as keys, as the prompt can hold."""

    name: ClassVar[str] = "niah_multikey_3"
    title: ClassVar[str] = "NIAH, one UUID in a stack of UUIDs"

    haystack: Haystack | Literal["needles"] = "needles"
    keys: Kind = UUIDS
    values: Kind = UUIDS

    @classmethod
    def small(cls) -> NiahMultikey3:
        return cls(keys=SMALL_UUIDS, values=SMALL_UUIDS, most_tokens=None)


@dataclass(frozen=True)
class NiahMultivalue(Niah):
    """The four numbers of one key, in a text."""

    name: ClassVar[str] = "niah_multivalue"
    title: ClassVar[str] = "NIAH, all four values of one key"

    values_each: int = 4

    @classmethod
    def small(cls) -> NiahMultivalue:
        """Two values."""
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, values_each=2, most_tokens=None)


@dataclass(frozen=True)
class NiahMultiquery(Niah):
    """The numbers of four keys, all asked for at once, in a text."""

    name: ClassVar[str] = "niah_multiquery"
    title: ClassVar[str] = "NIAH, the values of four keys"

    needles: int = 4
    asked: int = 4

    @classmethod
    def small(cls) -> NiahMultiquery:
        """Two keys."""
        return cls(keys=SMALL_WORDS, values=SMALL_NUMBERS, needles=2, asked=2, most_tokens=None)
