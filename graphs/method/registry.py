"""The methods whose graphs are static, by name, and how one is written into a manifest."""

from __future__ import annotations

from typing import Any, Final

from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.dynamic_ntk import DynamicNtkConfig
from mesart.graphs.method.lm_infinite import LMInfiniteConfig
from mesart.graphs.method.origin import OriginConfig
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.method.streaming_llm import StreamingLLMConfig
from mesart.graphs.method.yarn import YarnConfig

STATIC_METHODS: Final[dict[str, type[StaticMethod]]] = {
    method.name: method
    for method in (MesaConfig, OriginConfig, DynamicNtkConfig, YarnConfig, LMInfiniteConfig, StreamingLLMConfig)
}
"""The methods that an export can fix, Mesa first."""

METHOD_FIELD: Final = "method"
"""The field of a method's JSON that names it, and so says which other fields there are."""


def method_to_json(method: StaticMethod) -> dict[str, Any]:
    """A method as it stands in a manifest: its name and all its fields."""
    return {METHOD_FIELD: method.name, **method.to_dict()}


__all__ = ["METHOD_FIELD", "STATIC_METHODS", "method_to_json"]
