"""The `mesart` command line: thin commands over the library."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesart import __version__
from mesart.graphs.baseline import BaselineConfig
from mesart.graphs.config import MesaConfig
from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import DTYPES, Manifest

_CONFIG_HELP = {
    "train_length": "T_r, tokens of the window that the model was trained on",
    "head_length": "F, first tokens, seen by every chunk",
    "chunk_length": "C, tokens of a middle chunk",
    "tail_min": "least tokens of the tail, which sees everything",
    "linear_window": "N, distances up to here stay as they are",
    "stair_width": "E, keys that share a position beyond the window (default: per bucket)",
    "rho": "share of T_r that window and stairs may take",
}

_CONFIG_FIELDS = [field.name for field in dataclasses.fields(MesaConfig) if field.name != "short_length"]
"""Options of an export; the other is the model's, and nothing to choose."""

_EXTRAS = dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"), "export") | {
    "matplotlib": "eval",
    "auto_round": "calibrate",
}
"""The extra that installs a package which a command may lack."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0: done, 1: a validation failed, 2: an error of the user's input, in one line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["eval"] and given[1:2] != [] and given[1].startswith("--model"):
        given.insert(1, "suite")  # `mesart eval --model MODEL ...` is the suite
    options = _parser().parse_args(given)
    try:
        status: int = options.run(options)
    except MesaError as error:
        print(f"mesart: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        print(f"mesart: error: this needs {package}: pip install 'mesart[{_EXTRAS[package]}]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `mesart ... | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("mesart: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mesart", description="Language models past their training window: Mesa-Extrapolation as ONNX graphs."
    )
    parser.add_argument("--version", action="version", version=f"mesart {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(commands)
    _add_build(commands)
    _add_inspect(commands)
    _add_validate(commands)
    _add_generate(commands)
    _add_bench(commands)
    _add_eval(commands)
    _add_tune(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "Export a checkpoint as a bundle of ONNX graphs.")
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("-o", "--output", required=True, help="the bundle's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-tokens", type=int, help="longest prompt (default: 16 x T_r)")
    parser.add_argument(
        "--method",
        metavar="NAME[:PARAMETER=VALUE,...]",
        help="a method to compare Mesa with: origin, dynamic-ntk, yarn, lm-infinite or streaming-llm",
    )
    parser.add_argument(
        "--weights",
        choices=("link", "copy"),
        default="link",
        help="link to the checkpoint's files, or copy them",
    )
    parser.add_argument("--quantise", metavar="SCHEME", help="int8, int4 or fp8, for the weights of linear layers")
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale (int4: 32, int8: all)")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points; not for TensorRT")
    parser.add_argument("--calibrate", metavar="METHOD", help="auto-round or awq, instead of rounding to nearest")
    parser.add_argument(
        "--calibration-text", metavar="FILE", help="text to calibrate on, instead of Python's standard library"
    )
    parser.add_argument("--force", action="store_true", help="replace the output folder whatever it is")
    _add_trust(parser, "the checkpoint")
    triton = parser.add_argument_group("for NVIDIA Triton Inference Server")
    triton.add_argument(
        "--format",
        choices=("bundle", "triton-repository"),
        default="bundle",
        help="triton-repository: MODEL is a bundle; writes a model that streams text, and one for each graph",
    )
    triton.add_argument(
        "--engine",
        choices=("tensorrt", "tensorrt-rtx", "onnxruntime"),
        default="tensorrt",
        help="what the graphs run on (default: tensorrt, for this machine's GPU; tensorrt-rtx: for your own backends)",
    )
    triton.add_argument("--gpu", metavar="NAMES", help="GPUs to build for, with tensorrt-rtx")
    triton.add_argument(
        "--name", default="mesart", help="the name of the model that streams text, a prefix of the others"
    )
    for name in _CONFIG_FIELDS:
        option = "--" + name.replace("_", "-")
        if name == "log_n":
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None, help="scale queries by log n (default: on)"
            )
        else:
            kind = float if name == "rho" else int
            parser.add_argument(option, type=kind, metavar="N", help=_CONFIG_HELP[name])


def _export(options: argparse.Namespace) -> int:
    from mesart.export import export_model, export_triton_repository  # noqa: PLC0415  (torch is slow to import)

    if options.format == "triton-repository":
        export_triton_repository(
            options.model,
            options.output,
            engine=options.engine,
            gpus=options.gpu,
            name=options.name,
            max_tokens=options.max_tokens,
            force=options.force,
            report=lambda line: print(line, file=sys.stderr),
        )
        return 0
    export_model(
        options.model,
        options.output,
        _method_config(options),
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        weights=options.weights,
        quantise=options.quantise,
        group_size=options.group_size,
        symmetric=not options.asymmetric,
        calibrate=options.calibrate,
        calibration_text=_calibration_text(options),
        trust_remote_code=options.trust_remote_code,
        force=options.force,
        progress=True,
        report=lambda line: print(line, file=sys.stderr),
    )
    return 0


def _method_config(options: argparse.Namespace) -> MesaConfig:
    """The configuration of Mesa, or of the method that was asked for."""
    given = {name: getattr(options, name) for name in _CONFIG_FIELDS}
    config = MesaConfig.from_model(options.model, **given)
    if options.method is None:
        return config
    from mesart.evaluation.suite import chosen_method  # noqa: PLC0415  (rarely needed)

    theirs = [name for name, value in given.items() if value is not None and name != "train_length"]
    if theirs:
        option = theirs[0].replace("_", "-")
        raise MesaError(f"--{option} with --method: give it as a parameter, --method NAME:{theirs[0]}=...")
    longest = options.max_tokens if options.max_tokens is not None else 16 * config.train_length
    return chosen_method(options.method, config.train_length, longest).static()


def _calibration_text(options: argparse.Namespace) -> str | None:
    """The user's, or library text that evaluations do not use."""
    from mesart.evaluation.corpus import library_text  # noqa: PLC0415  (rarely needed)
    from mesart.evaluation.held_out import held_out_text  # noqa: PLC0415

    if options.calibration_text is not None:
        return held_out_text(options.calibration_text).content
    try:
        return library_text("train") if options.calibrate else None
    except FileNotFoundError as error:
        raise MesaError(f"{error}; give a text file instead (--calibration-text)") from error


