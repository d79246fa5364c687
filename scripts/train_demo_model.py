"""Train the demo models: small models that find passkeys, from scratch, on windows of at most 256 tokens.

Everything about them is ordinary: positions 0 to 255, plain causal attention, a plain transformers checkpoint. What
they do far past their window is Mesa-Extrapolation's doing at inference. The one with rotary positions ships with the
package; the two others, by the same recipe, stand in for the paper's models with ALiBi and without positions. Each
takes about 20 minutes on one idle CPU core:

    python scripts/train_demo_model.py
    python scripts/train_demo_model.py --positions alibi --output models/alibi
    python scripts/train_demo_model.py --positions none --output models/nope

With `--mixture tasks` it also learns the small tasks of `mesart.evaluation.tasks`, which ask for more than one number:

    python scripts/train_demo_model.py --mixture tasks --output models/tasks
"""

import argparse
import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolLM3Config,
)

from mesart.evaluation.corpus import library_documents, library_text
from mesart.evaluation.passkey import (
    INTRODUCTION,
    NEEDLE,
    QUESTION,
    STANDARD_FILLER,
    Encode,
    minimum_length,
    passkey_prompt,
    prompt_rng,
)
from mesart.evaluation.tasks import Writer, tasks

DEMO_MODEL = Path(__file__).resolve().parents[1] / "evaluation" / "demo_model"
WINDOW = 256  # T_r: no training sequence is longer
BATCH = 32
VOCABULARY = 2048
DIGITS = 5
LEARNING_RATE = 3e-3
SPECIAL_TOKENS = BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = range(3)  # a BPE trainer gives special tokens the first ids
# A prompt as one user message reads like the bare prompt, so that the answer is a continuation of it.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"

TEXT_SHARE = 0.4  # of the windows: library text; the others are passkey prompts
UNRELATED_SHARE = 0.5  # of the text windows: unrelated excerpts before the text
DECOY_SHARE = 0.4  # of the prompts: other numbers with names, which must not be taken for the key
BROKEN_SHARE = 0.2  # of the prompts: the needle cut in two, as at the border of two chunks
ANSWER_WEIGHT, OTHER_WEIGHT = 3.0, 0.3  # of a token in the loss

# The mixture of tasks: shares of the windows; the rest is shared among the tasks, by weights where they are not 1.
MIXTURE_TEXT_SHARE = 0.2
MIXTURE_PASSKEY_SHARE = 0.15
TASK_WEIGHTS = {"passkey": 0.0, "passkey-random": 0.0, "cwe": 0.5, "fwe": 0.5}  # passkeys have windows of their own
TASK_TEXTS = 300  # of each task, for the tokenizer

DECOYS = (
    " The {name} is {number}.",
    " {number} is the {name}.",
    " The {name} is {number}. Remember it.",
    " {name} = {number}",
    " {number},",
)
DECOY_NAMES = (
    "pass word",
    "pass phrase",
    "pass code",
    "door key",
    "primary key",
    "cache key",
    "key",
    "next key",
    "access code",
    "answer",
    "lucky number",
    "port number",
    "line number",
    "default value",
)

Window = tuple[list[int], list[float]]  # token ids, and the weight in the loss of predicting each of them


def passkey_texts() -> list[str]:
    """The words of the passkey task."""
    return [INTRODUCTION + "".join(STANDARD_FILLER) + NEEDLE.format(key="") + QUESTION] * 5000


