"""The threshold probe: on a model whose failure is built in, and on transformers models."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from tqdm import tqdm

from mesart.evaluation.threshold import PasskeyRate, ProbedModel, ThresholdResult, probe_threshold
from mesart.evaluation.threshold import probe as probe_module
from mesart.evaluation.threshold.crossing import passes_at, passkey_failure
from mesart.evaluation.threshold.watch import WatchedTexts, watch
from mesart.graphs import MesaConfig, MesaError

WINDOW, VOCABULARY, HIDDEN = 64, 50, 6
DRIFTING = 4
"""The one dimension that tells of the position."""


class Layer(nn.Module):
    """Adds, behind ``fails`` tokens, to what each token says something that depends on the text before it."""

    def __init__(self, fails: int | None, index: int) -> None:
        super().__init__()
        self.fails, self.index = fails, index

    def forward(self, states: Tensor, ids: Tensor) -> tuple[Tensor]:
        tokens = torch.arange(ids.shape[1], dtype=torch.float32)
        states = states.clone()
        if self.index == 2:
            texts = torch.cumsum(torch.sin(ids.float() * 7), 1) / (tokens + 1)
            states[..., DRIFTING] += 4 * tokens / (tokens + 32) + texts
        if self.fails is not None:
            states += 5 * torch.sin(ids * 3.0 + self.index)[..., None] * (tokens >= self.fails)[:, None]
        return (states,)


class Failing(nn.Module):
    """Four layers; the loss of a token jumps where the last layer's states do."""

    def __init__(self, fails: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=4))
        self.layers = nn.ModuleList(Layer(fails, index) for index in range(1, 5))
        self.embedding = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, HIDDEN, generator=seeded()))
        self.fails = fails

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        states = self.embedding(input_ids)
        for layer in self.layers:
            (states,) = layer(states, input_ids)
        # Each token but the last is told the next: surely in front of the failure, hardly behind it.
        length = input_ids.shape[1]
        told = torch.nn.functional.one_hot(input_ids.roll(-1, 1), VOCABULARY).float()
        sure = 6.0 if self.fails is None else torch.where(torch.arange(length) < self.fails, 6.0, 1.0)[:, None]
        return SimpleNamespace(logits=(told * sure)[:, -logits_to_keep:])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``probe(fails)``: the model's result; under Mesa it does not fail."""

    def run(fails: int | None, **options: Any) -> ThresholdResult:
        healthy = Failing(None)
        mesa = ProbedModel(healthy, lambda ids, last: healthy(ids, False, last).logits)
        monkeypatch.setattr(probe_module, "mesa_runner", lambda model, config: (mesa, config))
        stream = torch.randint(VOCABULARY, (4000,), generator=seeded()).tolist()
        options = {"places": 16, "tokens": 4, "progress": False, **options}
        return probe_threshold(Failing(fails), stream, WINDOW, 4 * WINDOW, **options)

    return run


@pytest.mark.parametrize("fails", [70, 90, 130])
def test_finds_where_a_model_fails(probe, fails: int) -> None:
    result = probe(fails)
    assert (result.layer, result.dimension) == (2, DRIFTING)
    assert abs(result.choice_t) > 5
    assert abs(result.check_t) > 5
    # Between the last of the watched lengths without a token behind the failure, and the first with all of them.
    watched = result.methods["origin"].values.positions
    last, first = max(n for n in watched if n <= fails), min(n for n in watched if n >= fails + result.tokens)
    for point in (result.predicted, result.actual):
        assert point.position is not None
        assert point.lower is not None
        assert point.upper is not None
        assert last <= point.lower <= point.position <= point.upper <= first
    assert result.methods["mesa"].predicted.position is None
    assert result.methods["mesa"].actual.position is None
    assert str(result.methods["mesa"].actual) == "never (never to never)"


def test_nothing_behind_the_window_is_looked_at_for_the_choice(probe) -> None:
    early, late = probe(70), probe(200)
    for name in ("layer", "dimension", "choice_t", "check_t", "threshold", "limit"):
        assert getattr(early, name) == getattr(late, name)
    assert early.predicted.position < late.predicted.position
    within = early.methods["origin"].values.positions.index(WINDOW) + 1
    for curve in ("values", "strays", "losses"):
        first, second = (getattr(result.methods["origin"], curve).mean[:within] for result in (early, late))
        assert first == second


def test_a_model_that_does_not_fail(probe) -> None:
    result = probe(None)
    assert result.predicted.position is None
    assert result.actual.position is None


def test_seed_decides(probe) -> None:
    assert probe(90) == probe(90)
    assert probe(90).threshold != probe(90, seed=1).threshold


