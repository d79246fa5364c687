"""Which documents a folder of chunks was given, by name, and the chunks that each is made of.

Chunks alone serve every prompt; records are for people, who want to see what is there and to remove it again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mesart.graphs.errors import InputError
from mesart.graphs.json_file import read_object
from mesart.runtime.chunk_store.folder import ChunkFolder, StoredFile

_RECORD = re.compile(r"[0-9a-f]{64}\.json")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}\.partial")
_HASH = re.compile("[0-9a-f]{64}")
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_MOST_BYTES = 64 << 20
"""Of a record: keys of a million chunks."""


@dataclass(frozen=True)
class DocumentRecord:
    """A document, as one bundle reads it behind one head.

    Attributes:
        name: for people; several records may have the same, of different bundles or heads.
        sha256: of its text in UTF-8, 64 hexadecimal digits.
        tokens: of the document.
        head: the key of its head.
        chunks: the keys of its chunks, each once.
        bundle: the digest of the bundle, ``sha256:...``.
        fingerprint: of what computed the chunks, see :func:`~mesart.runtime.chunk_store.keys.fingerprint`.
        added: when, in ISO 8601.
    """

    name: str
    sha256: str
    tokens: int
    head: str
    chunks: tuple[str, ...]
    bundle: str
    fingerprint: str
    added: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all of its entries."""
        return (self.head, *self.chunks)

    @property
    def id(self) -> str:
        """64 hexadecimal digits. The same name, bundle and head is the same document, whatever its text is now."""
        return blake2b(json.dumps([self.name, self.fingerprint, self.head]).encode(), digest_size=32).hexdigest()


@dataclass(frozen=True)
class DocumentState:
    """What is in the folder of a document."""

    record: DocumentRecord
    chunks: int
    """Those of its chunks that are there."""
    bytes: int
    """Of its entries, the head among them; documents may share some."""
    used: float | None
    """When one of them was written, or read last, in seconds since the epoch; ``None`` if there is none."""


@dataclass(frozen=True)
class Freed:
    """What removing records gave back."""

    records: int
    entries: int
    bytes: int


class DocumentRecords:
    """The records of a folder, a small JSON file each."""

    def __init__(self, folder: ChunkFolder) -> None:
        self.folder, self._documents = folder, folder.path / "documents"

    def all(self) -> list[DocumentRecord]:
        """By name, those that were added first before others of the same; damaged ones are left out."""
        found = (_read(path) for path in self._paths())
        return sorted((record for record in found if record), key=lambda record: (record.name, record.added))

    def states(self) -> list[DocumentState]:
        """What is there of each; in the order of :meth:`all`."""
        files = self._files()
        states = []
        for record in self.all():
            there = [files[key] for key in record.keys if key in files]
            states.append(
                DocumentState(
                    record,
                    sum(key in files for key in record.chunks),
                    sum(stored.bytes for stored in there),
                    max((stored.used for stored in there), default=None),
                )
            )
        return states

    def put(self, record: DocumentRecord) -> None:
        """Keeps a record. One of the same document gives way to it, with the entries that no record needs any more.

        Raises:
            InputError: its name is none that can be shown in a line.
            OSError: the folder cannot be written.
        """
        check_name(record.name)
        self._documents.mkdir(exist_ok=True)
        path = self._path(record)
        with self.folder.lock():
            for partial in self._matching(_PARTIAL):  # of processes that ended: whoever writes holds the lock
                partial.unlink(missing_ok=True)
            old = _read(path)
            partial = self._documents / f".{record.id}.{secrets.token_hex(4)}.partial"
            try:
                with partial.open("x", encoding="utf-8") as stream:
                    json.dump(asdict(record), stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            if old is not None:
                self._drop_unneeded(old.keys)

    def drop(self, names: Collection[str]) -> Freed:
        """Removes all records of these names, and the entries that no other record needs.

        Raises:
            InputError: there is none of one of the names; then nothing is removed.
            OSError: the folder cannot be written.
        """
        with self.folder.lock():
            records = self.all()
            known = dict.fromkeys(record.name for record in records)
            unknown = [name for name in dict.fromkeys(names) if name not in known]
            if unknown:
                raise InputError(
                    f"no document is called {', '.join(map(repr, unknown))}; there "
                    + (f"are {', '.join(map(repr, known))}" if known else "is none")
                )
            gone = [record for record in records if record.name in names]
            for record in gone:
                self._path(record).unlink(missing_ok=True)
            freed = self._drop_unneeded(key for record in gone for key in record.keys)
            return replace(freed, records=len(gone))

    def clear_damaged(self) -> int:
        """Removes records that cannot be read; how many."""
        with self.folder.lock():
            damaged = [path for path in self._paths() if _read(path) is None]
            for path in damaged:
                path.unlink(missing_ok=True)
        return len(damaged)

    def _drop_unneeded(self, keys: Iterable[str]) -> Freed:
        needed = {key for record in self.all() for key in record.keys}
        files = self._files()
        unneeded = [files[key] for key in dict.fromkeys(keys) if key in files and key not in needed]
        dropped = [stored for stored in unneeded if self.folder.drop(stored.key)]
        return Freed(0, len(dropped), sum(stored.bytes for stored in dropped))

    def _files(self) -> dict[str, StoredFile]:
        return {stored.key: stored for stored in self.folder.files()}

    def _path(self, record: DocumentRecord) -> Path:
        return self._documents / f"{record.id}.json"

    def _paths(self) -> Iterator[Path]:
        return self._matching(_RECORD)

    def _matching(self, pattern: re.Pattern[str]) -> Iterator[Path]:
        if self._documents.is_dir():  # it is made with the first record
            yield from (path for path in self._documents.iterdir() if pattern.fullmatch(path.name))


def check_name(name: str) -> None:
    """Raises an :class:`InputError` if a name cannot be shown in a line of a table."""
    if not name or not name.isprintable():
        raise InputError(f"{name!a} is no name for a document: give one that is not empty, of characters that show")


def _read(path: Path) -> DocumentRecord | None:
    """The record in a file; ``None`` if it holds none, or one of another document."""
    try:
        found = _parse(read_object(path, _MOST_BYTES))
    except (InputError, KeyError, TypeError, ValueError):
        return None
    return found if found is not None and path.name == f"{found.id}.json" else None


def _parse(value: dict[str, Any]) -> DocumentRecord | None:
    record = DocumentRecord(**{**value, "chunks": tuple(value["chunks"])})
    datetime.fromisoformat(record.added)
    hashes = all(map(_HASH.fullmatch, (*record.keys, record.sha256, record.fingerprint)))
    if (
        not hashes
        or not _DIGEST.fullmatch(record.bundle)
        or type(record.tokens) is not int
        or type(record.name) is not str
    ):
        return None
    check_name(record.name)
    return record


__all__ = ["DocumentRecord", "DocumentRecords", "DocumentState", "Freed", "check_name"]
