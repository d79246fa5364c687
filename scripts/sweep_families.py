"""Tries every causal language model that transformers knows, small and with random weights; writes docs/models.md.

Each type runs in a process of its own, with a time limit. What is known is kept, a line of JSON for each type, so that
a sweep that was stopped goes on where it ended, and what other versions have found is refused:

    python -m mesart.scripts.sweep_families --work sweep.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from mesart.evaluation.journal import Journal
from mesart.evaluation.provenance import versions
from mesart.export import export_model
from mesart.export.engines import build_engines
from mesart.graphs import InputError, MesaConfig, MesaError, TorchReference
from mesart.graphs.errors import first_line
from mesart.runtime import MesaModel

TRAIN_LENGTH = 64
CONFIG = MesaConfig(TRAIN_LENGTH, head_length=8, chunk_length=40, tail_min=16, linear_window=8)
CLOSE = 1e-4
"""Of the logits' standard deviation, or of 1 where that is smaller."""

LARGEST = 50_000_000
"""Parameters of a model that is tried."""

CRASHED = "the process crashed"

STAGES = ("transformers", "onnxruntime", "openvino", "float16")
"""What is tried: the reference against plain transformers, engines against the reference, TensorRT builds."""

# Fields that a config has under one of these names get such a value: small, with heads for which there are kernels.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "vocab_size": 320,
    "max_position_embeddings": TRAIN_LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "sliding_window": 24,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "use_cache": True,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    # what layers add to their input
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
    "laurel_rank": 8,
}
# Layers that take over the keys of layers before them.
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
# Where a family's fields hang together in a way of their own.
SPECIAL: dict[str, dict[str, Any]] = {
    "mpt": {"max_seq_len": TRAIN_LENGTH},
    "gptj": {"n_positions": TRAIN_LENGTH},
    "codegen": {"n_positions": TRAIN_LENGTH},
    "smollm3": {"no_rope_layers": [1, 0]},
    "llama4_text": {"no_rope_layers": [1, 0], "attention_chunk_size": TRAIN_LENGTH},
    "deepseek_v2": {"topk_method": "greedy"},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
    },
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlnet": {"d_head": 16},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "modernbert-decoder": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}


def small_config(kind: str) -> Any:
    """The config of a model of that type with two layers, or as many as it has kinds of layers."""
    default = CONFIG_MAPPING[kind]()
    known = {*default.to_dict(), *default.attribute_map}
    fields = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = 4  # each head has a key of its own
    layers = 2
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds:
            layers = max(layers, len(kinds))
            fields[name] = kinds
    fields["num_hidden_layers"] = layers
    for name in ("layer_types", "mlp_layer_types"):
        if name in fields:
            fields[name] = (fields[name] * layers)[:layers]
    try:
        return CONFIG_MAPPING[kind](**{**fields, **SPECIAL.get(kind, {})})
    except AttributeError:  # layer types that follow from other fields
        return CONFIG_MAPPING[kind](**{name: value for name, value in fields.items() if "layer" not in name})


def make_model(config: Any) -> Any:
    """Random weights, large enough that a wrong position or mask shows; biases, norms and sinks are random too."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two logits, measured as :data:`CLOSE` is."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / max(1.0, theirs.std()))


def require_close(worst: float) -> None:
    if not worst < CLOSE:
        raise InputError(f"differs by {worst:.1g}")


class Trial:
    """One model type."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.checkpoint, self.folder = folder / "checkpoint", folder
        if CONFIG_MAPPING[kind]().is_encoder_decoder:
            raise InputError("an encoder-decoder")
        config = small_config(kind)
        if config.get_text_config(decoder=True) is not config:
            text = config.get_text_config(decoder=True).model_type
            raise InputError(f"several modalities; its text model alone is {text}")
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            size = sum(p.numel() for p in auto.from_config(config).parameters())
        if size > LARGEST:
            raise InputError(f"{size / 1e6:.0f} million parameters, however small its config is made here")
        self.model = make_model(config)
        self.model.save_pretrained(self.checkpoint)
        self.reference = TorchReference(self.model, CONFIG)

    def transformers(self) -> None:
        """Within the trained length: a prompt, steps and a second turn against plain transformers."""
        ids = torch.randint(2, 320, (1, TRAIN_LENGTH), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = self.model(ids).logits
            swapped = ids.clone()
            swapped[:, [5, 40]] = ids[:, [40, 5]]
            if difference(self.model(swapped).logits[:, -1], expected[:, -1]) < 100 * CLOSE:
                raise InputError("random weights do not tell positions apart")
        got = [self.reference.prefill(ids[:, :30], all_logits=True)]
        got += [self.reference.step(ids[:, index]) for index in range(30, 50)]
        got += [self.reference.extend(ids[:, 50:], all_logits=True)]
        require_close(difference(torch.cat(got, dim=1), expected))

    def engine(self, name: str) -> None:
        """Within the trained length and beyond it: prompts and steps against the reference."""
        bundle = self.folder / "float32"
        if not bundle.exists():
            export_model(self.checkpoint, bundle, CONFIG, max_tokens=104)
        worst = 0.0
        with MesaModel.load(bundle, name) as model:
            for count in (20, 65, 100):
                ids = torch.randint(2, 320, (count,), generator=torch.Generator().manual_seed(count)).tolist()
                worst = max(worst, difference(model.prefill(ids), self.reference.prefill(ids)))
                for token in range(5, 10):
                    worst = max(worst, difference(model.step(token), self.reference.step(token)))
        require_close(worst)

    def tensorrt(self, dtype: str) -> None:
        """Engines for all phases of two buckets can be built."""
        bundle = self.folder / dtype
        export_model(self.checkpoint, bundle, CONFIG, max_tokens=65, dtype=dtype)
        build_engines(bundle, gpus="sm89", progress=False)

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "transformers", self.transformers
        for name in ("onnxruntime", "openvino"):
            yield name, lambda name=name: self.engine(name)  # type: ignore[misc]
        yield "float16", lambda: self.tensorrt("float16")


def try_type(kind: str) -> Iterator[dict[str, Any]]:
    """What one type can do: each stage with an empty string, or the reason why not; what is known, after each stage."""
    start = time.monotonic()
    stages: dict[str, str] = {STAGES[0]: CRASHED}
    result = {"type": kind, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "stages": stages, "seconds": 0.0}
    yield result
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = Trial(kind, Path(folder))
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the row's reason)
            stages[STAGES[0]] = _reason(error)
        else:
            for name, stage in trial.stages():
                stages[name] = CRASHED
                yield result
                try:
                    stage()
                    stages[name] = ""
                except Exception as error:  # noqa: BLE001
                    stages[name] = _reason(error)
                    if name in ("transformers", "onnxruntime"):
                        break  # what is wrong there is wrong everywhere
    result["seconds"] = round(time.monotonic() - start, 1)
    yield result


def _reason(error: Exception) -> str:
    if isinstance(error, MesaError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error.__cause__ or error)}"


