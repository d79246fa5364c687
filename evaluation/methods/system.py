"""A model under a method, as evaluations use it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mesart.evaluation.methods.cache import CacheRows, LayerCache
from mesart.evaluation.methods.execution import Execution, Live
from mesart.evaluation.methods.method import Method
from mesart.evaluation.methods.wrapped import WrappedModel
from mesart.evaluation.systems.system import System
from mesart.graphs.errors import InputError

RUN_LENGTH = 4096
"""Tokens that go through the model together; bounds its activations, and changes no result."""


class MethodSystem(System):
    """A transformers model under a long-context method: prefill and decoding, one prompt at a time.

    Args:
        model: a causal language model; it is left as it is, and its weights are shared.
        method: see :func:`~mesart.evaluation.methods.open_method`.

    Raises:
        MesaError: a model that this method cannot be used on.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.method = method
        self._model = WrappedModel(model, method.train_length)
        if method.rotary_only and not any(f is not None for f in self._model.frequencies):
            raise InputError(
                f"{method.name} changes rotary positions, and {type(model).__name__} has none (ALiBi or NoPE); "
                "use origin, mesa, streaming-llm or lm-infinite on it"
            )
        dtype = str(self._model.dtype).removeprefix("torch.")
        self.engine = f"PyTorch on {self._model.device.type}, fused attention, {dtype}"
        self._live: Live | None = None
        self._tokens: list[int] = []

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        tokens = [int(token) for token in input_ids]
        if not tokens:
            raise InputError("the prompt is empty; give at least one token")
        if not 1 <= last <= len(tokens):
            raise InputError(f"of a prompt of {len(tokens)} tokens the last 1 to {len(tokens)} have logits, not {last}")
        self._require_ids(tokens)
        total, rule = len(tokens), self.method.for_prompt(len(tokens))
        count = range(len(self._model.layers))
        self._live = Live(rule, CacheRows(), [LayerCache() for _ in count], [rule.memory() for _ in count], {})
        self._tokens = tokens
        wanted: list[NDArray[np.float32]] = []
        for start, stop in rule.runs(0, total, RUN_LENGTH):
            keep = stop - max(start, total - last)
            logits = self._run(tokens[start:stop], start, total, max(1, keep))
            if keep > 0:
                wanted.append(logits)
        return np.concatenate(wanted)

    def step(self, token: int) -> NDArray[np.float32]:
        if self._live is None:
            raise InputError("there is no prompt to continue; prefill one first")
        self._require_ids([token])
        cached = self._live.rows.tokens
        row: NDArray[np.float32]
        if cached == self._model.short_length:  # what is cached follows from LongRoPE's short frequencies
            row = self.prefill([*self._tokens, int(token)], 1)[-1]
            return row
        self._live.rule.step(cached)
        row = self._run([int(token)], cached, cached + 1, 1)[-1]
        self._tokens.append(int(token))
        return row

    def logits_of(self, tokens: int) -> int:
        return self.method.logits_of(tokens)

    def close(self) -> None:
        self._live = None

    @property
    def cached_keys(self) -> int:
        """Keys that a layer's cache holds room for now, whether in use or not."""
        return 0 if self._live is None else self._live.rows.capacity

    def _run(self, tokens: list[int], start: int, total: int, keep: int) -> NDArray[np.float32]:
        assert self._live is not None
        run = Execution(self._model, self._live, start, start + len(tokens), total, self.method.train_length)
        logits = self._model.run(tokens, keep, run.attend, total)
        run.finish()
        rows: NDArray[np.float32] = logits.float().cpu().numpy()
        return rows

    def _require_ids(self, tokens: list[int]) -> None:
        if min(tokens) < 0 or max(tokens) >= self._model.vocabulary:
            raise InputError(
                f"token ids must lie in 0..{self._model.vocabulary - 1}; is the tokenizer this model's own?"
            )
