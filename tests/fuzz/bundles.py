"""Damaged and hostile bundles, used as a user would use them.

    python -m tests.fuzz.bundles --seed 7 --cases 2000 [--only INDEX] [--backend openvino] [BUNDLE]

A bundle is damaged (files change, nothing else does) or sealed anew (sizes, hashes and the manifest's own hash are made
to fit: the bundle of an attacker). Both must be refused in one line or run. A damaged one that runs must give the same
numbers; one that is sealed anew may be another model, but writes nothing and runs no code.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mesart.runtime import MesaModel
from tests.fuzz.graph_changes import mutate_graph, mutate_weights
from tests.fuzz.mesart_command import run_command
from tests.fuzz.texts import mutate_texts, remote_code
from tests.fuzz.values import HOSTILE_NAMES, dump, mutate_text, mutate_tree, odd_value, once_more
from tests.fuzz.workers import OTHER, REFUSED, SAME, Case, Fault, check_message, run_cases

MANIFEST = "manifest.json"
SYMBOLIC = {"onnxruntime": "model-grouped.onnx", "openvino": "model-paged.onnx", "torch": "model.onnx"}
PROMPT_TOKENS, TURN_TOKENS = 150, 30
TEXT = "The grass is green. Here we go."
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
    {"role": "user", "content": "The sky is blue. é"},
]
_BOMB = gzip.compress(bytes(16 << 20), 9)
"""16 MiB in 16 KiB; several members in a row are one file."""


@dataclass
class Uses:
    """How a bundle is used."""

    backend: str = "onnxruntime"
    specialised: bool = False
    verify: bool = True


@dataclass
class Seen:
    """What came of it."""

    logits: list[Any] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)

    def equals(self, other: Seen) -> bool:
        """Whether all that this one holds is in the other too; what was refused is not here."""
        return all(
            mine is None or (np.shape(mine) == np.shape(theirs) and np.allclose(mine, theirs, atol=1e-4, rtol=0))
            for mine, theirs in zip(self.logits, other.logits, strict=False)
        ) and all(mine is None or mine == theirs for mine, theirs in zip(self.texts, other.texts, strict=False))


Attempt = Callable[[str, Callable[[], Any]], Any]


def use(bundle: Path, uses: Uses, attempt: Attempt) -> Seen:
    """Reads, inspects, loads and runs a bundle: a prompt past T_r, a turn, steps, text, a chat."""
    seen = Seen()
    attempt("inspect", lambda: inspect(bundle))
    load = lambda: MesaModel.load(bundle, uses.backend, threads=1, specialised=uses.specialised, verify=uses.verify)  # noqa: E731
    model = attempt("load", load)
    if model is None:
        return seen
    vocabulary = 320
    ids = [(37 * i + 11) % (vocabulary - 3) + 3 for i in range(PROMPT_TOKENS)]
    with model:
        seen.logits.append(attempt("prefill", lambda: model.prefill(ids)))
        seen.logits.append(attempt("extend", lambda: model.extend(ids[:TURN_TOKENS])))
        for token in ids[:2]:
            seen.logits.append(attempt("step", partial(model.step, token)))
        seen.logits.append(
            attempt("batch", lambda: model.prefill([ids[:20], ids[:90]])) if not uses.specialised else None
        )
        seen.texts.append(attempt("ends", lambda: model.eos_token_ids))
        seen.texts.append(attempt("sampling", lambda: str(model.default_sampling)))
        seen.texts.append(attempt("generate", lambda: model.generate(TEXT, 6, seed=0)))
        seen.texts.append(attempt("stop", lambda: model.generate(TEXT, 6, stop=["e", "<|end|>"], temperature=0.0)))
        seen.texts.append(attempt("chat", lambda: "".join(model.chat(CHAT, 4, seed=0))))
        seen.texts.append(attempt("chat again", lambda: "".join(model.chat(CHAT[1:2], 3, seed=0))))
    if any(value is not None and not isinstance(value, str) for value in seen.texts[2:]):
        raise Fault("text that is none", "generate", repr(seen.texts)[:200])
    return seen


def inspect(bundle: Path) -> None:
    """``mesart inspect --verify`` and ``--json``, as commands.

    Raises:
        MesaError: it was refused.
    """
    for line in run_command(["inspect", str(bundle), "--verify"]).out.splitlines():
        check_message(line or " x", "inspect")
    run_command(["inspect", str(bundle), "--json"])


class Bundles:
    """The target: one good bundle, and what it gives on each way of use."""

    writes: Sequence[str] = ()
    limit = 10.0

    def __init__(self, bundle: Path, backend: str = "onnxruntime", name: str = "bundles") -> None:
        self.good, self.backend, self.name = (
            bundle,
            backend,
            f"{name} on {backend}" if backend != "onnxruntime" else name,
        )
        self.bytes: dict[str, bytes] = {}
        self.seen: dict[tuple[bool, bool], Seen] = {}
        self.specialised = False

    def prepare(self) -> None:
        self.bytes = {
            str(path.relative_to(self.good)): path.read_bytes() for path in self.good.rglob("*") if path.is_file()
        }
        self.manifest = json.loads(self.bytes[MANIFEST])
        self.specialised = self.backend != "torch" and self.manifest["config"]["method"] == "mesa"
        self.weights = self.manifest["weight_files"]
        for specialised in (False, True)[: 1 + self.specialised]:
            self.seen[specialised, True] = self._golden(specialised)

    def _golden(self, specialised: bool) -> Seen:
        """Computed in a process of its own: engines leave threads behind, and no fork takes those along."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "seen"
            probe = _Probe(self, Uses(self.backend, specialised), result)
            (outcome,) = run_cases(probe, 0, [0], 1)
            if outcome.verdict != SAME or not result.is_file():
                raise RuntimeError(f"{self.good} cannot be used as it is: {outcome}")
            values = np.load(result, allow_pickle=False)
            logits = [values[name] for name in sorted(values.files) if name.startswith("logits")]
            texts = json.loads(str(values["texts"]))
            texts[0] = tuple(texts[0])
            return Seen([logits[i] if logits[i].size else None for i in range(len(logits))], texts)

    def run(self, case: Case) -> str:
        rng = case.rng
        bundle = case.work / "bundle"
        self.write(bundle)
        (case.victim / "model.safetensors").write_bytes(self.bytes[self.weights[0]])
        for name in ("model.onnx", MANIFEST, "tokenizer.json"):
            (case.victim / name).write_bytes(self.bytes[name])
        sealed = rng.random() < 0.65
        uses = Uses(self.backend, self.specialised and rng.random() < 0.1, sealed or rng.random() < 0.9)
        said = [f"{'sealed anew' if sealed else 'damaged'}, {uses}"]
        bundle, harmless = self._change(case, bundle, uses, sealed, said)
        case.said(said)
        seen = use(bundle, uses, case.attempt)
        if case.refusals:
            same = uses.verify is False or sealed or seen.equals(self.seen[uses.specialised, True])
            if not same:
                raise Fault("other numbers", "damaged, beside a refusal", case.refusals[0][:100])
            if harmless:
                raise Fault("refused without need", "", case.refusals[0])
            return REFUSED
        if seen.equals(self.seen[uses.specialised, True]):
            return SAME
        if not sealed and uses.verify:
            raise Fault("other numbers", "damaged and not refused", said[-1][:100])
        if harmless:
            raise Fault("other numbers", "nothing was changed", said[-1][:100])
        return OTHER

    def write(self, folder: Path) -> None:
        for name, data in self.bytes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _change(self, case: Case, bundle: Path, uses: Uses, sealed: bool, said: list[str]) -> tuple[Path, bool]:
        """Changes the bundle; where it now is, and whether it must run as before."""
        rng = case.rng
        kinds = rng.choices(
            ("manifest", "graph", "weights", "texts", "engines", "files", "code", "whole"),
            (35, 14, 8, 26, 6, 8, 1, 2),
            k=rng.choice((1, 1, 1, 1, 2)),
        )
        manifest, raw = json.loads(self.bytes[MANIFEST]), False
        is_moved = False
        late: list[Callable[[], str]] = []  # after the manifest is sealed
        for kind in kinds:
            if kind == "manifest":
                for _ in range(rng.choice((1, 1, 1, 2, 3))):
                    said.append(_mutate_manifest(case, manifest, sealed))
                raw = raw or rng.random() < 0.12
            elif kind == "engines":
                said.append(_mutate_engines(rng, bundle, manifest))
            elif kind == "files":
                late.append(lambda: _mutate_files(case, bundle, manifest))
            elif kind == "whole":
                is_moved = True
            else:
                change = {"graph": self._graph, "weights": self._weights, "texts": _texts, "code": _code}[kind]
                said.append(once_more(partial(change, case, bundle, uses), len(said) > 1))
        if sealed:
            seal_files(bundle, manifest, said)
        if "manifest" in kinds or "engines" in kinds or sealed:
            text = dump(manifest, indent=1, sort_keys=True) + "\n"
            if sealed:
                text = seal(text)
            data = text.encode(errors="surrogatepass")
            if raw:
                data, what = mutate_text(rng, text)
                said.append(f"manifest as text: {what}")
            (bundle / MANIFEST).write_bytes(data)
        said += [what() for what in late]
        if not is_moved:
            return bundle, False
        moved, what = _move(case, bundle)
        said.append(what)
        return moved, set(kinds) == {"whole"}

    def _graph(self, case: Case, bundle: Path, uses: Uses) -> str:
        used = [SYMBOLIC[self.backend], *sorted(name for name in self.bytes if name.startswith("rerotate"))]
        if uses.specialised:
            used = sorted(name for name in self.bytes if name.endswith(".onnx") and not name.startswith("model"))
        said, leaves = mutate_graph(case.rng, bundle, case.rng.choice(used))
        if leaves and self.backend == "onnxruntime" and said.startswith("model-"):
            case.must_refuse = "weights outside the bundle"
        return said

    def _weights(self, case: Case, bundle: Path, uses: Uses) -> str:
        return mutate_weights(case.rng, bundle / case.rng.choice(self.weights))


