"""One measurement of scripts/bench_peers.py or bench_documents.py, in a process: `python peer_worker.py JOB.json`.

It runs in the environment of the system that it measures, so nothing of MesaRT, nor any other package, is imported
before it is needed. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What is to be measured."""

    system: str
    model: str
    """A bundle, a GGUF file or a checkpoint."""
    threads: int
    new_tokens: int
    """Behind the first."""
    prompt: list[int]
    warm_up: list[int]
    """Another text, run first and not counted: systems that remember a prompt must not know the counted one."""
    settings: dict[str, Any]
    questions: list[dict[str, Any]] = field(default_factory=list)
    """Instead of the prompt: ids of ``documents`` and of a ``question`` behind them, one after the other. ``forgets``:
    what is forgotten before, of a system that has it: its ``memory``, or all but the disk (``process``)."""


@dataclass
class Answer:
    """What came out for a prompt, and when."""

    prompt_tokens: int
    """As the system has counted them."""
    arrivals: list[tuple[int, float]] = field(default_factory=list)
    """How many tokens there were, and seconds from the prompt to then."""
    tokens: list[int] = field(default_factory=list)
    """Empty where the system tells the text only."""
    text: str = ""
    reported: dict[str, Any] = field(default_factory=dict)
    """What the system itself says that it took."""

    @property
    def per_token(self) -> float:
        """Seconds a token, from the first to the last arrival."""
        (first, start), (last, end) = self.arrivals[0], self.arrivals[-1]
        return (end - start) / (last - first)

    @property
    def first_token(self) -> float:
        """Seconds to the first token. A system that streams text holds back what is no whole character yet."""
        count, seconds = self.arrivals[0]
        return seconds - (count - 1) * self.per_token


@dataclass
class System:
    """A system that is loaded."""

    answer: Callable[[list[int], int], Answer]
    """Greedy, past the end of text: a prompt's ids, and how many tokens."""
    numbers: str
    """What it computes in and keeps its cache in."""
    packages: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    ask: Callable[[list[list[int]], list[int], str], float] | None = None
    """Documents, a question and what is forgotten before: seconds to the first token. Others get them as a prompt."""


class Clock:
    """Counts tokens as they come."""

    def __init__(self, prompt: list[int]) -> None:
        self.answer = Answer(len(prompt))
        self.start = time.perf_counter()

    def arrive(self, *tokens: int) -> None:
        self.answer.tokens += tokens
        self.arrive_at(len(self.answer.tokens))

    def arrive_at(self, count: int) -> None:
        self.answer.arrivals.append((count, time.perf_counter() - self.start))


def mesart(job: Job) -> System:
    from mesart.runtime import MesaModel  # noqa: PLC0415  (each system's packages only where it runs)

    model = MesaModel.load(job.model, threads=job.threads, verify=False, **job.settings)

    def answer(prompt: list[int], count: int) -> Answer:
        clock = Clock(prompt)
        clock.arrive(int(model.prefill(prompt)[0, -1].argmax()))
        while len(clock.answer.tokens) < count:
            clock.arrive(int(model.step(clock.answer.tokens[-1])[0, -1].argmax()))
        return clock.answer

    numbers = f"on {model.backend}, computes and caches in {model.manifest.dtype}"
    return System(answer, numbers, ("mesart", model.backend))


def mesart_documents(job: Job) -> System:
    """MesaRT with a store of chunks, in memory and in a folder that is gone behind the measurement."""
    from tempfile import TemporaryDirectory  # noqa: PLC0415

    from mesart.runtime import ChunkStore, MesaModel  # noqa: PLC0415

    settings = dict(job.settings)
    memory, folder = settings.pop("memory"), TemporaryDirectory(dir=settings.pop("folder", None))

    def load() -> MesaModel:
        store = ChunkStore(memory, folder.name, "100GiB")
        return MesaModel.load(job.model, threads=job.threads, verify=False, store=store, **settings)

    stores = [model := load()]

    def ask(documents: list[list[int]], question: list[int], forgets: str) -> float:
        model = stores[0]
        assert model.store is not None
        model.store.flush()
        if forgets:
            model.clear()
            model.store.clear_memory()
        if forgets == "process":
            model.close()
            stores[0] = model = load()
        clock = Clock(question)
        for (token,) in model.generate_ids([question], 1, documents=documents, reuse="always"):
            clock.arrive(token or 0)
        return clock.answer.arrivals[0][1]

    def answer(prompt: list[int], count: int) -> Answer:
        clock = Clock(prompt)
        for (token,) in stores[0].generate_ids([prompt], count):
            clock.arrive(token or 0)
        return clock.answer

    numbers = f"on {model.backend}, computes and caches in {model.manifest.dtype}"
    return System(answer, numbers, ("mesart", model.backend), ask=ask)


