"""The speed at which rotary embeddings rotate, one frequency for each pair of dimensions, and how methods change it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import InputError

Frequencies = NDArray[np.float64]
"""Radians a position, a pair each, ``[R / 2]``."""


def table_frequencies(cos: NDArray[np.float64], sin: NDArray[np.float64]) -> Frequencies:
    """Radians a position of each column of a position table, float64 ``[R]``.

    Args:
        cos: float64 ``[positions, R]``, divided by the scale that some models put into their tables.
        sin: the same.

    Raises:
        MesaError: the angles of the table are not proportional to the position.
    """
    radians: Frequencies = np.arctan2(sin[1], cos[1])
    angles = np.arange(len(cos))[:, None] * radians
    # A table is float32, its angles too: they lose 6e-8 of their size.
    if np.abs(cos - np.cos(angles)).max() > 1e-6 * len(cos) + 1e-5:
        raise InputError(
            "the rotary table's angles do not grow evenly with the position, so it cannot be continued; only Mesa's "
            "graphs, which look positions up in it, take such a model"
        )
    return radians


def dynamic_ntk(frequencies: Frequencies, growth: float) -> Frequencies:
    """Frequencies of a base that is ``growth ** (R / (R - 2))`` times as large.

    Pair j rotates by ``base ** (-2 j / R)`` radians a position, so a new base is a factor of the frequencies that needs
    no base. Source: "NTK-aware" scaling as in YaRN (arXiv 2309.00071), section 3.1.
    """
    rotary_dim = 2 * len(frequencies)
    if rotary_dim <= 2:
        return frequencies
    pair = np.arange(len(frequencies))
    slowed: Frequencies = frequencies * growth ** (-2 * pair / (rotary_dim - 2))
    return slowed


def yarn(
    frequencies: Frequencies, train_length: int, factor: float, fast: float, slow: float
) -> tuple[Frequencies, float]:
    """YaRN's frequencies, and the factor of rotated queries and keys.

    Pairs that rotate more than ``fast`` times within ``train_length`` stay, those that rotate less than ``slow`` times
    get frequencies ``factor`` times lower, those between are mixed, linearly in the pair's index. Source: arXiv
    2309.00071, sections 3.2 (NTK-by-parts) and 3.4; the ramp over the index, with its ends rounded to whole pairs, is
    that of the authors' and transformers' code (the paper's text has it over the number of rotations).
    """
    pairs = len(frequencies)
    first = abs(frequencies[0])
    ratio = first / abs(frequencies[1]) if pairs > 1 else math.e

    def pair(rotations: float) -> float:
        """The index, not whole, of the pair that rotates so often within T_r; from the ratio of the first two."""
        return math.log(train_length * first / (2 * math.pi * rotations)) / math.log(ratio)

    low = max(math.floor(pair(fast)), 0)
    high = min(math.ceil(pair(slow)), 2 * pairs - 1)
    slowed = ((np.arange(pairs) - low) / max(high - low, 0.001)).clip(0, 1)
    return frequencies * (slowed / factor + 1 - slowed), 0.1 * math.log(factor) + 1


__all__ = ["Frequencies", "dynamic_ntk", "table_frequencies", "yarn"]
