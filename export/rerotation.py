"""The rotation of all layers' keys as one graph, made of the graphs that rotate those of single layers."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mesart.export.trace import IR_VERSION, OPSET, merge_equal, tidy_names
from mesart.graphs.bundle.names import key_name, rotated_name


def rerotation_of_layers(rerotations: Mapping[int, ir.Model]) -> ir.Model:
    """The rotation of all layers' keys at once, for engines that keep the cache on a device.

    Args:
        rerotations: what :func:`trace_rerotation` gave for each layer that rotates its keys, by its number; equal
            layers share one.

    Returns:
        A graph with inputs ``key.N`` ``[B, K, S, D]`` of each layer N, ``from_ids`` and ``to_ids``, int64 ``[B, S]``;
        outputs ``rotated.N``.
    """
    keys: list[ir.Value] = []
    ids: list[ir.Value] = []
    rotated: list[ir.Value] = []
    nodes: list[ir.Node] = []
    tables: dict[tuple[int, str], ir.Value] = {}
    for layer, rerotation in rerotations.items():
        graph = rerotation.clone().graph
        key, *own_ids = graph.inputs
        own_tables, output, parts = dict(graph.initializers), graph.outputs[0], list(graph)
        for ends in (graph.inputs, graph.outputs, graph.initializers):
            ends.clear()
        graph.remove(parts)
        key.name, output.name = key_name(layer), rotated_name(layer)
        keys.append(key)
        for node, index in list(key.uses()):
            start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
            if node.op_type == "Shape" and (start, end) in ((0, 1), (2, 3)):  # B and S, which all keys share
                node.replace_input_with(index, keys[0])
        rotated.append(output)
        nodes += parts
        ids = ids or own_ids
        shared = [*zip(own_ids, ids, strict=True)]
        for name, table in own_tables.items():
            table.name = f"rerotations.{layer}.{name}"
            shared.append((table, tables.setdefault((id(rerotation), name), table)))
        for own, common in shared:
            if own is not common:
                ir.convenience.replace_all_uses_with(own, common)
    model = ir.Model(
        ir.Graph(
            [*keys, *ids],
            rotated,
            nodes=nodes,
            initializers=list(tables.values()),
            opset_imports={"": OPSET},
            name="mesart",
        ),
        ir_version=IR_VERSION,
        producer_name="mesart",
        producer_version="",
    )
    merge_equal(model)
    tidy_names(model)
    return model


__all__ = ["rerotation_of_layers"]
