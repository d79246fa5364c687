"""What `mesart eval passkey` compares: Mesa, and Origin, the model as it is; of a bundle or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from mesart.evaluation.systems.model import BundleModel, CheckpointModel, Source, is_bundle, require_torch_backend
from mesart.evaluation.systems.plain import MesaReference, PlainModel
from mesart.evaluation.systems.system import System
from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig
from mesart.runtime.text import Tokenizer

SYSTEMS: Final = ("mesa", "origin")
"""The systems there are."""

_EXPORT_LIMIT: Final = 16
"""Times the trained length that an export serves unless told otherwise, and that a checkpoint is evaluated on."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated, for the record."""

    source: str
    kind: str
    """``bundle`` or ``checkpoint``."""
    config: MesaConfig
    engines: dict[str, str]
    """What ran each system."""


@dataclass
class OpenSystems:
    """The systems of one model, and what evaluations need to know of it. Use it in a ``with`` statement."""

    subject: Subject
    tokenizer: Tokenizer
    max_tokens: int
    """How far it is evaluated unless told otherwise: a bundle's limit, 16 times the trained length of a checkpoint."""
    systems: dict[str, System] = field(default_factory=dict)

    def __enter__(self) -> OpenSystems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for system in self.systems.values():
            system.close()

    @property
    def default_lengths(self) -> list[int]:
        """1, 2, 4, ... 32 times the trained length, as far as ``max_tokens`` goes."""
        lengths = [self.subject.config.train_length << power for power in range(6)]
        return [length for length in lengths if length <= self.max_tokens]


def open_systems(
    source: Source,
    names: Sequence[str] = SYSTEMS,
    backend: str = "auto",
    config: MesaConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> OpenSystems:
    """Opens a bundle or a checkpoint under each of the named systems.

    Args:
        source: a bundle, a checkpoint's folder, or a hub id.
        names: of :data:`SYSTEMS`.
        backend: what runs a bundle's graphs, see :meth:`~mesart.runtime.MesaModel.load`.
        config: Mesa's, for a checkpoint; chosen from the model's config if left out. A bundle has its own.
        trust_remote_code: run the Python code that the source brings, if it does.

    Raises:
        MesaError: an unknown system, no tokenizer, a source that cannot be used, or an option that it does not have.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        raise InputError(
            f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}" if unknown else "name a system"
        )
    if is_bundle(source):
        return _open_bundle(Path(source), names, backend, config, trust_remote_code=trust_remote_code)
    return _open_checkpoint(source, names, backend, config, trust_remote_code=trust_remote_code)


def _open_bundle(
    bundle: Path, names: Sequence[str], backend: str, config: MesaConfig | None, *, trust_remote_code: bool
) -> OpenSystems:
    if config is not None:
        raise InputError(f"{bundle} is a bundle, its configuration is fixed; export again, or evaluate the checkpoint")
    held = Manifest.read(bundle).config
    if not isinstance(held, MesaConfig):
        raise InputError(
            f"{bundle} holds {held.name}, not Mesa; `mesart eval suite {bundle} --methods {held.name}` measures it"
        )
    model = BundleModel(bundle, backend, trust_remote_code=trust_remote_code)
    openers: dict[str, Callable[[], System]] = {
        "mesa": lambda: model.engine,
        "origin": lambda: PlainModel(model.module, held.train_length),
    }
    return _opened(model, "bundle", held, openers, names, model.manifest.buckets[-1].max_tokens)


def _open_checkpoint(
    source: Source, names: Sequence[str], backend: str, config: MesaConfig | None, *, trust_remote_code: bool
) -> OpenSystems:
    require_torch_backend(source, backend)
    # The model is shared: under Mesa it is wrapped, its weights are not copied.
    model = CheckpointModel.load(source, trust_remote_code=trust_remote_code)
    chosen = config or MesaConfig.from_model(source)
    openers: dict[str, Callable[[], System]] = {
        "mesa": lambda: MesaReference(model.module, chosen),
        "origin": lambda: PlainModel(model.module, model.train_length),
    }
    return _opened(model, "checkpoint", chosen, openers, names, _EXPORT_LIMIT * chosen.train_length)


def _opened(
    model: BundleModel | CheckpointModel,
    kind: str,
    config: MesaConfig,
    openers: dict[str, Callable[[], System]],
    names: Sequence[str],
    max_tokens: int,
) -> OpenSystems:
    systems = {name: openers[name]() for name in names}
    engines = {name: system.engine for name, system in systems.items()}
    return OpenSystems(Subject(model.source, kind, config, engines), model.tokenizer, max_tokens, systems)


__all__ = ["SYSTEMS", "OpenSystems", "Subject", "open_systems"]
