"""RULER's aggregation tasks: the common words of a list, the frequent words of a coded text."""

from __future__ import annotations

import bisect
import itertools
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final

from mesart.evaluation.tasks.base import Piece, Sample, Task, Writer
from mesart.evaluation.tasks.draft import room, sample, size
from mesart.evaluation.tasks.values import SMALL_WORDS, WORDS, Words

CWE_INTRODUCTION: Final = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION: Final = (
    "\nQuestion: What are the {count} most common words in the above list? "
    "Answer: The top {count} words that appear most often in the list are:"
)
FWE_INTRODUCTION: Final = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the {count}most frequently appeared coded {words}."
)
FWE_QUESTION: Final = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What {are} the {count}most frequently appeared {words} in the above coded text? "
    "Answer: According to the coded text above, the {count}most frequently appeared {words} {are}:"
)
EXAMPLE_UNCOMMON: Final = 10
"""Uncommon words of an example, each once; a common word stands there `EXAMPLE_COMMON` times."""
EXAMPLE_COMMON: Final = 3
_IN_WORDS: Final = {2: "two", 3: "three", 4: "four", 5: "five"}
_FEWEST: Final = 10
"""Words, about, of the shortest coded text."""


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which some words stand often and the others, as many as the prompt can hold, seldom.

    The words are this project's adjective-noun pairs: the paper's lists of English words are data sets.

    Attributes:
        common: number of common words, all asked for.
        common_times, uncommon_times: how often a word of either sort stands in the list.
        words: their kind.
        examples: solved, short lists before the task.
        most_tokens: to generate, if the answer does not need more.
    """

    name: ClassVar[str] = "cwe"
    title: ClassVar[str] = "Common words extraction"
    source: ClassVar[str] = "RULER (arXiv 2404.06654)"

    common: int = 10
    common_times: int = 30
    uncommon_times: int = 3
    words: Words = WORDS
    examples: int = 1
    most_tokens: int | None = 120

    @classmethod
    def small(cls) -> CommonWords:
        """Two common words, three times each, and others once; no example."""
        return cls(common=2, common_times=3, uncommon_times=1, words=SMALL_WORDS, examples=0, most_tokens=None)

    def answer(self, sample: Sample) -> str:
        return _numbered(sample.references)

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        words = self.words.draws(rng)
        introduction = writer.piece(CWE_INTRODUCTION)
        question = writer.piece(CWE_QUESTION.format(count=self.common))
        solved: list[Piece] = []
        for _ in range(self.examples):
            common = list(itertools.islice(words, self.common))
            entries = [*common * EXAMPLE_COMMON, *itertools.islice(words, EXAMPLE_UNCOMMON)]
            rng.shuffle(entries)
            solved += [introduction, *_list(writer, entries), question, writer.piece(_numbered(common) + "\n\n")]
        common = list(itertools.islice(words, self.common))
        entries = [word for word in common for _ in range(self.common_times)]
        space = room(writer, length, [*solved, introduction, *_list(writer, entries), question])
        # Shuffling changes no token count: a number and a word are encoded apart.
        while space > 0:
            more = [next(words)] * self.uncommon_times
            space -= size(_list(writer, more, first=len(entries) + 1))
            if space >= 0:
                entries += more
        rng.shuffle(entries)
        references = sorted(common, key=entries.index)
        return sample(
            writer,
            [*solved, introduction],
            _list(writer, entries),
            question,
            references,
            self._new_tokens(writer, _numbered(references), self.most_tokens),
            {"words": len(entries)},
        )

    def _probes(self) -> Iterable[str]:
        return [*self.words.probes(), *(f" {digit}." for digit in range(10))]


@cache
def _zeta(alpha: float, terms: int) -> float:
    return float(sum(rank**-alpha for rank in range(1, terms + 1)))


def _numbered(words: Sequence[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, start=1))


def _list(writer: Writer, words: Sequence[str], first: int = 1) -> list[Piece]:
    """The words, numbered, as pieces of a number or a word each."""
    return [
        writer.piece(text) for number, word in enumerate(words, start=first) for text in (f" {number}.", f" {word}")
    ]


@dataclass(frozen=True)
class FrequentWords(Task):
    """A text of made-up words whose frequencies fall by a power law; the most frequent is only dots, to be ignored.

    The word of rank k stands there a share of about ``k ** -alpha / zeta(alpha)`` of the time. The counts of the words
    that are asked for are made to differ, and to be above those of the rest, so that there is one right answer.

    Attributes:
        alpha: how fast frequencies fall.
        asked: number of words asked for.
        letters: of a word.
        vocabulary: different words at most.
        most_tokens: to generate, if the answer does not need more.
    """

    name: ClassVar[str] = "fwe"
    title: ClassVar[str] = "Frequent words extraction"
    source: ClassVar[str] = "RULER (arXiv 2404.06654)"

    alpha: float = 2.0
    asked: int = 3
    letters: int = 6
    vocabulary: int = 2000
    most_tokens: int | None = 50

    @classmethod
    def small(cls) -> FrequentWords:
        """One word is asked for; words of 3 letters."""
        return cls(asked=1, letters=3, most_tokens=None)

    def answer(self, sample: Sample) -> str:
        return " " + " ".join(sample.references)

    def _write(self, writer: Writer, length: int | None, rng: random.Random, depth: float) -> Sample:
        introduction, question = self._frame(writer)
        dots = writer.piece(" ....")
        coded = map(writer.piece, self._words(rng))
        ranked = [dots]  # and as many coded words as any of the tried lengths needs

        def text_of(words: int) -> list[Piece]:
            counts = self.counts(words)
            ranked.extend(itertools.islice(coded, max(0, len(counts) - len(ranked))))
            return [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]

        text = text_of(_FEWEST)
        space = room(writer, length, [introduction, *text, question])
        if space:
            total = space + size(text)
            words = bisect.bisect_right(range(total), total, lo=_FEWEST, key=lambda words: size(text_of(words))) - 1
            text = text_of(words)
            text += [dots] * ((total - size(text)) // len(dots.ids))
        rng.shuffle(text)
        references = [word.text.strip() for word in ranked[1 : self.asked + 1]]
        return sample(
            writer,
            [introduction],
            text,
            question,
            references,
            self._new_tokens(writer, " " + " ".join(references), self.most_tokens),
            {"words": len(text)},
        )

    def counts(self, words: int) -> list[int]:
        """How often each rank stands in a text of about so many words, dots first, down to the last that does."""
        norm = _zeta(self.alpha, self.vocabulary)
        counts = []
        for rank in range(1, self.vocabulary + 1):
            count = round(words * rank**-self.alpha / norm)
            if not count and rank > self.asked + 1:
                break
            counts.append(count)
        after = counts[self.asked + 1] if len(counts) > self.asked + 1 else 0
        for rank in range(self.asked, 0, -1):
            after = counts[rank] = max(counts[rank], after + 1)
        return counts

    def _frame(self, writer: Writer) -> tuple[Piece, Piece]:
        one = self.asked == 1
        words = {
            "count": "" if one else f"{_IN_WORDS.get(self.asked, self.asked)} ",
            "words": "word" if one else "words",
            "are": "is" if one else "are",
        }
        return writer.piece(FWE_INTRODUCTION.format(**words)), writer.piece(FWE_QUESTION.format(**words))

    def _words(self, rng: random.Random) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            word = "".join(rng.choices(string.ascii_lowercase, k=self.letters))
            if word not in seen:
                seen.add(word)
                yield " " + word

    def _probes(self) -> Iterable[str]:
        return [" ....", *(" " + letter * self.letters for letter in string.ascii_lowercase)]
