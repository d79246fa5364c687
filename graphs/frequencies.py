"""How methods change the speed at which rotary embeddings turn: one frequency for each pair of dimensions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.float64]
"""Radians a position, a pair each, ``[R / 2]``."""


def dynamic_ntk(frequencies: Frequencies, growth: float) -> Frequencies:
    """Frequencies of a base that is ``growth ** (R / (R - 2))`` times as large.

    Pair j turns by ``base ** (-2 j / R)`` radians a position, so a new base is a factor of the frequencies that needs
    no base. Source: "NTK-aware" scaling as in YaRN (arXiv 2309.00071), section 3.1.
    """
    turning = 2 * len(frequencies)
    if turning <= 2:
        return frequencies
    pair = np.arange(len(frequencies))
    slowed: Frequencies = frequencies * growth ** (-2 * pair / (turning - 2))
    return slowed


def yarn(
    frequencies: Frequencies, train_length: int, factor: float, fast: float, slow: float
) -> tuple[Frequencies, float]:
    """YaRN's frequencies, and the factor of turned queries and keys.

    Pairs that turn more than ``fast`` times within ``train_length`` stay, those that turn less than ``slow`` times turn
    ``factor`` times slower, those between are mixed, linearly in the pair's index. Source: arXiv 2309.00071, sections
    3.2 (NTK-by-parts) and 3.4; the ramp over the index, with its ends rounded to whole pairs, is that of the authors'
    and transformers' code (the paper's text has it over the number of turns).
    """
    pairs = len(frequencies)
    first = abs(frequencies[0])
    ratio = first / abs(frequencies[1]) if pairs > 1 else math.e

    def pair(turns: float) -> float:
        """The index, not whole, of the pair that turns so often within T_r; from the ratio of the first two."""
        return math.log(train_length * first / (2 * math.pi * turns)) / math.log(ratio)

    low = max(math.floor(pair(fast)), 0)
    high = min(math.ceil(pair(slow)), 2 * pairs - 1)
    slowed = ((np.arange(pairs) - low) / max(high - low, 0.001)).clip(0, 1)
    return frequencies * (slowed / factor + 1 - slowed), 0.1 * math.log(factor) + 1


__all__ = ["Frequencies", "dynamic_ntk", "yarn"]
