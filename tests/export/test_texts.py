"""What a checkpoint brings beside its weights reaches the bundle, or is refused before any work."""

from __future__ import annotations

import base64
import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from mesart.export import bundle as bundle_module
from mesart.export import export_model, texts
from mesart.export.texts import read_texts, tokenizer_files
from mesart.graphs import MesaError
from mesart.graphs.generation import SamplingConfig
from mesart.runtime.text import Tokenizer, configured_eos_ids, default_sampling
from mesart.runtime.text_files import TextFiles

CONFIG = LlamaConfig(vocab_size=320)


def read(folder: Path) -> tuple[TextFiles, list[str]]:
    """What a bundle of this checkpoint holds, and what export says about it."""
    lines: list[str] = []
    return TextFiles(folder, read_texts(folder, CONFIG, lines.append).files), lines


def generation(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_generation_settings_are_kept(checkpoint_copy: Path) -> None:
    wanted = {"eos_token_id": [1, 65, 66], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    generation(checkpoint_copy, **wanted, min_p=0.1, repetition_penalty=1.1)
    files, lines = read(checkpoint_copy)
    assert configured_eos_ids(files) == (1, 65, 66)
    assert default_sampling(files) == SamplingConfig(0.6, 20, 0.95, 0.1, 1.1)
    assert lines == []


def test_old_settings_in_the_config(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "generation_config.json").unlink()
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.5, "top_k": 7}))
    files, _ = read(checkpoint_copy)
    assert default_sampling(files) == SamplingConfig(temperature=0.5, top_k=7)
    assert configured_eos_ids(files) == (1,)


def test_what_is_not_followed_is_said(checkpoint_copy: Path) -> None:
    generation(
        checkpoint_copy, num_beams=4, stop_strings=["x"], penalty_alpha=0.6, eos_token_id=[1, 999], num_beam_groups=1
    )
    _, lines = read(checkpoint_copy)
    assert "does not follow num_beams=4, penalty_alpha=0.6, stop_strings=['x']" in lines[0]
    assert "no text ends with 999: the vocabulary has 320 tokens" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"do_sample": true, "temperature": "hot"}', "generation_config.json: temperature is hot"),
        (b'{"do_sample": 3}', "generation_config.json: do_sample is 3"),
        (b'{"eos_token_id": [[1]]}', "generation_config.json: eos_token_id is"),
        (b'{"pad_token_id": "x"}', 'generation_config.json: pad_token_id is "x"; it must be a token id'),
        (b"{", "generation_config.json is damaged"),
        (b"\xff", "generation_config.json is damaged"),
        (b'{"a":' * 9999 + b"1" + b"}" * 9999, "generation_config.json is damaged"),
        (b"[]", "generation_config.json is damaged: a JSON object"),
    ],
)
def test_damaged_settings_are_one_line(checkpoint_copy: Path, content: bytes, message: str) -> None:
    (checkpoint_copy / "generation_config.json").write_bytes(content)
    with pytest.raises(MesaError, match=message) as caught:
        read(checkpoint_copy)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"{",
        b'{"version": "1.0", "model": 3}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_a_damaged_tokenizer_is_refused_before_the_work(
    checkpoint_copy: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "open_network", lambda *_, **__: pytest.fail("the work has begun"))
    (checkpoint_copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(MesaError, match=r"has a tokenizer|tokenizer\.json is damaged"):
        export_model(checkpoint_copy, tmp_path / "bundle", max_tokens=64)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("place", ["vocabulary", "added token"])
def test_ids_that_no_table_has(checkpoint_copy: Path, tmp_path: Path, place: str) -> None:
    """The library would fill the memory with all the ids between, and end the process."""
    path = checkpoint_copy / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if place == "vocabulary":
        vocabulary = values["model"]["vocab"]
        vocabulary[next(iter(vocabulary))] = 10**9
    else:
        values["added_tokens"].append({**values["added_tokens"][0], "id": 10**9, "content": "<far>"})
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(MesaError, match="tokenizer.json: a token has the id 1000000000; no vocabulary has 16,777,216"):
        export_model(checkpoint_copy, tmp_path / "bundle", max_tokens=64)


def test_rules_that_lengthen_a_text_again_and_again(checkpoint_copy: Path, tmp_path: Path) -> None:
    """The library follows them as it reads the tokenizer: for each added token."""
    path = checkpoint_copy / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    rule = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100}
    values["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 9}
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(MesaError, match=r"tokenizer\.json: the normalizer may make a text .* times as long"):
        export_model(checkpoint_copy, tmp_path / "bundle", max_tokens=64)


def test_named_chat_templates_are_kept(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "additional_chat_templates").mkdir()
    (checkpoint_copy / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ messages[0].content }}")
    files, _ = read(checkpoint_copy)
    assert not [name for name in files.contents if "/" in name]
    chat, tools = [{"role": "user", "content": "x"}], [{"type": "function", "function": {"name": "f"}}]
    theirs: Any = AutoTokenizer.from_pretrained(checkpoint_copy)
    for ours in (Tokenizer.of(files.contents), Tokenizer(checkpoint_copy)):
        for given in (None, tools):
            expected = theirs.apply_chat_template(chat, tools=given, tokenize=False, add_generation_prompt=True)
            assert ours.apply_chat_template(chat, tools=given) == expected
        assert ours.apply_chat_template(chat, template="tool_use") == "TOOLS x"
        with pytest.raises(MesaError, match="no chat template 'rag'; there are default, tool_use"):
            ours.apply_chat_template(chat, template="rag")


