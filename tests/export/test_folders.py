"""Outputs: nothing that belongs to somebody else is replaced, and a crash at any moment loses nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mesart.export import contents, disk, stage, swap
from mesart.export.contents import bundle_entries
from mesart.export.copies import Way, link_or_copy
from mesart.export.disk import explained, replace_file, write_new
from mesart.export.folders import atomic, check_target, require_apart, require_own
from mesart.export.stage import clear_leftovers, is_stage, real_place, staged
from mesart.export.weights import name_files
from mesart.graphs.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from mesart.graphs.errors import MesaError

MARKER = "marker"


def entries(folder: Path) -> list[str]:
    """The kind of folder that these tests write: the marker lists the files."""
    try:
        return [MARKER, *json.loads((folder / MARKER).read_text())]
    except ValueError as error:
        raise MesaError("no list") from error


def check(target: Path, *, force: bool = False, keep: tuple[Path, ...] = ()) -> list[str]:
    lines: list[str] = []
    check_target(target, MARKER, "thing", force=force, entries=entries, keep=keep, report=lines.append)
    return lines


def writing(target: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    def accept(replaced: Path) -> None:
        if not force:
            require_own(replaced, target, MARKER, "thing", entries)

    return atomic(target, "thing", 0, marker=MARKER, accept=accept)


def write(target: Path, text: str = "new", *, force: bool = False) -> None:
    check(target, force=force)
    with writing(target, force=force) as folder:
        (folder / "file").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)
        (folder / MARKER).write_text('["file", "sub/file"]')


def read(target: Path) -> str:
    """The text of a whole one."""
    assert sorted(path.name for path in target.iterdir()) == ["file", MARKER, "sub"]
    text = (target / "file").read_text()
    assert (target / "sub" / "file").read_text() == text
    return text


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture(params=["exchange", "two renames", "fill"])
def way(request, monkeypatch) -> str:
    """Each way in which a folder takes another's place."""
    if request.param != "exchange":
        monkeypatch.setattr(swap, "exchange", lambda *_: False)
    if request.param == "fill":
        monkeypatch.setattr(stage, "_is_fixed", lambda target: target.is_dir())
    return request.param


class TestReplacing:
    def test_a_new_one(self, work, way):
        write(work / "a" / "b" / "out")
        assert read(work / "a" / "b" / "out") == "new"
        assert os.listdir(work / "a" / "b") == ["out"]

    def test_an_older_one(self, work, way):
        write(work / "out", "old")
        write(work / "out")
        assert read(work / "out") == "new"
        assert os.listdir(work) == ["out"]

    def test_an_empty_folder(self, work, way):
        (work / "out").mkdir()
        write(work / "out")
        assert read(work / "out") == "new"

    def test_a_folder_is_replaced_by_force(self, work, way):
        (work / "out" / "deep").mkdir(parents=True)
        (work / "out" / "deep" / "thesis").write_text("ten years")
        write(work / "out", force=True)
        assert read(work / "out") == "new"

    def test_a_file_is_replaced_by_force(self, work, way):
        (work / "out").write_text("ten years")
        write(work / "out", force=True)
        assert read(work / "out") == "new"
        assert os.listdir(work) == ["out"]

    def test_what_is_put_there_meanwhile_stays(self, work, way):
        write(work / "out", "old")
        with pytest.raises(MesaError, match="holds results.json, which is not the thing's"), writing(work / "out"):
            (work / "out" / "results.json").write_text("a day")
        assert (work / "out" / "results.json").read_text() == "a day"
        (work / "out" / "results.json").unlink()
        assert read(work / "out") == "old"
        assert os.listdir(work) == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_nothing_is_left_of_a_failure(self, work, way, error):
        write(work / "out", "old")
        for target in (work / "out", work / "a" / "b"):
            with pytest.raises(error), atomic(target, "thing", 0, marker=MARKER) as folder:
                (folder / "file").write_text("half")
                raise error
        assert read(work / "out") == "old"
        assert os.listdir(work) == ["out"]

    def test_readers_never_find_it_missing(self, work):
        """With an exchange there is no moment between two renames."""
        write(work / "out", "old")
        code = "import sys\nwhile True: open(sys.argv[1]).close()"
        reader = subprocess.Popen([sys.executable, "-c", code, work / "out" / MARKER], stderr=subprocess.PIPE)
        for _ in range(10):
            write(work / "out")
        assert reader.poll() is None, reader.communicate()[1]
        reader.kill()
        reader.communicate()

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_the_umask(self, work, mask):
        before = os.umask(mask)
        try:
            write(work / "out")
            replace_file(work / "file", b"text")
            assert disk.current_umask() == mask
        finally:
            os.umask(before)
        assert (work / "out").stat().st_mode & 0o777 == 0o777 & ~mask
        assert (work / "file").stat().st_mode & 0o777 == 0o666 & ~mask

    def test_the_mode_of_the_folder_stays(self, work):
        (work / "out").mkdir()
        (work / "out").chmod(0o2750)
        write(work / "out")
        assert (work / "out").stat().st_mode & 0o7777 == 0o2750

    def test_a_place_that_cannot_be_renamed_to(self, work, monkeypatch):
        """A layer of a container's image, say: its entries can be moved, it cannot."""
        write(work / "out", "old")
        number = (work / "out").stat().st_ino
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if work / "out" in (self, target):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
        write(work / "out")
        assert read(work / "out") == "new"
        assert (work / "out").stat().st_ino == number
        assert os.listdir(work) == ["out"]


