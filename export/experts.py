"""Products of experts one by one, which is how engines multiply with quantised weights.

A traced graph multiplies a group of experts at once, ``[G, N, in] @ [G, in, out]``. Whole numbers stay packed only in
a plain product, with a weight of two dimensions: onnxruntime unpacks such of three at each run, OpenVINO while it loads
(docs/precision.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir


def find_groups(weight: ir.Value, *, inputs_first: bool) -> Iterator[tuple[ir.Node, range]]:
    """The products with the weights of experts or with a slice of them, and the experts of each.

    Args:
        weight: an initializer, ``[E, out, in]``, whose transpose is multiplied.
        inputs_first: it is ``[E, in, out]`` instead, and is multiplied as it lies.
    """
    assert weight.shape is not None
    groups = [(weight, range(int(weight.shape.numpy()[0])))]
    for use in weight.uses():
        if use.node.op_type == "Slice":
            start, stop, axis, step = (_number(value) for value in use.node.inputs[1:])
            assert (axis, step) == (0, 1)
            groups.append((use.node.outputs[0], groups[0][1][start:stop]))
    for value, group in groups:
        factors = [value] if inputs_first else [use.node.outputs[0] for use in value.uses() if _turns(use.node)]
        for factor in factors:
            for node, index in factor.uses():
                if node.op_type == "MatMul" and index == 1:
                    yield node, group


def split_group(graph: ir.Graph, product: ir.Node, weights: Sequence[ir.Value]) -> None:
    """Replaces the product of a group by one for each of its experts, in place.

    Args:
        graph: the graph.
        product: one of its nodes; what made its weight stays in the graph.
        weights: those of the experts, ``[in, out]`` each.
    """
    if len(weights) == 1:
        product.replace_input_with(1, weights[0])
        return
    inputs, output = product.inputs[0], product.outputs[0]
    assert inputs is not None
    assert inputs.shape is not None
    assert inputs.shape[0] == len(weights)
    split = ir.node("Split", [inputs], {"axis": 0, "num_outputs": len(weights)}, num_outputs=len(weights))
    products = [ir.node("MatMul", [*factors]) for factors in zip(split.outputs, weights, strict=True)]
    joined = ir.node("Concat", [each.outputs[0] for each in products], {"axis": 0})
    graph.insert_before(product, [split, *products, joined])
    whole = joined.outputs[0]
    whole.name, whole.shape, whole.type = f"{output.name}.joined", output.shape, output.type
    ir.convenience.replace_all_uses_with(output, whole)
    graph.remove(product, safe=True)


def _number(value: ir.Value | None) -> int:
    assert value is not None
    assert value.const_value is not None
    return int(value.const_value.numpy().item())


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == (0, 2, 1)


__all__ = ["find_groups", "split_group"]