def _add_build(commands: Any) -> None:
    parser = _command(commands, "build", _build, "Build TensorRT engines from a bundle's graphs.")
    parser.add_argument("bundle")
    parser.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument(
        "--gpu", metavar="NAMES", help="such as sm89,rtx5090 (default: this machine's); only tensorrt-rtx can choose"
    )
    parser.add_argument(
        "--layout", choices=("bucket", "profile"), default="bucket", help="an engine a role and bucket, or a role"
    )
    parser.add_argument(
        "--weights", choices=("shared", "embedded"), default="shared", help="one copy for all engines, or one in each"
    )
    parser.add_argument("--max-tokens", type=int, help="build only the buckets for prompts up to this length")


def _build(options: argparse.Namespace) -> int:
    from mesart.export import build_engines  # noqa: PLC0415  (torch is slow to import)

    build_engines(
        options.bundle,
        options.engine,
        options.gpu,
        layout=options.layout,
        weights=options.weights,
        max_tokens=options.max_tokens,
        report=lambda line: print(line, file=sys.stderr),
    )
    return 0


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "Print what a bundle holds.")
    parser.add_argument("bundle")
    parser.add_argument("--json", action="store_true", help="the manifest itself")
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    parser.add_argument(
        "--digest", action="store_true", help="one line that names this bundle and no other, for `generate --digest`"
    )


def _inspect(options: argparse.Namespace) -> int:
    bundle = Path(options.bundle)
    manifest = Manifest.read(bundle)
    manifest.verify(bundle, contents=options.verify or options.digest)
    if options.verify or options.digest:
        for engine in (engine for built in manifest.engines for engine in built.engines):
            engine.read(bundle)
    if options.digest:
        print(manifest.digest)
        return 0
    print(manifest.to_json() if options.json else summary(bundle, manifest), end="" if options.json else "\n")
    return 0


