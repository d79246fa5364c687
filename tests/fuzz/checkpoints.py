"""Damaged and hostile checkpoints, exported: refused in one line, or a bundle that is right.

    python -m tests.fuzz.checkpoints --seed 7 --cases 1000 [--only INDEX] [--traced 0.1]

Most exports leave the tracing out. A share is traced, and then gives the logits of transformers' own loading. Whatever
comes of it: nothing but the output is written, the checkpoint's files least of all.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from tests.fuzz.golden import make_checkpoint
from tests.fuzz.graph_changes import join_safetensors, mutate_weights, split_safetensors
from tests.fuzz.mesart_command import import_ahead, leave_out_tracing, run_command
from tests.fuzz.texts import KNOWN, mutate_texts, remote_code
from tests.fuzz.values import mutate_bytes, mutate_json, odd_value, once_more
from tests.fuzz.workers import OTHER, REFUSED, SAME, Case, Fault, make_in_fork

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_NAMES = (
    *(
        "a/model.safetensors",
        "b/model.safetensors",
        "weights.safetensors",
        "checkpoint-weights.safetensors",
        "model.onnx",
    ),
    *("manifest.json", "config.json", "tokenizer.json", "../victim/model.safetensors", "../victim/new.safetensors"),
    *(
        "./model.safetensors",
        "a/../model.safetensors",
        "x" * 230 + ".safetensors",
        "é.safetensors",
        "model.SAFETENSORS",
    ),
    *(
        "model-1.safetensors\n",
        ".safetensors",
        "engines/x.safetensors",
        "pytorch_model.bin",
        "model",
        "rerotate.onnx.safetensors",
    ),
)
TEXT_WEIGHTS = {"tokenizer.json": 5, "tokenizer_config.json": 4, "generation_config.json": 4, "chat_template.jinja": 2}


class Checkpoints:
    """The target: small checkpoints of one file, of two, and of a pickle."""

    name = "checkpoints"
    writes: Sequence[str] = ("work/out",)
    limit = 10.0

    def __init__(self, folder: Path, traced: float) -> None:
        self.folder, self.traced = folder, traced
        self.files: dict[str, bytes] = {}
        self.pickle = b""

    def prepare(self) -> None:
        import torch
        from safetensors.torch import load

        import_ahead()
        torch.set_num_threads(1)
        make_in_fork(lambda: make_checkpoint(self.folder))
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        torch.save(load(self.files[SINGLE]), self.folder / "pickle")
        self.pickle = (self.folder / "pickle").read_bytes()

    def run(self, case: Case) -> str:
        rng = case.rng
        folder = case.work / "checkpoint"
        layout = rng.choices(("single", "sharded", "pickle"), (6, 3, 1))[0]
        self._write(folder, layout, rng)
        (case.victim / SINGLE).write_bytes(self.files[SINGLE])
        for name in ("model.onnx", "manifest.json", "new.safetensors.bak"):
            (case.victim / name).write_bytes(b"ten years")
        said = [layout]
        for _ in range(rng.choice((1, 1, 1, 2))):
            said.append(once_more(lambda: self._change(case, folder, layout), len(said) > 1))
        options = _options(rng)
        is_traced = rng.random() < self.traced
        if is_traced:
            case.limit = 90.0
        else:
            leave_out_tracing()
        if rng.random() < 0.08:
            _occupy(case, rng, options)
        case.said([*said, " ".join(options), "traced" if is_traced else "not traced"])
        done = case.attempt("export", lambda: run_command(["export", "checkpoint", "-o", "out", *options]))
        if done is None:
            if (case.work / "out" / "manifest.json").exists() and "--force" not in options and case.may_write:
                raise Fault("a bundle, and an error", "export", case.refusals[0][:200])
            return REFUSED
        case.stage("check")
        _check_bundle(case.work / "out")
        if not is_traced:
            return OTHER
        case.stage("compare")
        return _compare(folder, case.work / "out", options)

    def _write(self, folder: Path, layout: str, rng: Random) -> None:
        folder.mkdir()
        for name, data in self.files.items():
            if name != SINGLE or layout == "single":
                (folder / name).write_bytes(data)
        if layout == "pickle":
            (folder / "pytorch_model.bin").write_bytes(self.pickle)
        if layout == "sharded":
            hostile = rng.random() < 0.4
            names = (
                rng.sample(SHARD_NAMES, 2)
                if hostile
                else ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
            )
            header, body = split_safetensors(self.files[SINGLE])
            header.pop("__metadata__", None)
            keys = sorted(header)
            weight_map = {}
            for name, part in ((names[0], keys[: len(keys) // 2]), (names[1], keys[len(keys) // 2 :])):
                fields, data = {}, b""
                for key in part:
                    start, stop = header[key]["data_offsets"]
                    fields[key] = {**header[key], "data_offsets": [len(data), len(data) + stop - start]}
                    data += body[start:stop]
                    weight_map[key] = name
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(join_safetensors(json.dumps({"__metadata__": {"format": "pt"}, **fields}), data))
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": len(body)}, "weight_map": weight_map}))

    def _change(self, case: Case, folder: Path, layout: str) -> str:
        rng = case.rng
        kind = rng.choices(
            ("config", "texts", "weights", "index", "adapter", "files", "code", "nothing"), (30, 22, 22, 6, 3, 6, 1, 3)
        )[0]
        if kind == "config":
            path = folder / "config.json"
            if not path.is_file():
                return "nothing"
            data, said = mutate_json(rng, path.read_bytes(), KNOWN["config.json"])
            path.write_bytes(data)
            return f"config.json: {said}"
        if kind == "texts":
            return mutate_texts(rng, folder, TEXT_WEIGHTS)
        if kind == "weights":
            return self._mutate_weights(rng, folder, layout)
        if kind == "index":
            return _mutate_index(case, folder)
        if kind == "adapter":
            settings = {"peft_type": "LORA", "base_model_name_or_path": rng.choice(("../victim", "nobody/nothing", 3))}
            (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": rng.choice((8, "x"))}))
            (folder / "adapter_model.safetensors").write_bytes(
                rng.choice((self.files[SINGLE], b"", rng.randbytes(100)))
            )
            return "an adapter"
        if kind == "code":
            return remote_code(folder)
        if kind == "files":
            return _mutate_files(case, folder)
        return "nothing"

    def _mutate_weights(self, rng: Random, folder: Path, layout: str) -> str:
        if layout == "pickle":
            data, said = rng.choice(_PICKLES)(rng, self.pickle)
            (folder / "pytorch_model.bin").write_bytes(data)
            return f"pickle: {said}"
        paths = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
        return mutate_weights(rng, rng.choice(paths)) if paths else "nothing"


class _Touch:
    """What a hostile pickle does."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ../victim/canary",)


