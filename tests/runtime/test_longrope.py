"""A LongRoPE bundle on engines: short and long texts, and those that pass from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.evaluation.validate import validate
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest
from mesart.runtime import MesaModel, present_backends
from tests.runtime.faults import Faults, Interruption

SHORT, WINDOW = 32, 64


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


@pytest.fixture(scope="module")
def plain(make_model) -> Callable[[list[int]], Any]:
    """The plain model's logits of the next token."""
    import torch

    model = make_model("longrope")

    def last(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].numpy()

    return last


@pytest.fixture(scope="module")
def longrope(bundle) -> Path:
    folder: Path = bundle("longrope")
    return folder


def off(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours)[0, -1] - theirs).max())


def test_the_bundle_knows_the_short_length(longrope):
    config = Manifest.read(longrope).config
    assert (config.short_length, config.positions) == (SHORT, WINDOW + SHORT)
    assert "LongRoPE's short factors up to 32 tokens" in config.described()


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_is_the_plain_model(longrope, plain, engine, specialised):
    ids = tokens(WINDOW)
    with MesaModel.load(longrope, engine, specialised=specialised, verify=False) as model:
        for length in (1, SHORT - 1, SHORT, SHORT + 1, WINDOW):
            assert off(model.prefill(ids[:length]), plain(ids[:length])) < 1e-4, length
        model.prefill(ids[: SHORT - 2])
        for length in range(SHORT - 1, SHORT + 3):
            assert off(model.step(ids[length - 1]), plain(ids[:length])) < 1e-4, length
        model.prefill(ids[:20])
        for start, stop in ((20, 30), (30, 50), (50, 64)):
            assert off(model.extend(ids[start:stop]), plain(ids[:stop])) < 1e-4, stop
        model.extend(tokens(30, seed=1))  # past T_r
        text = [*ids, *tokens(30, seed=1)]
        assert np.abs(model.step(5) - _fresh(model, [*text[:WINDOW]], [*text[WINDOW:]], 5)).max() < 1e-4


def _fresh(model: MesaModel, prompt: list[int], turn: list[int], token: int) -> Any:
    model.prefill(prompt)
    model.extend(turn)
    return model.step(token)


def test_rows_of_a_batch_pass_on_their_own(longrope, plain):
    rows = [tokens(SHORT), tokens(12, seed=1), tokens(50, seed=2), tokens(SHORT, seed=3)]
    with MesaModel.load(longrope, "torch", verify=False) as model:
        model.prefill(rows)
        for token in (7, 8):
            rows = [[*row, token] for row in rows]
            logits = model.step([token] * 4)
            for row, text in enumerate(rows):
                assert np.abs(logits[row, -1] - plain(text)).max() < 1e-4
        assert model.lengths == [len(row) for row in rows]


def test_all_logits_are_those_of_the_turn(longrope):
    ids = tokens(50)
    with MesaModel.load(longrope, "torch", verify=False) as model:
        whole = model.prefill(ids, all_logits=True)
        model.prefill(ids[:20])
        turn = model.extend(ids[20:], all_logits=True)
    assert turn.shape == (1, 30, 320)
    assert np.abs(turn - whole[:, 20:]).max() < 1e-4


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("failing", [5, 6, 7])
def test_a_failure_on_the_way_loses_nothing(longrope, plain, failing, specialised):
    """Of a step of two rows that both pass, and a third that does not: whichever of them fails."""
    rows = [tokens(SHORT), tokens(40, seed=1), tokens(SHORT, seed=2)]
    with MesaModel.load(longrope, "torch", specialised=specialised, verify=False) as model:
        model.prefill(rows)
        with Faults(model) as faults:
            faults.in_runs(lambda segment: segment.wanted == 1 and segment.ids[-1] == failing)
            with pytest.raises(MesaError, match="the engine gave up"):
                model.step([5, 6, 7])
            for nth in (1, 2, 3):
                faults.at(nth)
                with pytest.raises(Interruption):
                    for _ in range(3):  # where one run is all that there is, at a later step
                        model.step([5, 6, 7])
                model.prefill(rows)
        assert model.lengths == [SHORT, 40, SHORT]
        logits = model.step([5, 6, 7])
        for row, token in enumerate([5, 6, 7]):
            assert np.abs(logits[row, -1] - plain([*rows[row], token])).max() < 1e-4


@pytest.mark.parametrize("backend", present_backends())
@pytest.mark.parametrize(("cached", "turn"), [(20, 30), (20, 80), (5, 80)])
def test_a_turn_that_fails_loses_nothing(longrope, plain, backend, cached, turn):
    """A turn that begins the text again has computed all by then; a shorter turn is still the plain model."""
    ids, more = tokens(cached), tokens(turn, seed=1)
    with MesaModel.load(longrope, backend, verify=False) as model:
        expected = model.prefill([*ids, *more])
        model.prefill(ids)
        with Faults(model, writes=True) as faults:
            faults.in_runs(lambda segment: segment.phase == "tail")
            for _ in range(2):
                with pytest.raises(MesaError, match="the engine gave up"):
                    model.extend(more)
        assert model.lengths == [cached]
        assert off(model.step(9), plain([*ids, 9])) < 1e-4
        model.prefill(ids)
        with Faults(model, writes=True) as faults:
            faults.in_runs(lambda segment: segment.phase == "tail")
            with pytest.raises(MesaError, match="the engine gave up"):
                model.extend(more)
        assert np.abs(model.extend(more) - expected).max() < 1e-4


def test_validation_compares_short_texts_too(longrope):
    result = validate(longrope, backend="torch", graphs=["symbolic"], buckets=[0], steps=4, progress=False)
    assert result.passed, result.table()
    assert [check.phase for check in result.checks] == ["tail"] * 3 + ["decode"] * 3 + ["tail"] * 3 + ["decode"] * 3
