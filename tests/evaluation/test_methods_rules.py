"""The methods' rules: positions and visibility, token by token, against the papers' formulas in plain loops."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesart.evaluation.methods import METHODS, Method, make_method
from mesart.evaluation.methods.method import Rule
from mesart.graphs import MesaConfig, MesaError, Plan
from mesart.graphs.method.registry import STATIC_METHODS

Relative = Callable[[int, int], "float | None"]
"""``relative(t, i)``: the relative position at which query t sees key i <= t; None where it does not."""


def origin(method: Any, prompt: int) -> Relative:
    return lambda t, i: t - i


def rerope(method: Any, prompt: int) -> Relative:
    return lambda t, i: min(t - i, method.window)


def leaky_rerope(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float:
        d = t - i
        return d if d < method.window else method.window + (d - method.window) / method.slowdown

    return relative


def lm_infinite(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float | None:
        d, window = t - i, method.config.window
        return min(d, window) if i < method.config.first_tokens or d < window else None

    return relative


def streaming_llm(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float | None:
        cache: list[int] = []  # as it is after token t: positions are places in it
        for token in range(t + 1):
            cache.append(token)
            if len(cache) > method.config.sinks + method.config.window:
                del cache[method.config.sinks]
        return cache.index(t) - cache.index(i) if i in cache else None

    return relative


def self_extend(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float:
        w, g = method.window, method.group
        return t - i if t - i < w else (w - w // g + t // g) - i // g

    return relative


def dual_chunk(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float:
        s, last = method.chunk, method.train_length - 1
        apart = t // s - i // s
        query = (t % s, min(s + t % s, last), last)[min(apart, 2)]
        return query - i % s

    return relative


def star_attention(method: Any, prompt: int) -> Relative:
    def relative(t: int, i: int) -> float | None:
        in_query = t >= prompt - method.query
        return t - i if in_query or i < method.block or i // method.block == t // method.block else None

    return relative


def mesa(method: Any, prompt: int) -> Relative:
    """The prompt's plan; past the prompt only as long as the anchor stands."""
    plan = Plan.of(method.config, prompt)

    def relative(t: int, i: int) -> float | None:
        if t >= plan.tail.start:
            return plan.stairs.position(t) - plan.stairs.position(i)
        if plan.head is not None and t < plan.head.stop:
            return t - i
        chunk = next(c for c in plan.chunks if c.start <= t < c.stop)
        if i >= chunk.start:
            return t - i
        return method.config.head_length + t - chunk.start - i if i < method.config.head_length else None

    return relative


RULES: dict[str, Callable[[Any, int], Relative]] = {
    "origin": origin,
    "dynamic-ntk": origin,
    "yarn": origin,
    "rerope": rerope,
    "leaky-rerope": leaky_rerope,
    "lm-infinite": lm_infinite,
    "streaming-llm": streaming_llm,
    "self-extend": self_extend,
    "dual-chunk": dual_chunk,
    "star-attention": star_attention,
    "mesa": mesa,
}
LOOKS_UP = {"infllm"}
"""What its queries see depends on the queries themselves."""

PARAMETERS: dict[str, dict[str, tuple[int, int]]] = {
    "rerope": {"window": (1, 40)},
    "leaky-rerope": {"window": (1, 40), "slowdown": (1, 9)},
    "lm-infinite": {"window": (1, 40), "first_tokens": (0, 9)},
    "streaming-llm": {"window": (1, 40), "sinks": (0, 9)},
    "self-extend": {"window": (1, 40), "group": (1, 12)},
    "dual-chunk": {"chunk": (1, 31)},
    "star-attention": {"block": (1, 50), "query": (1, 20)},
    "mesa": {"head_length": (1, 6), "chunk_length": (1, 20), "tail_min": (1, 8), "linear_window": (1, 7)},
}


def draw_method(draw: Any, name: str) -> Method:
    ranges = PARAMETERS.get(name, {})
    return make_method(name, 32, **{field: draw.draw(st.integers(*span), field) for field, span in ranges.items()})


def seen_by(rule: Rule, start: int, stop: int, total: int) -> dict[int, dict[int, float]]:
    """What each query of a run sees by the rule's parts, and at which relative position."""
    rule.enter(start, stop)
    result: dict[int, dict[int, float]] = {}
    for first, last in rule.blocks(start, stop, 11):
        for part in rule.parts(first, last):
            assert not part.looked_up
            positions = rule.key_positions(part.view, np.arange(total))
            for row, t in enumerate(range(first, last)):
                seen = result.setdefault(t, {})
                for i in range(int(part.first[row]), int(part.stop[row])):
                    assert i not in seen, "two parts show one key"
                    seen[i] = part.queries[row] - positions[i]
    assert sorted(result) == list(range(start, stop))
    return result