_PICKLES: tuple[Callable[[Random, bytes], tuple[bytes, str]], ...] = (
    mutate_bytes,
    lambda rng, data: (pickle.dumps(_Touch()), "runs a command"),
    lambda rng, data: (pickle.dumps({"model.norm.weight": _Touch()}, rng.randrange(6)), "runs a command in a dict"),
    lambda rng, data: (pickle.dumps(odd_value(rng)), "an odd value"),
    lambda rng, data: (pickle.dumps({"a": [1, 2], 3: "x"}), "no tensors"),
    lambda rng, data: (b"", "empty"),
    lambda rng, data: (b"PK\x03\x04" + rng.randbytes(200), "a broken archive"),
    lambda rng, data: (b"\x80\x02" + b"(" * 100_000 + b".", "marks only"),
)


def _options(rng: Random) -> list[str]:
    options = ["--max-tokens", str(rng.choice((64, 104, 104, 200, 300)))]
    if rng.random() < 0.2:
        options += ["--dtype", rng.choice(("float16", "bfloat16", "float32"))]
    if rng.random() < 0.2:
        options += ["--weights", "copy"]
    if rng.random() < 0.1:
        options += ["--quantise", rng.choice(("int8", "int4")), *rng.choice(([], ["--group-size", "16"]))]
    if rng.random() < 0.1:
        options.append("--force")
    if rng.random() < 0.5:
        options += ["--head-length", "8", "--chunk-length", "40", "--tail-min", "16", "--linear-window", "8"]
    return options


def _occupy(case: Case, rng: Random, options: list[str]) -> None:
    """Something of the user's is where the bundle is to be; without --force it stays."""
    out = case.work / "out"
    way = rng.randrange(4)
    if way == 0:
        out.write_text("thesis")
    elif way == 1:
        out.mkdir()
        (out / "manifest.json").write_text(rng.choice(("{}", '{"name": "web app"}', "", '{"schema_version": 2}')))
        (out / "thesis.txt").write_text("x")
    elif way == 2:
        out.symlink_to("../victim")
    else:
        (out / "sub").mkdir(parents=True)
        (out / "sub" / "thesis.txt").write_text("x")
    if "--force" not in options:
        case.may_write = ()
        case.must_refuse = "an output that is the user's"
    elif way == 2:
        case.may_write = ("work/out", "victim")  # the folder that the link means


