"""Weights of linear layers and of experts as whole numbers of 8 or 4 bits: a scale for each block of inputs.

Here they are rounded to nearest, without looking at any text; :mod:`mesart.export.calibrate` does better, by a library.

A layer computes ``x @ W.T``; its weight ``W``, ``[out, in]``, is stored as ``[in, out]``, blocks along the first axis,
and a graph has the standard ``DequantizeLinear`` (opset 21) in front of ``MatMul``. That is the one form that all
engines keep packed: onnxruntime makes ``MatMulNBits`` of it, OpenVINO a compressed ``FullyConnected``, TensorRT a
product with whole numbers. Experts, whose weights are stored in one tensor, are multiplied one by one therefore
(:mod:`mesart.export.experts`).

Activations, the cache and all other weights keep the bundle's dtype. So does the table of embeddings: its rows are
gathered, a few at a time, so that nothing is gained in speed; a table that is also the language head (tied) stays for
the gathering and is quantised for the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor

from mesart.export.experts import find_groups, split_group
from mesart.export.fp8 import quantise_fp8, round_inputs
from mesart.export.safetensors_file import Pending
from mesart.graphs.bundle.manifest import Quantisation
from mesart.graphs.errors import InputError
from mesart.graphs.model.torch_fp8 import FP8
from mesart.graphs.model.torch_weights import QUANTISED, SCALES, ZERO_POINTS, Packed

SCHEMES = {"int8": 8, "int4": 4, "fp8": 8}
"""Bits by name."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""What onnxruntime's kernels take."""

DEFAULT_GROUP = 32
"""Of int4: the best quality for half a bit more a weight (docs/precision.md)."""

EXPERT = "expert"
"""In the ``metadata_props`` of an initializer: of which expert it is, where those of all are stored as one tensor."""

_ONNX_TYPES = {
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
}


