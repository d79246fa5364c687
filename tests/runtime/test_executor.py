"""The cache: written in place, grown rarely, and as it was when a call fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.runtime import MesaModel


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


@pytest.fixture
def model(bundle) -> Iterator[MesaModel]:
    with MesaModel.load(bundle(), "torch", verify=False) as loaded:
        yield loaded


def buffers(model: MesaModel) -> list[int]:
    """Where the memory of the cache lies."""
    cache: Any = model.executor.cache
    return [array.ctypes.data for array in (*cache.keys, *cache.values)]


def test_a_step_writes_in_place(model):
    model.prefill(tokens(100))
    there, capacity = buffers(model), model.executor.cache.capacity
    for token in tokens(capacity - 100, seed=1):
        model.step(token)
        assert buffers(model) == there


def test_growth_is_rare_and_not_for_the_longest_prompt(model):
    model.prefill(tokens(100))
    capacities = [model.executor.cache.capacity]
    for length, token in enumerate(tokens(1500, seed=1), 100):
        model.step(token)
        capacities.append(model.executor.cache.capacity)
        assert capacities[-1] == capacities[-2] or capacities[-2] == length, "it grew although there was room"
    assert capacities[0] <= 100 + 512
    assert capacities[-1] <= 1600 * 9 // 8 + 512
    assert capacities[-1] > capacities[0]


def test_keys_before_the_anchor_stay_when_it_moves_by_whole_steps(model):
    """A re-anchoring turns the keys of the linear window only."""
    model.prefill(tokens(300))
    moved = []
    for token in tokens(60, seed=1):
        row = model.executor.rows[0]
        before, stairs = model.executor.cache.keys[0].copy(), row.stairs
        model.step(token)
        now = model.executor.rows[0].stairs
        if now != stairs and now.width == stairs.width:
            moved.append(now)
            old = model.executor.cache.keys[0][0, :, : stairs.anchor]
            assert np.array_equal(old, before[0, :, : stairs.anchor])
            assert not np.array_equal(model.executor.cache.keys[0][0, :, : now.anchor], before[0, :, : now.anchor])
    assert moved


@pytest.mark.parametrize("turn", [[5, 320], [], tokens(400)], ids=["outside", "empty", "too long"])
def test_a_turn_that_is_refused_leaves_the_cache(model, turn):
    model.prefill(tokens(100))
    expected = [model.extend(tokens(5)), model.step(3)]
    model.prefill(tokens(100))
    with pytest.raises(MesaError):
        model.extend(turn)
    assert model.lengths == [100]
    got = [model.extend(tokens(5)), model.step(3)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_a_batch_of_turns_is_refused_as_a_whole(model):
    """One turn is too long: the rows before it must not have been extended."""
    prompts = [tokens(20), tokens(30)]
    model.prefill(prompts)
    with pytest.raises(MesaError, match="longer than the largest bucket"):
        model.extend([tokens(5), tokens(400)])
    assert model.lengths == [20, 30]


def test_a_prompt_that_is_refused_leaves_the_cache(model):
    model.prefill(tokens(100))
    with pytest.raises(MesaError, match="longer than the largest bucket"):
        model.prefill(tokens(345))
    assert model.lengths == [100]


@pytest.mark.parametrize("cached", [100, 5])  # 5 are fewer than the head: the turn starts again at the first token
def test_a_failure_in_the_middle_of_a_turn_leaves_a_cache_that_can_be_used(model, monkeypatch, cached):
    """Keys may have moved by then; what stands where must still be known."""
    turn = tokens(150, seed=1)
    model.prefill(tokens(cached))
    expected = model.extend(turn)
    model.prefill(tokens(cached))
    run = model.executor.cache._graphs.run

    def fail_in_the_tail(role, bucket, feeds):
        if role == "tail":
            raise MesaError("the engine gave up")
        return run(role, bucket, feeds)

    with monkeypatch.context() as patch:
        patch.setattr(model.executor.cache._graphs, "run", fail_in_the_tail)
        with pytest.raises(MesaError, match="the engine gave up"):
            model.extend(turn)
    assert model.lengths == [cached]
    assert np.abs(model.extend(turn) - expected).max() < 1e-4


def test_a_move_that_fails_in_the_middle_of_the_layers_leaves_all_keys(model, monkeypatch):
    turn = tokens(30, seed=1)
    model.prefill(tokens(100))
    expected = model.extend(turn)
    model.prefill(tokens(100))
    cache: Any = model.executor.cache
    before = [key.copy() for key in cache.keys]
    places = dict(cache._places)
    calls = []

    def fail_at_the_second(feeds):
        calls.append(feeds)
        if len(calls) == 2:
            raise MesaError("the engine gave up")
        return places[cache.layers[0].place](feeds)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_places", dict.fromkeys(places, fail_at_the_second))
        with pytest.raises(MesaError, match="the engine gave up"):
            model.extend(turn)
    assert len(calls) == 3, "a layer turned, one failed, the first turned back"
    for key, old in zip(cache.keys, before, strict=True):
        assert np.abs(key[:, :, :100] - old[:, :, :100]).max() < 1e-5
    assert np.abs(model.extend(turn) - expected).max() < 1e-4


def test_a_step_that_fails_in_one_row_changes_none(bundle, monkeypatch):
    """Specialised graphs run one row after the other."""
    with MesaModel.load(bundle(), "torch", specialised=True, verify=False) as model:
        prompts = [tokens(70), tokens(30, seed=1)]
        model.prefill(prompts)
        expected = model.step([3, 4])
        model.prefill(prompts)
        graphs: Any = model.executor.cache._graphs  # type: ignore[attr-defined]
        run, calls = graphs.run, []

        def fail_at_the_second(role, bucket, feeds):
            calls.append(role)
            if len(calls) == 2:
                raise MesaError("the engine gave up")
            return run(role, bucket, feeds)

        with monkeypatch.context() as patch:
            patch.setattr(graphs, "run", fail_at_the_second)
            with pytest.raises(MesaError, match="the engine gave up"):
                model.step([3, 4])
        assert model.lengths == [70, 30]
        assert np.abs(model.step([3, 4]) - expected).max() < 1e-5
