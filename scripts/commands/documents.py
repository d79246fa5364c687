"""`mesart documents`: what a store of chunks holds, in terms of documents."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError
from mesart.scripts import streams
from mesart.scripts.commands.loading import add_loading, add_store_sizes, load, open_store
from mesart.scripts.commands.texts import document, messages, unicode_text
from mesart.scripts.options import add_command, filled
from mesart.scripts.reading_line import ReadingLine

if TYPE_CHECKING:
    from mesart.runtime.chunk_store.records import DocumentRecords, DocumentState


def add(commands: Any) -> None:
    text = "Read documents ahead of the questions about them, and look after what is kept of them."
    verbs = commands.add_parser("documents", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    parser = add_command(verbs, "add", _add, "Read documents into a store, which is made if it is not there.")
    parser.add_argument("store", type=filled)
    parser.add_argument("bundle", type=filled)
    parser.add_argument("files", type=filled, nargs="+", metavar="FILE", help="a document, UTF-8 text")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--lead", type=filled, metavar="TEXT", help="what will stand before the documents")
    before.add_argument("--chat", metavar="JSON", help="messages as of `generate`: the chat that documents will be in")
    add_loading(parser)
    add_store_sizes(parser)
    parser = add_command(verbs, "list", _list, "Print the documents of a store, and how much of each is there.")
    parser.add_argument("store", type=filled)
    parser.add_argument("--json", action="store_true", help="all that is known of each")
    parser = add_command(verbs, "drop", _drop, "Remove documents, and the chunks that no other document has.")
    parser.add_argument("store", type=filled)
    parser.add_argument("names", type=filled, nargs="+", metavar="NAME", help="as `list` prints it")
    parser = add_command(verbs, "verify", _verify, "Read every chunk of a store, and remove those that are damaged.")
    parser.add_argument("store", type=filled)


def _add(options: argparse.Namespace) -> int:
    chat = None if options.chat is None else messages(options.chat)
    lead = unicode_text("--lead", options.lead or "")
    salt = unicode_text("--cache-salt", options.cache_salt or "")
    from mesart.runtime.chunk_store.records import (  # noqa: PLC0415  (slow to import)
        DocumentRecord,
        DocumentRecords,
        check_name,
    )

    texts: dict[str, tuple[str, str]] = {}
    for path in options.files:
        name = Path(path).name
        check_name(name)
        if name in texts:
            raise InputError(f"{texts[name][0]} and {path} are both called {name}; add them under different names")
        texts[name] = path, document(path)
    bundle = Manifest.read(Path(options.bundle)).digest
    with open_store(options, options.store) as store, load(options, store) as model:
        assert store.folder is not None
        records = DocumentRecords(store.folder)
        added = set()
        for name, (path, text) in texts.items():
            with ReadingLine(name) as reading:
                try:
                    report = model.warm([text], lead=lead, messages=chat, cache_salt=salt, progress=reading)
                except InputError as error:
                    raise InputError(f"{path}: {error}") from error
            record = DocumentRecord(
                name=name,
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                tokens=report.document_tokens,
                head=report.head_key,
                chunks=report.chunk_keys,
                bundle=bundle,
                fingerprint=model.fingerprint,
                added=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            records.put(record)
            added.add(record.id)
            counts = f"{report.computed_tokens:,} computed, {report.reused_tokens:,} reused"
            streams.write(f"{name}: {report.document_tokens:,} tokens; with the head {counts}\n", flush=True)
        for state in records.states():
            count = len(state.record.chunks)
            if state.record.id in added and state.chunks < count:
                streams.say(
                    f"{state.record.name}: only {state.chunks} of {count} chunks are kept; is --store-disk enough?"
                )
    return 0


def _list(options: argparse.Namespace) -> int:
    states = _records(options).states()
    streams.write(_json(states) if options.json else _table(states))
    return 0


def _drop(options: argparse.Namespace) -> int:
    freed = _records(options).drop(options.names)
    documents = f"{freed.records} document{'s' * (freed.records != 1)}"
    streams.write(f"removed {documents}: {freed.entries} entries, {_mebibytes(freed.bytes)} MiB\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    records = _records(options)
    whole, damaged = records.folder.verify()
    unreadable = records.clear_damaged()
    states = records.states()
    incomplete = [state.record.name for state in states if state.chunks < len(state.record.chunks)]
    names = f": {', '.join(incomplete)}" if incomplete else ""
    streams.write(
        f"chunks and heads: {whole} whole, {len(damaged)} damaged and removed\n"
        f"records: {len(states)} whole, {unreadable} damaged and removed\n"
        f"documents that miss chunks: {len(incomplete)}{names}\n"
    )
    return 1 if damaged or unreadable else 0


def _records(options: argparse.Namespace) -> DocumentRecords:
    from mesart.runtime.chunk_store.folder import ChunkFolder  # noqa: PLC0415  (slow to import)
    from mesart.runtime.chunk_store.records import DocumentRecords  # noqa: PLC0415

    return DocumentRecords(ChunkFolder.existing(options.store))


def _table(states: list[DocumentState]) -> str:
    rows = [("name", "tokens", "chunks", "MiB", "last used", "bundle")]
    for state in states:
        record = state.record
        used = "" if state.used is None else datetime.fromtimestamp(state.used).strftime("%Y-%m-%d %H:%M")
        chunks = f"{state.chunks} / {len(record.chunks)}"
        bundle = record.bundle.removeprefix("sha256:")[:12]
        rows.append((record.name, f"{record.tokens:,}", chunks, _mebibytes(state.bytes), used, bundle))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, 4, 5)  # columns of texts
    lines = (
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _json(states: list[DocumentState]) -> str:
    found = [
        dataclasses.asdict(state.record) | {"chunks_there": state.chunks, "bytes": state.bytes, "used": state.used}
        for state in states
    ]
    return json.dumps(found, indent=1) + "\n"


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f}"


__all__ = ["add"]
