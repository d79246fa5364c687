"""OpenVINO's operator for paged attention, ``PagedAttentionExtension``, in the place of the bundle's.

It is made for OpenVINO GenAI and documented nowhere: its inputs are those of version 2026.4, and whatever does not
agree with them is an error here, for the unfused graph to step in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mesart.graphs.bundle.names import PAGED_DOMAIN, PAGED_INPUTS, PAST
from mesart.graphs.errors import EngineError

_OPERANDS = 5 + len(PAGED_INPUTS)
"""Queries, keys, values, both caches, and how they are paged."""


@contextmanager
def paged_attention(openvino: Any, core: Any) -> Iterator[None]:
    """Graphs that ``core`` reads have OpenVINO's operator where they name ours.

    Raises:
        EngineError: this version has none.
    """
    make = getattr(openvino.op, "_PagedAttentionExtension", None)
    if make is None:
        raise EngineError(f"OpenVINO {openvino.__version__} has no operator for paged attention")
    from openvino.frontend.onnx import ConversionExtension  # noqa: PLC0415  (slow to import, not always needed)

    def constant(value: object, kind: type[np.generic] = np.int32) -> Any:
        return openvino.opset13.constant(np.array(value, kind)).output(0)

    def none(kind: type[np.generic] = np.int32) -> Any:
        return openvino.opset13.constant(np.zeros((0,), kind)).output(0)

    def convert(node: Any) -> list[Any]:
        query, key, value, keys, values, past, begins, blocks, block_begins, longest = (
            node.get_input(index) for index in range(_OPERANDS)
        )
        operands = [query, key, value, keys, values, past, begins, blocks, block_begins]
        operands += [constant(1.0, np.float32), constant(0), none(np.float32), longest]  # scale, window, ALiBi's slopes
        operands += [none(), none(), none(), none(np.float32), none(np.float32)]  # scores, and keys rotated on the way
        operands += [constant(0), constant(0), none(np.float32), constant(0)]  # sparse attention, sinks
        operands += [none(), none(), none(), none(), none(np.uint8), none()]  # eviction, token types
        attention = make(operands)
        heads, size = node.get_attribute("kv_num_heads"), node.get_attribute("head_size")
        for name, number in {
            "k_head_size": size,
            "num_k_heads": heads,
            "v_head_size": size,
            "num_v_heads": heads,
        }.items():
            attention.get_rt_info()[name] = number
        return [attention.output(0)]

    core.add_extension(ConversionExtension("PagedAttention", PAGED_DOMAIN, convert))
    yield


def free_cache_types(openvino: Any, model: Any) -> None:
    """Leaves type and shape of the caches to the plugin, which wants to choose them."""
    for parameter in model.get_parameters():
        if any(name.startswith(PAST) for name in parameter.output(0).get_names()):
            parameter.set_element_type(openvino.Type.dynamic)
            parameter.set_partial_shape(openvino.PartialShape.dynamic(4))
    model.validate_nodes_and_infer_types()


def cache_types(compiled: Any) -> set[str]:
    """The dtypes in which the plugin keeps keys and values, as OpenVINO calls them."""
    return {
        port.get_element_type().get_type_name()
        for port in compiled.inputs
        if any(name.startswith(PAST) for name in port.get_names())
    }


__all__ = ["cache_types", "free_cache_types", "paged_attention"]
