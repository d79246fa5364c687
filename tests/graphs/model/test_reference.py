"""TorchReference: equal to plain transformers within the window, and to a brute-force oracle past it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from mesart.graphs import MesaConfig, MesaError, Plan, Stairs, TorchReference
from mesart.graphs.method.stairs import ORDINARY

FAMILIES = [
    *("llama", "tied_llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"),
    *("gpt_neox", "cohere", "glm", "smollm3", "yarn", "longrope", "mixtral", "deepseek_v3", "deepseek_v2"),
    *("gpt_oss", "phimoe", "gemma4_text", "nanochat", "mpt", "falcon", "bloom", "gptj", "codegen", "gpt_neox_japanese"),
]
PAPER = MesaConfig(256, head_length=24, chunk_length=208, tail_min=40, linear_window=23, stair_width=10, log_n=True)


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, (batch, count), generator=torch.Generator().manual_seed(seed))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


class TestWithinTheWindow:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_transformers(self, make_model, mesa_config, family):
        """Prefill, ten steps and a second turn, up to the last trained position."""
        model = make_model(family)
        reference = TorchReference(model, mesa_config)
        ids = tokens(64, batch=2)
        with torch.no_grad():
            expected = model(ids).logits
        got = [reference.prefill(ids[:, :40], all_logits=True)]
        got += [reference.step(ids[:, index]) for index in range(40, 50)]
        got += [reference.extend(ids[:, 50:], all_logits=True)]
        assert reference.stairs == ORDINARY
        assert largest_difference(torch.cat(got, dim=1), expected) < 2e-5

    def test_only_the_last_logits_unless_asked(self, make_model, mesa_config):
        reference = TorchReference(make_model("llama"), mesa_config)
        every = reference.prefill(tokens(30), all_logits=True)
        last = reference.prefill(tokens(30))
        assert last.shape == (1, 1, 320)
        assert largest_difference(last, every[:, -1:]) < 1e-6

    def test_the_config_is_the_models_own_if_left_out(self, make_model):
        assert TorchReference(make_model("llama")).config == MesaConfig(64)

    def test_loads_a_checkpoint(self, checkpoint, make_model, mesa_config):
        from_folder = TorchReference(checkpoint("llama"), mesa_config).prefill(tokens(100))
        from_model = TorchReference(make_model("llama"), mesa_config).prefill(tokens(100))
        assert largest_difference(from_folder, from_model) < 1e-5


def test_the_users_model_is_left_as_it_was(make_model, mesa_config):
    model = make_model("llama").train()
    rotary, implementation = model.model.rotary_emb, model.config._attn_implementation
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(tokens(30)).logits
    reference = TorchReference(model, mesa_config)
    reference.prefill(tokens(200))
    assert model.training
    assert model.model.rotary_emb is rotary
    assert model.config._attn_implementation == implementation
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name.removeprefix("model."): id(p) for name, p in reference.module.named_parameters()
    }  # nor are its weights held twice
    with torch.no_grad():
        assert torch.equal(model(tokens(30)).logits, before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


class Oracle:
    """A Llama, or a Mistral with its window, under Mesa-Extrapolation: all pairs of tokens at once.

    It has ``[T, T]`` masks and relative positions.

    Shares no code with the package: it has its own attention, and turns each score by its pair's relative position.
    Where the spans lie and where the anchor is at each query are given, so that it can follow a growing text.
    """

    def __init__(self, model: Any, config: MesaConfig) -> None:
        self.model, self.config = model, config
        self.window = getattr(model.config, "sliding_window", None) or math.inf

    def pairs(self, length: int, spans: list[tuple[int, int, Stairs | None]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which key a query sees, and how far away. ``spans``: start, stop, and stairs (none: a head or chunk)."""
        seen = torch.zeros(length, length, dtype=torch.bool)
        distance = torch.zeros(length, length)
        head = self.config.head_length
        for start, stop, stairs in spans:
            for t in range(start, stop):
                for i in range(t + 1):
                    if stairs is not None:  # W(d), the formula of the paper
                        window, d = t - stairs.anchor, t - i
                        away = d if d <= window else window + math.ceil((d - window) / stairs.width)
                    elif i >= start:
                        away = t - i
                    elif i < head:
                        away = head + (t - start) - i
                    else:
                        continue
                    if away < self.window:
                        seen[t, i], distance[t, i] = True, away
        assert distance.max() < self.config.train_length
        return seen, distance

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, spans: list[tuple[int, int, Stairs | None]]) -> torch.Tensor:
        """Of every token, ``[T, V]``."""
        config, length = self.model.config, len(ids)
        seen, distance = self.pairs(length, spans)
        scale = torch.ones(length)
        if self.config.log_n:
            for start, stop, stairs in spans:
                for t in range(start, stop):
                    if stairs is not None:
                        scale[t] = max(1.0, math.log(t + 1) / math.log(self.config.train_length))
        size = config.head_dim
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        hidden = self.model.model.embed_tokens(ids)
        for layer in self.model.model.layers:
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            query = attention.q_proj(x).view(length, -1, size) * scale[:, None, None]
            group = query.shape[1] // config.num_key_value_heads
            key = attention.k_proj(x).view(length, -1, size).repeat_interleave(group, 1)
            value = attention.v_proj(x).view(length, -1, size).repeat_interleave(group, 1)
            # A pair of dimensions is a complex number; the turned query times the conjugate turned key depends on the
            # relative position only.
            q, k = (torch.complex(*half.split(size // 2, -1)) for half in (query, key))
            scores = torch.zeros(query.shape[1], length, length)
            for d in range(size // 2):
                turn = torch.polar(torch.ones_like(distance), distance * frequency[d])
                scores += (torch.einsum("th,ih->hti", q[..., d], k[..., d].conj()) * turn).real
            weights = (scores / math.sqrt(size)).masked_fill(~seen, -math.inf).softmax(-1)
            hidden = hidden + attention.o_proj(torch.einsum("hti,ihd->thd", weights, value).reshape(length, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits


def spans_of(plan: Plan) -> list[tuple[int, int, Stairs | None]]:
    parts = [*([plan.head] if plan.head else []), *plan.chunks]
    return [*((span.start, span.stop, None) for span in parts), (plan.tail.start, plan.tail.stop, plan.stairs)]


class TestPastTheWindow:
    @pytest.mark.parametrize("log_n", [True, False])
    def test_equals_the_oracle(self, make_model, log_n):
        """The example of the README."""
        model = make_model("llama", max_position_embeddings=256)
        config = MesaConfig.from_dict({**PAPER.to_dict(), "log_n": log_n})
        got = TorchReference(model, config).prefill(tokens(1000), all_logits=True)
        assert got.shape == (1, 144, 320)
        # Written out, not taken from the plan: head, four chunks, a tail with the anchor N before it.
        edges = [0, 24, 232, 440, 648, 856]
        spans = [(start, stop, None) for start, stop in itertools.pairwise(edges)]
        expected = Oracle(model, config).logits(tokens(1000)[0], [*spans, (856, 1000, Stairs(856 - 23, 10))])
        assert largest_difference(got[0], expected[856:]) < 2e-5

    def test_the_oracle_tells_the_settings_apart(self, make_model, mesa_config):
        """The comparisons here are worth something: a position, a mask or a scale that is wrong changes the logits."""
        model, ids = make_model("llama"), tokens(150)[0]
        plan = Plan.of(mesa_config, 150)
        right = Oracle(model, mesa_config).logits(ids, spans_of(plan))[-1]
        no_scale = Oracle(model, MesaConfig.from_dict({**mesa_config.to_dict(), "log_n": False}))
        *chunks, (start, stop, _) = spans_of(plan)
        stairs = plan.stairs
        wrong = {
            "scale": no_scale.logits(ids, spans_of(plan)),
            "anchor": Oracle(model, mesa_config).logits(
                ids, [*chunks, (start, stop, Stairs(stairs.anchor - 1, stairs.width))]
            ),
            "chunk": Oracle(model, mesa_config).logits(
                ids, [chunks[0], (8, 47, None), (47, 88, None), *chunks[3:], (start, stop, stairs)]
            ),
        }
        for name, logits in wrong.items():
            assert largest_difference(logits[-1], right) > 1e-2, name

    @pytest.mark.parametrize("count", [65, 66, 104, 105, 143, 300])
    def test_equals_the_oracle_at_the_edges(self, make_model, mesa_config, count):
        """One token past the window, the last of a bucket, the first of the next, a short last chunk."""
        model = make_model("llama")
        plan = Plan.of(mesa_config, count)
        got = TorchReference(model, mesa_config).prefill(tokens(count), all_logits=True)
        expected = Oracle(model, mesa_config).logits(tokens(count)[0], spans_of(plan))
        assert largest_difference(got[0], expected[plan.tail.start :]) < 1e-5

    def test_steps_turns_and_moved_anchors_equal_the_oracle(self, make_model, mesa_config):
        """The oracle moves no key: it gives each query the distances that hold for it."""
        model, ids = make_model("llama"), tokens(420)
        reference = TorchReference(model, mesa_config)
        spans, got = [], []

        def add(stop: int) -> None:
            start = reference.tokens.shape[1]
            plan = Plan.extend(mesa_config, reference.stairs, start, stop - start)
            got.append(reference.extend(ids[:, start:stop], all_logits=True)[0])
            spans.extend(spans_of(plan))

        add(150)
        for stop in range(151, 211):
            add(stop)
        moved = {stairs for _, _, stairs in spans if stairs is not None}
        assert len(moved) > 2, "the steps must include some that move the anchor"
        add(220)  # a second turn that fits behind the cache
        add(400)  # one that is cut into chunks
        for stop in range(401, 421):
            add(stop)
        expected = Oracle(model, mesa_config).logits(ids[0], spans)
        seen = torch.cat([torch.arange(start, stop) for start, stop, stairs in spans if stairs is not None])
        assert largest_difference(torch.cat(got), expected[seen]) < 2e-5

    @pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mpt", "falcon", "bloom")])
    def test_a_key_moved_is_the_key_computed_there(self, make_model, mesa_config, family):
        """Keys of the first layer depend on token and position only, so they can be computed at the new place."""
        reference = TorchReference(make_model(family), mesa_config)
        reference.prefill(tokens(60))
        here, there = np.arange(60), Stairs(40, 3).positions(0, 60)
        moved = reference._rerotate(reference.keys, here, there)
        empty_keys, empty_values = ([x[:, :, :0] for x in cache] for cache in (reference.keys, reference.values))
        with torch.no_grad():
            tail = Plan.of(mesa_config, 60).tail
            computed = reference._run(tail, there, empty_keys, empty_values, np.arange(0)).keys
        assert largest_difference(moved[0], computed[0]) < 1e-5
        assert largest_difference(reference.keys[0], computed[0]) > 1e-2

    @pytest.mark.parametrize("count", [60, 104, 150, 300])
    def test_a_window_shorter_than_the_trained_length(self, make_model, mesa_config, count):
        model = make_model("mistral", sliding_window=20)
        plan, reference = Plan.of(mesa_config, count), TorchReference(model, mesa_config)
        got = [reference.prefill(tokens(count), all_logits=True)]
        got += [reference.step(token) for token in tokens(count + 30)[0, count:]]
        spans, stairs = spans_of(plan), plan.stairs
        for stop in range(count + 1, count + 31):
            stairs = Plan.extend(mesa_config, stairs, stop - 1, 1).stairs
            spans.append((stop - 1, stop, stairs))
        expected = Oracle(model, mesa_config).logits(tokens(count + 30)[0], spans)
        assert largest_difference(torch.cat(got, dim=1)[0], expected[plan.tail.start :]) < 2e-5

    @pytest.mark.parametrize("count", [60, 150, 300])
    def test_alibi(self, make_model, mesa_config, count):
        """An MPT with all pairs of tokens at once, and the bias of each pair by its relative position."""
        model, ids, plan = make_model("mpt"), tokens(count)[0], Plan.of(mesa_config, count)
        got = TorchReference(model, mesa_config).prefill(ids, all_logits=True)
        oracle = Oracle(model, mesa_config)
        seen, distance = oracle.pairs(count, spans_of(plan))
        scale = torch.from_numpy(plan.query_scales(plan.tail))
        slopes = torch.tensor([2.0 ** -(8 * (head + 1) / 4) for head in range(4)])
        hidden = model.transformer.wte(ids)
        with torch.no_grad():
            for block in model.transformer.blocks:
                mixed = block.attn.Wqkv(block.norm_1(hidden)).unflatten(-1, (3, 4, 8))
                query, key, value = (x.transpose(0, 1) for x in mixed.unbind(1))
                query[:, plan.tail.start :] *= scale[:, None]
                scores = query @ key.mT / math.sqrt(8) - slopes[:, None, None] * distance
                weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
                hidden = hidden + block.attn.out_proj((weights @ value).transpose(0, 1).flatten(1))
                hidden = block.ffn(block.norm_2(hidden), hidden)
            expected = model.lm_head(model.transformer.norm_f(hidden))
        assert largest_difference(got[0], expected[plan.tail.start :]) < 2e-5

    def test_a_batch_equals_its_rows(self, make_model, mesa_config):
        reference = TorchReference(make_model("llama"), mesa_config)
        ids = tokens(150, batch=3)
        both = torch.cat([reference.prefill(ids), reference.step(ids[:, 0])], dim=1)
        for row in range(3):
            alone = torch.cat([reference.prefill(ids[row]), reference.step(ids[row, 0])], dim=1)
            assert largest_difference(both[row], alone[0]) < 1e-5


class TestBadInput:
    def test_empty_prompt(self, make_model, mesa_config):
        with pytest.raises(MesaError, match="the prompt is empty; give at least one token"):
            TorchReference(make_model("tied_llama"), mesa_config).prefill([])

    @pytest.mark.parametrize("token", [-1, 320])
    def test_id_outside_the_vocabulary(self, make_model, mesa_config, token):
        with pytest.raises(MesaError, match=r"token ids must lie in 0\.\.319") as error:
            TorchReference(make_model("tied_llama"), mesa_config).prefill([3, token])
        assert "\n" not in str(error.value)

    def test_too_narrow_a_width(self, make_model):
        config = MesaConfig(64, stair_width=2)
        reference = TorchReference(make_model("tied_llama"), config)
        with pytest.raises(MesaError, match=r"a stair_width of \d+ or more would do"):
            reference.prefill(tokens(300))
