"""The README is true: every command and every Python example in it is run, in order, in a copy of the tree.

A command too slow or too intrusive for a test has a dry equivalent below that proves it can be called. A block that
cannot be run at all stands in the README behind ``<!-- not run: reason -->`` and in NOT_RUN here.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PIP_DRY = "python -m pip install --dry-run --no-deps --no-index --no-build-isolation"
DRY = {
    "make demo": "make --dry-run demo",
    "make test": "make --dry-run test",
    "make lint": "make --dry-run lint",
    "pip install -c constraints.txt '.[export,onnxruntime]'": f"{PIP_DRY} -c constraints.txt '.[export,onnxruntime]'",
    "pip install '.[onnxruntime]'": f"{PIP_DRY} '.[onnxruntime]'",
}
NOT_RUN: dict[str, str] = {}  # the first line of a block -> the reason, as in the README

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    not_run: str | None

    def commands(self) -> list[str]:
        if self.language == "python":
            return [self.code]
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [Block(match["language"], match["code"], match["reason"]) for match in BLOCK.finditer(text)]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), "a block that this test does not see"
    return found


def test_every_block_is_a_test() -> None:
    assert {block.language for block in blocks()} == {"sh", "python"}, "output and other text is indented, not fenced"
    assert {block.code.splitlines()[0]: block.not_run for block in blocks() if block.not_run} == NOT_RUN
    assert len(NOT_RUN) <= 2
    shown = {command for block in blocks() for command in block.commands()}
    assert set(DRY) <= shown, "a dry equivalent of nothing"


def test_commands_run(clone: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks():
        if block.not_run:
            continue
        for command in block.commands():
            if block.language == "python":
                arguments = [sys.executable, "-c", command]
            else:
                arguments = ["bash", "-euo", "pipefail", "-c", DRY.get(command, command)]
            done = subprocess.run(
                arguments, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, f"{arguments[-1]}\n{done.stdout}\n{done.stderr}"
