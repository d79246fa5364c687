"""What evaluations ask of a model: answers to prompts, and how likely it finds a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import InputError


class System(ABC):
    """A model under one rule of attention and positions, with a live cache of one prompt."""

    engine: str
    """What runs it, a phrase for people."""

    @abstractmethod
    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        """Computes a prompt; logits of its last ``last`` tokens, ``[last, V]``."""

    @abstractmethod
    def step(self, token: int) -> NDArray[np.float32]:
        """Appends a token to the prompt; logits of the next, ``[V]``."""

    @abstractmethod
    def logits_of(self, tokens: int) -> int:
        """Of how many last tokens of a prompt of ``tokens`` tokens there are logits.

        Raises:
            MesaError: the system cannot take a prompt of that length.
        """

    def close(self) -> None:  # noqa: B027  (not abstract: most have nothing to do)
        """Frees what it holds."""

    def generate(self, input_ids: Sequence[int], count: int, stop: Collection[int] = ()) -> list[int]:
        """The ``count`` most likely tokens one after the other; fewer if one of ``stop`` comes, which is left out."""
        generated: list[int] = []
        logits = self.prefill(input_ids, 1)[-1]
        while True:
            token = int(logits.argmax())
            if token in stop:
                return generated
            generated.append(token)
            if len(generated) == count:
                return generated
            logits = self.step(token)

    def log_probs(self, input_ids: Sequence[int], count: int) -> NDArray[np.float64]:
        """Natural log-probabilities of the last ``count`` tokens, each given all tokens before it, ``[count]``.

        Raises:
            MesaError: the system gives logits of fewer tokens of a text of this length.
        """
        given = len(input_ids) - 1  # the last token predicts nothing that is scored
        self.require_scores(len(input_ids), count)
        logits = self.prefill(input_ids[:given], count).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(count), list(input_ids[-count:])]
        scores: NDArray[np.float64] = chosen - np.log(np.exp(logits).sum(axis=-1))
        return scores

    def require_scores(self, tokens: int, count: int) -> None:
        """Raises a :class:`MesaError` if the last ``count`` tokens of a text of ``tokens`` tokens cannot be scored."""
        if not 1 <= count < tokens:
            raise InputError(f"of a text of {tokens} tokens the last 1 to {tokens - 1} can be scored, not {count}")
        limit = self.logits_of(tokens - 1)
        if count > limit:
            raise InputError(
                f"of a text of {tokens} tokens only the last {limit} can be scored, the tail of its plan, not {count}"
            )


__all__ = ["System"]
