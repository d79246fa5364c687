"""Who waits, who runs, and how much is read: in order, within the pause, and nobody for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesart.runtime.scheduler import Scheduler

LEAST = 16
"""Tokens of a prompt that are read at a time, however slow the machine is."""

SECONDS = st.floats(1e-5, 1.0)


@given(st.lists(st.sampled_from(["add", "admit", "remove", "remove waiting", "pass"]), max_size=60), st.integers(1, 5))
def test_turns_begin_in_the_order_in_which_they_came(events, most):
    """However others come and go; and each is waiting, running or gone."""
    scheduler: Scheduler[int] = Scheduler()
    added, began, gone = 0, list[int](), set[int]()
    for event in events:
        if event == "add":
            scheduler.add(added)
            added += 1
        elif event == "admit":
            began += scheduler.admit(lambda _: len(scheduler.running) < most)
        elif event == "remove" and scheduler.running:
            gone.add(scheduler.running[0])
            scheduler.remove(scheduler.running[0])
        elif event == "remove waiting" and scheduler.waiting:
            gone.add(scheduler.waiting[-1])
            scheduler.remove(scheduler.waiting[-1])
        elif event == "pass" and scheduler.running:
            before = list(scheduler.running)
            scheduler.pass_turn(before[0])
            assert scheduler.running == [*before[1:], before[0]]
        assert began == sorted(began)
        assert list(scheduler.waiting) == sorted(scheduler.waiting)
        assert len(scheduler.running) <= most
        assert sorted([*scheduler.waiting, *scheduler.running, *gone]) == list(range(added))


def test_none_overtakes_one_that_does_not_fit_yet():
    scheduler: Scheduler[int] = Scheduler()
    for size in (3, 10, 1):
        scheduler.add(size)
    assert list(scheduler.admit(lambda size: size < 5)) == [3]
    assert list(scheduler.admit(lambda size: size < 5)) == []
    assert list(scheduler.admit(lambda size: True)) == [10, 1]


def test_who_is_gone_may_be_removed_and_passed_again():
    scheduler: Scheduler[int] = Scheduler()
    scheduler.add(1)
    assert list(scheduler.admit(lambda _: True)) == [1]
    for _ in range(2):
        scheduler.remove(1)
        scheduler.pass_turn(1)
    assert (list(scheduler.waiting), scheduler.running) == ([], [])


class TestBudget:
    @given(most=st.integers(LEAST, 4096))
    def test_where_no_text_waits_for_a_token(self, most):
        assert Scheduler[int](most).budget(0) == most

    def test_before_anything_is_known(self):
        assert Scheduler[int]().budget(1) == LEAST

    @given(
        token=SECONDS,
        decoding=SECONDS,
        texts=st.integers(1, 64),
        pause=st.floats(0.01, 2.0),
        most=st.integers(LEAST, 4096),
        others=st.lists(st.tuples(st.integers(1, 1024), st.booleans()), min_size=1, max_size=20),
    )
    def test_keeps_a_step_within_the_pause(self, token, decoding, texts, pause, most, others):
        """On a machine whose speed does not change, whichever steps told of it."""
        scheduler: Scheduler[int] = Scheduler(most, pause)
        scheduler.observe(decoding, 0, texts)
        for read, with_decoding in others:
            took = read * token + (decoding if with_decoding else 0)
            scheduler.observe(took, read, texts if with_decoding else 0)
            budget = scheduler.budget(texts)
            assert LEAST <= budget <= most
            assert budget == LEAST or decoding + budget * token <= pause * (1 + 1e-6)
            # And no less than there is time for.
            assert budget == most or decoding + (budget + 1) * token >= pause * (1 - 1e-6)

    @given(token=st.floats(1e-4, 1e-2), slower=st.floats(2.0, 50.0))
    def test_follows_a_machine_that_becomes_slower(self, token, slower):
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        for factor in (1.0, slower):
            for _ in range(12):
                budget = scheduler.budget(3)
                scheduler.observe(budget * token * factor, budget, 3)
            budget = scheduler.budget(3)
            assert budget == LEAST or budget * token * factor <= 0.2 * 1.01
