"""A folder of chunks: what is read was written, whoever writes, ends, or damages what meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs import MesaError
from mesart.runtime.chunk_store import folder as folder_module
from mesart.runtime.chunk_store.chunk_file import header_of
from mesart.runtime.chunk_store.folder import MARKER, ChunkFolder
from mesart.runtime.kv.block import BlockLayout, KvBlock
from tests.conftest import ROOT
from tests.runtime.chunk_store.blocks import LAYOUT, block_of, bytes_on_disk, file_of, key_of, same

LIMIT = 1 << 20
LOAD_SECONDS = float(os.environ.get("MESART_STORE_SECONDS", "5"))
"""How long two processes share a folder."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> ChunkFolder:
    return ChunkFolder(path, LIMIT)


def read(store: ChunkFolder, index: int, tokens: int = 5) -> KvBlock | None:
    return store.read(key_of(index), LAYOUT, tokens)


def write(store: ChunkFolder, index: int, tokens: int = 5) -> KvBlock:
    block = block_of(index, tokens)
    store.write(key_of(index), block)
    return block


class TestWhatIsWritten:
    @given(
        st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3),
        st.sampled_from([np.float32, np.float16, np.uint16]),
        st.integers(1, 70),
    )
    @settings(max_examples=20)
    def test_is_read_again(self, tmp_path_factory, layers, storage, tokens):
        layout = BlockLayout((*layers, *layers), np.dtype(storage))
        path = tmp_path_factory.mktemp("store") / "store"
        block = block_of(3, tokens, layout)
        ChunkFolder(path, LIMIT).write(key_of(3), block)
        found = ChunkFolder(path, LIMIT).read(key_of(3), layout, tokens)
        assert same(found, block)
        shutil.rmtree(path)

    @pytest.mark.parametrize("storage", [np.float32, np.float16, np.uint16])
    def test_opens_with_safetensors(self, store, path, storage):
        """Any reader of the format has the same numbers, by names that say what they are."""
        torch = pytest.importorskip("torch")
        from safetensors import safe_open

        layout = BlockLayout(LAYOUT.heads_and_sizes, np.dtype(storage))
        block = block_of(1, 7, layout)
        store.write(key_of(1), block)
        with safe_open(file_of(path, 1), "pt") as file:
            assert sorted(file.keys()) == ["keys.0", "keys.1", "values.0", "values.1"]
            assert file.metadata()["key"] == key_of(1)
            for name, tensor in zip(["keys.0", "keys.1", "values.0", "values.1"], block.tensors, strict=True):
                found = file.get_tensor(name)
                expected = {np.float32: torch.float32, np.float16: torch.float16, np.uint16: torch.bfloat16}[storage]
                assert found.dtype == expected
                assert np.array_equal(found.view(torch.uint8).numpy(), np.ascontiguousarray(tensor).view(np.uint8))

    def test_is_not_there_before_and_after(self, store):
        assert read(store, 1) is None
        assert key_of(1) not in store
        write(store, 1)
        assert key_of(1) in store
        assert store.drop(key_of(1))
        assert not store.drop(key_of(1))
        assert read(store, 1) is None

    def test_stays_as_it_was_written_first(self, store):
        block = write(store, 1)
        store.write(key_of(1), block_of(2))
        assert same(read(store, 1), block)

    def test_of_another_size_or_layout_is_a_miss(self, store):
        write(store, 1)
        assert read(store, 1, tokens=6) is None
        write(store, 2)
        other = BlockLayout(LAYOUT.heads_and_sizes, np.dtype(np.float16))
        assert store.read(key_of(2), other, 10) is None

    def test_leaves_nothing_else(self, store, path):
        for index in range(5):
            write(store, index)
        assert sorted(entry.name for entry in path.iterdir()) == ["chunks", "lock", MARKER]
        assert len(list((path / "chunks").iterdir())) == 5


