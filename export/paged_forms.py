"""Graphs that write new keys and values into the cache where it lies, by operators made for it; no mask exists.

A query sees all tokens of its text before it, in the order of their slots: true of a head, of a chunk behind it, of a
tail and of a decoding text. So one graph serves them all, and any of them side by side.

``paged``: tokens of many texts behind one another, ``[1, T]``; the cache is blocks of :data:`BLOCK` slots, of which
each text names its own. The operator is ``mesart::PagedAttention``; an engine that has one puts its own in its place
when it loads the graph. ``grouped``: texts are rows, ``[B, S]``, each with slots of its own;
``com.microsoft::GroupQueryAttention``, onnxruntime's.
"""

from __future__ import annotations

import onnx_ir as ir

from mesart.export.forms import LayerAttention
from mesart.export.specialise import specialise
from mesart.export.trace import merge_equal, tidy_names
from mesart.graphs.bundle.names import (
    BLOCK,
    KINDS,
    MAX_CONTEXT_LEN,
    NEW_MASK,
    PAGED_DOMAIN,
    PAGED_INPUTS,
    PAST_MASK,
    PAST_POSITION_IDS,
    PRESENT,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
    present_name,
)
from mesart.graphs.model.attention_operator import DOMAIN

_MICROSOFT = "com.microsoft"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def with_paged_attention(traced: ir.Model) -> ir.Model | None:
    """The ``paged`` form of a traced graph, or ``None`` if a layer's attention asks for more than the operator says.

    Inputs, beside those of the traced graph that are left: keys and values ``[N, K, 32, D]``, N blocks, written in
    place; ``past_lens`` int32 ``[texts]``; ``subsequence_begins`` int32 ``[texts + 1]``, where each text's tokens begin
    among T; ``block_indices`` int32, the blocks of all texts behind one another, and ``block_indices_begins``
    int32 ``[texts + 1]``; ``max_context_len`` int32, the most tokens that a text has with its new ones.
    """
    if not all(_is_plain(attention) for attention in _layers(traced)):
        return None
    model = traced.clone()
    extra = [
        _add_input(model, name, ir.DataType.INT32, [] if name == MAX_CONTEXT_LEN else [axis])
        for name, axis in PAGED_INPUTS.items()
    ]
    for attention in _layers(model):
        query, key, value = (
            _flat(attention, x, 0) for x in (attention.operands.query, attention.operands.key, attention.operands.value)
        )
        output = attention.tape.op(
            "PagedAttention",
            [query, key, value, attention.operands.past_key, attention.operands.past_value, *extra],
            {"kv_num_heads": attention.kv_heads, "head_size": attention.head_size},
            domain=PAGED_DOMAIN,
        )
        _name(output, attention.operands.query.dtype, ["T", attention.heads * attention.value_size])
        _finish(attention, output)
        for cache in (attention.operands.past_key, attention.operands.past_value):
            assert cache.shape is not None
            cache.shape = ir.Shape(["N", attention.kv_heads, BLOCK, cache.shape[3]])
    _without_masks(model)
    model.opset_imports[PAGED_DOMAIN] = 1  # the domain of the traced operator too, which is gone
    return specialise(model, {"B": 1})


def with_grouped_attention(traced: ir.Model) -> ir.Model | None:
    """The ``grouped`` form of a traced graph, or ``None`` if a layer's attention asks for more than the operator says.

    Inputs, beside those of the traced graph that are left: keys and values ``[B, K, P, D]``, given as ``present`` again
    with the new ones written in place; ``seqlens_k`` int32 ``[B]``, tokens of a row with its new ones, less one;
    ``total_sequence_length`` int32, the most tokens of a row with its new ones.
    """
    layers = _layers(traced)
    if not all(_is_plain(x) and x.dtype in _FLOATS for x in layers):
        return None
    model = traced.clone()
    lengths = [
        _add_input(model, SEQLENS_K, ir.DataType.INT32, ["B"]),
        _add_input(model, TOTAL_SEQUENCE_LENGTH, ir.DataType.INT32, []),
    ]
    for attention in _layers(model):
        query, key, value = (
            _flat(attention, x, 1) for x in (attention.operands.query, attention.operands.key, attention.operands.value)
        )
        outputs = attention.tape.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, attention.operands.past_key, attention.operands.past_value, *lengths],
            {"num_heads": attention.heads, "kv_num_heads": attention.kv_heads, "scale": 1.0},
            num_outputs=3,
            domain=_MICROSOFT,
        )
        _name(outputs[0], attention.operands.query.dtype, ["B", "S", attention.heads * attention.value_size])
        for kind, past, present in zip(
            KINDS, (attention.operands.past_key, attention.operands.past_value), outputs[1:], strict=True
        ):
            _give(model, present_name(attention.attributes.layer, kind), present, past)
        _finish(attention, outputs[0])
    model.opset_imports[_MICROSOFT] = 1
    _without_masks(model)
    merge_equal(model)
    tidy_names(model)
    return model


def _layers(model: ir.Model) -> list[LayerAttention]:
    return [LayerAttention(model, node, rows=True) for node in model.graph if node.domain == DOMAIN]


def _is_plain(attention: LayerAttention) -> bool:
    """Whether all that a query is told is which keys come before it: no positions, no capped scores, no sinks."""
    return attention.standard and not attention.attributes.window and attention.head_size == attention.value_size


def _flat(attention: LayerAttention, value: ir.Value, axes: int) -> ir.Value:
    """``[B, H, S, D]`` to ``[B, S, H * D]``, or with no axes before the last to ``[B * S, H * D]``."""
    assert value.shape is not None
    width = int(value.shape[1]) * int(value.shape[3])  # type: ignore[arg-type]
    rows = attention.op("Transpose", value, perm=[0, 2, 1, 3])
    return attention.op("Reshape", rows, attention.ints(*[0] * axes, -1, width))


def _finish(attention: LayerAttention, output: ir.Value) -> None:
    """Puts the operators in the place of the traced one, whose output is ``[B, H, S, D]``."""
    node, graph = attention.node, attention.model.graph
    first = [1] if len(output.shape or ()) == 2 else [0]
    apart = attention.op("Reshape", output, attention.ints(*first, -1, attention.heads, attention.value_size))
    result = attention.op("Transpose", apart, perm=[0, 2, 1, 3])
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, attention.tape.nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], result)
    graph.remove(node, safe=True)


def _give(model: ir.Model, name: str, value: ir.Value, like: ir.Value) -> None:
    """Makes a value the output of that name."""
    outputs = model.graph.outputs
    index = next(i for i, output in enumerate(outputs) if output.name == name)
    outputs[index].name = None
    outputs[index] = value
    value.name, value.shape, value.type = name, like.shape, like.type


def _without_masks(model: ir.Model) -> None:
    """Takes out what the operators need no more: masks, and outputs of new keys and values that no one reads."""
    for value in list(model.graph.outputs):
        if (value.name or "").startswith(PRESENT) and not _written_in_place(value):
            model.graph.outputs.remove(value)
    for value in list(model.graph.inputs):
        if value.name in (PAST_MASK, NEW_MASK, PAST_POSITION_IDS):
            model.graph.inputs.remove(value)
    model.opset_imports.pop(DOMAIN, None)


def _written_in_place(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "GroupQueryAttention"


def _add_input(model: ir.Model, name: str, dtype: ir.DataType, shape: list[str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    return value


def _name(value: ir.Value, dtype: ir.DataType | None, shape: list[str | int]) -> None:
    assert dtype is not None
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)


__all__ = ["with_grouped_attention", "with_paged_attention"]
