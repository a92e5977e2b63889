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

DIR has `wikitext2_test.txt`, `mbpp.jsonl`, `alpaca_seed_tasks.jsonl`, `gsm8k_test.jsonl`, `mmlu_test.jsonl`. Goes on
where it was stopped. Writes `outcomes/methods.parquet`, a row per vector, part, method, value of its parameter, text
and document; `outcomes/methods_tasks.parquet`, a row per vector, method, task and item;
`outcomes/methods_sets.parquet`, a row per vector, set, text and document; `outcomes/methods_layers.parquet`, what the
filter lets through by layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import skills
import torch
from common import JUDGED_ON, OUTCOMES, TEXTS, VECTORS, Bench, arguments
from edits import rounded
from filter import unseen
from torch import Tensor, nn

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.cli.console import ConsoleReporter
from stethoscope.editing.apply import applied
from stethoscope.editing.filter import FilteredChange, write_filters
from stethoscope.editing.plan import EditPlan, Transform, coefficients
from stethoscope.editing.rivals import WHOLE, Changed, Method, channel_importance, projected, rivals, scaled
from stethoscope.evaluation.run import evaluate
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.models.load import decoder_layers
from stethoscope.recipe import Select
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.filtering import Filtering
from stethoscope.run import run_recipe
from stethoscope.saes.open import load_sae
from stethoscope.selection.policies import select
from stethoscope.text.tokens import TokenBatch, batches, tokenize, within
from stethoscope.tradeoff import filters_over
from stethoscope_demo.items import CONTROL_TASKS, items, join_items
from stethoscope_demo.tasks import task_name

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIZES = (5, 15)  # of sets of layers
TARGET, GENERAL = TEXTS
SEARCHED = ("calibration target", "calibration control")
MEASURED, LONGEST = 20, 128  # documents of each text, and their tokens
INPUTS = {"q, k, v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate, up": ("gate_proj", "up_proj"),
          "down": ("down_proj",)}  # fmt: skip
Within = Callable[[nn.Module], AbstractContextManager[None]]


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
        if not (folder / Filtering.FILE).exists():
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


@dataclass(frozen=True)
class Only:
    """The transform that keeps the change of some modules alone, transformed further or as it is."""

    modules: tuple[str, ...]
    then: Transform | None = None

    def apply(self, name: str, delta: Tensor) -> Tensor:
        """The new change."""
        if name.split(".")[-2] not in self.modules:
            return torch.zeros_like(delta)
        return self.then.apply(name, delta) if self.then else delta

    def low_rank(self, _: str) -> None:
        """Nothing is written."""

    def describe(self) -> dict[str, Any]:
        """What it keeps."""
        return {"kind": "only", "modules": self.modules, "then": self.then.describe() if self.then else None}


Edit = tuple[str, float, EditPlan | None]  # method, value of its parameter, plan


def layers(bench: Methods) -> Iterator[Edit]:
    """Chosen layers, raw (0) and filtered at two strengths; every layer alone is among `inputs`."""
    for k in SIZES:
        for name, chosen in bench.sets(k).items():
            yield f"{name}, {k}", 0.0, EditPlan.for_layers(chosen)
            for strength in (0.3, 3.0):
                transform = FilteredChange(bench.filters(), strength, bench.task_vector)
                yield f"{name}, {k}", strength, EditPlan.for_layers(chosen, transform=transform)


def inputs(bench: Methods) -> Iterator[Edit]:
    """Tensors of one kind of input alone, raw (0) and filtered at strength 1; then each layer's raw change alone."""
    for name, modules in INPUTS.items():
        yield name, 0.0, replace(WHOLE, transform=Only(modules))
        yield name, 1.0, replace(WHOLE, transform=Only(modules, bench.filtered(1.0).transform))
    for layer in range(bench.base.layers):
        yield "layer alone", float(layer), EditPlan.for_layers([layer])


