"""The sampler keeps the tokens, and the scores, that transformers keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mesart.graphs.errors import MesaError
from mesart.runtime.sampling import Sampler, SamplingConfig, _draw

Logits = NDArray[np.float32]
unit = st.floats(0, 1, width=16)
configs = st.builds(
    SamplingConfig,
    temperature=st.one_of(st.just(1.0), st.floats(0.1, 4)),
    top_k=st.integers(0, 40),
    top_p=st.one_of(st.just(1.0), unit),
    min_p=st.one_of(st.just(0.0), unit),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
)
scores = st.one_of(st.floats(-20, 20, width=32), st.integers(-3, 3), st.just(-np.inf))  # ties, and excluded tokens
logits = arrays.arrays(np.float32, st.integers(1, 60), elements=scores).filter(lambda drawn: drawn.max() > -np.inf)


def scattered(sampler: Sampler, drawn: Logits, history: list[int]) -> Logits:
    """The candidates as transformers writes them: ``[V]`` with ``-inf`` for the tokens left out."""
    sampler.note(history)
    ids, kept = sampler.candidates(drawn)
    full = np.full(drawn.size, -np.inf, dtype=np.float32)
    full[ids] = kept
    return full


def by_transformers(config: SamplingConfig, drawn: Logits, history: list[int]) -> Logits:
    processors: list[Any] = [
        RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)),
        TemperatureLogitsWarper(float(config.temperature)),
        *([TopKLogitsWarper(config.top_k)] if config.top_k else []),
        TopPLogitsWarper(config.top_p),
        MinPLogitsWarper(config.min_p),
    ]
    ids: Any = torch.tensor([history], dtype=torch.long)
    scores: Any = torch.from_numpy(drawn)[None]
    kept: Logits = LogitsProcessorList(processors)(ids, scores)[0].numpy()
    return kept


def decided(config: SamplingConfig, drawn: Logits, history: list[int]) -> bool:
    """Whether no token is so close to a threshold that the rounding of a sum decides."""
    before_top_p = Sampler(dataclasses.replace(config, top_p=1.0, min_p=0.0))
    best_first = np.sort(scattered(before_top_p, drawn, history))[::-1]
    weights = np.exp(best_first.astype(np.float64) - best_first[0])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    ratios = probabilities / probabilities[0]
    return all(np.abs(before - config.top_p) > 1e-5) and all(np.abs(ratios - config.min_p) > 1e-5 * ratios)


@settings(max_examples=400, deadline=None)
@given(config=configs, drawn=logits, history=st.lists(st.integers(0, 70), max_size=8))
def test_same_as_transformers(config: SamplingConfig, drawn: Logits, history: list[int]) -> None:
    assume(decided(config, drawn, history))
    ours, theirs = scattered(Sampler(config), drawn, history), by_transformers(config, drawn, history)
    # Of tokens that tie, which ones top-p keeps is open (an unstable sort): compare what is kept in order of size.
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6)
    if np.unique(theirs[np.isfinite(theirs)]).size == np.isfinite(theirs).sum() and np.unique(drawn).size == drawn.size:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    drawn=logits,
    parts=st.lists(st.lists(st.integers(0, 70), max_size=8), max_size=6),
    penalty=st.floats(0.5, 2),
    as_array=st.booleans(),
)
def test_noted_in_parts(drawn: Logits, parts: list[list[int]], penalty: float, as_array: bool) -> None:
    """A text that grows, with tokens that come again, is penalised as transformers penalises the whole."""
    sampler = Sampler(SamplingConfig(temperature=1.0, repetition_penalty=penalty))
    untouched, text = drawn.copy(), list[int]()
    scores: Any = torch.from_numpy(drawn)[None]
    for part in parts:
        text.extend(part)
        sampler.note(np.array(part, dtype=np.int64) if as_array else part)
        ids: Any = torch.tensor([[token for token in text if token < drawn.size]], dtype=torch.long)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)[0].numpy()
        np.testing.assert_array_equal(sampler.candidates(drawn)[1], theirs)
    np.testing.assert_array_equal(drawn, untouched)


def test_penalty_beyond_float32() -> None:
    """Models write the smallest float for tokens that are out; a penalty makes them -inf, which excludes them too."""
    smallest, largest = np.finfo(np.float32).min, np.finfo(np.float32).max
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0))
    sampler.note([0, 1])
    assert sampler(np.array([smallest, 3, 2], dtype=np.float32)) == 2
    sampler = Sampler(SamplingConfig(repetition_penalty=0.5))
    sampler.note([1])
    with pytest.raises(MesaError, match="token 1 is infinite"):
        sampler(np.array([0, largest], dtype=np.float32))


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "temperature": 1.7},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": None, "min_p": 0.8, "repetition_penalty": 0.7},
        {"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 2.0},
        {},
    ],
)
def test_same_as_generate(values: dict[str, Any]) -> None:
    """The order of the processors, and the defaults of a generation_config.json, are those of ``generate``."""
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=199, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(small)
    model.eval()
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    prompt = torch.tensor([[5, 7, 7, 11]])
    made: Any = model.generate(
        prompt, max_new_tokens=12, output_scores=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    sampler = Sampler(SamplingConfig.from_generation_config(values, seed=0))
    for step, (raw, processed) in enumerate(zip(made.logits, made.scores, strict=True)):
        history = made.sequences[0, : 4 + step].tolist()
        theirs = processed[0].numpy()
        np.testing.assert_allclose(scattered(sampler, raw[0].numpy(), history), theirs, rtol=1e-6)
        if not values.get("do_sample"):
            assert sampler(raw[0].numpy()) == made.sequences[0, 4 + step]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), k=st.integers(1, 200), step=st.sampled_from([0.001, 0.5, 3]), seed=st.integers(0, 99))
def test_top_k_of_many(size: int, k: int, step: float, seed: int) -> None:
    """Looking at few tokens first finds what sorting all finds, ties included."""
    random = np.random.default_rng(seed)
    drawn = (np.round(random.normal(0, 4, size) / step) * step).astype(np.float32)
    drawn[random.random(size) < 0.3] = -np.inf
    drawn[0] = 0
    ids, _ = Sampler(SamplingConfig(temperature=1.0, top_k=k)).candidates(drawn)
    np.testing.assert_array_equal(ids, np.flatnonzero(drawn >= np.sort(drawn)[::-1][min(k, size) - 1]))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), zeros=st.sampled_from([0, 0.5, 0.999]), seed=st.integers(0, 99))
def test_draw_of_many(size: int, zeros: float, seed: int) -> None:
    """Finding the block first draws what the cumulative sum of all draws: exact here, the weights are whole numbers."""
    random = np.random.default_rng(seed)
    weights = np.where(random.random(size) < zeros, 0, random.integers(1, 4, size)).astype(np.float32)
    weights[random.integers(size)] = 1
    cumulative = np.cumsum(weights.astype(np.float64))
    for drawn in (0, 0.25, 0.5, 1 - 2**-20, *random.integers(0, 2**20, 20) / 2**20):
        expected = np.searchsorted(cumulative, cumulative[-1] * (1 - drawn))
        assert _draw(weights, float(drawn)) == expected
        assert weights[expected] > 0


def test_draws_follow_the_probabilities() -> None:
    drawn = np.array([*np.log([0.5, 0.3, 0.15, 0.05]), -np.inf], dtype=np.float32)
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0))
    counts = np.bincount([sampler(drawn) for _ in range(20_000)], minlength=5)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.15, 0.05, 0.0], atol=0.015)
    assert counts[-1] == 0


def test_seed_repeats() -> None:
    drawn = np.linspace(0, 1, 1000, dtype=np.float32)
    first, again, other = (
        [sampler(drawn) for _ in range(20)]
        for sampler in (Sampler(SamplingConfig(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    )
    assert first == again != other


def test_greedy_is_the_default() -> None:
    assert Sampler(SamplingConfig())(np.array([0, 3, 3, 1], dtype=np.float32)) == 1
    repeated = Sampler(SamplingConfig(repetition_penalty=2.0))
    repeated.note(np.array([1, 1]))
    assert repeated(np.array([0, 3, 2, 1], dtype=np.float32)) == 2


def test_large_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0).normal(0, 4, 150_000).astype(np.float32)
    sizes, argsort = [], np.argsort

    def counted(values: Logits, **options: Any) -> Any:
        sizes.append(values.size)
        return argsort(values, **options)

    monkeypatch.setattr(np, "argsort", counted)
    for config in (SamplingConfig(temperature=0.7, top_p=0.9), SamplingConfig(temperature=1.0, top_k=50, top_p=0.9)):
        ids, _ = Sampler(config).candidates(drawn)
        assert 1 < ids.size < 1024
    assert max(sizes) <= 1024


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (greedy) or at least 1e-06"),
        ({"temperature": 1e-9}, "temperature is 1e-09; it must be"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "0.5"}, "temperature is 0.5; it must be"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number, 0 (keeps every token) or more"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be more than 0"),
        ({"seed": -5}, "seed is -5"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MesaError) as caught:
        SamplingConfig(**values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [([0, np.nan, np.nan], "2 of the 3 logits are NaN"), ([0, np.inf], "token 1 is infinite"), ([-np.inf], "every")],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits(drawn: list[float], message: str, temperature: float) -> None:
    with pytest.raises(MesaError, match=message):
        Sampler(SamplingConfig(temperature=temperature))(np.array(drawn, dtype=np.float32))


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 3\]"):
        Sampler(SamplingConfig())(np.zeros((1, 3), dtype=np.float32))
    sampler = Sampler(SamplingConfig(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="token id -1"):
        sampler.note([0, -1])
    assert sampler(np.array([1, 0.99], dtype=np.float32)) == 0  # nothing was noted


def test_unsupported_options_are_named() -> None:
    with pytest.warns(UserWarning, match="num_beams=4"):
        SamplingConfig.from_generation_config({"num_beams": 4})
    with pytest.warns(UserWarning, match=r"typical_p=0.5"):
        SamplingConfig.from_generation_config({"do_sample": True, "typical_p": 0.5})
