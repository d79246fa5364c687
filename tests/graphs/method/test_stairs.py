"""Stair position encoding with a fixed anchor, against the formula of the paper."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesart.graphs import Stairs
from mesart.graphs.method.stairs import ORDINARY

ANCHORS, WIDTHS = st.integers(0, 5000), st.integers(1, 300)


@given(ANCHORS, WIDTHS, st.integers(0, 500))
def test_relative_positions_are_the_papers(anchor, width, ahead):
    """W(d) = d for d <= N, else N + ceil((d - N) / E), with the linear window N = t - anchor of the query t."""
    stairs, query = Stairs(anchor, width), anchor + ahead
    relative = stairs.position(query) - stairs.positions(0, query + 1)
    window = query - anchor
    for key in {0, anchor // 2, max(0, anchor - 1), anchor, query}:
        distance = query - key
        paper = distance if distance <= window else window + math.ceil((distance - window) / width)
        assert relative[key] == paper


@given(ANCHORS, WIDTHS)
def test_positions_begin_at_zero_and_rise_by_at_most_one(anchor, width):
    positions = Stairs(anchor, width).positions(0, anchor + 10)
    assert positions[0] == 0
    assert set(np.diff(positions)) <= {0, 1}


@given(ANCHORS, WIDTHS, st.integers(0, 6000), st.integers(1, 50))
def test_array_and_single_positions_agree(anchor, width, start, count):
    stairs = Stairs(anchor, width)
    assert stairs.positions(start, start + count).tolist() == [
        stairs.position(token) for token in range(start, start + count)
    ]


@given(ANCHORS, WIDTHS, st.integers(1, 20))
def test_moving_the_anchor_by_whole_steps_leaves_the_stairs(anchor, width, steps):
    before, after = Stairs(anchor, width), Stairs(anchor + steps * width, width)
    assert np.array_equal(before.positions(0, anchor), after.positions(0, anchor))


@pytest.mark.parametrize("shift", [1, 3])
def test_moving_it_by_less_moves_them(shift):
    before, after = Stairs(100, 7), Stairs(100 + shift, 7)
    assert not np.array_equal(before.positions(0, 100), after.positions(0, 100))


def test_ordinary_positions_are_the_indices():
    assert ORDINARY.positions(3, 9).tolist() == [3, 4, 5, 6, 7, 8]
