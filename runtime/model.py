"""The model of a bundle, as its users see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.errors import CapacityError, InputError
from mesart.graphs.method.plan import Plan, bucket_for
from mesart.runtime.backends import Activations, Array, KvDtype
from mesart.runtime.chunk_store.store import ChunkStore, require_store
from mesart.runtime.chunk_store.stored import StoredChunks
from mesart.runtime.chunk_store.warm import warm
from mesart.runtime.document_texts import DocumentTexts
from mesart.runtime.documents import Reuse, check_reuse
from mesart.runtime.engine import Engine, Turn
from mesart.runtime.kv.device import DeviceMemory, DeviceStore
from mesart.runtime.load import Loaded, load_bundle, read_texts
from mesart.runtime.prompts import Prompt, PromptIds, checked_count, checked_prompts, is_batch, token_ids
from mesart.runtime.reading import plan_of_turn
from mesart.runtime.sampling import Sampler, SamplingConfig
from mesart.runtime.scheduler import Scheduler
from mesart.runtime.sequence import Sequence
from mesart.runtime.stream import TextStream
from mesart.runtime.text import Tokenizer, configured_eos_ids, default_sampling
from mesart.runtime.usage import Usage, WarmReport

Logits: TypeAlias = NDArray[np.float32]
Progress: TypeAlias = Callable[[int, int], None]
"""Called while a prompt is read, with the tokens that are there and those that there are to be."""


@dataclass(frozen=True)
class ReadOptions:
    """How prompts are read."""

    stored: StoredChunks | None
    """Where chunks are that were computed before."""
    reuses: bool = True
    """Whether a live text that differs in its tail only goes on with another."""
    progress: Progress | None = None


class MesaModel:
    """A bundle on a backend, and the text or the batch of texts that it is at.

    Made by :meth:`load`; close it, or use it in a ``with`` statement, to free the engine's memory.

    A call that fails leaves the texts as they were before; a failed :meth:`prefill` leaves none, as after loading.
    Calls from several threads wait for each other. They speak of the same texts all the same: a generation whose texts
    another call has changed meanwhile (another generation, from the same thread or not) ends in a :class:`MesaError` at
    its next token. A process that is forked after loading has to load the model again.

    Attributes:
        backend: the backend's name, ``device`` where it runs and ``choice`` why it was chosen.
        manifest: what the bundle holds.
        fingerprint: names what computes keys and values; only models of the same find each other's chunks in a store.
        engine: runs any number of texts side by side; the model's own texts are some of them.
        usage: what became of the last prompt's tokens, of all rows together; ``None`` before the first.
    """

    def __init__(self, files: BundleFiles, loaded: Loaded, store: ChunkStore | None = None) -> None:
        self.bundle, self.manifest = files.folder, loaded.manifest
        self._texts = read_texts(files)  # now: the folder may be another bundle's by the time that they are needed
        self.backend, self.device, self.choice = loaded.backend, loaded.device, loaded.choice
        self.fingerprint = loaded.fingerprint
        self.engine = Engine(loaded.manifest, loaded.store, loaded.runner, Scheduler())
        self._process = os.getpid()
        self._live: list[Sequence] = []
        self._changes = 0  # counts the calls that changed the texts
        self._vocabulary = int(self.manifest.model["vocab_size"])
        self._stored = None if store is None else StoredChunks(store, loaded.fingerprint, loaded.store.layout)
        self.usage: Usage | None = None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        specialised: bool = False,
        verify: bool = True,
        digest: str | None = None,
        trust_remote_code: bool = False,
        activations: Activations | None = None,
        kv_memory: int | str | None = None,
        kv_dtype: KvDtype | None = None,
        store: ChunkStore | None = None,
    ) -> MesaModel:
        """Opens a bundle.

        What was checked is what is used: files that are opened later (graphs of other buckets) have to be unchanged.

        Args:
            bundle: a folder made by ``mesart export``.
            backend: ``tensorrt`` or ``tensorrt-rtx`` for the engines of ``mesart build``; ``onnxruntime``,
                ``openvino`` or ``torch`` for the graphs; ``auto`` for the fastest that runs here.
            threads: CPU threads; all that the process may use if left out.
            specialised: run the graphs of fixed shapes, one for each phase and bucket, instead of the symbolic one.
            verify: check the SHA-256 of every file; otherwise only that it is there and has its size (an engine is
                checked in any case, before it is opened).
            digest: the only bundle that may be opened, ``sha256:...`` as ``mesart inspect --digest`` prints it. The
                hashes in a bundle say that it is whole, not who made it: engines are native code, so give the digest of
                a bundle that comes from elsewhere, if whoever made it has told you.
            trust_remote_code: let backend ``torch`` run the Python code that the bundle brings, if it does.
            activations: ``int8`` lets onnxruntime and OpenVINO round activations to 8 bits in front of quantised
                weights: faster, and not the model that was exported (docs/decoding.md has both in numbers).
            kv_memory: the most that keys and values of all texts may take, in bytes or as ``"2GiB"``; three quarters of
                the memory that is free if left out. Engines of ``mesart build`` take what their buckets need.
            kv_dtype: ``float16`` keeps keys and values of a float32 bundle in half the memory, on OpenVINO: faster
                behind long texts, and rounded (docs/decoding.md has both in numbers).
            store: keeps the chunks of prompts, and finds those that it has: nothing is computed twice. Several models
                may share one.

        Raises:
            MesaError: no bundle, another one than ``digest`` says, a missing or altered file, a backend that is unknown
                or not installed, engines that do not run on this machine, or rounding where there is nothing to round.
        """
        require_store(store)
        files, loaded = load_bundle(
            bundle,
            backend,
            digest=digest,
            threads=threads,
            specialised=specialised,
            verify=verify,
            trust_remote_code=trust_remote_code,
            activations=activations,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
        )
        return cls(files, loaded, store)

    def __enter__(self) -> MesaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def store(self) -> ChunkStore | None:
        """The store that it was loaded with."""
        return None if self._stored is None else self._stored.store

    def close(self) -> None:
        """Frees the engine and all texts, after a call that is still computing; the model cannot be used any more."""
        if os.getpid() == self._process:  # else the engine is the parent's
            self.engine.close()
            if self._stored is not None:
                self._stored.store.flush()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; an error if the checkpoint had none."""
        return Tokenizer.of(self._texts.contents, self.bundle)

    @cached_property
    def default_sampling(self) -> SamplingConfig:
        """What ``generation_config.json`` asks for; greedy if there is none."""
        return default_sampling(self._texts)

    @property
    def max_tokens(self) -> int:
        """The longest prompt, in tokens."""
        return self.manifest.buckets[-1].max_tokens

    def bucket(self, tokens: int) -> int:
        """The number of chunks of the bucket that a prompt of ``tokens`` tokens is dispatched to."""
        return bucket_for(self.manifest.config, tokens).chunks

    def prefill(self, input_ids: ArrayLike | Tokens[Tokens[int]], *, all_logits: bool = False) -> Logits:
        """Computes a prompt, or a batch of prompts of any lengths; what was in the cache is forgotten.

        Args:
            input_ids: ``[T]``, ``[B, T]``, or a list of lists of different lengths.
            all_logits: of all the tail's tokens, not only of the last; their number must be the same in all rows.

        Returns:
            float32 ``[B, S, V]``, or ``[B, 1, V]`` of the last tokens.

        Raises:
            MesaError: an empty prompt, ids outside the vocabulary, a prompt longer than the largest bucket.
        """
        prompts = self._prompts(input_ids)
        with self._alone():
            turns = self._new_turns(prompts, ReadOptions(self._stored, reuses=False), all_logits=all_logits)
            return self._computed(self._begin(turns), undo_to_nothing=True)

    def extend(self, input_ids: ArrayLike | Tokens[Tokens[int]], *, all_logits: bool = False) -> Logits:
        """Appends tokens to the live texts, such as a second turn; arguments and result as of :meth:`prefill`.

        A text may outgrow the largest bucket, as it may by :meth:`step`, where the graph leaves lengths free.
        """
        prompts = self._prompts(input_ids)
        with self._alone():
            turns = self._later_turns(prompts, ReadOptions(self._stored), all_logits=all_logits)
            return self._computed(self._begin(turns))

    def step(self, token: int | ArrayLike) -> Logits:
        """Appends one token to each live text; logits of the next, float32 ``[B, 1, V]``."""
        with token_ids(token):
            column = np.asarray(token).reshape(-1, 1)
        tokens = self._prompts(column)
        with self._alone():
            if not any(self.lengths):
                raise InputError("step needs a prompt in the cache; call prefill first")
            return self._computed(self._begin(self._later_turns(tokens, ReadOptions(self._stored))))

    def _new_turns(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> list[Turn]:
        """Turns of new texts, which take the place of the live ones; those are forgotten."""
        plans = [plan_of_turn(self.manifest, None, len(prompt.ids), prompt.edges) for prompt in prompts]
        wanted = self._wanted(plans, prompts, all_logits)
        kept = self._kept_texts(plans, prompts) if how.reuses else [None] * len(prompts)
        for text in self._live:
            if not any(text is other for other in kept):
                self.engine.close_text(text)
        self._live = [text for text in kept if text is not None]
        self._live = [self.engine.open_text() if text is None else text for text in kept]
        rest = [
            PromptIds(prompt.ids[len(text) :], prompt.edges) for text, prompt in zip(self._live, prompts, strict=True)
        ]
        return self._turns(rest, wanted, how.stored)

    def _kept_texts(self, plans: list[Plan], prompts: list[PromptIds]) -> list[Sequence | None]:
        """For each prompt, a live text that differs from it in its tail at most, and has lost that."""
        left, kept = list(self._live), []
        for plan, prompt in zip(plans, prompts, strict=True):
            same = next((text for text in left if text.begins(plan, prompt.ids)), None)
            if same is not None:
                self._stop_generating(same)
                left = [text for text in left if text is not same]
                self.engine.cut_text(same, plan.tail.start)
            kept.append(same)
        return kept

    def _later_turns(self, prompts: list[PromptIds], how: ReadOptions, *, all_logits: bool = False) -> list[Turn]:
        """Turns of the live texts; whatever is wrong with one of them is said before anything is changed."""
        self._require_texts(len(prompts))
        for text in self._live:
            text.require_kv()
        pairs = zip(self._live, prompts, strict=True)
        plans = [plan_of_turn(self.manifest, text, len(prompt.ids)) for text, prompt in pairs]
        return self._turns(prompts, self._wanted(plans, prompts, all_logits), how.stored)

    def _turns(self, prompts: list[PromptIds], wanted: int, stored: StoredChunks | None) -> list[Turn]:
        return [
            Turn(text, np.array(prompt.ids, np.int64), wanted, keep_undo=True, edges=prompt.edges, stored=stored)
            for text, prompt in zip(self._live, prompts, strict=True)
        ]

    def _wanted(self, plans: list[Plan], prompts: list[PromptIds], all_logits: bool) -> int:
        """Of how many of the last tokens of each prompt the logits can be had, as one array."""
        if not all_logits:
            return 1
        if self.engine.runner.last_logits_only:
            raise InputError("these graphs give the last logits only, no all_logits; load the symbolic graph")
        sizes = {min(len(plan.tail), len(prompt.ids)) for plan, prompt in zip(plans, prompts, strict=True)}
        if len(sizes) > 1:
            raise InputError(
                f"all_logits of a batch needs tails of one length, these have {', '.join(map(str, sorted(sizes)))}; "
                "run the prompts one by one"
            )
        return sizes.pop()

    def _begin(self, turns: list[Turn]) -> list[Turn]:
        """Queues turns, all or none."""
        for turn in turns:
            self._stop_generating(turn.text)
        added = []
        try:
            for turn in turns:
                added.append(self.engine.add(turn))
        except BaseException:
            for turn in added:
                self.engine.abort(turn)
            raise
        self._changes += 1
        return turns

    def _computed(self, turns: list[Turn], *, undo_to_nothing: bool = False) -> Logits:
        """The logits ``[B, S, V]`` of turns, once all are computed; if one fails, all are undone."""
        try:
            self._run(turns, lambda turn: turn.is_finished)
            logits = np.stack([turn.logits for turn in turns if turn.logits is not None])
        except BaseException:
            self._undo(turns, to_nothing=undo_to_nothing)
            raise
        self._note_usage(turns)
        self.engine.settle(turns)
        return logits

    def _note_usage(self, turns: list[Turn]) -> None:
        self.usage = sum((turn.usage for turn in turns if turn.usage is not None), start=Usage())

    def _run(self, turns: list[Turn], is_done: Callable[[Turn], bool], progress: Progress | None = None) -> None:
        """Computes until all turns are done; raises the first error."""
        while not all(turn.is_finished or is_done(turn) for turn in turns):
            self.engine.step()
            if progress is not None:
                progress(*map(sum, zip(*(turn.progress for turn in turns), strict=True)))
            failed = next((turn for turn in turns if turn.error is not None), None)
            if failed is not None and failed.error is not None:
                raise failed.error

    def _undo(self, turns: list[Turn], *, to_nothing: bool) -> None:
        self.engine.settle(turns, undo=True)
        if to_nothing:
            for text in self._live:
                self.engine.close_text(text)
            self._live = []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread computes meanwhile."""
        if os.getpid() != self._process:  # before the lock, which another thread of the parent may have held
            raise InputError(
                "the process was forked after the model was loaded, and an engine's threads do not survive that; "
                "load the model in the new process"
            )
        with self.engine.lock:
            self.engine.require_open()  # first: texts may have been lost before
            try:
                yield
            except MemoryError as error:
                raise CapacityError(
                    f"out of memory{f' ({error})' if str(error) else ''}: use fewer rows or shorter prompts, or give "
                    "the process more memory"
                ) from error

    @property
    def device_memory(self) -> DeviceMemory | None:
        """What the model takes of the GPU's memory now; ``None`` where no engines run it."""
        store = self.engine.store
        return store.memory if isinstance(store, DeviceStore) else None

    def clear(self) -> None:
        """Forgets the live texts, and frees what they hold."""
        with self._alone():
            for text in self._live:
                self.engine.close_text(text)
            self._live = []
            self.engine.store.trim()
            self._changes += 1

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        """Copies of a live text's keys and values, ``[K, tokens, D]``, a layer each, as the engine keeps them."""
        with self._alone():
            return self.engine.store.read(self._live[row].require_kv())

    @property
    def texts(self) -> list[Sequence]:
        """The live texts, a row each; none before the first prompt."""
        return list(self._live)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the live texts, a number for each."""
        return [len(text) for text in self._live] or [0]

    def generate_ids(
        self,
        prompts: Tokens[Tokens[int]],
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        *,
        append: bool = False,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
    ) -> Iterator[list[int | None]]:
        """Generates tokens for a batch of prompts, all rows in step; see :meth:`stream` for what is not said here.

        Args:
            prompts: token ids of each row.
            max_new_tokens: the most tokens that a row gets.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            append: to the live texts (a second turn), instead of starting anew.

        Yields:
            The next token of each row, ``None`` once a row has ended. The end-of-text token itself is yielded.
        """
        how = self._options(reuse, cache_salt, progress)
        rows = [self._prompt(row.ids, documents, lead, reuse, append=append) for row in self._prompts(prompts)]
        yield from self._generate(rows, max_new_tokens, sampling, append, [False] * len(rows), how)

    def _generate(
        self,
        prompts: list[PromptIds],
        max_new_tokens: int,
        sampling: SamplingConfig | None,
        append: bool,
        ended: list[bool],
        how: ReadOptions,
    ) -> Iterator[list[int | None]]:
        """See :meth:`generate_ids`. ``ended``: of each row; the caller may end more of them between two tokens."""
        count = checked_count(max_new_tokens)
        choice, rows = sampling or self.default_sampling, range(len(ended))
        seeds = [None if choice.seed is None else choice.seed + row for row in rows]
        turns: list[Turn] = []
        changes = 0
        try:
            for index in range(count):
                with self._alone():
                    if index == 0:
                        turns = self._begin_generating(prompts, count, choice, seeds, how, append=append)
                    elif self._changes != changes:
                        raise InputError(
                            "another call has changed the cache since this generation's last token; finish one "
                            "generation before the next, give both prompts to one, or load the model twice"
                        )
                    chosen = self._next_tokens(
                        turns, ended, None if index else how.progress, new=index == 0 and not append
                    )
                    if index == 0:
                        self._note_usage(turns)
                    changes = self._changes
                yield chosen
                if all(ended):
                    return
        finally:
            if os.getpid() == self._process:
                self.engine.settle(turns)

    def _begin_generating(
        self,
        prompts: list[PromptIds],
        count: int,
        choice: SamplingConfig,
        seeds: list[int | None],
        how: ReadOptions,
        *,
        append: bool,
    ) -> list[Turn]:
        turns = self._later_turns(prompts, how) if append else self._new_turns(prompts, how)
        for turn, seed in zip(turns, seeds, strict=True):
            turn.sampler = Sampler(replace(choice, seed=seed))
            turn.max_new_tokens, turn.ends, turn.goes_on = count, frozenset(self.eos_token_ids), True
            turn.sampler.note([*turn.text.ids, *turn.text.shown, *turn.ids])
        return self._begin(turns)

    def _next_tokens(
        self, turns: list[Turn], ended: list[bool], progress: Progress | None, *, new: bool
    ) -> list[int | None]:
        """The next token of each turn that has not ended, computed together."""
        waiting = [turn for turn, end in zip(turns, ended, strict=True) if not end]
        for turn, end in zip(turns, ended, strict=True):
            if end:
                self.engine.abort(turn)
        for turn in waiting:
            turn.allowed = len(turn.tokens) + 1
        try:
            self._run(waiting, lambda turn: turn.is_paused, progress)
        except BaseException:
            self._undo(turns if new else waiting, to_nothing=new)
            self._changes += 1
            raise
        chosen = [turn.tokens[-1] if turn in waiting else None for turn in turns]
        for row, turn in enumerate(turns):
            ended[row] = ended[row] or (turn.tokens[-1] in turn.ends)
        return chosen

    def _stop_generating(self, text: Sequence) -> None:
        """A generation that nobody goes on with gives way to the next call."""
        turn = text.turn
        if turn is not None:
            self.engine.abort(turn)
            self.engine.settle([turn])

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Any of them ends the text."""
        if "tokenizer.json" in self._texts:
            return self.tokenizer.eos_token_ids
        return configured_eos_ids(self._texts)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generates text piece by piece; a piece never ends within a character, nor in what may be a stop string.

        Args:
            prompt: text or token ids.
            max_new_tokens: the most tokens to generate.
            stop: strings that end the text; they are not part of it.
            append: to the live texts (a second turn), instead of starting anew.
            sampling: how tokens are chosen; as the bundle's ``generation_config.json`` says if left out.
            documents: texts, or lists of token ids, that stand before the prompt; docs/documents.md has how they are
                read and reused.
            lead: text or token ids that stand before the documents.
            reuse: see :data:`~mesart.runtime.documents.Reuse`.
            cache_salt: only prompts of the same salt share chunks in the store.
            progress: called while the prompt is read, with the tokens that are there and those that there are to be.
            **options: fields of :class:`~mesart.runtime.SamplingConfig` that differ from it, such as
                ``temperature=0.7, top_p=0.9, seed=1``.
        """
        choice = self._sampling(sampling, options)
        row = self._prompt(prompt, documents, lead, reuse, append=append)
        how = self._options(reuse, cache_salt, progress)
        yield from self._streamed(row, max_new_tokens, stop, choice, how, append=append)

    def _streamed(
        self,
        prompt: PromptIds,
        max_new_tokens: int,
        stop: str | Tokens[str],
        choice: SamplingConfig,
        how: ReadOptions,
        *,
        append: bool,
    ) -> Iterator[str]:
        text = TextStream(self.tokenizer, stop, context=prompt.ids)
        for (token,) in self._generate([prompt], max_new_tokens, choice, append, [False], how):
            if token is None or token in self.eos_token_ids:
                break
            piece = text.push(token)
            if piece:
                yield piece
            if text.stopped:
                return
        rest = text.flush()
        if rest:
            yield rest

    def generate(
        self,
        prompt: Prompt | Tokens[str],
        max_new_tokens: int = 256,
        *,
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        lead: Prompt = "",
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Generates text for one prompt, or for each of a list of texts in one batch; options as of :meth:`stream`."""
        choice, how = self._sampling(sampling, options), self._options(reuse, cache_salt, progress)
        prompts = list(prompt) if is_batch(prompt) else [prompt]
        rows = [self._prompt(text, documents, lead, reuse, append=append) for text in prompts]  # type: ignore[arg-type]
        if not is_batch(prompt):
            pieces = self._streamed(rows[0], max_new_tokens, stop, choice, how, append=append)
            return "".join(pieces)
        texts = [TextStream(self.tokenizer, stop, context=row.ids) for row in rows]
        written: list[list[str]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for tokens in self._generate(rows, max_new_tokens, choice, append, ended, how):
            for row, token in enumerate(tokens):
                if token is not None and token not in self.eos_token_ids:
                    written[row].append(texts[row].push(token))
                    ended[row] = texts[row].stopped
        return ["".join([*row, text.flush()]) for row, text in zip(written, texts, strict=True)]

    def chat(
        self,
        messages: Tokens[Mapping[str, Any]],
        max_new_tokens: int = 256,
        *,
        stop: str | Tokens[str] = (),
        append: bool = False,
        sampling: SamplingConfig | None = None,
        documents: Tokens[Prompt] = (),
        reuse: Reuse = "auto",
        cache_salt: str = "",
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Streams the answer to a conversation, put into the bundle's chat template; options as of :meth:`stream`.

        Documents stand where the template has a place for them, else before the first message of the user.
        """
        choice, how = self._sampling(sampling, options), self._options(reuse, cache_salt, progress)
        if len(documents):
            self._require_first(append=append)
            row = self._document_texts.chat(messages, documents).joined(self.manifest, reuse)
        else:
            text = self.tokenizer.apply_chat_template(messages)
            (row,) = self._prompts([self.tokenizer.encode(text, add_special_tokens=False)])
        return self._streamed(row, max_new_tokens, stop, choice, how, append=append)

    def warm(
        self,
        documents: Tokens[Prompt],
        *,
        lead: Prompt = "",
        messages: Tokens[Mapping[str, Any]] | None = None,
        cache_salt: str = "",
        progress: Progress | None = None,
    ) -> WarmReport:
        """Has documents in the store before anybody asks about them; the live texts stay as they are.

        Args:
            documents: as of :meth:`stream`.
            lead: what will stand before them.
            messages: the conversation that they will be part of, as far as it is known; what the chat template puts
                before the documents is what matters.
            cache_salt: as of :meth:`stream`.
            progress: called with the tokens of documents that are there, and all of them.

        Raises:
            MesaError: the model has no store, or a document is longer than the largest bucket.
        """
        stored = self._options("always", cache_salt, progress).stored
        if stored is None:
            raise InputError("there is no store to warm: load the model with store=ChunkStore(...)")
        if messages is None:
            prompt = self._document_texts.plain(lead, documents, [0])
        else:
            prompt = self._document_texts.chat(messages, documents)
        with self._alone():
            report = warm(self.engine, stored, prompt, progress)
        stored.store.flush()
        return report

    @cached_property
    def _document_texts(self) -> DocumentTexts:
        return DocumentTexts(self.tokenizer if "tokenizer.json" in self._texts else None, self._vocabulary)

    def _options(self, reuse: Reuse, salt: str, progress: Progress | None) -> ReadOptions:
        check_reuse(reuse)
        if not isinstance(salt, str):
            raise InputError(f"cache_salt is {type(salt).__name__}; it is a text")
        stored = None if self._stored is None or reuse == "off" else replace(self._stored, salt=salt)
        return ReadOptions(stored, reuse != "off", progress)

    def _prompt(
        self, prompt: Prompt, documents: Tokens[Prompt], lead: Prompt, reuse: Reuse, *, append: bool
    ) -> PromptIds:
        if len(documents) or len(lead):
            self._require_first(append=append)
            return self._document_texts.plain(lead, documents, prompt).joined(self.manifest, reuse)
        return PromptIds(self._encode(prompt, append=append))

    def _require_first(self, *, append: bool) -> None:
        if append:
            raise InputError("documents stand at the beginning of a text; leave append out")

    def _sampling(self, sampling: SamplingConfig | None, options: Mapping[str, Any]) -> SamplingConfig:
        try:
            return replace(sampling or self.default_sampling, **options)
        except TypeError as error:
            raise InputError(f"unknown sampling option: {error}") from error

    def _encode(self, prompt: Prompt, *, append: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=not append)
        rows = self._prompts(prompt)
        if len(rows) != 1:
            raise InputError(f"one text is one list of token ids, got {len(rows)}; generate_ids takes a batch of them")
        return rows[0].ids

    def _prompts(self, input_ids: ArrayLike | Tokens[Tokens[int]]) -> list[PromptIds]:
        return checked_prompts(input_ids, self._vocabulary)

    def _require_texts(self, rows: int) -> None:
        if not self._live and rows == 1:
            self._live = [self.engine.open_text()]  # to append to nothing is to begin
        live = len(self._live)
        if not live:
            raise InputError("the cache is empty; call prefill first with a batch")
        if rows != live:
            raise InputError(f"the cache holds {live} prompts, got tokens for {rows}")