class TestTargets:
    def refused(self, target: Path, *says: str, force: bool = False, keep: tuple[Path, ...] = ()) -> None:
        with pytest.raises(MesaError) as error:
            check(target, force=force, keep=keep)
        assert all(text in str(error.value) for text in says), error.value

    def test_a_foreign_folder(self, work):
        (work / "ext").mkdir()
        (work / "ext" / "thesis.js").write_text("ten years")
        self.refused(work / "ext", "exists and is no thing", "--force")
        (work / "ext" / MARKER).write_text("of a browser")
        self.refused(work / "ext", "exists and is no thing", "--force")

    def test_what_a_user_keeps_in_one_of_ours(self, work):
        write(work / "out")
        (work / "out" / "sub" / "notes").symlink_to("nowhere")
        self.refused(work / "out", "holds sub/notes, which is not the thing's", "--force")

    @pytest.mark.parametrize("force", [False, True])
    def test_the_source_is_never_replaced(self, work, force):
        source = work / "models" / "source"
        source.mkdir(parents=True)
        (work / "link").symlink_to("models/source")
        (work / "loop").symlink_to(work)
        for target in (source, work / "link", work / "loop" / "link", source / ".." / "source", work / "models" / ""):
            self.refused(target, "the source", force=force, keep=(source,))
        for target in (work, work / "loop", Path("/"), source / "out", work / "link" / "a" / "b"):
            self.refused(target, "the source", force=force, keep=(source,))
        check(work / "models" / "out", force=force, keep=(source,))
        check(work / "models" / "source-2", force=force, keep=(source,))

    def test_the_files_that_a_source_links_to(self, work):
        """As a hub cache stores them."""
        blobs, source = work / "models--x--y" / "blobs", work / "models--x--y" / "snapshots" / "1"
        blobs.mkdir(parents=True)
        source.mkdir(parents=True)
        (blobs / "weights").write_text("")
        (source / "weights").symlink_to("../../blobs/weights")
        for target in (blobs, blobs.parent, source, blobs / "out", blobs.parent / "out"):
            self.refused(target, "the source", force=True, keep=(source,))
        (work / "ckpt").mkdir()
        (work / "ckpt" / "weights").symlink_to(blobs / "weights")
        self.refused(blobs, "holds the source", force=True, keep=(work / "ckpt",))

    def test_links(self, work):
        (work / "dangling").symlink_to("nowhere")
        self.refused(work / "dangling", "is a link to nowhere, which does not exist", force=True)
        (work / "self").symlink_to("self")
        self.refused(work / "self", "is a link to self", force=True)
        (work / "real").mkdir()
        (work / "link").symlink_to("real")
        for text in ("old", "new"):
            write(work / "link", text)
            assert read(work / "real") == text
        assert os.readlink(work / "link") == "real"
        assert sorted(os.listdir(work)) == ["dangling", "link", "real", "self"]

    def test_no_names(self, work):
        self.refused(work / ("a" * 300), "the name is too long")
        with pytest.raises(MesaError, match="'' is no name of a folder"):
            check_target("", MARKER, "thing", force=True)
        self.refused(work / "a\0b", "is no name of a folder")
        (work / "file").write_text("")
        self.refused(work / "file", "is a file", "--force")

    @pytest.mark.parametrize("name", ["a" * 250, "é" * 125, "a b\nc", "-o", "a.partial"])
    def test_odd_names(self, work, name):
        for text in ("old", "new"):
            write(work / name, text)
        assert read(work / name) == "new"
        assert os.listdir(work) == [name]

    def test_neither_folder_nor_file(self, work):
        os.mkfifo(work / "pipe")
        self.refused(work / "pipe", "is neither a folder nor a plain file", force=True)
        self.refused(Path("/dev/null"), "is neither a folder nor a plain file", force=True)

    def test_not_even_by_force(self, work, monkeypatch):
        home = work / "home"
        (home / "project" / "here").mkdir(parents=True)
        (home / "project" / "thesis").write_text("ten years")
        monkeypatch.setenv("HOME", str(home))
        self.refused(home, "your home folder", force=True)
        self.refused(work, "your home folder", force=True)
        monkeypatch.chdir(home / "project" / "here")
        self.refused(Path(".."), "what the working folder lies in", force=True)

    def test_the_working_folder(self, work, monkeypatch):
        """Whoever is in it stays in it."""
        monkeypatch.chdir(work)
        for text in ("old", "new"):
            write(Path("."), text)
            assert read(work) == text
        assert read(Path(".")) == "new"


