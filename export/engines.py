"""Bundle -> engines: a TensorRT engine for every phase and bucket, built only if what it follows from has changed.

What a build has finished is in ``engines/build.jsonl``, a line for each engine; the manifest learns of them last, all
at once. So a build that is killed leaves the bundle as it was, and the next one goes on where it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tqdm import tqdm

from mesart.export.contents import BUILD_LOG, read_log, timing_file
from mesart.export.disk import explained, replace_file, require_no_link
from mesart.export.engine_graphs import EngineShapes, engine_graph, engine_shapes
from mesart.export.engine_memory import estimate, require_fit
from mesart.export.fp8 import computed_products, count_products
from mesart.export.gpus import Gpu, local_gpu, parse_gpus
from mesart.export.tensorrt_builder import BuiltPlan, NoKernelError, Progress, TensorRtBuilder
from mesart.graphs.bundle.manifest import (
    ENGINES_FOLDER,
    EngineInfo,
    EngineSet,
    Flavour,
    Layout,
    Manifest,
    WeightInfo,
    Weights,
    engine_info,
    sha256,
)
from mesart.graphs.bundle.names import ATTENDED
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.method.plan import Bucket

_QUIET_SECONDS = 30.0
"""Between two lines of progress in a file, where a terminal has one line that changes."""

_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""To a file of the bundle's own: through no link, and waiting for nobody at the other end of a pipe."""

Report = Callable[[str], None]


def build_engines(
    bundle: str | os.PathLike[str],
    flavour: Flavour = "tensorrt-rtx",
    gpus: str | None = None,
    *,
    layout: Layout = "bucket",
    weights: Weights = "shared",
    max_tokens: int | None = None,
    progress: bool = True,
    report: Report | None = None,
) -> EngineSet:
    """Builds TensorRT engines from a bundle's graphs and records them in its manifest.

    Args:
        bundle: a folder made by :func:`~mesart.export.export_model`, in float16 or bfloat16.
        flavour: ``tensorrt-rtx`` builds for any of its GPUs, also without one; ``tensorrt`` for this machine's.
        gpus: such as ``sm89,rtx5090``; this machine's if left out.
        layout: an engine for each phase and bucket, or for each phase with a profile for each bucket.
        weights: inputs of the engines, one copy for all of them, or embedded in each.
        max_tokens: build only the buckets that prompts up to this length need; all if left out.
        progress: show a bar.
        report: called with a line for each stage.

    Returns:
        What was built or was there already.

    Raises:
        MesaError: an unusable bundle, dtype, GPU or package; a bucket that does not fit on the card; TensorRT cannot
            build a graph; the disk is full. What was built until then is kept for the next try.
    """
    say = report or (lambda line: None)
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    if manifest.config.sink_window is not None:
        raise InputError(
            f"{folder} holds a method that drops keys, in a ring, and engines write a cache that "
            "grows; run it with onnxruntime or openvino"
        )
    check_dtype(manifest)
    check_quantisation(manifest)
    targets = find_targets(flavour, gpus)
    check_brain(manifest, targets)
    check_fp8(manifest, targets)
    buckets = buckets_for(manifest, max_tokens)
    capabilities = list(dict.fromkeys(gpu.capability for gpu in targets))
    timing = timing_file(flavour)
    for file in (BUILD_LOG, timing):
        require_no_link(folder, file)
    builder = TensorRtBuilder(flavour, capabilities, folder / timing)
    engines = engine_shapes(manifest, layout, buckets)
    memory = estimate(folder, manifest, engines, weights)
    say(f"device memory at run time: about {memory[-1]}")
    for gpu in targets:
        for need in memory:
            if gpu.memory is not None:
                require_fit(need, gpu.memory, gpu.name)
    name = "-".join([flavour, builder.version, *capabilities, layout, weights])
    place = folder / ENGINES_FOLDER / name
    require_no_link(folder, f"{ENGINES_FOLDER}/{name}")
    with explained(folder / ENGINES_FOLDER, also="the engines built so far are kept, build again"):
        place.mkdir(parents=True, exist_ok=True)
        log = _Log(folder / BUILD_LOG)
        with tqdm(total=len(engines), desc="build", unit="engine", disable=not progress) as bar:
            infos = [_build(folder, manifest, builder, shapes, weights, name, log, bar, say) for shapes in engines]
        built = EngineSet(flavour, builder.version, capabilities, layout, weights, infos)
        _record(folder, built)
    size = sum(info.bytes for info in infos)
    say(f"{len(infos)} engines, {size / 1e6:.1f} MB, for {', '.join(capabilities)} with TensorRT {builder.version}")
    return built


