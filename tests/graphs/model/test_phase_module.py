"""The phase module: what can be traced; what cannot is refused with the part in the way, never computed wrongly."""

from __future__ import annotations

import pytest
import torch

from mesart.graphs import MesaConfig, MesaError
from mesart.graphs.model.attention import AttentionForm
from mesart.graphs.model.phase_module import PhaseModule, PhaseOutputs


def run(module: PhaseModule, past: int = 0, new: int = 3, batch: int = 1) -> PhaseOutputs:
    """New tokens behind random keys and values, the second of which is masked."""
    generator = torch.Generator().manual_seed(0)
    past_mask = torch.zeros(batch, 1, 1, past)
    past_mask[..., 1:2] = -1e9
    keys = [torch.randn(batch, x.kv_heads, past, x.key_size, generator=generator) for x in module.layers]
    values = [torch.randn(batch, x.kv_heads, past, x.value_size, generator=generator) for x in module.layers]
    with torch.no_grad():
        return module(
            input_ids=torch.arange(new).expand(batch, new),
            position_ids=torch.arange(past, past + new).expand(batch, new),
            past_mask=past_mask,
            new_mask=torch.full((new, new), -1e9).triu(1).expand(batch, 1, new, new),
            query_scale=torch.full((batch, 1, new, 1), 1.3),
            logits_at=torch.arange(new),
            past_keys=keys,
            past_values=values,
            past_position_ids=torch.arange(past).expand(batch, past),
        )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "glm", "qwen3", "mistral", "gpt_oss", "falcon"])
def test_both_forms_of_attention_are_equal(make_model, family):
    model = make_model(family, **{"sliding_window": 3} if family == "mistral" else {})
    forms: tuple[AttentionForm, ...] = ("unfused", "sdpa")
    split, fused = (run(PhaseModule(model, MesaConfig(64), form), past=7, new=5, batch=2) for form in forms)
    assert (split.logits - fused.logits).abs().max() < 1e-5
    for ours, theirs in zip([*split.keys, *split.values], [*fused.keys, *fused.values], strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("llama", ["half", "half"]),
        ("gpt_neox", ["half", "half"]),
        ("cohere", ["interleaved", "interleaved"]),
        ("glm", ["interleaved", "interleaved"]),
        ("smollm3", ["half", None]),
        ("deepseek_v3", ["half", "half"]),
        ("gpt_oss", ["half", "half"]),
        ("gptj", ["interleaved", "interleaved"]),
        ("mpt", [None, None]),
    ],
)
def test_layouts_are_found_by_probing(make_model, family, layouts):
    assert [spec.layout for spec in PhaseModule(make_model(family), MesaConfig(64)).layers] == layouts


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no rotary embedding module"),
        ("mamba", {}, "MambaForCausalLM has layers with a recurrent state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "has 2 layers, of which 1 use transformers' attention"),
        ("diffllama", {}, "layer 0 (DiffLlamaAttention) attends more than once"),
        ("doge", {}, "layer 0 (DogeAttention) makes a mask of its own"),
        ("llama4_text", {"attention_chunk_size": 16}, "within pieces of 16 tokens, less than train_length = 64"),
        ("llama4_text", {"attention_chunk_size": 64}, "Llama4TextRotaryEmbedding gives complex numbers"),
    ],
)
def test_what_cannot_be_traced_is_refused(make_model, family, changes, says):
    model = make_model(family, **changes)
    with pytest.raises(MesaError) as error:
        run(PhaseModule(model, MesaConfig(64)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_layer_that_looks_at_positions_wants_them(make_model):
    module = PhaseModule(make_model("mpt"), MesaConfig(64))
    empty = [torch.zeros(1, x.kv_heads, 0, x.key_size) for x in module.layers]
    masks = (torch.zeros(1, 1, 1, 0), torch.zeros(1, 1, 1, 1))
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(MesaError, match=r"layer 0 \(MesaMptAttention\) looks at positions of keys; give past_position"):
        module(one, one, *masks, torch.ones(1, 1, 1, 1), one[0], empty, empty)


@pytest.mark.parametrize("family", ["mpt", "falcon", "bloom", "gptj", "codegen", "gpt_neox_japanese"])
def test_adapters_leave_the_users_model_alone(make_model, family):
    model, ids = make_model(family), torch.arange(9)[None]
    before, classes = model(ids).logits, [type(module) for module in model.modules()]
    PhaseModule(model, MesaConfig(64))
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(ids).logits, before)


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=32)
    with pytest.raises(MesaError, match="T5ForConditionalGeneration is no causal language model"):
        PhaseModule(T5ForConditionalGeneration(config), MesaConfig(64))
