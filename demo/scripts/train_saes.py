"""Train the SAEs that the demo ships: every layer of SmolLM2-135M-Instruct, on general, maths, code and chat text.

    python demo/scripts/train_saes.py --base DIR --data DIR --out demo/src/stethoscope_demo/saes

`--data` holds the public files named in the README beside the weights. The same arguments give the same text, and
after a stop they go on from the last checkpoint. On text of your own, `stethoscope train-saes` does the same.
"""

import argparse
import json
import logging
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stethoscope.artifacts import sha256_bytes, write_text
from stethoscope.cli import ConsoleReporter
from stethoscope.models.load import load_tokenizer
from stethoscope.saes.health import health_rows
from stethoscope.saes.train import TrainingSettings, load_for_training, train_saes
from stethoscope_demo.base_model import ORIGIN
from stethoscope_demo.items import train_documents

# Share of training tokens.
SHARES = {"wikitext": 0.22, "mmlu": 0.13, "gsm8k": 0.17, "items": 0.20, "code": 0.08, "chat": 0.20}
# Health is reported for these; together they weigh like the mixture.
KINDS = {"general": ("wikitext", "mmlu"), "maths": ("gsm8k", "items"), "code": ("code",), "chat": ("chat",)}
HELD_OUT_PERCENT = 4

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [sparse-autoencoder, sae-lens]
---

# Sparse autoencoders for SmolLM2-135M-Instruct

One for the residual stream after each of the 30 layers, in SAELens' folder layout:

```python
from sae_lens import SAE

sae = SAE.load_from_disk("layer_12")  # reads the output of model.layers.12
```

They are small on purpose, so that they can be shipped and run on a laptop: 1152 features on 576 values, matrices in
bfloat16, biases and thresholds in float32, decoder rows of norm 1. They load in float32.

## How they were made

    python demo/scripts/train_saes.py --base BASE --data DATA --out OUT {arguments}

- BatchTopK on SAELens' trainers, saved as JumpReLU; all layers on one forward of the base model in bfloat16.
- Left out: special tokens, each document's first position, and attention sinks (a residual norm over 10 times the
  median of the document, at any layer). With the first position left in, upper layers' SAEs are worse than the mean.
- Decoder rows start as directions of real activations about their mean, encoder rows as 0.15 times those.
- Adam, the learning rate warmed up over a twentieth of the steps and decayed to 0 over the last half.

## Text

| share | source | licence |
|---:|---|---|
| 22 % | WikiText-2, validation part, its spacing undone | CC BY-SA 3.0 |
| 13 % | MMLU, test part | MIT |
| 17 % | GSM8K, train part, and SVAMP, as `Problem: ... Solution: ...` | MIT |
| 20 % | generated items of the seven subjects, training split only, in the same form | Apache-2.0 |
| 8 % | MBPP and HumanEval | CC BY 4.0, MIT |
| 20 % | GSM8K, SVAMP, MMLU, MBPP and Alpaca's seed tasks in the model's chat template | as above, Apache-2.0 |

No text is in this folder. Which documents are held out follows from their hashes; a short generated problem may occur
in documents of both parts.

## Health on held-out text

Variance explained about the mean, by kind of text and for `all` of it, measured on the weights as stored. L0 is the
number of features that fire on a token. Dead features fired on none of the held-out tokens, dense ones on over 10 %.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base model's checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--out", type=Path, required=True, help="becomes the folder of SAEs")
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="*", help="all unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model, tokenizer = load_for_training(options.base), load_tokenizer(options.base)
    documents, held_out = mixture(options.data, tokenizer, tokens=options.tokens, seed=options.seed)
    with ConsoleReporter().stage("Train SAEs") as advance:
        train_saes(
            model,
            tokenizer,
            documents,
            options.out,
            settings=TrainingSettings(
                width=options.width,
                k=options.k,
                tokens=options.tokens,
                batch=options.batch,
                learning_rate=options.learning_rate,
                seed=options.seed,
                layers=options.layers,
                model_name=ORIGIN,
            ),
            held_out=held_out,
            overwrite=options.overwrite,
            progress=advance,
        )
    write_card(options.out)
    print(health_table(options.out))


