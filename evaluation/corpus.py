"""Text that is on every machine: the source of CPython's own standard library (PSF licence).

Files are split by a hash of their path, so training and held-out text never share a file and the split does not move
when files come or go. The text depends on the Python version: record it beside any number measured on this text.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 16  # one file in so many is held out

# Distributions often leave the tests out; `encodings` is mostly generated tables; `site-packages` is not the library.
_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path, relative to the library and with forward slashes, is held out of training."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def library_documents(split: Split) -> list[str]:
    """The documents of a split, one per file, ordered by path. Raises `FileNotFoundError` when there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        path.read_text(encoding="utf-8", errors="replace")
        for relative, path in _library_files(root)
        if is_held_out(relative) == (split == "held_out")
    ]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise FileNotFoundError(
            f"no Python source under {root}: this Python comes without its standard library's source"
        )
    return documents


@cache
def library_text(split: Split) -> str:
    """The documents of a split, joined by a blank line."""
    return "\n\n".join(library_documents(split))


def _library_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Relative and full path of every source file that counts, ordered by the relative path."""
    relatives = (path.relative_to(root) for path in root.rglob("*.py"))
    for relative in sorted(path.as_posix() for path in relatives if not _EXCLUDED_FOLDERS.intersection(path.parts)):
        yield relative, root / relative
