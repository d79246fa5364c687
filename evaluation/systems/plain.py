"""A checkpoint in PyTorch, the slow and obvious way: Mesa by the reference, and transformers' own model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mesart.evaluation.systems.system import System
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan

if TYPE_CHECKING:
    from torch import nn


class MesaReference(System):
    """Mesa-Extrapolation of a checkpoint, by the slow and obvious reference in PyTorch."""

    def __init__(self, model: nn.Module, config: MesaConfig) -> None:
        from mesart.graphs.model.reference import TorchReference  # noqa: PLC0415  (torch only where it is needed)

        self._reference = TorchReference(model, config)
        self.engine = f"TorchReference, {_dtype(model)}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        logits = self._reference.prefill(input_ids, all_logits=last > 1)
        rows: NDArray[np.float32] = logits[0, -last:].numpy()
        return rows

    def step(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._reference.step(token)[0, -1].numpy()
        return row

    def logits_of(self, tokens: int) -> int:
        return len(Plan.of(self._reference.config, tokens).tail)


@contextmanager
def stretched(model: nn.Module, tokens: int) -> Iterator[None]:
    """Lets MPT run past its window: its ALiBi is a table of ``max_seq_len`` columns, and no more tokens can be run.

    The bias of a distance is the same in a longer table.
    """
    config: Any = model.config
    known = getattr(config, "max_seq_len", None)
    if isinstance(known, int):
        config.max_seq_len = max(known, tokens)
    try:
        yield
    finally:
        if isinstance(known, int):
            config.max_seq_len = known


class PlainModel(System):
    """The transformers model as it is: its own positions, attention and cache, however long the prompt."""

    def __init__(self, model: nn.Module, train_length: int) -> None:
        import torch  # noqa: PLC0415

        from mesart.graphs.model.rotary import short_length  # noqa: PLC0415

        self._torch = torch
        self._model = model
        self._cache: Any = None
        self._tokens: list[int] = []
        self._first_long = short_length(model, train_length) + 1
        config: Any = model.config
        self._vocabulary = int(config.get_text_config().vocab_size)
        self.engine = f"transformers {config._attn_implementation}, {_dtype(model)}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        if not input_ids:
            raise InputError("the prompt is empty; give at least one token")
        if min(input_ids) < 0 or max(input_ids) >= self._vocabulary:
            raise InputError(f"token ids must lie in 0..{self._vocabulary - 1}; is the tokenizer this model's own?")
        self._cache, self._tokens = None, list(input_ids)
        return self._run(input_ids, last)

    def step(self, token: int) -> NDArray[np.float32]:
        self._tokens.append(int(token))
        tokens = [token]
        if len(self._tokens) == self._first_long:  # what is cached follows from LongRoPE's short frequencies
            self._cache, tokens = None, self._tokens
        row: NDArray[np.float32] = self._run(tokens, 1)[-1]
        return row

    def logits_of(self, tokens: int) -> int:
        return tokens

    def _run(self, tokens: Sequence[int], last: int) -> NDArray[np.float32]:
        known = 0 if self._cache is None else self._cache.get_seq_length()
        with self._torch.inference_mode(), stretched(self._model, known + len(tokens)):
            output = self._model(
                input_ids=self._torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=last,
            )
        self._cache = output.past_key_values
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


__all__ = ["MesaReference", "PlainModel", "stretched"]
