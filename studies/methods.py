"""Study 5, of edits: what every way to put a fine-tune into its base keeps and breaks, by loss and on tasks.

    python studies/methods.py --data DIR [--vectors runs/studies] [--only math_0 ...] [--parts methods tasks ...]

methods   the filter, with letter problems protected too or not, and its rivals, each over its parameter
tasks     each of them where its curve on calibration text keeps 95 % of the gain, on the vector's tasks and controls
layers    the filter in layers chosen by score, by functional specificity and at random
sets      the same fives of layers beside 100 random ones, raw, on 8 documents
inputs    the raw and the filtered change of the tensors of one kind of input alone, and each layer's raw change alone
moments   the filter made in sequence, and from the moments of SAE reconstructions; 5,000 tokens of each text
limits    coefficients above 1, and few bits afterwards
merge     `math_0` and `words` added: filtered, each protecting the other's target text, by TIES, and as they are
second    `refusal` trained on `math_0` and on its filtered edit, as it was on the base

DIR has `wikitext2_test.txt`, `mbpp.jsonl`, `alpaca_seed_tasks.jsonl`, `gsm8k_test.jsonl`, `mmlu_test.jsonl`. Goes on
where it was stopped. Writes `outcomes/methods.parquet`, a row per vector, part, method, value of its parameter, text
and document; `outcomes/methods_tasks.parquet`, a row per vector, method, task and item;
`outcomes/methods_sets.parquet`, a row per vector, set, text and document; `outcomes/methods_layers.parquet`, what the
filter lets through by layer.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import skills
import torch
from common import JUDGED_ON, OUTCOMES, TEXTS, VECTORS, Bench, arguments
from filter import unseen
from method_parts import STRENGTHS, Within, inputs, layers, limits, merged, moments, second

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.cli.console import ConsoleReporter
from stethoscope.editing.apply import applied
from stethoscope.editing.filter import FilteredChange, write_filters
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.rivals import WHOLE, Method, channel_importance, projected, rivals
from stethoscope.evaluation.run import evaluate
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.recipe import Select
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.filtering import Filtering
from stethoscope.run import run_recipe
from stethoscope.selection.policies import select
from stethoscope.text.tokens import TokenBatch, batches, tokenize, within
from stethoscope.tradeoff import filters_over
from stethoscope_demo.items import CONTROL_TASKS, items, join_items
from stethoscope_demo.tasks import task_name

TARGET, GENERAL = TEXTS
SEARCHED = ("calibration target", "calibration control")
MEASURED, LONGEST = 20, 128  # documents of each text, and their tokens


class Methods(Bench):
    """A vector's base, the texts that measure and those that filters are made from."""

    def __init__(self, vector: str, vectors: Path, data: Path) -> None:
        super().__init__(vector, vectors)
        self.folder = vectors / vector / "filters"
        own = {name: self._tokens(name, MEASURED) for name in (TARGET, *SEARCHED)}
        others = {GENERAL: self._texts[GENERAL], **unseen(data)}
        cut = {
            name: tokenize(documents[:MEASURED], self.tokenizer, max_tokens=LONGEST)
            for name, documents in others.items()
        }
        self.measured = own | {name: (rows, None) for name, rows in cut.items()}

    def made_from(self, documents: Sequence[Any], tokens: int = 20_000) -> list[TokenBatch]:
        """The first documents with so many tokens in all."""
        rows = within(tokens, tokenize(documents, self.tokenizer, max_tokens=1024))
        return list(batches(rows, self.tokenizer, batch_tokens=2048))

    @cached_property
    def texts(self) -> dict[str, list[TokenBatch]]:
        """Target and general text, as every filter takes them."""
        return {"target": self.made_from(self._texts["target"]), "general": self.made_from(self._texts["control"])}

    def filters(self, name: str = "general", *, more: Mapping[str, Sequence[Any]] | None = None) -> Path:
        """The filters of every strength that protect general text, and further texts at half its weight."""
        folder = self.folder / name
        if not (folder / Filtering.FILE).exists() or Filtering.load(folder).strengths != STRENGTHS:
            texts = self.texts | {key: self.made_from(documents) for key, documents in (more or {}).items()}
            weights = dict.fromkeys(more or {}, 0.5)
            write_filters(
                self.model, self.task_vector, texts, folder, provenance=Provenance(), strengths=STRENGTHS,
                weights=weights, separable=True,
            )  # fmt: skip
        return folder

    def filtered(self, strength: float, **where: Any) -> EditPlan:
        """The whole change, filtered."""
        return replace(WHOLE, transform=FilteredChange(self.filters(), strength, self.task_vector), **where)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Every layer's score."""
        self.chosen  # noqa: B018  diagnoses first
        return Diagnosis.load(self.run)

    def sets(self, k: int) -> dict[str, list[int]]:
        """Layers by every way to choose k of them."""
        specific = sorted(
            (one for one in Filtering.load(self.filters()).layers if one.layer is not None),
            key=lambda one: -(one.raw.specificity or 0.0),
        )
        rng = np.random.default_rng(k)
        return {
            **{name: list(select(self.diagnosis, Select(policy=name, k=k)).layers) for name in ("top_k", "spread")},
            "specificity": [one.layer for one in specific[:k] if one.layer is not None],
            **{f"random {n}": sorted(rng.choice(self.base.layers, k, replace=False).tolist()) for n in range(1, 6)},
        }

    def letters(self) -> list[str]:
        """Problems in the target's form that the base solves better than the fine-tune."""
        return [join_items([item]) for task in CONTROL_TASKS for item in items(task, "calibration", 120)]

    def methods(self) -> list[Method]:
        """Every method over its parameter; DG-Hard leaves a LoRA as it is, so it is measured on `code` alone."""
        task_vector, depth = self.task_vector, self.base.layers
        low_rank = isinstance(task_vector, AdapterTaskVector)
        importance = channel_importance(self.model, self.texts["general"], list(coefficients(task_vector, WHOLE)))
        ranked = sorted(self.diagnosis.layers, key=lambda one: (one.flag is not None, -one.excess, one.layer))
        best = [one.layer for one in ranked]
        raw = {float(k): EditPlan.for_layers(best[:k]) for k in (30, 25, 20, 15, 10, 5, 3)}
        ours, _ = filters_over(self.filters(), task_vector, WHOLE)
        both, _ = filters_over(self.filters("letters", more={"letters": self.letters()}), task_vector, WHOLE)
        return [
            ours,
            both._replace(name="filter, letters protected"),
            *(one for one in rivals(depth, importance) if not (low_rank and one.name == "DG-Hard")),
            projected(task_vector, {n: partial(self.directions, n) for n in range(depth)}),
            Method("raw, best layers", "layers", raw | {0.0: None}),
        ]


