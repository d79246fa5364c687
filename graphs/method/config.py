"""The numbers of Mesa-Extrapolation that an export fixes."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from mesart.graphs.checks import (
    MOST_TOKENS,
    check_flag,
    check_number,
    check_train_length,
    check_whole,
)
from mesart.graphs.errors import InputError
from mesart.graphs.method import mesa
from mesart.graphs.method.plan import Bucket, Plan
from mesart.graphs.method.protocol import Table
from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.method.stairs import ORDINARY, Stairs
from mesart.graphs.model_config import ModelSource, trained_length


class _LeftOut(enum.IntEnum):
    """A number that is told from one that the user gives by ``is``; copies and pickles of it stay the same object."""

    AUTO = -1

    def __repr__(self) -> str:
        return self.name


AUTO: Final = _LeftOut.AUTO
"""A field left out: chosen from ``train_length`` by the rule of :class:`MesaConfig`."""

Self = TypeVar("Self", bound="MesaConfig")


@dataclass(frozen=True)
class MesaConfig:
    """Chunking, Stair position encoding and query scaling. Lengths are in tokens.

    ``train_length`` is the model's: left out, it is filled in when a model is at hand (:meth:`for_model`). Every other
    field that is left out is chosen from it, which the rule calls T:

    ================ ============================== ==========================================================
    field            rule                           meaning
    ================ ============================== ==========================================================
    head_length      min(128, 5 T / 32)             F, the first tokens, seen by every chunk
    chunk_length     min(1024, T / 2)               C, a middle chunk
    tail_min         min(512, 3 T / 16)             the least number of tokens that see everything
    tail_max         max(512, tail_min)             the most of them, of a text in chunks; None: no limit (the paper)
    linear_window    min(512, T / 8)                N, distances up to here stay as they are
    stair_width      per bucket, from ``rho``       E, keys that share one position beyond the window
    log_n            True                           queries scaled by max(1, ln(t + 1) / ln T)
    rho              0.5                            share of T that window and stairs may take at the tail's start
    ================ ============================== ==========================================================

    ``short_length`` is nothing to choose, but the model's too: read off its rotary module where the model is traced.

    Source: arXiv 2410.15859 v3, sections 4.1 (chunks) and 4.2 (Stair PE); log-n scaling is in the authors' code only.

    Raises:
        MesaError: a combination that would leave the trained range for every prompt.
    """

    name: ClassVar[str] = "mesa"
    rotary_only: ClassVar[bool] = False

    train_length: int = AUTO
    head_length: int = AUTO
    chunk_length: int = AUTO
    tail_min: int = AUTO
    tail_max: int | None = AUTO
    linear_window: int = AUTO
    stair_width: int | None = None
    log_n: bool = True
    rho: float = 0.5
    short_length: int = 0
    """Texts of up to so many tokens rotate by frequencies of their own (LongRoPE's short factors); 0: none do."""

    def __post_init__(self) -> None:
        for name in ("train_length", "head_length", "chunk_length", "tail_min", "linear_window"):
            if getattr(self, name) is not AUTO:
                check_whole(name, getattr(self, name), least=1)
        if self.stair_width is not None:
            check_whole("stair_width", self.stair_width, least=1)
        if self.tail_max is not None and self.tail_max is not AUTO:
            check_whole("tail_max", self.tail_max, least=1)
        check_flag("log_n", self.log_n)
        check_number("rho", self.rho, 0, 1)
        if self.train_length is AUTO:
            return
        check_train_length(self.train_length)
        rule = {
            "head_length": max(1, min(128, self.train_length * 5 // 32)),
            "chunk_length": max(1, min(1024, self.train_length // 2)),
            "tail_min": max(1, min(512, self.train_length * 3 // 16)),
            "linear_window": max(1, min(512, self.train_length // 8)),
        }
        for name, value in rule.items():
            if getattr(self, name) is AUTO:
                object.__setattr__(self, name, value)
        if self.tail_max is AUTO:
            object.__setattr__(self, "tail_max", max(512, self.tail_min))
        self._check()

    def _check(self) -> None:
        window = self.head_length + self.chunk_length
        if window > self.train_length:
            raise InputError(
                f"head_length + chunk_length = {self.head_length} + {self.chunk_length} = {window} is more than the "
                f"trained {self.train_length} positions; lower one of them by {window - self.train_length}"
            )
        check_whole("short_length", self.short_length, least=0, most=self.train_length - 1)
        if self.tail_max is not None and self.tail_max < self.tail_min:
            raise InputError(
                f"tail_max = {self.tail_max} is less than tail_min = {self.tail_min}; raise it, or lower tail_min"
            )
        if not self.linear_window < self.stair_range:
            raise InputError(
                f"linear_window = {self.linear_window} leaves no room for stairs in rho * train_length = "
                f"{self.stair_range} positions; lower linear_window or raise rho"
            )
        if self.stair_range + self.tail_min > self.train_length:
            raise InputError(
                f"rho * train_length + tail_min = {self.stair_range} + {self.tail_min} is more than the trained "
                f"{self.train_length} positions; lower tail_min or rho"
            )

    @property
    def positions(self) -> int:
        """Rows of the position table: every position is below.

        Those of ``train_length`` positions, then, rotated by frequencies of their own, those of ``short_length``.
        """
        return self.train_length + self.short_length

    @property
    def extent(self) -> int:
        """Rows of the longest part of the position table: no two positions are as far apart."""
        return self.train_length

    def up_to(self, tokens: int) -> MesaConfig:
        """This configuration: its position table has the trained positions, however long the text."""
        return self

    def plan(self, tokens: int) -> Plan:
        """The plan of a first prompt: the plain model up to ``train_length`` tokens, chunks beyond."""
        self._require_train_length()
        return mesa.plan(self, tokens)

    def plan_between(self, tokens: int, edges: Sequence[int]) -> Plan:
        """The plan of a first prompt whose chunks begin and end at edges, however short it is."""
        self._require_train_length()
        return mesa.plan_between(self, tokens, edges)

    def extension(self, stairs: Stairs, cached: int, tokens: int) -> Plan:
        """The plan of tokens behind a cache: its anchor moves, or they are cut into chunks of their own."""
        return mesa.extension(self, stairs, cached, tokens)

    def require_room(self, tokens: int) -> None:
        """Raises a :class:`MesaError` if prompts of ``tokens`` tokens leave the trained range."""
        mesa.require_room(self, tokens)

    def rotary_table(self, cos: Table, sin: Table) -> tuple[Table, Table]:
        """The model's own, to which Stair positions keep."""
        return cos, sin

    def stairs(self, tokens: int) -> Stairs:
        """Positions of the tokens of a text of ``tokens`` tokens, at most ``train_length``: their indices."""
        return Stairs(0, 1, self.train_length) if tokens <= self.short_length else ORDINARY

    @property
    def rerotates(self) -> bool:
        """Whether keys of the cache change their positions."""
        return True

    @property
    def sink_window(self) -> SinkWindow | None:
        """What a query sees, if that is not all keys; Mesa keeps all."""
        return None

    @property
    def stair_range(self) -> int:
        """Positions that the linear window and the stairs may take together where the tail starts."""
        return int(self.rho * self.train_length)

    def width_for(self, tokens: int) -> int:
        """The stair width E that serves prompts of up to ``tokens`` tokens."""
        if self.stair_width is not None:
            return self.stair_width
        return self.fitting_width(tokens)

    def fitting_width(self, tokens: int) -> int:
        """The smallest E that keeps window and stairs of ``tokens`` tokens within ``stair_range``."""
        return max(1, math.ceil((tokens - self.linear_window) / (self.stair_range - self.linear_window)))

    def buckets(self) -> Iterator[Bucket]:
        """Buckets of 0 (the dense path), 1, 2, 3, 4, 6, 8, 12, ... chunks: at most a quarter of the slots stays empty.

        Raises:
            MesaError: see :meth:`bucket_lengths`.
        """
        yield Bucket(0, self.train_length, 1)
        for chunks, tokens in self.bucket_lengths():
            yield Bucket(chunks, tokens, self.width_for(tokens))

    def bucket_lengths(self) -> Iterator[tuple[int, int]]:
        """Buckets beyond the trained length: chunks, and the longest prompt that they serve.

        Raises:
            MesaError: at the end, beyond :data:`MOST_TOKENS`, or there is no ``train_length`` yet.
        """
        self._require_train_length()
        power = 1
        while True:
            for chunks in (power, power * 3 // 2) if power > 1 else (1,):
                tokens = self.head_length + chunks * self.chunk_length + self.tail_min
                if tokens > 2 * MOST_TOKENS:  # the bucket of a text is less than twice as long
                    raise InputError(f"no bucket is for more than {MOST_TOKENS} tokens; give fewer (--max-tokens)")
                if tokens > self.train_length:
                    yield chunks, tokens
            power *= 2

    def _require_train_length(self) -> None:
        if self.train_length is AUTO:
            raise InputError("the configuration has no train_length; give one, or use MesaConfig.from_model")

    def described(self) -> str:
        """The method and its numbers, for people."""
        values = {name: value for name, value in self.to_dict().items() if name not in ("train_length", "short_length")}
        described = ", ".join(
            f"{name} {'auto' if value is None or value is AUTO else value}" for name, value in values.items()
        )
        return described + described_short(self.short_length)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[Self], fields: dict[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InputError(f"unknown configuration field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**fields)

    def for_model(self: Self, checkpoint: ModelSource) -> Self:
        """This configuration with what it leaves out chosen from a model, see :meth:`from_model`."""
        if self.train_length is not AUTO:
            return self
        return self.from_model(checkpoint, **{k: v for k, v in self.to_dict().items() if v is not AUTO})

    @classmethod
    def from_model(cls: type[Self], checkpoint: ModelSource, **fields: Any) -> Self:
        """The configuration for a checkpoint folder, hub id or transformers model; ``fields`` override the rule.

        ``train_length`` is the model's ``max_position_embeddings``: for a model that was fine-tuned with scaled
        rotary embeddings (llama3, YaRN, LongRoPE) that is the length it was tuned for.
        """
        if fields.get("train_length") is None:
            fields["train_length"] = trained_length(checkpoint)
        return cls(**{name: value for name, value in fields.items() if value is not None or name == "tail_max"})


def described_short(short_length: int) -> str:
    """The end of a method's description: which texts rotate by frequencies of their own, if any do."""
    if not short_length:
        return ""
    return f"; LongRoPE's short factors up to {short_length} tokens (short_length), its long factors beyond"