def transformers(job: Job) -> System:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    dtype = job.settings["dtype"]
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(job.model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()

    def answer(prompt: list[int], count: int) -> Answer:
        with torch.inference_mode():
            clock = Clock(prompt)
            output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            clock.arrive(int(output.logits[0, -1].argmax()))
            while len(clock.answer.tokens) < count:
                last = torch.tensor([clock.answer.tokens[-1:]])
                output = model(last, past_key_values=output.past_key_values, use_cache=True)
                clock.arrive(int(output.logits[0, -1].argmax()))
            return clock.answer

    return System(answer, f"computes and caches in {dtype}", ("torch", "transformers"))


def openvino_genai(job: Job) -> System:
    import numpy as np  # noqa: PLC0415
    import openvino  # noqa: PLC0415
    import openvino_genai as genai  # type: ignore[import-not-found]  # noqa: PLC0415

    pipeline = genai.LLMPipeline(job.model, "CPU", INFERENCE_NUM_THREADS=job.threads, **job.settings)

    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, clock: Clock) -> None:
            super().__init__()
            self.clock = clock

        def write(self, token: int | list[int]) -> Any:
            self.clock.arrive(*(token if isinstance(token, list) else [token]))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def answer(prompt: list[int], count: int) -> Answer:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        ids = openvino.Tensor(np.array([prompt], np.int64))
        streamer = Streamer(Clock(prompt))
        metrics = pipeline.generate(ids, config, streamer).perf_metrics
        found = streamer.clock.answer
        found.prompt_tokens = metrics.get_num_input_tokens()
        found.reported = {"first_token": metrics.get_ttft().mean / 1e3, "per_token": metrics.get_tpot().mean / 1e3}
        return found

    # The pipeline does not show what it was compiled with: this is what the CPU takes where it is not told.
    core = openvino.Core()
    core.set_property("CPU", job.settings)
    keys = ("INFERENCE_PRECISION_HINT", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
    computes, *caches = (_type_name(core.get_property("CPU", key)) for key in keys)
    numbers = f"computes in {computes}, caches keys in {caches[0]}, values in {caches[1]}"
    packages = ("openvino", "openvino-genai", "openvino-tokenizers")
    group = core.get_property("CPU", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    return System(answer, numbers, packages, {"activations in 8 bits, in groups of": group})


def _type_name(kind: Any) -> str:
    return str(kind.get_type_name() if hasattr(kind, "get_type_name") else kind)


def llama_cpp(job: Job) -> System:
    import xllamacpp  # type: ignore[import-not-found]  # noqa: PLC0415

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job.model
    parameters.n_parallel = 1
    # Not the model's whole window: less memory.
    asked = [sum(map(len, asked["documents"])) + len(asked["question"]) for asked in job.questions]
    parameters.n_ctx = max(len(job.prompt), len(job.warm_up), *asked, 0) + job.new_tokens + 8
    parameters.cache_ram_mib = 0  # remembers no prompts
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job.threads
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def answer(prompt: list[int], count: int) -> Answer:
        clock, found = Clock(prompt), []

        def take(chunk: dict[str, Any] | str) -> None:
            answered = json.loads(chunk) if isinstance(chunk, str) else chunk
            found.append(answered)
            if "timings" in answered:
                clock.arrive_at(answered["timings"]["predicted_n"])

        request = {
            "prompt": prompt,
            "n_predict": count,
            "ignore_eos": True,
            "cache_prompt": bool(job.questions),
            "temperature": 0.0,
            "top_k": 1,
            "stream": True,
            "timings_per_token": True,
        }
        server.handle_completions(request, take)
        if not clock.answer.arrivals:
            raise RuntimeError(f"llama.cpp answered without a token: {found[-1:]}")
        timings = found[-1]["timings"]
        clock.answer.prompt_tokens = timings["prompt_n"] + timings["cache_n"]
        clock.answer.text = "".join(choice["text"] for answered in found for choice in answered.get("choices", ()))
        per_token = timings["predicted_ms"] / max(1, timings["predicted_n"] - 1) / 1e3  # the prompt gives the first
        clock.answer.reported = {"first_token": timings["prompt_ms"] / 1e3, "per_token": per_token}
        return clock.answer

    caches = [xllamacpp.ggml_type(kind).name for kind in (parameters.cache_type_k, parameters.cache_type_v)]
    keys, values = (name.removeprefix("GGML_TYPE_").lower() for name in caches)
    numbers = f"activations in 8 bits where weights are quantised, caches keys in {keys}, values in {values}"
    return System(answer, numbers, ("xllamacpp",), {"built with": xllamacpp.get_system_info()})


SYSTEMS: dict[str, Callable[[Job], System]] = {
    "mesart": mesart,
    "mesart-documents": mesart_documents,
    "openvino-genai": openvino_genai,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
}


def measure(job: Job) -> dict[str, Any]:
    """Loads a system, warms it up and answers the prompt."""
    start = time.perf_counter()
    system = SYSTEMS[job.system](job)
    load = time.perf_counter() - start
    if job.warm_up:
        system.answer(job.warm_up, 3)
    if job.questions:
        return _about(system, load) | {"first_tokens": [_ask(system, **asked) for asked in job.questions]}
    count = 1 + job.new_tokens
    answer = system.answer(job.prompt, count)
    if answer.arrivals[-1][0] != count or answer.prompt_tokens != len(job.prompt):
        raise RuntimeError(
            f"{job.system} gave {answer.arrivals[-1][0]} tokens for a prompt of {answer.prompt_tokens}; "
            f"asked for {count} behind {len(job.prompt)}"
        )
    return {
        "first_token": answer.first_token,
        "per_token": answer.per_token,
        "answer": asdict(answer),
    } | _about(system, load)


def _about(system: System, load: float) -> dict[str, Any]:
    versions = {name: version(name) for name in system.packages}
    return {"load": load, "numbers": system.numbers, "notes": system.notes, "versions": versions}


def _ask(system: System, documents: list[list[int]], question: list[int], forgets: str = "") -> float:
    """Seconds to the first token."""
    if system.ask is not None:
        return system.ask(documents, question, forgets)
    return system.answer([token for document in documents for token in document] + question, 2).first_token


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(measure(job)), flush=True)
    os._exit(0)  # an engine that stumbles as it is taken down has been measured all the same


if __name__ == "__main__":
    main()
