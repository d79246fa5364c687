"""`mesart export`: a checkpoint as a bundle, or a bundle as a Triton repository."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from mesart.graphs.bundle.manifest import DTYPES
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import AUTO, MesaConfig
from mesart.graphs.method.protocol import StaticMethod
from mesart.scripts import streams
from mesart.scripts.options import add_command, add_trust, filled, share, whole

_CONFIG_HELP = {
    "train_length": "T_r, tokens of the window that the model was trained on",
    "head_length": "F, first tokens, seen by every chunk",
    "chunk_length": "C, tokens of a middle chunk",
    "tail_min": "least tokens of the tail, which sees everything",
    "tail_max": "most tokens of it; none: what the chunks leave, as in the paper (default: 512, at least tail_min)",
    "linear_window": "N, distances up to here stay as they are",
    "stair_width": "E, keys that share a position beyond the window (default: per bucket)",
    "rho": "share of T_r that window and stairs may take",
}

_CONFIG_FIELDS = [field.name for field in dataclasses.fields(MesaConfig) if field.name != "short_length"]
"""Options of an export; the other is the model's, and nothing to choose."""


def add(commands: Any) -> None:
    parser = add_command(commands, "export", _run, "Export a checkpoint as a bundle of ONNX graphs.")
    parser.add_argument("model", type=filled, help="checkpoint folder or hub id")
    parser.add_argument("-o", "--output", type=filled, required=True, help="the bundle's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-tokens", type=whole(), help="longest prompt (default: 16 x T_r)")
    parser.add_argument(
        "--method",
        type=filled,
        metavar="NAME[:PARAMETER=VALUE,...]",
        help="a method to compare Mesa with: origin, dynamic-ntk, yarn, lm-infinite or streaming-llm",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "link", "copy"),
        default="auto",
        help="files of the bundle's own if that costs little, else hard links (auto); hard links; one file for all",
    )
    parser.add_argument(
        "--quantise", type=filled, metavar="SCHEME", help="int8, int4 or fp8, for the weights of linear layers"
    )
    parser.add_argument(
        "--group-size", type=whole(), metavar="N", help="inputs that share a scale (int4: 32, int8: all)"
    )
    parser.add_argument("--asymmetric", action="store_true", help="with zero points; not for TensorRT")
    parser.add_argument(
        "--calibrate", type=filled, metavar="METHOD", help="auto-round or awq, instead of rounding to nearest"
    )
    parser.add_argument(
        "--calibration-text",
        type=filled,
        metavar="FILE",
        help="text to calibrate on, instead of Python's standard library",
    )
    parser.add_argument("--force", action="store_true", help="replace the output folder whatever it is")
    add_trust(parser, "the checkpoint")
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
    triton.add_argument("--gpu", type=filled, metavar="NAMES", help="GPUs to build for, with tensorrt-rtx")
    triton.add_argument(
        "--name",
        type=filled,
        default="mesart",
        help="the name of the model that streams text, a prefix of the others",
    )
    for name in _CONFIG_FIELDS:
        option = "--" + name.replace("_", "-")
        if name == "log_n":
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None, help="scale queries by log n (default: on)"
            )
        else:
            kind = {"rho": share, "tail_max": _whole_or_none}.get(name, whole())
            default = AUTO if name == "tail_max" else None
            parser.add_argument(option, type=kind, default=default, metavar="N", help=_CONFIG_HELP[name])


def _whole_or_none(text: str) -> int | None:
    return None if text == "none" else whole()(text)


def _run(options: argparse.Namespace) -> int:
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
            report=streams.say,
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
        report=streams.say,
    )
    return 0


def _method_config(options: argparse.Namespace) -> StaticMethod:
    """Mesa, or the method that was asked for."""
    given = {name: getattr(options, name) for name in _CONFIG_FIELDS}
    config = MesaConfig.from_model(options.model, **given)
    if options.method is None:
        return config
    from mesart.evaluation.methods import parse_method  # noqa: PLC0415  (rarely needed)

    left_out = {"tail_max": AUTO}
    theirs = [name for name, value in given.items() if value is not left_out.get(name) and name != "train_length"]
    if theirs:
        option = theirs[0].replace("_", "-")
        raise InputError(f"--{option} with --method: give it as a parameter, --method NAME:{theirs[0]}=...")
    longest = options.max_tokens if options.max_tokens is not None else 16 * config.train_length
    return parse_method(options.method, config.train_length, longest).static()


def _calibration_text(options: argparse.Namespace) -> str | None:
    """The user's, or library text that evaluations do not use."""
    from mesart.evaluation.corpus import library_text  # noqa: PLC0415  (rarely needed)
    from mesart.evaluation.held_out import held_out_text  # noqa: PLC0415

    if options.calibration_text is not None:
        return held_out_text(options.calibration_text).content
    try:
        return library_text("train") if options.calibrate else None
    except FileNotFoundError as error:
        raise InputError(f"{error}; give a text file instead (--calibration-text)") from error


__all__ = ["add"]
