"""Study 4a: what breaks the choice. The demo's vector is diagnosed again, with one thing changed at a time.

    python studies/listening.py [--vectors runs/studies] [--only documents noise ...]

Cases done before are kept. Writes `outcomes/listening.parquet`, a row per case with every layer's excess, the layers
chosen, what was flagged and what the product said, and `outcomes/listening_losses.parquet`, a row per set of five
layers, text and document: the loss with these layers injected.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import skills
import torch
from common import TEXTS, Bench, kept, loss_rows, save
from sae_lens import SAE
from vectors import DIAGNOSED, HELD_OUT, MAX_TOKENS, SEARCHED

from stethoscope.cli.console import ConsoleReporter
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import Diagnose, Recipe, Text
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.run import run_recipe
from stethoscope.saes.activations import ActivationStream
from stethoscope.saes.health import measure_health
from stethoscope.saes.open import load_sae, open_saes
from stethoscope.selection.policies import unsteady
from stethoscope_demo.items import MATH_SUBJECTS, join_items, stream
from stethoscope_demo.tasks import general_documents

VECTOR = "math_0"
CHUNK = 90  # words to a piece where more documents are wanted than there are
MORE = 400  # target documents beside those of the other studies


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing changed: what of the recipe, and how its SAEs are made if they are changed."""

    name: str
    setting: str
    changes: dict[str, Any] = field(default_factory=dict)
    saes: Callable[[Path], None] | None = None


