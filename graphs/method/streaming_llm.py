"""Streaming-LLM: a few first tokens as attention sinks, and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.checks import check_whole
from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.method.windowed import Windowed


@dataclass(frozen=True)
class StreamingLLMConfig(Windowed):
    """A query sees a window and the sinks, whose positions are then directly before the window."""

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
    def sink_window(self) -> SinkWindow:
        return SinkWindow(
            self.window,
            self.sinks,
            min_position=self.sinks,
            query_position=self.sinks + self.window - 1,
            sinks_at_zero=False,
        )


__all__ = ["StreamingLLMConfig"]
