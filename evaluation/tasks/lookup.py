"""Look-ups: one of many lines (LongEval), one of many pairs of a JSON object (Lost in the Middle)."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

from mesart.evaluation.tasks.base import Piece, Sample, Task, Writer
from mesart.evaluation.tasks.draft import room, sample, size
from mesart.evaluation.tasks.values import FIVE_DIGITS, SMALL_NUMBERS, SMALL_UUIDS, SMALL_WORDS, UUIDS, WORDS, Kind

FEWEST: Final = 2
"""Lines or pairs at least, so that there is one to be taken for another."""

LINES_INTRODUCTION: Final = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
LINES_BRIEF: Final = "Below is a record of lines I want you to remember. Now the record start:\n\n"
LINE: Final = "line {key}: REGISTER_CONTENT is <{value}>\n"
LINES_QUESTION: Final = (
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.\n"
    "The <REGISTER_CONTENT> in line {key} is"
)
PAIRS_INTRODUCTION: Final = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
)
PAIR: Final = ' "{key}": "{value}"'
PAIRS_QUESTION: Final = '}}\n\nKey: "{key}"\nCorresponding value:'


@dataclass(frozen=True)
class LookUp(Task):
    """As many keys with values as the prompt can hold, one of them asked for.

    Attributes:
        keys, values: their kinds.
    """

    introduction: ClassVar[str]
    pair: ClassVar[str]
    between: ClassVar[str]
    """What stands between two pairs."""
    question: ClassVar[str]

    keys: Kind = WORDS
    values: Kind = FIVE_DIGITS

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        keys, values = self.keys.draws(rng), self.values.draws(rng)
        key, value = next(keys), next(values)
        introduction, question = writer.piece(self.introduction), writer.piece(self.question.format(key=key))
        between = writer.piece(self.between) if self.between else Piece("", ())
        asked = writer.piece(self.pair.format(key=key, value=value))
        pairs = [writer.piece(self.pair.format(key=next(keys), value=next(values))) for _ in range(FEWEST - 1)]
        space = room(writer, length, [introduction, asked, *pairs, *[between] * len(pairs), question])
        while space > 0:
            pair = writer.piece(self.pair.format(key=next(keys), value=next(values)))
            space -= size([between, pair])
            if space >= 0:
                pairs.append(pair)
        pairs.insert(round(depth * len(pairs)), asked)
        body = [piece for pair in pairs for piece in (between, pair)][1:]
        return sample(
            writer,
            [introduction],
            body,
            question,
            [value],
            self._new_tokens(writer, self._answer(value), None),
            {"depth": depth, "pairs": len(pairs)},
        )

    def answer(self, sample: Sample) -> str:
        return self._answer(*sample.references)

    def _probes(self) -> Iterable[str]:
        return [*self.keys.probes(), *self.values.probes()]

    @staticmethod
    @abstractmethod
    def _answer(value: str) -> str: ...


@dataclass(frozen=True)
class Lines(LookUp):
    """The number of one line. Scored as LongEval does: the first number of the answer must be the right one."""

    name: ClassVar[str] = "longeval-lines"
    title: ClassVar[str] = "LongEval lines"
    source: ClassVar[str] = "Li et al. 2023 (lmsys.org/blog/2023-06-29-longchat)"
    introduction: ClassVar[str] = LINES_INTRODUCTION
    pair: ClassVar[str] = LINE
    between: ClassVar[str] = ""
    question: ClassVar[str] = LINES_QUESTION

    @classmethod
    def small(cls) -> BriefLines:
        """Numbers of 4 digits and the shortest introduction."""
        return BriefLines(keys=SMALL_WORDS, values=SMALL_NUMBERS)

    def score(self, sample: Sample, answer: str) -> float:
        number = re.search("[0-9]+", answer)
        return float(number is not None and number.group() == sample.references[0])

    @staticmethod
    def _answer(value: str) -> str:
        return f" <{value}>"


@dataclass(frozen=True)
class BriefLines(Lines):
    """The same after an introduction of two sentences."""

    introduction: ClassVar[str] = LINES_BRIEF


@dataclass(frozen=True)
class Pairs(LookUp):
    """The value of one key of a JSON object."""

    name: ClassVar[str] = "kv-retrieval"
    title: ClassVar[str] = "Key-value retrieval from JSON"
    source: ClassVar[str] = "Liu et al. 2023 (arXiv 2307.03172)"
    introduction: ClassVar[str] = PAIRS_INTRODUCTION
    pair: ClassVar[str] = PAIR
    between: ClassVar[str] = ",\n"
    question: ClassVar[str] = PAIRS_QUESTION

    keys: Kind = UUIDS
    values: Kind = UUIDS

    @classmethod
    def small(cls) -> Pairs:
        return cls(keys=SMALL_UUIDS, values=SMALL_UUIDS)

    @staticmethod
    def _answer(value: str) -> str:
        return f' "{value}"'
