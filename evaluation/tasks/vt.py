"""RULER's variable tracking: which variables have a value, some of them through others."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from mesart.evaluation.tasks.base import Piece, Sample, Task, Writer
from mesart.evaluation.tasks.draft import hay, room, sample, scatter
from mesart.evaluation.tasks.values import FIVE_DIGITS, SMALL_NUMBERS, Numbers

INTRODUCTION: Final = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION: Final = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are:"
)
EXAMPLE_FILLER: Final = 60
"""Tokens of filler of an example."""


@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains of assignments between sentences that say nothing; asked for are all variables of one chain.

    Attributes:
        chains: of assignments. Those of a chain are in order; the chains are mixed with one another.
        hops: assignments of a chain after its first.
        letters: of a variable's name.
        numbers: what the values are.
        examples: solved ones before the task.
        most_tokens: to generate, if the answer does not need more.
    """

    name: ClassVar[str] = "vt"
    title: ClassVar[str] = "Variable tracking"
    source: ClassVar[str] = "RULER (arXiv 2404.06654)"

    chains: int = 1
    hops: int = 4
    letters: int = 5
    numbers: Numbers = FIVE_DIGITS
    examples: int = 1
    most_tokens: int | None = 30

    @classmethod
    def small(cls) -> VariableTracking:
        """Two chains of two hops; names of 3 letters, values of 4 digits; no example."""
        return cls(chains=2, hops=2, letters=3, numbers=SMALL_NUMBERS, examples=0, most_tokens=None)

    def answer(self, sample: Sample) -> str:
        return " " + " ".join(sample.references)

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        names, values = self._names(rng), self.numbers.draws(rng)
        introduction = writer.piece(INTRODUCTION)
        solved: list[Piece] = []
        for _ in range(self.examples):
            assignments, question, variables = self._problem(writer, names, values, rng)
            body = scatter(assignments, hay(writer, "noise", EXAMPLE_FILLER, rng), rng)
            solved += [introduction, *body, question, writer.piece(f" {' '.join(variables)}\n\n")]
        assignments, question, variables = self._problem(writer, names, values, rng)
        space = room(writer, length, [*solved, introduction, *assignments, question])
        body = scatter(assignments, hay(writer, "noise", space, rng), rng)
        return sample(
            writer,
            [*solved, introduction],
            body,
            question,
            variables,
            self._new_tokens(writer, f" {' '.join(variables)}", self.most_tokens),
            {},
        )

    def _names(self, rng: random.Random) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            name = "".join(rng.choices(string.ascii_uppercase, k=self.letters))
            if name not in seen:
                seen.add(name)
                yield name

    def _problem(
        self, writer: Writer, names: Iterator[str], values: Iterator[str], rng: random.Random
    ) -> tuple[list[Piece], Piece, list[str]]:
        """The assignments of all chains, mixed; the question; and the variables of the chain that it asks for."""
        chains = [list(itertools.islice(names, self.hops + 1)) for _ in range(self.chains)]
        numbers = list(itertools.islice(values, self.chains))
        stated = [
            iter([f"{number}", *(f"VAR {name}" for name in chain)])
            for number, chain in zip(numbers, chains, strict=True)
        ]
        turns = [index for index, chain in enumerate(chains) for _ in chain]
        rng.shuffle(turns)
        following = [iter(chain) for chain in chains]
        texts = [f" VAR {next(following[turn])} = {next(stated[turn])}." for turn in turns]
        asked = rng.randrange(self.chains)
        question = QUESTION.format(value=numbers[asked], count=len(chains[asked]))
        return [writer.piece(text) for text in texts], writer.piece(question), chains[asked]

    def _probes(self) -> Iterable[str]:
        names = (" " + letter * self.letters for letter in string.ascii_uppercase)
        return [*self.numbers.probes(), *names]
