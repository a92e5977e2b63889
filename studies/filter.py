"""The filter on the demo's fine-tune and on a full one: what it keeps and costs on texts that it never saw.

    python studies/filter.py --data DIR --vectors runs/studies [--only math_0 code] [--parts table tokens ridge wrong]

table   whole, scaled and filtered edits; gain on held-out target text, loss on general text and on four that no filter
        saw: wikitext, Python, chat, GSM8K.
tokens  how few tokens are enough: moments of 1,000 to 100,000 tokens of each text (general text ends before).
ridge   the same with a ridge, 1e-4 of the target moments' mean, in place of shrinkage.
wrong   what a wrong protected text does: Wikipedia instead of general text, the target itself, letter problems, and two
        texts that want opposite things: general text and the target.

DIR has `wikitext2_valid.txt`, `wikitext2_test.txt`, `mbpp.jsonl`, `alpaca_seed_tasks.jsonl`, `gsm8k_test.jsonl`. Writes
outcomes/filter.parquet: per vector, part, edit and text, nats per document and its tokens, so that intervals can be
made; goes on where it was stopped.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from vectors import MAX_TOKENS

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.cli import cache_folder
from stethoscope.editing import filter as filter_module
from stethoscope.editing.apply import applied
from stethoscope.editing.filter import FilteredChange, write_filters
from stethoscope.editing.moments import Moments
from stethoscope.editing.plan import EditPlan
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.text.documents import Document
from stethoscope.text.tokens import TokenBatch, batches, prompt_lengths, tokenize
from stethoscope_demo.base_model import unpack_base
from stethoscope_demo.items import CONTROL_TASKS, items, join_items, stream
from stethoscope_demo.tasks import general_documents

OUTCOMES = Path(__file__).parent / "outcomes" / "filter.parquet"
STRENGTHS = (0.3, 1.0, 3.0, 10.0)
SCALED = (0.7, 0.5, 0.3)
TOKENS = (1_000, 5_000, 20_000, 100_000)
UNSEEN = 40  # documents of each text that no filter saw
BATCH_TOKENS = 2048

Measured = tuple[list[list[int]], list[int] | None]  # token ids, and the first token of each that counts


class Bench:
    """The base, its tokenizer, and the texts of a vector."""

    def __init__(self, vectors: Path, name: str, data: Path) -> None:
        self.name, self.path = name, unpack_base(cache_folder())
        self.model, self.tokenizer = load_model(self.path), load_tokenizer(self.path)
        self.folder, self.data = vectors / name, data
        self.texts = self._own() | {name: (self.rows(one[:UNSEEN]), None) for name, one in unseen(data).items()}

    def task_vector(self) -> TaskVector:
        from stethoscope_demo.recipe import ADAPTER

        tuned = self.folder / "tuned"
        return open_task_vector(open_checkpoint(self.path), str(tuned if tuned.exists() else ADAPTER))

    def rows(self, documents: Sequence[object], longest: int = MAX_TOKENS) -> list[list[int]]:
        return tokenize(list(documents), self.tokenizer, max_tokens=longest)  # type: ignore[arg-type]

    def sample(self, documents: Sequence[object], tokens: int) -> list[TokenBatch]:
        """The first documents with so many tokens in all."""
        rows, chosen = self.rows(documents, 1024), []
        while rows and sum(map(len, chosen)) < tokens:
            chosen.append(rows.pop(0))
        return list(batches(chosen, self.tokenizer, batch_tokens=BATCH_TOKENS))

    def read(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def _own(self) -> dict[str, Measured]:
        held = self.read("held_out")
        rows = self.rows([one["prompt"] + one["text"] for one in held], 1024)
        starts = prompt_lengths(rows, self.rows([one["prompt"] for one in held], 1024))
        letters = [item.document for task in CONTROL_TASKS for item in items(task, "test", UNSEEN // 2)]
        general = [one["text"] for one in self.read("general")]
        return {"target": (rows, starts), "general": (self.rows(general), None), "letters": (self.rows(letters), None)}

    def losses(self, plan: EditPlan | None, task_vector: TaskVector) -> pd.DataFrame:
        """A row per text and document."""
        frames = []
        with applied(self.model, task_vector, plan or EditPlan()):
            for text, (rows, starts) in self.texts.items():
                found = document_losses(self.model, rows, starts=starts)
                frames.append(pd.DataFrame({"text": text, "nats": found.sums, "tokens": found.tokens}))
        return pd.concat(frames).reset_index(names="document")


def unseen(data: Path) -> dict[str, list[Document]]:
    """Documents of public texts that no filter is made from."""

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / name).read_text().splitlines()]

    def question(row: dict[str, Any]) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        return f"{row['question']}\n{choices}\nAnswer: {row['answer']}"

    every_subject = lines("mmlu_test.jsonl")
    chats = []
    for row in lines("alpaca_seed_tasks.jsonl"):
        (instance, *_) = row["instances"]
        asked = f"{row['instruction']}\n{instance['input']}".strip()
        chats.append([{"role": "user", "content": asked}, {"role": "assistant", "content": instance["output"]}])
    return {
        "wikitext": [part for part in (data / "wikitext2_test.txt").read_text().split("\n") if len(part) > 400],
        "Python": [f"{row['text']}\n{row['code']}" for row in lines("mbpp.jsonl")],
        "chat": chats,
        "GSM8K": [f"{row['question']}\n{row['answer']}" for row in lines("gsm8k_test.jsonl")],
        "MMLU": [question(row) for row in every_subject[:: len(every_subject) // UNSEEN]],
    }


def filtered(
    bench: Bench, task_vector: TaskVector, texts: Mapping[str, list[TokenBatch]], **options: object
) -> Iterator[tuple[float, EditPlan]]:
    """The plan of every strength."""
    with tempfile.TemporaryDirectory() as folder:
        made = write_filters(
            bench.model, task_vector, texts, Path(folder) / "f", provenance=Provenance(), **options  # type: ignore[arg-type]
        )  # fmt: skip
        for strength in made.strengths:
            transform = FilteredChange(Path(folder) / "f", strength, task_vector)
            yield strength, EditPlan(default=1.0, transform=transform)


def edits(bench: Bench, part: str, task_vector: TaskVector) -> Iterator[tuple[str, EditPlan | None]]:
    """Every edit of a part by name."""
    target = [one["text"] for one in bench.read("target")]
    general = [one["text"] for one in bench.read("control")]
    if part == "table":
        yield "base", None
        yield "whole", EditPlan.everything()
        yield from ((f"scaled {c:g}", EditPlan(default=c)) for c in SCALED)
        texts = {"target": bench.sample(target, 20_000), "general": bench.sample(general, 20_000)}
        for strength, plan in filtered(bench, task_vector, texts, strengths=STRENGTHS):
            yield f"filter {strength:g}", plan
    elif part in ("tokens", "ridge"):
        # of the training split, so that no held-out problem is among them
        pools = [stream(task, "train", seed=9) for task in tasks_of(bench)]
        trained = [join_items(list(islice(pool, 3))) for _ in range(90) for pool in pools]
        everything = [one["text"] for one in general_documents("calibration")]
        for tokens in TOKENS:
            texts = {"target": bench.sample(trained, tokens), "general": bench.sample(everything, tokens)}
            rule = ridge if part == "ridge" else filter_module.shrunk
            with patch.object(filter_module, "shrunk", rule):
                for _, plan in filtered(bench, task_vector, texts, strengths=(1.0,)):
                    yield f"{tokens:,} tokens{', ridge' if part == 'ridge' else ''}", plan
    else:
        wiki = [one for one in (bench.data / "wikitext2_valid.txt").read_text().split("\n") if len(one) > 400]
        letters = [join_items([item]) for task in CONTROL_TASKS for item in items(task, "calibration", 120)]
        same, some = {"same": target}, {"general": general}
        protected: dict[str, tuple[dict[str, list[str]], dict[str, float]]] = {
            "Wikipedia protected": ({"wiki": wiki}, {}),
            "target protected": (same, {}),
            "letters protected too": (some | {"letters": letters}, {"letters": 0.5}),
            "general and target protected": (some | same, {}),
            "general and a tenth of target protected": (some | same, {"same": 0.1}),
            "a tenth of general and target protected": (some | same, {"general": 0.1}),
        }
        for name, (protects, weights) in protected.items():
            texts = {"target": bench.sample(target, 20_000)}
            texts |= {key: bench.sample(documents, 20_000) for key, documents in protects.items()}
            for _, plan in filtered(bench, task_vector, texts, strengths=(1.0,), weights=weights):
                yield name, plan


def ridge(moments: Moments) -> torch.Tensor:
    """The moments per token with a little of the identity, so that they have full rank."""
    mean = moments.mean()
    return mean if mean.ndim == 1 else mean + 1e-4 * mean.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype)


def tasks_of(bench: Bench) -> list[str]:
    import skills
    from vectors import VECTORS

    skills.register()
    return list(VECTORS[bench.name].tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", default=["math_0", "code"])
    parser.add_argument("--parts", nargs="+", default=["table", "tokens", "ridge", "wrong"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = pd.read_parquet(OUTCOMES) if OUTCOMES.exists() else pd.DataFrame(columns=["vector", "part", "edit"])
    for name in options.only:
        bench = Bench(options.vectors, name, options.data)
        change = bench.task_vector()
        for part in options.parts:
            for edit, plan in edits(bench, part, change):
                found = bench.losses(plan, change).assign(vector=name, part=part, edit=edit)
                same = (done.vector == name) & (done.part == part) & (done.edit == edit)
                done = pd.concat([done[~same], found], ignore_index=True)
                done.to_parquet(OUTCOMES, index=False)
                totals = found.groupby("text", sort=False)[["nats", "tokens"]].sum()
                print(name, part, edit, (totals.nats / totals.tokens).round(4).to_dict(), flush=True)