class PackedParts(Protocol):
    """What is stored of a quantised weight: ``Packed`` numbers, scales and zero points, or made when asked for."""

    @property
    def numbers(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def zero_points(self) -> Tensor | None: ...


def choose_quantisation(scheme: str | None, group_size: int | None, *, symmetric: bool = True) -> Quantisation | None:
    """The quantisation that was asked for.

    Args:
        scheme: ``int8``, ``int4``, ``fp8`` or ``None``.
        group_size: inputs of a layer that share a scale; if left out, 32 for int4 and all of them for int8.
        symmetric: without zero points.

    Raises:
        MesaError: an unknown scheme or group size, or options of a quantisation without one.
    """
    if scheme is None:
        if group_size is not None or not symmetric:
            raise InputError("a group size and zero points belong to a quantisation; give --quantise int8 or int4 too")
        return None
    if scheme not in SCHEMES:
        raise InputError(f"unknown quantisation {scheme!r}; there are {', '.join(SCHEMES)}")
    if scheme == "fp8" and (group_size is not None or not symmetric):
        raise InputError("fp8 has one scale for each weight and no zero points; leave the group size and asymmetry out")
    if group_size is None and scheme == "int4":
        group_size = DEFAULT_GROUP
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError(f"engines take groups of {', '.join(map(str, GROUP_SIZES))} inputs, not of {group_size}")
    return Quantisation(scheme, SCHEMES[scheme], group_size, symmetric)


def check_groups(inputs: Mapping[str, int], how: Quantisation) -> None:
    """Refuses groups that do not divide a layer's inputs, whose numbers are given by the names of the weights.

    Raises:
        MesaError: says which group would do.
    """
    group = how.group_size
    if group is None:
        return
    for name, count in inputs.items():
        if count % group:
            fitting = [size for size in GROUP_SIZES if math.gcd(*inputs.values()) % size == 0]
            advice = f"; {fitting[-1]} divides those of all layers" if fitting else "; int8 without groups takes any"
            raise InputError(f"groups of {group} do not divide the {count} inputs of {name}{advice}")


def quantise(weight: Tensor, how: Quantisation) -> Packed:
    """Rounds a weight to whole numbers.

    Args:
        weight: ``[out, in]``, or ``[E, out, in]`` of experts, of any floating dtype, which the scales get too.
        how: the group size must divide ``in``.

    Returns:
        Numbers, scales and zero points. A block whose weights are all zero has the scale 1.
    """
    if weight.dim() == 3:
        each = [quantise(expert, how) for expert in weight]
        zero_points = [expert.zero_points for expert in each if expert.zero_points is not None]
        return Packed(
            torch.stack([expert.numbers for expert in each]),
            torch.stack([expert.scales for expert in each]),
            torch.stack(zero_points) if zero_points else None,
        )
    if how.scheme == "fp8":
        return quantise_fp8(weight)
    outputs, inputs = weight.shape
    blocks = weight.detach().float().t().reshape(-1, how.group_size or inputs, outputs)
    if how.symmetric:
        low, most = -(2 ** (how.bits - 1)), 2 ** (how.bits - 1) - 1
        scales = blocks.abs().amax(1) / most
    else:  # zero is always within the range: what is zero stays zero
        low, most = 0, 2**how.bits - 1
        least = blocks.amin(1).clamp_(max=0)
        scales = (blocks.amax(1).clamp_(min=0) - least) / most
    scales = scales.to(weight.dtype)  # rounded first, so that the numbers fit to what is stored
    scales[scales == 0] = 1
    numbers = torch.round(blocks / scales.float()[:, None])
    zeros = None
    if not how.symmetric:
        zeros = torch.round(-least / scales.float()).clamp_(low, most)
        numbers += zeros[:, None]
    shape = scales_shape((outputs, inputs), how)
    return Packed(
        pack(numbers.clamp_(low, most).reshape(inputs, outputs), how),
        scales.reshape(shape),
        None if zeros is None else pack(zeros.reshape(shape), how),
    )


def scales_shape(shape: tuple[int, ...], how: Quantisation) -> tuple[int, ...]:
    """That of the scales of a weight ``[out, in]``: ``[in / group, out]``, ``[out]`` without groups, ``[]`` of fp8.

    Those of experts, ``[E, out, in]``, have E such.
    """
    *experts, outputs, inputs = shape
    if how.scheme == "fp8":
        return (*experts,)
    return (*experts, outputs) if how.group_size is None else (*experts, inputs // how.group_size, outputs)


def pack(numbers: Tensor, how: Quantisation) -> Tensor:
    """Whole numbers of any dtype and shape, as :class:`~mesart.graphs.model.torch_weights.Packed` stores them."""
    if how.bits == 8:
        return numbers.to(torch.int8 if how.symmetric else torch.uint8)
    halves = numbers.reshape(-1).to(torch.int8).view(torch.uint8) & 15
    if len(halves) % 2:
        halves = torch.cat((halves, halves.new_zeros(1)))
    return halves[0::2] | halves[1::2] << 4


def pending(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], PackedParts], how: Quantisation
) -> dict[str, Pending]:
    """The parts of a quantised weight, to be written one by one: each makes the weight anew, and nothing is kept.

    Args:
        name: the parameter's.
        shape: ``[out, in]`` or ``[E, out, in]``.
        dtype: of the scales.
        make: gives the quantised weight.
        how: the quantisation.
    """

    def zero_points() -> Tensor:
        zeros = make().zero_points
        assert zeros is not None
        return zeros

    *experts, outputs, inputs = shape
    scales = scales_shape(shape, how)

    def stored(extents: tuple[int, ...], part: Callable[[], Tensor]) -> Pending:
        if how.bits == 4:  # each expert begins with a byte of its own
            return Pending(torch.uint8, (*experts, -(-math.prod(extents[len(experts) :]) // 2)), part)
        return Pending(torch.int8 if how.symmetric else torch.uint8, extents, part)

    def numbers() -> Tensor:
        return make().numbers

    parts = {
        name + QUANTISED: Pending(FP8, (*experts, inputs, outputs), numbers)
        if how.scheme == "fp8"
        else stored((*experts, inputs, outputs), numbers),
        name + SCALES: Pending(dtype, scales, lambda: make().scales),
    }
    if not how.symmetric:
        parts[name + ZERO_POINTS] = stored(scales, zero_points)
    return parts


def quantise_products(
    model: ir.Model, how: Quantisation, experts: Mapping[str, bool], only: Collection[str] | None = None
) -> set[str]:
    """Puts ``DequantizeLinear`` in front of each product with a weight, in place.

    Initializers carry the name of their parameter as ``metadata_props["weight"]``, which the new ones get too, with
    what follows it. A weight of two dimensions, ``[out, in]``, counts if ``MatMul`` multiplies with its transpose; one
    that is used otherwise too is kept beside its quantised form.

    Args:
        model: a graph of any kind.
        how: the quantisation.
        experts: the weights of experts that are quantised too, and whether they lie ``[E, in, out]``; each gets a
            product of its own, with initializers that say whose they are (:data:`EXPERT`).
        only: the parameters that may be quantised; all if left out.

    Returns:
        The names of the quantised parameters.

    Raises:
        MesaError: the group size divides no input dimension, with one that would.
    """
    graph = model.graph
    weights: dict[str, ir.Value] = {}
    products: dict[ir.Node, tuple[str, Sequence[int | None]]] = {}  # what each multiplies with; of which experts
    for value in graph.initializers.values():
        name = value.metadata_props.get("weight")
        if name is None or (only is not None and name not in only):
            continue
        found: dict[ir.Node, Sequence[int | None]]
        if name in experts:
            found = dict(find_groups(value, inputs_first=experts[name]))
        else:
            found = {product: [None] for use in value.uses() for product in _products(use.node)}
        if found:
            weights[name] = value
            products |= {product: (name, group) for product, group in found.items()}
    shapes = {name: _shape(value, inputs_first=experts.get(name, False)) for name, value in weights.items()}
    check_groups({name: inputs for name, (_, inputs) in shapes.items()}, how)
    dequantised: dict[tuple[str, int | None], ir.Value] = {}
    for product in [node for node in graph if node in products]:
        name, group = products[product]
        for expert in group:
            if (name, expert) not in dequantised:
                made = _dequantised(graph, weights[name], shapes[name], how, expert)
                graph.insert_before(product, made)
                dequantised[name, expert] = made.outputs[0]
        split_group(graph, product, [dequantised[name, expert] for expert in group])
    if how.scheme == "fp8":
        round_inputs(graph, list(products))
    passes.RemoveUnusedNodesPass()(model)
    return set(weights)


def _products(transpose: ir.Node) -> list[ir.Node]:
    """The products of activations with a weight that a node transposes."""
    if transpose.op_type != "Transpose" or len(transpose.attributes.get_ints("perm", ())) != 2:
        return []
    return [use.node for use in transpose.outputs[0].uses() if use.node.op_type == "MatMul" and use.idx == 1]


def _dequantised(
    graph: ir.Graph, weight: ir.Value, shape: tuple[int, int], how: Quantisation, expert: int | None
) -> ir.Node:
    """A weight ``[in, out]``, one expert's or a linear layer's, of initializers whose numbers are not written yet."""
    outputs, inputs = shape
    numbers = ir.DataType.FLOAT8E4M3FN if how.scheme == "fp8" else _ONNX_TYPES[how.bits, how.symmetric]
    scales = scales_shape(shape, how)
    assert weight.dtype is not None
    parts = [_placeholder(weight, QUANTISED, numbers, (inputs, outputs), expert)]
    parts.append(_placeholder(weight, SCALES, weight.dtype, scales, expert))
    if not how.symmetric:
        parts.append(_placeholder(weight, ZERO_POINTS, numbers, scales, expert))
    for part in parts:
        graph.register_initializer(part)
    blocks = {"axis": 1} if how.group_size is None else {"axis": 0, "block_size": how.group_size}
    node = ir.node("DequantizeLinear", parts, {} if how.scheme == "fp8" else blocks)
    node.outputs[0].name = _own_name(weight, expert) + ".dequantised"
    node.outputs[0].shape, node.outputs[0].type = ir.Shape((inputs, outputs)), ir.TensorType(weight.dtype)
    return node


def _placeholder(
    weight: ir.Value, part: str, dtype: ir.DataType, shape: tuple[int, ...], expert: int | None
) -> ir.Value:
    stored = weight.metadata_props["weight"] + part

    def unwritten() -> ir.TensorProtocol:
        raise AssertionError(f"{stored} is read before it is written")

    extents = ir.Shape(shape)
    tensor = ir.LazyTensor(unwritten, dtype, extents, name=_own_name(weight, expert) + part)
    value = ir.Value(name=tensor.name, shape=extents, type=ir.TensorType(dtype), const_value=tensor)
    value.metadata_props["weight"] = stored
    if expert is not None:
        value.metadata_props[EXPERT] = str(expert)
    return value


def _own_name(weight: ir.Value, expert: int | None) -> str:
    return str(weight.name) if expert is None else f"{weight.name}.{expert}"


def _shape(weight: ir.Value, *, inputs_first: bool) -> tuple[int, int]:
    """Outputs and inputs."""
    assert weight.shape is not None
    *_, one, other = weight.shape.numpy()
    return (other, one) if inputs_first else (one, other)


def quantised_bytes(shape: tuple[int, ...], dtype: torch.dtype, how: Quantisation) -> int:
    """What a weight takes on disk."""

    def unmade() -> PackedParts:
        raise AssertionError("only its size is asked for")

    return sum(part.bytes for part in pending("", shape, dtype, unmade, how).values())


__all__ = [
    "EXPERT",
    "GROUP_SIZES",
    "SCHEMES",
    "PackedParts",
    "check_groups",
    "choose_quantisation",
    "pack",
    "pending",
    "quantise",
    "quantise_products",
    "quantised_bytes",
    "scales_shape",
]