class Kept:
    """Losses measured so far, in one file; an edit that two methods share is measured once."""

    def __init__(self, path: Path) -> None:
        self.path, self._same = path, dict[tuple[str, tuple[str, ...], int], pd.DataFrame]()
        self.frame = (
            pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=["vector", "part", "method", "value"])
        )

    def add(
        self, bench: Methods, part: str, method: str, value: float, plan: EditPlan | None, inside: Within = nullcontext
    ) -> None:  # type: ignore[assignment]
        """Measure an edit on every text, unless it is there."""
        where = {"vector": bench.vector, "part": part, "method": method, "value": value}
        if len(self.frame) and (self.frame[list(where)] == pd.Series(where)).all(axis=1).any():
            return
        same = (bench.vector, tuple(bench.measured), id(plan))
        found = self._same.get(same) if inside is nullcontext else None
        if found is None:
            frames = []
            with applied(bench.model, bench.task_vector, plan or EditPlan()), inside(bench.model):
                for text, (rows, starts) in bench.measured.items():
                    losses = document_losses(bench.model, rows, starts=starts)
                    frames.append(pd.DataFrame({"text": text, "nats": losses.sums, "tokens": losses.tokens}))
            found = pd.concat(frames).reset_index(names="document")
        if inside is nullcontext and (plan is None or plan is WHOLE):
            self._same[same] = found
        self.frame = pd.concat([self.frame, found.assign(**where)], ignore_index=True)
        self.frame.to_parquet(self.path, index=False)
        totals = found.groupby("text", sort=False)[["nats", "tokens"]].sum()
        print(*where.values(), (totals.nats / totals.tokens).round(4).to_dict(), flush=True)


