"""Origin: the model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.method.all_tail import AllTail


@dataclass(frozen=True)
class OriginConfig(AllTail):
    """No parameters: every query sees every key before it, at its own distance."""

    name = "origin"


__all__ = ["OriginConfig"]
