"""The same results from any number of workers, on a real local Ray cluster; killed workers and crashing documents."""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from world import write_saes, write_task

import stethoscope
from stethoscope import executor as executor_module
from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.diagnosis.collect import CollectedActivations, Piece, collect_activations
from stethoscope.diagnosis.encoding import layer_groups
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.evaluation.harness import journal_line
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate, evaluate_checkpoints
from stethoscope.executor import RayExecutor, WorkerContext, versions
from stethoscope.models.load import load_model
from stethoscope.recipe import Ray, Recipe
from stethoscope.run import run_recipe
from stethoscope.saes.open import open_saes
from stethoscope.selection.calibrate import calibrate
from stethoscope.selection.validate import validate_scores
from stethoscope.text.tokens import batches, tokenize

ray = pytest.importorskip("ray")
LAYERS, HIDDEN = 4, 32

WORKERS = pytest.mark.parametrize("workers", [1, 2])
TEXTS = {
    "target": [f"{i}+{i + 1}={2 * i + 1}; " * (2 + i % 3) for i in range(23)],
    "control": [f"the cat {i} sat on the mat " * (1 + i % 4) for i in range(14)],
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama, tokenizer) -> Path:
    """A base, its fine-tune, SAEs, and two tasks: one that generates and one that scores."""
    folder = tmp_path_factory.mktemp("world")
    model = llama(layers=LAYERS, hidden=HIDDEN)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # a random model this loud writes different things
        model.save_pretrained(folder / "base")
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    write_saes(folder / "saes", HIDDEN)
    (folder / "tasks").mkdir()
    rows = [{"problem": f"{a}+{b}", "answer": str(a + b)} for a in range(2, 6) for b in range(1, 4)]
    write_task(folder / "tasks", "sums", rows)
    picks = yaml.safe_load((folder / "tasks" / "sums.yaml").read_text()) | {
        "task": "picks",
        "output_type": "multiple_choice",
        "doc_to_target": 1,
        "doc_to_choice": ["1", "22", "x"],
    }
    del picks["generation_kwargs"], picks["metric_list"]
    (folder / "tasks" / "picks.yaml").write_text(yaml.safe_dump(picks))
    return folder