def run_apart(kind: str, seconds: float) -> dict[str, Any]:
    """:func:`try_type` in a process of its own, which is ended after some time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            for result in try_type(kind):
                sender.send(result)

    process = context.Process(target=work)
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    result: dict[str, Any] = {}
    with contextlib.suppress(EOFError):  # it has ended, one way or another
        while receiver.poll(max(0.0, end - time.monotonic())):
            result = receiver.recv()
        late = f"not done after {seconds:.0f} s"
        result["stages"] = {name: late if reason == CRASHED else reason for name, reason in result["stages"].items()}
    process.kill()
    process.join()
    return result


def is_green(result: dict[str, Any]) -> bool:
    return list(result["stages"].values()) == [""] * len(STAGES)


def table(results: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    green = [r for r in results if is_green(r)]
    partly = [r for r in results if not is_green(r) and r["stages"].get("onnxruntime") == ""]
    others = [r for r in results if r not in green and r not in partly]
    lines = [
        "# Models",
        "",
        f"Every type of causal language model that transformers {__version__} knows, tried by",
        "`python -m mesart.scripts.sweep_families` on a small model with random weights: the reference equals plain",
        "transformers within the trained length; in float32 onnxruntime and OpenVINO equal the reference within it and",
        "beyond, to 1e-4; TensorRT for RTX builds engines for every phase in float16.",
        "",
        f"{len(green)} of {len(results)} do all of that.",
        "",
        "| type | class |",
        "| --- | --- |",
        *(f"| {r['type']} | {r['class']} |" for r in green),
    ]
    if partly:
        lines += ["", "These run on some engines:", "", "| type | class | but |", "| --- | --- | --- |"]
        for r in partly:
            but = "; ".join(f"{name}: {reason}" for name, reason in r["stages"].items() if reason)
            lines.append(f"| {r['type']} | {r['class']} | {_cell(but)} |")
    lines += ["", "These do not, and why:", "", "| type | class | reason |", "| --- | --- | --- |"]
    for r in others:
        name, reason = next((n, x) for n, x in r["stages"].items() if x)
        lines.append(f"| {r['type']} | {r['class']} | {_cell(reason if name == STAGES[0] else f'{name}: {reason}')} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="all if left out")
    parser.add_argument(
        "--work", type=Path, default=Path("sweep.jsonl"), help="what is known; delete lines to try again"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a type")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # also because a process that has threads must not be forked
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    work, conditions = Journal(options.work), {"versions": versions()}
    known: dict[str, dict[str, Any]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = work.find((kind,), conditions, dict)
        if found is not None:
            known[kind] = found
    for kind in options.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in known and not options.types:
            continue
        known[kind] = result = run_apart(kind, options.seconds)
        work.add((kind,), conditions, result)
        reasons = [f"{name}: {reason}" for name, reason in result["stages"].items() if reason]
        print(f"{kind}: {'; '.join(reasons) or 'green'} ({result['seconds']} s)", flush=True)
    results = [known[kind] for kind in sorted(known)]
    options.output.write_text(table(results), encoding="utf-8")
    print(f"{sum(map(is_green, results))} of {len(results)} green; wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
