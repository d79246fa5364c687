"""Records of documents: what is there of each, and what goes with one that is removed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.graphs.errors import InputError
from mesart.runtime.chunk_store.folder import ChunkFolder
from mesart.runtime.chunk_store.records import DocumentRecord, DocumentRecords, Freed
from mesart.runtime.kv.block import BlockLayout, KvBlock

LAYOUT = BlockLayout(((1, 2), (1, 2)), np.dtype(np.float32))


def key(number: int) -> str:
    return f"{number:064x}"


def record(name: str = "a.txt", *chunks: int, head: int = 1) -> DocumentRecord:
    return DocumentRecord(
        name=name,
        sha256=key(99),
        tokens=12,
        head=key(head),
        chunks=tuple(map(key, chunks)),
        bundle=f"sha256:{key(7)}",
        fingerprint=key(8),
        added="2026-11-28T04:00:00+00:00",
    )


@pytest.fixture
def records(tmp_path: Path) -> DocumentRecords:
    """Of a folder that has the entries 1 to 5, of 4 tokens each."""
    folder = ChunkFolder(tmp_path / "store", 1 << 20)
    for number in range(1, 6):
        folder.write(key(number), KvBlock(LAYOUT, 4, np.full(4 * LAYOUT.bytes_per_token, number, np.uint8)))
    return DocumentRecords(folder)


def there(records: DocumentRecords) -> set[int]:
    return {int(stored.key, 16) for stored in records.folder.files()}


def test_what_was_put_is_there(records: DocumentRecords) -> None:
    assert records.all() == []
    first, second = record("b.txt", 2, 3), record("a.txt", 3, 4, 9)
    records.put(first)
    records.put(second)
    assert DocumentRecords(ChunkFolder.existing(records.folder.path)).all() == [second, first]
    [a, b] = records.states()
    assert (a.chunks, b.chunks) == (2, 2), "9 is not there"
    size = records.folder.files()[0].bytes
    assert a.bytes == b.bytes == 3 * size
    os.utime(records.folder.path / "chunks" / f"{key(4)}.safetensors", (2e9, 2e9))
    assert [state.used for state in records.states()] == [2e9, b.used]


def test_a_document_that_is_put_again_replaces_itself_alone(records: DocumentRecords) -> None:
    records.put(record("a.txt", 2, 3))
    records.put(record("b.txt", 3))
    records.put(replace(record("a.txt", 4), sha256=key(98)))
    assert [(found.name, found.chunks) for found in records.all()] == [("a.txt", (key(4),)), ("b.txt", (key(3),))]
    assert there(records) == {1, 3, 4, 5}, "2 was of the old text alone"
    records.put(record("a.txt", 5, head=2))
    assert len(records.all()) == 3, "behind another head it is another document"


def test_what_is_dropped_takes_what_no_other_needs(records: DocumentRecords) -> None:
    size = records.folder.files()[0].bytes
    records.put(record("a.txt", 2, 3, 9))
    records.put(record("b.txt", 3, 4))
    assert records.drop(["a.txt", "a.txt"]) == Freed(records=1, entries=1, bytes=size)
    assert there(records) == {1, 3, 4, 5}
    assert records.drop(["b.txt"]) == Freed(records=1, entries=3, bytes=3 * size)
    assert there(records) == {5}, "no record speaks of it"
    assert records.all() == []


def test_an_unknown_name_removes_nothing(records: DocumentRecords) -> None:
    with pytest.raises(InputError, match=r"no document is called 'x'; there is none"):
        records.drop(["x"])
    records.put(record("a.txt", 2))
    records.put(record("b.txt", 3))
    with pytest.raises(InputError, match=r"no document is called 'x', 'y'; there are 'a.txt', 'b.txt'"):
        records.drop(["a.txt", "x", "y"])
    assert len(records.all()) == 2
    assert there(records) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "a\udcffb"])
def test_names_have_to_show(records: DocumentRecords, name: str) -> None:
    with pytest.raises(InputError, match="is no name for a document"):
        records.put(record(name, 2))
    assert not (records.folder.path / "documents").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": ["../../x"]},
        {"chunks": "ab"},
        {"chunks": [3]},
        {"chunks": None},
        {"head": None},
        {"name": 3},
        {"name": "b.txt"},
        {"name": "\u001b[2J"},
        {"tokens": "12"},
        {"tokens": True},
        {"bundle": "x"},
        {"added": "yesterday"},
        {"added": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_record_is_none(records: DocumentRecords, change: dict[str, Any]) -> None:
    records.put(record("a.txt", 2))
    records.put(record("c.txt", 3))
    path = records.folder.path / "documents" / f"{record('a.txt', 2).id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert [found.name for found in records.all()] == ["c.txt"]
    assert records.clear_damaged() == 1
    assert not path.exists()
    assert records.clear_damaged() == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"{}", b'{"chunks": []}'])
def test_a_record_that_is_no_json_is_none(records: DocumentRecords, content: bytes) -> None:
    records.put(record("a.txt", 2))
    (path,) = (records.folder.path / "documents").iterdir()
    path.write_bytes(content)
    assert records.all() == []
    assert records.clear_damaged() == 1


def test_what_a_killed_process_left_is_cleared(records: DocumentRecords) -> None:
    records.put(record("a.txt", 2))
    documents = records.folder.path / "documents"
    (documents / f".{key(3)}.0123abcd.partial").write_text("{")
    (documents / "notes.txt").write_text("mine")
    assert len(records.all()) == 1
    records.put(record("b.txt", 3))
    assert {path.suffix for path in documents.iterdir()} == {".json", ".txt"}


def test_a_full_disk_leaves_what_was_there(records: DocumentRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    records.put(record("a.txt", 2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.put(record("a.txt", 3))
    assert [found.chunks for found in records.all()] == [(key(2),)]
    assert [path.suffix for path in (records.folder.path / "documents").iterdir()] == [".json"]


def test_an_existing_store_is_never_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no store of chunks: there is nothing of that name"):
        ChunkFolder.existing(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="is no store of chunks: it holds no store.json"):
        ChunkFolder.existing(tmp_path)
    assert not list(tmp_path.iterdir())
