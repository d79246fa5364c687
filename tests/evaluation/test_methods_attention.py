"""The executor's pieces: fused attention with its log-sum-exp, merging, turning, and the cache's rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mesart.evaluation.methods.attention import Merged, attend
from mesart.evaluation.methods.cache import CacheRows, LayerCache
from mesart.evaluation.methods.rotation import angles_of, turn
from mesart.graphs.model.rotary import LayerSpec


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


class TestAttend:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("sizes", [(8, 8), (6, 6), (12, 8), (8, 12), (128, 128)])
    @pytest.mark.parametrize("biased", [None, 1, 2])
    def test_equals_plain_mathematics(self, dtype, sizes, biased):
        """Keys as a slice of a longer buffer; values narrower or wider than keys; a bias for all heads or for each."""
        size, value_size = sizes
        query, key = random(1, 2, 7, size, dtype=dtype), random(1, 2, 50, size, seed=1, dtype=dtype)[:, :, 3:40]
        value = random(1, 2, 37, value_size, seed=2, dtype=dtype)
        bias = None if biased is None else random(1, biased, 7, 37, seed=3, dtype=dtype)
        output, lse = attend(query, key, value, bias, 0.3)
        expected, expected_lse = plain(query, key, value, bias, 0.3)
        assert output.dtype == dtype
        assert lse.dtype == torch.float32
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (output - expected).abs().max() < tolerance
        assert (lse - expected_lse).abs().max() < max(1e-5, tolerance / 10)

    def test_soft_caps(self):
        query, key, value = random(1, 2, 5, 8), random(1, 2, 9, 8, seed=1), random(1, 2, 9, 8, seed=2)
        output, lse = attend(query, key, value, None, 1.0, softcap=2.0)
        scores = torch.tanh(query.double() @ key.double().transpose(-1, -2) / 2) * 2
        assert (output - scores.softmax(-1) @ value.double()).abs().max() < 1e-5
        assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5

    def test_devices_without_a_kernel_use_plain_mathematics(self):
        """Their shapes and types, on the device that computes nothing."""
        query, key, value = (torch.empty(1, 2, 5, 8, device="meta", dtype=torch.bfloat16) for _ in range(3))
        output, lse = attend(query, key, value, None, 1.0)
        assert (output.shape, output.dtype, lse.shape, lse.dtype) == (
            *((1, 2, 5, 8), torch.bfloat16),
            *((1, 2, 5), torch.float32),
        )


class TestMerged:
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.integers(0, 9))
    def test_parts_make_the_whole(self, lengths, with_sinks, seed):
        total = sum(lengths)
        query, key, value = random(1, 2, 4, 8, seed=seed), random(1, 2, total, 8), random(1, 2, total, 6, seed=3)
        merged, start = Merged(), 0
        for length in lengths:
            part = slice(start, start + length)
            merged.add(*attend(query, key[:, :, part], value[:, :, part], None, 1.0))
            start += length
        sinks = random(1, 2, 4, seed=5) if with_sinks else None
        scores = query.double() @ key.double().transpose(-1, -2)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().unsqueeze(-1)], dim=-1)
        expected = scores.softmax(-1)[..., :total] @ value.double()
        assert (merged.result(torch.float32, sinks) - expected).abs().max() < 1e-5

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_rows_that_see_nothing_of_a_part(self, order):
        """Whatever a kernel left in such a row, it counts nothing; nor is there a NaN if several parts show nothing."""
        outputs = [torch.full((1, 1, 2, 3), 1e30), torch.full((1, 1, 2, 3), -7.0), torch.ones(1, 1, 2, 3)]
        scores = [torch.tensor([[[-math.inf, -math.inf]]]), torch.tensor([[[-math.inf, 0.0]]]), torch.zeros(1, 1, 2)]
        merged = Merged()
        for index in order:
            merged.add(outputs[index], scores[index])
        result = merged.result(torch.float32)[0, 0]
        assert torch.allclose(result, torch.tensor([[1.0] * 3, [-3.0] * 3]))


class TestTurning:
    @pytest.mark.parametrize("layout", ["half", "interleaved"])
    @given(position=st.floats(-1e5, 1e5), by=st.floats(-1e3, 1e3), first=st.integers(0, 3), rest=st.integers(0, 3))
    def test_turns_by_the_angle_and_composes(self, layout, position, by, first, rest):
        layer = LayerSpec(1, first + 8 + rest, 4, layout, None, first, 8)
        radians = 100.0 ** (-np.arange(4) / 4)
        x = random(1, 1, 1, first + 8 + rest)
        turned = turn(x, angles_of(np.array([position]), radians, x.device), layer)
        inner, outer = x[0, 0, 0, first : first + 8], turned[0, 0, 0, first : first + 8]
        pairs = [(j, j + 4) if layout == "half" else (2 * j, 2 * j + 1) for j in range(4)]
        for (a, b), speed in zip(pairs, radians, strict=True):
            expected = complex(inner[a], inner[b]) * np.exp(1j * position * speed)
            assert abs(complex(outer[a], outer[b]) - expected) < 1e-5
        outside = [*range(first), *range(first + 8, x.shape[-1])]
        assert torch.equal(turned[..., outside], x[..., outside])
        again = turn(turned, angles_of(np.array([by]), radians, x.device), layer)
        at_once = turn(x, angles_of(np.array([position + by]), radians, x.device), layer)
        assert (again - at_once).abs().max() < 1e-5


class TestRows:
    @given(st.data())
    def test_every_token_that_is_needed_is_where_it_should_be(self, draw):
        """A sliding window behind pinned tokens, fed with random numbers of tokens."""
        pinned = draw.draw(st.integers(0, 5))
        window = draw.draw(st.integers(1, 30))
        dropping = draw.draw(st.booleans())
        rows, cache = CacheRows(), LayerCache()
        for new in draw.draw(st.lists(st.integers(1, 90), min_size=1, max_size=12)):
            start = rows.tokens
            first = max(pinned, start - window + 1)
            rows.begin((pinned, first) if dropping else (0, 0), new, start + new)
            fresh = torch.arange(start, start + new, dtype=torch.float32).reshape(1, 1, new, 1)
            cache.make_room(rows, {"view": fresh}, fresh)
            cache.write(start - rows.gap, {"view": fresh}, fresh)
            rows.tokens, rows.move = start + new, None
            assert cache.values is not None
            needed = [*range(min(pinned, start)), *range(min(first, start), start + new)] if dropping else range(start)
            for token in needed:
                assert cache.values[0, 0, rows.row(token), 0] == token
                assert cache.keys["view"][0, 0, rows.row(token), 0] == token
            if dropping:
                assert rows.capacity <= 2 * (pinned + window + new) + 64