def test_no_tokenizer(checkpoint_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint_copy / name).unlink()
    files, lines = read(checkpoint_copy)
    assert "driven by token ids" in lines[0]
    assert "tokenizer.json" not in files
    (checkpoint_copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MesaError, match="no vocabulary .* is the download complete"):
        read(checkpoint_copy)


def test_nothing_is_written_over(checkpoint_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("weights")
    with pytest.raises(MesaError, match="weights in a file called config.json"):
        read_texts(checkpoint_copy, CONFIG, print).write(tmp_path, type("Network", (), {"config": CONFIG}))
    assert (tmp_path / "config.json").read_text() == "weights"


def test_tekken(tmp_path: Path) -> None:
    """Mistral's format, alone."""
    special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 1000))]
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i) if i < 128 else None}
        for i in range(256)
    ]
    pattern = r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 1256, "default_num_special_tokens": 1000}
    values = {
        "config": {"pattern": pattern, **sizes, "version": "v7"},
        "vocab": vocabulary,
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(special)],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 1256}))
    ours, theirs = Tokenizer.of(tokenizer_files(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hi", "Héllo, wörld 12\n", "日本語"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    """GPT-2's format, alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(
        models.BPE(vocab={c: i for i, c in enumerate([*letters, "th", "<|endoftext|>"])}, merges=[("t", "h")])
    )
    library.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours, theirs = Tokenizer.of(tokenizer_files(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("the other") == theirs.encode("the other")


def _field(number: int, kind: int, content: Any) -> bytes:
    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    body = varint(len(content)) + content if kind == 2 else varint(content) if kind == 0 else content
    return varint(number << 3 | kind) + body


def _sentencepiece_model() -> bytes:
    def piece(text: str, kind: int, score: float = 0.0) -> bytes:
        return _field(1, 2, _field(1, 2, text.encode()) + _field(2, 5, struct.pack("<f", score)) + _field(3, 0, kind))

    letters = [piece(letter, 1, -float(i)) for i, letter in enumerate("\u2581abcdefgh")]
    pieces = [
        piece("<unk>", 2),
        piece("<s>", 3),
        piece("</s>", 3),
        *(piece(f"<0x{b:02X}>", 6) for b in range(256)),
        *letters,
    ]
    trainer = _field(3, 0, 2) + _field(35, 0, 1) + _field(40, 0, 0) + _field(41, 0, 1) + _field(42, 0, 2)
    return b"".join(pieces) + _field(2, 2, trainer) + _field(3, 2, _field(1, 2, b"identity"))


@pytest.mark.parametrize(("content", "package"), [(b"\n\x0e", "sentencepiece"), (b"YQ== 0\n", "tiktoken")])
def test_a_missing_package_is_named(
    tmp_path: Path, content: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(MesaError, match=f"tokenizer.model is a tokenizer of {package}, .* pip install {package}"):
        tokenizer_files(tmp_path)


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="needs sentencepiece")
def test_sentencepiece(tmp_path: Path) -> None:
    """As Vicuna 1.5 comes: tokenizer.model alone."""
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece_model())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer.of(tokenizer_files(tmp_path))
    for text in ("abba", "a bad head", "é x"):
        assert ours.encode(text, add_special_tokens=False) == library.encode(text)


def test_any_error_of_the_library_is_one_line(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As that of libraries in Rust."""

    for error in (PanicException("a\nb"), TypeError("c"), Exception("d"), KeyError("e"), RecursionError()):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(MesaError, match="has a tokenizer that cannot be loaded: "):
            tokenizer_files(checkpoint_copy)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer_files(checkpoint_copy)