def _texts(case: Case, bundle: Path, uses: Uses) -> str:
    return mutate_texts(case.rng, bundle)


def _code(case: Case, bundle: Path, uses: Uses) -> str:
    return remote_code(bundle)


class _Probe:
    """A target that uses the good bundle as it is."""

    writes: Sequence[str] = ("home", "tmp")
    limit = 60.0

    def __init__(self, bundles: Bundles, uses: Uses, result: Path) -> None:
        self.bundles, self.uses, self.result, self.name = bundles, uses, result, "golden"

    def prepare(self) -> None:
        pass

    def run(self, case: Case) -> str:
        self.bundles.write(case.work / "bundle")
        case.said(["nothing"])
        seen = use(case.work / "bundle", self.uses, case.attempt)
        if case.refusals:
            raise Fault("refused", "the good bundle", case.refusals[0])
        arrays = {f"logits{i}": np.array([]) if value is None else value for i, value in enumerate(seen.logits)}
        with self.result.open("wb") as file:
            np.savez(file, texts=np.array(json.dumps(seen.texts)), **arrays)  # type: ignore[arg-type]
        return SAME


def seal(text: str) -> str:
    """A manifest's text with the hash that it holds of itself made to fit; as it is where it has none or is no JSON."""
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict) or "sha256" not in tree:
            return text
        fields = {name: value for name, value in tree.items() if name != "sha256"}
        body = dump(fields, indent=1, sort_keys=True).removesuffix("\n}")
    except (ValueError, RecursionError):
        return text
    return f'{body},\n "sha256": "{hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()}"\n}}\n'


