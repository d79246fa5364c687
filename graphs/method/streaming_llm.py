"""Streaming-LLM: a few first tokens as attention sinks, and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.checks import check_whole
from mesart.graphs.method.reach import Reach
from mesart.graphs.method.windowed import Windowed


@dataclass(frozen=True)
class StreamingLLMConfig(Windowed):
    """A query sees a window and the sinks, which then stand directly before the window."""

    name = "streaming-llm"

    sinks: int
    """The first tokens, which every query sees."""
    window: int
    """The last tokens that a query sees, itself among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(f"{self.name}: sinks", self.sinks, least=0)
        check_whole(f"{self.name}: window", self.window, least=1)

    @property
    def reach(self) -> Reach:
        return Reach(self.window, self.sinks, floor=self.sinks, far=self.sinks + self.window - 1, at_zero=False)


__all__ = ["StreamingLLMConfig"]
