"""Every static method answers what product code asks of one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesart.graphs import MesaConfig, MesaError, Plan, Span
from mesart.graphs.bundle.records import Tagged, read_record
from mesart.graphs.method.dynamic_ntk import DynamicNtkConfig
from mesart.graphs.method.lm_infinite import LMInfiniteConfig
from mesart.graphs.method.origin import OriginConfig
from mesart.graphs.method.plan import bucket_for, buckets_up_to
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.method.registry import STATIC_METHODS, method_to_json
from mesart.graphs.method.streaming_llm import StreamingLLMConfig
from mesart.graphs.method.yarn import YarnConfig

TRAINED, LONGEST = 64, 300
METHODS: list[StaticMethod] = [
    MesaConfig(TRAINED),
    OriginConfig(TRAINED),
    DynamicNtkConfig(TRAINED, 3.0),
    YarnConfig(TRAINED, 4.0, fast=16.0),
    LMInfiniteConfig(TRAINED, 40, 5),
    StreamingLLMConfig(TRAINED, 5, 40),
]
ALL = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
COMPARED = pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)


def fitted(method: StaticMethod, tokens: int = LONGEST) -> StaticMethod:
    """As an export fixes it."""
    return method.up_to(buckets_up_to(method.up_to(tokens), tokens)[-1].max_tokens)


def table(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``[rows, 8]``, each angle twice, as halves."""
    angles = np.arange(rows)[:, None] * np.tile(10000.0 ** (-np.arange(4) / 4), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def test_all_methods_are_here():
    assert {method.name: type(method) for method in METHODS} == STATIC_METHODS


@ALL
def test_answers_everything_that_is_asked(method):
    method = fitted(method)
    assert {name for name in vars(StaticMethod) if not name.startswith("_")} <= set(dir(method))
    assert method.train_length == TRAINED
    assert method.short_length == 0
    assert isinstance(method.log_n, bool)
    assert isinstance(method.rerotates, bool)
    assert 0 < method.extent <= method.positions
    assert method.for_model("no such checkpoint") == method
    assert method.described()
    method.require_room(LONGEST)


@ALL
def test_is_the_same_out_of_json(method):
    fields = json.loads(json.dumps(method_to_json(fitted(method))))
    assert fields["method"] == method.name
    name = fields.pop("method")
    assert read_record(STATIC_METHODS[name], fields) == fitted(method)


@ALL
@given(data=st.data())
def test_every_token_is_planned_at_a_position_of_the_table(method, data):
    method = fitted(method)
    cached = data.draw(st.integers(0, LONGEST - 1))
    tokens = data.draw(st.integers(1, LONGEST - cached))
    plan = Plan.of(method, tokens)
    if cached:
        plan = Plan.extend(method, Plan.of(method, cached).stairs, cached, tokens)
    spans = [*([plan.head] if plan.head else []), *plan.chunks, plan.tail]
    assert [span.start for span in spans] == [plan.start, *(span.stop for span in spans[:-1])]
    assert plan.tail.stop == plan.length == cached + tokens
    positions = plan.stairs.positions(0, plan.length)
    assert 0 <= positions.min() <= positions.max() < method.positions
    assert positions.max() - positions.min() < method.extent
    assert bucket_for(method, plan.length).max_tokens >= plan.length
    if not method.chunk_length:
        assert (plan.head, plan.chunks, plan.tail) == (None, (), Span(plan.start, plan.length))
    for chunk in plan.chunks:
        assert plan.chunk_positions(chunk)[0] == method.head_length
        assert len(chunk) <= method.chunk_length


@ALL
def test_the_buckets_are_as_long_as_mesas_unless_keys_are_dropped(method):
    lengths = [bucket.max_tokens for bucket in buckets_up_to(fitted(method), LONGEST)]
    expected = [bucket.max_tokens for bucket in buckets_up_to(MesaConfig(TRAINED), LONGEST)]
    assert lengths == ([LONGEST] if method.sink_window else expected)


@ALL
def test_the_rotary_table_has_a_row_for_each_position(method):
    cos, sin = table(TRAINED)
    cosines, sines = fitted(method).rotary_table(cos, sin)
    assert cosines.shape == sines.shape == (fitted(method).positions, 8)
    assert cosines.dtype == sines.dtype == np.float32
    if method.name != "yarn":  # which changes texts of all lengths
        assert np.abs(cosines[:TRAINED] - cos).max() < 1e-5
        assert np.abs(sines[:TRAINED] - sin).max() < 1e-5


@ALL
def test_only_rotary_methods_change_frequencies(method):
    cos, sin = table(TRAINED)
    cosines, _ = fitted(method).rotary_table(cos, sin)
    plain, _ = table(len(cosines))
    assert (np.abs(cosines - plain).max() > 1e-3) == method.rotary_only


@COMPARED
def test_a_table_that_cannot_be_continued(method):
    angles = np.arange(TRAINED)[:, None] ** 1.5 * np.array([1.0, 0.1])
    with pytest.raises(MesaError, match="do not grow evenly with the position, so it cannot be continued; only Mesa's"):
        fitted(method).rotary_table(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


@COMPARED
def test_a_text_longer_than_the_table(method):
    method, too_long = method.up_to(80), "a text of 81 tokens is longer than the position table of this"
    for plan in (lambda: Plan.of(method, 81), lambda: Plan.extend(method, Plan.of(method, 80).stairs, 80, 1)):
        with pytest.raises(MesaError, match=f"{too_long} {method.name} bundle, 80 tokens; export again with --max"):
            plan()


def test_dynamic_ntk_has_frequencies_for_each_bucket():
    method = DynamicNtkConfig(TRAINED)
    lengths = [bucket.max_tokens for bucket in buckets_up_to(method.up_to(LONGEST), LONGEST)]
    method = method.up_to(lengths[-1])
    assert method.levels == lengths
    assert [Plan.of(method, tokens).stairs.offset for tokens in lengths] == [0, *np.cumsum(lengths)[:-1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_length": 8}, "train_length is 8; a window of at least 16 tokens is needed"),
        ({"train_length": -1}, "train_length is -1; it must be at least 1"),
        ({"log_n": 1}, "log_n is 1; it must be true or false"),
        ({"short_length": TRAINED}, "short_length is 64; it must be at most 63"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 1 << 22}, "max_tokens is 4194304; it must be at most 2097152"),
    ],
)
@COMPARED
def test_numbers_that_no_method_takes(method, change, says):
    with pytest.raises(MesaError, match=says):
        dataclasses.replace(method, **change)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DynamicNtkConfig(TRAINED, 0.5), "dynamic-ntk: factor is 0.5; it must be a number from 1 to"),
        (lambda: YarnConfig(TRAINED, float("nan")), "yarn: factor is nan; it must be a number from 1 to"),
        (lambda: YarnConfig(TRAINED, 2.0, fast=0.5), "yarn: fast is 0.5; it must be a number from 1.0 to"),
        (lambda: YarnConfig(TRAINED, 2.0, slow=0), "yarn: slow is 0; it must be a number from 0.01 to"),
        (lambda: LMInfiniteConfig(TRAINED, 0, 4), "lm-infinite: window is 0; it must be at least 1"),
        (lambda: LMInfiniteConfig(TRAINED, 4, -1), "lm-infinite: first_tokens is -1; it must be at least 0"),
        (lambda: StreamingLLMConfig(TRAINED, 4, 0), "streaming-llm: window is 0; it must be at least 1"),
        (lambda: StreamingLLMConfig(TRAINED, 4.5, 9), "streaming-llm: sinks is 4.5; it must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_parameters_out_of_range(make, says):
    with pytest.raises(MesaError, match=says):
        make()


def test_the_name_in_json_is_no_field():
    """So that a method's fields are its numbers, and nothing else."""
    for kind in STATIC_METHODS.values():
        fields: Any = dataclasses.fields(kind)
        assert not {"method", "name"} & {field.name for field in fields}
    assert Tagged("method", STATIC_METHODS).field not in MesaConfig(TRAINED).to_dict()
