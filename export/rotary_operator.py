"""Rotary embedding as the standard operator of opset 23, for engines with a kernel for it.

Models write it out, as six operators over the queries and six over the keys of each layer:
``x * cos + concat(-x[D/2:], x[:D/2]) * sin``. Other layouts (interleaved pairs, heads behind tokens) stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from torch import nn

from mesart.export.trace import merge_equal, tidy_names


def with_rotary_operator(model: ir.Model) -> None:
    """Puts ``RotaryEmbedding`` wherever the graph computes the same, in place.

    What is rotated is ``[B, H, S, D]``; its cosines and sines are rows of a table ``[positions, D]`` whose two halves
    are equal, which the operator takes once, ``[B, S, D/2]``. Only float32, which all kernels take.
    """
    graph = model.graph
    tables = {
        value
        for value in graph.initializers.values()
        if any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses()) and _halves_equal(value)
    }
    for total in [node for node in graph if node.op_type == "Add"]:
        found = next(_written_out(total, tables), None)
        if found is None:
            continue
        rotated, cosines, sines = found
        tape = ir.tape.Tape()
        size = int(rotated.shape[-1])  # type: ignore[index, arg-type]
        bounds = [tape.op("Constant", [], {"value_ints": [bound]}) for bound in (0, size // 2, -1)]
        halves = [tape.op("Slice", [rows, *bounds]) for rows in (cosines, sines)]
        output = tape.op("RotaryEmbedding", [rotated, *halves])
        _replace(graph, total, tape.nodes, output)
    merge_equal(model)
    tidy_names(model)


def _written_out(total: ir.Node, tables: Collection[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """What is rotated, and the rows of cosines and sines, if a sum is a rotation."""
    if total.outputs[0].dtype != ir.DataType.FLOAT:
        return
    for straight, across in (total.inputs, total.inputs[::-1]):
        for rotated, cosines in _factors(straight):
            for crossed, sines in _factors(across):
                rows = [row for value in (cosines, sines) if (row := _rows(value, tables)) is not None]
                if len(rows) == 2 and _crosses(crossed, rotated):
                    yield rotated, rows[0], rows[1]


def _factors(product: ir.Value | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    node = _made_by(product, "Mul")
    if node is not None and node.inputs[0] is not None and node.inputs[1] is not None:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]


def _crosses(value: ir.Value, whole: ir.Value) -> bool:
    """Whether a value is the second half of another, negated, and then its first."""
    joined = _made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or not _last_axis(joined.attributes.get_int("axis"), whole):
        return False
    negated = _made_by(joined.inputs[0], "Neg")
    if negated is None or whole.shape is None or not isinstance(whole.shape[-1], int) or whole.shape[-1] % 2:
        return False
    size = whole.shape[-1]
    return _slice(negated.inputs[0], whole) == (size // 2, size) and _slice(joined.inputs[1], whole) == (0, size // 2)


def _slice(value: ir.Value | None, whole: ir.Value) -> tuple[int, int] | None:
    """From where to where a value is a part of the last axis of another."""
    node = _made_by(value, "Slice")
    if node is None or node.inputs[0] is not whole or len(node.inputs) < 4:
        return None
    start, stop, axis, step = [*map(_number, node.inputs[1:]), 1][:4]
    if start is None or stop is None or step != 1 or not _last_axis(axis, whole):
        return None
    return start, min(stop, int(whole.shape[-1]))  # type: ignore[index, arg-type]


def _rows(value: ir.Value, tables: Collection[ir.Value]) -> ir.Value | None:
    """``[B, S, D]`` of ``[B, 1, S, D]``, where they are rows of one of the tables."""
    node = _made_by(value, "Unsqueeze")
    if node is None or _number(node.inputs[1]) != 1:
        return None
    gathered = _made_by(node.inputs[0], "Gather")
    if gathered is None or gathered.attributes.get_int("axis", 0) != 0 or gathered.inputs[0] not in tables:
        return None
    return node.inputs[0]


def _halves_equal(table: ir.Value) -> bool:
    if table.dtype != ir.DataType.FLOAT or table.shape is None or len(table.shape) != 2 or table.const_value is None:
        return False
    if isinstance(getattr(table.const_value, "raw", None), nn.Parameter):  # whose numbers are not read yet
        return False
    if int(table.shape[1]) % 2:  # type: ignore[arg-type]
        return False
    first, second = np.split(table.const_value.numpy(), 2, axis=1)
    return np.array_equal(first, second)


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _number(value: ir.Value | None) -> int | None:
    """A constant of one element."""
    constant = None if value is None else value.const_value
    return None if constant is None or constant.size != 1 else int(constant.numpy().item())


def _last_axis(axis: int | None, value: ir.Value) -> bool:
    return axis is not None and value.shape is not None and axis in (-1, len(value.shape) - 1)


def _replace(graph: ir.Graph, node: ir.Node, by: Sequence[ir.Node], output: ir.Value) -> None:
    """Nodes in the place of one; the output keeps its name, which may be one of the graph's."""
    old = node.outputs[0]
    graph.insert_before(node, by)
    output.shape, output.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name, old.name = old.name, None


__all__ = ["with_rotary_operator"]
