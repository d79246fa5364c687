"""The passkey generator, with a tokenizer of one token per character class so that it needs no model."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.evaluation.passkey import INTRODUCTION, QUESTION, Filler, minimum_length, passkey_prompt, prompt_rng

TEXT = "def spam(eggs):\n    return [1, 2, 3]  # the key is not here\n\n" * 200


class Words:
    """A reversible stand-in for a tokenizer: digits one by one, words with the space before them."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            self.ids.setdefault(word, len(self.ids))
            for word in re.findall(r"\d| ?[^\W\d]+|\s+(?!\S)|\s|[^\w\s]|_", text)
        ]

    def decode(self, ids: tuple[int, ...]) -> str:
        words = list(self.ids)
        return "".join(words[i] for i in ids)


@settings(deadline=None)
@given(
    length=st.integers(75, 600),
    depth=st.floats(0, 1),
    filler=st.sampled_from(["standard", "random"]),
    index=st.integers(0, 99),
)
def test_prompt_has_the_length_and_the_key(length: int, depth: float, filler: Filler, index: int) -> None:
    words = Words()
    prompt = passkey_prompt(
        words.encode,
        length,
        depth,
        prompt_rng("eval", 0, index),
        filler=filler,
        filler_text=TEXT,
    )
    assert length - 3 <= len(prompt.input_ids) <= length
    assert words.decode(prompt.input_ids) == prompt.text
    assert prompt.text.startswith(INTRODUCTION)
    assert prompt.text.endswith(QUESTION)
    start, end = prompt.needle
    stated = words.decode(prompt.input_ids[start:end])
    assert stated == f" The pass key is {prompt.answer}. Remember it. {prompt.answer} is the pass key."
    assert prompt.text.count(prompt.answer) == 2
    assert len(prompt.answer) == 5


@pytest.mark.parametrize("filler", ["standard", "random"])
def test_depth_orders_the_needles(filler: Filler) -> None:
    starts = [
        passkey_prompt(
            Words().encode,
            500,
            depth,
            random.Random(1),
            filler=filler,
            filler_text=TEXT,
        ).needle[0]
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert starts == sorted(set(starts))


def test_prefix_counts() -> None:
    words = Words()
    words.encode(QUESTION)
    prompt = passkey_prompt(words.encode, 200, 0.5, random.Random(1), prefix_ids=[0])
    assert prompt.input_ids[0] == 0
    assert len(prompt.input_ids) == 200


def test_the_same_seed_gives_the_same_prompt() -> None:
    first, second = (passkey_prompt(Words().encode, 200, 0.5, prompt_rng("eval", 3, 4)) for _ in range(2))
    assert first == second


def test_training_and_evaluation_never_share_random_numbers() -> None:
    draws = [
        prompt_rng(split, seed, index).getrandbits(128)
        for split in ("train", "eval")
        for seed in range(5)
        for index in range(200)
    ]
    assert len(set(draws)) == len(draws)
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        prompt_rng("test", 0, 0)  # type: ignore[arg-type]


def test_too_short_names_the_minimum() -> None:
    words = Words()
    least = minimum_length(words.encode)
    with pytest.raises(ValueError, match=rf"at least {least}$"):
        passkey_prompt(words.encode, least - 1, 0.5, random.Random(1))
    assert len(passkey_prompt(words.encode, least, 0.5, random.Random(1)).input_ids) == least


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        passkey_prompt(Words().encode, 200, 1.5, random.Random(1))
    with pytest.raises(ValueError, match="filler_text"):
        passkey_prompt(Words().encode, 200, 0.5, random.Random(1), filler="random")
    with pytest.raises(ValueError, match="at least 1 digit"):
        passkey_prompt(Words().encode, 200, 0.5, random.Random(1), digits=0)
