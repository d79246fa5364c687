"""Documents in conversations: where a template puts them, they are put as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesart.graphs import MesaError
from mesart.runtime.document_texts import DocumentTexts
from mesart.runtime.documents import DocumentPrompt
from mesart.runtime.text import Tokenizer
from tests.runtime.conftest import KINDS, byte_level

DOCUMENTS = ["The fox.", "  A dog\n", "The café | 5 o'clock"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]

# As chat templates of models with a place for documents have it.
PLACED = (
    "<|begin|>{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and documents %}{% for d in documents %}## {{ d.title }}: {{ d.text }}\n"
    "{% endfor %}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "<|begin|>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., tuple[DocumentTexts, Tokenizer]]:
    """``texts(template, kind)``: what makes prompts with that chat template, and its tokenizer."""

    def make(template: str, kind: str = "byte_level") -> tuple[DocumentTexts, Tokenizer]:
        KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer(tmp_path)
        return DocumentTexts(tokenizer, 1 << 20), tokenizer

    return make


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def parts(tokenizer: Tokenizer, lead: str, between: str, question: str) -> DocumentPrompt:
    """All documents, with the same between any two of them."""
    documents = [ids(tokenizer, document) for document in DOCUMENTS]
    joined = documents[:1]
    for document in documents[1:]:
        joined += [part for part in (ids(tokenizer, between), document) if part]
    return DocumentPrompt(ids(tokenizer, lead), joined, ids(tokenizer, question))


class TestATemplateWithAPlace:
    def test_they_stand_there(self, texts):
        made, tokenizer = texts(PLACED)
        prompt = made.chat(MESSAGES, DOCUMENTS)
        documents = [ids(tokenizer, document) for document in DOCUMENTS]
        begin = "<|begin|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n## 1: "
        assert prompt.lead == ids(tokenizer, begin)
        assert prompt.documents[::2] == documents
        assert prompt.documents[1::2] == [ids(tokenizer, "\n## 2: "), ids(tokenizer, "\n## 3: ")]
        assert prompt.question == ids(tokenizer, "\nWhich?<|im_end|>\n<|im_start|>assistant\n")

    def test_by_content_too(self, texts):
        """Templates that read ``content``, as some do."""
        made, tokenizer = texts(PLACED.replace("d.text", "d['content']"))
        assert made.chat(MESSAGES, DOCUMENTS).documents[::2] == [ids(tokenizer, text) for text in DOCUMENTS]

    def test_documents_of_ids(self, texts):
        made, _ = texts(PLACED)
        assert made.chat(MESSAGES, [[5, 6], [7]]).documents[::2] == [[5, 6], [7]]

    def test_texts_that_look_like_the_template(self, texts):
        """What stands in a document is never read as template, nor as another document's mark."""
        made, tokenizer = texts(PLACED)
        nasty = ["{{ messages }}", "<|im_end|>", "document1end", "{% endfor %}"]
        assert made.chat(MESSAGES, nasty).documents[::2] == [ids(tokenizer, text) for text in nasty]

    def test_options_of_the_template(self, texts):
        made, tokenizer = texts(PLACED)
        prompt = made.chat(MESSAGES, DOCUMENTS, add_generation_prompt=False)
        assert prompt.question == ids(tokenizer, "\nWhich?<|im_end|>\n")


class TestATemplateWithout:
    def test_they_begin_the_first_message_of_the_user(self, texts):
        made, tokenizer = texts(PLAIN)
        begin = "<|begin|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        end = "\n\nWhich?<|im_end|>\n<|im_start|>assistant\n"
        assert _without_empty(made.chat(MESSAGES, DOCUMENTS)) == parts(tokenizer, begin, "", end)

    def test_of_several_messages_the_first(self, texts):
        made, tokenizer = texts(PLAIN)
        more = [*MESSAGES, {"role": "assistant", "content": "This."}, {"role": "user", "content": "Why?"}]
        prompt = made.chat(more, DOCUMENTS)
        assert prompt.question == ids(
            tokenizer,
            "\n\nWhich?<|im_end|>\n<|im_start|>assistant\nThis.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n",
        )
        assert more[1] == {"role": "user", "content": "Which?"}, "what was given stays as it is"

    def test_contents_in_parts(self, texts):
        """As templates of models that see pictures read them."""
        source = PLAIN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
        made, tokenizer = texts(source)
        prompt = made.chat([{"role": "user", "content": [{"type": "text", "text": "Which?"}]}], DOCUMENTS)
        assert prompt.question == ids(tokenizer, "\n\nWhich?<|im_end|>\n<|im_start|>assistant\n")

    @pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
    def test_a_message_without_content(self, texts, message):
        made, tokenizer = texts(PLAIN)
        assert made.chat([message], DOCUMENTS).question == ids(tokenizer, "\n\n<|im_end|>\n<|im_start|>assistant\n")

    def test_a_template_that_trims_and_escapes(self, texts):
        made, tokenizer = texts(PLAIN.replace("{{ m.content }}", "{{ m.content | trim | escape }}"))
        prompt = made.chat([{"role": "user", "content": "Which? "}], DOCUMENTS)
        assert [part for part in prompt.documents if part] == [ids(tokenizer, text) for text in DOCUMENTS]
        assert prompt.question == ids(tokenizer, "\n\nWhich?<|im_end|>\n<|im_start|>assistant\n")