@pytest.fixture(scope="module")
def workers_of(world) -> Iterator[Callable[[int], RayExecutor]]:
    """Executors of one and of two workers."""
    threads = torch.get_num_threads()
    ray.init(num_cpus=4 * threads, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this file
    made = {n: RayExecutor(Ray(workers=n), WorkerContext(base=world / "base", tuned=world / "tuned")) for n in (1, 2)}
    yield made.__getitem__
    for one in made.values():
        one.__exit__()
    ray.shutdown()


@pytest.fixture(scope="module")
def model(world):
    return load_model(world / "base")


@pytest.fixture(scope="module")
def saes(world):
    return open_saes(world / "saes")


def assert_same(ours: dict[str, CollectedActivations], theirs: dict[str, CollectedActivations]) -> None:
    assert list(ours) == list(theirs)
    for name, collected in ours.items():
        assert collected.health == theirs[name].health
        assert collected.broken == theirs[name].broken
        their = theirs[name]
        for found, expected in ((collected.statistics.layers, their.statistics.layers), (collected.peaks, their.peaks)):
            for layer, arrays in found.items():
                for array, one in vars(arrays).items():
                    assert np.array_equal(one, getattr(expected[layer], array)), (name, layer, array)


@pytest.fixture(scope="module")
def collected(model, tokenizer, saes) -> dict[str, CollectedActivations]:
    found = collect_activations(model, tokenizer, saes, TEXTS, block_size=4)
    assert found["target"].statistics.layers[2].fired.sum() > 1000
    return found


def kill_a_worker() -> None:
    """One of this process' own, a busy one if there is any."""
    names: dict[int, str] = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            names[child.pid] = " ".join(child.cmdline())
    busy, idle = ([pid for pid, name in names.items() if title in name] for title in ("ray::Worker.do", "ray::Worker"))
    os.kill(random.choice(busy or idle), signal.SIGKILL)


@WORKERS
def test_statistics_and_health_are_the_same_also_if_a_worker_is_killed(
    workers_of, workers, model, tokenizer, saes, collected
):
    two_encoders = 2 * HIDDEN * 2 * HIDDEN * model.dtype.itemsize
    assert layer_groups(dict.fromkeys(saes, two_encoders // 2), two_encoders) == ((0, 1), (2, 3))
    options: dict[str, Any] = {"block_size": 4, "executor": workers_of(workers)}
    assert_same(collect_activations(model, tokenizer, saes, TEXTS, memory=two_encoders, **options), collected)
    assert_same(collect_activations(model, tokenizer, saes, TEXTS, memory=two_encoders, block_size=4), collected)
    told: list[int] = []

    def kill_once(done: int, _: int) -> None:
        told.append(done)
        if len(told) == 3:
            kill_a_worker()

    assert_same(collect_activations(model, tokenizer, saes, TEXTS, progress=kill_once, **options), collected)
    assert len(told) > 3


@pytest.fixture(scope="module")
def judged(world, model, tokenizer) -> Callable[[Any], tuple[Any, Any]]:
    """Calibration and the validation of scores, on any executor."""
    edits = LayerEdits(model, open_task_vector(open_checkpoint(world / "base"), world / "tuned"))
    texts = {n: list(batches(tokenize(some, tokenizer), tokenizer, batch_tokens=128)) for n, some in TEXTS.items()}
    z = {layer: float(layer * (3 - layer)) for layer in range(LAYERS)}
    scores = {"given": ("sae", {layer: float(layer % 3) for layer in range(LAYERS)})}
    seen = dict.fromkeys(texts, "0" * 64)

    def both(executor: Any) -> tuple[Any, Any]:
        options = {"provenance": Provenance(), "executor": executor}
        found = calibrate(model, edits, texts, z, seen=seen, coefficients=(0.5, 1.0), most_forwards=12.0, **options)
        return found, validate_scores(model, edits, scores, texts, random_sets=4, matched=(), **options)

    return both


def test_calibration_and_score_validation_are_the_same(workers_of, judged):
    assert judged(workers_of(1)) == judged(workers_of(2)) == judged(None)


PLANS = {"base": None, "tuned": EditPlan.everything(), "some": EditPlan.for_layers({1: 0.5, 2: 1.0})}


def asked(world: Path) -> dict[str, Any]:
    return {"include_path": world / "tasks", "batch_size": 3, "keys": {name: name for name in PLANS}}


@pytest.fixture(scope="module")
def arms(world, model) -> dict[str, Any]:
    context = WorkerContext(base=world / "base", tuned=world / "tuned")
    vars(context)["model"] = model
    return {name: (lambda plan=plan: context.state(plan)) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def outcomes(world, model, tokenizer, arms, tmp_path_factory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("alone")
    frame = evaluate(model, tokenizer, arms, ["sums", "picks"], out=out, **asked(world)).frame
    assert frame["response"].dropna().nunique() > 10
    assert len(frame) == 3 * 2 * 12
    return frame


@WORKERS
def test_outcomes_are_the_same(workers_of, workers, world, model, tokenizer, outcomes, tmp_path):
    seen: list[tuple[int, int, str]] = []
    given = asked(world) | {"out": tmp_path, "executor": workers_of(workers)}
    for _ in range(2):  # the second time from what is stored
        frame = evaluate(model, tokenizer, PLANS, ["sums", "picks"], progress=lambda *a: seen.append(a), **given).frame
        pd.testing.assert_frame_equal(frame, outcomes, check_exact=True)
    assert [done for done, _, _ in seen[:6]] == [12, 24, 36, 48, 60, 72]
    assert not list((tmp_path / "parts").glob("*.jsonl"))


def test_workers_go_on_inside_a_task(workers_of, world, model, tokenizer, arms, outcomes, tmp_path):
    """What was answered before the interruption is taken from the journal."""

    def stop(done: int, *_: Any) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    given = asked(world) | {"out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, arms, ["sums", "picks"], progress=stop, **given)
    (journal,) = (tmp_path / "parts").glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) >= 6
    lines[0]["response"] = "from the journal"
    del lines[0]["check"]
    journal.write_text("".join([journal_line(lines[0]), *(json.dumps(line) + "\n" for line in lines[1:])]))
    frame = evaluate(model, tokenizer, PLANS, ["sums", "picks"], executor=workers_of(2), **given).frame
    others = frame["response"] != "from the journal"
    assert (~others).sum() == 1
    pd.testing.assert_series_equal(frame["response"][others], outcomes["response"][others])
    assert not journal.exists()


def test_checkpoints_are_evaluated_the_same(workers_of, world, tmp_path):
    folders = {name: world / name for name in ("base", "tuned")}
    options = {"include_path": world / "tasks", "batch_size": 3, "limit": 7}
    alone = evaluate_checkpoints(folders, ["picks", "sums"], out=tmp_path / "alone", **options)
    options["executor"] = workers_of(2)
    found = evaluate_checkpoints(folders, ["picks", "sums"], out=tmp_path / "workers", **options)
    pd.testing.assert_frame_equal(found.frame, alone.frame, check_exact=True)
    assert found.provenance == alone.provenance


def test_a_recipe_gives_the_same_artefacts(workers_of, world, monkeypatch, tmp_path):
    """Every artefact of a run, byte for byte; the section `ray` leaves no trace in their keys."""
    for name, documents in TEXTS.items():
        write_lines(world / f"{name}.jsonl", [{"text": text} for text in documents])
    texts = {name: {"dataset": f"{name}.jsonl"} for name in TEXTS}
    recipe = texts | {
        "base": "base",
        "tuned": "tuned",
        "saes": "saes",
        "diagnose": {"block_size": 4, "permutations": 19, "resamples": 19},
        "select": {"policy": "calibrated", "include_flagged": True},
        "calibrate": texts | {"coefficients": [0.5, 1.0]},
        "edit": {"filter": "auto", "forwards": 12},
        "arms": ["base", "tuned", "projected", "filtered"],
        "evaluate": {"tasks": ["sums"], "include_path": "tasks", "exploratory": True},
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(executor_module, "RayExecutor", lambda options, _: nullcontext(workers_of(options.workers)))
    alone = Recipe.from_yaml(world / "recipe.yaml")
    run_recipe(alone, tmp_path / "alone")
    run_recipe(alone.model_copy(update={"ray": Ray(workers=2)}), tmp_path / "workers")
    names = "diagnosis.json statistics.safetensors peaks.safetensors evidence.json selection.json edits.json"
    for name in [*names.split(), "calibration.json", "recommended/calibration.json", "comparison.json"]:
        assert (tmp_path / "workers" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    ours, theirs = (Outcomes.load(tmp_path / name / "outcomes.parquet") for name in ("workers", "alone"))
    pd.testing.assert_frame_equal(ours.frame, theirs.frame, check_exact=True)


def letters(tool: Any, document: str) -> np.ndarray:
    """Some work that needs no model."""
    if document == "broken":
        raise StethoscopeError("no such thing", hint="mend it")
    time.sleep(0.01)
    return np.bincount(np.frombuffer(document.encode(), dtype=np.uint8), minlength=128)


def test_workers_killed_at_random_lose_nothing_and_count_nothing_twice(workers_of):
    documents, found = [f"{i} " * (i % 7) + chr(97 + i % 26) for i in range(400)], {}
    for index, result in workers_of(2).map_pieces(letters, documents, setup=id):
        assert index not in found
        found[index] = result
        if len(found) % 80 == 40:
            kill_a_worker()
    assert sorted(found) == list(range(len(documents)))
    assert all(np.array_equal(found[i], letters(None, document)) for i, document in enumerate(documents))


def test_what_a_worker_raises_is_raised_here_and_pieces_are_taken_as_workers_are_free(workers_of):
    taken: list[int] = []
    pieces = ("broken" if i == 7 else taken.append(i) or "a" for i in range(100))
    with pytest.raises(StethoscopeError, match="no such thing") as caught:
        list(workers_of(2).map_pieces(letters, pieces, setup=id))
    assert caught.value.hint == "mend it"
    assert len(taken) < 15
    assert len(list(workers_of(2).map_pieces(letters, "abc", setup=id))) == 3  # and it goes on


class Deadly:
    """An executor whose workers die of some documents."""

    def __init__(self, executor: RayExecutor) -> None:
        self.executor, self.workers = executor, executor.workers

    def map_pieces(self, task: Any, pieces: Iterable[Any], *, setup: Any) -> Any:
        def deadly(tool: Any, piece: Any) -> Any:
            if isinstance(piece, Piece) and any("deadly" in text for text in piece.documents.values()):
                os.kill(os.getpid(), signal.SIGKILL)
            return task(tool, piece)

        return self.executor.map_pieces(deadly, pieces, setup=setup)


def test_documents_that_are_broken_or_kill_a_worker_are_named_and_left_out(
    workers_of, monkeypatch, model, tokenizer, saes
):
    """Document 5 has no tokens, 9 kills its worker; without them the sums are those of the others."""
    monkeypatch.setattr(executor_module, "ATTEMPTS", 1)
    texts = {"target": list(TEXTS["target"]), "control": TEXTS["control"]}
    texts["target"][5] = ""
    with pytest.raises(StethoscopeError, match="some documents cannot be processed") as caught:
        collect_activations(model, tokenizer, saes, texts, block_size=4)
    assert caught.value.problems == ("document 5 of `target`: some documents have no tokens",)
    assert "skip_broken: true" in str(caught.value)
    texts["target"][9] = "deadly"
    options = {"block_size": 4, "executor": Deadly(workers_of(2))}
    found = collect_activations(model, tokenizer, saes, texts, skip_broken=True, **options)["target"]
    assert list(found.broken) == [5, 9]
    assert "1 workers died with it" in found.broken[9]
    blocks = [[n for n in range(i, min(i + 4, 23)) if n not in (5, 9)] for i in range(0, 23, 4)]
    for number, places in enumerate(blocks):
        alone = collect_activations(
            model, tokenizer, saes, {"block": [texts["target"][n] for n in places]}, health_tokens=0
        )
        for layer, found_there in found.statistics.layers.items():
            expected = alone["block"].statistics.layers[layer]
            assert np.array_equal(found_there.sums[number], expected.sums[0])
            assert found_there.tokens[number] == expected.tokens[0]


def test_workers_that_cannot_be_are_refused_and_nothing_else_needs_ray(workers_of, monkeypatch):
    monkeypatch.setattr(executor_module, "versions", lambda: versions() | {"torch": "1.0"})
    with pytest.raises(StethoscopeError, match="has other versions than the driver"):
        list(workers_of(1).map_pieces(letters, "ab", setup=id))
    with pytest.raises(StethoscopeError, match="`gpus: 2`: a worker computes on one GPU"):
        RayExecutor(Ray(gpus=2.0), WorkerContext())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StethoscopeError) as caught:
        RayExecutor(Ray(), WorkerContext())
    assert "sae-stethoscope[ray]" in str(caught.value)
    source = Path(stethoscope.__file__).parent
    importing = [path for path in source.rglob("*.py") if re.search(r"^ *(import|from) ray\b", path.read_text(), re.M)]
    assert importing == [source / "executor.py"]
