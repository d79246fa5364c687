"""Mesa attention: what a model's own attention layers call while a phase is computed.

Registered with transformers under the name ``"mesa"``, so that any model that uses its attention interface can be
traced without code for its family. The keys and values of the past, the masks and the query scales come from the
:class:`AttentionInputs` of the running phase; the new keys and values are recorded there.

Axes: B batch, S new tokens, P past tokens, H heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mesart.graphs.bundle.names import MASKED
from mesart.graphs.errors import InputError
from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.model.attention_operator import OPERATOR, AttentionAttributes, AttentionOperands

if TYPE_CHECKING:
    from mesart.graphs.model.rotary import Rerotation

ATTENTION = "mesa"
"""The name of Mesa attention in transformers' attention interface."""

AttentionForm = Literal["unfused", "sdpa", "traced"]
"""How attention over past and new keys is computed; the results are equal.

``unfused``: scores of past and new keys apart, one softmax over both. ``sdpa``: keys joined, then torch's own
attention; layers that cap their scores (Gemma 2), have sinks (gpt-oss) or a bias by position (ALiBi) take the unfused
form in either case. ``traced``: not computed, only named in the graph, as the operator ``mesart::Attention``, which the
export writes out for each kind of engine.
"""

_UNSUPPORTED = ("head_mask", "position_bias", "block_mask", "indexer_mask")
"""Arguments that change the result of attention and that this function does not compute."""


@dataclass
class AttentionInputs:
    """What attention needs besides queries, keys and values, and what it leaves behind; one for each run of a phase."""

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
    extent: int
    """No two positions are as far apart."""
    position_ids: Tensor | None = None
    """Positions of the new tokens, int64 ``[B, S]``."""
    past_position_ids: Tensor | None = None
    """Positions of the past keys, int64 ``[B, P]``; only layers that look at positions need both."""
    sink_window: SinkWindow | None = None
    """What queries see, where that is not all that the masks show; the first slots of the past are the first tokens."""
    rotations: Sequence[Rerotation | None] = ()
    """What rotates queries and keys of each layer to other positions, for ``sink_window``."""
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
    attention_mask: Window | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Sequence[float] | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of new queries ``[B, H, S, D]`` to the past and to new keys and values ``[B, K, S, D]``.

    Args:
        attention_mask: what :func:`_stand_in` made of the model's mask; the masks themselves are inputs of the phase.
        sliding_window: a key is seen where its position is less than this before the query's. Positions, not tokens:
            on stairs the layer stays within the distances that it was trained on.
        softcap: scores are bent to stay within it.
        s_aux: a sink: one more score a head, for a key without value, ``[H]``.
        alibi_slopes: one for each head; times a key's position it is added to its scores. (The query's position would
            add the same to all of them.)

    Returns:
        The result ``[B, S, H, D]``, and no attention weights.

    Raises:
        MesaError: the model asks for something that this function would have to ignore.
    """
    inputs = _running.get()
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise InputError(f"{type(module).__name__} has no layer_idx: cannot tell which keys of the past are its own")
    for name in _UNSUPPORTED:
        if unused.get(name) is not None:
            raise InputError(
                f"layer {layer} ({type(module).__name__}) uses {name}, which Mesa attention does not compute"
            )
    if isinstance(attention_mask, Window):
        sliding_window = attention_mask.tokens  # some models say it by their mask alone
    elif attention_mask is not None:
        raise InputError(
            f"layer {layer} ({type(module).__name__}) makes a mask of its own, which Mesa attention ignores"
        )
    if layer in inputs.new_keys:
        raise InputError(
            f"layer {layer} ({type(module).__name__}) attends more than once; only one cache a layer is kept"
        )
    inputs.new_keys[layer], inputs.new_values[layer] = key, value
    # A window as long as positions are apart at most hides nothing.
    window = sliding_window if sliding_window is not None and sliding_window < inputs.extent else None
    by_position = window is not None or alibi_slopes is not None or inputs.sink_window is not None
    if by_position and (inputs.position_ids is None or inputs.past_position_ids is None):
        raise InputError(f"layer {layer} ({type(module).__name__}) looks at positions of keys; give past_position_ids")

    kv_heads, new = key.shape[1], key.shape[2]
    group = query.shape[1] // kv_heads
    head_size, value_size = query.shape[-1], value.shape[-1]
    scale = head_size**-0.5 if scaling is None else scaling
    query = query * (inputs.query_scale * scale).to(query.dtype)
    past_key, past_value = inputs.past_keys[layer], inputs.past_values[layer]
    far = None if inputs.sink_window is None else _far(inputs, inputs.sink_window, layer, query, past_key)
    if inputs.form == "traced":
        positions = (inputs.position_ids, inputs.past_position_ids) if by_position else (None, None)
        operands = AttentionOperands(
            query,
            key,
            value,
            past_key,
            past_value,
            inputs.past_mask,
            inputs.new_mask,
            *positions,
            s_aux,
            *(far or ()),
        )
        attributes = AttentionAttributes(
            layer,
            float(softcap or 0),
            window or 0,
            tuple(float(slope) for slope in alibi_slopes or ()),
            inputs.sink_window,
        )
        named: Tensor = torch.onnx.ops.symbolic(
            OPERATOR,
            operands.to_inputs(),
            attributes.to_attributes(),
            dtype=query.dtype,
            shape=(*query.shape[:3], value_size),
            version=1,
        )
        return named.transpose(1, 2).contiguous(), None
    masks = _masks(inputs, window, alibi_slopes)
    # Grouped queries share a key: fold the group into the rows, so that no key is repeated.
    query = query.reshape(-1, kv_heads, group * new, head_size)
    if inputs.form == "sdpa" and softcap is None and s_aux is None and alibi_slopes is None and far is None:
        output = _sdpa(query, key, value, past_key, past_value, masks, group)
    else:
        parts = [(query, past_key, past_value, masks[0]), (query, key, value, masks[1])]
        if far is not None:
            far_query, far_key = far[0].reshape(query.shape), far[1]
            first_value = past_value[:, :, : far_key.shape[2]]
            parts.append((far_query, far_key, first_value, _far_mask(inputs, window, alibi_slopes)))
        output = _unfused(parts, softcap, s_aux, group)
    return output.reshape(-1, kv_heads * group, new, value_size).transpose(1, 2).contiguous(), None


def _masks(inputs: AttentionInputs, window: int | None, slopes: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """What is added to the scores of past and new keys, ``[B, 1 or H, 1 or S, P]`` and ``[B, 1 or H, S, S]``."""
    if inputs.position_ids is None or inputs.past_position_ids is None:
        return inputs.past_mask, inputs.new_mask
    result = []
    for mask, keys in ((inputs.past_mask, inputs.past_position_ids), (inputs.new_mask, inputs.position_ids)):
        keys, queries = keys[:, None, None, :], inputs.position_ids[:, None, :, None]
        if window is not None:
            mask = mask.where(queries - keys < window, MASKED)
        if inputs.sink_window is not None:
            mask = mask.where(
                queries - keys.clamp(min=inputs.sink_window.min_position) < inputs.sink_window.window, MASKED
            )
        if slopes is not None:
            mask = mask + torch.tensor(slopes)[None, :, None, None] * keys
        result.append(mask)
    return result[0], result[1]


def _far(
    inputs: AttentionInputs, sink_window: SinkWindow, layer: int, query: Tensor, past_key: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, S, D]`` and the keys of the first tokens ``[B, K, F, D]`` as they meet beyond the window."""
    assert inputs.position_ids is not None
    assert inputs.past_position_ids is not None
    keys, rotate = past_key[:, :, : sink_window.sinks], inputs.rotations[layer]
    if rotate is None:
        return query, keys
    if sink_window.sinks_at_zero:
        positions = inputs.past_position_ids[:, : sink_window.sinks]
        keys = rotate(keys, positions, torch.zeros_like(positions))
    return rotate(query, inputs.position_ids, torch.full_like(inputs.position_ids, sink_window.query_position)), keys