def _mutate_index(case: Case, folder: Path) -> str:
    rng, path = case.rng, folder / INDEX
    weight_map = {"model.norm.weight": SINGLE, "model.embed_tokens.weight": SINGLE}
    tree: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    if path.is_file():
        tree = json.loads(path.read_text())

    def name(rng: Random, tree: dict[str, Any]) -> str:
        key = rng.choice(list(tree["weight_map"]) or ["x"])
        tree["weight_map"][key] = rng.choice(
            (*SHARD_NAMES, str(case.victim / SINGLE), "/dev/zero", "nope.safetensors", 3, None)
        )
        return f"{key} in {tree['weight_map'][key]!a:.60}"

    data, said = mutate_json(
        rng,
        json.dumps(tree).encode(),
        lambda rng, tree: (
            name(rng, tree) if "weight_map" in tree and isinstance(tree["weight_map"], dict) else "nothing"
        ),
    )
    path.write_bytes(data)
    return f"index: {said}"


def _mutate_files(case: Case, folder: Path) -> str:
    rng = case.rng
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / rng.choice(names)
    way = rng.randrange(7)
    if way == 0:
        for name in ("tekken.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"):
            if rng.random() < 0.5:
                (folder / name).write_bytes(rng.choice((b"", b"{}", b"[]", rng.randbytes(50))))
        if rng.random() < 0.5:
            (folder / "tokenizer.json").unlink(missing_ok=True)
        return "other tokenizer files"
    data = path.read_bytes()
    path.unlink()
    if way == 1:
        return f"{path.name} missing"
    if way == 2:
        path.mkdir()
        return f"{path.name} is a folder"
    if way == 3:
        os.mkfifo(path)
        return f"{path.name} is a pipe"
    if way == 4:
        path.write_bytes(rng.choice((b"", data[: len(data) // 2], data + b"\0")))
        return f"{path.name} cut off, or longer"
    twin = case.victim / path.name
    twin.write_bytes(data)
    path.symlink_to(rng.choice((f"../../victim/{path.name}", str(twin), path.name, "nope", "/dev/zero")))
    return f"{path.name} links to {os.readlink(path)[-40:]}"


def _check_bundle(out: Path) -> None:
    """Its manifest holds, and the safetensors library reads all its weights."""
    from safetensors import SafetensorError, safe_open

    manifest = Manifest.read(out)
    manifest.verify(out)
    for name in manifest.weight_files:
        try:
            with safe_open(out / name, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  (it is no dict)
                    file.get_slice(key).get_shape()
        except SafetensorError as error:
            raise Fault("exported what safetensors refuses", name, str(error)[:200]) from error


def _compare(folder: Path, out: Path, options: Sequence[str]) -> str:
    """Runs a prompt that the plain model can see whole, and compares with transformers' own loading."""
    import torch
    from transformers import AutoModelForCausalLM

    from mesart.runtime import MesaModel

    dtype = options[options.index("--dtype") + 1] if "--dtype" in options else "float32"
    ids = [3, 9, 44, 5, 60, 17, 250, 9, 9, 100]
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        index = Path(copy) / INDEX
        if index.is_file() and not (folder / SINGLE).is_file():
            fields = json.loads(index.read_bytes())  # transformers wants metadata, and uses nothing of it
            index.write_text(json.dumps({"metadata": {}, **fields}))
        try:
            model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, attn_implementation="eager")
        except BaseException as error:
            raise Fault("exported what transformers refuses", type(error).__name__, str(error)[:200]) from error
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = [token % vocabulary for token in ids]
    with torch.no_grad():
        wanted = model.to(getattr(torch, dtype))(torch.tensor([ids])).logits.float().numpy()
    if not np.isfinite(wanted).all():
        return OTHER
    with MesaModel.load(out, "torch" if dtype == "bfloat16" else "onnxruntime", threads=1) as loaded:
        got = loaded.prefill(ids, all_logits=True)
    scale = max(1.0, float(np.abs(wanted).max()))
    tolerance = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}[dtype] if "--quantise" not in options else 0.5
    if got.shape != wanted.shape or float(np.abs(got - wanted).max()) > tolerance * scale:
        detail = f"{got.shape} {wanted.shape} {np.abs(got - wanted).max() if got.shape == wanted.shape else ''}"
        raise Fault("other numbers", "than transformers'", detail)
    return SAME


if __name__ == "__main__":
    from tests.fuzz.command import main

    sys.exit(main(["checkpoints", *sys.argv[1:]]))
