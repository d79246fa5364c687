"""The plan, for random configurations: what holds for every prompt and every continuation."""

import dataclasses
import itertools
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs import Bucket, MesaConfig, MesaError, Plan, Span, Stairs
from mesart.graphs.method.plan import Chunk, Prefix, Rerotate, TailSlice, bucket_for, buckets_up_to
from mesart.graphs.method.stairs import ORDINARY
from mesart.graphs.method.yarn import YarnConfig

PAPER = MesaConfig(256, head_length=24, chunk_length=208, tail_min=40, linear_window=23, stair_width=10)


@st.composite
def configs(draw, fixed_width: bool = False) -> MesaConfig:
    """Any configuration that is not refused."""
    train = draw(st.integers(16, 600))
    rho = draw(st.floats(0.2, 0.9))
    stair_range = int(rho * train)
    head = draw(st.integers(1, train - 1))
    tail_min = draw(st.integers(1, train - stair_range))
    return MesaConfig(
        train,
        head_length=head,
        chunk_length=draw(st.integers(1, train - head)),
        tail_min=tail_min,
        tail_max=draw(st.none() | st.integers(tail_min, train)),
        linear_window=draw(st.integers(1, stair_range - 1)),
        stair_width=draw(st.integers(1, 60)) if fixed_width else None,
        rho=rho,
    )


def check(plan: Plan, *, least_tail: int | None = None) -> None:
    """What every plan keeps to. ``least_tail``: of its tail, behind chunks; that of the method if left out."""
    config = plan.config
    assert isinstance(config, MesaConfig)
    spans = [*([plan.head] if plan.head else []), *plan.chunks, plan.tail]
    edges = [plan.start, *(span.stop for span in spans)]
    assert [span.start for span in spans] == edges[:-1]
    assert edges[-1] == plan.length
    assert all(len(span) > 0 for span in spans)
    assert plan.head is None or plan.head == Span(0, config.head_length)
    for chunk in plan.chunks:
        positions = plan.chunk_positions(chunk)
        assert len(positions) == len(chunk) <= config.chunk_length
        assert positions[0] == config.head_length
        assert positions[-1] < config.train_length
    positions = plan.stairs.positions(0, plan.length)
    assert positions.min() >= 0
    assert positions.max() < config.train_length
    assert set(np.diff(positions)) <= {0, 1}  # in the order of the tokens: a later key is never farther away
    if plan.chunks or plan.stairs != ORDINARY:
        assert plan.tail.start - plan.stairs.anchor >= config.linear_window
    if len(plan.chunks) > 1:
        assert len(plan.tail) >= (config.tail_min if least_tail is None else least_tail)


@given(configs(), st.data())
def test_a_prompt_within_the_trained_window_takes_the_dense_path(config, data):
    tokens = data.draw(st.integers(1, config.train_length))
    plan = Plan.of(config, tokens)
    assert (plan.head, plan.chunks, plan.tail, plan.stairs) == (None, (), Span(0, tokens), ORDINARY)
    assert plan.stairs.positions(0, tokens).tolist() == list(range(tokens))
    assert plan.query_scales(plan.tail).tolist() == [1.0] * tokens


@given(configs(), st.data())
def test_a_longer_prompt(config, data):
    tokens = data.draw(st.integers(config.train_length + 1, 40 * config.train_length))
    plan = Plan.of(config, tokens)
    check(plan)
    assert plan.head is not None
    assert plan.chunks
    # Only the last chunk may be short, and only where the whole rest is too long, or leaves the trained range.
    assert all(len(chunk) == config.chunk_length for chunk in plan.chunks[:-1])
    if len(plan.chunks[-1]) < config.chunk_length:
        assert len(plan.tail) == config.tail_min
        rest = tokens - plan.chunks[-1].start
        longer = Stairs(plan.chunks[-1].start - config.linear_window, plan.stairs.width)
        is_long = config.tail_max is not None and rest > config.tail_max
        assert is_long or longer.position(tokens - 1) >= config.train_length
    if config.tail_max is not None:
        assert len(plan.tail) <= config.tail_max


