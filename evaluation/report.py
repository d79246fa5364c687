"""What all reports share: tables and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

Z95: Final = 1.959964
"""Half the width of a 95% interval, in standard deviations of the normal distribution."""


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """The 95% interval of a rate of which ``correct`` out of ``count`` were seen (Wilson's: right at 0 and 1 too)."""
    rate, spread = correct / count, Z95**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # At the ends the exact bounds are 0 and 1; rounding may leave a trace beside them.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


def times(length: int, train_length: int) -> str:
    """A length in trained windows, such as ``16x``."""
    return f"{length / train_length:.3g}x"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that is aligned as it stands, columns to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    ruler = [f"{'-' * (width - 1)}:" for width in widths]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:]))


__all__ = ["Z95", "table", "times", "wilson_interval"]
