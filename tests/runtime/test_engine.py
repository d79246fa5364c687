"""Many texts side by side: each gets the tokens that it gets alone, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs.bundle.names import Phase
from mesart.graphs.errors import CapacityError, EngineError, InputError
from mesart.runtime import MesaModel, SamplingConfig, present_backends
from mesart.runtime.engine import Engine, Turn
from mesart.runtime.runners.runner import Logits, Segment
from mesart.runtime.sampling import Sampler


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


@pytest.fixture(scope="module", params=present_backends())
def model(request, bundle) -> Iterator[MesaModel]:
    with MesaModel.load(bundle(), request.param, verify=False) as loaded:
        yield loaded


def turn_of(engine: Engine, prompt: list[int], count: int, sampling: SamplingConfig | None = None) -> Turn:
    sampler = Sampler(sampling or SamplingConfig(temperature=0))
    sampler.note(prompt)
    return Turn(engine.open_text(), np.array(prompt, np.int64), sampler=sampler, max_new_tokens=count)


def alone(model: MesaModel, prompt: list[int], count: int, sampling: SamplingConfig | None = None) -> list[int]:
    choice = sampling or SamplingConfig(temperature=0)
    turn = turn_of(model.engine, prompt, count, choice)
    run(model.engine, [model.engine.add(turn)])
    model.engine.close_text(turn.text)
    return turn.tokens


def run(engine: Engine, turns: list[Turn]) -> None:
    while not all(turn.is_finished for turn in turns):
        engine.step()
    for turn in turns:
        if turn.error is not None:
            raise turn.error


ARRIVALS = st.tuples(
    st.sampled_from([1, 3, 30, 63, 64, 65, 100, 170, 250]),  # tokens of the prompt
    st.integers(1, 12),  # tokens to generate
    st.integers(0, 8),  # the step before which it comes
    st.none() | st.integers(0, 8),  # steps after which it is aborted
    st.none() | st.integers(0, 99),  # the seed of a draw; none: greedy
)


class TestTurnsOfManyTexts:
    @settings(max_examples=15)
    @given(arrivals=st.lists(ARRIVALS, min_size=2, max_size=5), budget=st.sampled_from([1, 7, 32, 1024]))
    def test_each_gets_what_it_gets_alone(self, model, arrivals, budget):
        engine = model.engine
        free = engine.store.free_bytes
        prompts = [tokens(count, seed) for seed, (count, *_) in enumerate(arrivals)]
        choices = [SamplingConfig(temperature=0 if s is None else 0.8, seed=s) for *_, s in arrivals]
        turns = [turn_of(engine, p, n, c) for p, (_, n, *_), c in zip(prompts, arrivals, choices, strict=True)]
        engine.scheduler.most, most = budget, engine.scheduler.most
        try:
            step = 0
            while not all(turn.is_finished for turn in turns):
                for turn, (_, _, comes, leaves, _) in zip(turns, arrivals, strict=True):
                    if step == comes:
                        engine.add(turn)
                    if leaves is not None and step == comes + leaves:
                        engine.abort(turn)
                engine.step()
                step += 1
        finally:
            engine.scheduler.most = most
        for turn, prompt, (_, count, _, leaves, _), choice in zip(turns, prompts, arrivals, choices, strict=True):
            assert turn.error is None
            expected = alone(model, prompt, count, choice)
            assert turn.tokens == expected[: len(turn.tokens)]
            assert leaves is not None or len(turn.tokens) == len(expected)
            engine.close_text(turn.text)
        assert engine.is_idle
        assert engine.store.free_bytes == free

    def test_a_text_goes_on_after_an_abort(self, model):
        """What was being computed is undone, what was shown is not."""
        engine, prompt = model.engine, tokens(100)
        expected = alone(model, prompt, 8)
        turn = engine.add(turn_of(engine, prompt, 8))
        while len(turn.tokens) < 3:
            engine.step()
        engine.abort(turn)
        assert turn.tokens == expected[:3]
        again = Turn(turn.text, np.zeros(0, np.int64), sampler=turn.sampler, max_new_tokens=5, goes_on=True)
        run(engine, [engine.add(again)])
        assert again.tokens == expected[3:]
        engine.close_text(turn.text)

    def test_a_long_prompt_is_read_between_the_tokens_of_others(self, model):
        engine = model.engine
        first = engine.add(turn_of(engine, tokens(30), 20))
        while not first.tokens:
            engine.step()
        engine.scheduler.most, most = 32, engine.scheduler.most
        second = engine.add(turn_of(engine, tokens(300, 1), 2))
        try:
            while not second.tokens and not first.is_finished:
                before = len(first.tokens)
                engine.step()
                assert len(first.tokens) == before + 1, "it waited for the other's prompt"
        finally:
            engine.scheduler.most = most
        run(engine, [first, second])
        assert first.tokens == alone(model, tokens(30), 20)
        assert second.tokens == alone(model, tokens(300, 1), 2)
        for turn in (first, second):
            engine.close_text(turn.text)

    def test_a_prompt_is_read_between_rows_that_decode(self, model):
        """Where texts are rows, its row lies between theirs."""
        engine, prompts = model.engine, [tokens(30), tokens(23, 3), tokens(40, 1)]
        expected = [alone(model, prompt, 6) for prompt in prompts]
        turns = [turn_of(engine, prompt, 6) for prompt in prompts]
        for turn in (turns[0], turns[2]):
            engine.add(turn)
        while not (turns[0].tokens and turns[2].tokens):
            engine.step()
        engine.add(turns[1])
        run(engine, turns)
        assert [turn.tokens for turn in turns] == expected
        for turn in turns:
            engine.close_text(turn.text)

    def test_threads_share_an_engine(self, model):
        """One steps, others add and abort."""
        engine, expected = model.engine, [alone(model, tokens(20 + i, i), 6) for i in range(4)]
        turns: list[Turn] = []

        def ask(index: int) -> None:
            turn = engine.add(turn_of(engine, tokens(20 + index, index), 6))
            turns.append(turn)
            other = engine.add(turn_of(engine, tokens(40, index), 50))
            engine.abort(other)
            engine.close_text(other.text)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not engine.is_idle:
            engine.step()
        for thread in threads:
            thread.join()
        assert sorted(turn.tokens for turn in turns) == sorted(expected)
        for turn in turns:
            engine.close_text(turn.text)


class Broken:
    """A runner that fails whenever a certain token is among the new ones."""

    def __init__(self, model: MesaModel, token: int, error: type[Exception]) -> None:
        self.inner, self.token, self.error = model.engine.runner, token, error
        self.last_logits_only, self.whole_slices = self.inner.last_logits_only, self.inner.whole_slices

    def slice_length(self, phase: Phase, past: int) -> int:
        return self.inner.slice_length(phase, past)

    def run(self, segments: list[Segment]) -> list[Logits]:
        if any(self.token in segment.ids for segment in segments):
            raise self.error("the engine gave up")
        return self.inner.run(segments)

    def close(self) -> None:
        self.inner.close()


class TestFailures:
    @pytest.mark.parametrize("error", [EngineError, MemoryError])
    def test_a_turn_that_fails_fails_alone(self, model, monkeypatch, error):
        engine = model.engine
        free = engine.store.free_bytes
        expected = alone(model, tokens(100, 1), 6)
        monkeypatch.setattr(engine, "runner", Broken(model, 321, error))
        good, bad = turn_of(engine, tokens(100, 1), 6), turn_of(engine, [*tokens(120, 2), 321], 6)
        for turn in (bad, good):
            engine.add(turn)
        while not engine.is_idle:
            engine.step()
        assert good.tokens == expected
        assert isinstance(bad.error, error)
        assert len(bad.text) == 0
        for turn in (good, bad):
            engine.close_text(turn.text)
        assert engine.store.free_bytes == free

    def test_what_cannot_be_asked_of_a_text(self, model):
        engine = model.engine
        turn = engine.add(turn_of(engine, tokens(10), 4))
        with pytest.raises(InputError, match="has a turn that has not ended"):
            engine.add(Turn(turn.text, np.array([3])))
        engine.close_text(turn.text)
        assert turn.is_finished
        engine.close_text(turn.text)  # twice is once
        with pytest.raises(InputError, match="closed or aborted; begin a new one"):
            engine.add(Turn(turn.text, np.array([3])))

    def test_a_closed_engine(self, bundle):
        model = MesaModel.load(bundle(), present_backends()[0], verify=False)
        engine = model.engine
        turn = engine.add(turn_of(engine, tokens(10), 4))
        model.close()
        assert turn.is_finished
        assert "closed" in str(turn.error)
        for call in (engine.step, engine.open_text, lambda: engine.add(turn)):
            with pytest.raises(InputError, match="closed; load it again"):
                call()

    @pytest.mark.parametrize("backend", present_backends())
    def test_a_pool_that_is_too_small(self, bundle, backend):
        """What never fits is refused with the bytes that are missing; what does not fit yet waits."""
        with MesaModel.load(bundle(), backend, verify=False, kv_memory=200_000) as model:
            engine = model.engine
            size = engine.store.bytes_per_token
            room = engine.store.free_bytes // size
            big = engine.add(turn_of(engine, tokens(40), room))
            while not engine.is_idle:
                engine.step()
            assert isinstance(big.error, CapacityError)
            assert "MiB are missing" in str(big.error)
            assert "kv_memory" in str(big.error)
            count = room // 2
            turns = [engine.add(turn_of(engine, tokens(40, i), count - 40)) for i in range(3)]
            engine.step()
            assert not turns[2].tokens
            for turn in turns:
                run(engine, [turn])
                assert len(turn.tokens) == count - 40
                engine.close_text(turn.text)
