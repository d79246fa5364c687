"""A model whose configuration is free: a bundle, which runs every one of its trained length, or a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Protocol

from mesart.evaluation.provenance import fingerprint
from mesart.evaluation.systems import BundleSystem, CheckpointModel, MesaReference, Source, Subject, System
from mesart.evaluation.systems.model import is_bundle, require_torch_backend
from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.runtime.load import Loaded, load_bundle, read_texts
from mesart.runtime.model import MesaModel
from mesart.runtime.text import Tokenizer


class Runs(Protocol):
    """What makes systems of a model."""

    def __call__(self, config: MesaConfig, length: int) -> System:
        """The model under a configuration, for prompts of up to ``length`` tokens; the last one's texts are gone."""


@dataclass(frozen=True)
class Tunable:
    """The model, where the search starts, and what is told of both."""

    subject: Subject
    """Its ``config`` is the start."""
    tokenizer: Tokenizer
    fingerprint: str
    run: Runs


def open_tunable(source: Source, start: MesaConfig | None, backend: str, *, trust_remote_code: bool = False) -> Tunable:
    """Opens a bundle, a checkpoint's folder or a hub id.

    Raises:
        MesaError: it cannot be used, holds no Mesa, or was made for another trained length than the start.
    """
    open_ = _open_bundle if is_bundle(source) else _open_checkpoint
    return open_(source, start, backend, trust_remote_code)


class _BundleRuns:
    """One store and runner for all configurations."""

    def __init__(self, files: BundleFiles, loaded: Loaded) -> None:
        self._files, self._loaded = files, loaded
        self._last: MesaModel | None = None

    def __call__(self, config: MesaConfig, length: int) -> System:
        if self._last is not None:
            self._last.clear()  # all have one store
        self._last = MesaModel(self._files, self._loaded.under(config, length))
        return BundleSystem(self._last)


def _open_bundle(source: Source, start: MesaConfig | None, backend: str, trust_remote_code: bool) -> Tunable:
    files, loaded = load_bundle(source, backend, trust_remote_code=trust_remote_code)
    held = loaded.manifest.config
    if not isinstance(held, MesaConfig):
        raise InputError(f"{source} holds {held.name}; only Mesa has parameters that are tuned here")
    config = replace(start or held, short_length=held.short_length)
    loaded.under(config, config.train_length)  # says what cannot be changed, before any work
    engine = f"{loaded.backend} on {loaded.device}, {loaded.manifest.dtype}"
    subject = Subject(os.fspath(source), "bundle", config, {"mesa": engine})
    tokenizer = Tokenizer.of(read_texts(files).contents, files.folder)
    return Tunable(subject, tokenizer, fingerprint(os.fspath(source)), _BundleRuns(files, loaded))


def _open_checkpoint(source: Source, start: MesaConfig | None, backend: str, trust_remote_code: bool) -> Tunable:
    require_torch_backend(source, backend)
    checkpoint = CheckpointModel.load(source, trust_remote_code=trust_remote_code)
    config = (start or MesaConfig()).for_model(os.fspath(source))

    def run(config: MesaConfig, length: int) -> System:
        del length  # PyTorch takes any
        return MesaReference(checkpoint.module, config)

    subject = Subject(os.fspath(source), "checkpoint", config, {"mesa": run(config, 1).engine})
    return Tunable(subject, checkpoint.tokenizer, fingerprint(os.fspath(source)), run)


__all__ = ["Runs", "Tunable", "open_tunable"]
