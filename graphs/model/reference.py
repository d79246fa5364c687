"""The slow and obvious executor of a plan, in PyTorch: what every engine is compared with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mesart.graphs.bundle.names import MASKED
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan, Span
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.method.stairs import ORDINARY, Stairs
from mesart.graphs.model.phase_module import PhaseModule, PhaseOutputs

TokenIds: TypeAlias = "Sequence[int] | ArrayLike | Tensor"


class TorchReference:
    """Runs a transformers model under Mesa-Extrapolation, or another method: a span at a time, nothing padded.

    It keeps all keys, also those that a method has no use for any more.

    The state (cache, tokens, anchor) belongs to the object; :meth:`prefill` starts anew.

    Args:
        model: a causal language model, or the folder or hub id of one (loaded in float32).
        config: the method; Mesa, chosen from the model's config, if left out.
    """

    def __init__(
        self, model: nn.Module | str | os.PathLike[str], config: StaticMethod | None = None, **load: Any
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoModelForCausalLM  # noqa: PLC0415  (slow to import, not always needed)

            # Never left out: transformers would ask on standard input whether to run the checkpoint's Python code.
            options = {"dtype": torch.float32, "trust_remote_code": False, **load}
            model = AutoModelForCausalLM.from_pretrained(model, **options)
        self.module = PhaseModule(model, (config or MesaConfig()).for_model(model), "sdpa")
        self.config = self.module.method
        self.dtype = next(self.module.parameters()).dtype
        self.vocab_size: int = self.module.config.get_text_config().vocab_size
        self._rerotations = {spec: self.module.rerotation(spec) for spec in self.module.layers if spec.layout}
        self._clear(batch=1)

    def _clear(self, batch: int) -> None:
        self.stairs: Stairs = ORDINARY
        self.tokens = torch.zeros(batch, 0, dtype=torch.int64)
        self.keys = [torch.zeros(batch, s.kv_heads, 0, s.key_size, dtype=self.dtype) for s in self.module.layers]
        self.values = [torch.zeros(batch, s.kv_heads, 0, s.value_size, dtype=self.dtype) for s in self.module.layers]

    def prefill(self, input_ids: TokenIds, *, all_logits: bool = False) -> Tensor:
        """Computes a prompt; what was in the cache is forgotten.

        Args:
            input_ids: ``[T]`` or ``[B, T]``, prompts of one length.
            all_logits: of all the tail's tokens (all tokens of a prompt of ``T <= T_r``), not only of the last.

        Returns:
            Logits, float32 ``[B, S, V]``, or ``[B, 1, V]`` of the last token.
        """
        ids = self._ids(input_ids)
        self._clear(batch=ids.shape[0])
        return self.extend(ids, all_logits=all_logits)

    @torch.no_grad()
    def extend(self, input_ids: TokenIds, *, all_logits: bool = False) -> Tensor:
        """Appends tokens to the cache: a second turn, or what :meth:`prefill` does from nothing."""
        ids = self._ids(input_ids)
        plan = Plan.extend(self.config, self.stairs, self.tokens.shape[1], ids.shape[1])
        tokens = torch.cat([self.tokens, ids], dim=1)
        if plan.start == 0:
            self._clear(batch=tokens.shape[0])
        self.tokens = tokens
        cached_positions = self.stairs.positions(0, plan.start)  # of each key of the cache now

        if plan.head is not None:
            local = np.arange(len(plan.head))
            self._append(self._run(plan.head, local, self.keys, self.values, cached_positions))
            cached_positions = local
        if plan.chunks:
            # A chunk sees the head at its ordinary positions, wherever it is in the cache.
            head = slice(0, self.config.head_length)
            head_local = np.arange(head.stop)
            head_keys = self._rerotate([k[:, :, head] for k in self.keys], cached_positions[head], head_local)
            head_values = [v[:, :, head] for v in self.values]
        for chunk in plan.chunks:
            local = plan.chunk_positions(chunk)
            self._append(self._run(chunk, local, head_keys, head_values, head_local))
            cached_positions = np.concatenate([cached_positions, local])

        positions = plan.stairs.positions(0, len(cached_positions))
        self.keys = self._rerotate(self.keys, cached_positions, positions)
        self.stairs = plan.stairs
        logits = []
        for span in self._slices(plan.tail):
            output = self._run(
                span,
                plan.stairs.positions(span.start, span.stop),
                self.keys,
                self.values,
                plan.stairs.positions(0, span.start),
                plan.query_scales(span),
                all_logits,
            )
            self._append(output)
            logits.append(output.logits)
        # A text that is computed again from its start has a tail longer than what was asked for.
        return torch.cat(logits, dim=1)[:, -ids.shape[1] :] if all_logits else logits[-1]

    def _slices(self, tail: Span) -> list[Span]:
        """The tail, in one or, where queries see the first tokens otherwise than a window, in parts within it."""
        length = len(tail) if self.module.sink_window is None else self.module.sink_window.window
        return [Span(start, min(start + length, tail.stop)) for start in range(tail.start, tail.stop, length)]

    def step(self, token: int | TokenIds) -> Tensor:
        """Appends one token (one for each prompt of the batch); logits of the next, float32 ``[B, 1, V]``."""
        return self.extend(torch.as_tensor(token, dtype=torch.int64).reshape(-1, 1))

    def _run(
        self,
        span: Span,
        positions: NDArray[np.int64],
        past_keys: list[Tensor],
        past_values: list[Tensor],
        past_positions: NDArray[np.int64],
        scales: NDArray[np.float32] | None = None,
        all_logits: bool = False,
    ) -> PhaseOutputs:
        """One span of the tokens behind a past that it may see all of."""
        batch, new, past = self.tokens.shape[0], len(span), past_keys[0].shape[2]
        scale = torch.ones(new) if scales is None else torch.from_numpy(scales)
        output: PhaseOutputs = self.module(
            input_ids=self.tokens[:, span.start : span.stop],
            position_ids=torch.from_numpy(positions).expand(batch, new),
            past_mask=torch.zeros(batch, 1, 1, past),
            new_mask=torch.full((new, new), MASKED).triu(1).expand(batch, 1, new, new),
            query_scale=scale.reshape(1, 1, new, 1).expand(batch, 1, new, 1),
            logits_at=torch.arange(new) if all_logits else torch.tensor([new - 1]),
            past_keys=past_keys,
            past_values=past_values,
            past_position_ids=torch.from_numpy(past_positions).expand(batch, past),
        )
        return output

    def _append(self, output: PhaseOutputs) -> None:
        self.keys = [torch.cat(pair, dim=2) for pair in zip(self.keys, output.keys, strict=True)]
        self.values = [torch.cat(pair, dim=2) for pair in zip(self.values, output.values, strict=True)]

    def _rerotate(self, keys: list[Tensor], old: NDArray[np.int64], new: NDArray[np.int64]) -> list[Tensor]:
        if np.array_equal(old, new):
            return keys
        from_ids, to_ids = torch.from_numpy(old)[None], torch.from_numpy(new)[None]
        return [
            key if spec.layout is None else self._rerotations[spec](key, from_ids, to_ids)
            for key, spec in zip(keys, self.module.layers, strict=True)
        ]

    def _ids(self, input_ids: TokenIds) -> Tensor:
        try:
            ids = torch.as_tensor(input_ids, dtype=torch.int64)
        except ValueError as error:
            raise InputError("the reference takes prompts of one length; run others one by one") from error
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.shape[1] == 0:
            raise InputError("the prompt is empty; give at least one token")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InputError(f"token ids must lie in 0..{self.vocab_size - 1}; got {int(ids.min())}..{int(ids.max())}")
        return ids
