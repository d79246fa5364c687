"""Models under every method: prefill and decoding against a brute force, and against transformers where they agree.

The brute force is one full attention with a relative position and a visibility for each pair of tokens, from formulas
in plain loops; nothing is cut, cached, merged or placed. Steps are its later rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mesart.evaluation.methods import METHODS, attention, execution, make_method, open_method, rotation, system
from mesart.evaluation.systems import PlainModel
from mesart.graphs import MesaConfig, MesaError, TorchReference

TRAINED = 64
BRUTE = "brute-force-test"
Visible = Callable[[Tensor, Tensor], Tensor]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- relative positions, as the papers have them; None where a query does not see a key ---


def relative_of(method: Any, t: int, i: int, prompt: int) -> float | None:
    d = t - i
    match method.name:
        case "origin" | "dynamic-ntk" | "yarn":
            return d
        case "rerope":
            return min(d, method.window)
        case "leaky-rerope":
            return d if d < method.window else method.window + (d - method.window) / method.slowdown
        case "lm-infinite":
            window = method.config.window
            return min(d, window) if d < window or i < method.config.first_tokens else None
        case "streaming-llm":
            sinks, window = method.config.sinks, method.config.window
            if t < sinks + window or d < window:
                return d
            return sinks + window - 1 - i if i < sinks else None
        case "self-extend":
            w, g = method.window, method.group
            return d if d < w else w - w // g + t // g - i // g
        case "dual-chunk":
            s, last = method.chunk, TRAINED - 1
            return (t % s, min(s + t % s, last), last)[min(t // s - i // s, 2)] - i % s
        case "star-attention":
            block = method.block
            return d if t >= prompt - method.query or i < block or i // block == t // block else None
        case "infllm":
            return min(d, method.window)
    raise AssertionError(method.name)


PARAMETERS: dict[str, dict[str, Any]] = {
    "origin": {},
    "dynamic-ntk": {"factor": 2.0},
    "rerope": {"window": 20},
    "leaky-rerope": {"window": 20, "slowdown": 3},
    "lm-infinite": {"window": 30, "first_tokens": 5},
    "streaming-llm": {"window": 28, "sinks": 4},
    "self-extend": {"window": 18, "group": 5},
    "dual-chunk": {"chunk": 40},
    "yarn": {"factor": 4.0},
    "star-attention": {"block": 30, "query": 13},
    "infllm": {"window": 24, "first_tokens": 3, "block": 7, "chosen": 3, "representatives": 2, "group": 5},
}
ROTARY = {"dynamic-ntk", "rerope", "leaky-rerope", "self-extend", "dual-chunk", "yarn", "infllm"}


class Brute:
    """The attention of all layers at once: set by a test, called by the model's own code."""

    def __init__(self, method: Any, prompt: int, total: int, rotary: dict[str, Any]) -> None:
        self.method, self.prompt, self.total, self.rotary = method, prompt, total, rotary
        self.relative = torch.zeros(total, total, dtype=torch.float64)
        self.visible = torch.zeros(total, total, dtype=torch.bool)
        for t in range(total):
            for i in range(t + 1):
                value = relative_of(method, t, i, prompt)
                if value is not None:
                    self.relative[t, i], self.visible[t, i] = value, True
        self.log_n = torch.ones(total, dtype=torch.float64)
        if method.log_n:
            self.log_n = torch.tensor([max(1.0, math.log(t + 1) / math.log(TRAINED)) for t in range(total)])

    def frequencies(self) -> tuple[Tensor, float]:
        """Radians a position, ``[T, R / 2]``: those of each query."""
        size = self.rotary["size"]
        pairs = torch.arange(size // 2, dtype=torch.float64)
        rows, factor = [], 1.0
        for t in range(self.total):
            base = 10000.0
            if self.method.name == "dynamic-ntk":
                n = max(self.prompt, t + 1)
                s = self.method.config.factor
                base *= max(1.0, s * n / TRAINED - (s - 1)) ** (size / (size - 2)) if n > TRAINED else 1.0
            rows.append(base ** (-2 * pairs / size))
        if self.method.name == "yarn":
            # Turns in the trained window against the bounds, on a line between their places on a logarithmic scale.
            s, own = self.method.config.factor, rows[0]
            ends = [size * math.log(TRAINED / (n * 2 * math.pi)) / (2 * math.log(10000.0)) for n in (32, 1)]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), size - 1)
            share = ((pairs - low) / (high - low)).clamp(0, 1)
            rows = [own * (1 - share) + own / s * share] * self.total
            factor = 0.1 * math.log(s) + 1
        return torch.stack(rows), factor

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """``[H, T, T]``, of unturned queries and keys ``[H, T, D]``."""
        first, size, layout = self.rotary["first"], self.rotary["size"], self.rotary["layout"]
        radians, factor = self.frequencies()
        turned = []
        for x in (query, key):
            part = x[..., first : first + size].double() * factor
            a, b = part.chunk(2, -1) if layout == "half" else (part[..., 0::2], part[..., 1::2])
            turned.append(torch.complex(a, b))
        angle = torch.exp(1j * self.relative[..., None] * radians[:, None, :])  # [T, T, R / 2]
        result = torch.einsum("htr,hir,tir->hti", turned[0], turned[1].conj(), angle).real
        for rest in (slice(0, first), slice(first + size, None)):
            result = result + query[..., rest].double() @ key[..., rest].double().transpose(-1, -2)
        return result

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """bool ``[T, T]``; under InfLLM it depends on the layer's queries ``[H, T, D]`` and keys."""
        if self.method.name != "infllm":
            return self.visible
        m, scores = self.method, self.far_scores(query, key)  # [H, T, T]
        summed, visible = scores.sum(0), self.visible.clone()
        starts = [*range(0, self.prompt, m.group), *range(self.prompt, self.total)]
        for start, stop in zip(starts, [*starts[1:], self.total], strict=True):
            blocks: list[range] = []
            while m.first_tokens + (len(blocks) + 1) * m.block <= start - m.window + 1:
                begin = m.first_tokens + len(blocks) * m.block
                blocks.append(range(begin, begin + m.block))
            relevance = []
            for block in blocks:
                mean = {i: float(summed[i + 1 : i + 1 + m.window, i].mean()) for i in block}
                best = sorted(block, key=lambda i: -mean[i])[: m.representatives]
                relevance.append(float(summed[start:stop][:, best].sum()))
            order = sorted(range(len(blocks)), key=lambda b: -relevance[b])
            for b in order[m.chosen :]:
                visible[start:stop, list(blocks[b])] = False
        return visible

    def far_scores(self, query: Tensor, key: Tensor) -> Tensor:
        near = self.relative
        self.relative = torch.full_like(near, self.method.window)
        result = self.scores(query, key) * self.log_n[:, None]
        self.relative = near
        return result

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **k: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        q, key, value = query[0], key[0].repeat_interleave(group, 0), value[0].repeat_interleave(group, 0)
        scale = k.get("scaling") or q.shape[-1] ** -0.5
        scores = self.scores(q, key) * self.log_n[:, None] * scale
        weights = scores.masked_fill(~self.seen(q, key), -torch.inf).softmax(-1)
        return (weights @ value.double()).transpose(0, 1)[None].to(query.dtype), None


