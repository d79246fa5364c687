"""What product code asks of a long-context method whose graphs are static, whichever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.method.stairs import Stairs
from mesart.graphs.model_config import ModelSource

if TYPE_CHECKING:
    from mesart.graphs.method.plan import Bucket, Plan

Table: TypeAlias = NDArray[np.float32]
"""cos or sin of every position, ``[positions, R]``."""


class StaticMethod(Protocol):
    """A method and its parameters, all that an export fixes: a frozen dataclass of numbers. Lengths are in tokens.

    Whoever plans, traces, checks or measures asks the method and never which one it is. Mesa-Extrapolation is
    :class:`~mesart.graphs.MesaConfig`; :data:`~mesart.graphs.method.registry.STATIC_METHODS` has them all.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # so that ``dataclasses.replace`` takes it

    name: ClassVar[str]
    """Names the method in manifests, on the command line and in messages."""
    rotary_only: ClassVar[bool]
    """Whether it is defined by what rotary embeddings do, and so says nothing of ALiBi or NoPE."""

    @property
    def train_length(self) -> int:
        """T_r, the positions that the model was trained on."""

    @property
    def short_length(self) -> int:
        """Texts of up to so many tokens rotate by frequencies of their own (LongRoPE's short factors); 0: none do."""

    @property
    def log_n(self) -> bool:
        """Whether queries are scaled by ``max(1, ln(t + 1) / ln T_r)``."""

    @property
    def head_length(self) -> int:
        """F, the first tokens, which every chunk sees; 0 if there are no chunks."""

    @property
    def chunk_length(self) -> int:
        """C, the tokens of a chunk; 0 if a prompt is never cut into chunks."""

    @property
    def rerotates(self) -> bool:
        """Whether keys of the cache may change their positions."""

    @property
    def sink_window(self) -> SinkWindow | None:
        """The window and the first tokens that a query sees; None if it sees all keys before it."""

    @property
    def positions(self) -> int:
        """Rows of the position table: every position is below."""

    @property
    def extent(self) -> int:
        """Rows of the longest part of the position table: no two positions are as far apart."""

    def for_model(self, checkpoint: ModelSource) -> StaticMethod:
        """This method with what it leaves out chosen from a model's config."""

    def up_to(self, tokens: int) -> StaticMethod:
        """This method with a position table for texts of ``tokens`` tokens."""

    def buckets(self) -> Iterator[Bucket]:
        """The buckets, smallest first; the first is that of the dense path.

        Raises:
            MesaError: at the end, if they go on beyond what any text may have.
        """

    def require_room(self, tokens: int) -> None:
        """Raises a :class:`~mesart.graphs.errors.MesaError` if a text of ``tokens`` tokens leaves the positions."""

    def plan(self, tokens: int) -> Plan:
        """The plan of a first prompt of at least one token; see :meth:`Plan.of <mesart.graphs.Plan.of>`.

        Raises:
            MesaError: it leaves the positions.
        """

    def plan_between(self, tokens: int, edges: Sequence[int]) -> Plan:
        """The plan of a first prompt that is cut at edges; see :meth:`Plan.of <mesart.graphs.method.plan.Plan.of>`.

        Raises:
            MesaError: it leaves the positions, or the method has no chunks.
        """

    def extension(self, stairs: Stairs, cached: int, tokens: int) -> Plan:
        """The plan of at least one token behind ``cached`` tokens whose positions are ``stairs``.

        Both are rotated by the same frequencies: see :meth:`Plan.extend <mesart.graphs.Plan.extend>`, which asks.

        Raises:
            MesaError: it leaves the positions.
        """

    def rotary_table(self, cos: Table, sin: Table) -> tuple[Table, Table]:
        """The position table that it needs, from a model's own.

        Args:
            cos: float32 ``[train_length + short_length, R]``.
            sin: the same.

        Returns:
            float32 ``[positions, R]`` each.

        Raises:
            MesaError: the model's table cannot be continued.
        """

    def described(self) -> str:
        """The method and its numbers, for people."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON; which method they are of is said by ``name``."""


__all__ = ["StaticMethod", "Table"]
