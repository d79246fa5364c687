"""Mesa-Extrapolation: chunks that see the head and themselves, and Stair position encoding for the tail.

Rule: :class:`~mesart.graphs.Plan`; the head attends causally, a chunk to the head and causally to itself at local
positions, the tail and every generated token to everything at Stair positions. The tail's queries are scaled by log-n.
Parameters: those of :class:`~mesart.graphs.MesaConfig`, with its defaults; ``log_n`` is on.
Cost: about ``T (F + C / 2)`` scores for the chunks and ``tail T`` for the tail at prefill; all keys are kept, once:
placing a chunk's keys turns them where they lie.
Within ``T_r`` equal to the plain model.
Source: arXiv 2410.15859 v3, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesart.evaluation.methods.method import (
    Indices,
    Method,
    Part,
    Positions,
    Rule,
    Span,
    arange,
    constant,
    cut,
    require_types,
)
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan, query_scales
from mesart.graphs.method.plan import Span as PlanSpan

STANDING = "standing"
"""The one view: keys stand where the last run had them, at local positions or on stairs."""


class MesaRule(Rule):
    """Mesa's plan for one prompt, and for every token generated behind it."""

    views = (STANDING,)
    moves = True
    window_by_position = True

    def __init__(self, config: MesaConfig, tokens: int) -> None:
        self._config = config
        self._plan = Plan.of(config, tokens)
        self._in_tail = False

    def runs(self, start: int, stop: int, size: int) -> Iterator[Span]:
        edge = self._plan.tail.start
        yield from cut(start, min(edge, stop), size)
        yield from cut(max(start, edge), stop, size)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[Span]:
        if self._in_tail:
            yield from cut(start, stop, size)
        else:
            head, period = self._config.head_length, self._config.chunk_length
            yield from cut(start, min(head, stop), size)
            yield from cut(max(start, head), stop, size, head, period)

    def enter(self, start: int, stop: int) -> None:
        self._in_tail = start >= self._plan.tail.start

    def step(self, cached: int) -> None:
        self._plan = Plan.extend(self._config, self._plan.stairs, cached, 1)
        if self._plan.start != cached or self._plan.chunks:
            raise InputError(f"no trained position is left for token {cached}; raise train_length or lower tail_min")

    def parts(self, start: int, stop: int) -> list[Part]:
        t = arange(start, stop)
        zero = constant(0, t)
        if self._in_tail:
            return [Part(STANDING, zero, t + 1, self.key_positions(STANDING, t))]
        own = self._chunk_start(t)
        head = np.minimum(own, self._config.head_length)
        local = self.key_positions(STANDING, t)
        return [Part(STANDING, zero, head, local), Part(STANDING, own, t + 1, local)]

    def key_positions(self, view: str, tokens: Indices) -> Positions:
        if self._in_tail:
            stairs = self._plan.stairs
            last = int(tokens.max(initial=-1)) + 1
            return stairs.positions(0, last)[tokens].astype(np.float64)
        own = self._chunk_start(tokens)
        return (tokens - own + np.where(own > 0, self._config.head_length, 0)).astype(np.float64)

    def query_scales(self, start: int, stop: int) -> Positions | None:
        if not self._in_tail or not self._config.log_n:
            return None
        return query_scales(self._config, PlanSpan(start, stop)).astype(np.float64)

    def _chunk_start(self, tokens: Indices) -> Indices:
        """The first token of the chunk that a token belongs to; 0 in the head."""
        starts = np.array([0, *(chunk.start for chunk in self._plan.chunks)], dtype=np.int64)
        return starts[np.searchsorted(starts, tokens, side="right") - 1]


@dataclass(frozen=True)
class Mesa(Method):
    """See the module."""

    name = "mesa"

    config: MesaConfig
    log_n: bool = field(default=True, kw_only=True)

    @classmethod
    def of(cls, train_length: int, max_tokens: int | None = None, **parameters: Any) -> Mesa:
        """``parameters``: fields of :class:`MesaConfig`. ``max_tokens`` decides nothing: stairs follow the prompt."""
        del max_tokens
        require_types(MesaConfig, parameters)
        config = MesaConfig.from_dict({"train_length": train_length, **parameters})
        return cls(train_length, config, log_n=config.log_n)

    @property
    def parameters(self) -> dict[str, Any]:
        fields = self.config.to_dict()
        del fields["train_length"]
        return fields

    def for_prompt(self, tokens: int) -> MesaRule:
        return MesaRule(self.config, tokens)

    def logits_of(self, tokens: int) -> int:
        return len(Plan.of(self.config, tokens).tail)

    def static(self) -> MesaConfig:
        return self.config