def check_dtype(manifest: Manifest) -> None:
    if manifest.dtype == "float32":
        raise InputError(
            "TensorRT's attention kernels compute float16 and bfloat16, this bundle is float32; "
            "export again with --dtype bfloat16, or float16 for GPUs before sm80"
        )


def check_quantisation(manifest: Manifest) -> None:
    how = manifest.quantisation
    if how is not None and not how.symmetric:
        raise InputError(
            "TensorRT takes no quantised weights with zero points; export again without --asymmetric, "
            "or use another backend (onnxruntime, openvino)"
        )


def check_brain(manifest: Manifest, targets: Sequence[Gpu]) -> None:
    old = [gpu.name for gpu in targets if gpu.generation < 80]
    if old and manifest.dtype == "bfloat16":
        raise InputError(f"{old[0]} computes no bfloat16; export again with --dtype float16")


def check_fp8(manifest: Manifest, targets: Sequence[Gpu]) -> None:
    how = manifest.quantisation
    old = [gpu.name for gpu in targets if gpu.generation < 89]
    if old and how is not None and how.scheme == "fp8":
        raise InputError(
            f"{old[0]} computes no fp8, which needs sm89 (Ada), sm90 (Hopper) or newer; export again with "
            "--quantise int8 or int4, or name other GPUs"
        )


def find_targets(flavour: Flavour, gpus: str | None) -> list[Gpu]:
    asked = parse_gpus(gpus) if gpus else []
    if flavour == "tensorrt-rtx" and asked:
        return asked
    local = local_gpu()
    if local is None and flavour == "tensorrt":
        raise InputError(
            "TensorRT builds on the GPU that the engines are for, and there is none here (or no driver, or no "
            "cuda-python: pip install 'mesart[tensorrt]'); --engine tensorrt-rtx --gpu ... builds without one"
        )
    if local is None:
        raise InputError("there is no GPU here to build for; name those that the engines are for, as --gpu sm89,sm120")
    if asked and [gpu.capability for gpu in asked] != [local.capability]:
        raise InputError(
            f"TensorRT builds for this machine's GPU only, {local.name} ({local.capability}), not for {gpus}"
        )
    return [local]


def buckets_for(manifest: Manifest, max_tokens: int | None) -> list[Bucket]:
    if max_tokens is None:
        return manifest.buckets
    needed = [b for b in manifest.buckets if b.max_tokens < max_tokens]
    if len(needed) == len(manifest.buckets):
        raise InputError(
            f"the bundle's largest bucket serves {manifest.buckets[-1].max_tokens} tokens, not {max_tokens}; "
            f"export again with --max-tokens {max_tokens}"
        )
    return manifest.buckets[: len(needed) + 1]


def _build(
    bundle: Path,
    manifest: Manifest,
    builder: TensorRtBuilder,
    shapes: EngineShapes,
    weights: Weights,
    folder: str,
    log: _Log,
    bar: Any,
    say: Report,
) -> EngineInfo:
    """One engine: the one that is there if nothing has changed, or a new one."""
    onnx, shared = _graph(bundle, shapes, weights)
    file = f"{ENGINES_FOLDER}/{folder}/{shapes.name}.plan.gz"
    key = _key(onnx, manifest, shapes, folder)
    bar.set_postfix_str(shapes.name)
    known = log.find(file, key)
    if known is not None and _is_whole(bundle, known):
        bar.update()
        say(f"{shapes.name}: unchanged")
        return known

    show = ticker(bar, shapes.name)
    start = time.monotonic()
    try:
        try:
            plan = builder.build(onnx, bundle, _profiles(shapes), show)
        except NoKernelError:
            # The kernel for a single query ends at some length of the cache (24 thousand slots, in TensorRT for RTX
            # 1.7); the one for several does not. So a step is computed with a second token, which fills up.
            if shapes.profiles[0].phase != "decode":
                raise
            shapes = replace(shapes, profiles=tuple(replace(profile, new=2) for profile in shapes.profiles))
            onnx, shared = _graph(bundle, shapes, weights)
            plan = builder.build(onnx, bundle, _profiles(shapes), show)
    except MesaError as error:
        raise type(error)(f"{shapes.name}: {error}") from error
    info = _write(bundle, file, key, plan, shapes, shared, time.monotonic() - start)
    log.append(info, builder.version)
    bar.update()
    told = f", {computed_products(plan.layers)} of {count_products(onnx)} products in fp8" if plan.layers else ""
    say(f"{shapes.name}: {info.bytes / 1e6:.1f} MB in {info.seconds:.1f} s{told}")
    return info


