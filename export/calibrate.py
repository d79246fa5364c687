"""Quantisation that looks at a text, by AutoRound, whose checkpoint is then exported as any quantised one.

- ``auto-round`` (Cheng et al. 2023, https://arxiv.org/abs/2309.05516): learns, block by block and by the signs of
  gradients, whether each weight is rounded up or down.
- ``awq`` (Lin et al. 2023, https://arxiv.org/abs/2306.00978, section 3.2): scales weights up where their inputs are
  large, and what is in front of them down, before it rounds: the weights that matter most lose least.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mesart.export.checkpoint import load_model
from mesart.graphs.bundle.manifest import Quantisation
from mesart.graphs.errors import InputError
from mesart.graphs.user_data import user_data

METHODS = {"auto-round": "auto_round", "awq": "awq"}
"""The library's names of the methods."""

EXCERPTS = 128
"""Of the text: the library's default."""

_CHARACTERS = 8
"""That a token has at most, on average: a longer excerpt of the text is tokenised than is used."""


@contextmanager
def calibrated(
    source: Path, place: Path, how: Quantisation, method: str, text: str, tokens: int, config: Any
) -> Iterator[Path]:
    """A quantised checkpoint, which is gone afterwards; the model is in memory in float32 while it is made.

    Args:
        source: the checkpoint's folder, with a tokenizer.
        place: where there is space for a folder.
        how: int4 or int8.
        method: of :data:`METHODS`.
        text: what the model shall be good at; not what it is judged by later.
        tokens: of an excerpt of the text: no more than the model was trained on.
        config: the checkpoint's.

    Yields:
        The new checkpoint's folder.

    Raises:
        ModuleNotFoundError: auto-round, which the extra ``calibrate`` installs, is missing.
        MesaError: the text is too short, no such method, or there is no tokenizer.
    """
    if method not in METHODS:
        raise InputError(f"unknown calibration {method!r}; there are {', '.join(METHODS)}")
    from auto_round import AutoRound  # noqa: PLC0415  (slow to import, and rarely needed)

    with user_data(f"{source} has no tokenizer that loads, and calibration needs one"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    excerpts = _excerpts(tokenizer, text, tokens)
    model: Any = load_model(source, "float32", copy.deepcopy(config))
    # Where AutoRound knows the source, it takes what was float32 there and is not packed from there again, and so drops
    # the scales that AWQ moved into norms.
    model.name_or_path = model.config._name_or_path = ""
    library = AutoRound(
        model,
        tokenizer,
        algorithm=METHODS[method],
        bits=how.bits,
        group_size=how.group_size or -1,
        sym=how.symmetric,
        dataset=excerpts,
        nsamples=len(excerpts),
        seqlen=tokens,
        device_map="cpu",
        low_cpu_mem_usage=False,  # or it writes while it works
    )
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".calibrated-", dir=place) as folder:
        _, written = library.quantize_and_save(folder, format="auto_round")
        yield Path(written[0] if isinstance(written, list) else written)


def _excerpts(tokenizer: Any, text: str, tokens: int) -> list[Tensor]:
    """int64 ``[1, tokens]`` each, from places all over the text."""
    length = tokens * _CHARACTERS
    steps = torch.linspace(0, max(0, len(text) - length), EXCERPTS).long().tolist()
    places = dict.fromkeys(steps)
    ids = [tokenizer(text[at : at + length], add_special_tokens=False)["input_ids"][:tokens] for at in places]
    whole = [torch.tensor([row]) for row in ids if len(row) == tokens]
    if len(whole) < EXCERPTS // 2:
        raise InputError(
            f"the calibration text of {len(text):,} characters gives {len(whole)} excerpts of {tokens} tokens; "
            f"at least {EXCERPTS // 2} are needed, so give a longer one"
        )
    return whole


__all__ = ["METHODS", "calibrated"]
