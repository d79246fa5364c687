"""The cache: written in place, grown rarely, and as it was when a call fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError, TorchReference
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


@pytest.mark.parametrize("turn", [[5, 320], [], [1.5]], ids=["outside", "empty", "no ids"])
def test_a_turn_that_is_refused_leaves_the_cache(model, turn):
    model.prefill(tokens(100))
    expected = [model.extend(tokens(5)), model.step(3)]
    model.prefill(tokens(100))
    with pytest.raises(MesaError):
        model.extend(turn)
    assert model.lengths == [100]
    got = [model.extend(tokens(5)), model.step(3)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_a_batch_of_turns_is_refused_as_a_whole(bundle):
    """One turn is too long for graphs of fixed shapes: the rows before it must not have been extended."""
    with MesaModel.load(bundle(), "torch", specialised=True, verify=False) as model:
        model.prefill([tokens(20), tokens(30)])
        with pytest.raises(
            MesaError, match="405 tokens, more than the largest bucket's 344; export again with a larger"
        ):
            model.extend([tokens(5), tokens(375)])
        assert model.lengths == [20, 30]


def test_a_live_text_outgrows_the_largest_bucket(model, checkpoint, mesa_config):
    """By steps and by turns, as the method says; only a first prompt has to fit a bucket."""
    reference = TorchReference(checkpoint("llama"), mesa_config)
    for count, turns in ((340, (1, 30, 1, 200)), (20, (500, 1)), (5, (400, 1)), (344, (1, 90, 5))):
        model.prefill(tokens(count))
        reference.prefill(tokens(count))
        for turn in turns:
            if turn == 1:
                got, expected = model.step(7), reference.step(7)
            else:
                got, expected = model.extend(tokens(turn, seed=1)), reference.extend(tokens(turn, seed=1))
            assert np.abs(got - expected.numpy()).max() < 1e-4
        assert model.lengths == [count + sum(turns)]


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


class Failure(BaseException):
    """As an interrupt: no library catches it."""


def fail_at(model: MesaModel, patch: pytest.MonkeyPatch, nth: int) -> None:
    """The ``nth`` run of any graph, places too, is interrupted."""
    cache: Any = model.executor.cache
    runs = []

    def counted(run):
        def call(*arguments):
            runs.append(run)
            if len(runs) == nth:
                raise Failure
            return run(*arguments)

        return call

    patch.setattr(cache._graphs, "run", counted(cache._graphs.run))
    patch.setattr(cache, "_places", {file: counted(place) for file, place in cache._places.items()})


class TestABatchThatFails:
    # Row by row: behind the cache, with chunks of its own, from the first token again, with a moved anchor.
    PROMPTS = (tokens(20), tokens(100), tokens(5), tokens(62))
    TURNS = (tokens(3), tokens(150), tokens(90), tokens(20))

    def test_a_turn_leaves_every_row(self, model, monkeypatch):
        model.prefill(self.PROMPTS)
        stairs = [row.stairs for row in model.executor.rows]
        expected = model.extend(self.TURNS)
        model.prefill(self.PROMPTS)
        failed = 0
        for nth in range(1, 30):
            with monkeypatch.context() as patch:
                fail_at(model, patch, nth)
                try:
                    model.extend(self.TURNS)
                    break
                except Failure:
                    failed += 1
            assert model.lengths == [20, 100, 5, 62]
            assert [row.stairs for row in model.executor.rows] == stairs
        assert failed > 8
        model.prefill(self.PROMPTS)
        for nth in (2, 5, 8, failed):
            with monkeypatch.context() as patch:
                fail_at(model, patch, nth)
                with pytest.raises(Failure):
                    model.extend(self.TURNS)
        assert np.abs(model.extend(self.TURNS) - expected).max() < 1e-4

    def test_a_step_leaves_every_row_and_its_anchor(self, model, monkeypatch):
        """62 + 2 tokens: the step moves the anchor of a row before it fails."""
        prompts, turn = [tokens(62), tokens(64)], [tokens(3), tokens(4)]
        model.prefill(prompts)
        expected = model.extend(turn)
        model.prefill(prompts)
        for nth in (1, 2, 3):
            with monkeypatch.context() as patch:
                fail_at(model, patch, nth)
                with pytest.raises(Failure):
                    model.step([3, 4])
        assert model.lengths == [62, 64]
        assert np.abs(model.extend(turn) - expected).max() < 1e-5

    @pytest.mark.parametrize("nth", [1, 3, 6])
    def test_a_prefill_leaves_an_empty_cache(self, model, monkeypatch, nth):
        model.prefill(self.PROMPTS)
        with monkeypatch.context() as patch:
            fail_at(model, patch, nth)
            with pytest.raises(Failure):
                model.prefill(self.PROMPTS)
        assert model.lengths == [0]
        for call in (lambda: model.step(3), lambda: model.step([3] * 4), lambda: model.extend([[3]] * 4)):
            with pytest.raises(MesaError, match="call prefill first"):
                call()
        first_turn = model.extend(tokens(10))
        assert np.array_equal(first_turn, model.prefill(tokens(10)))

    def test_what_cannot_be_undone_is_said_until_the_next_prefill(self, model, monkeypatch):
        """A row has moved, another fails, and the way back fails too."""
        model.prefill([tokens(62), tokens(5)])
        with monkeypatch.context() as patch:

            def fail(*arguments):
                raise Failure

            run = model.executor.cache._graphs.run

            def fail_in_the_second_row(role, bucket, feeds):
                if len(feeds["input_ids"][0]) == 7:
                    patch.setattr(model.executor.cache, "_places", {"place.onnx": fail})
                    raise MesaError("the engine gave up")
                return run(role, bucket, feeds)

            patch.setattr(model.executor.cache._graphs, "run", fail_in_the_second_row)
            with pytest.raises(Failure):
                model.extend([tokens(20), tokens(7)])
        calls = (
            lambda: model.step([3, 4]),
            lambda: model.extend([[3], [4]]),
            lambda: model.generate("a", 2, append=True),
        )
        for call in calls:
            with pytest.raises(MesaError, match="the cache was lost .*; call prefill first"):
                call()
        model.prefill([tokens(62), tokens(5)])
        model.step([3, 4])
        assert model.lengths == [63, 6]

    def test_all_logits_of_unequal_tails_are_refused_before_anything_is_computed(self, model):
        model.prefill([tokens(20), tokens(30)])
        for call in (model.extend, model.prefill):
            with pytest.raises(MesaError, match="run the prompts one by one"):
                call([tokens(3), tokens(4)], all_logits=True)
            assert model.lengths == [20, 30]