def moments(bench: Methods) -> Iterator[Edit]:
    """The filter from the base's moments, from those of the model edited so far, and from SAE reconstructions."""
    texts = {
        name: bench.made_from(bench._texts[text], 5_000)
        for name, text in (("target", "target"), ("general", "control"))
    }
    blocks, strengths = decoder_layers(bench.model), (0.3, 1.0, 3.0)

    @contextmanager
    def reconstructed(layer: int) -> Iterator[None]:
        if not layer:
            yield
            return
        sae = load_sae(bench.saes[layer - 1])

        def replaced(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return sae.decode(sae.encode(args[0].float())).to(args[0].dtype), *args[1:]

        handle = blocks[layer].register_forward_pre_hook(replaced)
        try:
            yield
        finally:
            handle.remove()

    def by_layer(
        name: str, strengths: Sequence[float], around: Callable[[int], AbstractContextManager[Any]]
    ) -> dict[int, Path]:
        made = {}
        for layer in range(len(blocks)):
            made[layer] = bench.folder / name / str(layer)
            with around(layer):
                write_filters(
                    bench.model, bench.task_vector, texts, made[layer], provenance=Provenance(), strengths=strengths,
                    layers=[layer],
                )  # fmt: skip
        return made

    def together(folders: Mapping[int, Path], strength: float) -> EditPlan:
        parts = {n: FilteredChange(folder, strength, bench.task_vector) for n, folder in folders.items()}
        change = partial(_by_layer, parts=parts)
        return EditPlan.for_layers(list(parts), transform=Changed(change))

    whole = bench.folder / "few"
    write_filters(bench.model, bench.task_vector, texts, whole, provenance=Provenance(), strengths=strengths)
    for strength in strengths:
        yield "of the base", strength, together(dict.fromkeys(range(len(blocks)), whole), strength)
    made = by_layer("reconstructed", strengths, reconstructed)
    for strength in strengths:
        yield "of reconstructions", strength, together(made, strength)
    for strength in strengths:
        so_far: dict[int, Path] = {}

        def edited(
            layer: int, strength: float = strength, so_far: dict[int, Path] = so_far
        ) -> AbstractContextManager[Any]:
            plan = together(so_far, strength) if so_far else EditPlan()
            so_far[layer] = bench.folder / "sequence" / str(layer)
            return applied(bench.model, bench.task_vector, plan)

        yield "in sequence", strength, together(by_layer("sequence", [strength], edited), strength)


def _by_layer(name: str, delta: Tensor, *, parts: Mapping[int, FilteredChange]) -> Tensor:
    layer = parse_name(name).layer
    assert layer is not None
    return parts[layer].apply(name, delta)


def limits(bench: Methods) -> Iterator[tuple[str, float, EditPlan | None, Within]]:
    """Coefficients above 1, and matrices of few bits."""
    for strength in (1.0, 3.0):
        for c in (1.25, 1.5, 2.0):
            yield f"filter {strength:g} at", c, bench.filtered(strength, default=c), nullcontext
    plans = {"base": None, "tuned": WHOLE, "scaled 0.5": scaled(0.5), "filter 1": bench.filtered(1.0)}
    for bits, group in ((8, 0), (4, 64)):
        for name, plan in plans.items():
            yield f"{name}, bits", float(bits), plan, partial(rounded, bits=bits, group=group)


def merged(bench: Methods, other: Methods) -> Iterator[Edit]:
    """Both vectors of one base; the first is the bench's."""
    bench.measured[f"target of {other.vector}"] = other.measured[TARGET]
    yield "base", 0.0, None
    for name, one in ((bench.vector, bench), (other.vector, other)):
        yield name, 1.0, replace(WHOLE, transform=Changed(partial(_of, task_vector=one.task_vector)))
    both = {"first": bench.task_vector, "second": other.task_vector}
    for c in (1.0, 0.7, 0.5, 0.3):
        yield "sum", c, replace(WHOLE, default=c, transform=Changed(partial(_sum, **both)))
    for density in (0.5, 0.2, 0.1):
        yield "TIES", density, replace(WHOLE, transform=Changed(partial(_ties, density=density, **both)))
    folders = [
        one.filters(f"beside {two.vector}", more={two.vector: two._texts["target"]})
        for one, two in ((bench, other), (other, bench))
    ]
    for strength in STRENGTHS:
        parts = [FilteredChange(folder, strength, tv) for folder, tv in zip(folders, both.values(), strict=True)]
        yield "filters added", strength, replace(WHOLE, transform=Changed(partial(_added, parts=parts)))


def _of(name: str, _: Tensor, *, task_vector: TaskVector) -> Tensor:
    return task_vector.delta(name)


def _sum(name: str, _: Tensor, *, first: TaskVector, second: TaskVector) -> Tensor:
    return first.delta(name) + second.delta(name)


def _ties(name: str, _: Tensor, *, first: TaskVector, second: TaskVector, density: float) -> Tensor:
    from peft.utils.merge_utils import ties

    return ties([first.delta(name), second.delta(name)], torch.ones(2), density)


def _added(name: str, delta: Tensor, *, parts: Sequence[FilteredChange]) -> Tensor:
    return torch.stack([part.apply(name, part.task_vector.delta(name)) for part in parts]).sum(0)


class Kept:
    """Losses measured so far, in one file; an edit that two methods share is measured once."""

    def __init__(self, path: Path) -> None:
        self.path, self._same = path, dict[tuple[str, int, int], pd.DataFrame]()
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
        same = (bench.vector, len(bench.measured), id(plan))
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
    return outcomes.frame.assign(vector=bench.vector, value=outcomes.frame.arm.map(chosen))


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
    every = ["methods", "tasks", "sets", *parts, "merge"]
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
        for part in options.parts:
            for edit in parts[part](bench) if part in parts else ():
                measured.add(bench, part, *edit)
        if "merge" in options.parts and name == "math_0":
            for edit in merged(bench, Methods("words", options.vectors, options.data)):
                measured.add(bench, "merge", *edit)
