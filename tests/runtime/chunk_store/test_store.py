"""A store in memory and on a disk: what is found where, and that a disk that fails disturbs nobody."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError
from mesart.runtime import ChunkStore
from mesart.runtime.chunk_store.folder import ChunkFolder
from mesart.runtime.chunk_store.store import require_store
from mesart.runtime.kv.block import BlockLayout
from tests.runtime.chunk_store.blocks import LAYOUT, block_of, bytes_on_disk, file_of, key_of, same

SIZE = block_of(0).bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(3 * SIZE, path, "1MiB") as opened:
        yield opened


def put(store: ChunkStore, *indices: int) -> None:
    for index in indices:
        store.put(key_of(index), block_of(index))
    store.flush()


def tier(store: ChunkStore, index: int) -> str | None:
    """Where a block is; it is the right one."""
    found = store.find(key_of(index), LAYOUT, 5)
    assert found is None or same(found[0], block_of(index))
    return None if found is None else found[1]


class TestTiers:
    def test_memory_alone(self):
        store = ChunkStore(2 * SIZE)
        put(store, 1, 2, 3)
        assert [tier(store, index) for index in (1, 2, 3)] == [None, "memory", "memory"]
        assert store.memory_in_use == 2 * SIZE
        store.close()
        assert store.memory_in_use == 0

    def test_what_memory_has_no_room_for_is_on_the_disk(self, store):
        put(store, 1, 2, 3, 4)
        assert tier(store, 1) == "disk"
        assert tier(store, 1) == "memory"
        assert tier(store, 2) == "disk"

    def test_what_is_pinned_stays_in_memory(self, store):
        store.pin([key_of(1), key_of(1)])
        put(store, 1, 2, 3, 4, 5)
        assert tier(store, 1) == "memory"
        store.unpin([key_of(1)])
        put(store, 6, 7, 8)
        assert tier(store, 1) == "memory"
        store.unpin([key_of(1)])
        put(store, 9, 10, 11)
        assert tier(store, 1) == "disk"

    def test_after_a_restart(self, store, path):
        put(store, 1)
        store.clear_memory()
        assert tier(store, 1) == "disk"
        store.close()
        with ChunkStore(3 * SIZE, path) as again:
            assert [tier(again, 1), tier(again, 1)] == ["disk", "memory"]

    def test_a_store_that_was_closed_may_be_used_again(self, store):
        put(store, 1)
        store.close()
        put(store, 2)
        assert [tier(store, 1), tier(store, 2)] == ["disk", "memory"]

    def test_forgets(self, store):
        put(store, 1)
        assert [store.has(key_of(1)), store.forget(key_of(1)), store.forget(key_of(1))] == [True, True, False]
        assert not store.has(key_of(1))
        assert tier(store, 1) is None
        memory = ChunkStore(SIZE)
        put(memory, 1)
        assert [memory.forget(key_of(1)), memory.forget(key_of(1))] == [True, False]

    @pytest.mark.parametrize("clear", [False, True])
    def test_of_another_size_or_layout_is_a_miss(self, store, clear):
        other = BlockLayout(LAYOUT.heads_and_sizes, np.dtype(np.float16))
        for layout, tokens in ((LAYOUT, 6), (other, 5), (other, 10)):
            put(store, 1)
            if clear:
                store.clear_memory()
            assert store.find(key_of(1), layout, tokens) is None

    def test_a_damaged_file_is_a_miss_and_written_anew(self, store, path):
        put(store, 1)
        store.clear_memory()
        os.truncate(file_of(path, 1), 50)
        assert store.has(key_of(1))
        assert tier(store, 1) is None
        put(store, 1)
        store.clear_memory()
        assert tier(store, 1) == "disk"


class TestADiskThatFails:
    """A prompt is answered all the same: the chunk is kept in memory, and the log says what is wrong."""

    @pytest.mark.parametrize("gone", ["", "chunks"])
    def test_a_folder_that_is_removed(self, store, path, caplog, gone):
        put(store, 1)
        shutil.rmtree(path / gone)
        put(store, 2)
        assert [tier(store, 1), tier(store, 2)] == ["memory", "memory"]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"a chunk is not kept in {path}: No such file or directory"
        store.clear_memory()
        assert [tier(store, 1), tier(store, 2)] == [None, None]
        assert not store.forget(key_of(1))

    def test_a_disk_that_is_full(self, store, path, monkeypatch, caplog):
        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("mesart.runtime.chunk_store.folder._write_all", full)
            put(store, 1)
        assert "a chunk is not kept in" in caplog.text
        assert "No space left on device" in caplog.text
        assert tier(store, 1) == "memory"
        assert not list((path / "chunks").iterdir())
        put(store, 1)
        store.clear_memory()
        assert tier(store, 1) == "disk"


class TestThreads:
    def test_several_use_one_store(self, store, path):
        """Of which none sees another's block under its key, nor more memory than is allowed."""
        faults: list[str] = []

        def work(seed: int) -> None:
            choose = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    index = int(choose.integers(0, 8))
                    store.pin([key_of(index)])
                    if tier(store, index) is None:
                        store.put(key_of(index), block_of(index))
                    store.unpin([key_of(index)])
                    if store.memory_in_use > 3 * SIZE:
                        faults.append("too much memory")
                    if choose.random() < 0.1:
                        store.forget(key_of(index))
            except (AssertionError, MesaError, OSError, RuntimeError) as error:
                faults.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not faults
        assert not any(thread.is_alive() for thread in threads)
        store.flush()
        assert bytes_on_disk(path) <= 1 << 20
        assert ChunkFolder(path, 1 << 20).verify()[1] == []

    def test_a_forked_process_goes_on(self, store, path):
        """The thread that writes is the parent's; the child has one of its own."""
        put(store, 1)
        child = os.fork()
        if not child:
            code = 1
            try:
                put(store, 2)
                store.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        put(store, 3)
        store.clear_memory()
        assert [tier(store, index) for index in (1, 2, 3)] == ["disk"] * 3


class TestWhatIsNoStore:
    @pytest.mark.parametrize("name", ["memory", "disk"])
    @pytest.mark.parametrize("size", ["2GB2", "", "-1", 0, -5, 1.5, "many", None, True, "1" * 99])
    def test_a_size_that_cannot_be_read(self, tmp_path, name, size):
        options: dict[str, Any] = {"path": tmp_path / "store", name: size}
        with pytest.raises(MesaError, match=f"{name} is .*; give a number of bytes above 0, or a text such") as error:
            ChunkStore(**options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "store").exists()

    def test_a_folder_of_something_else(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(MesaError, match="is no store of chunks"):
            ChunkStore(path=tmp_path)

    @pytest.mark.parametrize("thing", ["2GiB", {}, 5, True, Path("store")])
    def test_another_thing(self, thing):
        with pytest.raises(MesaError, match=r"^store is \w+; give a ChunkStore, such as ChunkStore\(memory='2GiB'\)$"):
            require_store(thing)
        assert require_store(None) is None
