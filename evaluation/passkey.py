"""The passkey task: one key hidden at some depth of a long irrelevant text, and asked for at its end.

Prompts are put together from token ids, piece by piece, because the asked length is a number of tokens: retokenizing
the joined text may give slightly different ids, and it is the ids that count. Nothing here needs torch.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mesart.graphs.errors import InputError

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
STANDARD_FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"

Encode = Callable[[str], list[int]]
Filler = Literal["standard", "random"]
PromptSplit = Literal["train", "eval"]

_EXCERPT_CHARACTERS = (80, 800)  # the shortest and longest excerpt of random filler
_MISSES = 10_000  # excerpts without a word, after which a text has none worth looking for
_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class PasskeyPrompt:
    """One prompt and its answer.

    The answer follows the prompt as `" " + answer`. `needle` is the half-open span of `input_ids` that states the key.
    """

    input_ids: tuple[int, ...]
    text: str
    answer: str
    depth: float
    needle: tuple[int, int]


def prompt_rng(split: PromptSplit, seed: int, index: int) -> random.Random:
    """The random numbers of one prompt.

    Training and evaluation draw from separate namespaces, so no seed of the one can repeat a prompt of the other.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    return random.Random(f"{split}-{seed}-{index}")


def minimum_length(encode: Encode, *, digits: int = 5, prefix_ids: Sequence[int] = ()) -> int:
    """The number of tokens of a prompt without filler."""
    needle = NEEDLE.format(key="7" * digits)
    return len(prefix_ids) + sum(len(encode(part)) for part in (INTRODUCTION, needle, QUESTION))


def passkey_prompt(
    encode: Encode,
    length: int,
    depth: float,
    rng: random.Random,
    *,
    filler: Filler = "standard",
    filler_text: str | None = None,
    digits: int = 5,
    prefix_ids: Sequence[int] = (),
) -> PasskeyPrompt:
    """Make a prompt of `length` tokens, or as few tokens below it as the tokenizer's word lengths allow.

    Args:
        encode: text to token ids, without special tokens.
        length: tokens asked for, `prefix_ids` included.
        depth: share of the filler that precedes the needle, 0 to 1.
        rng: see `prompt_rng`.
        filler: "standard" repeats `STANDARD_FILLER`; "random" joins excerpts of `filler_text` from random places.
        filler_text: what random filler is cut from.
        digits: digits of the key.
        prefix_ids: special tokens the model expects first, such as its beginning-of-sequence token.

    Raises:
        ValueError: the length is below `minimum_length`, the depth is outside 0 to 1, or `filler_text` is missing.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is a share between 0 and 1, not {depth}")
    if digits < 1:
        raise ValueError(f"a key has at least 1 digit, not {digits}")
    key = "".join(rng.choices("0123456789", k=digits))
    needle = NEEDLE.format(key=key)
    introduction_ids, needle_ids, question_ids = encode(INTRODUCTION), encode(needle), encode(QUESTION)
    room = length - len(prefix_ids) - len(introduction_ids) - len(needle_ids) - len(question_ids)
    if room < 0:
        raise ValueError(
            f"a passkey prompt of {length} tokens is too short: this tokenizer needs at least {length - room}"
        )

    def pieces() -> Iterator[str]:
        if filler == "standard":
            return itertools.cycle(STANDARD_FILLER)
        if not filler_text:
            raise ValueError("random filler needs filler_text, the text to cut excerpts from")
        return _random_pieces(filler_text, rng)

    # Standard filler keeps its sentences whole before the needle: the one cut short to fit stands before the question.
    before_text, before_ids = _fill(pieces(), round(depth * room), encode, cut=filler == "random")
    after_text, after_ids = _fill(pieces(), room - len(before_ids), encode, cut=True)

    input_ids = [*prefix_ids, *introduction_ids, *before_ids]
    start = len(input_ids)
    input_ids += [*needle_ids, *after_ids, *question_ids]
    text = INTRODUCTION + before_text + needle + after_text + QUESTION
    return PasskeyPrompt(tuple(input_ids), text, key, depth, (start, start + len(needle_ids)))


def _random_pieces(text: str, rng: random.Random) -> Iterator[str]:
    """Excerpts from random places, each starting at a word, in the spaces and line breaks of the original."""
    shortest, longest = _EXCERPT_CHARACTERS
    misses = 0
    while misses < _MISSES:
        misses += 1
        size = rng.randint(shortest, longest)
        start = rng.randrange(max(1, len(text) - size))
        words = text[start : start + size].split(maxsplit=1)  # the first word is likely cut in two
        if len(words) == 2:
            misses = 0
            yield " " + words[1]
    raise InputError(
        f"the text for random filler has next to no words between spaces: {_MISSES} excerpts of up to {longest} "
        "characters held none; give another text"
    )


def _fill(pieces: Iterator[str], room: int, encode: Encode, *, cut: bool) -> tuple[str, list[int]]:
    """Take pieces while they fit into `room` tokens; with `cut`, fill the rest with the words of the next pieces."""
    texts: list[str] = []
    ids: list[int] = []
    while len(ids) < room:
        piece = next(pieces)
        piece_ids = encode(piece)
        if len(ids) + len(piece_ids) > room:
            break
        texts.append(piece)
        ids += piece_ids
    attempts = 8  # a few more pieces may hold a word short enough for the last tokens
    while cut and len(ids) < room and attempts:
        for word in _WORD.findall(piece):
            word_ids = encode(word)
            if len(ids) + len(word_ids) <= room:
                texts.append(word)
                ids += word_ids
        piece = next(pieces)
        attempts -= 1
    return "".join(texts), ids
