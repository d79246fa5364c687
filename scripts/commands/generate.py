"""`mesart generate`: a prompt continued, a question about documents, or an answer in a chat."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from mesart.graphs.errors import InputError
from mesart.graphs.text_file import decode_text, read_text
from mesart.scripts import streams
from mesart.scripts.commands.loading import add_loading, add_store_sizes, load, open_store
from mesart.scripts.commands.texts import document, messages, unicode_text
from mesart.scripts.options import add_command, filled, number, seed, share, whole
from mesart.scripts.reading_line import ReadingLine

if TYPE_CHECKING:
    from mesart.runtime import MesaModel
    from mesart.runtime.usage import Usage

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add(commands: Any) -> None:
    parser = add_command(commands, "generate", _run, "Continue a prompt, or answer about documents or in a chat.")
    parser.add_argument("bundle", type=filled)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="text, or - to read it from standard input")
    source.add_argument("-f", "--file", type=filled, help="a file with the prompt")
    source.add_argument("--chat", metavar="JSON", help='messages, such as \'[{"role": "user", "content": "Hi"}]\'')
    parser.add_argument("-n", "--max-new-tokens", type=whole(), default=256)
    add_loading(parser)
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
        "--documents",
        type=filled,
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts that the prompt is about: docs/documents.md",
    )
    parser.add_argument("--lead", type=filled, metavar="TEXT", help="what stands before the documents")
    parser.add_argument("--store", type=filled, metavar="DIR", help="keep what is computed, and find what was")
    add_store_sizes(parser)
    parser.add_argument(
        "--reuse",
        choices=("auto", "always", "off"),
        default="auto",
        help="auto: chunks of documents beyond the trained length; always: of shorter prompts too; off: compute all",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say which backend is used, and which tokens were computed"
    )


def _run(options: argparse.Namespace) -> int:
    _require_use(options)
    given = messages(options.chat) if options.chat is not None else _prompt(options)
    documents = [document(path) for path in options.documents]
    lead = unicode_text("--lead", options.lead or "")
    salt = unicode_text("--cache-salt", options.cache_salt or "")
    with (
        nullcontext() if options.store is None else open_store(options, options.store) as store,
        load(options, store) as model,
        ReadingLine() as reading,
    ):
        if options.verbose:
            streams.say(f"backend {model.backend} on {model.device}: {model.choice}")
        settings = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
        settings |= {"documents": documents, "reuse": options.reuse, "cache_salt": salt, "progress": reading}
        for piece in _pieces(model, given, options, lead, settings):
            reading.clear()
            streams.write(piece, flush=True)
        streams.write("\n", flush=True)
        if options.verbose and model.usage is not None:
            streams.say(_told(model.usage))
        if options.verbose and model.device_memory is not None:
            streams.say(str(model.device_memory))
    return 0


def _require_use(options: argparse.Namespace) -> None:
    """Raises an :class:`InputError` for an option that would change nothing."""
    for name in ("store_memory", "store_disk", "cache_salt"):
        if options.store is None and getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is of a store: give --store too")
    if options.chat is not None and options.lead is not None:
        raise InputError('--lead with --chat: put it into the messages, as {"role": "system", ...}')


def _pieces(
    model: MesaModel, given: str | list[dict[str, Any]], options: argparse.Namespace, lead: str, settings: Any
) -> Iterator[str]:
    if isinstance(given, list):
        return model.chat(given, options.max_new_tokens, stop=options.stop, **settings)
    return model.stream(given, options.max_new_tokens, stop=options.stop, lead=lead, **settings)


def _told(usage: Usage) -> str:
    cached = usage.cached_tokens
    return (
        f"prompt of {usage.prompt_tokens:,} tokens: {usage.computed_tokens:,} computed, {cached.total:,} cached "
        f"({cached.memory:,} in memory, {cached.disk:,} on disk)"
    )


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
    return unicode_text("the prompt", str(options.prompt))


__all__ = ["add"]
