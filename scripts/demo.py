"""`make demo`: a model trained on 256 tokens finds a passkey in prompts 32 times as long, through exported graphs."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from mesart.evaluation.bench import run_bench
from mesart.evaluation.passkey import passkey_prompt, prompt_rng
from mesart.evaluation.passkey_eval import run_passkey
from mesart.evaluation.validate import validate
from mesart.export import export_model
from mesart.graphs import MesaConfig
from mesart.runtime import MesaModel

MODEL = Path(__file__).resolve().parent.parent / "evaluation" / "demo_model"
LENGTHS = (256, 1024, 2048, 4096, 8192)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each length and filler")
    parser.add_argument("--bundle", type=Path, default=Path("demo_bundle"))
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for tables and the picture")
    options = parser.parse_args()
    start = time.monotonic()

    def step(number: int, text: str) -> None:
        print(f"\n[{number}/5, {time.monotonic() - start:.0f} s] {text}", flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    step(1, f"Exporting the demo model (trained on {MesaConfig.from_model(MODEL).train_length} tokens) as ONNX graphs")
    export_model(MODEL, options.bundle, max_tokens=max(LENGTHS), report=lambda line: print("  " + line))

    step(2, "Comparing the graphs with PyTorch: three of the buckets, symbolic and specialised graphs")
    validation = validate(options.bundle, MODEL, buckets=[0, 4, 16], steps=4)
    (options.output / "validation.txt").write_text(validation.table() + "\n", encoding="utf-8")
    print("  " + validation.verdict())

    step(3, "One prompt, as a user would run it")
    _one_prompt(options.bundle)

    step(4, "Passkey retrieval: Mesa through the bundle, Origin is the same model in plain transformers")
    passkey = run_passkey(options.bundle, lengths=LENGTHS, prompts=options.prompts)
    picture = options.output / "passkey.png"
    passkey.plot(picture)
    (options.output / "passkey.json").write_text(passkey.to_json(), encoding="utf-8")

    step(5, "Speed: time to the first token, and tokens a second, beside plain transformers")
    bench = run_bench(options.bundle, lengths=[2048, 8192], new_tokens=16, repeat=3)
    (options.output / "bench.json").write_text(bench.to_json(), encoding="utf-8")

    print(f"\n{passkey.table()}\n\n{bench.table()}\n")
    print(validation.verdict())
    print(f"picture: {picture}; everything else in {options.output}/; {time.monotonic() - start:.0f} s in all")
    return 0 if validation.passed else 1


def _one_prompt(bundle: Path) -> None:
    with MesaModel.load(bundle) as model:
        prompt = passkey_prompt(
            lambda text: model.tokenizer.encode(text, add_special_tokens=False),
            max(LENGTHS),
            depth=0.3,
            rng=prompt_rng("eval", random.Random().randrange(1 << 30), 0),
            prefix_ids=model.tokenizer.encode(""),  # the token that this model's texts begin with
        )
        begin = time.monotonic()
        answer = "".join(model.stream(prompt.input_ids, max_new_tokens=8, stop="."))
        seconds = time.monotonic() - begin
        print(f"  {len(prompt.input_ids)} tokens on {model.backend} ({model.choice})")
        print(f"  ... {prompt.text[-60:]!r} -> {answer.strip()!r}; hidden was {prompt.answer!r}; {seconds:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
