"""torch -> ONNX: one symbolic graph that computes every phase.

The model's own code is traced by ``torch.export`` and translated by torch's ONNX exporter into standard operators, but
for attention, which stays one operator of our own (:mod:`~mesart.graphs.model.attention_operator`) until
:mod:`~mesart.export.forms` writes it out.
Axes are symbolic: B batch, S new tokens, P past tokens, M tokens whose logits are wanted.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import nn

from mesart.export.decompose import decomposed_one_by_one
from mesart.graphs.bundle.names import (
    FROM_IDS,
    INPUT_IDS,
    KEY,
    LOGITS,
    LOGITS_AT,
    NEW_MASK,
    PAST,
    PAST_MASK,
    PAST_POSITION_IDS,
    POSITION_IDS,
    PRESENT,
    QUERY_SCALE,
    ROTATED,
    TO_IDS,
    past_name,
    present_name,
)
from mesart.graphs.errors import InputError, MesaError, first_line
from mesart.graphs.model.phase_module import PhaseModule

OPSET = 23
IR_VERSION = 11
"""onnxruntime 1.31 reads up to IR version 12; 11 is the one that opset 23 came with."""

_REWRITE_RULES = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
"""onnxscript's, but for one that looks at all nodes for each node, and fits slices that the exporter hardly writes."""

_FOLD_BYTES = 1024
"""Constants larger than this are not folded."""

_PHASE_AXES = {
    INPUT_IDS: "B S",
    POSITION_IDS: "B S",
    PAST_MASK: "B . . P",
    PAST_POSITION_IDS: "B P",
    NEW_MASK: "B . S S",
    QUERY_SCALE: "B . S .",
    LOGITS_AT: "M",
    PAST: "B . P .",
    LOGITS: "B M .",
    PRESENT: "B . S .",
}
"""The axes of each input and output, by the beginning of its name; ``.`` has a size of its own."""

_SMALL = 16
"""Elements of the largest constants that are merged when equal: shapes and scalars, not weights."""


def trace_phases(module: PhaseModule) -> ir.Model:
    """The symbolic graph of a model in form ``traced``, weights attached as initializers under the checkpoint's names.

    Inputs: ``input_ids``, ``position_ids``, ``past_mask``, ``new_mask``, ``query_scale``, ``logits_at`` and
    ``past_key_values.N.key`` / ``.value``; outputs: ``logits`` and ``present.N.key`` / ``.value``: see ``PhaseModule``.
    A model with layers that look at the positions of keys has ``past_position_ids`` too.

    Raises:
        MesaError: torch cannot trace the architecture; the message carries torch's reason.
    """
    layers = module.layers
    dtype = next(module.parameters()).dtype
    batch, new, past, wanted = 2, 5, 7, 3  # any sizes above 1 that differ
    if module.sink_window is not None:
        past += module.sink_window.sinks  # first tokens are a part of the past
    past_keys = [torch.zeros(batch, s.kv_heads, past, s.key_size, dtype=dtype) for s in layers]
    past_values = [torch.zeros(batch, s.kv_heads, past, s.value_size, dtype=dtype) for s in layers]
    example = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.zeros(batch, new, dtype=torch.int64),
        torch.zeros(batch, 1, 1, past),
        torch.zeros(batch, 1, new, new),
        torch.ones(batch, 1, new, 1),
        torch.zeros(wanted, dtype=torch.int64),
        past_keys,
        past_values,
        torch.zeros(batch, past, dtype=torch.int64),
    )
    any_size = torch.export.Dim.DYNAMIC
    per_layer = [{0: any_size, 2: any_size}] * len(layers)
    shapes = (
        {0: any_size, 1: any_size},
        {0: any_size, 1: any_size},
        {0: any_size, 3: any_size},
        {0: any_size, 2: any_size, 3: any_size},
        {0: any_size, 2: any_size},
        {0: any_size},
        per_layer,
        per_layer,
        {0: any_size, 1: any_size},
    )
    count = range(len(layers))
    inputs = [INPUT_IDS, POSITION_IDS, PAST_MASK, NEW_MASK, QUERY_SCALE, LOGITS_AT]
    inputs += [past_name(i, "key") for i in count] + [past_name(i, "value") for i in count]
    inputs += [PAST_POSITION_IDS]
    outputs = [LOGITS] + [present_name(i, "key") for i in count] + [present_name(i, "value") for i in count]
    model = _to_onnx(module, example, shapes)
    _rename(model, inputs, outputs)
    _name_axes(model, _PHASE_AXES)
    model = _tidy(model)
    if not model.graph.inputs[-1].uses():
        model.graph.inputs.pop()
    return model


def trace_rerotation(module: nn.Module, kv_heads: int, key_size: int, dtype: torch.dtype) -> ir.Model:
    """The graph of a ``Rerotation``: ``key``, ``from_ids`` and ``to_ids`` give ``rotated``."""
    any_size = torch.export.Dim.DYNAMIC
    from_ids, to_ids = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    example = (torch.zeros(2, kv_heads, 5, key_size, dtype=dtype), from_ids, to_ids)
    shapes = ({0: any_size, 2: any_size}, {0: any_size, 1: any_size}, {0: any_size, 1: any_size})
    model = _to_onnx(module, example, shapes)
    _rename(model, [KEY, FROM_IDS, TO_IDS], [ROTATED])
    _name_axes(model, {KEY: "B . S .", ROTATED: "B . S .", "": "B S"})
    return _tidy(model)