def flipped(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "first byte": lambda file: flipped(file, 0),
    "in the header": lambda file: flipped(file, 0.05),
    "in the middle": lambda file: flipped(file, 0.5),
    "in a number": lambda file: flipped(file, 0.8),
    "last byte": lambda file: flipped(file, 1),
    "empty": lambda file: file.write_bytes(b""),
    "one byte": lambda file: file.write_bytes(b"\1"),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in the header": lambda file: os.truncate(file, 30),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "far longer than memory": lambda file: os.truncate(file, 1 << 40),
    "another chunk": lambda file: file.write_bytes(header_of(block_of(9), key_of(9)) + block_of(9).buffer.tobytes()),
    "another chunk's numbers": lambda file: file.write_bytes(
        header_of(block_of(9), key_of(1))[:-1] + b"\n" + block_of(9).buffer.tobytes()
    ),
    "a header without end": lambda file: file.write_bytes((1 << 60).to_bytes(8, "little") + b"{" * 99),
    "a header of brackets": lambda file: file.write_bytes((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20)),
    "a header of no numbers": lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{}"),
    "a header of odd numbers": lambda file: file.write_bytes(
        (56).to_bytes(8, "little") + b'{"__metadata__": {"key": 1, "sha256": []}, "keys.0": 1}'.ljust(56)
    ),
}
"""Of regular files."""


def no_file(file: Path, what: str) -> None:
    """Puts what is no regular file in the place of one."""
    other = file.with_name("other")
    file.rename(other)
    if what == "a pipe":
        os.mkfifo(file)
    elif what == "a folder":
        file.mkdir()
    else:
        file.symlink_to({"a link": "other", "a link to nothing": "nothing", "a link to itself": file.name}[what])


class TestADamagedFile:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_a_miss_and_is_removed(self, store, path, damage):
        write(store, 1)
        DAMAGES[damage](file_of(path, 1))
        assert read(store, 1) is None
        assert not file_of(path, 1).exists()
        assert same(read(store, 1), write(store, 1)) or same(read(store, 1), block_of(1))

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_found_by_verify_and_is_removed(self, store, path, damage):
        for index in (1, 2):
            write(store, index)
        DAMAGES[damage](file_of(path, 1))
        assert store.verify() == (1, [key_of(1)])
        assert not file_of(path, 1).exists()
        assert store.verify() == (1, [])

    @pytest.mark.parametrize("what", ["a pipe", "a folder", "a link", "a link to nothing", "a link to itself"])
    def test_what_is_no_file_is_a_miss_and_hinders_nobody(self, path, what):
        """Nothing is waited for, and no folder or link is followed."""
        store = ChunkFolder(path, 4 * 1024)
        write(store, 1)
        no_file(file_of(path, 1), what)
        assert read(store, 1) is None
        for index in range(1, 12):  # room is made as often
            write(store, index)
        store.verify()
        assert [found is not None for found in (read(store, 11), read(store, 10))] == [True, True]
        assert sum(stored.bytes for stored in store.files()) <= 4 * 1024

    @given(st.integers(0, 10**6), st.integers(1, 255))
    @settings(max_examples=60)
    def test_any_byte_counts(self, tmp_path_factory, where, change):
        path = tmp_path_factory.getbasetemp() / "bytes"
        store = ChunkFolder(path, LIMIT)
        write(store, 1)
        content = bytearray(file_of(path, 1).read_bytes())
        content[where % len(content)] ^= change
        file_of(path, 1).write_bytes(content)
        assert read(store, 1) is None


