"""Makes a checkpoint with random weights of a known shape, to measure speed without any download.

Tensors are drawn and written shard by shard: a model of 16 GB needs memory for one shard, not for the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

SHARD_BYTES = 2 << 30

SHAPES: dict[str, Any] = {
    "qwen2-0.5b": lambda window: Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151_936,
        max_position_embeddings=window,
        tie_word_embeddings=True,
    ),
    "llama-1b": lambda window: LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128_256,
        max_position_embeddings=window,
        tie_word_embeddings=True,
    ),
    "llama-8b": lambda window: LlamaConfig(  # Llama-3.1-8B
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        vocab_size=128_256,
        max_position_embeddings=window,
        tie_word_embeddings=False,
    ),
    "llama-70b": lambda window: LlamaConfig(  # Llama-3.1-70B
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28_672,
        vocab_size=128_256,
        max_position_embeddings=window,
        tie_word_embeddings=False,
    ),
    "phi3-mini": lambda window: Phi3Config(  # Phi-3-mini-128k, with the plain rotary embedding of its first 4,096
        hidden_size=3072,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=8192,
        vocab_size=32_064,
        max_position_embeddings=window,
        original_max_position_embeddings=window,
        tie_word_embeddings=False,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-o", "--output", required=True, help="the checkpoint's folder")
    parser.add_argument("--window", type=int, default=2048, help="trained length that its config names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="all weights zero, in files that take no disk")
    options = parser.parse_args()
    config = SHAPES[options.shape](options.window)
    if options.sparse:
        write_sparse(config, Path(options.output), getattr(torch, options.dtype))
    else:
        write_random(config, Path(options.output), getattr(torch, options.dtype), options.seed)
    return 0


def write_sparse(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes a checkpoint whose weights are holes in a file: to export a model that the disk could not hold."""
    shapes = _weight_shapes(config)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    config.dtype = dtype
    config.save_pretrained(folder)


def write_random(config: Any, folder: Path, dtype: torch.dtype, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a checkpoint of a config with random weights; the folder is there when it is whole."""
    shapes = _weight_shapes(config)
    shards = list(_shards({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, shard_bytes))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    places: dict[str, str] = {}
    seeds = {name: seed + i for i, name in enumerate(shapes)}
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(shapes), desc="write", unit="tensor") as bar:
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            drawn = pool.map(lambda name: _random(name, shapes[name], config, dtype, seeds[name]), names)
            save_file(dict(zip(names, drawn, strict=True)), partial / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
            bar.update(len(names))
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _weight_shapes(config: Any) -> dict[str, torch.Size]:
    """Shapes by name, a tied weight once; also names the model's class in the config, as a checkpoint's does."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _shards(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    for name, size in sizes.items():
        if shard and sum(sizes[other] for other in shard) + size > limit:
            yield shard
            shard = []
        shard.append(name)
    yield shard


def _random(name: str, shape: torch.Size, config: Any, dtype: torch.dtype, seed: int) -> Tensor:
    """As transformers initialises: matrices at random, norms one, biases zero."""
    tensor = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    # A generator each: one that threads share would draw in an order of chance.
    return tensor.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    sys.exit(main())
