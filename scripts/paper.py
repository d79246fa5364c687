"""The paper's experiments on small models, every method side by side: `make paper`.

    python scripts/paper.py                      all of it, into docs/results
    python scripts/paper.py suite cost           some parts of it
    python scripts/paper.py --prompts 5 --places 10 --output /somewhere/else    a quick look

Models that are not there yet are trained first (scripts/train_demo_model.py, 20 to 40 minutes each on a core) and kept
in `.cache/demo_models`. Each part writes down what it has found as it goes; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mesart.evaluation.bench import Row, run_bench
from mesart.evaluation.cells import PERPLEXITY, Settings
from mesart.evaluation.cost import CostResult, CostRow, run_cost
from mesart.evaluation.journal import Journal
from mesart.evaluation.methods import METHODS, parse_method
from mesart.evaluation.pairs import needed_pairs
from mesart.evaluation.provenance import fingerprint, versions
from mesart.evaluation.suite import JOURNAL_FILE, run_suite
from mesart.evaluation.suite_plots import plot_cost, plot_sensitivity, plot_threshold
from mesart.evaluation.suite_report import SuiteResult, write_report
from mesart.evaluation.threshold import run_threshold
from mesart.evaluation.tuning import sensitivity
from mesart.export import export_model
from mesart.graphs import InputError, MesaError
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.method.registry import STATIC_METHODS

ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / ".cache"
WINDOW: Final = 256

TRAINING: Final = {
    "alibi": ("--positions", "alibi"),
    "nope": ("--positions", "none"),
    "tasks": ("--mixture", "tasks"),
}
"""Arguments of the training script, by model."""

LENGTHS: Final = [WINDOW << power for power in range(6)]
"""1 to 32 times the window."""

# Log-n is no part of ReRoPE, but Mesa has it: so ReRoPE with it is the fair peer.
PAPER_METHODS: Final = [*METHODS, "rerope:log_n=true"]
PAPER_TASKS: Final = ["passkey", "passkey-random", PERPLEXITY]
RETRIEVAL_METHODS: Final = ["origin", "streaming-llm", "rerope:log_n=true", "self-extend:log_n=true", "mesa"]
RETRIEVAL_TASKS: Final = [
    *("passkey", "needle", "niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue"),
    *("niah_multiquery", "vt", "fwe", "longeval-lines", "kv-retrieval"),
]

COST_MODEL: Final[dict[str, Any]] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
"""Large enough that attention and products are what takes the time, not Python; its weights are random."""
COST_LENGTHS: Final = [1024, 2048, 4096, 8192, 16_384]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--models", type=Path, default=CACHE / "demo_models", help="where the trained models are kept")
    parser.add_argument("--journal", type=Path, default=CACHE / "paper", help="where what was found is kept")
    parser.add_argument("--prompts", type=int, default=20, help="of each cell")
    parser.add_argument("--places", type=int, default=24, help="of each cell of perplexity")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    try:
        if unknown:
            raise InputError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
        for part in options.parts or PARTS:
            started = time.monotonic()
            PARTS[part](options)
            print(f"{part}: {(time.monotonic() - started) / 60:.1f} minutes")
    except MesaError as error:
        print(f"paper: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def model_folder(options: argparse.Namespace, name: str) -> Path:
    """The checkpoint of a demo model, which is trained if it is not there."""
    if name == "rotary":
        return ROOT / "evaluation" / "demo_model"
    folder: Path = options.models / name
    if not (folder / "model.safetensors").is_file():
        print(f"training the demo model '{name}' into {folder}", flush=True)
        script = str(ROOT / "scripts" / "train_demo_model.py")
        arguments = [*TRAINING[name], "--output", str(folder), "--threads", str(options.jobs)]
        subprocess.run([sys.executable, script, *arguments], check=True)
    return folder


def suite(options: argparse.Namespace) -> None:
    """Passkeys and perplexity of all methods on the models with rotary positions, ALiBi and none."""
    models = {name: model_folder(options, name) for name in ("rotary", "alibi", "nope")}
    result = _suite(options, models, PAPER_METHODS, PAPER_TASKS, options.lengths)
    write_report(result, options.output / "suite")
    _stop_if_interrupted(complete=result.complete)


def retrieval(options: argparse.Namespace) -> None:
    """RULER's tasks, lines, pairs and the needle on the model that was trained on them."""
    models = {"tasks": model_folder(options, "tasks")}
    result = _suite(options, models, RETRIEVAL_METHODS, RETRIEVAL_TASKS, options.lengths[:5:2])
    write_report(result, options.output / "retrieval")
    _stop_if_interrupted(complete=result.complete)


def _suite(
    options: argparse.Namespace, models: dict[str, Path], methods: list[str], tasks: list[str], lengths: list[int]
) -> SuiteResult:
    settings = Settings(prompts=options.prompts, places=options.places)
    return run_suite(
        models,
        options.journal,
        methods=methods,
        tasks=tasks,
        lengths=lengths,
        settings=settings,
        jobs=options.jobs,
    )


