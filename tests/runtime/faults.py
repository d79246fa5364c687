"""Faults on demand: a model's runs and rotations are counted, and fail when they are told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, cast

from mesart.graphs import MesaError
from mesart.graphs.bundle.names import Phase
from mesart.runtime import MesaModel
from mesart.runtime.kv.store import Array, Positions
from mesart.runtime.runners.runner import Logits, Runner, Segment


class Interruption(BaseException):
    """As of a user: no library catches it."""


class Watched:
    """A runner that does as another one."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.last_logits_only, self.whole_slices = inner.last_logits_only, inner.whole_slices

    def slice_length(self, phase: Phase, past: int) -> int:
        return self.inner.slice_length(phase, past)

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        return self.inner.run(segments)

    def close(self) -> None:
        self.inner.close()


class Faults(Watched):
    """Stands between a model, its runner and the rotations of its store; with ``with``, for that long.

    Runs and rotations are counted together, from when a fault was last asked for. Asked for none, nothing fails.

    Args:
        writes: whether a run that fails has written all it had to by then, as one of an engine that writes in place.
    """

    def __init__(self, model: MesaModel, *, writes: bool = False) -> None:
        self.phases: list[Phase] = []
        """Of the segments that have been run."""
        self.rotations = 0
        self.count = 0
        self._writes = writes
        self._is_due: Callable[[int, Sequence[Segment] | None], bool] = _never
        self._error: type[BaseException] = Interruption
        self._engine, self._store = model.engine, cast(Any, model.engine.store)
        super().__init__(model.engine.runner)
        self._rotate = self._store.rotation
        self._engine.runner, self._store.rotation = self, self._rotation

    def __enter__(self) -> Faults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.runner, self._store.rotation = self.inner, self._rotate

    def none(self) -> None:
        self._ask(_never, Interruption)

    def at(self, nth: int, error: type[BaseException] = Interruption) -> None:
        """The ``nth`` run or rotation fails, once."""
        self._ask(lambda count, _: count == nth, error)

    def from_on(self, nth: int, error: type[BaseException] = MesaError) -> None:
        """The ``nth`` run or rotation fails, and all runs behind it: an engine tries each text on its own then."""
        self._ask(lambda count, segments: count == nth or (count > nth and segments is not None), error)

    def in_runs(self, chosen: Callable[[Segment], bool], error: type[BaseException] = MesaError) -> None:
        """Each run fails that has such a segment."""
        self._ask(lambda _, segments: segments is not None and any(map(chosen, segments)), error)

    def in_rotations(self, error: type[BaseException] = Interruption) -> None:
        """Each rotation fails."""
        self._ask(lambda _, segments: segments is None, error)

    def _ask(self, is_due: Callable[[int, Sequence[Segment] | None], bool], error: type[BaseException]) -> None:
        self._is_due, self._error, self.count = is_due, error, 0

    def _pass(self, segments: Sequence[Segment] | None) -> None:
        self.count += 1
        if self._is_due(self.count, segments):
            if segments is not None and self._writes:
                self._write_in_vain(segments)
            raise self._error("the engine gave up")

    def _write_in_vain(self, segments: Sequence[Segment]) -> None:
        before = [segment.kv.length for segment in segments]
        self.inner.run(segments)
        for segment, length in zip(segments, before, strict=True):
            segment.kv.length = length

    def _rotation(self, layer: int, keys: Array, old: Positions, new: Positions) -> Array:
        self.rotations += 1
        self._pass(None)
        rotated: Array = self._rotate(layer, keys, old, new)
        return rotated

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        self._pass(segments)
        self.phases += [segment.phase for segment in segments]
        return self.inner.run(segments)


def _never(count: int, segments: Sequence[Segment] | None) -> bool:
    del count, segments
    return False