def summary(bundle: Path, manifest: Manifest) -> str:
    """A bundle in a few readable lines."""
    config, size = manifest.config, sum(info.bytes for info in manifest.files.values())
    layer, stairs = manifest.layers[0], not isinstance(config, BaselineConfig)
    lines = [
        f"{bundle}: {manifest.model['architecture']}, {manifest.model['parameters']:,} parameters, {manifest.dtype}",
        f"  trained on {config.train_length} tokens, exported for {manifest.max_tokens}; {size / 1e6:.1f} MB on disk",
        *([f"  linear layers in {manifest.quantisation}"] if manifest.quantisation else []),
        f"  {len(manifest.layers)} layers, {layer.kv_heads} key-value heads of {layer.key_size}, "
        f"vocabulary {manifest.model['vocab_size']:,}",
        f"  {config.described()}",
        f"  {len(manifest.graphs)} graphs: " + ", ".join(sorted({graph.role for graph in manifest.graphs})),
        "",
        f"  {'chunks':>6}  {'up to tokens':>12}" + "  stair width" * stairs,
    ]
    lines += [f"  {b.chunks:>6}  {b.max_tokens:>12,}" + f"  {b.stair_width:>11}" * stairs for b in manifest.buckets]
    if manifest.engines:
        lines.append("")
    for built in manifest.engines:
        size = sum(engine.bytes for engine in built.engines)
        lines.append(
            f"  {built.flavour} {built.version} for {', '.join(built.compute_capabilities)}: {len(built.engines)} "
            f"engines, layout {built.layout}, weights {built.weights}, {size / 1e6:.1f} MB"
        )
    made = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return "\n".join([*lines, "", f"  made by {made}"])


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default="auto", help="auto, tensorrt, tensorrt-rtx, openvino, onnxruntime or torch"
    )


def _add_trust(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help=f"run Python code that {whose} brings")


def _add_validate(commands: Any) -> None:
    parser = _command(commands, "validate", _validate, "Compare a bundle with PyTorch; exit status 1 if it is wrong.")
    parser.add_argument("bundle")
    parser.add_argument("--against", metavar="MODEL", help="the checkpoint (default: the bundle's own weights)")
    _add_backend(parser)
    parser.add_argument("--graphs", choices=("all", "symbolic", "specialised"), default="all", help="not for TensorRT")
    parser.add_argument("--buckets", type=int, nargs="+", metavar="CHUNKS", help="default: all")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps after each prompt")
    parser.add_argument("--seed", type=int, default=0)
    _add_trust(parser, "the bundle or checkpoint")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")


