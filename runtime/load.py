"""From a bundle's folder and the name of a backend to a store and a runner on it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.bundle.manifest import Flavour, Manifest
from mesart.graphs.bundle.names import GraphKind, past_name
from mesart.graphs.errors import BundleError, EngineError, InputError
from mesart.graphs.memory_size import parse_memory
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import buckets_up_to
from mesart.runtime.backends import (
    STORAGE,
    Activations,
    KvDtype,
    OnnxRuntimeBackend,
    OpenVinoBackend,
    TorchBackend,
    choose_backend,
)
from mesart.runtime.chunk_store.keys import fingerprint
from mesart.runtime.device_rotation import DeviceRotation
from mesart.runtime.engines import PACKAGES, Engines, usable_flavour
from mesart.runtime.graphs import GraphFiles, Rotation, SpecialisedGraphs, SymbolicGraphs
from mesart.runtime.kv.device import DeviceStore
from mesart.runtime.kv.paged import PagedStore
from mesart.runtime.kv.ring import RingStore
from mesart.runtime.kv.slab import SlabStore
from mesart.runtime.kv.store import KvStore
from mesart.runtime.memory import free_memory
from mesart.runtime.runners.device import DeviceRunner
from mesart.runtime.runners.grouped import GroupedRunner, capacity_in_place
from mesart.runtime.runners.paged import PagedRunner
from mesart.runtime.runners.runner import Runner
from mesart.runtime.runners.unfused import UnfusedRunner
from mesart.runtime.text_files import TEXT_FILES, TextFiles

_MEMORY_SHARE = 0.75
"""Of the memory that is free beside the weights, what keys and values may take unless something else is asked for."""

_LEAST_MEMORY = 256 << 20

_COMPUTING: frozenset[GraphKind] = frozenset(("symbolic", "onnxruntime", "paged", "grouped"))
"""Kinds of the graphs that compute heads and chunks of any length."""


@dataclass(frozen=True)
class Loaded:
    """A bundle ready to run."""

    store: KvStore
    runner: Runner
    manifest: Manifest
    """Of what can run: its buckets are those that there are engines for."""
    backend: str
    device: str
    choice: str
    """Why this backend, a phrase for people."""
    fingerprint: str
    """Names what computes keys and values: :func:`~mesart.runtime.chunk_store.keys.fingerprint`."""
    fixed_shapes: bool = False
    """Whether the graphs are made for the chunks and tails of the manifest's configuration alone."""

    def under(self, config: MesaConfig, max_tokens: int) -> Loaded:
        """The same store and runner, for prompts of up to ``max_tokens`` tokens under another configuration.

        The symbolic graph takes cuts, positions and scales as data: a bundle of Mesa runs every configuration of its
        trained length.

        Raises:
            MesaError: the bundle holds another method, its tables are for another trained length, its graphs have fixed
                shapes, or the configuration has no positions for such prompts.
        """
        held = self.manifest.config
        if not isinstance(held, MesaConfig):
            raise InputError(f"the bundle holds {held.name}; only Mesa runs under other configurations than its own")
        if config.train_length != held.train_length:
            raise InputError(
                f"the bundle's tables are for train_length = {held.train_length}; start from that, or export again"
            )
        if self.fixed_shapes:
            raise InputError(
                f"{self.backend} runs graphs of fixed shapes, made for the bundle's own configuration; take "
                "backend onnxruntime, openvino or torch"
            )
        config = replace(config, short_length=held.short_length)
        buckets = list(buckets_up_to(config, max_tokens))
        return replace(self, manifest=replace(self.manifest, config=config, buckets=buckets))


def require_digest(bundle: Path, manifest: Manifest, digest: str, *, verify: bool) -> None:
    """Raises a :class:`MesaError` if a bundle is not the one of that digest, or if nothing would check that it is."""
    if not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise InputError(
            f"the digest is {digest!r}; give what `mesart inspect --digest` prints, sha256: and 64 hexadecimal digits"
        )
    if not verify:
        raise InputError(
            "a digest names the contents of all files, which verify=False does not read; leave one of them out"
        )
    if manifest.digest != digest:
        raise BundleError(
            f"{bundle} is not the bundle that was asked for: its digest is {manifest.digest}, not {digest}"
        )


def read_texts(files: BundleFiles) -> TextFiles:
    """The texts of a bundle, as they were verified."""
    return TextFiles(files.folder, {name: files.read(name) for name in TEXT_FILES if name in files})