def _far_mask(inputs: AttentionInputs, window: int | None, slopes: Sequence[float] | None) -> Tensor:
    """What is added to the scores of the first tokens beyond the window, ``[B, 1 or H, S, F]``."""
    sink_window = inputs.sink_window
    assert sink_window is not None
    assert inputs.position_ids is not None
    assert inputs.past_position_ids is not None
    queries, keys = inputs.position_ids[:, None, :, None], inputs.past_position_ids[:, None, None, : sink_window.sinks]
    seen = queries - keys.clamp(min=sink_window.min_position) >= sink_window.window
    if window is not None:
        seen = seen & (queries - keys < window)
    mask = inputs.past_mask[..., : sink_window.sinks].where(seen, MASKED)
    if slopes is not None:
        # As far away as they seem: in the scores of the others the query's own position is left out.
        apparent = queries - sink_window.query_position + (0 if sink_window.sinks_at_zero else keys)
        mask = mask + torch.tensor(slopes)[None, :, None, None] * apparent
    return mask


def _unfused(
    sources: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    softcap: float | None,
    sinks: Tensor | None,
    group: int,
) -> Tensor:
    """One softmax over all sources: queries ``[B, K, G * S, D]``, keys and values ``[B, K, X, D]``, what is added."""
    kv_heads, new = sources[0][0].shape[1], sources[0][0].shape[2] // group
    parts = []
    for query, keys, _, mask in sources:
        scores = query @ keys.transpose(-1, -2)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        apart = scores.float().reshape(len(scores), kv_heads, group, new, keys.shape[2])
        # One mask for all heads, or one for each.
        apart = apart + (
            mask.unsqueeze(1) if mask.shape[1] == 1 else mask.reshape(len(mask), kv_heads, group, *mask.shape[2:])
        )
        parts.append(apart)
    if sinks is not None:
        parts.append(sinks.float().reshape(1, kv_heads, group, 1, 1).expand(*parts[0].shape[:4], 1))
    weights = torch.cat(parts, dim=-1).softmax(dim=-1).to(query.dtype).flatten(2, 3)
    output, start = None, 0
    for _, keys, values, _ in sources:
        part = weights[..., start : start + keys.shape[2]] @ values
        output, start = part if output is None else output + part, start + keys.shape[2]
    assert output is not None
    return output


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    masks: tuple[Tensor, Tensor],
    group: int,
) -> Tensor:
    past_mask, new_mask = masks
    batch, new, past = new_mask.shape[0], key.shape[2], past_key.shape[2]
    mask = torch.cat([past_mask.expand(batch, 1, new, past), new_mask], dim=-1).to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([past_key, key], dim=2),
        torch.cat([past_value, value], dim=2),
        attn_mask=mask.repeat(1, 1, group, 1),
        scale=1.0,
    )


@dataclass(frozen=True)
class Window:
    """Stands in for the mask of a sliding window."""

    tokens: int


def _stand_in(*_: Any, local_size: int | None = None, **__: Any) -> Window | None:
    """Masks are inputs of the phase; transformers need not make one, only say how far it would reach."""
    return None if local_size is None else Window(local_size)


AttentionInterface.register(ATTENTION, mesa_attention)
AttentionMaskInterface.register(ATTENTION, _stand_in)