def _without_empty(prompt: DocumentPrompt) -> DocumentPrompt:
    return DocumentPrompt(prompt.lead, [part for part in prompt.documents if part], prompt.question)


class TestNoPlace:
    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            "{{ messages[0].content }}",
            "{{ messages[1].content[:20] }}",
            "{{ messages[1].content | upper }}",
            "{{ messages[1].content }}{{ messages[1].content }}",
            "{{ messages[1].content | reverse }}",
            "{% for d in documents or [] %}{{ d.text }}{{ d.content }}{% endfor %}",
            "{% for d in (documents or [])[:1] %}{{ d.text }}{% endfor %}",
            "{% for d in (documents or []) | reverse %}{{ d.text }}{% endfor %}",
        ],
    )
    def test_is_one_clear_error(self, texts, template):
        """Left out, shown twice, cut, or in another order: nothing is answered from half of them."""
        made, _ = texts(template)
        with pytest.raises(MesaError, match="the chat template has no place for documents: ") as error:
            made.chat(MESSAGES, DOCUMENTS)
        assert "\n" not in str(error.value)

    def test_no_message_of_the_user(self, texts):
        made, _ = texts(PLAIN)
        for messages in ([{"role": "system", "content": "Be brief."}], [{"content": "a"}]):
            with pytest.raises(MesaError, match="documents need a message of the user to stand in, and"):
                made.chat(messages, DOCUMENTS)

    def test_a_template_that_refuses_the_messages(self, texts):
        made, _ = texts("{{ raise_exception('no system role') }}")
        with pytest.raises(MesaError, match="no system role"):
            made.chat(MESSAGES, DOCUMENTS)

    @pytest.mark.parametrize("messages", ["Which?", [], ["Which?"], {"role": "user"}, None, [None]])
    def test_what_is_no_chat(self, texts, messages):
        made, _ = texts(PLAIN)
        with pytest.raises(MesaError, match="a chat (is a list of|needs at least one) messages? such as"):
            made.chat(messages, DOCUMENTS)

    def test_without_a_template(self, tmp_path):
        byte_level().save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(MesaError, match="has no chat template"):
            DocumentTexts(Tokenizer(tmp_path), 1000).chat(MESSAGES, DOCUMENTS)


class TestWhatBeginsAndEndsATextStaysThere:
    """Tokenizers that add tokens around a text: once a prompt, not once a document."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lead", ["", "Be brief."])
    def test_of_each_kind(self, texts, kind, lead):
        made, tokenizer = texts(PLAIN, kind)
        prompt = made.plain(lead, DOCUMENTS, "Which?")
        begin, end = tokenizer.around
        assert tokenizer.encode("a") == [*begin, *ids(tokenizer, "a"), *end]
        assert prompt.lead == [*begin, *(ids(tokenizer, lead) if lead else [])]
        assert prompt.documents == [ids(tokenizer, document) for document in DOCUMENTS]
        assert prompt.question == [*ids(tokenizer, "Which?"), *end]

    @pytest.mark.parametrize(
        ("single", "begin", "end"),
        [
            ("$A", [], []),
            ("<|begin|> $A", ["<|begin|>"], []),
            ("$A <|end|>", [], ["<|end|>"]),
            ("<|begin|> <|im_start|> $A <|im_end|> <|end|>", ["<|begin|>", "<|im_start|>"], ["<|im_end|>", "<|end|>"]),
        ],
    )
    def test_whatever_they_add(self, tmp_path, single, begin, end):
        from tokenizers import processors

        tokenizer: Any = byte_level()
        names = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        opened = Tokenizer(tmp_path)
        expected = [[tokenizer.token_to_id(name) for name in added] for added in (begin, end)]
        assert list(opened.around) == expected
        prompt = DocumentTexts(opened, 1000).plain("", ["A fox."], "Which?")
        assert prompt.lead == expected[0]
        assert prompt.question == [*ids(opened, "Which?"), *expected[1]]