def named_by_curve(found: pd.DataFrame) -> dict[str, float]:
    """By method, the value of least damage on calibration text among those that keep 95 % of the gain, or the most."""
    totals = found[found.text.isin(SEARCHED)].groupby(["method", "value", "text"])[["nats", "tokens"]].sum()
    loss = (totals.nats / totals.tokens).unstack("text")
    base = loss.loc[("base", 0.0)]
    kept = (base[SEARCHED[0]] - loss[SEARCHED[0]]) / (base[SEARCHED[0]] - loss.loc[("tuned", 1.0), SEARCHED[0]])
    chosen = {}
    for method in sorted({name for name, _ in loss.index} - {"base", "tuned"}):
        good = kept[method][kept[method] >= 0.95]
        chosen[method] = loss.loc[method].loc[good.index, SEARCHED[1]].idxmin() if len(good) else kept[method].idxmax()
    return chosen


def on_tasks(bench: Methods, found: pd.DataFrame) -> pd.DataFrame:
    """Every method's answers where its curve on calibration text says."""
    chosen = named_by_curve(found)
    print(bench.vector, chosen, flush=True)
    plans = {"base": None, "tuned": WHOLE} | {one.name: one.plans[chosen[one.name]] for one in bench.methods()}
    options = bench.recipe.evaluate
    outcomes = evaluate(
        bench.model,
        bench.tokenizer,
        {name: partial(applied, bench.model, bench.task_vector, plan or EditPlan()) for name, plan in plans.items()},
        [*options.tasks, *map(task_name, CONTROL_TASKS)],
        out=bench.folder.parent / "answers",
        include_path=options.include_path,
        batch_size=options.batch_size,
    )
    frame = outcomes.frame[["arm", "task", "item", "exact_match"]]
    return frame.assign(vector=bench.vector, value=frame.arm.map(chosen))


def sets(bench: Methods) -> pd.DataFrame:
    """Raw fives of layers, chosen and 100 random ones, on few documents."""
    rng = np.random.default_rng(0)
    chosen = {name: one for name, one in bench.sets(5).items() if not name.startswith("random")}
    chosen |= {f"random {n}": sorted(rng.choice(bench.base.layers, 5, replace=False).tolist()) for n in range(1, 101)}
    found = bench.gains([dict.fromkeys(one, 1.0) for one in chosen.values()], documents=JUDGED_ON)
    frames = []
    for text, saved in found.sums.items():  # nats saved by each edit on each document
        for document, row in enumerate(saved.tolist()):
            tokens = int(found.tokens[text][document])
            frames.append(
                pd.DataFrame(
                    {"method": list(chosen), "text": text, "document": document, "nats": row, "tokens": tokens}
                )
            )
    return pd.concat(frames).assign(vector=bench.vector, part="sets", value=0.0)


def keep(name: str, frame: pd.DataFrame) -> None:
    """Write a vector's rows in place of those that the file has of it."""
    path = OUTCOMES / f"{name}.parquet"
    before = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=["vector"])
    pd.concat([before[~before.vector.isin(frame.vector)], frame], ignore_index=True).to_parquet(path, index=False)


if __name__ == "__main__":
    parser = arguments(__doc__, VECTORS)
    parser.add_argument("--data", type=Path, required=True)
    parts = {"layers": layers, "inputs": inputs, "moments": moments, "limits": limits}
    pairs = {"merge": (merged, "words"), "second": (second, "refusal")}  # of math_0 and another vector
    every = ["methods", "tasks", "sets", *parts, *pairs]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    skills.register()
    measured = Kept(OUTCOMES / "methods.parquet")
    for name in options.only:
        bench = Methods(name, options.vectors, options.data)
        run_recipe(bench.recipe, bench.run, until="select", reporter=ConsoleReporter())
        if "methods" in options.parts:
            measured.add(bench, "methods", "base", 0.0, None)
            measured.add(bench, "methods", "tuned", 1.0, WHOLE)
            for method in bench.methods():
                for value, plan in method.plans.items():
                    measured.add(bench, "methods", method.name, value, plan)
            keep("methods_layers", Filtering.load(bench.filters()).to_frame().assign(vector=name))
        if "tasks" in options.parts:
            keep("methods_tasks", on_tasks(bench, measured.frame.query("vector == @name and part == 'methods'")))
        if "sets" in options.parts:
            keep("methods_sets", sets(bench))
        for text in SEARCHED:  # no method is chosen by what follows
            del bench.measured[text]
        for part in options.parts:
            for edit in parts[part](bench) if part in parts else ():
                measured.add(bench, part, *edit)
            if part in pairs and name == "math_0":
                edits, other = pairs[part]
                one, two = (Methods(each, options.vectors, options.data) for each in (name, other))
                one.measured = dict(bench.measured)
                for edit in edits(one, two):
                    measured.add(one, part, *edit)
