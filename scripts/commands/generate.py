"""`mesart generate`: a prompt continued, or an answer in a chat."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mesart.graphs.errors import InputError
from mesart.graphs.text_file import decode_text, read_text
from mesart.scripts import streams
from mesart.scripts.options import (
    add_backend,
    add_command,
    add_trust,
    filled,
    memory,
    number,
    seed,
    share,
    threads,
    whole,
)


def add(commands: Any) -> None:
    parser = add_command(commands, "generate", _run, "Continue a prompt, or answer in a chat.")
    parser.add_argument("bundle", type=filled)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="text, or - to read it from standard input")
    source.add_argument("-f", "--file", type=filled, help="a file with the prompt")
    source.add_argument("--chat", metavar="JSON", help='messages, such as \'[{"role": "user", "content": "Hi"}]\'')
    parser.add_argument("-n", "--max-new-tokens", type=whole(), default=256)
    add_backend(parser)
    parser.add_argument("--threads", type=threads)
    parser.add_argument(
        "--activations", choices=("int8",), help="round them before quantised weights: docs/decoding.md"
    )
    parser.add_argument(
        "--kv-memory",
        type=memory,
        metavar="SIZE",
        help="that keys and values may take, such as 2GiB; 3/4 of what is free",
    )
    parser.add_argument(
        "--kv-dtype", choices=("float16",), help="keep keys and values so, on OpenVINO: docs/decoding.md"
    )
    parser.add_argument("--temperature", type=number(0))
    parser.add_argument("--top-k", type=whole(0))
    parser.add_argument("--top-p", type=share)
    parser.add_argument("--min-p", type=share)
    parser.add_argument("--repetition-penalty", type=number(above=0))
    parser.add_argument("--seed", type=seed)
    parser.add_argument(
        "--stop", type=filled, action="append", default=[], help="text that ends the answer; may be repeated"
    )
    parser.add_argument(
        "--digest", type=filled, metavar="SHA256", help="refuse any other bundle; see `mesart inspect --digest`"
    )
    add_trust(parser, "the bundle, with --backend torch")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which backend and bucket are used")


def _run(options: argparse.Namespace) -> int:
    given = _messages(options.chat) if options.chat is not None else _prompt(options)
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
        kv_memory=options.kv_memory,
        kv_dtype=options.kv_dtype,
    ) as model:
        if options.verbose:
            streams.say(f"backend {model.backend} on {model.device}: {model.choice}")
        if isinstance(given, list):
            pieces = model.chat(given, options.max_new_tokens, stop=options.stop, **sampling)
        else:
            prompt = model.tokenizer.encode(given)
            if options.verbose and prompt:
                streams.say(f"prompt of {len(prompt)} tokens, {model.bucket(len(prompt))} chunks")
            pieces = model.stream(prompt, options.max_new_tokens, stop=options.stop, **sampling)
        for piece in pieces:
            streams.write(piece, flush=True)
        streams.write("\n", flush=True)
        if options.verbose and model.device_memory is not None:
            streams.say(str(model.device_memory))
    return 0


def _prompt(options: argparse.Namespace) -> str:
    """The prompt, byte for byte as it is in its file or pipe."""
    try:
        if options.file is not None:
            return read_text(options.file)
        if options.prompt == "-":
            return decode_text(streams.read(), "standard input")
    except OSError as error:
        name = "standard input" if options.file is None else options.file
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    return _unicode("the prompt", str(options.prompt))


def _messages(text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(_unicode("--chat", text))
    except json.JSONDecodeError as error:
        raise InputError(f"--chat is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InputError("--chat is not a chat: its JSON is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"--chat cannot be read: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError('--chat must be a list of messages, such as [{"role": "user", "content": "Hi"}]')
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InputError('each message of --chat needs a "role" that is a text, such as {"role": "user", ...}')
    return messages


def _unicode(name: str, text: str) -> str:
    """An argument, in which Python keeps bytes that the locale has no characters for as lone surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"{name} is no UTF-8 text: {error.reason}") from error


__all__ = ["add"]
