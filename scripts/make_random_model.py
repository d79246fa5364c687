"""Makes a checkpoint with random weights of a known shape, to measure speed without any download."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

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
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-o", "--output", required=True, help="the checkpoint's folder")
    parser.add_argument("--window", type=int, default=2048, help="trained length that its config names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(SHAPES[options.shape](options.window), dtype=getattr(torch, options.dtype))
    model.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
