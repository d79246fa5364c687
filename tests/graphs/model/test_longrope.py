"""Rotary embeddings whose numbers follow from the length of the text: the plain model at every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mesart.graphs import MesaConfig, MesaError, TorchReference
from mesart.graphs.method.dynamic_ntk import DynamicNtkConfig
from mesart.graphs.method.lm_infinite import LMInfiniteConfig
from mesart.graphs.method.origin import OriginConfig
from mesart.graphs.method.stairs import ORDINARY, Stairs
from mesart.graphs.method.streaming_llm import StreamingLLMConfig
from mesart.graphs.method.yarn import YarnConfig
from mesart.graphs.model.phase_module import PhaseModule

SHORT, WINDOW = 32, 64  # of the family longrope: the original length, and T_r
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 5.0, 9.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT, **FACTORS}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


# Every type that transformers knows, and where models keep it in ways of their own.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "default": ("llama", {}, 0),
    "linear": ("llama", rope("linear", factor=2.0), 0),
    "dynamic": ("llama", rope("dynamic", factor=2.0), 0),
    "yarn": ("llama", rope("yarn", factor=2.0, original_max_position_embeddings=SHORT), 0),
    "llama3": (
        "llama",
        rope("llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=SHORT),
        0,
    ),
    "proportional": ("llama", rope("proportional", partial_rotary_factor=0.5), 0),
    "longrope": ("llama", {"rope_parameters": LONGROPE}, SHORT),
    "longrope of one set": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": WINDOW}}, 0),
    "phi3": ("longrope", {}, SHORT),
    "phi3 by its old names": (
        "longrope",
        {
            "rope_parameters": None,
            "rope_scaling": {"type": "su", "original_max_position_embeddings": SHORT, **FACTORS},
            "rope_theta": 1e4,
        },
        SHORT,
    ),
    "phi3 in part": (
        "longrope",
        {
            "head_dim": 16,
            "hidden_size": 64,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
        },
        SHORT,
    ),
    "scales by length": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}, "sliding_window": WINDOW},
        SHORT,
    ),
    "by layer type": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": LONGROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        SHORT,
    ),
    "with a window": ("mistral", {"rope_parameters": LONGROPE, "sliding_window": 16}, SHORT),
    "latent": (
        "deepseek_v2",
        {"rope_parameters": {**LONGROPE, "short_factor": [1.0, 1.3], "long_factor": [2.0, 9.0]}},
        SHORT,
    ),
}


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 320, (batch, count), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_any_length_is_the_plain_model(make_model, mesa_config, kind):
    family, changes, short = KINDS[kind]
    model = make_model(family, **changes)
    reference = TorchReference(model, mesa_config)
    assert reference.config.short_length == short
    assert reference.config.positions == WINDOW + short
    ids = tokens(WINDOW, batch=2)
    for length in (1, 2, SHORT - 1, SHORT, SHORT + 1, WINDOW):
        expected = plain(model, ids[:, :length])
        assert off(reference.prefill(ids[:, :length], all_logits=True), expected) < 2e-5, length


def test_the_two_sets_differ(make_model):
    """Else the tests here could not fail."""
    model, ids = make_model("longrope"), tokens(SHORT)
    same = {**LONGROPE, "short_factor": FACTORS["long_factor"]}
    assert off(plain(model, ids), plain(make_model("longrope", rope_parameters=same), ids)) > 1e-2


@pytest.mark.parametrize("kind", ["phi3", "scales by length", "with a window", "latent"])
def test_a_text_that_outgrows_its_short_frequencies(make_model, mesa_config, kind):
    """By steps, and by a turn: as the plain model computes the whole text."""
    family, changes, _ = KINDS[kind]
    model = make_model(family, **changes)
    reference, ids = TorchReference(model, mesa_config), tokens(WINDOW)
    reference.prefill(ids[:, : SHORT - 3])
    for length in range(SHORT - 2, SHORT + 3):
        assert off(reference.step(ids[:, length - 1]), plain(model, ids[:, :length])[:, -1:]) < 2e-5
        assert reference.stairs == (Stairs(0, 1, WINDOW) if length <= SHORT else ORDINARY)
    reference.prefill(ids[:, :20])
    turn = reference.extend(ids[:, 20:50], all_logits=True)
    assert off(turn, plain(model, ids[:, :50])[:, 20:]) < 2e-5
    assert off(reference.extend(ids[:, 50:], all_logits=True), plain(model, ids)[:, 50:]) < 2e-5


@pytest.mark.parametrize("cached", [5, 20, 50])
def test_beyond_the_window_the_long_frequencies_are_all_there_is(make_model, mesa_config, cached):
    only_long = {**LONGROPE, "short_factor": FACTORS["long_factor"]}
    ours = TorchReference(make_model("longrope"), mesa_config)
    theirs = TorchReference(make_model("longrope", rope_parameters=only_long), mesa_config)
    ids = tokens(200)
    assert off(ours.prefill(ids, all_logits=True), theirs.prefill(ids, all_logits=True)) < 2e-5
    ours.prefill(ids[:, :cached])
    turn = ours.extend(ids[:, cached:])
    if cached <= SHORT:  # the whole text again
        assert off(turn, theirs.prefill(ids)) < 2e-5
    else:
        theirs.prefill(ids[:, :cached])
        assert off(turn, theirs.extend(ids[:, cached:])) < 2e-5


@pytest.mark.parametrize("method", [OriginConfig(WINDOW), DynamicNtkConfig(WINDOW, 1.0), YarnConfig(WINDOW, 1.0)])
def test_other_methods_switch_as_well(make_model, method):
    model = make_model("longrope")
    reference, ids = TorchReference(model, method.up_to(150)), tokens(140)
    for length in (2, SHORT, SHORT + 1, WINDOW, 140 if method.name != "dynamic-ntk" else WINDOW):
        assert off(reference.prefill(ids[:, :length], all_logits=True), plain(model, ids[:, :length])) < 5e-5
    reference.prefill(ids[:, :20])
    assert off(reference.extend(ids[:, 20:50], all_logits=True), plain(model, ids[:, :50])[:, 20:]) < 5e-5


def test_what_cannot_be_equal_is_refused(make_model):
    model = make_model("longrope")
    for method in (LMInfiniteConfig(WINDOW, 40, 4), StreamingLLMConfig(WINDOW, 4, 40)):
        with pytest.raises(MesaError, match="a method that drops keys could not; use origin or mesa on it"):
            PhaseModule(model, method.up_to(150))
    with pytest.raises(MesaError, match="short_length is 20, but that of Phi3ForCausalLM is 32; leave it out"):
        PhaseModule(model, MesaConfig(WINDOW, short_length=20))
    dynamic = make_model("llama", **rope("dynamic", factor=2.0))
    with pytest.raises(MesaError, match="frequencies that change with their length; export with train_length <= 64"):
        PhaseModule(dynamic, MesaConfig(2 * WINDOW))
    scaled = rope("longrope", **{**LONGROPE, "llama_4_scaling_beta": 0.1, "factor": 2.0})
    with pytest.raises(MesaError, match="scales its queries by their positions; export with train_length <= 32"):
        PhaseModule(make_model("ministral3", head_dim=8, **scaled), MesaConfig(WINDOW))


def test_a_window_of_the_short_frequencies_has_one_set(make_model):
    model = make_model("longrope")
    reference, ids = TorchReference(model, MesaConfig(SHORT, head_length=4, chunk_length=20)), tokens(SHORT)
    assert reference.config.short_length == 0
    assert off(reference.prefill(ids, all_logits=True), plain(model, ids)) < 2e-5
