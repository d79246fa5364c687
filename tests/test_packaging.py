"""The sdist and the wheel: built without a network, and checked to the last file."""

import email
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mesart

FOLDERS = ("graphs", "export", "runtime", "evaluation", "scripts")
EXTRAS = {"calibrate", "dev", "eval", "export", "gpu", "lm-eval", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"}
DIST_INFO = f"mesart-{mesart.__version__}.dist-info"


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"python {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(folder: Path) -> set[str]:
    """The files that are to be installed from the tree at ``folder``, by their names in the wheel."""
    expected = {"mesart/__init__.py", "mesart/py.typed"}
    expected |= {f"mesart/{path.relative_to(folder)}" for name in FOLDERS for path in (folder / name).rglob("*.py")}
    demo_model = (folder / "evaluation" / "demo_model").glob("*")
    expected |= {f"mesart/evaluation/demo_model/{path.name}" for path in demo_model}
    return expected


def test_sdist_and_wheel(clone: Path) -> None:
    """The wheel comes from the sdist, as an installer without a wheel would build it: so both are complete."""
    python("-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=clone)
    sdist = clone / "dist" / f"mesart-{mesart.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "graphs/method/plan.py",
    } <= names
    assert not [name for name in names if re.match(r"mesart/[^/]+/", name)], "a folder travels twice"

    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "wheel", *offline, "-w", "dist", str(sdist), cwd=clone)
    wheel = clone / "dist" / f"mesart-{mesart.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    info = {f"{DIST_INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    assert set(contents) == files_of(clone) | info | {f"{DIST_INFO}/licenses/LICENSE"}
    assert contents[f"{DIST_INFO}/entry_points.txt"].decode() == "[console_scripts]\nmesart = mesart.scripts.cli:main\n"
    assert contents[f"{DIST_INFO}/top_level.txt"].decode() == "mesart\n"
    check_metadata(contents[f"{DIST_INFO}/METADATA"].decode())

    python("-m", "pip", "install", *offline, "--target", str(clone / "site"), str(wheel), cwd=clone)
    check_import(clone / "site")


def check_metadata(text: str) -> None:
    metadata = email.message_from_string(text)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=!~ ]", line)[0] for line in base} == {"numpy", "tokenizers", "jinja2", "tqdm"}


def check_import(site: Path) -> None:
    """What was installed imports, from where it was installed, and took no general name."""
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(site)!r})
import mesart.graphs
print(mesart.__version__, mesart.graphs.__file__)
print([name for name in {FOLDERS!r} if importlib.util.find_spec(name)])
"""
    out = python("-I", "-c", code, cwd=site.parent.parent).splitlines()
    assert out == [f"{mesart.__version__} {site / 'mesart' / 'graphs' / '__init__.py'}", "[]"]


def test_installed_version() -> None:
    assert importlib.metadata.version("mesart") == mesart.__version__


def test_console_script() -> None:
    """The command that pip put beside this Python starts."""
    command = Path(sys.executable).with_name("mesart")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
