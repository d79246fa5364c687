"""One meaning a word: no two modules of the product define a public class of one name."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("graphs", "export", "runtime", "evaluation", "scripts/commands")


def test_a_public_class_has_a_name_of_its_own() -> None:
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    modules[node.name].append(str(path.relative_to(ROOT)))
    assert {"Plan", "MesaModel", "Manifest"} <= set(modules)
    assert {name: paths for name, paths in modules.items() if len(paths) > 1} == {}