class TestTheLimit:
    @given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 30)), max_size=40))
    @settings(max_examples=20)
    def test_is_never_exceeded(self, tmp_path_factory, chunks):
        path = tmp_path_factory.mktemp("store")
        limit = 5 * 1024
        store = ChunkFolder(path, limit)
        for index, tokens in chunks:
            write(store, index, tokens)
            assert bytes_on_disk(path) <= limit
        shutil.rmtree(path)

    def test_what_was_used_longest_ago_goes_first(self, path):
        size = len(header_of(block_of(0), key_of(0))) + block_of(0).bytes
        store = ChunkFolder(path, 3 * size)
        for index in range(3):
            write(store, index)
            os.utime(file_of(path, index), (index, index))
        assert read(store, 0) is not None
        write(store, 3)
        assert [read(store, index) is not None for index in range(4)] == [True, False, True, True]

    def test_a_block_larger_than_it_is_not_written(self, path):
        store = ChunkFolder(path, 1000)
        write(store, 1, tokens=100)
        assert not store.files()
        assert not list((path / "chunks").iterdir())

    def test_what_others_are_writing_counts(self, path):
        """Their blocks lie there under other names, as large as they are going to be."""
        size = len(header_of(block_of(0), key_of(0))) + block_of(0).bytes
        store = ChunkFolder(path, 2 * size)
        partial = path / "chunks" / f".{key_of(7)}.00000000.partial"
        with partial.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.truncate(partial, 2 * size - 1)
            write(store, 1)
            assert read(store, 1) is None
            assert partial.exists()
        write(store, 1)
        assert read(store, 1) is not None
        assert not partial.exists()


class TestTheDisk:
    """Errors of a disk come as errors: what they mean for a prompt, the store says."""

    def test_full_while_writing(self, store, path, monkeypatch):
        written = 0

        def full(file: int, content: memoryview) -> int:
            nonlocal written
            if written > 300:
                raise OSError(28, "No space left on device")
            count = os.write(file, content[:100])
            written += count
            return count

        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "_write_all", lambda file, content: _all(full, file, content))
            with pytest.raises(OSError, match="No space left"):
                write(store, 1)
        assert not list((path / "chunks").iterdir())
        assert same(write(store, 1), block_of(1))
        assert same(read(store, 1), block_of(1))

    @pytest.mark.parametrize("what", ["", "chunks"])
    def test_a_folder_that_goes(self, store, path, what):
        write(store, 1)
        shutil.rmtree(path / what)
        assert read(store, 1) is None
        assert key_of(1) not in store
        with pytest.raises(OSError, match="No such file"):
            write(store, 2)

    @pytest.mark.parametrize("call", ["utime", "unlink"])
    def test_that_cannot_be_changed_any_more_is_read(self, store, path, monkeypatch, call):
        """Or files that are another user's: they are good all the same; what is damaged cannot be removed."""

        def refuse(*arguments: Any, **options: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        block = write(store, 1)
        write(store, 2)
        flipped(file_of(path, 2), 0.8)
        with monkeypatch.context() as patch:
            if call == "utime":
                patch.setattr(os, "utime", refuse)
            else:
                patch.setattr(Path, "unlink", refuse)
            assert same(read(store, 1), block)
            assert read(store, 2) is None
            assert store.verify()[0] == 1

    def test_an_error_while_reading_is_a_miss(self, store, monkeypatch):
        def fail(*arguments: Any) -> Any:
            raise OSError(5, "Input/output error")

        write(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "read_block", fail)
            assert read(store, 1) is None


def _all(write_some: Callable[[int, memoryview], int], file: int, content: memoryview) -> None:
    while content:
        content = content[write_some(file, content) :]


class TestWhatIsNoStore:
    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(MesaError, match="is no store of chunks: .*give a new folder") as error:
            ChunkFolder(tmp_path, LIMIT)
        assert "\n" not in str(error.value)
        assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]

    def test_an_empty_folder_becomes_one(self, tmp_path):
        assert same(write(ChunkFolder(tmp_path, LIMIT), 1), block_of(1))

    def test_a_folder_within_folders_is_made(self, tmp_path):
        write(ChunkFolder(tmp_path / "a" / "b", LIMIT), 1)

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        for path in (tmp_path / "file", tmp_path / "file" / "store"):
            with pytest.raises(MesaError, match="cannot be used: "):
                ChunkFolder(path, LIMIT)

    @pytest.mark.parametrize("content", [b"", b"{}", b"[" * 99999, b"\xff", b'{"mesart_chunk_store": 2}'])
    def test_a_marker_of_another_version(self, store, path, content):
        (path / MARKER).write_bytes(content)
        with pytest.raises(MesaError, match="another version of mesart, or damaged"):
            ChunkFolder(path, LIMIT)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_cannot_be_written(self, store, path):
        path.chmod(0o500)
        (path / "lock").chmod(0o400)
        with pytest.raises(MesaError, match="cannot be used: Permission denied"):
            ChunkFolder(path, LIMIT)

    def test_a_disk_that_is_read_only(self, store, path, monkeypatch):
        def refuse(*arguments: Any) -> int:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(MesaError, match="cannot be used: Read-only file system"):
            ChunkFolder(path, LIMIT)

    def test_one_that_another_process_makes_at_the_same_time(self, path, monkeypatch):
        """Between two looks at the folder it has become a store."""
        path.mkdir()
        exists, looked = Path.exists, list[Path]()

        def seldom(self: Path, **options: Any) -> bool:
            if self.name == MARKER and not looked:
                looked.append(self)
                ChunkFolder(path, LIMIT).write(key_of(1), block_of(1))
                return False
            return exists(self, **options)

        monkeypatch.setattr(Path, "exists", seldom)
        assert same(ChunkFolder(path, LIMIT).read(key_of(1), LAYOUT, 5), block_of(1))
        assert looked


