"""The systems that are compared: Mesa, and Origin, the model as it is; of a bundle or of a checkpoint."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.generation import GENERATION_FILE
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Plan
from mesart.runtime.load import read_texts
from mesart.runtime.model import MesaModel
from mesart.runtime.text import Tokenizer
from mesart.runtime.text_files import TEXT_FILES

if TYPE_CHECKING:
    from torch import nn

Source: TypeAlias = "str | os.PathLike[str]"

SYSTEMS: Final = ("mesa", "origin")
"""The systems there are."""

_EXPORT_LIMIT: Final = 16
"""Times the trained length that an export serves unless told otherwise, and that a checkpoint is evaluated on."""


class System(ABC):
    """A model under one rule of attention and positions, with a live cache of one prompt."""

    engine: str
    """What runs it, a phrase for people."""

    @abstractmethod
    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        """Computes a prompt; logits of its last ``last`` tokens, ``[last, V]``."""

    @abstractmethod
    def step(self, token: int) -> NDArray[np.float32]:
        """Appends a token to the prompt; logits of the next, ``[V]``."""

    @abstractmethod
    def logits_of(self, tokens: int) -> int:
        """Of how many last tokens of a prompt of ``tokens`` tokens there are logits.

        Raises:
            MesaError: the system cannot take a prompt of that length.
        """

    def close(self) -> None:  # noqa: B027  (not abstract: most have nothing to do)
        """Frees what it holds."""

    def generate(self, input_ids: Sequence[int], count: int, stop: Collection[int] = ()) -> list[int]:
        """The ``count`` most likely tokens one after the other; fewer if one of ``stop`` comes, which is left out."""
        generated: list[int] = []
        logits = self.prefill(input_ids, 1)[-1]
        while True:
            token = int(logits.argmax())
            if token in stop:
                return generated
            generated.append(token)
            if len(generated) == count:
                return generated
            logits = self.step(token)

    def log_probs(self, input_ids: Sequence[int], count: int) -> NDArray[np.float64]:
        """Natural log-probabilities of the last ``count`` tokens, each given all tokens before it, ``[count]``.

        Raises:
            MesaError: the system gives logits of fewer tokens of a text of this length.
        """
        given = len(input_ids) - 1  # the last token predicts nothing that is scored
        self.require_scores(len(input_ids), count)
        logits = self.prefill(input_ids[:given], count).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(count), list(input_ids[-count:])]
        scores: NDArray[np.float64] = chosen - np.log(np.exp(logits).sum(axis=-1))
        return scores

    def require_scores(self, tokens: int, count: int) -> None:
        """Raises a :class:`MesaError` if the last ``count`` tokens of a text of ``tokens`` tokens cannot be scored."""
        if not 1 <= count < tokens:
            raise InputError(f"of a text of {tokens} tokens the last 1 to {tokens - 1} can be scored, not {count}")
        limit = self.logits_of(tokens - 1)
        if count > limit:
            raise InputError(
                f"of a text of {tokens} tokens only the last {limit} can be scored, the tail of its plan, not {count}"
            )


class MesaBundle(System):
    """Mesa-Extrapolation, as users run it: an exported bundle on an engine."""

    def __init__(self, model: MesaModel) -> None:
        self._model = model
        self.engine = f"{model.backend} on {model.device}, {model.manifest.dtype}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._model.prefill(input_ids, all_logits=last > 1)
        return logits[0, -last:]

    def step(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._model.step(token)[0, -1]
        return row

    def logits_of(self, tokens: int) -> int:
        limit = self._model.max_tokens
        if tokens > limit:
            raise InputError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {limit} tokens; "
                f"stay below, or export again with --max-tokens {tokens}"
            )
        return len(Plan.of(self._model.manifest.config, tokens).tail)

    def close(self) -> None:
        self._model.close()


class MesaReference(System):
    """Mesa-Extrapolation of a checkpoint, by the slow and obvious reference in PyTorch."""

    def __init__(self, model: nn.Module, config: MesaConfig) -> None:
        from mesart.graphs.model.reference import TorchReference  # noqa: PLC0415  (torch only where it is needed)

        self._reference = TorchReference(model, config)
        self.engine = f"TorchReference, {_dtype(model)}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        logits = self._reference.prefill(input_ids, all_logits=last > 1)
        rows: NDArray[np.float32] = logits[0, -last:].numpy()
        return rows

    def step(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._reference.step(token)[0, -1].numpy()
        return row

    def logits_of(self, tokens: int) -> int:
        return len(Plan.of(self._reference.config, tokens).tail)


@contextmanager
def stretched(model: nn.Module, tokens: int) -> Iterator[None]:
    """Lets MPT run past its window: its ALiBi is a table of ``max_seq_len`` columns, and no more tokens can be run.

    The bias of a distance is the same in a longer table.
    """
    config: Any = model.config
    known = getattr(config, "max_seq_len", None)
    if isinstance(known, int):
        config.max_seq_len = max(known, tokens)
    try:
        yield
    finally:
        if isinstance(known, int):
            config.max_seq_len = known


class PlainModel(System):
    """The transformers model as it is: its own positions, attention and cache, however long the prompt."""

    def __init__(self, model: nn.Module, train_length: int) -> None:
        import torch  # noqa: PLC0415

        from mesart.graphs.model.rotary import short_length  # noqa: PLC0415

        self._torch = torch
        self._model = model
        self._cache: Any = None
        self._tokens: list[int] = []
        self._first_long = short_length(model, train_length) + 1
        config: Any = model.config
        self._vocabulary = int(config.get_text_config().vocab_size)
        self.engine = f"transformers {config._attn_implementation}, {_dtype(model)}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        if not input_ids:
            raise InputError("the prompt is empty; give at least one token")
        if min(input_ids) < 0 or max(input_ids) >= self._vocabulary:
            raise InputError(f"token ids must lie in 0..{self._vocabulary - 1}; is the tokenizer this model's own?")
        self._cache, self._tokens = None, list(input_ids)
        return self._run(input_ids, last)

    def step(self, token: int) -> NDArray[np.float32]:
        self._tokens.append(int(token))
        tokens = [token]
        if len(self._tokens) == self._first_long:  # what is cached follows from LongRoPE's short frequencies
            self._cache, tokens = None, self._tokens
        row: NDArray[np.float32] = self._run(tokens, 1)[-1]
        return row

    def logits_of(self, tokens: int) -> int:
        return tokens

    def _run(self, tokens: Sequence[int], last: int) -> NDArray[np.float32]:
        known = 0 if self._cache is None else self._cache.get_seq_length()
        with self._torch.inference_mode(), stretched(self._model, known + len(tokens)):
            output = self._model(
                input_ids=self._torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=last,
            )
        self._cache = output.past_key_values
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """A checkpoint in PyTorch, with its tokenizer."""

    source: str
    model: nn.Module = field(repr=False)
    tokenizer: Tokenizer
    prefix_ids: tuple[int, ...]
    """The special tokens that the model's texts begin with; often one, sometimes none."""
    train_length: int

    @classmethod
    def load(
        cls, source: Source, dtype: str = "float32", device: str = "cpu", *, trust_remote_code: bool = False
    ) -> CheckpointModel:
        """Loads a checkpoint's folder or a hub id; ``trust_remote_code``: runs Python code that it brings.

        Raises:
            MesaError: the checkpoint or its tokenizer cannot be used, or PyTorch is not here.
        """
        try:
            from mesart.export.checkpoint import load_model  # noqa: PLC0415
        except ImportError as error:
            raise _needs_torch("a checkpoint", error) from error
        model = load_model(source, dtype, trust_remote_code=trust_remote_code).to(device)
        tokenizer = _checkpoint_tokenizer(source, model, trust_remote_code)
        train_length = MesaConfig.from_model(source).train_length
        return cls(str(source), model, tokenizer, tuple(prefix_ids(tokenizer)), train_length)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:start]


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
    """The systems of one source, and what evaluations need to know of it. Use it in a ``with`` statement."""

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
    def train_length(self) -> int:
        return self.subject.config.train_length

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The special tokens that the model's texts begin with; often one, sometimes none."""
        return prefix_ids(self.tokenizer)

    @property
    def default_lengths(self) -> list[int]:
        """1, 2, 4, ... 32 times the trained length, as far as ``max_tokens`` goes."""
        lengths = [self.train_length << power for power in range(6)]
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
    if (Path(source) / MANIFEST_FILE).is_file():
        return _open_bundle(Path(source), names, backend, config, trust_remote_code=trust_remote_code)
    return _open_checkpoint(source, names, backend, config, trust_remote_code=trust_remote_code)