def seal_files(bundle: Path, manifest: dict[str, Any], said: list[str]) -> None:
    """Sizes and hashes of the files as they are now, where the records can still hold them."""
    if "files:" in " ".join(said[1:]) or not isinstance(manifest.get("files"), dict):
        return
    for name, info in manifest["files"].items():
        path = bundle / name if isinstance(name, str) and "\0" not in name and len(name) < 200 else bundle
        if (
            isinstance(info, dict)
            and path.is_file()
            and not path.is_symlink()
            and path.resolve().is_relative_to(bundle)
        ):
            data = path.read_bytes()
            if "bytes" in info and "sha256" in info and _is_sealed(info):
                info |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _is_sealed(info: dict[str, Any]) -> bool:
    """Whether a record has not been changed on purpose."""
    return type(info["bytes"]) is int and isinstance(info["sha256"], str) and len(info["sha256"]) == 64


def _mutate_manifest(case: Case, manifest: dict[str, Any], sealed: bool) -> str:
    """One change: anywhere, or of a name of a file, or of a number that the graphs know too."""
    rng = case.rng
    if not manifest:
        return "nothing"
    way = rng.random()
    try:
        if way < 0.12:
            return _rename(case, manifest, sealed)
        if way < 0.2:
            field = rng.choice(list(manifest["config"]))
            manifest["config"][field] = rng.choice((odd_value(rng), rng.randrange(400), rng.random(), True, False))
            return f"config.{field} -> {str(manifest['config'][field])[:40]!a}"
        if way < 0.25:
            layer = rng.choice(manifest["layers"])
            field = rng.choice(list(layer))
            layer[field] = rng.choice((odd_value(rng), rng.randrange(64), 2**40, None, -1, "rerotate.onnx"))
            return f"a layer's {field} -> {str(layer[field])[:40]!a}"
        if way < 0.3:
            rng.shuffle(manifest[rng.choice(("buckets", "layers", "graphs", "weight_files"))])
            return "a list in another order"
        if way < 0.34:
            manifest["model"] = {**manifest["model"], rng.choice(list(manifest["model"])): odd_value(rng)}
            return f"model: {str(manifest['model'])[:80]!a}"
    except (KeyError, TypeError, AttributeError, IndexError):
        pass  # an earlier change has left nothing there
    return mutate_tree(rng, manifest)


