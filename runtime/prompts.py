"""What users give as prompts, checked: token ids, texts, numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from mesart.graphs.errors import InputError
from mesart.runtime.kv.store import Array

Prompt: TypeAlias = "str | Tokens[int]"


@dataclass(frozen=True)
class PromptIds:
    """A prompt as a model reads it."""

    ids: list[int]
    edges: tuple[int, ...] = ()
    """Where it is cut into chunks: :meth:`~mesart.graphs.method.plan.Plan.of`."""


def checked_prompts(input_ids: ArrayLike | Tokens[Tokens[int]], vocabulary: int) -> list[PromptIds]:
    """The rows of a batch, ``[T]`` or ``[B, T]``, or a list of lists of different lengths.

    Raises:
        InputError: there are none, or no whole numbers within the vocabulary.
    """
    with token_ids(input_ids):
        nested = isinstance(input_ids, (list, tuple)) and any(np.ndim(row) for row in input_ids)
        rows: list[Array] = [np.asarray(row) for row in input_ids] if nested else list(np.atleast_2d(input_ids))  # type: ignore[union-attr]
    if not rows:
        raise InputError("the prompt is empty; give at least one token")
    for row in rows:
        if row.size == 0:
            raise InputError("the prompt is empty; give at least one token")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"token ids must be integers, [T] or [B, T]; got {row.dtype} of shape {row.shape}")
        if row.min() < 0 or row.max() >= vocabulary:
            raise InputError(
                f"token id {int(row.max() if row.max() >= vocabulary else row.min())} is outside the vocabulary of "
                f"{vocabulary}; is the tokenizer this model's own?"
            )
    return [PromptIds([int(token) for token in row]) for row in rows]


@contextmanager
def token_ids(value: object) -> Iterator[None]:
    """What numpy cannot make an array of is no token ids."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"token ids must be integers, [T] or [B, T]; got {type(value).__name__}: {error}") from error


def is_batch(prompt: object) -> bool:
    """Whether it is texts, not one text or its ids.

    Raises:
        InputError: a list in which only some are texts.
    """
    if not isinstance(prompt, (list, tuple)) or not any(isinstance(text, str) for text in prompt):
        return False
    other = next((text for text in prompt if not isinstance(text, str)), None)
    if other is not None:
        raise InputError(f"a batch is a list of texts; one of them is {type(other).__name__}")
    return True


def checked_count(tokens: int) -> int:
    """``max_new_tokens``, if it is a whole number of at least 1."""
    if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)):
        raise InputError(f"max_new_tokens is {tokens!r}; it must be a whole number")
    if tokens < 1:
        raise InputError(f"max_new_tokens is {tokens}; it must be at least 1")
    return int(tokens)


__all__ = ["Prompt", "PromptIds", "checked_count", "checked_prompts", "is_batch", "token_ids"]