def _open_bundle(
    bundle: Path, names: Sequence[str], backend: str, config: MesaConfig | None, *, trust_remote_code: bool
) -> OpenSystems:
    if config is not None:
        raise InputError(f"{bundle} is a bundle, its configuration is fixed; export again, or evaluate the checkpoint")
    manifest = Manifest.read(bundle)
    if not isinstance(manifest.config, MesaConfig):
        name = manifest.config.name
        raise InputError(
            f"{bundle} holds {name}, not Mesa; `mesart eval suite MODEL --methods {name}` measures its quality"
        )
    files = manifest.open_files(bundle)
    files.verify(contents="origin" in names, keep=TEXT_FILES)  # Mesa's model verifies its own
    tokenizer = Tokenizer.of(read_texts(files).contents, bundle)
    openers: dict[str, Callable[[], System]] = {
        "mesa": lambda: MesaBundle(MesaModel.load(bundle, backend, trust_remote_code=trust_remote_code)),
        "origin": lambda: PlainModel(_bundle_model(bundle, manifest, trust_remote_code), manifest.config.train_length),
    }
    systems = {name: openers[name]() for name in names}
    engines = {name: system.engine for name, system in systems.items()}
    subject = Subject(str(bundle), "bundle", manifest.config, engines)
    return OpenSystems(subject, tokenizer, manifest.buckets[-1].max_tokens, systems)


