"""A prompt of documents: its head, each document's tokens, and the question behind them."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError
from mesart.runtime.prompts import PromptIds

Reuse: TypeAlias = Literal["auto", "always", "off"]
"""Whether chunks that were computed before are put into a prompt.

``auto``: where it has chunks, beyond the trained length; that changes nothing of what it gives. ``always``: documents
are chunks however short the prompt is, so that each is computed once; none sees another. ``off``: all is computed.
"""


@dataclass(frozen=True)
class DocumentPrompt:
    """Token ids of a prompt in parts, each tokenised alone, so that a part is the same in every prompt.

    Attributes:
        lead: what stands before the documents, such as a system message.
        documents: and whatever stands between two of them, a part each.
        question: what stands behind them.
    """

    lead: Tokens[int]
    documents: Tokens[Tokens[int]]
    question: Tokens[int]

    def joined(self, manifest: Manifest, reuse: Reuse) -> PromptIds:
        """The prompt's ids, and the edges at which it is cut into chunks; none where it is the plain model's to read.

        The head holds no document, or it would be another for each of them, and so would all chunks behind it: what
        is missing in front of the documents is filled up with the bundle's filler.
        """
        parts = [part for part in self.documents if part]
        plain = [*self.lead, *(token for part in parts for token in part), *self.question]
        config = manifest.config
        if not parts or (reuse != "always" and (len(plain) <= config.train_length or not config.chunk_length)):
            return PromptIds(plain)
        filler = manifest.filler[: max(0, config.head_length - len(self.lead))]
        ids = [*self.lead, *filler]
        edges = [len(ids)]
        for part in parts:
            ids += part
            edges.append(len(ids))
        return PromptIds([*ids, *self.question], tuple(edges))


def check_reuse(reuse: object) -> None:
    """Raises an :class:`InputError` if that is no way to reuse chunks."""
    if reuse not in get_args(Reuse):
        raise InputError(f"reuse is {reuse!r}; it is one of {', '.join(get_args(Reuse))}")


__all__ = ["DocumentPrompt", "Reuse", "check_reuse"]