def start(path: Path, limit: int, seed: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.runtime.chunk_store.writing", str(path), str(limit), str(seed)]
    return subprocess.Popen([*command, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_a_folder_under_load(path):
    """Neither sees an error, a wrong block, or more than is allowed; ``MESART_STORE_SECONDS=60`` for longer."""
    limit = 40 * 1024
    writers = [start(path, limit, seed, LOAD_SECONDS) for seed in (1, 2)]
    try:
        counts = [int(writer.communicate(timeout=LOAD_SECONDS + 60)[0].split()[-1]) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert min(counts) > 10
    assert sum(stored.bytes for stored in ChunkFolder(path, limit).files()) <= limit
    assert not [entry for entry in (path / "chunks").iterdir() if entry.suffix == ".partial"]


KILLED = """
import os, random, sys, time
from pathlib import Path
from mesart.runtime.chunk_store.folder import ChunkFolder
from tests.runtime.chunk_store.blocks import block_of, key_of
path, limit, choose = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
for seed in range(50):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        store, choose = ChunkFolder(path, limit), random.Random(seed)
        while True:
            index = choose.randrange(40)
            store.write(key_of(index), block_of(index, 300 + index))
            os.write(writing, b"!")  # fails once there is nobody to end this
    os.close(writing)
    for _ in range(choose.randrange(4)):
        os.read(reading, 1)
    time.sleep(choose.random() * 0.003)
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reading)
"""
"""Ends a process that writes, 50 times; forked, since starting each would take a second."""


def test_a_store_whose_writers_are_killed_loads_and_holds_whole_chunks(path):
    limit = 20 * 320 * LAYOUT.bytes_per_token
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(limit)], cwd=ROOT, check=True, timeout=120)
    left = [entry for entry in (path / "chunks").iterdir() if entry.suffix == ".partial"]
    assert bytes_on_disk(path) <= limit + 330 * LAYOUT.bytes_per_token
    store = ChunkFolder(path, limit)
    assert not [entry for entry in (path / "chunks").iterdir() if entry.suffix == ".partial"], left
    files = store.files()
    assert files
    assert store.verify() == (len(files), [])
    for index in range(40):
        found = read(store, index, 300 + index)
        assert found is None or same(found, block_of(index, 300 + index))
