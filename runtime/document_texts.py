"""Documents as texts: each tokenised alone, and put where a chat's template has a place for them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from typing import Any

import numpy as np

from mesart.graphs.errors import InputError
from mesart.runtime.documents import DocumentPrompt
from mesart.runtime.prompts import Prompt, checked_prompts
from mesart.runtime.text import Tokenizer


class DocumentTexts:
    """Makes prompts of documents.

    Args:
        tokenizer: of the bundle; called only where there is text to read.
        vocabulary: number of token ids.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def plain(self, lead: Prompt, documents: Tokens[Prompt], question: Prompt) -> DocumentPrompt:
        """A lead, documents and a question; texts have the tokens that the tokenizer begins and ends a text with.

        Raises:
            InputError: they are no documents, or there is no question.
        """
        parts = self.documents(documents)
        begin, end = ([], []) if self._tokenizer is None else self._tokenizer.around
        begins = begin if isinstance(lead, str) and (lead or isinstance(question, str)) else []
        lead_ids = self._ids(lead) if len(lead) else []
        asked = [*self._ids(question), *end] if isinstance(question, str) else self._ids(question)
        if not asked:
            raise InputError("the question about the documents is empty; give at least one token")
        return DocumentPrompt([*begins, *lead_ids], parts, asked)

    def documents(self, documents: Tokens[Prompt]) -> list[list[int]]:
        """The ids of each.

        Raises:
            InputError: they are no documents, or one of them is empty.
        """
        if isinstance(documents, (str, bytes, Mapping)) or not isinstance(documents, Tokens):
            raise InputError("documents are a list of texts, or of lists of token ids")
        found = []
        for index, document in enumerate(documents, 1):
            if isinstance(document, Mapping) or not isinstance(document, (Tokens, np.ndarray)):
                raise InputError(
                    f"document {index} is {type(document).__name__}: give a text, or one list of token ids"
                )
            ids = self._ids(document) if len(document) else []
            if not ids:
                raise InputError(f"document {index} is empty; leave it out")
            found.append(ids)
        return found

    def chat(self, messages: Tokens[Mapping[str, Any]], documents: Tokens[Prompt], **options: Any) -> DocumentPrompt:
        """A conversation in the bundle's chat template, which is rendered with a mark for each document and cut there.

        Templates that read ``documents`` say where these go; else the first message of the user begins with them.

        Raises:
            InputError: the template has no place for them, or leaves some out.
        """
        ids, tokenizer = self.documents(documents), self._require_tokenizer()
        # Letters and digits: what no template escapes, and nobody has in a text.
        marks = [f"document{secrets.token_hex(8)}x{index}end" for index in range(len(ids))]
        listed = [{"doc_id": i, "title": str(i), "text": mark, "content": mark} for i, mark in enumerate(marks, 1)]
        text = tokenizer.apply_chat_template(messages, documents=listed, **options)
        if not _in_order(text, marks):
            text = tokenizer.apply_chat_template(_in_first_message(messages, "".join(marks)), **options)
        if not _in_order(text, marks):
            raise InputError(
                "the chat template has no place for documents: it shows not all of the first user message; put the "
                "documents into the messages, or use generate"
            )
        parts = []
        for mark in marks:
            before, text = text.split(mark, 1)
            parts.append(tokenizer.encode(before, add_special_tokens=False) if before else [])
        lead, *between = parts
        joined = [ids[0]]
        for separator, document in zip(between, ids[1:], strict=True):
            joined += [separator, document]
        return DocumentPrompt(lead, joined, tokenizer.encode(text, add_special_tokens=False))

    def _ids(self, text: Prompt) -> list[int]:
        if isinstance(text, str):
            return self._require_tokenizer().encode(text, add_special_tokens=False)
        rows = checked_prompts(text, self._vocabulary)
        if len(rows) != 1:
            raise InputError("a document is a text, or one list of token ids")
        return rows[0].ids

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("the bundle has no tokenizer: give documents and question as token ids")
        return self._tokenizer


def _in_order(text: str, marks: Tokens[str]) -> bool:
    """Whether a text holds each mark once, in their order."""
    places = [text.find(mark) for mark in marks]
    return all(text.count(mark) == 1 for mark in marks) and places == sorted(places)


def _in_first_message(messages: Tokens[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages, the first of the user with a text, and an empty line, before its own."""
    changed = [dict(message) for message in messages]
    for message in changed:
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                message["content"] = [{"type": "text", "text": text + "\n\n"}, *content]
            else:
                message["content"] = f"{text}\n\n{content or ''}"
            return changed
    raise InputError("documents need a message of the user to stand in, and the chat has none")


__all__ = ["DocumentTexts"]
