"""Arguments out of their range: one line that names the option, before anything is opened or imported."""

from __future__ import annotations

import pytest

from mesart.scripts.cli import main

Capture = pytest.CaptureFixture[str]

BENCH = "bench b"
PASSKEY = "eval passkey b"
SUITE = "eval suite m -o r"
WRONG = [
    "generate b -p a -n 0",
    "generate b -p a -n -1",
    "generate b -p a -n 1e3",
    "generate b -p a -n 99999999999999999999",
    "generate b -p a --threads 0",
    "generate b -p a --threads 100000",
    "generate b -p a --threads 99999999999999999999",
    f"generate b -p a --threads {'9' * 5000}",
    "generate b -p a --temperature nan",
    "generate b -p a --temperature inf",
    "generate b -p a --temperature=-1",
    "generate b -p a --top-p 1.5",
    "generate b -p a --min-p -0.1",
    "generate b -p a --top-k -1",
    "generate b -p a --repetition-penalty 0",
    "generate b -p a --seed -1",
    "generate b -p a --seed x",
    "generate b -p a --stop ",
    "generate b -f ",
    "inspect ",
    "export m -o ",
    "export m -o c --rho nan",
    "export m -o c --rho inf",
    "export m -o c --rho 2",
    "export m -o c --max-tokens 0",
    "export m -o c --chunk-length 1.5",
    "export m -o c --dtype float64",
    "build b --gpu ",
    "build b --max-tokens -3",
    "validate b --steps -1",
    "validate b --seed -1",
    "validate b --buckets -1",
    f"{BENCH} --repeat 0",
    f"{BENCH} --new-tokens 0",
    f"{BENCH} --lengths 0",
    f"{PASSKEY} --prompts 0",
    f"{PASSKEY} --lengths 0",
    f"{PASSKEY} --depths 2",
    f"{PASSKEY} --depths nan",
    f"{PASSKEY} --digits 0",
    "eval perplexity b --places 0",
    "eval perplexity b --tokens 0",
    f"{SUITE} --jobs 0",
    f"{SUITE} --jobs 100000",
    f"{SUITE} --prompts 0",
    f"{SUITE} --seed -1",
    f"{SUITE} --device ",
    "eval cost m -o r --lengths 0",
    "eval cost m -o r --lengths 64 --repeat 0",
    "eval cost m -o r --lengths 64 --new-tokens 0",
    "eval threshold m --places 1",
    "eval threshold m --factor 1",
    "eval threshold m --margin nan",
    "tune b --seconds nan",
    "tune b --seconds -1",
    "tune b --finalists 0",
    "tune b --final-places -1",
]


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:60].replace("\0", "0"))
def test_out_of_range(line: str, capsys: Capture) -> None:
    arguments = line.split(" ")
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mesart: error: argument ")
    assert error.count("\n") == 1
    assert len(error) < 400
    names = [text for text in arguments if text.startswith("-") and not text[1:2].isdigit()]
    option = names[-1] if names else "bundle"
    assert option.partition("=")[0] in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bake"], "invalid choice: 'bake'"),
        (["inspect"], "required: bundle"),
        (["inspect", "b", "--loud"], "unrecognized arguments: --loud"),
        (["inspect", "a\0b"], "argument 2 holds a NUL character"),
        (["inspect", "b" * 100_000], "File name too long"),
        (["generate", "b"], "one of the arguments"),
        (["eval", "--lengths", "64"], "the following arguments are required: -o/--output"),
        (["eval", "chess"], "invalid choice: 'chess'"),
    ],
)
def test_command_lines_that_say_nothing(arguments: list[str], reason: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert len(error) < 2500


def test_help_and_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert main(["eval", "--help"]) == 0
    assert "passkey" in capsys.readouterr().out