_brute: list[Brute] = []


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **k: Any) -> Any:
    return _brute[-1].attend(module, query, key, value, mask, **k)


AttentionInterface.register(BRUTE, _attention)
AttentionMaskInterface.register(BRUTE, lambda *_, **__: None)


class Unturned(nn.Module):
    """In place of a model's rotary module: turns by nothing."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.real = real

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.real(*arguments, **named)
        return torch.ones_like(cos), torch.zeros_like(sin)


TURNING: dict[str, dict[str, Any]] = {
    "llama": {"first": 0, "size": 8, "layout": "half"},
    "gpt_neox": {"first": 0, "size": 4, "layout": "half"},
    "glm": {"first": 0, "size": 4, "layout": "interleaved"},
    "smollm3": {"first": 0, "size": 0, "layout": "half"},
}


def brute_force(model: Any, family: str, method: Any, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of all tokens, ``[T, V]``."""
    model = copy.deepcopy(model)
    brute = Brute(method, prompt, len(ids), TURNING.get(family, {}))
    if family == "mpt":
        heads = model.config.n_heads
        slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])
        for block in model.transformer.blocks:
            own = block.attn.forward
            block.attn.forward = lambda hidden, own=own, **_: own(
                hidden, position_bias=-slopes[:, None, None] * brute.relative, attention_mask=~brute.visible
            )
            plain = block.attn.forward
            block.attn.forward = lambda hidden, position_bias=None, plain=plain, **_: plain(hidden)
    else:
        model.set_attn_implementation(BRUTE)
        body = model.gpt_neox if family == "gpt_neox" else model.model
        body.rotary_emb = Unturned(body.rotary_emb)
    _brute.append(brute)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    finally:
        _brute.pop()


