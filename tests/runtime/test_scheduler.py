"""Who waits, who runs, and how much is read: in order, within the pause, and nobody for ever."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mesart.runtime.scheduler import Scheduler

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


LEAST = st.integers(16, 4096)
PASTS = st.integers(0, 1 << 17)


def step(scheduler: Scheduler[int], past: int, texts: int = 1) -> int:
    """Tokens that a step reads behind ``past`` others; none where it only decodes."""
    budget = scheduler.budget(texts)
    return 0 if budget.is_spent else budget.take(1 << 20, past)


class TestBudget:
    @given(most=LEAST, past=PASTS)
    def test_where_no_text_waits_for_a_token(self, most, past):
        assert step(Scheduler[int](most), past, 0) == most

    def test_before_anything_is_known(self):
        assert [step(Scheduler[int](), past) for past in (0, 2048, 4096, 32768, 1 << 17)] == [16, 16, 8, 1, 1]

    @given(
        token=st.floats(1e-5, 0.1),
        pair=st.floats(0, 1e-5),
        decoding=SECONDS,
        texts=st.integers(1, 64),
        pause=st.floats(0.01, 2.0),
        most=LEAST,
        others=st.lists(st.tuples(st.integers(1, 1024), st.booleans(), PASTS), min_size=1, max_size=20),
        past=PASTS,
    )
    def test_keeps_a_step_within_the_pause(self, token, pair, decoding, texts, pause, most, others, past):
        """On a machine whose speed does not change, whichever steps told of it, behind texts of whatever length."""

        def seconds(past: int) -> float:
            return token + pair * past

        scheduler: Scheduler[int] = Scheduler(most, pause)
        scheduler.observe(decoding, [], texts)
        for read, with_decoding, behind in others:
            took = read * seconds(behind) + (decoding if with_decoding else 0)
            scheduler.observe(took, [(read, behind)], texts if with_decoding else 0)
        # A text twice as long is of another size; within a size, the least is known of all.
        same = [behind for *_, behind in others if behind.bit_length() == past.bit_length()]
        cost = max([seconds(past), *map(seconds, same)]) if same else seconds(past)
        slack = seconds(past) / min(map(seconds, same)) if same else 1
        count = step(scheduler, past, texts)
        left = max(pause - decoding, decoding / 4)
        assert 1 <= count <= most
        assert count == 1 or count * seconds(past) <= left * max(1, slack) * (1 + 1e-6)
        if same:  # and no less than there is time for, in eights
            assert count == most or (count + 8) * cost >= left * (1 - 1e-6)

    @given(token=st.floats(1e-4, 1e-2), slower=st.floats(2.0, 50.0))
    def test_follows_a_machine_that_becomes_slower(self, token, slower):
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        for factor in (1.0, slower):
            for _ in range(12):
                count = step(scheduler, 0)
                scheduler.observe(count * token * factor, [(count, 0)], 1)
            count = step(scheduler, 0)
            assert count == 1 or count * token * factor <= 0.2 * 1.01

    def test_what_disturbed_a_step_is_forgotten(self):
        """Decoding that took seconds, once, is no reason to let others wait as long."""
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        scheduler.observe(3.0, [], 8)
        took = []
        for _ in range(20):
            count = step(scheduler, 0)
            took.append(0.08 + 0.003 * count)
            scheduler.observe(took[-1], [(count, 0)], 8)
        assert max(took[1:]) <= 0.2 * 1.05

    def test_what_decoding_takes_is_measured_again(self):
        """Texts grow, and prompts get their share all the same, however long decoding takes."""
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        decoding, counts = 0.1, []
        for _ in range(400):
            counts.append(step(scheduler, 0))
            parts = [(counts[-1], 0)] if counts[-1] else []
            scheduler.observe(decoding + 0.001 * counts[-1], parts, 8)
            decoding += 0.002
        assert counts.count(0) <= 400 // 32
        assert max(b - a for a, b in pairwise(index for index, count in enumerate(counts) if not count)) == 33
        # In the end decoding takes 0.9 s: a quarter of it is 225 tokens, less what it has grown since it was measured.
        assert 120 <= sorted(counts[-32:])[1] <= 225

    def test_a_budget_is_for_all_parts_of_a_step(self):
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        scheduler.observe(0.1, [], 1)
        scheduler.observe(0.1 + 8 * 0.002, [(8, 1000)], 1)
        scheduler.observe(0.1 + 1 * 0.030, [(1, 40_000)], 1)
        budget = scheduler.budget(1)
        assert budget.take(16, 1000) == 16
        assert budget.take(100, 40_000) == 2
        assert budget.is_spent
        assert budget.take(100, 40_000) == 0

    def test_keys_are_rotated_within_the_pause(self):
        scheduler: Scheduler[int] = Scheduler(4096, 0.2)
        alone = scheduler.budget(0)
        assert [alone.take_keys(), alone.take_keys(), alone.take(1 << 20, 5)] == [4096, 4096, 4096]
        scheduler.observe(0.1, [], 1)
        assert scheduler.budget(1).take_keys() == 256
        scheduler.costs.observe_rotation(256 * 1e-4, 256)
        budget = scheduler.budget(1)
        assert budget.take_keys() == 1000
        assert budget.is_spent