root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount file systems")


@pytest.fixture
def mount(work) -> Iterator[Callable[..., Path]]:
    mounted: list[Path] = []

    def make(name: str, *options: str, source: str = "tmpfs") -> Path:
        folder = work / name
        folder.mkdir()
        if subprocess.run(["mount", *options, source, folder], capture_output=True, check=False).returncode:
            pytest.skip("may not mount here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@root
class TestMounts:
    def test_a_mount_point(self, work, mount):
        volume = mount("volume", "-t", "tmpfs")
        for text in ("old", "new"):
            write(volume, text)
            assert read(volume) == text
        assert os.listdir(work) == ["volume"]

    def test_one_of_the_same_file_system(self, work, mount, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        volume = mount("volume", "--bind", source=str(tmp_path / "elsewhere"))
        assert not os.path.ismount(volume)  # as Python sees it
        for text in ("old", "new"):
            write(volume, text)
            assert read(tmp_path / "elsewhere") == text

    def test_it_may_not_be_below_the_output(self, work, mount):
        (work / "out").mkdir()
        inner = mount("out/inner", "-t", "tmpfs")
        (inner / "thesis").write_text("ten years")
        with pytest.raises(MesaError, match="holds the mount point"):
            check(work / "out", force=True)

    def test_a_read_only_file_system(self, work, mount):
        place = mount("place", "-t", "tmpfs", "-o", "ro")
        for target in (place / "out", place):
            with pytest.raises(MesaError, match="Read-only|may not be written to"):
                write(target)

    def test_a_full_one(self, work, mount):
        place = mount("place", "-t", "tmpfs", "-o", "size=64k")
        write(place / "out", "old")
        with pytest.raises(MesaError, match="the disk is full"), atomic(place / "out", "thing", 0) as folder:
            (folder / "file").write_bytes(bytes(100_000))
        assert read(place / "out") == "old"
        assert os.listdir(place) == ["out"]

    def test_a_layer_of_an_image(self, work, mount):
        for name in ("lower/out", "upper", "work"):
            (work / "layers" / name).mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work / "layers"], check=True)
        try:
            for name in ("lower", "upper", "work"):
                (work / "layers" / name).mkdir()
            write(work / "layers" / "lower" / "out", "old")
            options = ",".join(f"{key}dir={work}/layers/{key}" for key in ("lower", "upper", "work"))
            place = mount("place", "-t", "overlay", "-o", options, source="overlay")
            write(place / "out")
            assert read(place / "out") == "new"
            assert os.listdir(place) == ["out"]
            subprocess.run(["umount", place], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
        finally:
            subprocess.run(["umount", "-l", work / "layers"], check=True)

    def test_only_the_output_may_be_written_to(self, work):
        """A volume in a read-only container; another user's folder."""
        (work / "out").mkdir()
        os.chown(work / "out", 65534, 65534)
        for folder in (work, *work.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
        process = os.fork()
        if not process:
            status = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                write(work / "out", "old")
                write(work / "out")
                with pytest.raises(MesaError, match="cannot write .*: Permission denied"):
                    write(work / "other")
                os.chmod(work / "out", 0o555)
                with pytest.raises(MesaError, match="may not be written to"):
                    write(work / "out")
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert read(work / "out") == "new"
        assert os.listdir(work) == ["out"]


def in_a_child(run: Callable[[], None]) -> int:
    """Its exit status, negative if a signal has ended it."""
    process = os.fork()
    if not process:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class TestCrashes:
    """A process is killed in the middle; the next one brings back what was there, and clears the rest."""

    def killed(self, target: Path) -> None:
        assert in_a_child(lambda: write(target)) == -signal.SIGKILL

    def test_while_it_writes(self, work, way, monkeypatch):
        write(work / "out", "old")
        with monkeypatch.context() as patch:
            patch.setattr("mesart.export.folders.sync_folder", die)
            self.killed(work / "out")
        lines = check(work / "out")
        assert len(lines) == 1
        assert "which a killed export had left over" in lines[0]
        assert read(work / "out") == "old"
        assert os.listdir(work) == ["out"]

    def test_between_two_renames(self, work, monkeypatch):
        write(work / "out", "old")
        with monkeypatch.context() as patch:
            patch.setattr(swap, "exchange", lambda *_: False)
            patch.setattr(swap, "rename_new", die)
            self.killed(work / "out")
        assert not (work / "out").exists()
        assert "brought back" in check(work / "out")[0]
        assert read(work / "out") == "old"
        assert os.listdir(work) == ["out"]

    def test_after_the_exchange(self, work, monkeypatch):
        write(work / "out", "old")
        with monkeypatch.context() as patch:
            patch.setattr("mesart.export.folders.sync", die)
            self.killed(work / "out")
        assert read(work / "out") == "new"
        check(work / "out")
        assert os.listdir(work) == ["out"]

    @pytest.mark.parametrize("moves", range(7))
    def test_while_entries_move(self, work, monkeypatch, moves):
        """Three out, three in."""
        write(work / "out", "old")
        monkeypatch.setattr(stage, "_is_fixed", lambda target: True)
        move: Any = shutil.move
        done: list[tuple[str, ...]] = []

        def count(*arguments: str) -> Any:
            if len(done) == moves:
                die()
            done.append(arguments)
            return move(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "move", count)
            patch.setattr(swap, "remove", die)
            patch.setattr(stage, "remove", die)
            self.killed(work / "out")
        if moves < 6:  # what is not whole is none of its kind
            assert moves == 0 or not (work / "out" / MARKER).exists()
        check(work / "out")
        assert read(work / "out") == ("old" if moves < 3 else "new")

    def test_the_living_are_left_alone(self, work):
        with atomic(work / "out", "thing", 0) as folder:
            assert check(work / "out") == []
            assert in_a_child(lambda: write(work / "out", "other")) == 0
            (folder / "file").write_text("still there")
        assert (work / "out" / "file").read_text() == "still there"

    def test_what_is_not_ours_is_left_alone(self, work):
        others = [".out.abc.partial", ".out.two.abcdefgh.partial", ".other.abcdefgh.partial", "out.abcdefgh.partial"]
        for name in others:
            (work / name).mkdir()
        (work / ".out.12345678.partial").mkdir()
        (work / ".out.12345678.partial" / "notes").write_text("ten years")
        lines = check(work / "out")
        assert len(lines) == 1
        assert ".out.12345678.partial may be left over" in lines[0]
        (work / ".out.zzzzzzzz.partial").symlink_to(work / others[0])
        assert len(check(work / "out")) == 1
        assert len(os.listdir(work)) == 6

    @pytest.mark.parametrize("file", [None, "unlocked-abcdefgh"])
    def test_killed_before_it_had_a_lock(self, work, file):
        folder = work / ".out.12345678.partial"
        folder.mkdir()
        if file:
            (folder / file).touch()
        (line,) = check(work / "out")
        assert line == f"removed {folder}, which a killed export had left over"
        assert not list(work.iterdir())

    def test_cleared_before_it_had_a_lock(self, work, monkeypatch):
        """Another export takes a stage that has just been made for one of the dead: it is made again."""
        real, left = stage._lock_new, [1]

        def clear_first(folder):
            if left:
                left.pop()
                folder.rmdir()
            return real(folder)

        monkeypatch.setattr(stage, "_lock_new", clear_first)
        write(work / "out", "new")
        assert read(work / "out") == "new"
        assert os.listdir(work) == ["out"]

    def test_killed_while_it_is_cleared(self, work):
        """The lock goes last, so that the next export knows it for what it is."""
        removed = []
        with atomic(work / "out", "thing", 0) as folder:
            for name in ("a", "z"):
                (folder / name).touch()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage, "remove", lambda path: removed.append(path.name))
                stage._remove_stage(folder)
        assert removed[-1] == folder.name
        assert sorted(removed[:-1]) == ["a", "z"]

    def test_a_lock_that_is_a_link(self, work):
        """Whoever may write in the same folder could have put it there."""
        folder = work / ".out.12345678.partial"
        folder.mkdir()
        (work / "victim").write_text("")
        (folder / "owner.lock").symlink_to(work / "victim")
        assert check(work / "out") == []
        assert folder.is_dir()

    @pytest.mark.parametrize("exchange", [True, False])
    def test_two_at_once(self, work, monkeypatch, exchange):
        if not exchange:
            monkeypatch.setattr(swap, "exchange", lambda *_: False)
        for attempt in range(8):
            target = work / f"out{attempt}"
            if attempt % 2:
                write(target, "old")
            start = time.monotonic() + 0.02
            children = []
            for text in ("one", "two"):
                child = os.fork()
                if not child:
                    status = 3
                    try:
                        with atomic(target, "thing", 0, marker=MARKER) as folder:
                            for name in (MARKER, "file"):
                                (folder / name).write_text(text)
                            time.sleep(max(0.0, start - time.monotonic()))
                        status = 0
                    except MesaError:
                        status = 2
                    finally:
                        os._exit(status)
                children.append(child)
            codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
            assert codes in ([0, 0], [0, 2])
            assert sorted(os.listdir(target)) == ["file", MARKER]
            assert (target / MARKER).read_text() == (target / "file").read_text() in ("one", "two")
            assert not [name for name in os.listdir(work) if name.startswith(".")]


class TestFiles:
    def test_only_new_names(self, work):
        (work / "victim").write_text("ten years")
        (work / "link").symlink_to("victim")
        (work / "dangling").symlink_to("nowhere")
        (work / "source").write_text("bytes")
        for name in ("victim", "link", "dangling"):
            with pytest.raises(FileExistsError):
                write_new(work / name, "text")
            ways: list[Way] = ["clone", "link", "copy"]
            for way in ways:
                with pytest.raises(FileExistsError):
                    link_or_copy(work / "source", work / name, (way,))
        assert (work / "victim").read_text() == "ten years"
        assert not (work / "nowhere").exists()

    @pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES])
    def test_a_copy_where_there_are_no_links(self, work, monkeypatch, number):
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        (work / "source").write_bytes(bytes(range(256)) * 17_000)
        monkeypatch.setattr(os, "link", refuse)
        way, digest = link_or_copy(work / "source", work / "target")
        assert (way, digest) == ("copy", disk_digest(work / "source"))
        assert (work / "target").read_bytes() == (work / "source").read_bytes()
        assert (work / "target").stat().st_ino != (work / "source").stat().st_ino

    def test_a_copy_is_as_private_as_its_source(self, work):
        (work / "source").write_text("bytes")
        for mode in (0o600, 0o640, 0o444):
            (work / "source").chmod(mode)
            link_or_copy(work / "source", work / f"{mode}", ("copy",))
            assert (work / f"{mode}").stat().st_mode & 0o777 == mode

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
    def test_no_copy_for_other_reasons(self, work, monkeypatch, number):
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        (work / "source").write_text("")
        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            link_or_copy(work / "source", work / "target")
        assert not (work / "target").exists()

    def test_a_clone_where_there_are_none(self, work, monkeypatch):
        (work / "source").write_text("bytes")

        def refuse(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(fcntl, "ioctl", refuse)
        assert link_or_copy(work / "source", work / "linked", ("clone", "link"))[0] == "link"
        assert link_or_copy(work / "source", work / "copied", ("clone",))[0] == "copy"
        assert (work / "linked").samefile(work / "source")
        assert not (work / "copied").samefile(work / "source")

    def test_a_clone(self, work, monkeypatch):
        (work / "source").write_text("bytes")
        monkeypatch.setattr(fcntl, "ioctl", lambda to, code, source: os.sendfile(to, source, 0, 100))
        assert link_or_copy(work / "source", work / "target", ("clone", "link")) == ("clone", None)
        assert (work / "target").read_text() == "bytes"

    def test_a_file_is_replaced_all_or_nothing(self, work, monkeypatch):
        (work / "victim").write_text("ten years")
        (work / "link").symlink_to("victim")
        os.link(work / "victim", work / "hard")
        for name in ("link", "hard", "new"):
            replace_file(work / name, b"text")
            assert (work / name).read_bytes() == b"text"
            assert not (work / name).is_symlink()
        assert (work / "victim").read_text() == "ten years"
        dead, alive = work / ".new.abcdefgh.partial", work / ".new.ijklmnop.partial"
        dead.write_text("half")
        with alive.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            replace_file(work / "new", b"more")
        assert not dead.exists()
        assert alive.exists()

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (OSError(errno.ENOSPC, "No space"), "the disk is full: place needs about 3 MiB"),
            (OSError(errno.EDQUOT, "Quota"), "the disk is full: your quota is used up"),
            (OSError(errno.EFBIG, "Large"), "cannot write place: a file is larger than its file system"),
            (OSError(errno.EROFS, "Read-only file system", "x"), "cannot write place: Read-only file system (x)"),
            (PermissionError(errno.EACCES, "Permission denied"), "cannot write place: Permission denied"),
            (Exception("No space left on device (os error 28)"), "the disk is full"),
            (Exception("File too large (os error 27)"), "a file is larger than its file system"),
        ],
    )
    def test_errors_are_one_line(self, error, says):
        with pytest.raises(MesaError) as caught, explained(Path("place"), 3 << 20):
            raise error
        assert says in str(caught.value)

    def test_other_errors_are_none(self):
        for error in (
            RuntimeError("a fault of ours"),
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            KeyboardInterrupt(),
        ):
            with pytest.raises(type(error)), explained(Path("place")):
                raise error