def run(opened: Any, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of all tokens: a prefill, then steps."""
    return np.concatenate([opened.prefill(ids[:prompt], prompt), *(opened.step(t)[None] for t in ids[prompt:])])


@pytest.fixture(scope="module")
def models(make_model: Any) -> Callable[[str], Any]:
    """One of each family, for all tests: no test may change it."""
    changes = {"smollm3": {"no_rope_layers": [0, 0]}}
    made: dict[str, Any] = {}
    return lambda family: made.setdefault(family, make_model(family, **changes.get(family, {})))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and runs so short that a tiny prompt has many."""
    monkeypatch.setattr(execution, "QUERY_BLOCK", 16)
    monkeypatch.setattr(system, "RUN_LENGTH", 70)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.usefixtures("small_blocks")
class TestAgainstBruteForce:
    @pytest.mark.parametrize("log_n", [False, True])
    @pytest.mark.parametrize("name", PARAMETERS)
    def test_grouped_queries(self, models, name, log_n):
        self.check(models, "llama", name, log_n)

    @pytest.mark.parametrize("family", ["gpt_neox", "glm"])
    @pytest.mark.parametrize("name", PARAMETERS)
    def test_partial_and_interleaved_rotary(self, models, family, name):
        self.check(models, family, name)

    @pytest.mark.parametrize("family", ["mpt", "smollm3"])
    @pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - ROTARY))
    def test_alibi_and_nope(self, models, family, name):
        self.check(models, family, name)

    def check(self, models, family, name, log_n=False):
        prompt, total = 150, 163
        ids = tokens(total)
        opened = open_method(name, models(family), TRAINED, **PARAMETERS[name], log_n=log_n)
        expected = brute_force(models(family), family, opened.method, ids, prompt)
        assert largest(run(opened, ids, prompt), expected) < 1e-4
        # The rule matters: the model as it is would not pass.
        if (name, log_n) != ("origin", False) and not (family == "smollm3" and name == "origin"):
            plain = open_method("origin", models(family), TRAINED).prefill(ids, total)
            assert largest(plain, expected) > 1e-2


@settings(max_examples=15)
@given(st.data())
def test_any_cutting_gives_the_same(models: Any, draw: Any) -> None:
    """Random prompts, blocks and runs."""
    name = draw.draw(st.sampled_from(sorted(PARAMETERS)), "name")
    total = draw.draw(st.integers(2, 130), "total")
    prompt = draw.draw(st.integers(max(1, total - 10), total), "prompt")
    ids = tokens(total, draw.draw(st.integers(0, 9), "seed"))
    opened = open_method(name, models("llama"), TRAINED, **PARAMETERS[name])
    expected = brute_force(models("llama"), "llama", opened.method, ids, prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "QUERY_BLOCK", draw.draw(st.integers(1, 80), "block"))
        patch.setattr(system, "RUN_LENGTH", draw.draw(st.integers(5, 130), "run"))
        assert largest(run(opened, ids, prompt), expected) < 1e-4


FAMILIES = [
    *("llama", "tied_llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"),
    *("gpt_neox", "cohere", "glm", "smollm3", "yarn", "mixtral", "deepseek_v3", "deepseek_v2"),
    *("gpt_oss", "phimoe", "gemma4_text", "nanochat", "mpt", "falcon", "bloom", "gptj", "codegen", "gpt_neox_japanese"),
]


