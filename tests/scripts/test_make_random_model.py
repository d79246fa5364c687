"""Checkpoints with random weights: whole, in shards, and the same ones each time."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mesart.export.checkpoint import load_model
from mesart.scripts.make_random_model import SHAPES, write_random, write_sparse


def small(*, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=320,
        tie_word_embeddings=tied,
    )


def test_a_checkpoint_is_whole_and_repeatable(tmp_path: Path) -> None:
    for tied in (True, False):
        folders = [tmp_path / f"{tied}-{i}" for i in range(2)]
        for folder, shard in zip(folders, (20_000, 1 << 30), strict=True):
            write_random(small(tied=tied), folder, torch.bfloat16, shard_bytes=shard)
        assert len(list(folders[0].glob("*.safetensors"))) > 2
        assert len(list(folders[1].glob("*.safetensors"))) == 1
        models = [load_model(folder, "bfloat16") for folder in folders]
        for first, second in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(first, second)
        weights = dict(models[0].named_parameters())
        assert ("lm_head.weight" in weights) is not tied
        assert 0.015 < weights["model.layers.0.mlp.up_proj.weight"].float().std() < 0.025
        assert weights["model.norm.weight"].float().mean() == 1


def test_a_sparse_checkpoint_takes_no_disk(tmp_path: Path) -> None:
    write_sparse(small(tied=False), tmp_path / "sparse", torch.bfloat16)
    file = tmp_path / "sparse" / "model.safetensors"
    model = load_model(tmp_path / "sparse", "bfloat16")
    assert file.stat().st_size > 2 * sum(p.numel() for p in model.parameters())
    assert file.stat().st_blocks * 512 < file.stat().st_size / 2
    assert all(not parameter.any() for parameter in model.parameters())


def test_shapes_have_their_sizes() -> None:
    sizes = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            sizes[name] = AutoModelForCausalLM.from_config(shape(4096)).num_parameters() / 1e9
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "qwen2-0.5b": 0.5,
        "llama-1b": 1.2,
        "llama-8b": 8.0,
        "llama-70b": 70.6,
        "phi3-mini": 3.8,
    }
