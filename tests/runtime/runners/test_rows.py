"""Which rows of a slab run together: each segment once, in its own row, and few rows for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mesart.graphs.bundle.manifest import LayerInfo
from mesart.graphs.bundle.names import Phase
from mesart.runtime.kv.slab import SlabKv, SlabStore
from mesart.runtime.runners.rows import in_rows
from mesart.runtime.runners.runner import Segment

LAYERS = [LayerInfo(1, 2, 2, None)]
# What each text of a slab does in a run: nothing, it is gone, or so many tokens of a phase.
TEXTS = st.lists(
    st.sampled_from(["decode", "decode", "decode", "idle", "gone", "prefix", "tail"]), min_size=1, max_size=12
)


def no_rotation(*arguments: Any) -> Any:
    raise AssertionError


def segment(kv: Any, phase: Phase, rng: np.random.Generator) -> Segment:
    count = 1 if phase == "decode" else int(rng.integers(1, 9))
    return Segment(
        phase,
        kv,
        rng.integers(1, 99, count),
        rng.integers(1, 99, count),
        rng.random(count).astype(np.float32) + 2,
        int(rng.integers(0, count + 1)),
    )


@given(slabs=st.lists(TEXTS, min_size=1, max_size=3), most=st.none() | st.integers(1, 5), seed=st.integers(0, 99))
def test_each_segment_is_in_its_row_once(slabs, most, seed):
    rng = np.random.default_rng(seed)
    segments = []
    for texts in slabs:
        store = SlabStore(LAYERS, np.float32, no_rotation, 1 << 20, lambda tokens, growing: tokens + 1)
        live = [store.allocate(20) for _ in texts]
        for kv, what in zip(live, texts, strict=True):
            kv.append(np.arange(rng.integers(0, 11)))
            if what == "gone":
                store.free(kv)
            elif what != "idle":
                segments.append(segment(kv, what, rng))
    order = rng.permutation(len(segments))
    segments = [segments[index] for index in order]

    seen: list[int] = []
    for rows in in_rows(segments, most):
        # What runs along may still have its own tokens to compute, and has not computed them yet: it writes there.
        along = {rows.start + row for row, each in enumerate(rows.segments) if each is None}
        for index in seen:
            before = segments[index].kv
            assert isinstance(before, SlabKv)
            assert before.slab is not rows.slab or before.row not in along
        assert rows.given
        assert [segments[index] for index in rows.indices] == rows.given
        seen += rows.indices
        assert rows.part == slice(rows.start, rows.start + len(rows.segments))
        assert rows.part.stop <= rows.slab.rows
        for row, each in enumerate(rows.segments, rows.start):
            text = rows.slab.texts[row]
            assert rows.lengths()[row - rows.start] == (0 if text is None else text.length)
            if each is not None:
                assert each.kv is text
                assert len(each) == rows.size
        size = len(rows.segments)
        assert rows.segments[0] is not None
        assert rows.segments[-1] is not None
        assert size <= 2 * len(rows.given), "no more rows for nothing than with something to do"
        assert most is None or size <= most
        assert size == 1 or {each.phase for each in rows.given} == {"decode"}
        for stacked, name, idle in (
            (rows.ids(), "ids", 0),
            (rows.positions(), "positions", 0),
            (rows.scales(), "scales", 1),
        ):
            assert stacked.shape == (size, rows.size)
            for line, each in zip(stacked, rows.segments, strict=True):
                assert line.tolist() == ([idle] * rows.size if each is None else getattr(each, name).tolist())
    assert sorted(seen) == list(range(len(segments)))


def test_texts_that_decode_side_by_side_are_one_run():
    store = SlabStore(LAYERS, np.float32, no_rotation, 1 << 20, lambda tokens, growing: tokens + 1)
    rng = np.random.default_rng(0)
    live = [store.allocate(20) for _ in range(8)]
    segments = [segment(kv, "decode", rng) for kv in live]
    assert [rows.part for rows in in_rows(segments, None)] == [slice(0, 8)]
    assert [rows.part for rows in in_rows(segments, 3)] == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert [rows.part for rows in in_rows(segments[::2], None)] == [slice(0, 7)]
    assert [rows.part for rows in in_rows([segments[0], segments[7]], None)] == [slice(0, 1), slice(7, 8)]
