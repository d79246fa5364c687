"""Live texts: they go on as far as the method does, and are as they were when a call fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError, TorchReference
from mesart.runtime import MesaModel, present_backends
from mesart.runtime.runners.runner import Segment
from tests.runtime.faults import Faults, Interruption


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


@pytest.fixture(scope="module", params=present_backends())
def model(request, bundle) -> Iterator[MesaModel]:
    """On each runner: blocks, rows that are written in place, and graphs that take a past."""
    with MesaModel.load(bundle(), request.param, threads=1, verify=False) as loaded:
        yield loaded


def state(model: MesaModel) -> list[Any]:
    """What is known of the live texts, all but their keys and values."""
    return [
        (text.ids.tolist(), text.stairs, None if text.kv is None else text.kv.positions.tolist())
        for text in model.texts
    ]


def test_keys_before_the_anchor_stay_when_it_moves_by_whole_steps(model):
    """A re-anchoring rotates the keys of the linear window only."""
    model.prefill(tokens(300))
    moved = []
    for token in tokens(60, seed=1):
        (text,) = model.texts
        before, stairs = model.snapshot(0)[0][0], text.stairs
        model.step(token)
        now = text.stairs
        if now != stairs and now.width == stairs.width:
            moved.append(now)
            keys = model.snapshot(0)[0][0]
            assert np.array_equal(keys[:, : stairs.anchor], before[:, : stairs.anchor])
            assert not np.array_equal(keys[:, : now.anchor], before[:, : now.anchor])
    assert moved


def test_a_text_knows_its_tokens_and_where_they_stand(model):
    ids = tokens(100)
    model.prefill([ids[:90], ids[:70]])
    model.extend([ids[90:], ids[70:80]])
    assert [text.ids.tolist() for text in model.texts] == [ids, ids[:80]]
    for text in model.texts:
        kv = text.require_kv()
        assert kv.length == len(text)
        assert kv.positions.tolist() == text.stairs.positions(0, len(text)).tolist()


@pytest.mark.parametrize("turn", [[5, 320], [], [1.5]], ids=["outside", "empty", "no ids"])
def test_a_turn_that_is_refused_leaves_the_text(model, turn):
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


def test_a_prompt_that_is_refused_leaves_the_text(model):
    model.prefill(tokens(100))
    with pytest.raises(MesaError, match="longer than the largest bucket"):
        model.prefill(tokens(345))
    assert model.lengths == [100]


def test_no_text_has_no_tokens(model):
    model.prefill(tokens(3))
    model.clear()
    assert (model.texts, model.lengths) == ([], [0])


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("cached", [100, 5])  # 5 are fewer than the head: the turn starts again at the first token
def test_a_failure_in_the_middle_of_a_turn_leaves_a_text_that_can_be_used(model, cached, writes):
    """Keys may have been rotated by then; what stands where must still be known."""
    turn = tokens(150, seed=1)
    model.prefill(tokens(cached))
    expected = model.extend(turn)
    model.prefill(tokens(cached))
    before = state(model)
    with Faults(model, writes=writes) as faults:
        faults.in_runs(lambda segment: segment.phase == "tail")
        with pytest.raises(MesaError, match="the engine gave up"):
            model.extend(turn)
        assert "chunk" in faults.phases
    assert state(model) == before
    assert np.abs(model.extend(turn) - expected).max() < 1e-4


def test_a_rotation_that_fails_in_the_middle_of_the_layers_leaves_all_keys(model):
    turn = tokens(30, seed=1)
    model.prefill(tokens(100))
    expected = model.extend(turn)
    model.prefill(tokens(100))
    before, positions = model.snapshot(0), state(model)
    with Faults(model) as faults:
        faults.at(2, MesaError)
        with pytest.raises(MesaError, match="the engine gave up"):
            model.extend(turn)
        assert (faults.rotations, faults.phases) == (3, []), "a layer rotated, one failed, the first rotated back"
    assert state(model) == positions
    for arrays, old in zip(model.snapshot(0), before, strict=True):
        assert all(np.abs(x - y).max() < 1e-5 for x, y in zip(arrays, old, strict=True))
    assert np.abs(model.extend(turn) - expected).max() < 1e-4


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize("row", [0, 1])
def test_a_step_that_fails_in_one_row_changes_none(bundle, specialised, row):
    """The other row is computed on its own by then."""
    with MesaModel.load(bundle(), "torch", specialised=specialised, verify=False) as model:
        prompts = [tokens(70), tokens(30, seed=1)]
        model.prefill(prompts)
        expected = model.step([3, 4])
        model.prefill(prompts)
        with Faults(model) as faults:
            faults.in_runs(lambda segment: segment.kv is model.texts[row].kv)
            with pytest.raises(MesaError, match="the engine gave up"):
                model.step([3, 4])
            assert faults.phases in ([], ["decode"])
        assert model.lengths == [70, 30]
        assert np.abs(model.step([3, 4]) - expected).max() < 1e-5


def test_memory_of_texts_that_are_gone_comes_back(model):
    def in_use() -> int:
        taken: int = model.engine.store.bytes_in_use
        return taken

    model.clear()
    empty = in_use()
    model.prefill([tokens(100), tokens(344)])
    full = in_use()
    assert full - empty >= 444 * model.engine.store.bytes_per_token
    for _ in range(3):
        model.prefill([tokens(100), tokens(344)])
        assert in_use() == full
        with Faults(model) as faults:
            for nth in (1, 2, 3):
                faults.at(nth)
                with pytest.raises(Interruption):
                    model.prefill([tokens(100), tokens(344)])
                assert in_use() == empty
    model.prefill([tokens(100), tokens(344)])
    model.clear()
    assert in_use() == empty


class TestABatchThatFails:
    # Row by row: behind the text, with chunks of its own, from the first token again, with a moved anchor.
    PROMPTS = (tokens(20), tokens(100), tokens(5), tokens(62))
    TURNS = (tokens(3), tokens(150), tokens(90), tokens(20))

    @pytest.mark.parametrize("writes", [False, True])
    def test_a_turn_leaves_every_row(self, model, writes):
        model.prefill(self.PROMPTS)
        before = state(model)
        expected = model.extend(self.TURNS)
        model.prefill(self.PROMPTS)
        with Faults(model, writes=writes) as faults:
            model.extend(self.TURNS)
            runs = faults.count
            assert runs > 8
            model.prefill(self.PROMPTS)
            for nth in range(1, runs + 1):
                for ask in (faults.at, faults.from_on):
                    ask(nth)
                    error = Interruption if ask == faults.at else MesaError
                    with pytest.raises(error, match="gave up"):
                        model.extend(self.TURNS)
                    assert state(model) == before
        assert np.abs(model.extend(self.TURNS) - expected).max() < 1e-4

    def test_a_row_that_fails_leaves_the_others_too(self, model):
        """Those are computed to their ends, and go back as well."""
        model.prefill(self.PROMPTS)
        before = state(model)
        expected = model.extend(self.TURNS)
        for failing in range(4):
            model.prefill(self.PROMPTS)

            def is_last(segment: Segment, last: int = self.TURNS[failing][-1]) -> bool:
                return segment.phase == "tail" and bool(segment.ids[-1] == last)

            with Faults(model) as faults:
                faults.in_runs(is_last)
                with pytest.raises(MesaError, match="gave up"):
                    model.extend(self.TURNS)
            assert state(model) == before
            assert np.abs(model.extend(self.TURNS) - expected).max() < 1e-4

    def test_a_step_leaves_every_row_and_its_anchor(self, model):
        """62 + 2 tokens: the step moves the anchor of a row before it fails."""
        prompts, turn = [tokens(62), tokens(64)], [tokens(3), tokens(4)]
        model.prefill(prompts)
        before = state(model)
        expected = model.extend(turn)
        model.prefill(prompts)
        with Faults(model) as faults:
            for nth in (1, 2, 3):
                faults.at(nth)
                with pytest.raises(Interruption):
                    model.step([3, 4])
        assert state(model) == before
        assert np.abs(model.extend(turn) - expected).max() < 1e-5

    def test_a_prefill_leaves_no_texts(self, model):
        with Faults(model) as faults:
            model.prefill(self.PROMPTS)
            runs = faults.count
            assert runs > 3
            for nth in range(1, runs + 1):
                faults.none()
                model.prefill(self.PROMPTS)
                faults.at(nth)
                with pytest.raises(Interruption):
                    model.prefill(self.PROMPTS)
                assert model.lengths == [0]
                assert not model.texts
        for call in (lambda: model.step(3), lambda: model.step([3] * 4), lambda: model.extend([[3]] * 4)):
            with pytest.raises(MesaError, match="call prefill first"):
                call()
        first_turn = model.extend(tokens(10))
        assert np.array_equal(first_turn, model.prefill(tokens(10)))

    def test_what_cannot_be_undone_is_said_until_the_next_prefill(self, model):
        """A row has been rotated, another fails, and the way back fails too."""
        model.prefill([tokens(62), tokens(5)])
        with Faults(model) as faults:

            def is_second_row(segment: Segment) -> bool:
                if len(segment) == 7:
                    faults.in_rotations()
                    return True
                return False

            faults.in_runs(is_second_row)
            with pytest.raises(Interruption):
                model.extend([tokens(20), tokens(7)])
        calls = (
            lambda: model.step([3, 4]),
            lambda: model.extend([[3], [4]]),
            lambda: model.snapshot(0),
            lambda: next(model.generate_ids([[3], [4]], 2, append=True)),
        )
        for call in calls:
            with pytest.raises(MesaError, match="keys of the text are half written .*; begin a new one"):
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