def threshold(options: argparse.Namespace) -> None:
    """The paper's Figure 2: where a hidden state predicts failure, and where the model fails."""
    folder = options.output / "threshold"
    results = {}
    for name in ("rotary", "alibi", "nope"):
        results[name] = run_threshold(model_folder(options, name), max_tokens=8 * WINDOW)
        _write(folder / f"{name}.json", results[name].to_json())
    plot_threshold(results, folder / "threshold.png")
    sections = [f"## {name}\n\n{result.table()}" for name, result in results.items()]
    _write(folder / "README.md", "# Threshold\n\n![threshold](threshold.png)\n\n" + "\n\n".join(sections) + "\n")


def sweep(options: argparse.Namespace) -> None:
    """What F, C, N, E and log-n do."""
    folder = options.output / "sensitivity"
    result = sensitivity(
        os.path.relpath(model_folder(options, "rotary")),  # the results name it
        lengths=[1024, 4096],
        prompts=options.prompts,
        places=options.places,
        journal=options.journal / "sensitivity.jsonl",
    )
    _write(folder / "sensitivity.json", result.to_json())
    plot_sensitivity(result, folder / "sensitivity.png")
    _write(folder / "README.md", f"# Sensitivity\n\n![sensitivity](sensitivity.png)\n\n{result.table()}\n")
    _stop_if_interrupted(complete=result.complete)


def cost(options: argparse.Namespace) -> None:
    """The paper's Figure 5: time and memory against length, on a model with random weights."""
    result = run_cost(_cost_model(options), options.journal / JOURNAL_FILE, lengths=COST_LENGTHS)
    _write_cost(result, options.output / "cost", "Cost", "PyTorch", "memory beyond the weights")
    _stop_if_interrupted(complete=result.complete)


def engines(options: argparse.Namespace) -> None:
    """The same of the methods that can be exported, as bundles on one engine."""
    source, journal, threads = _cost_model(options), Journal(options.journal / JOURNAL_FILE), os.cpu_count() or 1
    runs: dict[str, Any] = {"repeat": 3, "threads": threads, "lengths": COST_LENGTHS}
    conditions = {"model": fingerprint(os.fspath(source)), "versions": versions(), "runs": runs}
    window, rows = COST_MODEL["max_position_embeddings"], []
    for method in STATIC_METHODS:
        key = ("engines", source.name, method)
        known = journal.find(key, conditions)
        if known is None:
            with TemporaryDirectory() as folder:
                bundle = _exported(source, method, Path(folder))
                bench = run_bench(bundle, **runs, backends=["openvino"], transformers=False)
                known = [asdict(_cost_row(method, row, Manifest.read(bundle).config)) for row in bench.rows]
            journal.add(key, conditions, known)
        rows += [CostRow(**{**row, "first_token": tuple(row["first_token"])}) for row in known]
    rows.sort(key=lambda row: row.length)
    result = CostResult(os.fspath(source), window, threads, tuple(rows), complete=True)
    _write_cost(result, options.output / "engines", "Engines", "bundles on OpenVINO", "memory of the whole process")


def _exported(source: Path, method: str, folder: Path) -> Path:
    """A bundle with room for the tokens that are decoded behind the longest prompt."""
    window, longest = COST_MODEL["max_position_embeddings"], COST_LENGTHS[-1]
    config = parse_method(method, window, longest).static()
    return export_model(source, folder / "bundle", config, max_tokens=longest + window)


def _cost_row(method: str, row: Row, config: StaticMethod) -> CostRow:
    kept = row.tokens if config.sink_window is None else min(row.tokens, config.sink_window.slots)
    pairs = needed_pairs(config, row.tokens)
    return CostRow(method, row.tokens, (row.first_token,), row.per_token, row.memory, pairs, kept)


def _cost_model(options: argparse.Namespace) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: PLC0415

    source: Path = options.models / "cost"
    if not (source / "config.json").is_file():
        auto: Any = AutoModelForCausalLM
        auto.from_config(LlamaConfig(**COST_MODEL)).save_pretrained(source)
    return source


def _write_cost(result: CostResult, folder: Path, title: str, system: str, memory: str) -> None:
    text = (
        f"# {title}\n\n![cost](cost.png)\n\nA Llama with random weights ({json.dumps(COST_MODEL)}), float32, "
        f"{system} on {result.threads} threads; prompts of random tokens; medians of three runs; {memory}.\n\n"
        f"{result.table()}\n"
    )
    _write(folder / "README.md", text)
    _write(folder / "cost.json", result.to_json())
    plot_cost(result, folder / "cost.png", memory)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _stop_if_interrupted(*, complete: bool) -> None:
    if not complete:
        raise KeyboardInterrupt


PARTS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    "suite": suite,
    "retrieval": retrieval,
    "threshold": threshold,
    "sensitivity": sweep,
    "cost": cost,
    "engines": engines,
}


if __name__ == "__main__":
    sys.exit(main())