def disk_digest(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


class TestBundles:
    def test_what_a_bundle_consists_of(self, bundle_copy):
        own = bundle_entries(bundle_copy)
        assert {path.relative_to(bundle_copy).as_posix() for path in bundle_copy.rglob("*")} <= set(own)
        (bundle_copy / "engines" / "set").mkdir(parents=True)
        entry = json.dumps({"engine": {"file": "engines/set/built.plan.gz"}})
        (bundle_copy / "engines" / "build.jsonl").write_bytes(b'{"engi\xff\n[1]\n' + entry.encode() + b'\n{"engine": 3')
        for name in ("built.plan.gz", ".built.plan.gz.abcdefgh.partial"):
            (bundle_copy / "engines" / "set" / name).write_text("")
        (bundle_copy / "engines" / "tensorrt.timing").write_text("")
        self.check(bundle_copy)
        (bundle_copy / "engines" / "set" / "bought.plan.gz").write_text("")
        with pytest.raises(MesaError, match=r"holds engines/set/bought.plan.gz, which is not the bundle's"):
            self.check(bundle_copy)

    def check(self, bundle: Path) -> None:
        check_target(bundle, MANIFEST_FILE, "bundle", force=False, entries=bundle_entries)

    def test_a_manifest_of_something_else(self, work):
        for text in (
            '{"manifest_version": 3}',
            "[]",
            "{",
            '{"files": 1}',
            '{"schema_version": 1, "files": {"thesis": 0}}',
        ):
            (work / MANIFEST_FILE).write_text(text)
            (work / "thesis").write_text("ten years")
            with pytest.raises(MesaError, match="exists and is no bundle"):
                self.check(work)

    def test_an_older_schema(self, bundle_copy, monkeypatch):
        def refuse(bundle: Path) -> None:
            raise MesaError("has another schema")

        path = bundle_copy / MANIFEST_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
        monkeypatch.setattr(contents, "SCHEMA_VERSION", 2)
        monkeypatch.setattr(Manifest, "read", refuse)
        self.check(bundle_copy)
        (bundle_copy / "notes").write_text("a day")
        with pytest.raises(MesaError, match="holds notes, which is not the bundle's"):
            self.check(bundle_copy)

    def test_names_of_weight_files(self):
        files = ["model.safetensors", "a/model.safetensors", "b/MODEL.safetensors", "weights.safetensors"]
        files += ["checkpoint-weights.safetensors", "model.onnx", "manifest.json", "config.json.safetensors"]
        files += ["engines", ".hidden.safetensors", "a" * 240 + ".safetensors", "\ud800é.safetensors", "rerotate.onnx"]
        named = name_files(map(Path, files))
        names = list(named.values())
        assert names[:2] == ["model.safetensors", "checkpoint-model.safetensors"]
        assert len({name.lower() for name in [*names, WEIGHTS_FILE]}) == len(files) + 1
        for name in names:
            assert name.isascii()
            assert len(name) < 120
            assert name.endswith(".safetensors")
            assert not name.startswith(".")


def test_a_stage_is_no_output_of_a_calibration(work):
    """The calibrated model, which is then exported, lies in a stage; it may lie in the output."""
    (work / "out").mkdir()
    with staged(work / "out", MARKER) as made:
        require_apart(work / "out", made.folder)
        inside = work / "out" / made.folder.name
        inside.mkdir()
        (inside / "model").mkdir()
        require_apart(work / "out", inside / "model")
        check(work / "out")
        assert is_stage(real_place(work / "out"), made.folder.name)
    lines: list[str] = []
    clear_leftovers(work / "out", MARKER, lines.append)
    assert len(lines) == 1
