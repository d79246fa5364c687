"""Methods that drop keys: of any text they keep a window and the first tokens, so one bucket serves all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesart.graphs.method.all_tail import AllTail
from mesart.graphs.method.plan import Bucket


@dataclass(frozen=True)
class Windowed(AllTail):
    """A method with a :class:`~mesart.graphs.method.sink_window.SinkWindow`."""

    def buckets(self) -> Iterator[Bucket]:
        yield Bucket(0, self.max_tokens, 1)


__all__ = ["Windowed"]
