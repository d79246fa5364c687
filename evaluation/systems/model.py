"""A model that evaluations run, a bundle or a checkpoint, with its tokenizer: gives a system for each method."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mesart.evaluation.methods import parse_method
from mesart.evaluation.systems.bundle import BundleSystem
from mesart.evaluation.systems.system import System
from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.generation import GENERATION_FILE
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.protocol import StaticMethod
from mesart.runtime.load import read_texts
from mesart.runtime.model import MesaModel
from mesart.runtime.text import Tokenizer
from mesart.runtime.text_files import TEXT_FILES

if TYPE_CHECKING:
    from torch import nn

Source: TypeAlias = "str | os.PathLike[str]"


class Model(ABC):
    """A model and its tokenizer."""

    source: str
    tokenizer: Tokenizer
    train_length: int

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The transformers model.

        Raises:
            MesaError: PyTorch is not here, or cannot make it.
        """

    def method(self, spec: str, longest: int) -> System:
        """The model under a method.

        Args:
            spec: ``NAME`` or ``NAME:PARAMETER=VALUE,...``, see :func:`~mesart.evaluation.methods.parse_method`.
            longest: tokens of the longest prompt, from which a method may choose its parameters.

        Raises:
            MesaError: no such method or parameter, or one that the model cannot take.
        """
        try:
            from mesart.evaluation.methods.system import MethodSystem  # noqa: PLC0415  (torch only where it is needed)
        except ImportError as error:
            raise needs_torch(f"method {spec!r}", error) from error
        return MethodSystem(self.module, parse_method(spec, self.train_length, longest))

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The special tokens that the model's texts begin with; often one, sometimes none."""
        return prefix_ids(self.tokenizer)

    def close(self) -> None:  # noqa: B027  (a checkpoint has nothing to do)
        """Frees what it holds."""


class CheckpointModel(Model):
    """A checkpoint in PyTorch."""

    def __init__(self, source: str, module: nn.Module, tokenizer: Tokenizer, train_length: int) -> None:
        self.source, self.tokenizer, self.train_length = source, tokenizer, train_length
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module

    @classmethod
    def load(
        cls, source: Source, dtype: str = "float32", device: str = "cpu", *, trust_remote_code: bool = False
    ) -> CheckpointModel:
        """Loads a checkpoint's folder or a hub id; ``trust_remote_code``: runs Python code that it brings.

        Raises:
            MesaError: the checkpoint or its tokenizer cannot be used, or PyTorch is not here.
        """
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise InputError(f"{source} is neither a bundle (no {MANIFEST_FILE}) nor a checkpoint (no config.json)")
        try:
            from mesart.export.checkpoint import load_model  # noqa: PLC0415
        except ImportError as error:
            raise needs_torch("a checkpoint", error) from error
        module = load_model(source, dtype, trust_remote_code=trust_remote_code).to(device)
        tokenizer = _checkpoint_tokenizer(source, module, trust_remote_code)
        return cls(str(source), module, tokenizer, MesaConfig.from_model(source).train_length)


class BundleModel(Model):
    """A bundle: the method that it holds runs on an engine, every other in PyTorch on the bundle's weights.

    Raises:
        MesaError: no bundle, a missing or altered file, or no tokenizer.
    """

    def __init__(
        self,
        bundle: Source,
        backend: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.source, self._folder = str(bundle), Path(bundle)
        self._backend, self._device, self._threads, self._trust = backend, device, threads, trust_remote_code
        self.manifest = Manifest.read(self._folder)
        files = self.manifest.open_files(self._folder)
        files.verify(contents=False, keep=TEXT_FILES)  # engine and module verify the others
        self.tokenizer = Tokenizer.of(read_texts(files).contents, self._folder)
        self.train_length = self.manifest.config.train_length

    @cached_property
    def engine(self) -> BundleSystem:
        """The bundle's own method."""
        model = MesaModel.load(self._folder, self._backend, threads=self._threads, trust_remote_code=self._trust)
        return BundleSystem(model)

    @cached_property
    def module(self) -> nn.Module:
        try:
            from mesart.graphs.model.torch_graph import load_bundle_model  # noqa: PLC0415
        except ImportError as error:
            raise needs_torch("another method than the bundle's", error) from error
        self.manifest.open_files(self._folder).verify()
        module = load_bundle_model(self._folder, self.manifest, trust_remote_code=self._trust)
        return module.to(self._device)

    def method(self, spec: str, longest: int) -> System:
        return self.engine if spec == self.manifest.config.name else super().method(spec, longest)

    def close(self) -> None:
        if "engine" in vars(self):
            self.engine.close()


def is_bundle(source: Source) -> bool:
    """Whether a source is a bundle, and not a checkpoint's folder or a hub id."""
    return (Path(source) / MANIFEST_FILE).is_file()


def open_model(
    source: Source,
    backend: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> Model:
    """Opens a bundle, or a checkpoint's folder or hub id.

    Args:
        source: which.
        backend: what runs a bundle's graphs; PyTorch runs checkpoints.
        dtype: of a checkpoint; a bundle has its own.
        device: of PyTorch.
        threads: of a bundle's engine; all that the process may use if left out.
        trust_remote_code: run the Python code that the source brings, if it does.

    Raises:
        MesaError: it cannot be used, or has no tokenizer.
    """
    if is_bundle(source):
        return BundleModel(source, backend, device, threads, trust_remote_code=trust_remote_code)
    require_torch_backend(source, backend)
    return CheckpointModel.load(source, dtype, device, trust_remote_code=trust_remote_code)


def own_method(source: Source) -> StaticMethod | None:
    """The configuration that a bundle holds; ``None`` for a checkpoint."""
    return Manifest.read(Path(source)).config if is_bundle(source) else None


def require_torch_backend(source: Source, backend: str) -> None:
    """Raises a :class:`MesaError` unless the backend is one that runs a checkpoint."""
    if backend not in ("auto", "torch"):
        raise InputError(f"{source} is a checkpoint, which PyTorch runs; to use backend {backend!r}, export it first")


def prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def _checkpoint_tokenizer(source: Source, model: Any, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer as an export would write it: transformers repairs old files, and finds those of a hub id."""
    from mesart.export.texts import tokenizer_files  # noqa: PLC0415  (needs torch)

    files = {
        "config.json": model.config.to_json_string().encode(),
        **tokenizer_files(source, trust_remote_code=trust_remote_code),
    }
    if getattr(model, "generation_config", None) is not None:
        files[GENERATION_FILE] = model.generation_config.to_json_string().encode()
    return Tokenizer.of(files, source)


def needs_torch(what: str, error: ImportError) -> MesaError:
    """What to say where PyTorch is missing."""
    return InputError(f"{what} needs PyTorch and transformers: pip install 'mesart[export]' ({error})")


__all__ = [
    "BundleModel",
    "CheckpointModel",
    "Model",
    "Source",
    "is_bundle",
    "needs_torch",
    "open_model",
    "own_method",
    "prefix_ids",
    "require_torch_backend",
]