@pytest.mark.parametrize("name", RULES)
@given(draw=st.data())
def test_every_token_sees_what_the_paper_says(name: str, draw: Any) -> None:
    method = draw_method(draw, name)
    prompt = draw.draw(st.integers(1, 110), "prompt")
    rule, relative = method.for_prompt(prompt), RULES[name](method, prompt)
    seen: dict[int, dict[int, float]] = {}
    for start, stop in rule.runs(0, prompt, draw.draw(st.integers(1, 60), "run")):
        seen |= seen_by(rule, start, stop, prompt)
    for t in range(prompt):
        expected = {i: relative(t, i) for i in range(t + 1)}
        assert seen[t] == pytest.approx({i: value for i, value in expected.items() if value is not None})
    assert method.pairs(prompt) == sum(len(keys) for keys in seen.values())
    # Keys that the last query or any later one sees.
    if name not in ("mesa", "star-attention"):
        later = range(prompt - 1, prompt + 130)
        needed = sum(any(relative(t, i) is not None for t in later) for i in range(prompt))
        assert method.kept(prompt) == needed
    else:
        assert method.kept(prompt) == prompt


@given(
    st.integers(1, 200), st.integers(1, 40), st.integers(0, 6), st.integers(1, 9), st.integers(0, 3), st.integers(1, 9)
)
def test_infllm_shows_all_but_the_blocks(prompt, window, first, block, chosen, group):
    """Near keys at their distance; first tokens and what makes no whole block from the window; blocks by number."""
    numbers = {"first_tokens": first, "block": block, "chosen": chosen, "representatives": 1, "group": group}
    method = make_method("infllm", 64, window=window, **numbers)
    count = 0
    for start in range(0, prompt, group):
        stop = min(prompt, start + group)
        blocks = max(0, start - window + 1 - first) // block
        parts = method.parts(start, stop)
        for row, t in enumerate(range(start, stop)):
            expected: dict[int, float] = {}
            for i in range(t + 1):
                in_block = first <= i < first + blocks * block
                if t - i < window:
                    expected[i] = t - i
                    assert not in_block
                elif not in_block:
                    expected[i] = window
            seen: dict[int, float] = {}
            for part in parts:
                keys = range(int(part.first[row]), int(part.stop[row]))
                if part.looked_up:
                    assert len(keys) == min(chosen, blocks) * block
                    count += len(keys)
                else:
                    positions = method.key_positions(part.view, np.arange(prompt))
                    assert not seen.keys() & set(keys)
                    seen |= {i: part.queries[row] - positions[i] for i in keys}
            assert seen == expected
            count += len(seen)
    assert method.pairs(prompt) == count
    assert method.kept(prompt) == prompt


def test_all_methods_are_here():
    assert set(METHODS) == set(RULES) | LOOKS_UP


def test_those_with_static_graphs_say_what_an_export_fixes():
    fixed = {}
    for name in METHODS:
        with contextlib.suppress(MesaError):
            fixed[name] = make_method(name, 64).static()
    assert {name: type(config) for name, config in fixed.items()} == STATIC_METHODS
    assert fixed["mesa"] == MesaConfig(64)
    for name, config in fixed.items():
        assert make_method(name, 64).parameters.items() <= config.to_dict().items()
        assert METHODS[name].rotary_only == config.rotary_only


class TestDefaults:
    @pytest.mark.parametrize("train_length", [16, 64, 256, 2048, 4096, 131072])
    @pytest.mark.parametrize("times", [None, 1, 3, 64])
    def test_there_are_some_for_every_model(self, train_length, times):
        for name in METHODS:
            max_tokens = None if times is None else times * train_length
            method = make_method(name, train_length, max_tokens)
            assert method.train_length == train_length
            assert "train_length" not in method.parameters
            again = make_method(name, train_length, max_tokens, **method.parameters)
            assert again == method

    @pytest.mark.parametrize("max_tokens", [300, 1000, 4096, 10_000])
    @pytest.mark.parametrize(
        "name", ["rerope", "leaky-rerope", "lm-infinite", "streaming-llm", "self-extend", "dual-chunk"]
    )
    def test_positions_stay_in_the_trained_range(self, name, max_tokens):
        """LM-Infinite's ceiling is T_r itself, as in its paper."""
        method = make_method(name, 256, max_tokens)
        relative = RULES[name](method, max_tokens)
        last = max_tokens - 1
        if name == "streaming-llm":
            assert method.parameters == {"sinks": 4, "window": 252, "log_n": False}
            return
        found = [value for value in (relative(last, i) for i in range(last)) if value is not None]
        assert max(found) < 256 + (name == "lm-infinite")

    @pytest.mark.parametrize("max_tokens", [300, 1000, 4096])
    def test_the_least_group_that_reaches_far_enough(self, max_tokens):
        method: Any = make_method("self-extend", 256, max_tokens)
        wider = dataclasses.replace(method, group=method.group - 1) if method.group > 1 else None
        assert wider is None or self_extend(wider, 0)(max_tokens - 1, 0) >= 256  # type: ignore[operator]

    def test_those_of_the_papers_at_their_size(self):
        def parameters(name: str, max_tokens: int | None = None) -> dict[str, Any]:
            return make_method(name, 4096, max_tokens).parameters

        assert parameters("rerope")["window"] == 512
        assert parameters("self-extend", 16384)["window"] == 1024
        assert parameters("dual-chunk")["chunk"] == 3072
        assert parameters("streaming-llm") == {"sinks": 4, "window": 4092, "log_n": False}
        assert parameters("lm-infinite") == {"window": 4096, "first_tokens": 100, "log_n": False}
        assert parameters("yarn", 65536)["factor"] == 16
        assert parameters("star-attention", 131072)["block"] == 32768
        assert parameters("mesa") == {k: v for k, v in MesaConfig(4096).to_dict().items() if k != "train_length"}
        chosen = make_method("infllm", 8192).parameters
        assert chosen == {
            "window": 4096,
            "first_tokens": 128,
            "block": 128,
            "chosen": 32,
            "representatives": 4,
            "group": 512,
            "log_n": False,
        }