def _validate(options: argparse.Namespace) -> int:
    from mesart.evaluation.validate import validate  # noqa: PLC0415  (torch is slow to import)

    result = validate(
        options.bundle,
        options.against,
        backend=options.backend,
        graphs=None if options.graphs == "all" else (options.graphs,),
        buckets=options.buckets,
        steps=options.steps,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    _write(options.json, result.to_json(), result.table())
    return 0 if result.passed else 1


def _write(target: str | None, text: str, table: str) -> None:
    """The table for people and, where asked for, JSON; one of them on standard output."""
    if target == "-":
        print(text, end="")
        return
    print(table)
    if target is not None:
        Path(target).write_text(text, encoding="utf-8")


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "Continue a prompt, or answer in a chat.")
    parser.add_argument("bundle")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="text, or - to read it from standard input")
    source.add_argument("-f", "--file", help="a file with the prompt")
    source.add_argument("--chat", metavar="JSON", help='messages, such as \'[{"role": "user", "content": "Hi"}]\'')
    parser.add_argument("-n", "--max-new-tokens", type=int, default=256)
    _add_backend(parser)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--activations", choices=("int8",), help="round them before quantised weights: docs/decoding.md"
    )
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float), ("min-p", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    parser.add_argument("--digest", metavar="SHA256", help="refuse any other bundle; see `mesart inspect --digest`")
    _add_trust(parser, "the bundle, with --backend torch")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which backend and bucket are used")


def _generate(options: argparse.Namespace) -> int:
    from mesart.runtime import MesaModel  # noqa: PLC0415  (an engine is slow to import)

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with MesaModel.load(
        options.bundle,
        options.backend,
        threads=options.threads,
        digest=options.digest,
        trust_remote_code=options.trust_remote_code,
        activations=options.activations,
    ) as model:
        if options.verbose:
            print(f"backend {model.backend} on {model.device}: {model.choice}", file=sys.stderr)
        if options.chat is not None:
            pieces = model.chat(_messages(options.chat), options.max_new_tokens, stop=options.stop, **sampling)
        else:
            prompt = model.tokenizer.encode(_prompt(options))
            if options.verbose and prompt:
                print(f"prompt of {len(prompt)} tokens, {model.bucket(len(prompt))} chunks", file=sys.stderr)
            pieces = model.stream(prompt, options.max_new_tokens, stop=options.stop, **sampling)
        for piece in pieces:
            print(piece, end="", flush=True)
        if options.verbose and model.device_memory is not None:
            print(f"\n{model.device_memory}", end="", file=sys.stderr)
    print()
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.file is not None:
        try:
            return Path(options.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MesaError(f"{options.file} cannot be read: {error}") from error
    return sys.stdin.read() if options.prompt == "-" else str(options.prompt)


def _messages(text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise MesaError(f"--chat is not valid JSON: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise MesaError('--chat must be a list of messages, such as [{"role": "user", "content": "Hi"}]')
    return messages


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _bench, "Time a bundle on each backend, beside plain transformers.")
    parser.add_argument("bundle")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="prompt lengths")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all installed but torch")
    parser.add_argument("--repeat", type=int, default=1, help="timed runs of each; the median counts")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-transformers", action="store_true", help="leave plain transformers out")
    _add_trust(parser, "the bundle, in PyTorch")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")


def _bench(options: argparse.Namespace) -> int:
    from mesart.evaluation.bench import run_bench  # noqa: PLC0415  (torch is slow to import)

    result = run_bench(
        options.bundle,
        lengths=options.lengths,
        new_tokens=options.new_tokens,
        backends=options.backends,
        repeat=options.repeat,
        threads=options.threads,
        transformers=not options.no_transformers,
        trust_remote_code=options.trust_remote_code,
    )
    _write(options.json, result.to_json(), result.table())
    return 0


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="Measure how far a model goes: passkey retrieval, perplexity.")
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    passkey = _command(tasks, "passkey", _passkey, "Passkey retrieval against prompt length.")
    passkey.add_argument("--fillers", nargs="+", default=["standard", "random"], metavar="NAME")
    passkey.add_argument("--prompts", type=int, default=20, help="prompts of each length and filler")
    passkey.add_argument("--depths", type=float, nargs="+", metavar="D", help="0 to 1 (default: evenly spread)")
    passkey.add_argument("--digits", type=int, default=5)
    perplexity = _command(tasks, "perplexity", _perplexity, "Perplexity of the same tokens against context length.")
    perplexity.add_argument("--places", type=int, default=24, help="places in the text")
    perplexity.add_argument("--tokens", type=int, default=32, help="tokens judged at each place")
    _add_suite(tasks)
    _add_cost(tasks)
    _add_threshold(tasks)
    for task in (passkey, perplexity):
        task.add_argument("source", help="a bundle or a checkpoint")
        task.add_argument("--systems", nargs="+", default=["mesa", "origin"], metavar="NAME")
        task.add_argument(
            "--lengths", type=int, nargs="+", metavar="TOKENS", help="default: 1x to the largest, doubling"
        )
        task.add_argument("--seed", type=int, default=0)
        task.add_argument("--text", metavar="FILE", help="text to use instead of Python's standard library")
        _add_backend(task)
        _add_trust(task, "the bundle or checkpoint")
        task.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")
        task.add_argument("--plot", metavar="FILE", help="also draw a PNG")


def _add_suite(tasks: Any) -> None:
    parser = _command(tasks, "suite", _suite, "Methods side by side; an interrupted run goes on.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a checkpoint or hub id, or NAME=MODEL")
    parser.add_argument("--model", action="append", default=[], dest="more", metavar="MODEL", help="the same")
    parser.add_argument("-o", "--output", required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="or NAME:PARAMETER=VALUE,... (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=["passkey", "perplexity"])
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="default: 1x to 32x, doubling")
    parser.add_argument("--prompts", type=int, default=20, help="of each method, task and length")
    parser.add_argument("--places", type=int, default=60, help="in the text, for perplexity")
    parser.add_argument("--scale", choices=("paper", "small"), default="paper", help="small: for tiny windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="text to use instead of Python's standard library")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="of PyTorch, such as cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; they share the cores")


def _suite(options: argparse.Namespace) -> int:
    import mesart.evaluation.suite_plots  # noqa: F401, PLC0415  (says what is missing before hours of work, not after)
    from mesart.evaluation.suite import Settings, run_suite  # noqa: PLC0415
    from mesart.evaluation.suite_report import tables, write_report  # noqa: PLC0415

    result = run_suite(
        dict(_named_model(model) for model in [*options.models, *options.more]),
        options.output,
        methods=options.methods,
        tasks=options.tasks,
        lengths=options.lengths,
        settings=Settings(
            prompts=options.prompts,
            places=options.places,
            seed=options.seed,
            scale=options.scale,
            text=options.text,
            dtype=options.dtype,
            device=options.device,
        ),
        jobs=options.jobs,
    )
    print(tables(result))
    if result.outcomes:
        write_report(result, options.output)
        print(f"wrote {options.output}")
    return 0 if result.complete else 130


def _named_model(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).name or text, text)


def _add_threshold(tasks: Any) -> None:
    parser = _command(
        tasks, "threshold", _threshold, "Predict from hidden states where the plain model fails; measure it."
    )
    parser.add_argument("model", help="a checkpoint or hub id")
    parser.add_argument("--max-tokens", type=int, help="the longest text (default: 4 x T_r)")
    parser.add_argument("--places", type=int, default=32, help="texts, and as many to choose the dimension by")
    parser.add_argument("--tokens", type=int, default=16, help="tokens watched at each place")
    parser.add_argument("--factor", type=float, default=1.2, help="of the perplexity, at which the model has failed")
    parser.add_argument("--margin", type=float, help="times the stray at T_r / 2 that is too far")
    parser.add_argument("--passkey-prompts", type=int, default=0, help="of each length, for the plain model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="text to use instead of Python's standard library")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")
    parser.add_argument("--plot", metavar="FILE", help="also draw a PNG")


def _threshold(options: argparse.Namespace) -> int:
    _require_plots(options)
    from mesart.evaluation.threshold import run_threshold  # noqa: PLC0415  (torch is slow to import)

    result = run_threshold(
        options.model,
        max_tokens=options.max_tokens,
        places=options.places,
        tokens=options.tokens,
        factor=options.factor,
        margin=options.margin,
        passkey_prompts=options.passkey_prompts,
        seed=options.seed,
        text=options.text,
    )
    _write(options.json, result.to_json(), result.table())
    if options.plot is not None:
        from mesart.evaluation.suite_plots import plot_threshold  # noqa: PLC0415

        plot_threshold({Path(options.model).name: result}, options.plot)
    return 0


def _add_tune(commands: Any) -> None:
    parser = _command(commands, "tune", _tune, "Find the configuration (F, C, N, E, log-n) that suits a model.")
    parser.add_argument("model", help="a bundle (fast), or a checkpoint or hub id")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="default: 4 and 16 x T_r")
    parser.add_argument("--prompts", type=int, default=8, help="passkeys of each length and configuration")
    parser.add_argument("--places", type=int, default=12, help="places of scored text of each")
    parser.add_argument("--final-prompts", type=int, default=40, help="of each finalist")
    parser.add_argument("--final-places", type=int, default=48, help="of each finalist")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=40, help="configurations to try at most")
    parser.add_argument("--seconds", type=float, help="after which nothing new is begun")
    parser.add_argument(
        "--sensitivity", action="store_true", help="no search: each parameter changed alone, all others left"
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_backend(parser)
    parser.add_argument("--text", metavar="FILE", help="text to use instead of Python's standard library")
    parser.add_argument("--journal", metavar="FILE", help="keeps what was found, so that an interrupted run goes on")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")


def _tune(options: argparse.Namespace) -> int:
    from mesart.evaluation.tuning import sensitivity, tune  # noqa: PLC0415  (torch is slow to import)

    names = ["lengths", "prompts", "places", "seed", "backend", "text", "journal"]
    run: Any = sensitivity
    if not options.sensitivity:
        run = tune
        names += ["final_prompts", "final_places", "finalists", "evaluations", "seconds"]
    result = run(options.model, **{name: getattr(options, name) for name in names})
    _write(options.json, result.to_json(), result.table())
    return 0 if result.complete else 130


def _add_cost(tasks: Any) -> None:
    parser = _command(tasks, "cost", _cost, "Time and memory of each method against the prompt's length.")
    parser.add_argument("model", help="a checkpoint or hub id")
    parser.add_argument("-o", "--output", required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="or NAME:PARAMETER=VALUE,... (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", required=True)
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to decode")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON; - for standard output")