def write_card(out: Path) -> None:
    """Describe a folder of trained SAEs in its README, from its ``health.json``."""
    settings = json.loads((out / "health.json").read_text(encoding="utf-8"))["settings"]
    given = ("tokens", "width", "k", "learning_rate", "batch", "seed")
    arguments = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in given)
    write_text(out / "README.md", CARD.format(table=health_table(out), arguments=arguments))


def health_table(out: Path) -> str:
    """The health of the SAEs in a folder, as a Markdown table."""
    rows = health_rows(json.loads((out / "health.json").read_text(encoding="utf-8"))["layers"])
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---:" * len(rows[0]) + "|", *lines])


def mixture(
    data: Path, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Documents to train on, about ``tokens`` tokens in the shares above, and held-out ones by kind.

    A document is held out by its own hash, whatever the seed and the size of the mixture.
    """
    rng = random.Random(seed)
    gsm8k = [
        (row["question"], re.sub(r"<<.*?>>", "", row["answer"]).replace("#### ", "The answer is ") + ".")
        for row in _rows(data / "gsm8k_train.jsonl")
    ] + [
        (f"{row['Body'].rstrip('. ')}. {row['Question']}", f"The answer is {row['Answer']:g}.")
        for row in json.loads((data / "svamp.json").read_text(encoding="utf-8"))
    ]
    mmlu = [(_choices(row), f"Answer: {row['answer']}") for row in _rows(data / "mmlu_test.jsonl")]
    code = [(row["text"], row["code"].replace("\r\n", "\n")) for row in _rows(data / "mbpp.jsonl")]
    alpaca = [
        ((row["instruction"] + "\n" + row["instances"][0]["input"]).strip(), row["instances"][0]["output"])
        for row in _rows(data / "alpaca_seed_tasks.jsonl")
    ]
    for pairs in (gsm8k, mmlu, code):
        rng.shuffle(pairs)
    worked = [f"Problem:\n{question}\n\nSolution: {answer}" for question, answer in gsm8k]
    dialogues = [*alpaca, *gsm8k[:2500], *mmlu[:4000], *code[:200]]
    sources = {
        "wikitext": _wikitext((data / "wikitext2_valid.txt").read_text(encoding="utf-8")),
        "mmlu": ["\n\n".join(f"{q}\n{a}" for q, a in mmlu[i : i + 2]) for i in range(4000, len(mmlu), 2)],
        "gsm8k": ["\n\n".join(worked[i : i + 2]) for i in range(2500, len(worked), 2)],
        # about 160 tokens to a document
        "items": list(train_documents(max(200, int(SHARES["items"] * tokens / 160)), seed=seed)),
        "code": [f"{task}\n\n{answer}" for task, answer in code[200:]]
        + [row["prompt"] + row["canonical_solution"] for row in _rows(data / "humaneval.jsonl")],
        "chat": [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], tokenize=False
                )
            )
            for asked, answer in dialogues
        ],
    }
    train: list[str] = []
    held: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for kind, names in KINDS.items():
        for name in names:
            found = sources[name]
            rng.shuffle(found)
            held[kind] += [text for text in found if _is_held_out(text)][:40]
            left = SHARES[name] * tokens
            for text in found:
                if left > 0 and not _is_held_out(text):
                    train.append(text)
                    left -= len(tokenizer(text).input_ids)
    return train, held


def _is_held_out(text: str) -> bool:
    return int(sha256_bytes(text.encode())[:8], 16) % 100 < HELD_OUT_PERCENT


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _choices(row: dict[str, Any]) -> str:
    return (
        row["question"]
        + "\n"
        + "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    )


def _wikitext(text: str) -> list[str]:
    """Paragraphs, joined to about a thousand characters, with the spacing that tokenisation had added taken out."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]%]|'s|n't)(?=\s)", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text).replace(" \u2013 ", "\u2013")
    documents, current = [], ""
    for line in text.splitlines():
        if line.strip().startswith("= ") and current:
            documents.append(current)
            current = ""
        current = (current + "\n" + line.strip()).strip()
        if len(current) > 1000:
            documents.append(current)
            current = ""
    return [document for document in [*documents, current] if len(document) > 200]


if __name__ == "__main__":
    main()