def _to_onnx(module: nn.Module, example: tuple[object, ...], shapes: tuple[object, ...]) -> ir.Model:
    name = type(getattr(module, "model", module)).__name__
    program: torch.export.ExportedProgram | None = None
    with _quiet():
        try:
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            program = decomposed_one_by_one(program)
            translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except MesaError:
            raise
        except Exception as error:  # torch raises many kinds; all mean the same to the user
            raise InputError(f"{name} cannot be traced: {_reason(error, program)}") from error
    if translated is None:
        raise InputError(f"{name} cannot be traced: the ONNX exporter returned nothing")
    return translated.model


def _reason(error: BaseException, program: torch.export.ExportedProgram | None) -> str:
    """The innermost cause of a failure, and the part of the model where the exporter met it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    reason = first_line(chain[-1])
    found = next((match for e in chain if (match := re.search(r"translating node %(\w+)", str(e)))), None)
    if found is None or program is None:
        return reason
    for node in program.graph.nodes:
        if node.name == found[1]:
            for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
                part = re.sub(r"slice\([^)]*\)\.", "", path.removeprefix("model."))  # layers that the model slices
                return f"{part} ({str(kind).rpartition('.')[2]}): {reason}"
    return reason


@contextmanager
def no_collection() -> Iterator[None]:
    """Graphs are millions of objects, and nearly all stay: looking for garbage among them is a sixth of an export."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about packages that it does not need here, onnx_ir of every weight without a value."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _rename(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    # A value may be an output and an input's alias; outputs get a node of their own.
    for index, (value, name) in enumerate(zip(list(model.graph.outputs), outputs, strict=True)):
        if value.producer() is None or value.name in outputs:
            node = ir.node("Identity", [value])
            model.graph.append(node)
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            model.graph.outputs[index] = value = node.outputs[0]
        value.name = name


def _name_axes(model: ir.Model, layout: dict[str, str]) -> None:
    """Gives the axes of inputs and outputs their names, and the same names to what was traced as equal to them.

    A size that torch derived from others (``2*s30``) is forgotten: engines infer it.
    """
    names: dict[str, str] = {}
    ends = [*model.graph.inputs, *model.graph.outputs]
    for value in ends:
        assert value.shape is not None
        pattern = next(axes for prefix, axes in layout.items() if (value.name or "").startswith(prefix)).split()
        for axis, dim in zip(pattern, value.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and axis.isalpha():
                names.setdefault(str(dim.value), axis)
        value.shape = ir.Shape(
            [
                axis if axis.isalpha() and isinstance(dim, ir.SymbolicDim) else dim
                for axis, dim in zip(pattern, value.shape, strict=True)
            ]
        )
    done = {id(value) for value in ends}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and id(value) not in done:
                value.shape = ir.Shape(
                    [names.get(str(dim.value)) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
                )


def _tidy(model: ir.Model) -> ir.Model:
    """Folds the graph and gives weights the checkpoint's names; the same input gives the same bytes."""
    passes.InlinePass()(model)
    fold(model)
    _divide(model)
    for name in list(model.graph.initializers):
        model.graph.initializers[name].name = name.removeprefix("model.")
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "mesart", ""
    model.graph.name = "mesart"
    tidy_names(model)
    return model


def _divide(model: ir.Model) -> None:
    """Writes ``x * (1 / y)`` as ``x / y``: onnxruntime knows a root mean square norm by its division."""
    for node in model.graph:
        if node.op_type != "Mul":
            continue
        for x, inverse in (node.inputs, node.inputs[::-1]):
            producer = None if inverse is None else inverse.producer()
            if producer is not None and producer.op_type == "Reciprocal":
                node.op_type = "Div"
                node.replace_input_with(0, x)
                node.replace_input_with(1, producer.inputs[0])
                break
    merge_equal(model)


def tidy_names(model: ir.Model) -> None:
    """Drops what passes leave behind in the metadata."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        value.metadata_props.clear()


def fold(model: ir.Model, *, rewrite: bool = True) -> None:
    """Folds constants and merges shared subexpressions, in place; leaves weights alone.

    ``rewrite``: also onnxscript's rules, which take a hundred times as long; once for a traced graph is enough.
    """
    with _weights_hidden(model), _quiet():
        _fold_constants(model)
        if rewrite:
            rewriter.rewrite(model, _REWRITE_RULES)
            _fold_constants(model)
    merge_equal(model)


def _fold_constants(model: ir.Model) -> None:
    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_FOLD_BYTES, output_size_limit=_FOLD_BYTES
    )


def merge_equal(model: ir.Model) -> None:
    """Constants become initializers; equal ones become one, and so do equal nodes; what is unused goes."""
    with _weights_hidden(model), _quiet():
        ir.passes.Sequential(
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(size_limit=_SMALL),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.NameFixPass(),
        )(model)


@contextmanager
def _weights_hidden(model: ir.Model) -> Iterator[None]:
    """Parameters have no value meanwhile: an export traces them before their numbers are there."""
    weights = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if isinstance(getattr(value.const_value, "raw", None), nn.Parameter)
    }
    for value in weights:
        value.const_value = None
    try:
        yield
    finally:
        for value, numbers in weights.items():
            value.const_value = numbers
