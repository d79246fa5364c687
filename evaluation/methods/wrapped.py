"""A model whose attention layers hand unturned queries and keys to the executor; the model given is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mesart.evaluation.methods.method import Positions
from mesart.evaluation.methods.rotation import frequencies
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.model.attention import Window
from mesart.graphs.model.phase_module import PhaseModule, scaled_by_position

ATTENTION = "mesa-methods"
"""The name of the executor's attention in transformers' attention interface."""

Attend = Callable[..., Tensor]
running: ContextVar[Attend] = ContextVar("mesa_methods_attend")
"""Computes the attention of one layer for the run in progress: ``Execution.attend``."""


class WrappedModel:
    """A copy of a model's modules that shares its weights, and what its layers' attention is like.

    Run at position 0, where a rotary embedding is the identity up to the scale that some models put into it, the
    model's own code hands over queries and keys that are not turned yet.

    Raises:
        MesaError: the architecture cannot be run so; the message names the part.
    """

    def __init__(self, model: nn.Module, train_length: int) -> None:
        phases = PhaseModule(model, MesaConfig(train_length))
        config: Any = phases.config
        scaled = scaled_by_position(config)
        if scaled is not None:
            raise InputError(
                f"{type(model).__name__} scales its queries by their positions ({scaled}), which are all 0 here"
            )
        self.layers = phases.layers
        self.frequencies = _frequencies(phases, slice(0, train_length))
        """Radians a position, float64 ``[R / 2]`` a layer; none for a layer that does not turn."""
        self.short_length = phases.method.short_length
        """Texts of up to so many tokens have other frequencies (LongRoPE); 0: none have."""
        short = slice(train_length, train_length + self.short_length)
        self._short_frequencies = _frequencies(phases, short) if self.short_length else self.frequencies
        self._first_row = {False: 0, True: train_length}
        self.vocabulary = int(config.get_text_config().vocab_size)
        self._model = phases.model
        self._redirect(model)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        parameter: Tensor = next(self._model.parameters())
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Its weights' type."""
        parameter: Tensor = next(self._model.parameters())
        return parameter.dtype

    def frequencies_of(self, total: int) -> list[Positions | None]:
        """The frequencies of a text of ``total`` tokens."""
        return self._short_frequencies if total <= self.short_length else self.frequencies

    @torch.inference_mode()
    def run(self, tokens: list[int], keep: int, attend: Attend, total: int) -> Tensor:
        """Logits of the last ``keep`` of some tokens, ``[keep, V]``, with the attention that ``attend`` computes.

        ``total``: the number of tokens of the whole text.
        """
        ids = torch.tensor([tokens], device=self.device)
        reset = running.set(attend)
        try:
            output = self._model(
                input_ids=ids,
                position_ids=torch.full_like(ids, self._first_row[total <= self.short_length]),
                use_cache=False,
                # By index: told a number, Gemma 4 leaves queries out that the executor expects.
                logits_to_keep=torch.arange(len(tokens) - keep, len(tokens), device=self.device),
            )
        finally:
            running.reset(reset)
        logits: Tensor = output.logits[0]
        return logits

    def _redirect(self, model: Any) -> None:
        """Makes the copy's layers call the executor, and its experts run as the given model's do."""
        self._model.set_experts_implementation(model.get_experts_implementation())
        adapted = False
        for module in self._model.modules():
            forward = type(module).forward
            if forward.__module__.startswith("mesart.graphs.model.adapters."):
                # An adapter's layer calls Mesa attention by name: here the name means the executor's attention.
                names = {**forward.__globals__, "mesa_attention": _attention}
                module.forward = MethodType(
                    FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__),
                    module,
                )
                adapted = True
        if not adapted:
            self._model.set_attn_implementation(ATTENTION)


def _frequencies(phases: PhaseModule, rows: slice) -> list[Positions | None]:
    tables = {name: (cos[rows], sin[rows]) for name, (cos, sin) in phases.tables.items()}
    return [None if layer.layout is None else frequencies(tables[layer.table], layer) for layer in phases.layers]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Any = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What the model's layers call, see :func:`mesart.graphs.model.attention.mesa_attention` for the arguments."""
    del dropout
    for name in ("head_mask", "position_bias", "block_mask", "indexer_mask"):
        if unused.get(name) is not None:
            raise InputError(f"{type(module).__name__} uses {name}, which is not computed here")
    if isinstance(attention_mask, Window):
        sliding_window = attention_mask.tokens
    elif attention_mask is not None:
        raise InputError(f"{type(module).__name__} makes a mask of its own, which would be ignored here")
    output = running.get()(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        slopes=alibi_slopes,
    )
    return output.transpose(1, 2).contiguous(), None


def _stand_in(*_: Any, local_size: int | None = None, **__: Any) -> Window | None:
    """The rule says what a query sees; a model's mask only how far a layer's window reaches."""
    return None if local_size is None else Window(local_size)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _stand_in)