def test_curves_and_json(probe) -> None:
    result = probe(90, passkey=lambda length: (20 if length < 100 else 0, 20))
    origin = result.methods["origin"]
    at = origin.values.positions.index(WINDOW)
    assert origin.values.mean[at] == pytest.approx(result.threshold)
    assert origin.strays.mean[at] == origin.losses.mean[at] == 0
    assert origin.strays.mean[origin.values.positions.index(WINDOW // 2)] * 2 == pytest.approx(result.limit)
    for curve in (origin.values, origin.strays, origin.losses):
        assert all(low <= mean <= high for low, mean, high in zip(curve.lower, curve.mean, curve.upper, strict=True))
    report = json.loads(result.to_json())
    assert report["methods"]["origin"]["values"]["mean"] == list(origin.values.mean)
    assert report["predicted"]["position"] == result.predicted.position
    assert result.passkey_failure is not None
    assert 96 < result.passkey_failure.position < 112
    assert "fewer than half of the passkeys" in result.table()
    assert f"layer {result.layer}" in result.table()


@pytest.mark.parametrize("family", ["llama", "mpt", "smollm3"])
def test_of_transformers_models(make_model, family: str) -> None:
    """Within the window Mesa is the plain model, and what is watched is what transformers calls hidden states."""
    model = make_model(family, num_hidden_layers=4, **({"no_rope_layers": [1, 0, 1, 0]} if family == "smollm3" else {}))
    config = MesaConfig(WINDOW, head_length=8, chunk_length=40, tail_min=16, linear_window=8)
    stream = torch.randint(2, 300, (700,), generator=seeded()).tolist()
    result = probe_threshold(
        model, stream, WINDOW, 2 * WINDOW, prefix_ids=[0], config=config, places=4, tokens=4, progress=False
    )
    assert result.config == config.to_dict()
    origin, mesa = result.methods["origin"], result.methods["mesa"]
    within = origin.values.positions.index(WINDOW) + 1
    for curve in ("values", "losses"):
        ours, theirs = (getattr(probe, curve).mean for probe in (mesa, origin))
        np.testing.assert_allclose(ours[:within], theirs[:within], atol=1e-4)
        assert not np.allclose(ours[within:], theirs[within:], atol=1e-3)

    texts = WatchedTexts(stream, [400, 500], [0])
    plain = ProbedModel(model, lambda ids, last: model(input_ids=ids, use_cache=False, logits_to_keep=last).logits)
    states, losses = watch(plain, texts, [20, 30], [1, 2], 5, tqdm(disable=True))
    with torch.no_grad():
        ids = torch.tensor(texts.of(30))
        output = model(ids, output_hidden_states=True)
    assert ids.shape == (2, 30)
    assert ids[:, 0].tolist() == [0, 0]
    assert ids[1, 1:].tolist() == stream[471:500]
    expected = torch.stack([output.hidden_states[layer][:, -5:].mean(1) for layer in (1, 2)], 1)
    np.testing.assert_allclose(states[:, 1], expected, atol=1e-5)
    chosen = output.logits[:, -6:-1].log_softmax(-1).gather(-1, ids[:, -5:, None])
    np.testing.assert_allclose(losses[:, 1], -chosen.mean((1, 2)), atol=1e-5)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=12), st.floats(-3, 3))
def test_passes_for_good(values: list[float], limit: float) -> None:
    positions = np.arange(len(values), dtype=np.float64) * 10
    at = passes_at(positions, np.asarray(values), limit)
    if values[-1] <= limit:
        assert at == math.inf
        return
    assert all(value > limit for position, value in zip(positions, values, strict=True) if position > at)
    if at > 0:
        assert np.interp(at, positions, values) == pytest.approx(limit, abs=1e-6)


def test_passkey_failure() -> None:
    rates = [PasskeyRate(100, 40, 40), PasskeyRate(200, 24, 40), PasskeyRate(300, 16, 40), PasskeyRate(400, 0, 40)]
    point = passkey_failure(rates)
    # Rates 1, .6, .4, 0; the interval of 24 of 40 reaches below a half, that of 0 of 40 is all below.
    assert point.position == pytest.approx(250)
    assert point.lower == 200
    assert point.upper is not None
    assert 300 < point.upper < 400
    assert passkey_failure(rates[:1]).position is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5]}, "layers 1 to 4"),
        ({"places": 1}, "2 or more places"),
        ({"tokens": 40}, "more than half the window"),
        ({"margin": 0.0}, "margin is 0"),
        ({"places": 4000}, "tokens; 4000 places"),
    ],
)
def test_errors(probe, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MesaError, match=message):
        probe(90, **options)


def test_a_model_without_layers() -> None:
    model: Any = nn.Linear(2, 2)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=4))
    with pytest.raises(MesaError, match="cannot be watched"):
        probe_threshold(model, range(10), WINDOW, 2 * WINDOW)