def load_bundle(
    bundle: str | os.PathLike[str],
    backend: str = "auto",
    *,
    digest: str | None = None,
    threads: int | None = None,
    specialised: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    activations: Activations | None = None,
    kv_memory: int | str | None = None,
    kv_dtype: KvDtype | None = None,
) -> tuple[BundleFiles, Loaded]:
    """A bundle's files, verified, and what runs it; see :meth:`~mesart.runtime.MesaModel.load` for the arguments.

    Raises:
        MesaError: as there.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    if digest is not None:
        require_digest(folder, manifest, digest, verify=verify)
    files = manifest.open_files(folder)
    files.verify(contents=verify, keep=TEXT_FILES)
    loaded = load_runner(
        files,
        manifest,
        backend,
        threads=threads,
        specialised=specialised,
        verify=verify,
        trust_remote_code=trust_remote_code,
        activations=activations,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
    )
    return files, loaded


def load_runner(
    files: BundleFiles,
    manifest: Manifest,
    backend: str,
    *,
    threads: int | None = None,
    specialised: bool = False,
    verify: bool = True,
    trust_remote_code: bool = False,
    activations: Activations | None = None,
    kv_memory: int | str | None = None,
    kv_dtype: KvDtype | None = None,
) -> Loaded:
    """A runner and its store on the backend of that name; see :meth:`~mesart.runtime.MesaModel.load` for the arguments.

    ``auto`` takes TensorRT if the bundle has engines that run here, else the fastest of the others that is installed.

    Raises:
        MesaError: the backend is unknown or not installed, or cannot run this bundle on this machine.
    """
    if activations is not None:
        _check_rounding(manifest, activations)
    if kv_dtype is not None:
        _check_kv_dtype(manifest, kv_dtype, backend, specialised=specialised)
    asked = None if kv_memory is None else parse_memory(kv_memory)
    for flavour in PACKAGES:
        if backend == flavour:
            if activations:
                raise InputError(f"backend {flavour!r} runs engines as they were built; leave activations out")
            if asked is not None:
                raise InputError(
                    f"backend {flavour!r} runs engines, whose buckets set what keys and values take: leave kv_memory "
                    "out"
                )
            if specialised:
                raise InputError(
                    f"backend {flavour!r} runs engines, whose shapes are fixed in any case: leave specialised out"
                )
            return _load_engines(files, manifest, flavour, "asked for", verify=verify)
    reason = ""
    if backend == "auto" and not specialised and not activations and asked is None and kv_dtype is None:
        usable, reason = usable_flavour(files.folder, manifest)
        if usable is not None:
            return _load_engines(
                files, manifest, usable, "the fastest: the bundle has engines for this GPU", verify=verify
            )
    if manifest.quantisation is not None and manifest.quantisation.scheme == "fp8":
        backend = _require_fp8(backend, manifest.dtype, activations)
    engine, choice = choose_backend(backend, manifest.dtype, threads, activations)
    eight_bits = manifest.quantisation is not None and manifest.quantisation.bits == 8
    if isinstance(engine, OnnxRuntimeBackend) and eight_bits and not activations:
        engine.unpack_weights()
    if isinstance(engine, TorchBackend):
        engine.trust_remote_code = trust_remote_code
    memory = asked or max(_LEAST_MEMORY, int(_MEMORY_SHARE * (free_memory() - manifest.weight_bytes)))
    graph_files = GraphFiles(files, manifest, engine)
    store, runner, form = _open_runner(graph_files, memory, specialised=specialised, kv_dtype=kv_dtype)
    choice += f"; the bundle's engines do not run here: {reason}" if reason else ""
    choice += f"; {form}" if form else ""
    kinds = _COMPUTING | ({"prefix", "chunk"} if specialised else set())
    graphs = [files.infos[graph.file].sha256 for graph in manifest.graphs if graph.kind in kinds]
    computed_by = (engine.name, engine.device, type(runner).__name__, activations or "", kv_dtype or "")
    named = fingerprint(manifest, graphs, computed_by)
    return Loaded(store, runner, manifest, engine.name, engine.device, choice, named, specialised)


def _open_runner(
    files: GraphFiles, memory: int, *, specialised: bool, kv_dtype: KvDtype | None
) -> tuple[KvStore, Runner, str]:
    """The runner that suits backend and bundle, its store, and what is to be said about it."""
    manifest, engine, note = files.manifest, files.backend, ""
    layers, storage, rotate = manifest.layers, STORAGE[manifest.dtype], Rotation(files)
    if isinstance(engine, OpenVinoBackend) and manifest.has("paged") and not specialised:
        try:
            opened = files.open_by(
                manifest.graph("paged").file, lambda path, info: engine.open_paged(path, info, kv_dtype)
            )
        except EngineError as error:
            if kv_dtype is not None:
                raise
            note = f"without paged attention: {error}"
        else:
            paged = PagedStore(layers, STORAGE[kv_dtype] if kv_dtype else storage, rotate, memory)
            for index in range(len(layers)):
                opened.bind(past_name(index, "key"), paged.keys[index].array)
                opened.bind(past_name(index, "value"), paged.values[index].array)
            note = f"keys and values in {kv_dtype}" if kv_dtype else ""
            return paged, PagedRunner(manifest, paged, opened, files.require_weights, kv_dtype), note
    if kv_dtype is not None:
        raise InputError(f"backend {engine.name!r} keeps keys and values in the bundle's dtype; leave kv_dtype out")
    if (
        isinstance(engine, OnnxRuntimeBackend)
        and manifest.has("grouped")
        and engine.device == "cpu"
        and not specialised
    ):
        graph = files.open_by(manifest.graph("grouped").file, engine.open_in_place)
        slab = SlabStore(layers, storage, rotate, memory, capacity_in_place)
        return slab, GroupedRunner(manifest, graph, files.require_weights), ""
    graphs = (SpecialisedGraphs if specialised else SymbolicGraphs)(files)
    sink_window = manifest.config.sink_window
    if sink_window is not None:
        slab = RingStore(layers, storage, rotate, memory, graphs.capacity, sink_window)
    else:
        slab = SlabStore(layers, storage, rotate, memory, graphs.capacity)
    return slab, UnfusedRunner(manifest, slab, graphs), note


def _check_rounding(manifest: Manifest, activations: str) -> None:
    if activations not in get_args(Activations):
        raise InputError(
            f"activations are rounded to {', '.join(get_args(Activations))} or not at all: {activations!r}"
        )
    if manifest.quantisation is None:
        raise InputError(
            "activations are rounded in front of quantised weights only, and this bundle has none; leave activations "
            "out, or export with --quantise int4"
        )


def _check_kv_dtype(manifest: Manifest, kv_dtype: str, backend: str, *, specialised: bool) -> None:
    if kv_dtype not in get_args(KvDtype):
        raise InputError(
            f"keys and values are kept in {', '.join(get_args(KvDtype))} or the bundle's dtype: {kv_dtype!r}"
        )
    reason = ""
    if backend not in ("auto", "openvino"):
        reason = f"backend {backend!r} keeps them in the bundle's dtype"
    elif specialised:
        reason = "the graphs of fixed shapes keep them in the bundle's dtype"
    elif manifest.dtype not in ("float32", kv_dtype):
        reason = f"the bundle computes in {manifest.dtype}"
    elif not manifest.has("paged"):
        reason = "this model's attention is not paged"
    if reason:
        raise InputError(
            f"keys and values in {kv_dtype} are for OpenVINO's paged attention: {reason}; leave kv_dtype out"
        )


def _require_fp8(backend: str, dtype: str, activations: str | None) -> str:
    """The backend, if it rounds to fp8 as the graphs say; ``auto``: one that does and computes the dtype on a CPU."""
    if activations is not None:
        raise InputError("an fp8 bundle's graphs round activations themselves; leave activations out")
    if backend == "openvino":
        raise InputError(
            "OpenVINO rounds to fp8 otherwise than the graphs say; give backend 'onnxruntime' (float32, float16) or "
            "'torch', or build TensorRT engines"
        )
    return backend if backend != "auto" else "torch" if dtype == "bfloat16" else "onnxruntime"


def _load_engines(files: BundleFiles, manifest: Manifest, flavour: Flavour, choice: str, *, verify: bool) -> Loaded:
    engines = Engines(files, manifest, flavour, verify=verify)
    try:
        store = DeviceStore(manifest, engines, DeviceRotation(manifest, engines))
        runner = DeviceRunner(manifest, store, engines)
    except BaseException:
        engines.close()
        raise
    built = engines.set
    phases = {"prefix", "chunk"}
    plans = [engine.key for engine in built.engines if phases & {profile.phase for profile in engine.profiles}]
    named = fingerprint(manifest, plans, (flavour, built.version, engines.cuda.capability))
    usable = replace(manifest, buckets=engines.buckets(manifest))
    return Loaded(store, runner, usable, flavour, "cuda", choice, named, fixed_shapes=True)


__all__ = ["Loaded", "load_bundle", "load_runner", "read_texts", "require_digest"]