class TestWithinTheWindow:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_origin_is_transformers(self, make_model, family):
        """Soft caps, sinks, short windows, several tables, shared keys, latent attention: all as the model has them."""
        self.check(make_model(family), "origin", 64)

    @pytest.mark.parametrize(
        ("name", "limit"),
        [
            *(("dynamic-ntk", 64), ("lm-infinite", 64), ("streaming-llm", 64), ("dual-chunk", 64), ("mesa", 64)),
            *(("rerope", 21), ("leaky-rerope", 21), ("self-extend", 19), ("star-attention", 43), ("infllm", 25)),
        ],
    )
    def test_a_method_is_the_model_as_far_as_it_says(self, models, name, limit):
        parameters = {"lm-infinite": {}, "streaming-llm": {}}.get(name, PARAMETERS.get(name, {}))
        self.check(models("llama"), name, limit, **parameters)

    def test_yarn_of_factor_one_is_the_model(self, models):
        self.check(models("llama"), "yarn", 64, factor=1.0)

    def check(self, model, name, limit, **parameters):
        ids = tokens(limit)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        opened = open_method(name, model, TRAINED, **parameters)
        assert largest(opened.prefill(ids, limit), expected) < 1e-4
        if name != "star-attention":  # whose steps continue another query
            assert largest(run(opened, ids, limit - 9), expected) < 1e-4

    def test_it_computes_origin_past_the_window_too(self, models):
        ids = tokens(200)
        with torch.no_grad():
            expected = models("llama")(torch.tensor([ids])).logits[0].numpy()
        assert largest(run(open_method("origin", models("llama"), TRAINED), ids, 190), expected) < 1e-4


def parameters_of(config: MesaConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "train_length"}


class TestMesa:
    @pytest.mark.parametrize("family", ["llama", "glm", "mpt", "smollm3", "gpt_oss", "gemma3_text", "deepseek_v3"])
    @pytest.mark.parametrize("log_n", [False, True])
    def test_is_the_reference(self, models, mesa_config, small_blocks, family, log_n):
        """Prefill, and steps across a move of the anchor."""
        config = MesaConfig(**{**mesa_config.to_dict(), "log_n": log_n})
        opened = open_method("mesa", models(family), TRAINED, **parameters_of(config))
        reference = TorchReference(models(family), config)
        ids, prompt = tokens(230), 170
        expected = [reference.prefill(ids[:prompt], all_logits=True)[0].numpy()]
        got = [opened.prefill(ids[:prompt], opened.logits_of(prompt))]
        start = reference.stairs
        for token in ids[prompt:]:
            expected.append(reference.step(token)[0].numpy())
            got.append(opened.step(token)[None])
        assert reference.stairs != start
        assert largest(np.concatenate(got), np.concatenate(expected)) < 2e-4

    @pytest.mark.parametrize("prompt", [1, 63, 64, 65, 66, 100, 107, 301])
    def test_every_length(self, models, mesa_config, prompt):
        opened = open_method("mesa", models("llama"), TRAINED, **parameters_of(mesa_config))
        reference = TorchReference(models("llama"), mesa_config)
        ids = tokens(prompt + 3)
        expected = [reference.prefill(ids[:prompt])[0].numpy(), *(reference.step(t)[0].numpy() for t in ids[prompt:])]
        got = [opened.prefill(ids[:prompt], 1), *(opened.step(t)[None] for t in ids[prompt:])]
        assert largest(np.concatenate(got), np.concatenate(expected)) < 1e-4


class TestCache:
    @pytest.mark.parametrize("name", ["streaming-llm", "lm-infinite"])
    def test_a_local_method_really_drops_keys(self, models, small_blocks, name):
        """And goes on as the brute force does, long after."""
        opened = open_method(name, models("llama"), TRAINED, **PARAMETERS[name])
        ids, prompt = tokens(330), 180
        expected = brute_force(models("llama"), "llama", opened.method, ids, prompt)
        opened.prefill(ids[:prompt], 1)
        steps, held = [], []
        for token in ids[prompt:]:
            steps.append(opened.step(token))
            held.append(opened.cached_keys)
        assert largest(np.stack(steps), expected[prompt:]) < 1e-4
        kept = opened.method.kept(330)
        assert kept == (32 if name == "streaming-llm" else 35)
        assert kept <= min(held)
        assert max(held) <= 2 * kept + 64 + 1

    def test_others_keep_all(self, models):
        opened = open_method("rerope", models("llama"), TRAINED)
        opened.prefill(tokens(200), 1)
        assert opened.cached_keys >= opened.method.kept(200) == 200

    def test_a_prompt_forgets_the_one_before(self, models):
        opened = open_method("streaming-llm", models("llama"), TRAINED)
        first = opened.prefill(tokens(100), 5)
        opened.prefill(tokens(150, seed=3), 1)
        opened.step(5)
        assert np.array_equal(opened.prefill(tokens(100), 5), first)


