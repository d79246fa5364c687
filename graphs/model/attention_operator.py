"""The operator ``mesart::Attention``: what a trace leaves of a layer's attention, and the export writes out.

Axes: B batch, S new tokens, P past tokens, H heads, K key-value heads, D head size, F first tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from mesart.graphs.method.sink_window import SinkWindow

DOMAIN: Final = "mesart"
OPERATOR: Final = f"{DOMAIN}::Attention"

_SINK_WINDOW = "sink_window_"

T = TypeVar("T")


@dataclass(frozen=True)
class AttentionOperands(Generic[T]):
    """The inputs of the operator in their order: tensors while a model is traced, then values of the graph."""

    query: T
    """``[B, H, S, D]``, scaled."""
    key: T
    value: T
    """``[B, K, S, D]``."""
    past_key: T
    past_value: T
    """``[B, K, P, D]``."""
    past_mask: T
    """Added to the scores of past keys, float32 ``[B, 1, 1, P]``."""
    new_mask: T
    """Added to the scores of new keys, float32 ``[B, 1, S, S]``."""
    positions: T | None = None
    """Of the new tokens, int64 ``[B, S]``; of layers that look at positions."""
    past_positions: T | None = None
    """Of the past keys, int64 ``[B, P]``; of layers that look at positions."""
    sinks: T | None = None
    """The score of each head's sink, ``[H]``."""
    far_query: T | None = None
    """Queries as they meet the first tokens beyond the window, ``[B, H, S, D]``."""
    far_key: T | None = None
    """Keys of the first tokens as queries beyond the window meet them, ``[B, K, F, D]``."""

    def to_inputs(self) -> tuple[T | None, ...]:
        """Those of the operator's node."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def from_node(cls, inputs: Sequence[T | None]) -> AttentionOperands[T]:
        """Of the inputs of a node, whose last ones may be left out."""
        names = (field.name for field in dataclasses.fields(cls))
        given: dict[str, Any] = dict(zip(names, inputs, strict=False))
        return cls(**given)


@dataclass(frozen=True)
class AttentionAttributes:
    """The attributes of the operator."""

    layer: int
    softcap: float = 0.0
    """Scores are bent to stay within it; 0: they are not."""
    window: int = 0
    """A key is seen where its position is less than this before the query's; 0: wherever it is."""
    slopes: tuple[float, ...] = ()
    """ALiBi's, one a head."""
    sink_window: SinkWindow | None = None
    """What queries see, where that is not all; with it ``far_query`` and ``far_key`` are given."""

    def to_attributes(self) -> dict[str, Any]:
        """Those of the operator's node: numbers, and lists of numbers."""
        attributes: dict[str, Any] = {"layer": self.layer, "softcap": self.softcap, "window": self.window}
        if self.slopes:
            attributes["slopes"] = list(self.slopes)
        if self.sink_window is not None:
            attributes |= {_SINK_WINDOW + name: int(value) for name, value in vars(self.sink_window).items()}
        return attributes

    @classmethod
    def from_node(cls, attributes: Mapping[str, Any]) -> AttentionAttributes:
        """Of the attributes of a node."""
        plain = {name: value for name, value in attributes.items() if not name.startswith(_SINK_WINDOW)}
        plain["slopes"] = tuple(plain.get("slopes", ()))
        fields = {
            name.removeprefix(_SINK_WINDOW): value
            for name, value in attributes.items()
            if name.startswith(_SINK_WINDOW)
        }
        sink_window = SinkWindow(**fields | {"sinks_at_zero": bool(fields["sinks_at_zero"])}) if fields else None
        return cls(**plain, sink_window=sink_window)
