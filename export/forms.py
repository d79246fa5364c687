"""How a graph computes attention: the traced graph names it only; each form writes it out for a kind of engine.

The results are equal. Axes: B batch, S new tokens, P past tokens or slots of the cache, A slots attended to, H heads, K
key-value heads, G = H / K, D head size.

``unfused``: scores of past and new keys apart, one softmax over both. Nothing of the past is copied: for engines that
run plain matrix products well. Queries that share a key are the rows of one product. ``unfused_per_head``: the same,
but a product for each query head, which makes vectors of the rows of one token: onnxruntime multiplies a vector with
the cache as it lies, and copies it into another order for more rows than one. ``attention_op``: keys joined, then the
standard ``Attention`` operator: for engines with a kernel for it. ``kv_in_place``: new keys are written into the cache
by ``TensorScatter``, then ``Attention`` over the cache, with a mask that the graph makes of ``write_at``: for engines
that keep the cache on a device (opset 24).

Written out in every form are capped scores, which TensorRT's ``Attention`` refuses, and what the operator cannot say:
sinks and ALiBi's bias of each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

from mesart.export.trace import merge_equal, tidy_names
from mesart.graphs.bundle.names import (
    ATTENDED,
    INPUT_IDS,
    KINDS,
    MASKED,
    NEW_MASK,
    PAST_MASK,
    WRITE_AT,
    Kind,
    present_name,
)
from mesart.graphs.model.attention_operator import DOMAIN, AttentionAttributes, AttentionOperands

Form = Literal["unfused", "unfused_per_head", "attention_op", "kv_in_place"]

_KV_IN_PLACE_OPSET = 24
"""``TensorScatter``."""

_END = 2**63 - 1


def with_attention(traced: ir.Model, form: Form) -> ir.Model:
    """A copy of a traced graph with its attention written out.

    Inputs and outputs are those of :func:`~mesart.export.trace.trace_phases`, but for ``kv_in_place``: instead of the
    masks it has ``write_at`` (int64 ``[B]``, the slot of the first new token) and ``attended`` (int64 ``[A]``,
    0 .. A - 1); its caches are ``[B, K, P, D]`` with P >= A, and it gives the written ones as ``present``. Its
    ``past_position_ids``, if it has them, are those of all slots, also of the new tokens.
    """
    model = traced.clone()
    if form == "kv_in_place":
        _add_write_inputs(model)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _replace(model, node, form)
    model.opset_imports.pop(DOMAIN, None)
    if form == "kv_in_place":
        model.opset_imports[""] = _KV_IN_PLACE_OPSET
        for name in (PAST_MASK, NEW_MASK):
            model.graph.inputs.remove(_input(model, name))
    merge_equal(model)
    tidy_names(model)
    return model


def _replace(model: ir.Model, node: ir.Node, form: Form) -> None:
    attention = LayerAttention(model, node, rows=form != "unfused_per_head")
    write: dict[Form, Callable[[], ir.Value]] = {
        "unfused": attention.unfused,
        "unfused_per_head": attention.unfused,
        "attention_op": attention.attention_op,
        "kv_in_place": attention.kv_in_place,
    }
    output = write[form]()
    output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
    model.graph.insert_before(node, attention.tape.nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], output)
    model.graph.remove(node, safe=True)


class LayerAttention:
    """The operators of one layer's attention.

    Queries that share a key, a group, are ``rows`` of one product, ``[B, K, G * S, D]``, so that no key is repeated; or
    have an axis of their own, ``[B, K, G, S, D]``, along which keys and masks have the extent 1.
    """

    def __init__(self, model: ir.Model, node: ir.Node, *, rows: bool) -> None:
        self.model, self.node, self.tape, self.rows = model, node, ir.tape.Tape(), rows
        self.operands = AttentionOperands[ir.Value].from_node(node.inputs)
        self.attributes = AttentionAttributes.from_node({name: x.value for name, x in node.attributes.items()})
        query, key, value = self.operands.query, self.operands.key, self.operands.value
        assert query.shape is not None
        assert key.shape is not None
        assert value.shape is not None
        self.heads, self.kv_heads = int(query.shape[1]), int(key.shape[1])  # type: ignore[arg-type]
        self.head_size, self.value_size = int(query.shape[3]), int(value.shape[3])  # type: ignore[arg-type]
        assert query.dtype is not None
        self.dtype = query.dtype

    @property
    def standard(self) -> bool:
        """Whether the standard operator says it, on every engine."""
        return (
            self.operands.sinks is None
            and self.attributes.sink_window is None
            and not self.attributes.slopes
            and not self.attributes.softcap
        )

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def op(
        self, kind: str, *inputs: ir.Value | None, **attributes: float | int | str | list[int] | list[float]
    ) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def ints(self, *values: int) -> ir.Value:
        return self.op("Constant", value_ints=list(values))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The extent of an axis, int64 ``[1]``."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def cast(self, value: ir.Value, old: ir.DataType, new: ir.DataType) -> ir.Value:
        return value if old == new else self.op("Cast", value, to=new.value)

    @property
    def group_axis(self) -> bool:
        """Whether the queries of a group have an axis of their own."""
        return self.group > 1 and not self.rows

    def grouped(self, query: ir.Value) -> ir.Value:
        """``[B, H, S, D]`` to ``[B, K, G * S, D]`` or ``[B, K, G, S, D]``."""
        if self.group == 1:
            return query
        apart = [self.group] if self.group_axis else []
        return self.op("Reshape", query, self.ints(0, self.kv_heads, *apart, -1, self.head_size))

    def ungrouped(self, output: ir.Value) -> ir.Value:
        """Back to ``[B, H, S, D]``."""
        if self.group == 1:
            return output
        return self.op("Reshape", output, self.ints(0, self.heads, -1, self.value_size))

    def for_group(self, shared: ir.Value) -> ir.Value:
        """What all queries of a group share, ``[B, K or 1, X, Y]``, with an axis for them where they have one."""
        return self.op("Unsqueeze", shared, self.ints(2)) if self.group_axis else shared

    def for_rows(self, mask: ir.Value) -> ir.Value:
        """The same for what differs from new token to new token, ``[B, 1, S, X]``."""
        if self.group == 1 or self.group_axis:
            return self.for_group(mask)
        return self.op("Tile", mask, self.ints(1, 1, self.group, 1))

    def each_row(self, heads: ir.Value) -> ir.Value:
        """A number of each head, ``[H]``, for the rows of grouped queries."""
        if self.group_axis:
            return self.op("Reshape", heads, self.ints(1, self.kv_heads, self.group, 1, 1))
        new = self.size(self.operands.key, 2) if self.group > 1 else self.ints(1)
        repeats = self.op("Concat", self.ints(1, 1, 1), new, axis=0)
        apart = self.op("Tile", self.op("Reshape", heads, self.ints(1, self.kv_heads, self.group, 1)), repeats)
        return self.op("Reshape", apart, self.ints(1, self.kv_heads, -1, 1))

    def masked_beyond_window(self, mask: ir.Value, key_positions: ir.Value) -> ir.Value:
        """The mask of keys at ``key_positions``, ``[B, X]``, where the window ends: ``[B, 1, S, X]``."""
        seen = self.within(key_positions, self.attributes.window)
        if mask.dtype == ir.DataType.BOOL:
            return self.op("And", mask, seen)
        return self.op("Where", seen, mask, _float(self, MASKED))

    def within(self, key_positions: ir.Value, window: int, min_position: int = 0) -> ir.Value:
        """Whether a query is less than ``window`` behind a key, none of which count as before ``min_position``."""
        keys = self.op("Unsqueeze", key_positions, self.ints(1, 2))
        if min_position:
            keys = self.op("Max", keys, _scalar(self, min_position))
        return self.op("Less", self.op("Sub", self.queries(), keys), _scalar(self, window))

    def queries(self) -> ir.Value:
        """Positions of the queries, ``[B, 1, S, 1]``."""
        assert self.operands.positions is not None
        return self.op("Unsqueeze", self.operands.positions, self.ints(1, 3))

    def biased(self, scores: ir.Value, key_positions: ir.Value) -> ir.Value:
        """ALiBi's bias of keys at ``[B, 1, 1 or G * S, X]``, or ``[B, 1, 1, 1 or S, X]``."""
        keys = self.op("Cast", key_positions, to=ir.DataType.FLOAT.value)
        slopes = self.each_row(self.op("Constant", value_floats=list(self.attributes.slopes)))
        return self.op("Add", scores, self.op("Mul", slopes, keys))

    def unfused(self) -> ir.Value:
        query = self.grouped(self.operands.query)
        scores = self.op(
            "Concat", *(self.scores(query, keys) for keys in (self.operands.past_key, self.operands.key)), axis=-1
        )
        mask = self.joint_mask()
        if self.attributes.sink_window is not None:
            near = self.within(
                self.joint_positions(), self.attributes.sink_window.window, self.attributes.sink_window.min_position
            )
            mask = self.op("Where", near, mask, _float(self, MASKED))
        scores = self.op("Add", scores, self.for_rows(mask))
        if self.attributes.slopes:
            positions = self.op("Unsqueeze", self.joint_positions(), self.ints(1, 2))
            scores = self.biased(scores, self.for_group(positions))
        parts, values = [scores], [self.operands.past_value, self.operands.value]
        if self.operands.far_key is not None:
            parts.append(self.far_scores())
            first = self.size(self.operands.far_key, 2)
            values.append(self.op("Slice", self.operands.past_value, self.ints(0), first, self.ints(2)))
        weights = self.weights(*parts)
        edges, axis = [self.ints(0)], self.ints(-1)
        for source in values[:-1]:
            size = self.size(source, 2)
            edges.append(size if len(edges) == 1 else self.op("Add", edges[-1], size))
        output, *others = (
            self.op("MatMul", self.op("Slice", weights, start, stop, axis), self.for_group(source))
            for start, stop, source in zip(edges, [*edges[1:], self.ints(_END)], values, strict=True)
        )
        for more in others:
            output = self.op("Add", output, more)
        return self.ungrouped(output)

    def joint_mask(self) -> ir.Value:
        """Of past and new keys, ``[B, 1, S, P + S]``; what is beyond the layer's window is masked too."""
        extents = [self.size(self.operands.new_mask, axis) for axis in (0, 1, 2)]
        shape = self.op("Concat", *extents, self.size(self.operands.past_mask, 3), axis=0)
        past_mask = self.op("Expand", self.operands.past_mask, shape)
        assert self.operands.new_mask.shape is not None
        assert self.operands.past_mask.shape is not None
        past_mask.type = self.operands.past_mask.type
        past_mask.shape = ir.Shape(
            [*self.operands.new_mask.shape[:3], self.operands.past_mask.shape[3]]
        )  # to be seen when it is empty
        mask = self.op("Concat", past_mask, self.operands.new_mask, axis=-1)
        return self.masked_beyond_window(mask, self.joint_positions()) if self.attributes.window else mask

    def joint_positions(self) -> ir.Value:
        """Positions of past and new keys, ``[B, P + S]``."""
        assert self.operands.positions is not None
        assert self.operands.past_positions is not None
        return self.op("Concat", self.operands.past_positions, self.operands.positions, axis=1)

    def far_scores(self) -> ir.Value:
        """Scores of the first tokens as they are seen from beyond the window."""
        assert self.attributes.sink_window is not None
        assert self.operands.far_query is not None
        assert self.operands.far_key is not None
        assert self.operands.past_positions is not None
        first, start = self.size(self.operands.far_key, 2), self.ints(0)
        positions = self.op("Slice", self.operands.past_positions, start, first, self.ints(1))
        seen = self.op(
            "Not", self.within(positions, self.attributes.sink_window.window, self.attributes.sink_window.min_position)
        )
        if self.attributes.window:
            seen = self.op("And", seen, self.within(positions, self.attributes.window))
        mask = self.op("Slice", self.operands.past_mask, start, first, self.ints(3))
        mask = self.op("Where", seen, mask, _float(self, MASKED))
        scores = self.op(
            "Add", self.scores(self.grouped(self.operands.far_query), self.operands.far_key), self.for_rows(mask)
        )
        if not self.attributes.slopes:
            return scores
        # As far away as they seem: in the scores of the others the query's own position is left out.
        apparent = self.op("Sub", self.queries(), _scalar(self, self.attributes.sink_window.query_position))
        if not self.attributes.sink_window.sinks_at_zero:
            apparent = self.op("Add", apparent, self.op("Unsqueeze", positions, self.ints(1, 2)))
        return self.biased(scores, self.for_rows(apparent))

    def scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Of grouped queries and keys ``[B, K, X, D]``, float32 ``[B, K, G * S, X]`` or ``[B, K, G, S, X]``."""
        perm = [0, 1, 2, 4, 3] if self.group_axis else [0, 1, 3, 2]
        scores = self.op("MatMul", query, self.op("Transpose", self.for_group(key), perm=perm))
        if self.attributes.softcap:
            cap = self.cast(self.op("Constant", value_float=self.attributes.softcap), ir.DataType.FLOAT, self.dtype)
            scores = self.op("Mul", self.op("Tanh", self.op("Div", scores, cap)), cap)
        return self.cast(scores, self.dtype, ir.DataType.FLOAT)

    def weights(self, *scores: ir.Value) -> ir.Value:
        """One softmax over all scores; a sink takes its share of it, and is then left out."""
        parts = list(scores)
        if self.operands.sinks is not None:
            assert self.operands.sinks.dtype is not None
            rows = self.op("Concat", self.op("Shape", scores[0], end=-1), self.ints(1), axis=0)
            sinks = self.each_row(self.cast(self.operands.sinks, self.operands.sinks.dtype, ir.DataType.FLOAT))
            parts.append(self.op("Expand", sinks, rows))
        joined = self.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]
        weights = self.op("Softmax", joined, axis=-1)
        if self.operands.sinks is not None:
            weights = self.op("Slice", weights, self.ints(0), self.ints(-1), self.ints(-1))
        return self.cast(weights, ir.DataType.FLOAT, self.dtype)

    def attention_op(self) -> ir.Value:
        if not self.standard:
            return self.unfused()
        mask = self.for_rows(self.cast(self.joint_mask(), ir.DataType.FLOAT, self.dtype))
        keys = self.op("Concat", self.operands.past_key, self.operands.key, axis=2)
        values = self.op("Concat", self.operands.past_value, self.operands.value, axis=2)
        return self.ungrouped(self.op("Attention", self.grouped(self.operands.query), keys, values, mask, scale=1.0))

    def kv_in_place(self) -> ir.Value:
        attended_slots, write_at = _input(self.model, ATTENDED), _input(self.model, WRITE_AT)
        keys, values = (self.written(kind) for kind in KINDS)
        new = self.op("Squeeze", self.size(_input(self.model, INPUT_IDS), 1), self.ints(0))
        rows = self.op("Range", _scalar(self, 0), new, _scalar(self, 1))
        last = self.op("Add", self.op("Unsqueeze", write_at, self.ints(1)), rows)  # that each query sees, [B, S]
        seen = self.op("Unsqueeze", last, self.ints(1, 3))
        mask = self.op("LessOrEqual", self.op("Unsqueeze", attended_slots, self.ints(0, 1, 2)), seen)
        mask.dtype = ir.DataType.BOOL
        until = self.op("Shape", attended_slots)
        attended = [self.op("Slice", cache, self.ints(0), until, self.ints(2)) for cache in (keys, values)]
        positions = None
        if self.operands.past_positions is not None:
            positions = self.op("Slice", self.operands.past_positions, self.ints(0), until, self.ints(1))
        if self.attributes.window:
            assert positions is not None
            mask = self.masked_beyond_window(mask, positions)
        if self.standard and self.head_size == self.value_size:  # TensorRT takes no others
            return self.op("Attention", self.operands.query, *attended, mask, scale=1.0)
        unseen = self.op("Where", mask, _float(self, 0.0), _float(self, MASKED))
        scores = self.op("Add", self.scores(self.grouped(self.operands.query), attended[0]), self.for_rows(unseen))
        if self.attributes.slopes:
            assert positions is not None
            scores = self.biased(scores, self.op("Unsqueeze", positions, self.ints(1, 2)))
        return self.ungrouped(self.op("MatMul", self.weights(scores), attended[1]))

    def written(self, kind: Kind) -> ir.Value:
        """The cache with the new keys or values in it, which is what the graph gives as ``present``."""
        past, new = (
            (self.operands.past_key, self.operands.key)
            if kind == "key"
            else (self.operands.past_value, self.operands.value)
        )
        cache = self.op("TensorScatter", past, new, _input(self.model, WRITE_AT), axis=2, mode="linear")
        name = present_name(self.attributes.layer, kind)
        outputs = self.model.graph.outputs
        index = next(i for i, value in enumerate(outputs) if value.name == name)
        outputs[index].name = None
        outputs[index] = cache
        cache.name, cache.shape, cache.type = name, past.shape, past.type
        return cache


def attend_to_all_slots(model: ir.Model) -> None:
    """Makes ``attended`` of a ``kv_in_place`` graph of fixed shapes, A = P, a constant; nothing is sliced then."""
    attended = _input(model, ATTENDED)
    assert attended.shape is not None
    for node in list(model.graph):
        producer = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
        if producer is not None and producer.op_type == "TensorScatter":
            assert node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
    tensor = ir.tensor(list(range(int(attended.shape[0]))), dtype=ir.DataType.INT64, name="all_slots")  # type: ignore[arg-type]
    constant = ir.Value(name="all_slots", shape=attended.shape, type=attended.type, const_value=tensor)
    model.graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(attended, constant)
    model.graph.inputs.remove(attended)


def _scalar(attention: LayerAttention, value: int) -> ir.Value:
    return attention.op("Constant", value_int=value)


def _float(attention: LayerAttention, value: float) -> ir.Value:
    return attention.op("Constant", value_float=value)


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _add_write_inputs(model: ir.Model) -> None:
    number = ir.TensorType(ir.DataType.INT64)
    model.graph.inputs.append(ir.Value(name=WRITE_AT, shape=ir.Shape(["B"]), type=number))
    model.graph.inputs.append(ir.Value(name=ATTENDED, shape=ir.Shape(["A"]), type=number))


__all__ = ["Form", "attend_to_all_slots", "with_attention"]
