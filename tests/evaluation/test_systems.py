"""Mesa and Origin, of bundles and checkpoints, compared with transformers and with one another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesart.evaluation.systems import SYSTEMS, open_model, open_systems, prefix_ids
from mesart.graphs import MesaError
from tests.evaluation.conftest import VOCABULARY, Scripted

PROMPT = np.random.default_rng(0).integers(2, 300, 1500).tolist()


@pytest.fixture(scope="module")
def opened_bundle(bundle):
    with open_systems(bundle()) as opened:
        yield opened


@pytest.fixture(scope="module")
def opened_checkpoint(checkpoint, mesa_config):
    with open_systems(checkpoint("llama"), config=mesa_config) as opened:
        yield opened


@pytest.mark.parametrize("length", [40, 300])
def test_origin_is_the_plain_model(opened_checkpoint, make_model, length: int) -> None:
    model, ids = make_model("llama"), torch.tensor([PROMPT[:length]])
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)[torch.arange(length - 9, length - 1), ids[0, -8:]]
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, length:]
    origin = opened_checkpoint.systems["origin"]
    np.testing.assert_allclose(origin.log_probs(PROMPT[:length], 8), expected, atol=1e-4)
    assert origin.generate(PROMPT[:length], 6) == tokens.tolist()


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("length", [40, 300])
def test_bundle_and_checkpoint_agree(opened_bundle, opened_checkpoint, name: str, length: int) -> None:
    exported, plain = (opened.systems[name] for opened in (opened_bundle, opened_checkpoint))
    ids = PROMPT[:length]
    np.testing.assert_allclose(exported.log_probs(ids, 8), plain.log_probs(ids, 8), atol=1e-3)
    assert exported.generate(ids, 6) == plain.generate(ids, 6)


def test_systems_agree_in_the_trained_window_only(opened_checkpoint) -> None:
    mesa, origin = (opened_checkpoint.systems[name] for name in SYSTEMS)
    np.testing.assert_allclose(mesa.log_probs(PROMPT[:64], 63), origin.log_probs(PROMPT[:64], 63), atol=1e-4)
    assert np.abs(mesa.log_probs(PROMPT[:300], 8) - origin.log_probs(PROMPT[:300], 8)).max() > 0.1


def test_limits(opened_bundle, opened_checkpoint) -> None:
    """Origin takes any length; Mesa scores its tail, and a bundle ends at its largest bucket."""
    assert opened_bundle.max_tokens == 344
    assert len(opened_bundle.systems["origin"].generate(PROMPT, 2)) == 2
    assert len(opened_checkpoint.systems["mesa"].generate(PROMPT, 2)) == 2
    with pytest.raises(MesaError, match=r"largest bucket .* 344 tokens; .*--max-tokens 345"):
        opened_bundle.systems["mesa"].logits_of(345)
    for opened in (opened_bundle, opened_checkpoint):
        mesa = opened.systems["mesa"]
        limit = mesa.logits_of(300)
        assert 16 <= limit < 64
        assert len(mesa.log_probs(PROMPT[:301], limit)) == limit
        with pytest.raises(MesaError, match=f"the last {limit} can be scored, .* not {limit + 1}"):
            mesa.log_probs(PROMPT[:301], limit + 1)


def test_origin_rejects_what_no_embedding_has(opened_checkpoint) -> None:
    origin = opened_checkpoint.systems["origin"]
    with pytest.raises(MesaError, match=r"must lie in 0\.\.319"):
        origin.generate([5, 320], 1)
    with pytest.raises(MesaError, match="empty"):
        origin.generate([], 1)


@given(st.lists(st.integers(2, VOCABULARY - 1), max_size=8), st.integers(1, 10))
def test_generate_ends(said: list[int], count: int) -> None:
    assert Scripted(lambda _: said, end=1).generate([7], count, stop=(1,)) == said[:count]


def test_generate_goes_on_without_a_stop() -> None:
    assert Scripted(lambda _: [5, 6], end=1).generate([7], 3) == [5, 6, 1]


@pytest.mark.parametrize("count", [0, 3, 4])
def test_what_cannot_be_scored(count: int) -> None:
    with pytest.raises(MesaError, match=f"the last 1 to 2 can be scored, not {count}"):
        Scripted().log_probs([1, 2, 3], count)


def test_special_tokens_begin_a_prompt(opened_bundle, tokenizer) -> None:
    assert prefix_ids(opened_bundle.tokenizer) == ()
    assert tokenizer.decode(prefix_ids(tokenizer), skip_special_tokens=False) == "<|begin|>"


def test_a_bundle_is_a_model_of_the_suite(bundle, opened_bundle, opened_checkpoint) -> None:
    """Its own method on its engine, every other in PyTorch on its weights."""
    model = open_model(bundle())
    ids, found = PROMPT[:300], {}
    for spec in ("mesa", "mesa:log_n=false", "origin"):
        found[spec] = model.method(spec, 344).log_probs(ids, 8)
    assert model.method("mesa", 344).engine == opened_bundle.systems["mesa"].engine
    assert "PyTorch" in model.method("origin", 344).engine
    np.testing.assert_allclose(found["mesa"], opened_checkpoint.systems["mesa"].log_probs(ids, 8), atol=1e-3)
    np.testing.assert_allclose(found["origin"], opened_checkpoint.systems["origin"].log_probs(ids, 8), atol=1e-3)
    assert np.abs(found["mesa"] - found["mesa:log_n=false"]).max() > 0.01
    with pytest.raises(MesaError, match="unknown method 'rope'"):
        model.method("rope", 344)
    model.close()


def test_default_lengths(opened_bundle, opened_checkpoint) -> None:
    assert opened_bundle.default_lengths == [64, 128, 256]
    assert opened_checkpoint.default_lengths == [64, 128, 256, 512, 1024]


def test_one_system_is_enough(checkpoint) -> None:
    with open_systems(checkpoint("llama"), ["origin", "origin"]) as opened:
        assert list(opened.systems) == list(opened.subject.engines) == ["origin"]


def test_bad_sources(checkpoint, bundle, mesa_config, tmp_path: Path) -> None:
    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(MesaError, match=message):
            open_systems(*arguments)  # type: ignore[arg-type]

    refused("unknown system 'messa'; there are mesa, origin", bundle(), ["mesa", "messa"])
    refused("name a system", bundle(), [])
    refused("unknown backend 'fast'", bundle(), ["mesa"], "fast")
    refused("export it first", checkpoint("llama"), ["mesa"], "openvino")
    refused("its configuration is fixed", bundle(), ["mesa"], "auto", mesa_config)
    refused(r"neither a bundle \(no manifest.json\) nor a checkpoint \(no config.json\)", tmp_path)
    refused("does not exist", tmp_path / "nowhere")
    for name, source in (("checkpoint", checkpoint("llama")), ("bundle", bundle())):
        copy = shutil.copytree(source, tmp_path / name)
        (copy / "tokenizer.json").unlink()
        refused("tokenizer", copy)
