"""What a task is: prompts of an exact number of tokens, written from random numbers, and a score for an answer.

Prompts are put together from pieces of text that are encoded one by one, because the asked length is a number of
tokens: it is the ids that count. Nothing here needs torch, a download or a data set.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple

from mesart.graphs.errors import InputError

_ATTEMPTS: Final = 1000
"""Draws of a prompt; the first nearly always fits, as `Task.minimum_length` is the longest of several draws."""


class Piece(NamedTuple):
    """A stretch of text and its token ids."""

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Writer:
    """What turns text into prompts of one tokenizer.

    Attributes:
        encode: text to token ids, without special tokens. Tasks encode the same short pieces again and again: a cache
            around it pays.
        prefix_ids: special tokens that texts begin with; prompts do too.
        text: the haystack of the tasks that hide something in a text.
    """

    encode: Callable[[str], list[int]]
    prefix_ids: tuple[int, ...] = ()
    text: str = ""

    def piece(self, text: str) -> Piece:
        return Piece(text, self.encode(text))


@dataclass(frozen=True)
class Sample:
    """A prompt and what answers it.

    Attributes:
        input_ids: the prompt, `Writer.prefix_ids` included; the answer follows it.
        text: the same without the special tokens.
        references: what the answer must hold.
        new_tokens: tokens to generate, greedily.
        body: half-open span of `input_ids` between the instructions and the question.
        facts: what reports may group by. "depth": see `Task.sample`; what was hidden lies as near to it as can be.
    """

    input_ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]
    new_tokens: int
    body: tuple[int, int]
    facts: Mapping[str, float | str] = field(default_factory=dict)


class TooLong(Exception):
    """A draw came out longer than the prompt may be: draw again."""


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt. Its fields are the sizes that it may be had in; their defaults are the source's."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]

    @classmethod
    def small(cls) -> Task:
        """The task in sizes for windows of a few hundred tokens."""
        return cls()

    def minimum_length(self, writer: Writer) -> int:
        """The fewest tokens that `sample` takes.

        Raises:
            MesaError: the tokenizer cannot write the task, or the task needs a text and the writer has none.
        """
        return _minimum_length(self, writer)

    def sample(self, writer: Writer, length: int, rng: random.Random, *, depth: float | None = None) -> Sample:
        """A prompt of `length` tokens, or as few below it as the lengths of what it is filled with allow: a few where
        that is words, less than one more line or pair where it is those.

        Args:
            writer: the tokenizer and the text.
            length: tokens asked for, special tokens included.
            rng: all that is random comes from it: see `mesart.evaluation.passkey.prompt_rng`.
            depth: share of the filler, 0 to 1, before what is asked for; random if left out. It matters to tasks that
                ask for one thing that stands in one place. Their samples, and no others, have it in their facts.

        Raises:
            MesaError: the length is below `minimum_length`, the depth is outside 0 to 1, or as there.
        """
        if depth is not None and not 0 <= depth <= 1:
            raise InputError(f"a depth is a share between 0 and 1, not {depth:g}")
        least = self.minimum_length(writer)
        if length < least:
            raise InputError(
                f"a {self.name} prompt of {length} tokens is too short: with this tokenizer it takes at least {least}"
            )

        def draw() -> Sample:
            drawn = rng.random()  # also if it is not needed, so that all else is the same at every depth
            return self._write(writer, length, rng, drawn if depth is None else depth)

        return self._first_that_fits(draw, length)

    def prompt(self, writer: Writer, length: int, seed: int, index: int, depth: float) -> Sample:
        """The prompt of a number: it depends on task, seed, length, number and depth only. Raises as :meth:`sample`."""
        return self.sample(writer, length, random.Random(f"eval-{self.name}-{seed}-{length}-{index}"), depth=depth)

    def score(self, sample: Sample, answer: str) -> float:
        """The share of the references that stand in the answer, in whatever case (RULER's metric), 0 to 1."""
        said = answer.lower()
        return sum(reference.lower() in said for reference in sample.references) / len(sample.references)

    def answer(self, sample: Sample) -> str:
        """A right answer, in the form that the prompt leads to."""
        return " " + ", ".join(sample.references)

    @abstractmethod
    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        """One draw: of `length` tokens, or without any filling if it is None. Raises `TooLong` if it cannot be."""

    @abstractmethod
    def _probes(self) -> Iterable[str]:
        """Texts that a tokenizer must tell from one another, or questions or answers would be lost in it."""

    def _first_that_fits(self, draw: Callable[[], Sample], length: int) -> Sample:
        for _ in range(_ATTEMPTS):
            try:
                return draw()
            except TooLong:
                continue
        raise InputError(f"no {self.name} prompt came out as short as {length} tokens; ask for more")

    def _new_tokens(self, writer: Writer, answer: str, most: int | None) -> int:
        """As many tokens as the answer has, and one, so that it can be seen to end; `most`, the source's, if more."""
        return max(most or 0, len(writer.encode(answer)) + 1)


@lru_cache(1024)
def _minimum_length(task: Task, writer: Writer) -> int:
    """The longest of a few draws without filling: whoever draws often enough then finds one that fits."""
    written: dict[tuple[int, ...], str] = {}
    for probe in task._probes():
        ids = tuple(writer.encode(probe))
        if not ids or written.setdefault(ids, probe) != probe:
            lost = f"{probe!r} has no tokens" if not ids else f"{written[ids]!r} and {probe!r} have the same tokens"
            raise InputError(f"this tokenizer cannot write the task {task.name}: {lost}")
    return max(len(task._write(writer, None, random.Random(f"minimum-{seed}"), 0.5).input_ids) for seed in range(8))
