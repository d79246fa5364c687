"""What a model remembers: after failures, of interrupted generations, and beside other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs import MesaError
from mesart.runtime import MesaModel, SamplingConfig, present_backends
from tests.runtime.faults import Faults, Interruption

TAKEN = "another call has changed the cache since this generation's last token"


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


def open_model(bundle: Callable[..., Any]) -> MesaModel:
    """On the fastest engine that gives the same numbers at each run."""
    return MesaModel.load(bundle(), "onnxruntime" if "onnxruntime" in present_backends() else "torch", verify=False)


@pytest.fixture(scope="module")
def model(bundle) -> Iterator[MesaModel]:
    with open_model(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def fresh(bundle) -> Iterator[MesaModel]:
    with open_model(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def failing(bundle) -> Iterator[tuple[MesaModel, Faults]]:
    with open_model(bundle) as loaded, Faults(loaded) as faults:
        yield loaded, faults


def known(model: MesaModel) -> list[Any]:
    """Tokens of the live texts, and where they stand."""
    return [(text.ids.tolist(), text.stairs) for text in model.texts]


COUNTS = st.sampled_from([1, 2, 5, 20, 40, 63, 64, 65, 100, 150])
CALLS = st.tuples(
    st.sampled_from([*["extend"] * 4, *["step"] * 3, "append", "generate", "prefill"]),
    st.lists(COUNTS, min_size=2, max_size=2),
    st.none() | st.integers(1, 11),  # the run or rotation that fails
)


class TestAnySequenceOfCalls:
    @settings(max_examples=25)
    @given(calls=st.lists(CALLS, min_size=3, max_size=7), seed=st.integers(0, 9))
    def test_those_that_failed_never_were(self, failing, fresh, calls, seed):
        """As a model that was asked for the others only; of a first prompt that failed, no texts stay."""
        model, faults = failing
        prompts = [tokens(30, seed), tokens(70, seed + 1)]
        done: list[Callable[[MesaModel], Any]] = [lambda m: m.prefill(prompts)]
        model.prefill(prompts)
        for index, (kind, counts, run) in enumerate(calls):
            ids = [tokens(count, seed + index + row) for row, count in enumerate(counts)]
            call = self.call(kind, ids)
            if kind in ("prefill", "generate"):
                done = []
            if not done and kind not in ("prefill", "generate"):
                with pytest.raises(MesaError, match="call prefill first"):
                    call(model)
                continue
            before = known(model)
            if run is not None:
                faults.at(run)
            try:
                call(model)
                done.append(call)
            except Interruption:
                lengths = tuple(model.lengths)
                if kind in ("prefill", "generate"):
                    done = [self.up_to(kind, ids, lengths)] if any(lengths) else []
                elif kind in ("extend", "step"):
                    assert known(model) == before
                elif kind == "append":  # as far as it had come
                    done.append(self.up_to(kind, ids, lengths))
            finally:
                faults.none()
        if not done:
            assert model.lengths == [0]
            return
        for call in done:
            call(fresh)
        assert model.lengths == fresh.lengths
        assert known(model) == known(fresh)
        got, expected = (list(m.generate_ids([[5], [6]], 2, append=True)) for m in (model, fresh))
        assert got == expected
        assert np.abs(model.step([7, 8]) - fresh.step([7, 8])).max() < 1e-3

    @staticmethod
    def call(kind: str, ids: list[list[int]]) -> Callable[[MesaModel], Any]:
        calls: dict[str, Callable[[MesaModel], Any]] = {
            "prefill": lambda m: m.prefill(ids),
            "extend": lambda m: m.extend(ids),
            "step": lambda m: m.step([ids[0][0], ids[1][0]]),
            "generate": lambda m: list(m.generate_ids(ids, 3)),
            "append": lambda m: list(m.generate_ids(ids, 3, append=True)),
        }
        return calls[kind]

    @staticmethod
    def up_to(kind: str, ids: list[list[int]], lengths: tuple[int, ...]) -> Callable[[MesaModel], Any]:
        """A generation up to that many tokens in the cache: its next token was chosen, and never fed."""

        def generate(model: MesaModel) -> None:
            if kind == "append" and tuple(model.lengths) == lengths:
                return  # it failed before its first token
            for _ in model.generate_ids(ids, 3, append=kind == "append"):
                if tuple(model.lengths) == lengths:
                    return

        return generate


class TestGenerations:
    def test_one_ends_when_another_takes_the_cache(self, model):
        alone = list(model.generate_ids([tokens(5)], 4))
        takers: list[Callable[[], Any]] = [
            lambda: model.prefill(tokens(9)),
            lambda: model.extend([5]),
            lambda: model.step(5),
            lambda: next(model.generate_ids([tokens(7)], 4)),
            lambda: next(model.stream(tokens(7), 4, append=True)),
        ]
        for take in takers:
            first = model.generate_ids([tokens(5)], 4)
            assert next(first) == alone[0]
            take()
            with pytest.raises(MesaError, match=TAKEN) as error:
                next(first)
            assert "\n" not in str(error.value)

    def test_one_goes_on_after_a_call_that_was_refused_or_failed(self, model, monkeypatch):
        alone = list(model.generate_ids([tokens(5)], 4))
        generation = model.generate_ids([tokens(5)], 4)
        seen = [next(generation)]
        for refused in (lambda: model.prefill([3] * 400), lambda: model.extend([]), lambda: model.step([3, 4])):
            with pytest.raises(MesaError):
                refused()
        assert [*seen, *generation] == alone

    def test_what_was_shown_and_not_fed_survives_a_turn_that_fails(self, bundle, model):
        with open_model(bundle) as other, Faults(other) as faults:
            for m in (model, other):
                generation = m.generate_ids([tokens(20)], 9)
                next(generation), next(generation)
            faults.at(1)
            with pytest.raises(Interruption):
                next(other.generate_ids([[5, 6]], 4, append=True))
            got, expected = (list(m.generate_ids([[5, 6]], 4, append=True)) for m in (other, model))
            assert got == expected
            assert other.lengths == [20 + 2 + 2 + 3]

    def test_what_was_shown_of_a_conversation_that_is_gone_is_gone(self, bundle, model):
        with open_model(bundle) as other, Faults(other) as faults:
            list(other.generate_ids([tokens(20)], 3))
            faults.at(1)
            with pytest.raises(Interruption):
                other.prefill(tokens(30))
            assert list(other.generate_ids([[5, 6, 7]], 4, append=True)) == list(model.generate_ids([[5, 6, 7]], 4))

    def test_rows_that_met_a_stop_string_keep_what_was_shown(self, model):
        prompts, sampling = ["The grass is green.", "Here we go."], SamplingConfig()
        texts = [str(model.generate(prompt, 16, sampling=sampling)) for prompt in prompts]
        stop = next(
            part for at in range(2, 12) if (part := texts[0][at : at + 2]) not in texts[1] and part.isprintable()
        )
        alone, lengths = [], []
        for prompt in prompts:
            model.generate(prompt, 16, stop=stop, sampling=sampling)
            lengths += model.lengths
            alone.append(model.generate(" There", 8, append=True, sampling=sampling))
        model.generate(prompts, 16, stop=stop, sampling=sampling)
        assert model.lengths == lengths
        assert lengths[0] < lengths[1]
        assert model.generate([" There"] * 2, 8, append=True, sampling=sampling) == alone


class TestThreads:
    @pytest.mark.parametrize("backend", present_backends())
    def test_calls_wait_for_each_other(self, bundle, backend):
        with MesaModel.load(bundle(), backend, verify=False) as model:
            prompts = [tokens(100, seed) for seed in range(3)]
            right = [model.prefill(prompt) for prompt in prompts]
            wrong: list[Any] = []

            def work(row: int) -> None:
                for _ in range(4):
                    if not np.array_equal(model.prefill(prompts[row]), right[row]):
                        wrong.append(row)

            threads = [threading.Thread(target=work, args=(row,)) for row in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not wrong
            assert not any(thread.is_alive() for thread in threads)

    def test_generations_of_two_threads_are_right_or_say_so(self, model):
        prompts = [tokens(20, seed) for seed in range(2)]
        right = [list(model.generate_ids([prompt], 5)) for prompt in prompts]
        outcomes: list[Any] = []

        def work(row: int) -> None:
            for _ in range(5):
                try:
                    outcomes.append(list(model.generate_ids([prompts[row]], 5)) == right[row])
                except MesaError as error:
                    outcomes.append(TAKEN in str(error))

        threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert outcomes == [True] * 10

    def test_closing_waits_for_a_call(self, bundle):
        model = open_model(bundle)
        running, go_on = threading.Event(), threading.Event()

        def slow(segment: Any) -> bool:
            running.set()
            go_on.wait(30)
            return False

        Faults(model).in_runs(slow)
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(model.prefill(tokens(10))))
        thread.start()
        running.wait(30)
        closing = threading.Thread(target=model.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        go_on.set()
        thread.join(30)
        closing.join(30)
        assert len(results) == 1
        with pytest.raises(MesaError, match="the model was closed"):
            model.prefill([3])


class TestThreadsAskedFor:
    @pytest.mark.parametrize("threads", [0, -1, 100_000, 10**20, 2.0, "2", True], ids=repr)
    @pytest.mark.parametrize("backend", [*present_backends(), "auto"])
    def test_no_number_of_threads(self, bundle, backend, threads):
        with pytest.raises(MesaError, match="threads is .*; it must be a whole number from 1 to ") as error:
            MesaModel.load(bundle(), backend, threads=threads, verify=False)
        assert "\n" not in str(error.value)
