"""A batch's rows get the tokens that their samplers choose alone, and a broken row is told from the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from mesart.graphs.errors import MesaError
from mesart.runtime.sampling import Sampler, SamplingConfig, SamplingError, choose_tokens

Logits = NDArray[np.float32]
unit = st.floats(0, 1, width=16)
greedy = st.builds(
    SamplingConfig, repetition_penalty=st.one_of(st.just(1.0), st.just(1.0), st.floats(0.5, 2)), seed=st.just(0)
)
drawing = st.builds(
    SamplingConfig,
    temperature=st.one_of(st.just(1.0), st.floats(0.1, 4)),
    top_k=st.one_of(st.just(0), st.integers(1, 40)),
    top_p=st.one_of(st.just(1.0), unit),
    min_p=st.one_of(st.just(0.0), unit),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
    seed=st.integers(0, 5),
)
scores = st.one_of(st.floats(-20, 20, width=32), st.integers(-3, 3), st.just(-np.inf))  # ties, and excluded tokens
broken = st.sampled_from([np.nan, np.inf, -np.inf])


@st.composite
def batches(draw: Any) -> tuple[list[SamplingConfig | None], list[Logits]]:
    """Configs of B rows, some without, and the logits ``[B, V]`` of a few steps, of which some rows are broken."""
    rows, size, steps = draw(st.integers(0, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from([greedy, drawing, st.one_of(greedy, drawing)]))
    configs = draw(st.lists(st.one_of(kind, kind, kind, st.none()), min_size=rows, max_size=rows))
    logits = draw(arrays.arrays(np.float32, (steps, rows, size), elements=scores))
    for step, row in draw(st.lists(st.tuples(st.integers(0, steps - 1), st.integers(0, 4)), max_size=3)):
        if row < rows:
            logits[step, row, draw(st.integers(0, size - 1)) :] = draw(broken)
    return configs, list(logits)


def alone(sampler: Sampler | None, logits: Logits) -> int | str | None:
    """A row's token, or its error in words."""
    try:
        return None if sampler is None else sampler(logits)
    except SamplingError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(batch=batches(), prompt=st.lists(st.integers(0, 50), max_size=8))
def test_same_as_alone(batch: tuple[list[SamplingConfig | None], list[Logits]], prompt: list[int]) -> None:
    configs, steps = batch
    together, single = ([None if config is None else Sampler(config) for config in configs] for _ in range(2))
    for sampler in (*together, *single):
        if sampler is not None:
            sampler.note(prompt)
    for logits in steps:
        untouched = logits.copy()
        found = choose_tokens(logits, together)
        expected = [alone(sampler, row) for sampler, row in zip(single, logits, strict=True)]
        np.testing.assert_array_equal(logits, untouched)
        assert found.tokens.dtype == np.int64
        assert found.tokens.tolist() == [token if isinstance(token, int) else -1 for token in expected]
        errors = {row: error for row, error in enumerate(expected) if isinstance(error, str)}
        assert {row: str(error) for row, error in found.errors.items()} == errors
        for row, token in enumerate(expected):
            if isinstance(token, int):
                together[row].note([token])  # type: ignore[union-attr]
                single[row].note([token])  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=1.0, seed=0)])
def test_broken_rows(config: SamplingConfig) -> None:
    logits = np.zeros((6, 4), dtype=np.float32)
    logits[:, 2] = 100
    logits[1, 3], logits[2, 1], logits[3], logits[5] = np.nan, np.inf, -np.inf, np.nan
    samplers = [None if row == 5 else Sampler(config) for row in range(6)]
    found = choose_tokens(logits, samplers)
    assert found.tokens.tolist() == [2, -1, -1, -1, 2, -1]
    assert {row: str(error).split(":")[0] for row, error in found.errors.items()} == {
        1: "1 of the 4 logits are NaN",
        2: "the logit of token 1 is infinite",
        3: "every logit is -inf",
    }
    assert all(isinstance(error, MesaError) for error in found.errors.values())


def test_an_error_draws_nothing() -> None:
    """A text that goes on after its error goes on as if the broken step had not been."""
    config, good = SamplingConfig(temperature=1.0, seed=3), np.zeros((1, 1000), dtype=np.float32)
    broken, sound = [Sampler(config)], [Sampler(config)]
    assert choose_tokens(np.full_like(good, np.nan), broken).errors.keys() == {0}
    assert choose_tokens(good, broken).tokens == choose_tokens(good, sound).tokens


def test_many_greedy_rows_are_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(sampler: Sampler, logits: Logits) -> int:
        raise AssertionError("a row of its own")

    monkeypatch.setattr(Sampler, "__call__", never)
    logits = np.random.default_rng(0).normal(size=(8, 5000)).astype(np.float32)
    samplers = [Sampler(SamplingConfig(top_k=3, top_p=0.5)) for _ in range(8)]
    np.testing.assert_array_equal(choose_tokens(logits, samplers).tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 0), (1, 1, 3)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits have the shape .*; \[1, vocabulary\] is expected"):
        choose_tokens(np.zeros(shape, dtype=np.float32), [Sampler(SamplingConfig())])
