"""A model as a function of data: one module that computes every phase (prefix, chunk, tail, decode).

The phases differ only in their inputs: which positions, which masks, which past. This module is what is traced, and
what the reference runs.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mesart.graphs.errors import InputError
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.model.adapters import prepare
from mesart.graphs.model.attention import AttentionForm, AttentionInputs, attention_inputs
from mesart.graphs.model.rotary import LayerSpec, Rerotation, probe_layers


class PhaseOutputs(NamedTuple):
    """What a phase computes."""

    logits: Tensor
    """float32 ``[B, M, V]``, of the tokens that ``logits_at`` names."""
    keys: list[Tensor]
    values: list[Tensor]
    """New keys and values, ``[B, K, S, D]``, a layer each, keys rotated to ``position_ids``."""


class PhaseModule(nn.Module):
    """Wraps a transformers causal language model; shares its weights and leaves the model itself as it was.

    Args:
        model: a causal language model with rotary embeddings; it may lie on the meta device for tracing.
        method: what to compute, with its ``train_length``.
        form: see :data:`~mesart.graphs.model.attention.AttentionForm`.

    Raises:
        MesaError: the architecture cannot be traced; the message names the part.
    """

    model: Any
    config: Any

    def __init__(self, model: nn.Module, method: StaticMethod, form: AttentionForm = "unfused") -> None:
        super().__init__()
        shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.model = copy.deepcopy(model, shared).eval()
        self.config = self.model.config
        if getattr(self.config, "is_encoder_decoder", False) or self.model.get_output_embeddings() is None:
            raise InputError(
                f"{type(model).__name__} is no causal language model; it has no decoder with a language head"
            )
        self.form: AttentionForm = form
        table = prepare(self.model, method.train_length, method.extent)
        self.method = method = _with_short_length(method, table.short_length, self.model)
        """What it computes, and with it what only the model tells (``short_length``)."""
        self.layers: list[LayerSpec] = probe_layers(self.model, table)
        count = int(self.config.num_hidden_layers)
        if len(self.layers) != count:
            raise InputError(
                f"{type(model).__name__} has {count} layers, of which {len(self.layers)} use transformers' attention "
                "interface; all must"
            )
        device = next(self.model.parameters()).device
        self.sink_window = method.sink_window
        if method.rotary_only and all(spec.layout is None for spec in self.layers):
            raise InputError(
                f"{method.name} changes rotary positions, and {type(model).__name__} has none (ALiBi or NoPE); "
                "use origin, mesa, streaming-llm or lm-infinite on it"
            )

        def change(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            cosines, sines = method.rotary_table(cos.numpy(), sin.numpy())
            return torch.from_numpy(cosines), torch.from_numpy(sines)

        table.replace(change)
        self._table = table.to(device)
        rotations = {
            spec: self.rerotation(spec).to(device)
            for spec in self.layers
            if self.sink_window and spec.layout is not None
        }
        self._rotation_modules = nn.ModuleList(rotations.values())  # known to torch, in the order of their first layers
        self._rotations = [rotations.get(spec) for spec in self.layers]

    @property
    def tables(self) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin of each layer type, float32 ``[positions, R]``, with numbers even if the model has none."""
        return self._table.values

    def rerotation(self, layer: LayerSpec) -> Rerotation:
        """The module that rotates the keys of such a layer to other positions."""
        if layer.layout is None:
            raise ValueError("a layer that does not rotate its keys has nothing to re-rotate")
        return Rerotation(self.tables[layer.table], layer)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_mask: Tensor,
        new_mask: Tensor,
        query_scale: Tensor,
        logits_at: Tensor,
        past_keys: list[Tensor],
        past_values: list[Tensor],
        past_position_ids: Tensor | None = None,
    ) -> PhaseOutputs:
        """Runs the model on new tokens.

        Args:
            input_ids: int64 ``[B, S]``.
            position_ids: int64 ``[B, S]``, each below ``method.positions``.
            past_mask: float32 ``[B, 1, 1, P]``.
            new_mask: float32 ``[B, 1, S, S]``.
            query_scale: float32 ``[B, 1, S, 1]``.
            logits_at: int64 ``[M]``, indices of the new tokens whose logits are wanted.
            past_keys: a layer each ``[B, K, P, D]``.
            past_values: a layer each ``[B, K, P, D]``.
            past_position_ids: int64 ``[B, P]``, the positions of the past keys; only some models need it.
        """
        inputs = AttentionInputs(
            self.form,
            past_mask,
            new_mask,
            query_scale,
            past_keys,
            past_values,
            self.method.extent,
            position_ids,
            past_position_ids,
            self.sink_window,
            self._rotations,
        )
        with attention_inputs(inputs):
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_at
            )
        missing = set(range(len(self.layers))) - set(inputs.new_keys)
        if missing:
            raise InputError(f"layer {min(missing)} computed no keys through transformers' attention interface")
        order = range(len(self.layers))
        return PhaseOutputs(
            output.logits.float(), [inputs.new_keys[i] for i in order], [inputs.new_values[i] for i in order]
        )


def _with_short_length(method: StaticMethod, found: int, model: Any) -> StaticMethod:
    """The method with the length of short texts that was found in the model."""
    name = type(model).__name__
    if method.short_length not in (0, found):
        raise InputError(f"short_length is {method.short_length}, but that of {name} is {found}; leave it out")
    if not found:
        return method
    if method.sink_window is not None:
        raise InputError(
            f"{name} rotates texts of up to {found} tokens by frequencies of their own (LongRoPE), so longer ones are "
            "computed again from their start, and a method that drops keys could not; use origin or mesa on it"
        )
    if scaled_by_position(model.config):
        raise InputError(
            f"{name} rotates texts of up to {found} tokens by frequencies of their own (LongRoPE), and scales its "
            f"queries by their positions; export with train_length <= {found}"
        )
    return dataclasses.replace(method, short_length=found)


def scaled_by_position(config: Any) -> str | None:
    """What makes a model scale its queries by their positions, if anything does; the name in its configuration."""
    text = config.get_text_config()
    for name in ("attn_temperature_tuning", "llama_4_scaling_beta"):
        if getattr(text, name, None) or (getattr(text, "rope_parameters", None) or {}).get(name):
            return name
    return None
