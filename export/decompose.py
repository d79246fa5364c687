"""Decomposing a traced program into what the ONNX exporter knows, without tracing all of it again.

``ExportedProgram.run_decompositions`` runs the whole program twice more on symbolic shapes, which takes longer than to
trace it, though most operators come out as they went in. The few others that models commonly use are decomposed here,
one by one, into what torch makes of them; a program with anything else is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def decomposed_one_by_one(program: ExportedProgram) -> ExportedProgram:
    """The same program; when the exporter asks for decompositions, single operators are decomposed if that will do."""
    by_torch = program.run_decompositions

    def run(table: Any = None, **options: Any) -> ExportedProgram:
        program.graph.eliminate_dead_code()
        composed = [node for node in program.graph.nodes if table is None or _is_composed(node, table)]
        if options or any(not _has_rule(node) for node in composed):
            return by_torch(table, **options)  # type: ignore[no-any-return]
        for node in composed:
            _RULES[node.target](node)
        return program

    program.run_decompositions = run
    return program


def _is_composed(node: fx.Node, table: Container[Any]) -> bool:
    """Whether torch's decomposition by this table may make something else of a node."""
    op: Any = node.target
    if node.op in ("placeholder", "output") or getattr(op, "__name__", "") == "getitem":
        return False
    if not isinstance(op, torch._ops.OpOverload):
        return True  # a part with a graph of its own
    if op in table or op._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in op.tags:
        return True
    # What is made of other operators stays if the table leaves it out, unless it may return its input or a view of it.
    name: str = op.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSITE) or _COMPOSITE in op.py_kernels
    return composite and any(argument.alias_info is not None for argument in op._schema.arguments)


def _has_rule(node: fx.Node) -> bool:
    """Whether a node is a call of the kind that our rules know."""
    op, arguments = node.target, _arguments(node)
    if op not in _RULES or node.kwargs:
        return False
    if op == _aten.chunk.default:
        size = _size_to_split(node)
        return isinstance(size, int) and size > 0
    if op == _aten.dropout.default:
        return arguments[2] is False  # not training
    return len(arguments) == (1 if op == _aten.contiguous.default else 2)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _value(node: Any) -> Any:
    """The tensor without numbers that a node was traced with."""
    return node.meta["val"]


def _to(node: fx.Node) -> None:
    source, dtype = _arguments(node)
    if _value(source).dtype == dtype:
        _skip(node)
    else:
        node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}


def _contiguous(node: fx.Node) -> None:
    node.target, node.kwargs = _aten.clone.default, _CONTIGUOUS


def _reshape(node: fx.Node) -> None:
    """A view of a copy: one of any tensor can be taken, and in ONNX a copy is nothing."""
    source, shape = _arguments(node)
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(_aten.clone.default, (source,), _CONTIGUOUS)
    with _value(source).fake_mode:
        copy.meta = node.meta | {"val": _value(source).clone(**_CONTIGUOUS)}
    node.target, node.args = _aten.view.default, (copy, shape)


def _chunk(node: fx.Node) -> None:
    source, chunks, *axis = _arguments(node)
    node.target, node.args = _aten.split.Tensor, (source, -(-_size_to_split(node) // chunks), *axis)


def _size_to_split(node: fx.Node) -> Any:
    source, _, axis = (*_arguments(node), 0)[:3]
    return _value(source).shape[axis]


def _skip(node: fx.Node) -> None:
    """The result is the first argument; as an output of the program it needs a name of its own."""
    source: Any = node.args[0]
    node.replace_all_uses_with(source, lambda user: user.op != "output")
    if node.users:
        node.target, node.args = _aten.alias.default, (source,)
    else:
        node.graph.erase_node(node)


_RULES: dict[Any, Callable[[fx.Node], None]] = {
    _aten.to.dtype: _to,
    _aten.contiguous.default: _contiguous,
    _aten.reshape.default: _reshape,
    _aten.chunk.default: _chunk,
    _aten.dropout.default: _skip,
}

__all__ = ["decomposed_one_by_one"]