def task_texts() -> list[str]:
    """The words of all tasks: training prompts with hardly any filling."""
    characters = Writer(lambda text: list(text.encode()), text=library_text("train"))
    return [
        task.sample(characters, task.minimum_length(characters), prompt_rng("train", -1, index)).text
        for task in tasks("small").values()
        for index in range(TASK_TEXTS)
    ]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on the library's training text and on the words of the task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*library_documents("train"), *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class WindowSource:
    """Makes the training windows: `window(seed, index)` depends on nothing but its arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        self.text = library_text("train")
        self.encode: Encode = lambda text: backend.encode(text, add_special_tokens=False).ids
        self.encode_cached: Encode = functools.lru_cache(4096)(self.encode)
        documents = backend.encode_batch(library_documents("train"), add_special_tokens=False)
        self.stream = [token for document in documents for token in [*document.ids, EOS_ID]]
        self.introduction = 1 + len(self.encode(INTRODUCTION))
        self.question = len(self.encode(QUESTION))
        self.answer = len(self.encode(" " + "7" * DIGITS)) + 1
        self.shortest = minimum_length(self.encode, digits=DIGITS, prefix_ids=[BOS_ID])

    def window(self, seed: int, index: int) -> Window:
        """One window of `WINDOW` tokens."""
        rng = prompt_rng("train", seed, index)
        ids, weights = self._start(rng)
        fill = self._excerpt(rng, WINDOW - len(ids))
        return ids + fill, weights + [OTHER_WEIGHT] * len(fill)

    def _start(self, rng: random.Random) -> Window:
        return self._text_window(rng) if rng.random() < TEXT_SHARE else self._passkey_window(rng)

    def _excerpt(self, rng: random.Random, length: int) -> list[int]:
        start = rng.randrange(len(self.stream) - length)
        return self.stream[start : start + length]

    def _text_window(self, rng: random.Random) -> Window:
        """The start of a window of text: half of them open with unrelated excerpts,
        which the model learns to disregard."""
        ids = [BOS_ID]
        if rng.random() < UNRELATED_SHARE:
            for _ in range(rng.randint(1, 4)):
                ids += self._excerpt(rng, rng.randint(8, 56))
        return ids, [OTHER_WEIGHT] * len(ids)

    def _passkey_window(self, rng: random.Random) -> Window:
        """A prompt and its answer, sometimes with decoys, sometimes with the needle in two pieces."""
        longest = WINDOW - self.answer
        length = longest if rng.random() < 0.5 else rng.randint(self.shortest, longest)
        decoys = self._decoys(rng) if rng.random() < DECOY_SHARE else []
        while decoys and length - sum(map(len, decoys)) < self.shortest:
            decoys.pop()
        standard = rng.random() < 0.5
        prompt = passkey_prompt(
            self.encode_cached if standard else self.encode,
            length - sum(map(len, decoys)),
            rng.random(),
            rng,
            filler="standard" if standard else "random",
            filler_text=self.text,
            digits=DIGITS,
            prefix_ids=[BOS_ID],
        )
        ids = list(prompt.input_ids)
        start, end = prompt.needle
        for decoy in decoys:
            place = rng.choice([*range(self.introduction, start + 1), *range(end, len(ids) - self.question + 1)])
            ids[place:place] = decoy
            if place <= start:
                start, end = start + len(decoy), end + len(decoy)
        if rng.random() < BROKEN_SHARE:
            # Chunks see the head before them, then text from anywhere, even from the middle of the needle: so let the
            # text between head and question start with the needle's second piece and end with its first.
            head, cut, question = (
                rng.randint(self.introduction, start),
                rng.randint(start + 1, end - 1),
                len(ids) - self.question,
            )
            ids = ids[:head] + ids[cut:question] + ids[head:cut] + ids[question:]
        answer = [*self.encode_cached(" " + prompt.answer), EOS_ID]
        return ids + answer, [OTHER_WEIGHT] * len(ids) + [ANSWER_WEIGHT] * len(answer)

    def _decoys(self, rng: random.Random) -> list[list[int]]:
        return [
            self.encode(
                rng.choice(DECOYS).format(
                    name=rng.choice(DECOY_NAMES),
                    number="".join(rng.choices("0123456789", k=rng.choice((DIGITS, DIGITS, DIGITS, 3, 4, 6)))),
                )
            )
            for _ in range(rng.randint(1, 4))
        ]


class TaskWindowSource(WindowSource):
    """Makes the windows of the mixture: text, passkeys as above, and all small tasks in the library's training text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.writer = Writer(functools.lru_cache(1 << 16)(self.encode), (BOS_ID,), self.text)
        self.tasks = list(tasks("small").values())
        self.task_weights = [TASK_WEIGHTS.get(task.name, 1.0) for task in self.tasks]

    def _start(self, rng: random.Random) -> Window:
        kind = rng.random()
        if kind < MIXTURE_TEXT_SHARE:
            return self._text_window(rng)
        if kind < MIXTURE_TEXT_SHARE + MIXTURE_PASSKEY_SHARE:
            return self._passkey_window(rng)
        return self._task_window(rng)

    def _task_window(self, rng: random.Random) -> Window:
        """A prompt and its answer, sometimes with what is in between in two pieces, the second first."""
        (task,) = rng.choices(self.tasks, self.task_weights)
        shortest, room, full = task.minimum_length(self.writer), WINDOW, rng.random() < 0.5
        while True:
            sample = task.sample(self.writer, room if full else rng.randint(shortest, room), rng)
            answer = [*self.encode(task.answer(sample)), EOS_ID]
            room = WINDOW - len(answer)
            if len(sample.input_ids) <= room:
                break
        ids = list(sample.input_ids)
        if "depth" in sample.facts and rng.random() < BROKEN_SHARE:  # see _passkey_window
            start, end = sample.body
            cut = rng.randint(start, end)
            ids[start:end] = ids[cut:end] + ids[start:cut]
        return ids + answer, [OTHER_WEIGHT] * len(ids) + [ANSWER_WEIGHT] * len(answer)


