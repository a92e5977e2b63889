"""What the studies share: the vectors' recipes, and a bench on which any edit's loss is measured.

bench = Bench("words", Path("runs/studies"))
bench.losses("held-out target", EditPlan.for_layers([3, 4]))
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from stethoscope.check import check_recipe
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli.console import ConsoleReporter
from stethoscope.context import INJECTED_TOKENS
from stethoscope.diagnosis.statistics import FeatureStatistics, load_statistics
from stethoscope.editing.apply import applied
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.recipe import Recipe
from stethoscope.run import run_recipe
from stethoscope.saes.open import load_sae
from stethoscope.selection.injection import Gains, measure
from stethoscope.text.tokens import batches, prompt_lengths, tokenize

OUTCOMES = Path(__file__).parent / "outcomes"
DOCUMENTS = 40  # of each text
JUDGED_ON = 8  # documents of each text that judge a set of layers
NAMES = ("math_0", "math_1", "code", "words")  # the task vectors; the first is the demo's own
VECTORS = (*NAMES, "refusal")  # of the study of edits
TEXTS = ("held-out target", "general")  # on which nothing was chosen


def recipe_of(vector: str, vectors: Path) -> Recipe:
    """A vector's recipe, which `vectors.py` wrote."""
    return Recipe.from_yaml(vectors / vector / "recipe.yaml")


def energies(recipe: Recipe) -> dict[int, float]:
    """Each layer's task vector energy."""
    return open_task_vector(open_checkpoint(recipe.base), recipe.tuned).energy_by_layer()


class Bench:
    """A vector's base in memory, its texts as tokens, and its diagnosis."""

    def __init__(self, vector: str, vectors: Path) -> None:
        self.vector, self.recipe, self.run = vector, recipe_of(vector, vectors), vectors / vector / "run"
        look = check_recipe(self.recipe, self.run)
        assert look.base is not None
        assert look.task_vector is not None
        self.base, self.task_vector, self.saes = look.base, look.task_vector, look.saes
        self.model, self.tokenizer = load_model(self.base.path), load_tokenizer(self.base.path)
        self._texts, self._prompts = look.texts, look.prompts
        self.tokens = {name: self._tokens(name, DOCUMENTS) for name in look.texts}

    def _tokens(self, text: str, most: int, max_tokens: int = 1024) -> tuple[list[list[int]], list[int] | None]:
        rows = tokenize(self._texts[text][:most], self.tokenizer, max_tokens=max_tokens)
        if text not in self._prompts:
            return rows, None
        return rows, prompt_lengths(rows, tokenize(self._prompts[text][:most], self.tokenizer, max_tokens=max_tokens))

    def gains(
        self,
        edits: Sequence[dict[int, float]],
        texts: tuple[str, str] = TEXTS,
        documents: int = DOCUMENTS,
        max_tokens: int = 1024,
    ) -> Gains:
        """What many edits of whole layers save on a target and a control text, by document."""
        read = {}
        for side, text in zip(("target", "control"), texts, strict=True):
            rows, starts = self._tokens(text, documents, max_tokens)
            read[side] = list(batches(rows, self.tokenizer, batch_tokens=INJECTED_TOKENS, starts=starts))
        return measure(self.model, LayerEdits(self.model, self.task_vector), read, edits)

    @cached_property
    def chosen(self) -> dict[int, float]:
        """The selected layers, each at 1; diagnoses first where that is not done."""
        return dict.fromkeys(
            run_recipe(self.recipe, self.run, until="select", reporter=ConsoleReporter()).selection.layers, 1.0
        )

    def losses(
        self, text: str, plan: EditPlan | None, within: Callable[[Any], AbstractContextManager[None]] = nullcontext
    ) -> PerDocument:
        """An edit's loss on each document of a text; ``within`` changes the edited model further."""
        rows, starts = self.tokens[text]
        with applied(self.model, self.task_vector, plan) if plan else nullcontext(), within(self.model):
            return document_losses(self.model, rows, starts=starts)

    def rows(self, plans: Mapping[str, EditPlan | None], **more: Any) -> Iterator[dict[str, Any]]:
        """A row per arm, text and document: nats and tokens."""
        for arm, plan in plans.items():
            for text in TEXTS:
                yield from loss_rows(self.losses(text, plan), vector=self.vector, arm=arm, text=text, **more)

    @cached_property
    def _statistics(self) -> dict[str, FeatureStatistics]:
        return load_statistics(self.run / "statistics.safetensors")

    def directions(self, layer: int) -> Tensor:
        """A layer's feature directions [features, d], those first that differ most toward the target."""
        ours, theirs = (self._statistics[name].layers[layer] for name in ("target", "control"))
        return load_sae(self.saes[layer]).W_dec.detach()[ours.toward(theirs).tolist()]


def loss_rows(losses: PerDocument, **more: Any) -> Iterator[dict[str, Any]]:
    """A row per document."""
    for number, (nats, tokens) in enumerate(zip(losses.sums.tolist(), losses.tokens.tolist(), strict=True)):
        yield {**more, "document": number, "nats": nats, "tokens": tokens}


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Write a study's outcomes."""
    OUTCOMES.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(OUTCOMES / f"{name}.parquet", index=False)


def kept(name: str, **where: Any) -> list[dict[str, Any]]:
    """The rows of a study that are there already, of one vector or case."""
    path = OUTCOMES / f"{name}.parquet"
    if not path.exists():
        return []
    table = pd.read_parquet(path)
    for column, value in where.items():
        table = table[table[column] == value]
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def resume(
    study: str,
    column: str,
    parts: Collection[str],
    only: Collection[str],
    make: Callable[[str], Iterable[dict[str, Any]]],
) -> None:
    """Make those parts of a study that are wanted and not there, and save it after each; a part is a column's value."""
    done = {part: kept(study, **{column: part}) for part in parts}
    for part in only:
        if not done[part]:
            done[part] = list(make(part))
            save(study, [row for found in done.values() for row in found])


def arguments(doc: str | None, parts: Collection[str] = NAMES) -> argparse.ArgumentParser:
    """What every study is asked: where the vectors lie, and which of its parts are wanted."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    return parser