def _rename(case: Case, manifest: dict[str, Any], sealed: bool) -> str:
    """A hostile name of a file, somewhere; or a file that is verified by nobody."""
    rng = case.rng
    name = rng.choice((*HOSTILE_NAMES, str(case.victim / "model.onnx"), "../victim/model.onnx"))
    leaves = name.startswith(("/", "../victim")) and sealed
    way = rng.randrange(6)
    if way == 0:
        graph = rng.choice(manifest["graphs"])
        graph["file"] = name
        said = f"graph {graph['kind']}: file {name[:60]!a}"
    elif way == 1:
        manifest["weight_files"][0] = name
        said = f"weight file {name[:60]!a}"
    elif way == 2:
        manifest["layers"][0]["rerotate"] = name
        said = f"rerotate {name[:60]!a}"
    elif way == 3:
        manifest["files"][name] = {"bytes": rng.choice((0, 1, 5)), "sha256": hashlib.sha256(b"").hexdigest()}
        said = f"files: one more, {name[:60]!a}"
    elif way == 4 and manifest.get("engines"):
        manifest["engines"][0]["engines"][0]["file"] = name
        said = f"engine {name[:60]!a}"
    else:
        used = [*manifest["weight_files"], *(graph["file"] for graph in manifest["graphs"])]
        gone = rng.choice(used)
        manifest["files"].pop(gone, None)
        said, leaves = f"files: without {gone}", sealed
    if leaves:
        case.must_refuse = case.must_refuse or "a file outside the bundle, or one that nobody verifies"
    return said


