"""Who may import whom. The import rules of graphs/ruff.toml and its sisters, and what lint cannot see."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> the folders that it may import, beside itself
MAY_IMPORT = {
    "graphs": set[str](),
    "export": {"graphs"},
    "runtime": {"graphs"},
    "evaluation": {"graphs", "export", "runtime"},
    "scripts": {"graphs", "export", "runtime", "evaluation"},
}
# folder inside graphs -> those of its sisters that it may import; the modules beside the folders may import none
GRAPHS_MAY_IMPORT = {"method": set[str](), "bundle": {"method"}, "model": {"method", "bundle"}}
# folder -> the packages that it may import, beside the standard library; the others may import any
PACKAGES = {
    "graphs": {"numpy", "transformers"},  # its cache of the hub, where a hub id is given
    "runtime": {"numpy", "tokenizers", "jinja2", "tqdm", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"},
}
TORCH = {"torch", "transformers"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("mesart", *parts)).removesuffix(".__init__")


def may_need_torch(path: Path) -> bool:
    """Whether a module of graphs or runtime is one that only comes to use where there is torch."""
    return "torch" in path.stem or path.is_relative_to(ROOT / "graphs" / "model")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, at whatever depth; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write mesart.{path.parent.name}..."
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


ALL_MODULES = [path for folder in MAY_IMPORT for path in modules(folder)]


def test_modules_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in ALL_MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", ALL_MODULES, ids=dotted)
def test_imports(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    packages = PACKAGES.get(folder)
    if packages is not None and may_need_torch(path):
        packages = packages | TORCH | {"safetensors"}
    faults = []
    for line, name in imports(path):
        top, *rest = name.split(".")
        if top in MAY_IMPORT:
            faults.append(f"line {line}: {name}: it is installed as mesart.{name}")
        elif top == "mesart" and rest[0] in MAY_IMPORT and rest[0] not in MAY_IMPORT[folder] | {folder}:
            faults.append(f"line {line}: {name}: {folder} may import {sorted(MAY_IMPORT[folder]) or 'no other folder'}")
        elif packages is not None and top not in packages | sys.stdlib_module_names | {"mesart"}:
            faults.append(f"line {line}: {name}: {folder} may import the packages {sorted(packages)}")
    assert not faults, "\n".join([str(path), *faults])


@pytest.mark.parametrize("path", modules("graphs"), ids=dotted)
def test_imports_inside_graphs(path: Path) -> None:
    """Integers, then the contract, then torch: each knows those before it."""
    if path == ROOT / "graphs" / "__init__.py":  # the names for users, from all folders
        return
    inner, *deeper = path.relative_to(ROOT / "graphs").parts
    allowed = GRAPHS_MAY_IMPORT[inner] | {inner} if deeper else set[str]()
    faults = []
    for line, name in imports(path):
        _, folder, inside, *_ = (*name.split("."), "", "")
        if folder == "graphs" and inside in GRAPHS_MAY_IMPORT and inside not in allowed:
            faults.append(f"line {line}: {name}: {inner} may import {sorted(allowed) or 'none of the folders'}")
    assert not faults, "\n".join([str(path), *faults])


def test_runtime_needs_no_torch() -> None:
    """Every module that a runtime image uses imports where torch and transformers cannot be imported."""
    names = [dotted(path) for path in modules("graphs") + modules("runtime") if not may_need_torch(path)]
    assert {"mesart.graphs.method.plan", "mesart.runtime"} <= set(names)
    # Not an ImportError, which a module might catch; and the traceback shows who asked.
    code = f"""
import importlib, sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TORCH!r}:
            raise AssertionError("the runtime imports " + name)

sys.meta_path.insert(0, Guard())
for name in {names!r}:
    importlib.import_module(name)
assert not {TORCH!r} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