def test_dynamic_ntk_turns_all_keys_again_at_every_step(models, monkeypatch):
    """Each layer of each step: as many keys as there are tokens; the other methods turn one."""
    turned: list[int] = []

    def count(x: Tensor, *arguments: Any) -> Tensor:
        turned.append(x.shape[2])
        return real(x, *arguments)

    real = rotation.turn
    for name, most in (("dynamic-ntk", 101), ("yarn", 1)):
        opened = open_method(name, models("llama"), TRAINED)
        opened.prefill(tokens(100), 1)
        turned.clear()
        monkeypatch.setattr(execution, "turn", count)
        opened.step(7)
        monkeypatch.setattr(execution, "turn", real)
        assert max(turned) == most


def test_methods_share_one_model_and_leave_it_as_it_was(models):
    model = models("llama")
    rotary, implementation = model.model.rotary_emb, model.config._attn_implementation
    ids = tokens(120)
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits
    one, other = open_method("rerope", model, TRAINED), open_method("streaming-llm", model, TRAINED)
    first, second = one.prefill(ids, 1), other.prefill(ids, 1)
    steps = [(one.step(t), other.step(t)) for t in (3, 5, 7)]
    for opened, result, place in ((one, first, 0), (other, second, 1)):
        assert np.array_equal(opened.prefill(ids, 1), result)
        for token, step in zip((3, 5, 7), steps, strict=True):
            assert np.array_equal(opened.step(token), step[place])
    assert model.model.rotary_emb is rotary
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, before)
    weights = {id(p) for p in model.parameters()}
    assert {id(p) for p in one._model._model.parameters()} == weights


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16(make_model, models, name):
    """Off by no more than a few times what plain transformers is off in bfloat16."""
    ids = tokens(60)
    with torch.no_grad():
        exact = models("llama")(torch.tensor([ids])).logits[0].numpy()
        half = make_model("llama").bfloat16()
        noise = np.abs(half(torch.tensor([ids])).logits[0].float().numpy() - exact).mean()
    long = tokens(200)
    expected = open_method(name, models("llama"), TRAINED).prefill(long, 8)
    opened = open_method(name, half, TRAINED)
    got = opened.prefill(long, 8)
    assert got.dtype == np.float32
    assert "bfloat16" in opened.engine
    # InfLLM may look up other blocks where two are as relevant.
    assert np.abs(got - expected).mean() < noise * (20 if name == "infllm" else 4)


class TestSystem:
    def test_logits_of_the_last_tokens(self, models, small_blocks):
        opened = open_method("lm-infinite", models("llama"), TRAINED)
        every = opened.prefill(tokens(200), 200)
        for last in (1, 60, 61, 199):
            assert largest(opened.prefill(tokens(200), last), every[-last:]) < 1e-5

    def test_what_has_logits(self, models):
        model = models("llama")
        assert open_method("origin", model, TRAINED).logits_of(200) == 200
        star = open_method("star-attention", model, TRAINED, block=30, query=13)
        assert star.logits_of(200) == 13
        assert star.logits_of(43) == 43
        mesa = open_method("mesa", model, TRAINED)
        assert mesa.logits_of(64) == 64
        assert 12 <= mesa.logits_of(200) < 64

    def test_scores_and_generation(self, models):
        opened = open_method("origin", models("llama"), TRAINED)
        ids = tokens(90)
        with torch.no_grad():
            logits = models("llama")(torch.tensor([ids])).logits[0].double()
        expected = logits.log_softmax(-1)[-9:-1].gather(1, torch.tensor(ids[-8:])[:, None])[:, 0].numpy()
        assert largest(opened.log_probs(ids, 8), expected) < 1e-4
        assert opened.generate(ids, 1) == [int(logits[-1].argmax())]

    def test_errors(self, models):
        opened = open_method("origin", models("llama"), TRAINED)
        for wrong, message in (([], "empty"), ([320], "0..319"), ([-1], "0..319")):
            with pytest.raises(MesaError, match=message):
                opened.prefill(wrong, 1)
        with pytest.raises(MesaError, match="the last 1 to 3"):
            opened.prefill([1, 2, 3], 4)
        with pytest.raises(MesaError, match="no prompt"):
            opened.step(1)
        opened.prefill([1, 2], 1)
        with pytest.raises(MesaError, match="0..319"):
            opened.step(400)
        opened.close()
        with pytest.raises(MesaError, match="no prompt"):
            opened.step(1)


