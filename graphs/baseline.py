"""Methods to compare with whose graphs are static too: what an export of one fixes.

Every token stands at its own index, in a table of as many rows as the longest text has tokens, and there are no chunks:
a plan is all tail. What they mean and where they come from is said in :mod:`mesart.evaluation.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.config import AUTO, MOST_POSITIONS, MesaConfig, check_number, check_whole
from mesart.graphs.errors import InputError
from mesart.graphs.frequencies import Frequencies, dynamic_ntk, yarn
from mesart.graphs.reach import Reach
from mesart.graphs.stairs import Stairs

Floats = NDArray[np.float64]

BASELINES: Final = ("origin", "dynamic-ntk", "yarn", "lm-infinite", "streaming-llm")


@dataclass(frozen=True)
class BaselineConfig(MesaConfig):
    """A method other than Mesa-Extrapolation and its parameters; lengths are in tokens.

    ``log_n`` is what it is in Mesa. The other fields of Mesa only give the lengths of the buckets, which are so the
    same in bundles of all methods.

    Raises:
        MesaError: no such method, or a parameter that is no number in its range.
    """

    method: str = "origin"
    factor: float = 1.0
    """s of Dynamic-NTK and YaRN."""
    fast: float = 32.0
    slow: float = 1.0
    """Of YaRN."""
    window: int = 0
    first_tokens: int = 0
    """Of LM-Infinite and Streaming-LLM."""
    max_tokens: int = AUTO
    """The longest text, generated tokens included: the position table ends there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in BASELINES:
            raise InputError(
                f"{self.method!r:.40} is no method with static graphs; there are mesa, {', '.join(BASELINES)}"
            )
        for name in ("factor", "fast", "slow"):
            check_number(name, getattr(self, name), 1e-3, 1e6)
        check_whole("window", self.window, least=int(self.method in ("lm-infinite", "streaming-llm")))
        check_whole("first_tokens", self.first_tokens, least=0)
        if self.max_tokens is not AUTO:
            check_whole("max_tokens", self.max_tokens, least=1, most=MOST_POSITIONS)

    def up_to(self, tokens: int) -> BaselineConfig:
        """This configuration with a position table for texts of ``tokens`` tokens."""
        return replace(self, max_tokens=tokens)

    def described(self) -> str:
        names = {
            "dynamic-ntk": ("factor",),
            "yarn": ("factor", "fast", "slow"),
            "lm-infinite": ("window", "first_tokens"),
            "streaming-llm": ("window", "first_tokens"),
        }.get(self.method, ())
        described = ", ".join(f"{name} {getattr(self, name)}" for name in (*names, "log_n"))
        return f"{self.method}: {described}{self._described_short()}"

    @property
    def turns(self) -> bool:
        """Whether it is rotary frequencies that it changes."""
        return self.method in ("dynamic-ntk", "yarn")

    @property
    def reach(self) -> Reach | None:
        """What a query sees, if that is not all."""
        if self.method == "lm-infinite":
            return Reach(self.window, self.first_tokens, floor=0, far=self.window, at_zero=True)
        if self.method == "streaming-llm":
            first = self.first_tokens
            return Reach(self.window, first, floor=first, far=first + self.window - 1, at_zero=False)
        return None

    @property
    def moves(self) -> bool:
        return self.method == "dynamic-ntk"

    @property
    def levels(self) -> list[int]:
        """The longest text of each part of the position table; a part each has its own frequencies.

        Dynamic-NTK's frequencies follow from the number of tokens. Here that is rounded up to the bucket's, so that
        keys turn anew only where a text outgrows its bucket, not at every token.
        """
        if self.method != "dynamic-ntk":
            return [self.max_tokens]
        lengths = [self.train_length]
        for _, tokens in self.bucket_lengths():
            if lengths[-1] >= self.max_tokens:
                break
            lengths.append(tokens)
        return lengths

    @property
    def positions(self) -> int:
        return sum(self.levels) + self.short_length

    @property
    def extent(self) -> int:
        return max(self.levels)

    def turned(self, frequencies: Frequencies, tokens: int) -> tuple[Frequencies, float]:
        """The frequencies for texts of up to ``tokens`` tokens, and a factor of turned queries and keys."""
        if self.method == "dynamic-ntk" and tokens > self.train_length:
            return dynamic_ntk(frequencies, self.factor * tokens / self.train_length - (self.factor - 1)), 1.0
        if self.method == "yarn":
            return yarn(frequencies, self.train_length, self.factor, self.fast, self.slow)
        return frequencies, 1.0

    def stairs(self, tokens: int) -> Stairs:
        """Where the tokens of a text of ``tokens`` tokens stand.

        Raises:
            MesaError: it is longer than the position table.
        """
        if tokens <= self.short_length:
            return Stairs(0, 1, sum(self.levels))
        offset = 0
        for length in self.levels:
            if tokens <= length:
                return Stairs(0, 1, offset)
            offset += length
        raise InputError(
            f"a text of {tokens} tokens is longer than the position table of this {self.method} bundle, "
            f"{self.max_tokens} tokens; export again with --max-tokens {tokens}"
        )

    def table(self, cos: Floats, sin: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A model's table of cos and sin, float64 ``[train_length + short_length, R]``, for all levels.

        A column is a frequency, read off the table itself, with whatever scaling the model was tuned with in it.

        Returns:
            float32 ``[positions, R]``.

        Raises:
            MesaError: the angles of the table are not proportional to the position.
        """
        long = len(cos) - self.short_length
        parts = self._stretched(cos[:long], sin[:long], self.levels)
        if self.short_length:
            parts += self._stretched(cos[long:], sin[long:], [self.short_length])
        cosines, sines = (np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True))
        return cosines, sines

    def _stretched(self, cos: Floats, sin: Floats, lengths: list[int]) -> list[tuple[Floats, Floats]]:
        """cos and sin for texts of each length, ``[length, R]``, from a table of one set of frequencies."""
        radians, scale = np.arctan2(sin[1], cos[1]), np.hypot(cos[1], sin[1])
        known = np.arange(len(cos))[:, None] * radians
        # A table is float32, its angles too: they lose 6e-8 of their size.
        if np.abs(cos / scale - np.cos(known)).max() > 1e-6 * len(cos) + 1e-5:
            raise InputError(
                f"the rotary table's angles do not grow evenly with the position, so {self.method} cannot go on with "
                "them beyond train_length"
            )
        pairs = _pair_of_columns(cos)
        first = np.unique(pairs, return_index=True)[1]
        parts = []
        for length in lengths:
            turned, factor = self.turned(radians[first], length)
            angles = np.arange(length)[:, None] * turned[pairs]
            parts.append((np.cos(angles) * scale * factor, np.sin(angles) * scale * factor))
        return parts


def _pair_of_columns(cos: Floats) -> NDArray[np.int64]:
    """The pair that each column of a table turns: a table has each angle once, or twice as halves or neighbours."""
    columns = cos.shape[1]
    half, column = columns // 2, np.arange(columns, dtype=np.int64)
    if columns % 2 == 0 and np.array_equal(cos[:, :half], cos[:, half:]):
        return np.concatenate([column[:half], column[:half]])
    if columns % 2 == 0 and np.array_equal(cos[:, 0::2], cos[:, 1::2]):
        return np.repeat(column[:half], 2)
    return column


__all__ = ["BASELINES", "BaselineConfig"]
