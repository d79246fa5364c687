"""The windows of the task mixture that `scripts/train_demo_model.py` trains on."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mesart.evaluation.corpus import library_documents
from mesart.evaluation.passkey import prompt_rng
from mesart.evaluation.tasks import tasks
from mesart.scripts import train_demo_model
from mesart.scripts.train_demo_model import ANSWER_WEIGHT, EOS_ID, OTHER_WEIGHT, WINDOW, TaskWindowSource, WindowSource
from tests.evaluation.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return library_documents("held_out")[:20]


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    """The whole library takes seconds to encode."""
    monkeypatch.setattr(train_demo_model, "library_documents", lambda split: documents)
    monkeypatch.setattr(train_demo_model, "library_text", lambda split: "\n\n".join(documents))


def test_windows_end_tasks_with_their_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    source, again = TaskWindowSource(tokenizer), TaskWindowSource(tokenizer)
    answers: list[str] = []
    for index in range(200):
        ids, weights = source.window(0, index)
        assert (ids, weights) == again.window(0, index)
        assert len(ids) == len(weights) == WINDOW
        assert set(weights) <= {OTHER_WEIGHT, ANSWER_WEIGHT}
        weighted = [place for place, weight in enumerate(weights) if weight == ANSWER_WEIGHT]
        if weighted:
            start, end = weighted[0], weighted[-1]
            assert weighted == list(range(start, end + 1))
            assert ids[end] == EOS_ID
            prompt, answer = str(tokenizer.decode(ids[:start])), str(tokenizer.decode(ids[start:end]))
            for word in re.findall(r"[\w-]{3,}", answer):  # none of them is invented
                assert word in prompt
            answers.append(answer)
    assert 0.6 < len(answers) / 200 < 0.95
    for form in (r" [0-9]{4}", r" [0-9]{5}", r" <[0-9]{4}>", r' "[0-9a-f]{8}"', r" [A-Z]{3} .*", r" 1\. .* 2\. .*"):
        assert any(re.fullmatch(form, answer) for answer in answers), form


def test_pieces_in_another_order_lose_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TaskWindowSource(tokenizer)
    changed = 0
    for index in range(20):
        windows = []
        for share in (0.0, 1.0):
            monkeypatch.setattr(train_demo_model, "BROKEN_SHARE", share)
            windows.append(source._task_window(prompt_rng("train", 0, index)))
        (whole, weights), (broken, broken_weights) = windows
        assert sorted(whole) == sorted(broken)
        assert weights == broken_weights
        changed += whole != broken
    assert 5 <= changed < 20  # those that ask for one thing


def test_the_recipe_without_tasks_draws_no_tasks(tokenizer: PreTrainedTokenizerFast) -> None:
    source = WindowSource(tokenizer)
    texts = [tokenizer.decode(source.window(0, index)[0]) for index in range(60)]
    assert any("What is the pass key?" in text for text in texts)
    assert not any("special magic" in text or "REGISTER_CONTENT" in text for text in texts)


def test_the_tokenizer_learns_the_words_of_all_tasks() -> None:
    texts: Any = train_demo_model.task_texts()
    assert len(texts) == len(tasks("small")) * train_demo_model.TASK_TEXTS
    assert train_demo_model.passkey_texts()[0].startswith("There is an important info")
    joined = "".join(texts)
    assert all(words in joined for words in ("special magic uuid", "REGISTER_CONTENT", "chain(s)", "JSON data"))
