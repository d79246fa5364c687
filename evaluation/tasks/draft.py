"""A prompt in the making: what it cannot do without, room for more, and the filling of that room."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

from mesart.evaluation.passkey import STANDARD_FILLER
from mesart.evaluation.tasks.base import Piece, Sample, TooLong, Writer
from mesart.graphs.errors import InputError

Haystack = Literal["noise", "text"]
"""What hides needles: `STANDARD_FILLER` again and again, or an excerpt of the writer's text."""

# A sentence or a line with the space before it, or a word of one that goes on and on.
_SENTENCE: Final = re.compile(r"\s*\S[^\n]{0,400}?(?:[.!?](?=\s)|(?=\n))|\s*\S+")
_WORD: Final = re.compile(r"\s*\S+")
_MORE_PIECES: Final = 8
"""Pieces whose words are tried for the last tokens of a room: one may be short enough."""


def room(writer: Writer, length: int | None, pieces: Iterable[Piece]) -> int:
    """Tokens left for filling in a prompt of ``length``; none if it is None. Raises `TooLong` if they are below 0."""
    if length is None:
        return 0
    left = length - len(writer.prefix_ids) - size(pieces)
    if left < 0:
        raise TooLong
    return left


def size(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def fill(pieces: Iterable[Piece], space: int) -> list[Piece]:
    """As many of the pieces, from the first on, as go into so many tokens."""
    taken: list[Piece] = []
    if space:  # a generator may be costly to start, or have nothing left
        for piece in pieces:
            space -= len(piece.ids)
            if space < 0:
                break
            taken.append(piece)
            if space == 0:
                break
    return taken


def hay(writer: Writer, haystack: Haystack, space: int, rng: random.Random) -> list[Piece]:
    """Sentences, or lines, of so many tokens together; the last is cut to fit, word by word.

    Raises:
        MesaError: the haystack is the writer's text, and there is none.
    """
    sentences = itertools.cycle(STANDARD_FILLER) if haystack == "noise" else _excerpt(writer.text, rng)
    taken: list[Piece] = []
    for sentence in sentences:
        piece = writer.piece(sentence)
        if len(piece.ids) > space:
            break
        taken.append(piece)
        space -= len(piece.ids)
    # The sentence that was too long, and more of them.
    for text in itertools.islice(itertools.chain([sentence], sentences), _MORE_PIECES if space else 0):
        for word in map(writer.piece, _WORD.findall(text)):
            if len(word.ids) <= space:
                taken.append(word)
                space -= len(word.ids)
    return taken


def _excerpt(text: str, rng: random.Random) -> Iterator[str]:
    """Sentences and lines from a random place on, and on from the beginning after the end."""
    if not text or text.isspace():
        raise InputError("this task hides needles in a text: give one")
    start = text.find("\n", rng.randrange(len(text)))
    places = itertools.chain([max(0, start)], itertools.repeat(0))
    return (match.group() for place in places for match in _SENTENCE.finditer(text, place))


def scatter(needles: Sequence[Piece], filler: Sequence[Piece], rng: random.Random) -> list[Piece]:
    """The filler with the needles, in their order, at random places between its pieces."""
    places = sorted(rng.choices(range(len(filler) + 1), k=len(needles)))
    body: list[Piece] = []
    before = 0
    for place, needle in zip(places, needles, strict=True):
        body += [*filler[before:place], needle]
        before = place
    return [*body, *filler[before:]]


def hide(needle: Piece, filler: Sequence[Piece], depth: float) -> list[Piece]:
    """The filler with the needle between two of its pieces, as near to a share ``depth`` of its tokens as can be."""
    ends = list(itertools.accumulate((len(piece.ids) for piece in filler), initial=0))
    place = min(range(len(ends)), key=lambda index: abs(ends[index] - depth * ends[-1]))
    return [*filler[:place], needle, *filler[place:]]


def sample(
    writer: Writer,
    introduction: Sequence[Piece],
    body: Sequence[Piece],
    question: Piece,
    references: Iterable[str],
    new_tokens: int,
    facts: Mapping[str, float | str],
) -> Sample:
    """The finished prompt."""
    pieces = [*introduction, *body, question]
    ids = (*writer.prefix_ids, *itertools.chain.from_iterable(piece.ids for piece in pieces))
    span = (len(writer.prefix_ids) + size(introduction), len(ids) - len(question.ids))
    return Sample(ids, "".join(piece.text for piece in pieces), tuple(references), new_tokens, span, facts)
