"""Stair position encoding with a fixed anchor: one integer position for each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stairs:
    """Positions of all tokens as the tail and every generated token see them.

    From ``anchor`` on, positions rise by one a token; before it, by one every ``width`` tokens. All are shifted by
    ``ceil(anchor / width)``, so that none is negative. For a query ``t >= anchor`` and a key ``i`` the difference of
    their positions is the paper's Stair PE with a linear window of ``t - anchor`` (arXiv 2410.15859, section 4.2).
    Moving the anchor by a multiple of ``width`` leaves the position of every key before the old anchor as it was.
    """

    anchor: int
    width: int
    offset: int = 0
    """Added to all positions: the row where their part of the position table begins, if it has several."""

    @property
    def shift(self) -> int:
        """Number of stair steps before the anchor, which is also the anchor's position."""
        return -(-self.anchor // self.width)

    def position(self, token: int) -> int:
        """The position of one token."""
        if token < self.anchor:
            return self.offset + self.shift - -(-(self.anchor - token) // self.width)
        return self.offset + self.shift + token - self.anchor

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions of the tokens ``start .. stop - 1``, int64 ``[stop - start]``."""
        distance = self.anchor - np.arange(start, stop, dtype=np.int64)
        stepped = np.where(distance > 0, -(-distance // self.width), distance)
        return self.offset + self.shift - stepped


ORDINARY = Stairs(anchor=0, width=1)
"""Every token at its own index: the dense path."""
