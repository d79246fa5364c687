"""Prompts of documents: a head that holds none of them, and edges at which each is cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs import MesaError, Plan
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.method.yarn import YarnConfig
from mesart.runtime.document_texts import DocumentTexts
from mesart.runtime.documents import DocumentPrompt, check_reuse
from mesart.runtime.text import Tokenizer

HEAD, WINDOW = 8, 64
PARTS = st.lists(st.integers(1, 319), max_size=50)


@pytest.fixture(scope="module")
def manifest(bundle) -> Manifest:
    return dataclasses.replace(Manifest.read(bundle()), filler=list(range(300, 300 + HEAD)))


def prompt(lead: int, *documents: int, question: int = 5) -> DocumentPrompt:
    """Of parts of these lengths, in which no token is there twice."""
    parts, start = [], 1
    for count in (lead, *documents, question):
        parts.append(list(range(start, start + count)))
        start += count
    return DocumentPrompt(parts[0], parts[1:-1], parts[-1])


class TestAlways:
    @given(PARTS, st.lists(PARTS, max_size=4), PARTS.filter(len))
    @settings(max_examples=40)
    def test_the_head_holds_no_document(self, manifest, lead, documents, question):
        """It is made of the lead, and of the filler where that is too short; behind it nothing is missing."""
        made = DocumentPrompt(lead, documents, question).joined(manifest, "always")
        joined = [token for document in documents for token in document]
        if not joined:
            assert (made.ids, made.edges) == ([*lead, *question], ())
            return
        head = [*lead, *manifest.filler[: max(0, HEAD - len(lead))]]
        assert made.ids == [*head, *joined, *question]
        assert made.edges[0] == len(head) >= HEAD
        spans = [made.ids[start:stop] for start, stop in zip(made.edges, made.edges[1:], strict=False)]
        assert spans == [document for document in documents if document]
        plan = Plan.of(manifest.config, len(made.ids), made.edges)
        assert plan.head is not None
        assert {chunk.start for chunk in plan.chunks} | {plan.tail.start} >= set(made.edges)

    @pytest.mark.parametrize(
        ("lead", "filled", "edges"),
        [
            (0, [300, 301, 302, 303, 304, 305, 306, 307], (8, 18, 38)),
            (3, [300, 301, 302, 303, 304], (8, 18, 38)),
            (7, [300], (8, 18, 38)),
            (8, [], (8, 18, 38)),
            (9, [], (9, 19, 39)),
            (60, [], (60, 70, 90)),
        ],
    )
    def test_a_lead_of_each_length(self, manifest, lead, filled, edges):
        made = prompt(lead, 10, 20).joined(manifest, "always")
        assert made.ids[:lead] == list(range(1, lead + 1))
        assert made.ids[lead : lead + len(filled)] == filled
        assert made.edges == edges

    def test_a_document_makes_the_same_chunks_whatever_stands_before_it(self, manifest):
        document = list(range(100, 190))
        cuts = []
        for lead, others in ([], []), ([1, 2], [[5] * 33]), (list(range(1, 50)), [[7], [8] * 41]):
            made = DocumentPrompt(lead, [*others, document], [3]).joined(manifest, "always")
            plan = Plan.of(manifest.config, len(made.ids), made.edges)
            cuts.append([made.ids[chunk.start : chunk.stop] for chunk in plan.chunks if chunk.start >= made.edges[-2]])
        assert cuts[0] == cuts[1] == cuts[2]
        assert [len(cut) for cut in cuts[0]] == [30, 30, 30]

    def test_a_method_without_chunks_says_so(self, manifest):
        yarn = dataclasses.replace(manifest, config=YarnConfig(WINDOW, factor=2.0, max_tokens=128), filler=[])
        for lead in (0, 3):
            made = prompt(lead, 10, 20).joined(yarn, "always")
            with pytest.raises(MesaError, match="the method yarn has no chunks; a prompt of .* cannot be cut at docu"):
                Plan.of(yarn.config, len(made.ids), made.edges)


class TestAutoAndOff:
    @pytest.mark.parametrize("reuse", ["auto", "off"])
    def test_a_prompt_within_the_trained_window_is_the_plain_models(self, manifest, reuse):
        """No filler, no edges: nothing is added to what was given."""
        for lead in (0, 3, 20):
            rest = WINDOW - lead - 10 - 5
            made = prompt(lead, 10, rest).joined(manifest, reuse)
            assert (made.ids, made.edges) == (list(range(1, WINDOW + 1)), ())
            made = prompt(lead, 10, rest + 1).joined(manifest, reuse)
            assert made.edges[0] == max(lead, HEAD)

    @given(PARTS, st.lists(PARTS, max_size=4), PARTS.filter(len))
    @settings(max_examples=30)
    def test_beyond_it_all_three_are_the_same(self, manifest, lead, documents, question):
        parts = DocumentPrompt(lead, documents, question)
        made: list[Any] = [parts.joined(manifest, reuse) for reuse in ("auto", "off", "always")]
        assert made[0] == made[1]
        if sum(map(len, (lead, *documents, question))) > WINDOW:
            assert made[0] == made[2]

    def test_a_method_without_chunks_reads_them_joined(self, manifest):
        yarn = dataclasses.replace(manifest, config=YarnConfig(WINDOW, factor=4.0, max_tokens=256), filler=[])
        made = prompt(3, 100, 50).joined(yarn, "auto")
        assert (made.ids, made.edges) == (list(range(1, 159)), ())

    @pytest.mark.parametrize("reuse", ["Auto", "", None, True, "never", 1])
    def test_another_way_is_refused(self, reuse):
        with pytest.raises(MesaError, match="reuse is .*; it is one of auto, always, off"):
            check_reuse(reuse)


@pytest.fixture(scope="module")
def tokenizer(bundle) -> Tokenizer:
    return Tokenizer(bundle())


@pytest.fixture
def texts(tokenizer) -> DocumentTexts:
    return DocumentTexts(tokenizer, 320)


class TestTexts:
    def test_each_is_tokenised_alone(self, texts, tokenizer):
        documents = ["The grass is green.", "The grass", " is green.", [5, 6]]
        made = texts.plain("Here we go.", documents, "There?")
        assert made.documents == [
            *(tokenizer.encode(document, add_special_tokens=False) for document in documents[:3]),
            [5, 6],
        ]
        assert made.lead == tokenizer.encode("Here we go.", add_special_tokens=False)
        assert made.question == tokenizer.encode("There?", add_special_tokens=False)

    def test_ids_as_any_sequence(self, texts):
        assert texts.documents([np.array([5, 6]), (7, 8), [9], range(3)]) == [[5, 6], [7, 8], [9], [0, 1, 2]]
        assert texts.documents(("a",)) == texts.documents(["a"])

    @pytest.mark.parametrize("documents", ["one text", b"bytes", {"a": "text"}, np.array([[1, 2]]), {"a"}])
    def test_one_text_is_no_list_of_them(self, texts, documents):
        with pytest.raises(MesaError, match="documents are a list of texts, or of lists of token ids"):
            texts.documents(documents)

    @pytest.mark.parametrize("document", ["", [], (), np.zeros(0, np.int64)])
    def test_an_empty_one_is_named(self, texts, document):
        with pytest.raises(MesaError, match="document 2 is empty; leave it out"):
            texts.documents(["a", document])

    @pytest.mark.parametrize("document", [5, None, 1.5, {"text": "a"}, {"a"}, True])
    def test_what_is_no_document_is_named(self, texts, document):
        with pytest.raises(MesaError, match="document 2 is .*: give a text, or one list of token ids") as error:
            texts.documents(["a", document])
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ([5, 320], "token id 320 is outside the vocabulary of 320"),
            ([5, -1], "token id -1 is outside the vocabulary"),
            ([[5, 6], [7, 8]], "one list of token ids"),
            ([1.5], "token ids must be integers"),
            (["a"], "token ids must be integers"),
            ([[1], 2], "token ids must be integers"),
            (b"bytes", "token ids must be integers"),
            ("\ud800", "not valid Unicode"),
        ],
    )
    def test_ids_that_are_none(self, texts, document, message):
        with pytest.raises(MesaError, match=message):
            texts.documents(["a", document])

    def test_without_a_tokenizer_ids_alone(self):
        texts = DocumentTexts(None, 320)
        made = texts.plain("", [[5, 6]], [7])
        assert made == DocumentPrompt([], [[5, 6]], [7])
        for call in (
            lambda: texts.plain("", ["text"], [7]),
            lambda: texts.plain("lead", [[5]], [7]),
            lambda: texts.plain("", [[5]], "question"),
            lambda: texts.chat([{"role": "user", "content": "a"}], [[5]]),
        ):
            with pytest.raises(MesaError, match="the bundle has no tokenizer: give documents and question as token id"):
                call()
