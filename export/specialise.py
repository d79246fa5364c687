"""Fixed shapes: from the symbolic graph to one for a phase and bucket, as engines with static shapes want it."""

from __future__ import annotations

import copy

import onnx_ir as ir

from mesart.export.trace import fold

TAIL_SLICE = 256
"""New tokens of a run of a tail graph or engine; longer tails run in slices."""


def specialise(symbolic: ir.Model, sizes: dict[str, int]) -> ir.Model:
    """A copy of a graph with the axes B, S, P and M fixed; an axis of size 0 takes its tensors out of the graph.

    Args:
        symbolic: a graph of :func:`~mesart.export.trace.trace_phases`.
        sizes: the extent of each named axis.
    """
    model = symbolic.clone()
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, sizes) for dim in value.shape])
    _join_without_empty(model)
    fold(model, rewrite=False)
    for value in list(model.graph.inputs):
        if _is_empty(value) and not value.uses():
            model.graph.inputs.remove(value)
    return model


def _fixed(dim: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | ir.SymbolicDim | None:
    if not isinstance(dim, ir.SymbolicDim):
        return dim
    name = str(dim.value)
    # An axis that stays free keeps its name; a sum of axes is found anew.
    return sizes.get(name, dim if dim.value is not None and name.isidentifier() else None)


def _join_without_empty(model: ir.Model) -> None:
    """Joining something with a tensor without elements is the thing itself."""
    for node in list(model.graph):
        if node.op_type != "Concat":
            continue
        kept = [value for value in node.inputs if value is not None and not _is_empty(value)]
        if len(kept) == len(node.inputs):
            continue
        if len(kept) == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], kept[0])
        else:
            joined = ir.node("Concat", kept, attributes=copy.copy(node.attributes))
            joined.outputs[0].shape, joined.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            model.graph.insert_before(node, joined)
            ir.convenience.replace_all_uses_with(node.outputs[0], joined.outputs[0])
        model.graph.remove(node, safe=True)


def _is_empty(value: ir.Value) -> bool:
    return value.shape is not None and any(dim == 0 for dim in value.shape)
