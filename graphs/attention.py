"""Mesa attention: what a model's own attention layers call while a role is computed.

Registered with transformers under the name ``"mesa"``, so that any model that uses its attention interface can be
traced without code for its family. The keys and values of the past, the masks and the query scales come from the
:class:`AttentionInputs` of the running role; the new keys and values are recorded there.

Axes: B batch, S new tokens, P past tokens, H heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mesart.graphs.errors import MesaError

AttentionForm = Literal["split", "fused", "traced"]
"""How attention over past and new keys is computed; the results are equal.

``split``: scores of past and new keys apart, one softmax over both. ``fused``: keys joined, then torch's own attention;
layers that cap their scores (Gemma 2) take the split form in either case. ``traced``: not computed, only named in the
graph, as the operator ``mesart::Attention``, which the export writes out for each kind of engine.
"""

_UNSUPPORTED = ("s_aux", "head_mask", "position_bias", "block_mask")
"""Arguments that change the result of attention and that this function does not compute."""


@dataclass
class AttentionInputs:
    """What attention needs besides queries, keys and values, and what it leaves behind; one for each run of a role."""

    form: AttentionForm
    past_mask: Tensor
    """Added to the scores of past keys, float32 ``[B, 1, 1, P]``: 0 or very negative."""
    new_mask: Tensor
    """Added to the scores of new keys, float32 ``[B, 1, S, S]``."""
    query_scale: Tensor
    """Multiplies the queries (log-n scaling), float32 ``[B, 1, S, 1]``."""
    past_keys: list[Tensor]
    past_values: list[Tensor]
    """``[B, K, P, D]`` each, a layer each."""
    train_length: int
    new_keys: dict[int, Tensor] = field(default_factory=dict)
    new_values: dict[int, Tensor] = field(default_factory=dict)


_running: ContextVar[AttentionInputs] = ContextVar("mesa_attention_inputs")


@contextmanager
def attention_inputs(inputs: AttentionInputs) -> Iterator[AttentionInputs]:
    """Makes ``inputs`` the ones that the model's attention layers use."""
    token = _running.set(inputs)
    try:
        yield inputs
    finally:
        _running.reset(token)


def mesa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of new queries ``[B, H, S, D]`` to the past and to new keys and values ``[B, K, S, D]``.

    Returns:
        The result ``[B, S, H, D]``, and no attention weights.

    Raises:
        MesaError: the model asks for something that this function would have to ignore.
    """
    inputs = _running.get()
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise MesaError(f"{type(module).__name__} has no layer_idx: cannot tell which keys of the past are its own")
    for name in _UNSUPPORTED:
        if unused.get(name) is not None:
            raise MesaError(
                f"layer {layer} ({type(module).__name__}) uses {name}, which Mesa attention does not compute"
            )
    if sliding_window is not None and sliding_window < inputs.train_length:
        raise MesaError(
            f"layer {layer} ({type(module).__name__}) slides a window of {sliding_window} tokens, less than "
            f"train_length = {inputs.train_length}; export with train_length <= {sliding_window}"
        )
    inputs.new_keys[layer], inputs.new_values[layer] = key, value

    kv_heads, new = key.shape[1], key.shape[2]
    group = query.shape[1] // kv_heads
    head_size, value_size = query.shape[-1], value.shape[-1]
    scale = head_size**-0.5 if scaling is None else scaling
    query = query * (inputs.query_scale * scale).to(query.dtype)
    past_key, past_value = inputs.past_keys[layer], inputs.past_values[layer]
    if inputs.form == "traced":
        named: Tensor = torch.onnx.ops.symbolic(
            "mesart::Attention",
            (query, key, value, past_key, past_value, inputs.past_mask, inputs.new_mask),
            {"layer": layer, "softcap": float(softcap or 0)},
            dtype=query.dtype,
            shape=(*query.shape[:3], value_size),
            version=1,
        )
        return named.transpose(1, 2), None
    # Grouped queries share a key: fold the group into the rows, so that no key is repeated.
    query = query.reshape(-1, kv_heads, group * new, head_size)
    if inputs.form == "fused" and softcap is None:
        output = _fused(query, key, value, past_key, past_value, inputs, group)
    else:
        output = _split(query, key, value, past_key, past_value, inputs, softcap, group)
    return output.reshape(-1, kv_heads * group, new, value_size).transpose(1, 2), None


def _split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    inputs: AttentionInputs,
    softcap: float | None,
    group: int,
) -> Tensor:
    past, new = past_key.shape[2], key.shape[2]
    past_scores = query @ past_key.transpose(-1, -2)
    new_scores = query @ key.transpose(-1, -2)
    if softcap is not None:
        past_scores = (past_scores / softcap).tanh() * softcap
        new_scores = (new_scores / softcap).tanh() * softcap
    past_scores = past_scores.float() + inputs.past_mask
    # The mask is the same for each query of a group.
    grouped = new_scores.float().reshape(-1, key.shape[1], group, new, new) + inputs.new_mask.unsqueeze(1)
    new_scores = grouped.reshape(-1, key.shape[1], group * new, new)
    weights = torch.cat([past_scores, new_scores], dim=-1).softmax(dim=-1).to(query.dtype)
    return weights[..., :past] @ past_value + weights[..., past:] @ value


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    inputs: AttentionInputs,
    group: int,
) -> Tensor:
    batch, new, past = inputs.new_mask.shape[0], key.shape[2], past_key.shape[2]
    mask = torch.cat([inputs.past_mask.expand(batch, 1, new, past), inputs.new_mask], dim=-1).to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([past_key, key], dim=2),
        torch.cat([past_value, value], dim=2),
        attn_mask=mask.repeat(1, 1, group, 1),
        scale=1.0,
    )


def _no_mask(*_: Any, **__: Any) -> None:
    """Masks are inputs of the role; transformers need not make one."""


AttentionInterface.register("mesa", mesa_attention)
AttentionMaskInterface.register("mesa", _no_mask)