def _cost(options: argparse.Namespace) -> int:
    from mesart.evaluation.cost import run_cost  # noqa: PLC0415  (torch is slow to import)
    from mesart.evaluation.suite import JOURNAL_FILE  # noqa: PLC0415
    from mesart.evaluation.suite_plots import plot_cost  # noqa: PLC0415  (says what is missing before the work)

    folder = Path(options.output)
    result = run_cost(
        options.model,
        folder / JOURNAL_FILE,
        methods=options.methods,
        lengths=options.lengths,
        repeat=options.repeat,
        new_tokens=options.new_tokens,
        threads=options.threads,
    )
    _write(options.json, result.to_json(), result.table())
    if any(row.failed is None for row in result.rows):
        plot_cost(result, folder / "cost.png")
    return 0 if result.complete else 130


def _passkey(options: argparse.Namespace) -> int:
    _require_plots(options)
    from mesart.evaluation.passkey_eval import run_passkey  # noqa: PLC0415  (torch is slow to import)

    result = run_passkey(
        options.source,
        systems=options.systems,
        lengths=options.lengths,
        fillers=options.fillers,
        prompts=options.prompts,
        depths=options.depths,
        seed=options.seed,
        backend=options.backend,
        text=options.text,
        digits=options.digits,
        trust_remote_code=options.trust_remote_code,
    )
    return _report(options, result)


def _perplexity(options: argparse.Namespace) -> int:
    _require_plots(options)
    from mesart.evaluation.perplexity import run_perplexity  # noqa: PLC0415  (torch is slow to import)

    result = run_perplexity(
        options.source,
        systems=options.systems,
        lengths=options.lengths,
        places=options.places,
        tokens=options.tokens,
        seed=options.seed,
        backend=options.backend,
        text=options.text,
        trust_remote_code=options.trust_remote_code,
    )
    return _report(options, result)


def _require_plots(options: argparse.Namespace) -> None:
    if options.plot is not None:
        import mesart.evaluation.plots  # noqa: F401, PLC0415  (says what is missing before hours of work, not after)


def _report(options: argparse.Namespace, result: Any) -> int:
    _write(options.json, result.to_json(), result.table())
    if options.plot is not None:
        result.plot(options.plot)
    return 0 if result.complete else 130


if __name__ == "__main__":
    sys.exit(main())
