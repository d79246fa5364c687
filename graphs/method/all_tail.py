"""Methods without chunks: a plan is all tail, and every token's position is its index."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.checks import MOST_POSITIONS, check_flag, check_train_length, check_whole
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import AUTO, MesaConfig, described_short
from mesart.graphs.method.frequencies import Frequencies, table_frequencies
from mesart.graphs.method.plan import Bucket, Plan, Span
from mesart.graphs.method.protocol import Table
from mesart.graphs.method.sink_window import SinkWindow
from mesart.graphs.method.stairs import Stairs
from mesart.graphs.model_config import ModelSource

MOST_FACTOR: Final = 1e9
"""The largest factor that frequencies may be divided by: no text is so many times longer than a window."""

Floats = NDArray[np.float64]
Self = TypeVar("Self", bound="AllTail")

_NO_PARAMETERS: Final = ("train_length", "log_n", "max_tokens", "short_length")


@dataclass(frozen=True)
class AllTail(ABC):
    """A method that is exported to compare Mesa with, and its parameters. Lengths are in tokens.

    The position table has a row for each token of the longest text. The buckets have the lengths of those of Mesa with
    its defaults, so that bundles of all methods are alike.

    The fields of a subclass are the method's parameters; where the method comes from is said in
    :mod:`mesart.evaluation.methods`, what is asked of every method at
    :class:`~mesart.graphs.method.protocol.StaticMethod`.

    Raises:
        MesaError: a parameter that is no number in its range.
    """

    name: ClassVar[str]
    rotary_only: ClassVar[bool] = False

    train_length: int
    """T_r, the positions that the model was trained on."""
    log_n: bool = field(default=False, kw_only=True)
    """Queries multiplied by ``max(1, ln(t + 1) / ln T_r)``: no part of most methods, a switch for fair comparisons."""
    max_tokens: int = field(default=AUTO, kw_only=True)
    """The longest text, generated tokens included: the position table ends there. Left out until :meth:`up_to`."""
    short_length: int = field(default=0, kw_only=True)
    """See :class:`~mesart.graphs.method.config.MesaConfig`: the model's, and nothing to choose."""

    def __post_init__(self) -> None:
        check_train_length(self.train_length)
        check_flag("log_n", self.log_n)
        check_whole("short_length", self.short_length, least=0, most=self.train_length - 1)
        if self.max_tokens is not AUTO:
            check_whole("max_tokens", self.max_tokens, least=1, most=MOST_POSITIONS)

    @classmethod
    def parameter_names(cls) -> list[str]:
        """The names of the method's own parameters, and ``log_n``."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in _NO_PARAMETERS] + ["log_n"]

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's own parameters, and ``log_n``."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    @property
    def head_length(self) -> int:
        return 0

    @property
    def chunk_length(self) -> int:
        return 0

    @property
    def rerotates(self) -> bool:
        return False

    @property
    def sink_window(self) -> SinkWindow | None:
        return None

    @property
    def levels(self) -> list[int]:
        """The longest text of each part of the position table; a part each has its own frequencies."""
        return [self.max_tokens]

    @property
    def positions(self) -> int:
        return sum(self.levels) + self.short_length

    @property
    def extent(self) -> int:
        return max(self.levels)

    def for_model(self: Self, checkpoint: ModelSource) -> Self:
        """This method: it leaves nothing out."""
        return self

    def up_to(self: Self, tokens: int) -> Self:
        return dataclasses.replace(self, max_tokens=tokens)

    def buckets(self) -> Iterator[Bucket]:
        yield Bucket(0, self.train_length, 1)
        for chunks, tokens in _mesa(self.train_length).bucket_lengths():
            yield Bucket(chunks, tokens, 1)

    def require_room(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise InputError(
                f"a text of {tokens} tokens is longer than the position table of this {self.name} bundle, "
                f"{self.max_tokens} tokens; export again with --max-tokens {tokens}"
            )

    def plan(self, tokens: int) -> Plan:
        return Plan(self, 0, tokens, None, (), Span(0, tokens), self.stairs(tokens))

    def plan_between(self, tokens: int, edges: Sequence[int]) -> Plan:
        raise InputError(
            f"the method {self.name} has no chunks; a prompt of {tokens} tokens cannot be cut at documents"
        )

    def extension(self, stairs: Stairs, cached: int, tokens: int) -> Plan:
        """Positions are those of a first prompt of that length, whatever those of the cache are."""
        length = cached + tokens
        return Plan(self, cached, length, None, (), Span(cached, length), self.stairs(length))

    def stairs(self, tokens: int) -> Stairs:
        """Positions of the tokens of a text of ``tokens`` tokens.

        Raises:
            MesaError: it is longer than the position table.
        """
        self.require_room(tokens)
        if tokens <= self.short_length:
            return Stairs(0, 1, sum(self.levels))
        offset = 0
        for length in self.levels:
            if tokens <= length:
                break
            offset += length
        return Stairs(0, 1, offset)

    def rescaled(self, frequencies: Frequencies, tokens: int) -> tuple[Frequencies, float]:
        """The method's rotary frequencies, and a factor of rotated queries and keys.

        Args:
            frequencies: the model's own, radians a position, a pair of dimensions each, float64 ``[R / 2]``.
            tokens: the number of tokens of the text.
        """
        return frequencies, 1.0

    def rotary_table(self, cos: Table, sin: Table) -> tuple[Table, Table]:
        """The model's table continued, once for each level, by the method's frequencies.

        A column is a frequency, read off the table itself, with whatever scaling the model was tuned with in it.

        Raises:
            MesaError: the angles of the table are not proportional to the position.
        """
        long = len(cos) - self.short_length
        parts = self._continued(cos[:long], sin[:long], self.levels)
        if self.short_length:
            parts += self._continued(cos[long:], sin[long:], [self.short_length])
        cosines, sines = (np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True))
        return cosines, sines

    def _continued(self, cos: Table, sin: Table, lengths: list[int]) -> list[tuple[Floats, Floats]]:
        """cos and sin for texts of each length, ``[length, R]``, from a table of one set of frequencies."""
        real, imaginary = cos.astype(np.float64), sin.astype(np.float64)
        scale = np.hypot(real[1], imaginary[1])
        radians = table_frequencies(real / scale, imaginary / scale)
        pairs = _pair_of_columns(cos)
        first = np.unique(pairs, return_index=True)[1]
        parts = []
        for length in lengths:
            rescaled, factor = self.rescaled(radians[first], length)
            angles = np.arange(length)[:, None] * rescaled[pairs]
            parts.append((np.cos(angles) * scale * factor, np.sin(angles) * scale * factor))
        return parts

    def described(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.name}: {values}{described_short(self.short_length)}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@functools.cache
def _mesa(train_length: int) -> MesaConfig:
    """Mesa with its defaults, whose buckets the other methods have too."""
    return MesaConfig(train_length)


def _pair_of_columns(cos: Table) -> NDArray[np.int64]:
    """The pair that each column of a table rotates: a table has each angle once, or twice as halves or neighbours."""
    columns = cos.shape[1]
    half, column = columns // 2, np.arange(columns, dtype=np.int64)
    if columns % 2 == 0 and np.array_equal(cos[:, :half], cos[:, half:]):
        return np.concatenate([column[:half], column[:half]])
    if columns % 2 == 0 and np.array_equal(cos[:, 0::2], cos[:, 1::2]):
        return np.repeat(column[:half], 2)
    return column


__all__ = ["MOST_FACTOR", "AllTail"]
