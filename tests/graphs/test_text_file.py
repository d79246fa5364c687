"""Texts of users: as they are, to a limit, or one line that says why not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mesart.graphs import MesaError, text_file
from mesart.graphs.text_file import read_text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\r\n", "a\r\nb\r\n"),
        (b"\xef\xbb\xbfhi", "hi"),
        (b"hi\xef\xbb\xbf", "hi\ufeff"),
        (b"a\rb\x85\x00c".replace(b"\x85", "\x85".encode()), "a\rb\x85\x00c"),
        (b"", ""),
    ],
)
def test_byte_for_byte(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "text").write_bytes(data)
    assert read_text(tmp_path / "text") == text


def test_what_is_no_text_is_named_with_its_place(tmp_path: Path) -> None:
    for data, at in ((b"ab\xff", 2), (b"\xef\xbb\xbfa\xff", 4), (b"\xff\xfea\x00", 0), (b"\xed\xa0\x80", 0)):
        (tmp_path / "text").write_bytes(data)
        with pytest.raises(MesaError, match=rf"text is no UTF-8 text .* at byte {at}\)"):
            read_text(tmp_path / "text")


def test_a_text_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "LIMIT", 1 << 20)
    with pytest.raises(MesaError, match="/dev/zero holds more than 1 MiB"):
        read_text("/dev/zero")
    assert read_text("/dev/null") == ""


def test_pipes_are_read_to_their_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"hi\n" * 100_000,))
    writer.start()
    assert read_text(tmp_path / "pipe") == "hi\n" * 100_000
    writer.join()


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, str(tmp_path), "missing"):
        with pytest.raises(OSError, match=r"NUL|too long|directory"):
            read_text(name)