def _graph(bundle: Path, shapes: EngineShapes, weights: Weights) -> tuple[bytes, list[WeightInfo]]:
    model, shared = engine_graph(bundle, shapes, weights)
    return ir.to_proto(model).SerializeToString(deterministic=True), shared


def _profiles(shapes: EngineShapes) -> list[dict[str, list[int]]]:
    """The one free axis, A, in each profile; nothing if it is fixed too."""
    if shapes.all_fixed:
        return []
    return [{ATTENDED: [profile.kv_length]} for profile in shapes.profiles]


def ticker(bar: Any, name: str) -> Progress:
    """Shows the phases of a build behind a bar, as often as anyone can read: TensorRT reports more often than that."""
    shown = time.monotonic()
    pause = bar.mininterval if not bar.disable and bar.fp.isatty() else _QUIET_SECONDS

    def show(phase: str, done: int, steps: int) -> None:
        nonlocal shown
        due = not bar.disable and time.monotonic() - shown > pause
        if due:
            shown = time.monotonic()
        bar.set_postfix_str(f"{name}: {phase} {done}/{steps}", refresh=due)

    return show


def _key(onnx: bytes, manifest: Manifest, shapes: EngineShapes, target: str) -> str:
    """A hash of all that a plan follows from."""
    weights = [manifest.files[name].sha256 for name in manifest.weight_files]
    parts = [*weights, repr(shapes.profiles), repr(manifest.config), target]
    return hashlib.sha256(onnx + "\0".join(parts).encode()).hexdigest()


def _is_whole(bundle: Path, info: EngineInfo) -> bool:
    path = bundle / info.file
    return path.is_file() and path.stat().st_size == info.bytes and sha256(path) == info.sha256


def _write(
    bundle: Path, file: str, key: str, plan: BuiltPlan, shapes: EngineShapes, shared: list[WeightInfo], seconds: float
) -> EngineInfo:
    path = bundle / file
    packed = gzip.compress(plan.data, compresslevel=3, mtime=0)
    replace_file(path, packed)
    names = {weight.name for weight in shared}
    return EngineInfo(
        file=file,
        bytes=len(packed),
        sha256=hashlib.sha256(packed).hexdigest(),
        unpacked=len(plan.data),
        key=key,
        inputs=[tensor for tensor in plan.inputs if tensor.name not in names],
        outputs=plan.outputs,
        weights=shared,
        profiles=list(shapes.profiles),
        seconds=round(seconds, 3),
    )


class _Log:
    """What was built, a line of JSON for each engine, the newest last."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, file: str, key: str) -> EngineInfo | None:
        """The latest entry of a file, if it was made from the same things."""
        for entry in reversed(read_log(self._path)):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, MesaError):  # no entry of ours
                info = engine_info(entry["engine"])
                if info.file == file:
                    return info if info.key == key else None
        return None

    def append(self, info: EngineInfo, version: str) -> None:
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tensorrt": version, "engine": dataclasses.asdict(info)}
        line = json.dumps(entry).encode() + b"\n"
        with open(os.open(self._path, _APPEND, 0o666), "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_nlink > 1:
                raise InputError(f"{self._path} is also another file (a hard link), which is not ours; delete it")
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # the last one was torn
            while line:
                line = line[file.write(line) :]


def _record(bundle: Path, built: EngineSet) -> None:
    """Puts a set in front of the others in the manifest, in place of an older one of the same kind."""
    manifest = Manifest.read(bundle)  # anew: another build may have finished meanwhile
    others = [other for other in manifest.engines if replace(other, engines=[]) != replace(built, engines=[])]
    replace(manifest, engines=[built, *others]).write(bundle)


__all__ = ["build_engines"]
