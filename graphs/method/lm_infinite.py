"""LM-Infinite: a mask shaped like a lambda, and a ceiling for distances."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.checks import check_whole
from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.method.windowed import Windowed


@dataclass(frozen=True)
class LMInfiniteConfig(Windowed):
    """A query sees a window and the first tokens; distances beyond the window count as the window."""

    name = "lm-infinite"

    window: int
    """The last tokens that a query sees, itself among them."""
    first_tokens: int
    """The first tokens, which every query sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(f"{self.name}: window", self.window, least=1)
        check_whole(f"{self.name}: first_tokens", self.first_tokens, least=0)

    @property
    def sink_window(self) -> SinkWindow:
        return SinkWindow(
            self.window, self.first_tokens, min_position=0, query_position=self.window, sinks_at_zero=True
        )


__all__ = ["LMInfiniteConfig"]
