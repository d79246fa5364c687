"""Dynamic-NTK: the rotary base grows with the text."""

from __future__ import annotations

from dataclasses import dataclass

from mesart.graphs.checks import check_number
from mesart.graphs.method.all_tail import MOST_FACTOR, AllTail
from mesart.graphs.method.frequencies import Frequencies, dynamic_ntk


@dataclass(frozen=True)
class DynamicNtkConfig(AllTail):
    """Frequencies of a base that follows from the number of tokens, the model's own up to ``train_length``."""

    name = "dynamic-ntk"
    rotary_only = True

    factor: float = 2.0
    """s: of n tokens, the base grows ``(s n / T_r - (s - 1)) ** (R / (R - 2))``-fold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(f"{self.name}: factor", self.factor, 1, MOST_FACTOR)

    @property
    def rerotates(self) -> bool:
        return True

    @property
    def levels(self) -> list[int]:
        """Of each bucket: the number of tokens is rounded up to the bucket's.

        So keys rotate anew only where a text outgrows its bucket, not at every token.
        """
        lengths = []
        for bucket in self.buckets():
            lengths.append(bucket.max_tokens)
            if lengths[-1] >= self.max_tokens:
                break
        return lengths

    def rescaled(self, frequencies: Frequencies, tokens: int) -> tuple[Frequencies, float]:
        if tokens <= self.train_length:
            return frequencies, 1.0
        return dynamic_ntk(frequencies, self.factor * tokens / self.train_length - (self.factor - 1)), 1.0


__all__ = ["DynamicNtkConfig"]