def _bundle_model(bundle: Path, manifest: Manifest, trust_remote_code: bool) -> nn.Module:
    try:
        from mesart.graphs.model.torch_graph import load_bundle_model  # noqa: PLC0415
    except ImportError as error:
        raise _needs_torch("system 'origin'", error) from error
    return load_bundle_model(bundle, manifest, trust_remote_code=trust_remote_code)


def _open_checkpoint(
    source: Source, names: Sequence[str], backend: str, config: MesaConfig | None, *, trust_remote_code: bool
) -> OpenSystems:
    if backend not in ("auto", "torch"):
        raise InputError(f"{source} is a checkpoint, which PyTorch runs; to use backend {backend!r}, export it first")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source} is neither a bundle (no {MANIFEST_FILE}) nor a checkpoint (no config.json)")
    # The model is shared: under Mesa it is wrapped, its weights are not copied.
    checkpoint = CheckpointModel.load(source, trust_remote_code=trust_remote_code)
    config = config or MesaConfig.from_model(source)
    openers: dict[str, Callable[[], System]] = {
        "mesa": lambda: MesaReference(checkpoint.model, config),
        "origin": lambda: PlainModel(checkpoint.model, checkpoint.train_length),
    }
    systems = {name: openers[name]() for name in names}
    engines = {name: system.engine for name, system in systems.items()}
    subject = Subject(str(source), "checkpoint", config, engines)
    return OpenSystems(subject, checkpoint.tokenizer, _EXPORT_LIMIT * config.train_length, systems)


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


def _needs_torch(what: str, error: ImportError) -> MesaError:
    return InputError(f"{what} needs PyTorch and transformers: pip install 'mesart[export]' ({error})")


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


__all__ = ["SYSTEMS", "CheckpointModel", "OpenSystems", "Subject", "System", "open_systems", "prefix_ids"]
