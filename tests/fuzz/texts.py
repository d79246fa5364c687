"""Changes of the files around a model's texts: tokenizer, chat template, generation settings, config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.templates import hostile_template
from tests.fuzz.values import NUMBERS, STRINGS, mutate_bytes, mutate_json, odd_value

Tree = dict[str, Any]


def _string_or_regex(rng: Random) -> Tree:
    bad = (
        *(
            "(a|a?)+$x",
            "(\\w+\\s?)+\\d",
            "([",
            "(?<=a+)b",
            "a{99999}",
            "(a{1,999}){1,999}",
            "\\p{Nope}",
            "",
            "(?:",
            "*",
            "\\1",
        ),
        *("(" * 300 + ")" * 300, "[\\x{110000}]", "(?i)(x+x+)+y", "(.*)*(.*)*(.*)*=", "\\G", "^", "$", "(?=)", "|"),
    )
    if rng.random() < 0.6:
        return {"Regex": rng.choice(bad)}
    return {"String": rng.choice((*STRINGS[:16], "a", "e", "th"))}


def _replaces(rng: Random) -> list[Tree]:
    content = rng.choice(("a", "e", "aa", " ")) * rng.choice((1, 2, 10, 100, 10_000))
    one = {"type": "Replace", "pattern": {"String": content[:1]}, "content": content}
    return [one] * rng.choice((1, 2, 4, 8, 12, 40))


def _normalizer(rng: Random, tree: Tree) -> str:
    ways: tuple[Callable[[], Any], ...] = (
        lambda: {"type": "Sequence", "normalizers": _replaces(rng)},
        lambda: {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "a" * rng.choice((1, 10**4, 10**6))}] * rng.choice((1, 30)),
        },
        lambda: {"type": "Replace", "pattern": _string_or_regex(rng), "content": rng.choice(STRINGS)},
        lambda: {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "%%%", "/" * 4000))},
        lambda: {
            "type": rng.choice(("NFC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Nope", "Strip", "BertNormalizer"))
        },
        lambda: odd_value(rng),
    )
    tree["normalizer"] = rng.choice(ways)()
    return "normalizer"


def _pre_tokenizer(rng: Random, tree: Tree) -> str:
    split = {
        "type": "Split",
        "pattern": _string_or_regex(rng),
        "behavior": rng.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous", "Nope")),
        "invert": rng.choice((True, False)),
    }
    ways: tuple[Any, ...] = (
        split,
        {"type": "Sequence", "pretokenizers": [split] * rng.choice((1, 5, 300))},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": rng.choice(("▁", "", "xx", 3)), "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": rng.choice((True, 3)), "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "FixedLength", "length": rng.choice((0, 1, -1))},
        None,
    )
    tree["pre_tokenizer"] = rng.choice(ways)
    return "pre_tokenizer"


def _post_processor(rng: Random, tree: Tree) -> str:
    sequence = {"Sequence": {"id": rng.choice(("A", "B", "C")), "type_id": rng.choice((0, 1, 2**40))}}
    token = {"SpecialToken": {"id": rng.choice(("<|begin|>", "nope", "")), "type_id": 0}}
    single = rng.choice(([sequence], [token, sequence], [token], [], [sequence] * 1000, [sequence] * 100_000))
    ids = rng.choice(([0], [], [2**31], [0] * 1000, [-1], [99_999]))
    special = {"<|begin|>": {"id": "<|begin|>", "ids": ids, "tokens": ["<|begin|>"] * rng.choice((1, len(ids)))}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": rng.choice((single, [], [sequence, token])),
        "special_tokens": rng.choice(({}, special)),
    }
    return "post_processor"


def _decoder(rng: Random, tree: Tree) -> str:
    ways: tuple[Any, ...] = (
        {"type": "Replace", "pattern": _string_or_regex(rng), "content": "x" * rng.choice((0, 1, 10**5, 10**7))},
        {"type": "Sequence", "decoders": _replaces(rng)},
        {
            "type": "Strip",
            "content": rng.choice(("e", "")),
            "start": rng.choice((0, 1, 2**40)),
            "stop": rng.choice((0, 2**63)),
        },
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "x", "word_delimiter_token": "", "cleanup": True},
        None,
    )
    tree["decoder"] = rng.choice(ways)
    return "decoder"


def _added_tokens(rng: Random, tree: Tree) -> str:
    token = {
        "id": rng.choice((*NUMBERS, 320, 321, 5, 0, 4000)),
        "content": rng.choice((*STRINGS, "the", "e", "<|end|>", "<x>")),
        **{name: rng.choice((True, False)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")},
    }
    if rng.random() < 0.2:
        del token[rng.choice(list(token))]
    tree["added_tokens"] = [*tree["added_tokens"], token][rng.choice((0, 0, 1, 2)) :]
    return f"added token {token.get('id')!a:.30} {token.get('content')!a:.30}"


def _padding(rng: Random, tree: Tree) -> str:
    size = rng.choice((0, 1, 5, 2**40, -1))
    if rng.random() < 0.5:
        strategy = rng.choice(({"Fixed": size}, "BatchLongest", {"Nope": 1}))
        tree["padding"] = {
            "strategy": strategy,
            "direction": "Right",
            "pad_to_multiple_of": rng.choice((None, 0, 8, 2**40)),
            "pad_id": rng.choice((0, -1, 2**40)),
            "pad_type_id": 0,
            "pad_token": rng.choice(("x", 3, "")),
        }
        return "padding"
    tree["truncation"] = {
        "direction": "Right",
        "max_length": size,
        "strategy": "LongestFirst",
        "stride": rng.choice((0, 5)),
    }
    return "truncation"


def _model(rng: Random, tree: Tree) -> str:
    model = tree["model"]
    if not isinstance(model, dict):
        return "model left"
    vocabulary, merges = model.get("vocab", {}), model.get("merges", [])
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return "model left"
    some = rng.choice(list(vocabulary) or ["a"])
    ways: dict[str, Callable[[], Any]] = {
        "empty": lambda: {**model, "vocab": {}, "merges": []},
        "an id": lambda: {**model, "vocab": {**vocabulary, some: rng.choice((*NUMBERS, 0, 1, 9999))}},
        "a word": lambda: {**model, "vocab": {**vocabulary, rng.choice(STRINGS): len(vocabulary)}},
        "a merge": lambda: {**model, "merges": [*merges,
            rng.choice(("a b", "nope x", ["a", "b"], ["a"], "ab", "a b c", 3))]},
        "merges reversed": lambda: {**model, "merges": merges[::-1]},
        "no merges": lambda: {**model, "merges": []},
        "WordLevel": lambda: {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": rng.choice(("a", "b"))},
        "WordPiece": lambda: {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": rng.choice((0, 100, 2**40))},
        "Unigram": lambda: {"type": "Unigram", "unk_id": rng.choice((None, 0, 9)),
            "vocab": rng.choice(([["a", -1.0]], [], [["a", 0.0], ["", -2.0]])),
            "byte_fallback": rng.choice((True, False))},
        "settings": lambda: {**model, "dropout": rng.choice((0.5, 1.0, 2.0, None)),
            "byte_fallback": rng.choice((True, False)), "unk_token": rng.choice(("nope", "<|end|>", 3)),
            "fuse_unk": True, "ignore_merges": True},
        "far ids": lambda: {**model, "vocab": {word: index + 10**rng.randint(1, 9) for word,
            index in vocabulary.items()}},
    }  # fmt: skip
    way = rng.choice(list(ways))
    tree["model"] = ways[way]()
    return f"model: {way}"


def tokenizer(rng: Random, tree: Tree) -> str:
    """One change of a ``tokenizer.json`` that knows what it holds."""
    ways = (_normalizer, _pre_tokenizer, _post_processor, _decoder, _added_tokens, _padding, _model)
    return rng.choice(ways)(rng, tree)


def settings(rng: Random, tree: Tree) -> str:
    """One change of a ``tokenizer_config.json`` that knows what it holds."""
    token = {"content": rng.choice((*STRINGS, "<new>")), "special": True, "lstrip": False, "__type": "AddedToken"}
    values: dict[str, tuple[Any, ...]] = {
        "added_tokens_decoder": ([1], {"x": token}, {"1": 3}, {"5000": token}, {"1": {**token, "nope": 1}}, {"9": {}},
            {"1.5": token}, {"-1": token}, {"9" * 5000: token}, None, 3),
        "eos_token": (token, {"content": 3}, {"nope": 3}, 3, ["a"], "<|begin|>", "nope", "", None, True),
        "pad_token": (token, "x", 3, None),
        "extra_special_tokens": ([1, 2], "abc", {"image_token": 3}, {"image_token": "<i>"}, ["<a>", "<a>"], [token],
            [None], 3, {"a": {}}),
        "additional_special_tokens": ([1], "abc", ["<a>"], {"a": 1}),
        "image_token": (token, 3, "<i>", {}),
        "split_special_tokens": ("yes", True, 3, {}),
        "model_max_length": NUMBERS,
        "chat_template": ([1], [{"name": "default"}], 3, {"a": 1}, [{"name": "default", "template": 3}],
            [{"name": "x", "template": "x"}, {"name": "default", "template": "{{ 1 }}"}], "{{ messages }}", ""),
        "tokenizer_class": ("Nope", 3, None, "LlamaTokenizer", "PreTrainedTokenizerFast"),
        "add_bos_token": (True, 3), "add_prefix_space": (True, "x"), "backend": (3, "nope"),
    }  # fmt: skip
    name = rng.choice(list(values))
    tree[name] = rng.choice(values[name])
    return f"{name} -> {tree[name]!a:.60}"


def generation(rng: Random, tree: Tree) -> str:
    """One change of a ``generation_config.json`` that knows what it holds."""
    values: dict[str, tuple[Any, ...]] = {
        "eos_token_id": ("x", [[1]], {"a": 1}, 1.0, True, [1, 10**20], [], [-1], None, ["1"], [1, None], 5,
            list(range(300))),
        "temperature": (*NUMBERS, "hot", None, [1], 0.7), "top_k": (*NUMBERS, "x", True, 50),
        "top_p": (*NUMBERS, "x", 0.9),
        "min_p": (*NUMBERS, "x", 0.1), "repetition_penalty": (*NUMBERS, [1], "x", 1.2),
        "do_sample": (True, "yes", 1, None, []),
        "max_new_tokens": NUMBERS, "max_length": NUMBERS, "num_beams": (0, 4, "x"),
        "stop_strings": ("x", ["x"], [3], 3, [""]),
        "suppress_tokens": ([1], "x", [10**20]), "bad_words_ids": ([[1]], 3), "pad_token_id": (None, "x", -1),
        "bos_token_id": ([1], "x"),
        "transformers_version": ("9", 3, None), "cache_implementation": ("nope", "quantized"), "auto_map": ({}, 3),
    }  # fmt: skip
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(values))
        tree[name] = rng.choice(values[name])
        if name in ("temperature", "top_k", "top_p", "min_p"):
            tree["do_sample"] = True
    return f"{name} -> {tree[name]!a:.60}"


def config(rng: Random, tree: Tree) -> str:
    """One change of a ``config.json`` that knows what it holds."""
    values: dict[str, tuple[Any, ...]] = {
        "text_config": (3, [1], {}, {"eos_token_id": "x"}, None, {"max_position_embeddings": 5}),
        "eos_token_id": ("x", [[1]], {"a": 1}, [1, 2], None),
        "max_position_embeddings": (-1, 0, 1, 2, 63, 65, 10**9, 2**63, 1e9, "64", None, True),
        "num_hidden_layers": (0, -1, 2, 10**6, 1e6, "1"), "num_attention_heads": (0, -1, 3, 5, 10**6),
        "num_key_value_heads": (0, 3, -1, None, 8),
        "hidden_size": (0, 1, 33, -32, 2**40), "head_dim": (0, 1, 7, -8, 2**40, None, 8.0),
        "vocab_size": (0, 1, -1, 319, 2**40),
        "intermediate_size": (0, -1, 2**40), "hidden_act": ("nope", 3, None, "gelu", ["silu"]),
        "rms_norm_eps": (0, -1, "x", None, float("nan")),
        "rope_theta": (0, -1, "x", 1e6, None), "rope_scaling": ({"rope_type": "yarn"},
            {"type": "linear", "factor": 2.0}, {"rope_type": "nope"}, 3, []),
        "rope_parameters": ({"rope_type": "yarn", "factor": 0},
            {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, {"rope_theta": 1e4, "rope_type": "llama3"}, 3,
            [], None, {"rope_theta": "x"}),
        "sliding_window": (0, -1, 10, 1e9, "x"), "layer_types": ([], ["nope"], "full_attention",
            ["full_attention"] * 99, None),
        "model_type": ("nope", 3, None, "", "gpt2", "bert", "t5", "mamba", "qwen2", "mistral", "gemma2", "llava",
            "../x"),
        "architectures": ([], None, ["Nope"], 3, ["BertModel"], "LlamaForCausalLM"),
        "dtype": ("float16", "nope", 3, None, "float8_e4m3fn"), "torch_dtype": ("bfloat16", 3),
        "auto_map": ({"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, 3, [], {"AutoConfig": 3}),
        "_attn_implementation": ("flash_attention_2", "nope", 3, "eager"),
        "attn_implementation": ("flash_attention_2", "paged|eager", 3),
        "quantization_config": ({}, 3, {"quant_method": "nope"}, {"quant_method": "gptq"},
            {"quant_method": "awq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "fp8"}, []),
        "tie_word_embeddings": (True, False, "x", None), "is_encoder_decoder": (True, "x"),
        "attention_dropout": (2.0, -1, "x"), "initializer_range": ("x", None),
        "id2label": ({"0": "a"}, {"x": "a"}, 3), "num_labels": (-1, 10**9, "x"), "return_dict": (False, 3),
        "torchscript": (True,), "pruned_heads": ({"0": [1]}, 3),
        "attention_bias": (True, "x"), "mlp_bias": (True, 3), "pretraining_tp": (0, 2, "x"),
        "chunk_size_feed_forward": (1, "x"), "use_cache": (False, "x"),
        "base_model_tp_plan": ({}, 3), "torch_compile": (True,), "transformers_version": (3, "99.0.0", None),
        "_name_or_path": ("../../x", 3), "name_or_path": (3,),
    }  # fmt: skip
    name = rng.choice(list(values))
    tree[name] = rng.choice(values[name])
    return f"{name} -> {tree[name]!a:.60}"


KNOWN: dict[str, Callable[[Random, Tree], str]] = {
    "tokenizer.json": tokenizer,
    "tokenizer_config.json": settings,
    "special_tokens_map.json": settings,
    "generation_config.json": generation,
    "config.json": config,
}
"""Files with a change for each that knows what it holds."""

WEIGHTS = {
    "tokenizer.json": 4,
    "chat_template.jinja": 3,
    "tokenizer_config.json": 2,
    "generation_config.json": 2,
    "config.json": 1,
}


def mutate_texts(rng: Random, folder: Path, weights: dict[str, int] | None = None) -> str:
    """Changes one of the files around the texts; makes it where there is none."""
    weights = weights or WEIGHTS
    name = rng.choices(list(weights), list(weights.values()))[0]
    path = folder / name
    data = path.read_bytes() if path.is_file() else b"{}"
    if name == "chat_template.jinja":
        if rng.random() < 0.1:
            data, said = mutate_bytes(rng, data)
        else:
            template = hostile_template(rng)
            data, said = template.encode("utf-8", "surrogatepass"), template[:80]
    elif rng.random() < 0.05:
        data, said = mutate_bytes(rng, data)
    else:
        data, said = mutate_json(rng, data, KNOWN[name])
    path.write_bytes(data)
    return f"{name}: {said}"


def remote_code(folder: Path) -> str:
    """A Python file that leaves a trace when it is run, and a config that asks for it."""
    code = """import pathlib, transformers
pathlib.Path(%r).touch()
class Config(transformers.LlamaConfig):
    model_type = 'evil'
class Model(transformers.LlamaForCausalLM):
    config_class = Config
"""
    (folder / "evil.py").write_text(code % str(folder.parents[1] / "victim" / "canary"))
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    path.write_text(json.dumps(tree))
    return "code that the config asks for"