def cases(bench: Bench, folder: Path, vectors: Path) -> Iterator[Case]:
    """All cases; texts are written as their turn comes."""
    short = bench.recipe.diagnose
    target, control = _target(), [row["text"] for row in general_documents("calibration")]
    pieces = [" ".join(words[i : i + CHUNK]) for text in control for words in [text.split(" ")] for i in _starts(words)]

    def texts(name: str, ours: list[Any], theirs: list[Any], key: str = "text") -> dict[str, Text]:
        paths = folder / f"{name}.target.jsonl", folder / f"{name}.control.jsonl"
        for path, documents in zip(paths, (ours, theirs), strict=True):
            path.write_text("".join(json.dumps({key: one}) + "\n" for one in documents), encoding="utf-8")
        return dict(zip(("target", "control"), (Text(dataset=str(path), field=key) for path in paths), strict=True))

    yield Case(name="as it is", setting="120 documents")
    for count in (8, 16, 32, 64):
        size = short.model_copy(update={"block_size": max(1, min(8, count // 8))})
        changes: dict[str, Any] = {"diagnose": size, **texts(f"{count}", target[:count], control[:count])}
        yield Case(name="documents", setting=f"{count}", changes=changes)
    for other in ("code", "words"):
        text = Text(dataset=str((vectors / other / "target.jsonl").resolve()))
        yield Case(name="control text", setting=f"problems of `{other}`", changes={"control": text})
    chats = [_chat(text) for text in target[:DIAGNOSED]], [_said(text) for text in control[:DIAGNOSED]]
    for counted in ("all", "assistant"):
        counts = short.model_copy(update={"tokens": counted})
        changes = {"diagnose": counts, **texts("chat", *chats, key="messages")}
        yield Case(name="chat template", setting=f"{counted} tokens count", changes=changes)
    long = ["\n\n".join(target[i : i + 5]) for i in range(0, 200, 5)], _joined(control, 40)
    yield Case(
        name="context",
        setting="40 documents of up to 800 tokens",
        changes={"diagnose": Diagnose(block_size=4, max_tokens=800), **texts("long", *long)},
    )
    for explained in (0.7, 0.5, 0.3):
        yield Case(
            name="noise in the SAEs",
            setting=f"variance explained {explained:g}",
            saes=lambda out, explained=explained: _noised(bench, target[:16], explained, out),  # type: ignore[misc]
        )
    depth = bench.base.layers
    for setting, source in (
        ("the next layer's", lambda layer: min(layer + 1, depth - 1)),
        ("those five layers on", lambda layer: min(layer + 5, depth - 1)),
        ("in reverse order", lambda layer: depth - 1 - layer),
    ):
        yield Case(
            name="wrong SAEs",
            setting=setting,
            saes=lambda out, source=source: _shifted(bench, source, out),  # type: ignore[misc]
        )
    for count in (256, 512):
        some = pieces[:count]
        setting = f"{count}, and {len(some)} pieces of {CHUNK} words as control"
        yield Case(name="documents", setting=setting, changes=texts(f"{count}", target[:count], some))


def _target() -> list[str]:
    """As `vectors.py` draws them, and on."""
    pools = [stream(task, "calibration") for task in MATH_SUBJECTS]

    def documents(count: int, problems: int) -> list[str]:
        return [join_items(list(islice(pools[n % len(pools)], problems))) for n in range(count)]

    first = documents(DIAGNOSED, 3)
    for count in (SEARCHED, HELD_OUT):  # the problems that are searched or claimed on
        documents(count, 2)
    return first + documents(MORE, 3)


def _starts(words: list[str]) -> range:
    return range(0, max(1, len(words) - CHUNK // 2), CHUNK)


def _chat(text: str) -> list[dict[str, str]]:
    messages = []
    for part in text.split("\n\nProblem:\n"):
        problem, solution = part.removeprefix("Problem:\n").split("\n\nSolution: ")
        messages += [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return messages


def _said(text: str) -> list[dict[str, str]]:
    words = text.split(" ")
    asked = "Go on: " + " ".join(words[: len(words) // 4])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(words[len(words) // 4 :])}]


def _joined(texts: list[str], count: int) -> list[str]:
    size = len(texts) // count
    return ["\n\n".join(texts[i * size : (i + 1) * size]) for i in range(count)]


def _save_sae(sae: SAE, layer: int, out: Path) -> None:
    sae.cfg.metadata.hook_name = f"model.layers.{layer}"
    sae.save_model(out / f"layer_{layer}")


def _noised(bench: Bench, texts: list[str], explained: float, out: Path) -> None:
    """Gaussian noise in encoder and decoder, per layer so much that the variance explained falls to this."""
    stream_ = ActivationStream(bench.model, bench.tokenizer, range(bench.base.layers), max_tokens=MAX_TOKENS)
    activations = next(stream_.outputs(stream_.tokenize(texts)))
    generator = torch.Generator().manual_seed(0)
    for layer, folder in open_saes(bench.recipe.saes).items():
        sae = load_sae(folder)
        hidden = activations[stream_.hooks[layer]].float()
        weights = {"W_enc": sae.W_enc.data.clone(), "W_dec": sae.W_dec.data.clone()}
        noise = {n: torch.randn(w.shape, generator=generator) * w.std() for n, w in weights.items()}
        low, high = 0.0, 4.0
        for _ in range(12):
            amount = (low + high) / 2
            for name, weight in weights.items():
                getattr(sae, name).data = weight + amount * noise[name]
            found = measure_health(sae, hidden).health().variance_explained
            low, high = (amount, high) if found is not None and found > explained else (low, amount)
        _save_sae(sae, layer, out)


def _shifted(bench: Bench, source: Callable[[int], int], out: Path) -> None:
    saes = open_saes(bench.recipe.saes)
    for layer in saes:
        _save_sae(load_sae(saes[source(layer)]), layer, out)


def diagnose_case(case: Case, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A row: the diagnosis, the choice, and what was said."""
    reporter = ConsoleReporter()
    said: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    if case.saes and not (folder / "saes").exists():
        case.saes(folder / "saes")
    changed = recipe.model_copy(update={**case.changes, **({"saes": str(folder / "saes")} if case.saes else {})})
    layers: list[int] = []
    try:
        selection = run_recipe(changed, folder, until="select", reporter=reporter).selection
    except StethoscopeError as error:
        said.append(str(error))
    else:
        layers = list(selection.layers)
        said += selection.warnings
    found = {"case": case.name, "setting": case.setting, "layers": layers}
    if not (folder / Diagnosis.FILE).exists():
        return {**found, "refused": True, "said": said}
    diagnosis = Diagnosis.load(folder)
    return {
        **found,
        "refused": False,
        "said": [*diagnosis.warnings, *said],
        "layer": [layer.layer for layer in diagnosis.layers],
        "excess": [layer.excess for layer in diagnosis.layers],
        "flags": sum(layer.flag is not None for layer in diagnosis.layers),
        "unsteady": unsteady(diagnosis, layers),
        "best": [n.layer for n in sorted(diagnosis.layers, key=lambda n: (-n.excess, n.layer))[:5]],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    skills.register()
    folder = options.vectors / "listening"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(VECTOR, options.vectors)
    rows, losses = kept("listening"), kept("listening_losses")
    done = {(row["case"], row["setting"]) for row in rows}
    measured = {tuple(map(int, row["layers"])) for row in losses}

    def measure(layers: tuple[int, ...]) -> None:
        """The loss with these layers injected, once."""
        if layers not in measured:
            plan = EditPlan.for_layers(layers) if layers else None
            for text in TEXTS:
                losses.extend(loss_rows(bench.losses(text, plan), layers=list(layers), text=text))
            measured.add(layers)
            save("listening_losses", losses)

    measure(())
    for number, case in enumerate(cases(bench, folder, options.vectors)):
        if (case.name, case.setting) not in done and (not options.only or case.name in options.only):
            rows.append(diagnose_case(case, bench.recipe, folder / f"case_{number}"))
            save("listening", rows)
    for row in rows:
        if row.get("best") is not None:
            measure(tuple(sorted(map(int, row["best"]))))
