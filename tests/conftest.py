"""Fixtures that tests of several folders share."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a clone consists of, less the tests.
SOURCES = (
    *("mesart", "graphs", "export", "runtime", "evaluation", "scripts", "docs"),
    *("pyproject.toml", "constraints.txt", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"),
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this source tree, in which a test may build and write."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    return folder