def new_model(positions: str) -> PreTrainedModel:
    """The untrained model: 1.05 million parameters, 1.18 million with ALiBi (MPT has no grouped queries)."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    llama: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    config: PreTrainedConfig
    if positions == "alibi":
        config = MptConfig(d_model=128, n_heads=4, n_layers=4, expansion_ratio=4, max_seq_len=WINDOW, **sizes)
    elif positions == "none":
        config = SmolLM3Config(no_rope_layers=[0] * llama["num_hidden_layers"], **llama, **sizes)  # 0: without rotary
    else:
        config = LlamaConfig(**llama, **sizes)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    return model


def batches(source: WindowSource, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights, both `[BATCH, WINDOW]`."""
    for step in range(steps):
        windows = [source.window(seed, step * BATCH + row) for row in range(BATCH)]
        yield torch.tensor([ids for ids, _ in windows]), torch.tensor([weights for _, weights in windows])


def compiled_loss(model: PreTrainedModel) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function of ids and weights `[BATCH, WINDOW]`: the weighted loss, and the answers' loss, in nats per token."""

    def loss(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        answers = weights > 1
        return (losses * weights).sum() / weights.sum(), (losses.detach() * answers).sum() / answers.sum()

    return torch.compile(loss, dynamic=False)


def train(
    model: PreTrainedModel,
    source: WindowSource,
    *,
    steps: int,
    seed: int,
    save_every: int,
    save: Callable[[int], None],
) -> None:
    """Train in place: Muon for the matrices, AdamW for the embedding and the norms, linear warm-up and cosine decay."""
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    warm_up = min(100, max(1, steps // 10))
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warm_up),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
            ],
            [warm_up],
        )
        for optimizer in optimizers
    ]
    loss_of = compiled_loss(model)
    progress = tqdm(batches(source, seed, steps), total=steps, unit="step", mininterval=5)
    for step, (ids, weights) in enumerate(progress, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss, answer_loss = loss_of(ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 25 == 0 or step == steps:
            progress.set_postfix(loss=f"{loss.item():.3f}", answer=f"{answer_loss.item():.4f}")
        if save_every and step % save_every == 0:
            save(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL, help="folder to write the checkpoint to")
    parser.add_argument("--positions", choices=("rotary", "alibi", "none"), default="rotary")
    parser.add_argument("--mixture", choices=("passkey", "tasks"), default="passkey", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of 32 windows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the windows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=0, help="also write OUTPUT/step-N every so many steps")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(passkey_texts() if arguments.mixture == "passkey" else task_texts())
    print(f"tokenizer trained in {time.monotonic() - started:.0f} s")
    source = WindowSource(tokenizer) if arguments.mixture == "passkey" else TaskWindowSource(tokenizer)
    print(f"{len(source.stream)} tokens; source ready after {time.monotonic() - started:.0f} s")
    model = new_model(arguments.positions)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
        )
        generation.save_pretrained(folder)

    train(
        model,
        source,
        steps=arguments.steps,
        seed=arguments.seed,
        save_every=arguments.save_every,
        save=lambda step: save(arguments.output / f"step-{step}"),
    )
    save(arguments.output)
    print(
        f"trained {arguments.steps} steps in {(time.monotonic() - started) / 60:.1f} minutes; wrote {arguments.output}"
    )


if __name__ == "__main__":
    main()
