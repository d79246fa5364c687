"""YaRN: frequencies interpolated by parts, and a temperature."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.checks import check_number
from mesart.graphs.method.all_tail import MOST_FACTOR, AllTail
from mesart.graphs.method.frequencies import Frequencies, yarn


@dataclass(frozen=True)
class YarnConfig(AllTail):
    """Frequencies that are the same for texts of any length; see :func:`mesart.graphs.method.frequencies.yarn`."""

    name = "yarn"
    rotary_only = True

    factor: float
    """s: pairs that rotate little within ``train_length`` rotate s times slower."""
    fast: float = 32.0
    """Pairs that rotate more often than that within ``train_length`` stay."""
    slow: float = 1.0
    """Pairs that rotate less often than that are slowed by all of ``factor``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(f"{self.name}: factor", self.factor, 1, MOST_FACTOR)
        check_number(f"{self.name}: slow", self.slow, 0.01, MOST_FACTOR)
        check_number(f"{self.name}: fast", self.fast, self.slow, MOST_FACTOR)

    def rescaled(self, frequencies: Frequencies, tokens: int) -> tuple[Frequencies, float]:
        return yarn(frequencies, self.train_length, self.factor, self.fast, self.slow)


__all__ = ["YarnConfig"]