@given(configs(), st.data())
def test_tail_queries_see_the_papers_stairs(config, data):
    tokens = data.draw(st.integers(config.train_length + 1, 10 * config.train_length))
    plan = Plan.of(config, tokens)
    keys = np.arange(tokens)
    standing = plan.stairs.positions(0, tokens)
    for query in {plan.tail.start, (plan.tail.start + plan.tail.stop) // 2, tokens - 1}:
        window, distance = query - plan.stairs.anchor, query - keys[: query + 1]
        paper = np.where(distance <= window, distance, window + -(-(distance - window) // plan.stairs.width))
        assert window >= config.linear_window
        assert np.array_equal(standing[query] - standing[: query + 1], paper)


def test_the_example_of_the_readme():
    plan = Plan.of(PAPER, 1000)
    assert [len(chunk) for chunk in plan.chunks] == [208] * 4
    assert plan.tail == Span(856, 1000)
    assert plan.stairs == Stairs(856 - 23, 10)


def test_a_tail_too_long_for_the_trained_range_hands_a_short_chunk_over():
    config = MesaConfig(256, head_length=24, chunk_length=208, tail_min=40, linear_window=23)
    plan = Plan.of(config, 24 + 208 * 2 + 40 + 207)  # one token less than another whole chunk
    assert [len(chunk) for chunk in plan.chunks] == [208, 208, 207]
    assert len(plan.tail) == config.tail_min


def test_a_tail_longer_than_the_most_hands_a_short_chunk_over():
    config = MesaConfig(8192)
    assert (config.chunk_length, config.tail_min, config.tail_max) == (1024, 512, 512)
    plan = Plan.of(config, 128 + 1024 * 15 + 512)
    assert ([len(chunk) for chunk in plan.chunks], len(plan.tail)) == ([1024] * 15, 512)
    plan = Plan.of(config, 128 + 1024 * 15 + 513)
    assert ([len(chunk) for chunk in plan.chunks], len(plan.tail)) == ([1024] * 15 + [1], 512)
    paper = dataclasses.replace(config, tail_max=None)
    plan = Plan.of(paper, 128 + 1024 * 15 + 512 + 1023)
    assert ([len(chunk) for chunk in plan.chunks], len(plan.tail)) == ([1024] * 15, 512 + 1023)


def test_log_n_scales():
    plan = Plan.of(PAPER, 1000)
    scales = plan.query_scales(plan.tail)
    assert scales[0] == pytest.approx(math.log(857) / math.log(256), rel=1e-6)
    assert scales[-1] == pytest.approx(math.log(1000) / math.log(256), rel=1e-6)
    off = MesaConfig.from_dict({**PAPER.to_dict(), "log_n": False})
    assert Plan.of(off, 1000).query_scales(plan.tail).tolist() == [1.0] * 144


def test_an_empty_prompt_is_refused():
    with pytest.raises(MesaError, match="the prompt is empty; give at least one token"):
        Plan.of(PAPER, 0)
    with pytest.raises(MesaError, match="the prompt is empty"):
        Plan.extend(PAPER, ORDINARY, 10, 0)


class TestExtend:
    @given(configs(), st.integers(0, 2**32))
    @settings(max_examples=40)
    def test_any_sequence_of_turns_and_steps(self, config, seed):
        self._any_sequence(config, seed)

    @given(configs(fixed_width=True), st.integers(0, 2**32))
    @settings(max_examples=40)
    def test_any_sequence_with_a_fixed_width(self, config, seed):
        self._any_sequence(config, seed)

    def _any_sequence(self, config: MesaConfig, seed: int) -> None:
        choose = random.Random(seed)
        stairs, length = ORDINARY, 0
        for _ in range(12):
            turn = choose.randint(1, 3 * config.train_length)
            try:
                plan = Plan.extend(config, stairs, length, turn)
            except MesaError:
                if config.stair_width is None:  # only a width that the user fixed may be too small
                    raise
                plan = Plan.extend(config, stairs, length, 1)
            check(plan)
            stairs, length = plan.stairs, plan.length
            for _ in range(choose.randint(0, 2 * config.train_length)):
                plan = Plan.extend(config, stairs, length, 1)
                assert plan.start == length
                assert not plan.chunks
                assert plan.stairs.position(length) < config.train_length
                if plan.stairs != ORDINARY:
                    assert length - plan.stairs.anchor >= config.linear_window
                stairs, length = plan.stairs, plan.length

    @pytest.mark.parametrize("stair_width", [None, 10])
    def test_long_generation_rarely_moves_keys(self, stair_width):
        config = MesaConfig(256, stair_width=stair_width)
        stairs = Plan.of(config, 400).stairs
        moves, all_keys_moved = [], []
        for length in range(400, 60_000):
            plan = Plan.extend(config, stairs, length, 1)
            assert plan.stairs.position(length) < config.train_length
            assert length - plan.stairs.anchor >= config.linear_window
            if plan.stairs != stairs:
                moves.append(length)
                old, new = stairs.positions(0, stairs.anchor), plan.stairs.positions(0, stairs.anchor)
                if not np.array_equal(old, new):
                    all_keys_moved.append((length, stairs.width))
            stairs = plan.stairs
        assert min(np.diff(moves)) >= config.train_length // 16
        # While the trained positions that the stairs leave free hold a whole step, all keys move only when the text has
        # about doubled. A wider step cannot be taken: then they move each time that the free positions are used up.
        free = config.train_length - config.stair_range - config.linear_window
        early = [length for length, width in all_keys_moved if width <= free // 2]
        late = [length for length, width in all_keys_moved if width > free]
        assert len(early) <= math.log2(60_000 / 400) + 1
        assert min(np.diff(late)) >= free

    def test_tokens_that_fit_behind_the_cache_leave_it_where_it_is(self):
        first = Plan.of(PAPER, 1000)
        turn = Plan.extend(PAPER, first.stairs, 1000, 5)
        assert (turn.stairs, turn.chunks, turn.tail) == (first.stairs, (), Span(1000, 1005))

    def test_a_turn_longer_than_the_window_is_cut_into_chunks(self):
        config = MesaConfig(256)
        turn = Plan.extend(config, Plan.of(config, 1000).stairs, 1000, 700)
        check(turn)
        assert (turn.start, turn.head) == (1000, None)
        assert len(turn.chunks) >= 4

    def test_a_cache_shorter_than_the_head_is_computed_again(self):
        config = MesaConfig(256)
        turn = Plan.extend(config, ORDINARY, config.head_length - 1, 700)
        assert turn == Plan.of(config, config.head_length + 699)

    def test_nothing_cached_is_a_first_prompt(self):
        assert Plan.extend(PAPER, ORDINARY, 0, 700) == Plan.of(PAPER, 700)

    def test_a_long_turn_widens_the_stairs_of_a_fixed_width_as_a_long_generation_does(self):
        """A generation widens stairs that it outgrows, even of a fixed width; so must a turn cut into chunks."""
        config = MesaConfig(256, stair_width=2)
        plan = Plan.of(config, 300)
        stairs = plan.stairs
        for length in range(300, 2000):
            stairs = Plan.extend(config, stairs, length, 1).stairs
        assert stairs.width > 2
        turn = Plan.extend(config, stairs, 2000, 2 * stairs.width * config.train_length)
        check(turn)


class TestShortTexts:
    """Of a model that turns texts of up to ``short_length`` tokens by frequencies of their own."""

    @given(configs(), st.data(), st.integers(0, 2**32))
    def test_stand_in_a_part_of_the_table_of_their_own(self, config, data, seed):
        short = data.draw(st.integers(2, config.train_length - 1))
        model, choose = dataclasses.replace(config, short_length=short), random.Random(seed)
        assert model.positions == config.train_length + short
        stairs, length = ORDINARY, 0
        for _ in range(20):
            turn = choose.choice([1, 1, choose.randint(1, short), choose.randint(1, 2 * config.train_length)])
            plan = Plan.extend(model, stairs, length, turn)
            total = length + turn
            assert plan.stairs.positions(0, total).max() < model.positions
            if total <= short:
                assert (plan.head, plan.chunks, plan.tail) == (None, (), Span(length, total))
                first = config.train_length
                assert plan.stairs.positions(0, total).tolist() == list(range(first, first + total))
            elif length <= short:  # a text that outgrows them is planned as a first prompt
                assert plan == dataclasses.replace(Plan.of(config, total), config=model)
                check(plan)
            else:  # from there on nothing differs
                assert plan == dataclasses.replace(Plan.extend(config, stairs, length, turn), config=model)
            stairs, length = plan.stairs, plan.length

    @given(configs(), st.data())
    def test_first_prompts(self, config, data):
        short = data.draw(st.integers(2, config.train_length - 1))
        model = dataclasses.replace(config, short_length=short)
        tokens = data.draw(st.integers(1, 3 * config.train_length))
        stairs = Plan.of(model, tokens).stairs
        assert stairs == (Stairs(0, 1, config.train_length) if tokens <= short else Plan.of(config, tokens).stairs)


class TestSteps:
    """What there is to do: every new token once, in order, the tail last."""

    @given(configs(), st.data())
    def test_of_a_first_prompt(self, config, data):
        self._check(Plan.of(config, data.draw(st.integers(1, 30 * config.train_length))))

    @given(configs(), st.integers(0, 2**32))
    def test_of_turns(self, config, seed):
        choose = random.Random(seed)
        stairs, length = ORDINARY, 0
        for _ in range(8):
            turn = choose.choice(
                [1, choose.randint(1, config.train_length), choose.randint(1, 5 * config.train_length)]
            )
            plan = Plan.extend(config, stairs, length, turn)
            self._check(plan)
            stairs, length = plan.stairs, plan.length

    @given(configs(), st.data())
    def test_of_short_texts_that_become_long(self, config, data):
        short = data.draw(st.integers(2, config.train_length - 1))
        model = dataclasses.replace(config, short_length=short)
        cached = data.draw(st.integers(1, short))
        plan = Plan.extend(model, Plan.of(model, cached).stairs, cached, data.draw(st.integers(1, 3 * short)))
        self._check(plan)

    def _check(self, plan: Plan) -> None:
        steps = list(plan.steps())
        spans = [step.span for step in steps if not isinstance(step, Rerotate)]
        assert [token for span in spans for token in range(span.start, span.stop)] == list(
            range(plan.start, plan.length)
        )
        kinds = [type(step) for step in steps]
        assert kinds == [Prefix] * (plan.head is not None) + [Chunk] * len(plan.chunks) + [Rerotate, TailSlice]
        rotation, tail = steps[-2:]
        # All before the tail stand where its queries look for them, and it stands there itself.
        assert rotation == Rerotate(plan.tail.start, plan.stairs)
        assert tail == TailSlice(plan.tail, plan.stairs)
        assert plan.start > 0 or plan.head is None or steps[0] == Prefix(Span(0, plan.config.head_length))


class TestBuckets:
    @given(configs(), st.data())
    def test_cover_every_prompt_with_few_empty_slots(self, config, data):
        tokens = data.draw(st.integers(1, 60 * config.train_length))
        bucket = bucket_for(config, tokens)
        plan = Plan.of(config, tokens)
        assert bucket.max_tokens >= tokens
        assert plan.stairs.width == bucket.stair_width
        whole = [chunk for chunk in plan.chunks if len(chunk) == config.chunk_length]
        assert len(whole) <= bucket.chunks
        first = next(bucket for bucket in config.buckets() if bucket.chunks)
        if bucket.chunks > max(4, first.chunks):
            assert bucket.chunks - len(whole) <= math.ceil(bucket.chunks / 3)

    def test_table(self):
        buckets = buckets_up_to(MesaConfig(256, head_length=24, chunk_length=208, tail_min=40), 4096)
        assert [bucket.chunks for bucket in buckets] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]
        assert buckets[0] == Bucket(0, 256, 1)
        assert buckets[4].max_tokens == 24 + 4 * 208 + 40

    @given(configs(), st.data())
    def test_rise(self, config, data):
        tokens = data.draw(st.integers(1, 60 * config.train_length))
        buckets = buckets_up_to(config, tokens)
        assert buckets[-1].max_tokens >= tokens
        assert len(buckets) == 1 or buckets[-2].max_tokens < tokens
        for smaller, larger in itertools.pairwise(buckets):
            assert smaller.chunks < larger.chunks
            assert smaller.max_tokens < larger.max_tokens
            assert smaller.stair_width <= larger.stair_width

    @given(configs(), st.data())
    def test_width_serves_every_prompt_of_a_bucket(self, config, data):
        buckets = buckets_up_to(config, 30 * config.train_length)
        bucket = data.draw(st.sampled_from(buckets))
        check(Plan.of(config, bucket.max_tokens))

    @given(configs(fixed_width=True), st.integers(2, 60))
    def test_a_fixed_width_too_small_names_one_that_does(self, config, windows):
        tokens = windows * config.train_length
        try:
            buckets_up_to(config, tokens)
        except MesaError as error:
            text = str(error)
        else:
            # Then every prompt that long can be planned.
            for length in range(config.train_length + 1, tokens + 1, max(1, tokens // 20)):
                check(Plan.of(config, length))
            return
        assert "\n" not in text
        width = int(re.findall(r"a stair_width of (\d+) or more would do", text)[0])
        assert width > config.stair_width
        wider = MesaConfig.from_dict({**config.to_dict(), "stair_width": width})
        buckets_up_to(wider, tokens)
        check(Plan.of(wider, tokens))

    @pytest.mark.parametrize("max_tokens", [0, -3])
    def test_no_tokens(self, max_tokens):
        with pytest.raises(MesaError, match="it must be at least 1"):
            buckets_up_to(PAPER, max_tokens)


@st.composite
def cut_prompts(draw) -> tuple[MesaConfig, int, list[int]]:
    """A configuration, a number of tokens, and edges that are not refused."""
    config = draw(configs())
    lead = draw(st.sampled_from([0, 0, 1, 7]) | st.integers(0, 3 * config.chunk_length))
    lengths = draw(st.lists(st.integers(1, 3 * config.chunk_length + 1), min_size=0 if lead else 1, max_size=6))
    edges = [config.head_length + lead]
    for length in lengths:
        edges.append(edges[-1] + length)
    tail = draw(st.integers(1, 5) | st.integers(1, 3 * config.train_length))
    return config, edges[-1] + tail, edges


class TestBetweenEdges:
    """First prompts whose chunks begin and end where documents do."""

    @given(cut_prompts())
    @settings(max_examples=30)
    def test_every_token_is_computed_once(self, prompt):
        config, tokens, edges = prompt
        plan = Plan.of(config, tokens, edges)
        check(plan, least_tail=1)  # a question may be short
        assert (plan.start, plan.length) == (0, tokens)
        assert plan.head == Span(0, config.head_length)
        starts = {chunk.start for chunk in plan.chunks} | {plan.tail.start}
        assert set(edges) <= starts, "a chunk lies across an edge"
        TestSteps()._check(plan)

    @given(cut_prompts())
    @settings(max_examples=30)
    def test_pieces_are_equal_and_as_few_as_can_be(self, prompt):
        config, tokens, edges = prompt
        plan = Plan.of(config, tokens, edges)
        first = [config.head_length] * (edges[0] > config.head_length)
        for start, stop in itertools.pairwise([*first, *edges]):
            lengths = [len(chunk) for chunk in plan.chunks if start <= chunk.start < stop]
            assert sum(lengths) == stop - start
            assert len(lengths) == math.ceil((stop - start) / config.chunk_length)
            assert max(lengths) - min(lengths) <= 1

    @given(cut_prompts(), cut_prompts(), st.integers(1, 500))
    @settings(max_examples=30)
    def test_a_span_has_the_same_pieces_in_every_prompt(self, prompt, other, length):
        """Whatever stands before and behind it, and how long the prompts are."""
        config, _, edges = prompt
        lengths = []
        for before, tail in ((edges, 1), ([config.head_length], 3 * config.train_length), (other[2], 7)):
            before = [config.head_length, *(edge for edge in before if edge > config.head_length)]
            start = before[-1]
            plan = Plan.of(config, start + length + tail, [*before, start + length])
            lengths.append([len(chunk) for chunk in plan.chunks if start <= chunk.start < start + length])
        assert lengths[0] == lengths[1] == lengths[2]

    @given(cut_prompts())
    @settings(max_examples=30)
    def test_a_tail_is_no_longer_than_it_has_to_be(self, prompt):
        """One that is too long hands tokens to chunks behind the last edge, as that of any prompt."""
        config, tokens, edges = prompt
        plan = Plan.of(config, tokens, edges)
        behind = [chunk for chunk in plan.chunks if chunk.start >= edges[-1]]
        if not behind:
            assert plan.tail == Span(edges[-1], tokens)
        else:
            assert len(plan.tail) >= config.tail_min
        if config.tail_max is not None:
            assert len(plan.tail) <= config.tail_max

    @given(cut_prompts(), st.lists(st.integers(1, 700), min_size=1, max_size=6))
    @settings(max_examples=30)
    def test_a_text_goes_on_behind_them(self, prompt, turns):
        config, tokens, edges = prompt
        plan = Plan.of(config, tokens, edges)
        for turn in turns:
            plan = Plan.extend(config, plan.stairs, plan.length, turn)
            check(plan)
            for _ in range(3):
                plan = Plan.extend(config, plan.stairs, plan.length, 1)
                check(plan)

    @given(cut_prompts(), st.data())
    @settings(max_examples=30)
    def test_of_models_with_short_frequencies(self, prompt, data):
        """Chunks turn by the long ones, however short the prompt is, and so does all behind them."""
        config, tokens, edges = prompt
        model = dataclasses.replace(config, short_length=data.draw(st.integers(2, config.train_length - 1)))
        plan, plain = Plan.of(model, tokens, edges), Plan.of(config, tokens, edges)
        assert plan == dataclasses.replace(plain, config=model)
        assert plan.stairs.positions(0, tokens).max() < config.train_length
        for turn in data.draw(st.lists(st.integers(1, 300), max_size=4)):
            plain = Plan.extend(config, plain.stairs, plain.length, turn)
            plan = Plan.extend(model, plan.stairs, plan.length, turn)
            assert plan == dataclasses.replace(plain, config=model)

    @pytest.mark.parametrize(
        "edges",
        [[7, 20], [8], [8, 8, 20], [20, 10], [8, 20, 20], [8, 100], [8, 30, 101], [-1, 20], [0, 20], [8, 20, 15]],
        ids=str,
    )
    def test_edges_that_cut_nothing_are_refused(self, edges):
        config = MesaConfig(64, head_length=8, chunk_length=40, tail_min=16, linear_window=8)
        with pytest.raises(
            MesaError, match=r"a prompt of 100 tokens cannot be cut at \[.*: edges rise, from 8 "
        ) as error:
            Plan.of(config, 100, edges)
        assert "\n" not in str(error.value)
        assert Plan.of(config, 100, [8, 99]).tail == Span(99, 100)

    def test_an_empty_prompt_is_refused(self):
        with pytest.raises(MesaError, match="the prompt is empty"):
            Plan.of(PAPER, 0, [24, 30])

    def test_a_fixed_width_that_leaves_the_trained_range_is_refused(self):
        config = dataclasses.replace(PAPER, stair_width=2)
        with pytest.raises(MesaError, match="stair_width = 2 leaves the trained range .* a stair_width of"):
            Plan.of(config, 1000, [24, 900])

    def test_a_method_without_chunks_says_so(self):
        with pytest.raises(MesaError, match="the method yarn has no chunks; a prompt of 30 tokens cannot be cut"):
            Plan.of(YarnConfig(64, factor=2.0), 30, [0, 20])

    def test_the_example_of_the_documentation(self):
        plan = Plan.of(PAPER, 24 + 500 + 100 + 30, [24, 524, 624])
        assert [len(chunk) for chunk in plan.chunks] == [166, 167, 167, 100]
        assert plan.tail == Span(624, 654)
