"""Files of results: refused before the work, written all or nothing after it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesart.evaluation.output import WriteError, require_file, require_folder, write_file


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    require_file(path)
    assert list(tmp_path.iterdir()) == [], "the check leaves nothing"
    write_file(path, "new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    path.chmod(0o640)
    require_file(path)
    assert path.read_bytes() == b"new\r\n"
    write_file(path, b"newer")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"newer", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_old_results_survive_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with full_disk(10), pytest.raises(WriteError, match=r"cannot write .*results\.json: File too large"):
        write_file(path, "new" * 100)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("real/results.json")
    require_file(link)
    write_file(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "results.json").read_text() == "new"


def test_devices_are_written_as_they_are() -> None:
    before = os.stat("/dev/null")
    require_file("/dev/null")
    write_file("/dev/null", "x")
    assert os.stat("/dev/null").st_ino == before.st_ino
    require_file("/dev/full")
    with pytest.raises(WriteError, match="No space left"):
        write_file("/dev/full", "x")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/x.json", "No such file or directory; make its folder first"),
        ("", "Is a directory"),
        ("file/x.json", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels"),
    ],
)
def test_what_cannot_be_written_is_found_out_before(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(WriteError, match=f"cannot write .*: {reason}"):
        require_file(tmp_path / name)
    with pytest.raises(WriteError):
        write_file(tmp_path / name, "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "closed" / "results.json"
    path.parent.mkdir()
    path.write_text("old")
    path.parent.chmod(0o500)
    write_file(path, "a file that may be written, in a folder that may not")
    with pytest.raises(WriteError, match="Permission denied"):
        require_file(path.with_name("other.json"))
    with pytest.raises(WriteError, match="no files can be made in"):
        require_folder(path.parent / "new")
    path.parent.chmod(0o700)


def test_folders(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for name in ("file", "file/b"):
        with pytest.raises(WriteError, match="cannot write .*"):
            require_folder(tmp_path / name)
    with pytest.raises(WriteError, match="/dev/null/x"):
        require_folder("/dev/null/x")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
