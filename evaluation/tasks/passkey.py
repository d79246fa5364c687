"""The passkey task, and a needle in a haystack: one fact, hidden at a depth of choice."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final, get_args

from mesart.evaluation.passkey import INTRODUCTION, QUESTION, Filler, minimum_length, passkey_prompt, prompt_rng
from mesart.evaluation.tasks.base import Sample, Task, TooLong, Writer
from mesart.evaluation.tasks.draft import hay, hide, room, sample
from mesart.evaluation.tasks.values import NUMBERS, SMALL_NUMBERS, Numbers
from mesart.graphs.errors import InputError

CITIES: Final = (
    *("Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito", "Dublin", "Vienna", "Lisbon", "Athens"),
    *("Madrid", "Berlin", "Prague", "Warsaw", "Nairobi", "Havana", "Bogota", "Jakarta", "Manila", "Sydney", "Boston"),
)
NEEDLE: Final = " The special magic {city} number is: {number}."
NEEDLE_QUESTION: Final = "\nWhat is the special magic {city} number? The special magic {city} number is:"
NEEDLE_INTRODUCTION: Final = "A special magic number is hidden within the following text. Make sure to memorize it.\n"

FILLERS: Final[tuple[Filler, ...]] = get_args(Filler)
"""The fillers of a passkey's prompt there are."""

MOST_PROMPTS: Final = 1_000_000
"""Prompts of a length and filler that have random numbers of their own."""

_THREE_WORDS: Final = re.compile(r"\S\s+\S+\s+\S")  # fewer, and no excerpt might hold a whole one


@dataclass(frozen=True)
class FirstNumberTask(Task):
    """A task answered by a number: the first of the answer, whole and with no digit more."""

    def score(self, sample: Sample, answer: str) -> float:
        number = re.search("[0-9]+", answer)
        return float(number is not None and number.group() == sample.references[0])


@dataclass(frozen=True)
class Passkey(FirstNumberTask):
    """A number between sentences that say nothing. The same at both scales."""

    name: ClassVar[str] = "passkey"
    title: ClassVar[str] = "Passkey, standard filler"
    source: ClassVar[str] = "Mohtashami and Jaggi 2023 (arXiv 2305.16300); prompt of arXiv 2410.15859"

    filler: Filler = "standard"
    digits: int = 5

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        least = minimum_length(writer.encode, digits=self.digits, prefix_ids=writer.prefix_ids)
        if self.filler == "random" and not _THREE_WORDS.search(writer.text):
            raise InputError(f"the filler of the task {self.name} is cut from a text: give one, of some length")
        for tried in itertools.count(least) if length is None else [length]:
            try:
                prompt = passkey_prompt(
                    writer.encode,
                    tried,
                    depth,
                    rng,
                    filler=self.filler,
                    filler_text=writer.text,
                    digits=self.digits,
                    prefix_ids=writer.prefix_ids,
                )
                break
            except ValueError:  # this key has more tokens than the one that `least` was found with
                continue
        else:
            raise TooLong
        new_tokens = self._new_tokens(writer, " " + prompt.answer, None)
        start = len(writer.prefix_ids) + len(writer.encode(INTRODUCTION))
        end = len(prompt.input_ids) - len(writer.encode(QUESTION))
        return Sample(prompt.input_ids, prompt.text, (prompt.answer,), new_tokens, (start, end), {"depth": depth})

    def _probes(self) -> Iterable[str]:
        return Numbers(self.digits).probes()


@dataclass(frozen=True)
class RandomPasskey(Passkey):
    """A number between excerpts of the writer's text."""

    name: ClassVar[str] = "passkey-random"
    title: ClassVar[str] = "Passkey, random text as filler"

    filler: Filler = "random"


@dataclass(frozen=True)
class NumberedPasskey(Passkey):
    """The passkeys of `mesart eval passkey`, of `mesart tune` and of the threshold, with either filler.

    Their random numbers are numbered as training's are, in a namespace of their own (:func:`prompt_rng`).
    """

    def prompt(self, writer: Writer, length: int, seed: int, index: int, depth: float) -> Sample:
        rng = prompt_rng("eval", seed, (length * len(FILLERS) + FILLERS.index(self.filler)) * MOST_PROMPTS + index)
        return self._first_that_fits(lambda: self._write(writer, length, rng, depth), length)


@dataclass(frozen=True)
class Needle(FirstNumberTask):
    """A city's number in an excerpt of the writer's text, at a depth of choice: the test behind depth-length grids.

    The first of its kind hid a sentence about San Francisco, always the same, and let a model judge the answer. A city
    and a number drawn anew for each prompt can be neither known nor guessed, and are scored exactly.
    """

    name: ClassVar[str] = "needle"
    title: ClassVar[str] = "Needle in a haystack"
    source: ClassVar[str] = "after Kamradt 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack)"

    numbers: Numbers = NUMBERS

    @classmethod
    def small(cls) -> Needle:
        """Numbers of 4 digits."""
        return cls(numbers=SMALL_NUMBERS)

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        city, number = rng.choice(CITIES), self.numbers.draw(rng)
        introduction = writer.piece(NEEDLE_INTRODUCTION)
        needle = writer.piece(NEEDLE.format(city=city, number=number))
        question = writer.piece(NEEDLE_QUESTION.format(city=city))
        filler = hay(writer, "text", room(writer, length, [introduction, needle, question]), rng)
        new_tokens = self._new_tokens(writer, f" {number}", None)
        facts: dict[str, float | str] = {"depth": depth, "city": city}
        return sample(writer, [introduction], hide(needle, filler, depth), question, [number], new_tokens, facts)

    def _probes(self) -> Iterable[str]:
        return [*self.numbers.probes(), *(" " + city for city in CITIES)]