class TestModelsThatAreRefused:
    @pytest.mark.parametrize("name", sorted(ROTARY))
    @pytest.mark.parametrize("family", ["mpt", "smollm3"])
    def test_rotary_methods_on_others(self, models, name, family):
        with pytest.raises(MesaError, match=f"{name} changes rotary positions, and .* has none"):
            open_method(name, models(family), TRAINED)

    def test_learned_positions(self, make_model):
        with pytest.raises(MesaError, match="learned positions"):
            open_method("origin", make_model("gpt2", n_embd=32, n_layer=1, n_head=4), TRAINED)

    def test_queries_scaled_by_position(self, make_model):
        model = make_model("tied_llama")
        model.config.attn_temperature_tuning = True
        with pytest.raises(MesaError, match="attn_temperature_tuning"):
            open_method("origin", model, TRAINED)

    def test_angles_that_are_not_even(self, make_model):
        from mesart.graphs.model.rotary import LayerSpec

        angles = torch.arange(32)[:, None] ** 1.5 * torch.tensor([1.0, 0.1])
        with pytest.raises(MesaError, match="do not grow evenly"):
            rotation.frequencies((angles.cos(), angles.sin()), LayerSpec(1, 4, 4, "half", None, 0, 4))


def test_the_executor_sees_no_more_keys_than_a_local_method_needs(models, monkeypatch):
    """Prefill of a local method costs O(T w): no block attends to more than the window and itself."""
    widths: list[int] = []

    def count(query: Tensor, key: Tensor, *arguments: Any) -> Any:
        widths.append(key.shape[2])
        return real(query, key, *arguments)

    real = attention.attend
    monkeypatch.setattr(execution, "attend", count)
    monkeypatch.setattr(execution, "QUERY_BLOCK", 32)
    for name in ("streaming-llm", "lm-infinite"):
        open_method(name, models("llama"), TRAINED).prefill(tokens(1000), 1)
        assert max(widths) <= TRAINED + 32


def test_the_defaults_run_on_every_model_they_may(models):
    for name in METHODS:
        method = make_method(name, TRAINED)
        logits = open_method(name, models("llama"), TRAINED).prefill(tokens(150), 1)
        assert np.isfinite(logits).all()
        assert method.pairs(150) > 0


@pytest.mark.parametrize("name", ["origin", "mesa", "dynamic-ntk", "lm-infinite", "streaming-llm"])
def test_a_longrope_model_is_the_plain_model_while_its_text_outgrows_the_short_frequencies(make_model, name):
    model, ids = make_model("longrope"), tokens(40)
    opened = open_method(name, model, TRAINED, 4 * TRAINED)
    got = [opened.prefill(ids[:20], 20), *(opened.step(token)[None] for token in ids[20:])]
    with torch.no_grad():
        expected = [model(torch.tensor([ids[:length]])).logits[0, -1].numpy() for length in range(20, 41)]
    for ours, theirs in zip(np.concatenate(got)[19:], expected, strict=True):
        assert np.abs(ours - theirs).max() < 5e-5


def test_transformers_itself_is_run_again_when_a_text_outgrows_the_short_frequencies(make_model):
    model, ids = make_model("longrope"), tokens(36)
    origin = PlainModel(model, TRAINED)
    origin.prefill(ids[:30], 1)
    for length in range(31, 37):
        with torch.no_grad():
            expected = model(torch.tensor([ids[:length]])).logits[0, -1].numpy()
        assert np.abs(origin.step(ids[length - 1]) - expected).max() < 2e-5