def _mutate_engines(rng: Random, bundle: Path, manifest: dict[str, Any]) -> str:
    """Records of engines, and their files: bombs, no gzip, links."""
    if not manifest.get("engines"):
        manifest["engines"] = odd_value(rng)
        return "engines out of nothing"
    try:
        engine = rng.choice(manifest["engines"][0]["engines"])
        path = bundle / engine["file"]
        way = rng.randrange(4)
        if way == 0:
            return f"engines: {mutate_tree(rng, manifest['engines'])}"
        if way == 1:
            return f"engine: {mutate_tree(rng, engine)}"
        whole = path.read_bytes()
        contents = {
            "a bomb": _BOMB * rng.choice((8, 64, 400)),
            "no gzip": rng.randbytes(500),
            "empty": b"",
            "cut short": whole[: rng.randrange(len(whole) or 1)],
            "garbage behind": whole + b"garbage",
            "a byte more": gzip.compress(gzip.decompress(whole) + b"x"),
            "two in one": whole + whole,
        }
        what = rng.choice(list(contents))
        path.write_bytes(contents[what])
        if rng.random() < 0.8:
            engine |= {"bytes": len(contents[what]), "sha256": hashlib.sha256(contents[what]).hexdigest()}
    except (KeyError, TypeError, OSError, IndexError):
        return f"engines: {mutate_tree(rng, manifest)}"
    return f"an engine's file: {what}"


def _mutate_files(case: Case, bundle: Path, manifest: dict[str, Any]) -> str:
    """A file replaced by something that is no file of this bundle, or is missing, or one more."""
    rng = case.rng
    names = sorted(path.name for path in bundle.iterdir() if path.is_file())
    path = bundle / rng.choice((*names, MANIFEST))
    way = rng.randrange(12)
    if way == 0:
        path.unlink(missing_ok=True)
        return f"{path.name} missing"
    if way == 1:
        extra = bundle / rng.choice(
            ("extra.txt", "model.onnx.data", ".hidden", "special_tokens_map.json", "evil.py", "é\n")
        )
        extra.write_bytes(rng.choice((b"", b"{}", b"import os", rng.randbytes(100))))
        return f"one more file, {extra.name!a}"
    data = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if way == 2:
        os.mkfifo(path)
        return f"{path.name} is a pipe"
    if way == 3:
        path.mkdir()
        return f"{path.name} is a folder"
    if way in (4, 5, 6):
        twin = case.victim / path.name
        twin.write_bytes(data if way != 6 else data[:-1])
        targets = (
            str(twin),
            f"../../victim/{path.name}",
            path.name,
            "nope",
            "/dev/zero",
            "/dev/null",
            "/etc/hostname",
            ".",
        )
        path.symlink_to(targets[way - 4] if way < 6 else rng.choice(targets))
        return f"{path.name} links to {os.readlink(path)[-40:]}"
    if way == 7:
        with path.open("wb") as file:
            file.truncate(rng.choice((1 << 20, 900 << 20)))
        return f"{path.name} is large and empty"
    if way == 8:
        path.write_bytes(b"")
        return f"{path.name} is empty"
    if way == 9:
        path.write_bytes(data + rng.choice((b"\0", b" ", rng.randbytes(9))))
        return f"{path.name} is longer"
    if way == 10:
        (bundle / path.name.upper()).write_bytes(data)
        return f"{path.name} in capitals"
    other = bundle / rng.choice(names)
    path.write_bytes(other.read_bytes() if other.is_file() else b"")
    return f"{path.name} is {other.name}"


def _move(case: Case, bundle: Path) -> tuple[Path, str]:
    """The same bundle in another way: behind a link, or as huggingface_hub stores it."""
    rng = case.rng
    if rng.random() < 0.4:
        link = case.work / "link"
        link.symlink_to("bundle")
        return link, "a link to the bundle"
    if rng.random() < 0.5:
        moved = case.work / rng.choice(("with space", "é", "a'b", "-dash", "x" * 200))
        bundle.rename(moved)
        return moved, f"the bundle is called {moved.name[:20]!a}"
    blobs, snapshots = case.work / "blobs", case.work / "snapshots" / "main"
    shutil.copytree(bundle, blobs)
    shutil.rmtree(bundle)
    for path in sorted(blobs.rglob("*")):
        link = snapshots / path.relative_to(blobs)
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    bundle.symlink_to("snapshots/main")
    return snapshots, "links into a folder of blobs"


if __name__ == "__main__":
    from tests.fuzz.command import main

    sys.exit(main(["bundles", *sys.argv[1:]]))
