"""Fixtures that tests of several folders share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# No test may need the network; set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline for a single example: machines are busy. The same examples each time: a failure can be seen again.
settings.register_profile("mesart", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("mesart")

ROOT = Path(__file__).resolve().parent.parent
# What a clone consists of, less the tests.
SOURCES = (
    *("mesart", "graphs", "export", "runtime", "evaluation", "scripts", "docs"),
    *("pyproject.toml", "constraints.txt", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"),
)

TRAIN_LENGTH = 64
VOCABULARY = 320
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"

# Latent attention: a key for each head, of which the last part turns; shared and routed experts.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

# What each family has that others have not; all have two layers, four heads and weights large enough that attention is
# far from uniform, so that a wrong position or mask shows.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": TRAIN_LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # grouped queries
    "tied_llama": {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1},
    "wide_llama": {"model_type": "llama", "head_dim": 128, "num_hidden_layers": 1},  # heads as large models have them
    "qwen2": {},  # biases in the projections
    "qwen3": {"head_dim": 16},  # queries and keys normed; heads wider than hidden / heads
    "mistral": {"sliding_window": TRAIN_LENGTH},
    "gemma2": {  # softcap, sliding windows in every other layer
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": TRAIN_LENGTH,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {  # two rotary tables, by layer type
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": TRAIN_LENGTH,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"rotary_pct": 0.5},  # half of each head's dimensions turn, no grouped queries
    "cohere": {},  # interleaved rotary pairs
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},  # interleaved and partial
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without rotary embedding
    "mixtral": {"num_local_experts": 4},  # a mixture of experts
    "wide_mixtral": {"model_type": "mixtral", "num_local_experts": 4, "head_dim": 128, "num_hidden_layers": 1},
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,  # with turns that are complex numbers
    "gpt_oss": {  # sinks, experts, and a window shorter than the trained length beside a full layer
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 16,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": 16},  # a window that only its mask tells of
    "gemma4_text": {  # layers that take over the keys of layers before them
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "nanochat": {},  # turns the other way round
    "mpt": {"max_seq_len": TRAIN_LENGTH},  # ALiBi
    "falcon": {"alibi": True},  # ALiBi, one key for all heads
    "bloom": {},
    "gptj": {"rotary_dim": 4},  # not by way of transformers' attention interface
    "codegen": {"rotary_dim": 4},
    "gpt_neox_japanese": {},
    "yarn": {  # cos and sin carry a scale
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": TRAIN_LENGTH // 4,
        },
    },
    "longrope": {  # texts of up to half the trained length turn by frequencies of their own
        "model_type": "phi3",
        "original_max_position_embeddings": TRAIN_LENGTH // 2,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.3, 2.0],
            "long_factor": [1.5, 2.0, 5.0, 9.0],
        },
    },
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this source tree, in which a test may build and write."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``shared_folder(name, make)``: a folder that ``make`` fills once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = base / "shared" / name, base / "shared" / f"{name}.done"
        path.parent.mkdir(exist_ok=True)
        with FileLock(base / "shared" / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(family, **changes)``: a small model with random weights, always the same ones."""

    def make(family: str, **changes: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {**SMALL, **FAMILIES.get(family, {}), **changes}
        config = AutoConfig.for_model(fields.pop("model_type", family), **fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def checkpoint(make_model, shared_folder) -> Callable[[str], Path]:
    """``checkpoint(family)``: the folder of a small checkpoint with a tokenizer. Copy it before changing it."""

    def make(family: str) -> Path:
        def save(folder: Path) -> None:
            from transformers.utils import logging

            logging.disable_progress_bar()
            make_model(family).save_pretrained(folder)
            _train_tokenizer().save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "bos_token": "<|begin|>"}')
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)

        return shared_folder(f"{family}-checkpoint", save)

    return make


def _train_tokenizer() -> Any:
    """Byte-level BPE, as GPT-2's; ends no text of its own accord, begins none with a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 2
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def mesa_config() -> Any:
    """The configuration of the bundles: chunks, tail and window small enough that 64 trained positions hold them."""
    from mesart.graphs import MesaConfig

    return MesaConfig(TRAIN_LENGTH, head_length=8, chunk_length=40, tail_min=16, linear_window=8)


@pytest.fixture(scope="session")
def bundle(checkpoint, shared_folder, mesa_config) -> Callable[..., Path]:
    """``bundle(family, dtype)``: an exported checkpoint. An export takes about 10 s, so take one that others take too.

    That of ``llama`` has buckets up to 8 chunks (344 tokens), the others up to 2 (104 tokens).
    """

    def make(family: str = "llama", dtype: str = "float32") -> Path:
        def export(folder: Path) -> None:
            from mesart.export import export_model

            max_tokens = 344 if family == "llama" else 104
            export_model(checkpoint(family), folder, mesa_config, max_tokens=max_tokens, dtype=dtype)

        return shared_folder(f"{family}-{dtype}-bundle", export)

    return make


@pytest.fixture
def bundle_copy(bundle, tmp_path: Path) -> Path:
    """A copy of the llama bundle, to be damaged."""
    return Path(shutil.copytree(bundle(), tmp_path / "bundle"))


def _reseal(folder: Path, *altered: str, **fields: Any) -> None:
    from mesart.graphs.bundle.manifest import MANIFEST_FILE, sealed, sha256

    path = folder / MANIFEST_FILE
    manifest = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    for name in altered:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    path.write_text(sealed(manifest), encoding="utf-8")


@pytest.fixture
def reseal() -> Callable[..., None]:
    """``reseal(folder, *altered, **fields)``: gives a bundle's manifest other fields, and a hash that is right again.

    ``altered``: files whose sizes and hashes are recorded anew.
    """
    return _reseal


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path: Path) -> Path:
    """A copy of the smallest checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("tied_llama"), tmp_path / "checkpoint"))