class TestTurning:
    def test_dynamic_ntk_is_a_new_base(self):
        method = make_method("dynamic-ntk", 64, factor=3.0)
        frequencies = 10000.0 ** (-np.arange(8) / 8)
        base = 10000.0 * (3 * 100 / 64 - 2) ** (16 / 14)
        turned, factor = method.turn(frequencies, 100)
        assert turned == pytest.approx(base ** (-np.arange(8) / 8))
        assert factor == 1
        assert method.turn(frequencies, 64)[0] == pytest.approx(frequencies)

    @pytest.mark.parametrize(("theta", "size", "factor"), [(10000.0, 64, 4.0), (500000.0, 128, 16.0), (1e4, 8, 2.0)])
    def test_yarn_is_that_of_transformers(self, theta, size, factor):
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            head_dim=size,
            max_position_embeddings=int(4096 * factor),
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": factor,
                "original_max_position_embeddings": 4096,
            },
        )
        expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        got, factor_of_both = make_method("yarn", 4096, factor=factor).turn(theta ** (-np.arange(0, size, 2) / size), 1)
        assert got == pytest.approx(expected.numpy(), rel=1e-5)
        assert factor_of_both == pytest.approx(scale)

    def test_yarn_of_factor_one_is_the_model(self):
        frequencies = 10000.0 ** (-np.arange(8) / 8)
        turned, factor = make_method("yarn", 64, factor=1.0).turn(frequencies, 1000)
        assert turned == pytest.approx(frequencies)
        assert factor == 1


def test_log_n_is_a_switch_of_every_method():
    for name in METHODS:
        method = make_method(name, 32, log_n=True)
        rule = method.for_prompt(100)
        rule.enter(99, 100)
        scales = rule.query_scales(99, 100)
        assert scales is not None
        assert scales[0] == pytest.approx(math.log(100) / math.log(32))
        off = make_method(name, 32, log_n=False).for_prompt(100)
        off.enter(99, 100)
        assert off.query_scales(99, 100) is None


class TestErrors:
    def test_an_unknown_method_is_answered_with_the_known(self):
        with pytest.raises(MesaError, match="unknown method 'ropes'; there are origin, dynamic-ntk, rerope"):
            make_method("ropes", 64)

    def test_an_unknown_parameter_too(self):
        with pytest.raises(MesaError, match="rerope has no parameter 'group'; it has window, log_n"):
            make_method("rerope", 64, group=3)

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("rerope", {"window": 0}),
            ("leaky-rerope", {"slowdown": 0.5}),
            ("lm-infinite", {"first_tokens": -1}),
            ("streaming-llm", {"window": 0}),
            ("self-extend", {"group": 0}),
            ("dual-chunk", {"chunk": 64}),
            ("yarn", {"factor": 0.5}),
            ("dynamic-ntk", {"factor": 0.5}),
            ("star-attention", {"query": 0}),
            ("infllm", {"block": 2, "representatives": 3}),
            ("mesa", {"head_length": 60}),
        ],
    )
    def test_parameters_out_of_range(self, name, parameters):
        with pytest.raises(MesaError):
            make_method(name, 64, **parameters)

    def test_windows_too_short(self):
        with pytest.raises(MesaError, match="at least 16"):
            make_method("origin", 8)
        with pytest.raises(MesaError, match="max_tokens is 0"):
            make_method("origin", 64, 0)

    @pytest.mark.parametrize("name", ["mesa", "star-attention"])
    def test_parts_that_depend_on_the_prompt(self, name):
        with pytest.raises(MesaError, match="for_prompt"):
            make_method(name, 64).parts(0, 10)
