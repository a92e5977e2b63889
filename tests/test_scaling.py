"""The same answers from any number of workers, whatever befalls them, on a real local Ray cluster."""

import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import stethoscope
from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli.stages import _read
from stethoscope.corpus import batches, tokenize
from stethoscope.diagnosis.listen import Listening, listen
from stethoscope.diagnosis.listener import Block, Listener
from stethoscope.diagnosis.sharing import BANDWIDTH, FLOPS, OPEN_BLOCKS, STORE_SHARE, share, token_seconds
from stethoscope.diagnosis.streams import Forward, Reading
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate, evaluate_checkpoints
from stethoscope.models import load_model
from stethoscope.recipe import Ray, Recipe
from stethoscope.run import run_recipe
from stethoscope.saes.open import open_saes
from stethoscope.scaling import Bench, Crew
from stethoscope.scaling.bench import versions
from stethoscope.scaling.crew import AHEAD, CrewRun, _greet, _Member, _Queue
from stethoscope.selection.calibrate import calibrate
from stethoscope.selection.validate import validate_scores
from stethoscope.work import Alone, Lost, Means, Piece

ray = pytest.importorskip("ray")

LAYERS, HIDDEN, WIDTH = 4, 32, 96
WORKERS = pytest.mark.parametrize("workers", [1, 2, 4])
TEXTS = {
    "target": [f"{i}+{i + 1}={2 * i + 1}; " * (2 + i % 3) for i in range(23)],
    "control": [f"the cat {i} sat on the mat " * (1 + i % 4) for i in range(14)],
}


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
    for layer in range(LAYERS):
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=HIDDEN, d_sae=WIDTH))
        for parameter in sae.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        sae.threshold.data = torch.rand(WIDTH)
        sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        sae.save_model(folder / "saes" / f"layer_{layer}")
    (folder / "tasks").mkdir()
    rows = [{"problem": f"{a}+{b}", "answer": a + b, "choices": ["1", "22", "x"]} for a in range(5) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Say {{problem}}=",
    }
    sums = {
        "task": "sums",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    picks = {"task": "picks", "output_type": "multiple_choice", "doc_to_target": 1, "doc_to_choice": "{{choices}}"}
    for task in (sums, picks):
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def crew(world) -> Iterator[Crew]:
    """Four workers."""
    threads = torch.get_num_threads()
    ray.init(num_cpus=8 * threads, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    with Crew(Ray(workers=4), Bench(base=world / "base", tuned=world / "tuned")) as made:
        yield made
    ray.shutdown()


@pytest.fixture(scope="module")
def model(world):
    return load_model(world / "base")


def few(crew: Crew, workers: int) -> Crew:
    """The same crew with fewer workers."""
    some = copy.copy(crew)
    some._members = crew._members[:workers]
    return some


def assert_same(ours: dict[str, Listening], theirs: dict[str, Listening]) -> None:
    assert list(ours) == list(theirs)
    for name, heard in ours.items():
        assert heard.health == theirs[name].health
        assert heard.broken == theirs[name].broken
        for layer, found in heard.statistics.layers.items():
            for array in ("sums", "fired", "maxima", "tokens", "sinks"):
                one, other = getattr(found, array), getattr(theirs[name].statistics.layers[layer], array)
                assert one.dtype == other.dtype
                assert np.array_equal(one, other), (name, layer, array)


@pytest.fixture(scope="module")
def saes(world):
    return open_saes(world / "saes")


@pytest.fixture(scope="module")
def heard(model, tokenizer, saes) -> dict[str, Listening]:
    """What one process hears."""
    found = listen(model, tokenizer, saes, TEXTS, block_size=4)
    assert found["target"].statistics.layers[2].fired.sum() > 1000
    return found


def two_encoders(model: Any) -> int:
    """Their bytes."""
    return 2 * HIDDEN * WIDTH * model.dtype.itemsize


@WORKERS
def test_statistics_and_health_are_the_same(crew, workers, model, tokenizer, saes, heard):
    found = listen(model, tokenizer, saes, TEXTS, block_size=4, spread=few(crew, workers).listening)
    assert_same(found, heard)


@pytest.mark.parametrize("split", ["auto", "documents", "layers", "streams"])
def test_layers_on_several_workers_are_the_same(crew, split, model, tokenizer, saes, heard, caplog):
    caplog.set_level("INFO")
    memory = None if split in ("layers", "streams") else two_encoders(model)
    options = {"block_size": 4, "memory": memory, "split": split}
    found = listen(model, tokenizer, saes, TEXTS, spread=few(crew, 2).listening, **options)
    assert_same(found, heard)
    assert "2 groups of layers" in caplog.text
    assert ("one after another" in caplog.text) == (split == "documents")
    assert ("one forward feeds all" in caplog.text) == (split in ("auto", "streams"))
    assert_same(listen(model, tokenizer, saes, TEXTS, **options), heard)


# documents of which four make a batch, so that a block of six is two
LONG = {name: [(text * 200)[: 800 + 9 * i] for i, text in enumerate(texts[:13])] for name, texts in TEXTS.items()}
LONG["control"] = LONG["control"][:7]


@pytest.fixture(scope="module")
def long_heard(model, tokenizer, saes) -> dict[str, Listening]:
    """What one process hears of them."""
    return listen(model, tokenizer, saes, LONG, block_size=6)


@pytest.mark.parametrize(("workers", "groups"), [(2, 2), (4, 2), (2, 4)])
def test_streams_of_several_batches_give_the_same(crew, workers, groups, model, tokenizer, saes, long_heard):
    """Two groups for as many workers or twice as many, and four for two, which are fed two at a time."""
    options = {"block_size": 6, "split": "streams", "memory": two_encoders(model) * 2 // groups}
    asked: list[Any] = []
    found = listen(model, tokenizer, saes, LONG, spread=Meddling(few(crew, workers), asked), **options)
    assert_same(found, long_heard)
    batches_of = [2, 2, 1, 2, 1]  # blocks of 6, 6, 1 and 6, 1 documents
    forwards = sum(batches_of) * (2 if groups > workers else 1)
    assert sum(isinstance(work, Forward) for work in asked) == forwards
    assert sum(isinstance(work, Reading) for work in asked) == sum(batches_of) * max(groups, workers)
    assert not any(isinstance(work, Block) for work in asked)


class Meddling:
    """A crew that notes what it is asked, and after some results does something."""

    def __init__(self, crew: Crew, asked: list[Any], after: Callable[[int], None] = lambda _: None) -> None:
        self.crew, self.asked, self.after = crew, asked, after
        self.means = crew.means

    def __call__(self, make: Any) -> "Meddling":
        self.run = self.crew.listening(make)
        return self._running()

    def _running(self) -> Any:
        def run(task: Any, pieces: Any) -> Iterator[tuple[int, Any]]:
            for number, result in self.run(task, pieces):
                self.asked.append(pieces[number].load())
                self.after(len(self.asked))
                yield number, result

        run.means = self.means
        return run


def test_workers_killed_while_they_forward_hold_streams_or_read_them_change_nothing(
    crew, model, tokenizer, saes, long_heard
):
    some, asked, killed = few(crew, 2), [], []

    def now_and_then(done: int) -> None:
        if done in (4, 11):
            killed.append(kill(some.pids))

    options = {"block_size": 6, "split": "streams"}
    found = listen(model, tokenizer, saes, LONG, spread=Meddling(some, asked, now_and_then), **options)
    assert killed == [True] * 2
    assert_same(found, long_heard)
    # streams and sums outlive the process that made them: only what it had in hand is done again
    assert not any(isinstance(work, Block) for work in asked)


class Pair(Alone):
    """One process that thinks it is two, and notes what it is asked; some pieces get lost."""

    def __init__(self, tool: Any, *, lose: Callable[[Any], bool] = lambda _: False) -> None:
        super().__init__(tool)
        self.lose = lose
        self.out: list[tuple[int, int]] = []
        self.blocks = 0

    @property
    def means(self) -> Means:
        return Means(workers=2)

    def __call__(self, task: Callable[..., Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(pieces):
            work = piece.load()
            self.blocks += isinstance(work, Block)
            yield number, Lost(why="killed") if self.lose(work) else task(self.tool, work, *piece.given)
            held = {id(value) for other in pieces for value in other.given[:1]}
            self.out.append((sum(other.name.startswith("forward") for other in pieces), len(held)))


def pair(model: Any, tokenizer: Any, **options: Any) -> tuple[Callable[[Any], Pair], list[Pair]]:
    made: list[Pair] = []

    def spread(make: Any) -> Pair:
        made.append(Pair(make(model, tokenizer), **options))
        return made[0]

    return spread, made


def test_few_streams_are_out_at_a_time(model, tokenizer, saes):
    """Two for each worker, one for each group of layers; what has been read is held by nobody."""
    spread, made = pair(model, tokenizer)
    found = listen(model, tokenizer, saes, LONG, block_size=2, split="streams", spread=spread)
    assert_same(found, listen(model, tokenizer, saes, LONG, block_size=2))
    forwards, streams = (max(numbers) for numbers in zip(*made[0].out, strict=True))
    assert forwards <= OPEN_BLOCKS * 2
    assert 2 <= streams <= OPEN_BLOCKS * 2 * 2
    assert made[0].out[-1] == (0, 0)


@pytest.mark.parametrize("kind", [Forward, Reading])
def test_a_lost_stream_is_forwarded_again(model, tokenizer, saes, long_heard, kind):
    """The block of which a batch or its streams are gone for good is heard by each group by itself."""
    seen: list[Any] = []

    def lose(work: Any) -> bool:
        seen.append(work)
        return isinstance(work, kind) and sum(isinstance(one, kind) for one in seen) == 5

    spread, made = pair(model, tokenizer, lose=lose)
    found = listen(model, tokenizer, saes, LONG, block_size=6, split="streams", spread=spread)
    assert_same(found, long_heard)
    assert made[0].blocks == 2


def keep(tool: Any, loaded: Any, *given: Any) -> Any:
    """Tells its process, and keeps values or gives what it was given back."""
    if loaded == "put":  # its owner is the worker, and not the driver as with what a task returns
        return os.getpid(), [ray.put(np.ones(10**6))]
    return (os.getpid(), np.full(10**6, 3.0)) if loaded == "make" else [float(one.sum()) for one in given]


def test_what_is_kept_outlives_its_maker_and_what_is_gone_is_said(crew):
    pieces = [Piece(name="made", load=lambda: "make", keep=1)]
    killed: list[int] = []
    found: list[Any] = []
    for number, result in light(few(crew, 2))(by_value(keep), pieces):
        if number == 0:
            pid, made = result
            os.kill(pid, signal.SIGKILL)
            pieces.append(Piece(name="read", load=lambda: "", given=(made,)))
            pieces.append(Piece(name="put", load=lambda: "put"))
        elif pieces[number].name == "put":
            pid, (reference,) = result
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            time.sleep(0.5)
            pieces.append(Piece(name="gone", load=lambda reference=reference: "", given=(reference,)))
        else:
            found.append(result)
    assert found[0] == [3e6]
    assert isinstance(found[1], Lost)
    assert "is gone" in found[1].why


def test_which_way_is_cheaper_is_arithmetic():
    """A token of SmolLM2-135M on CPUs, and of Gemma-3-4B on GPUs, two groups of layers."""
    small = {"flop": 0.2e9, "flops": FLOPS["cpu"], "stream_bytes": 30 * 576 * 2.0}
    assert token_seconds(forwards=2, waves=1, **small) == (0.002 + 34560 / BANDWIDTH, 0.004)
    large = {"flop": 6.4e9, "flops": FLOPS["cuda"], "stream_bytes": 34 * 2560 * 2.0}
    assert token_seconds(forwards=2, waves=1, **large) == (32e-6 + 174080 / BANDWIDTH, 64e-6)
    moved, again = token_seconds(forwards=8, waves=1, **large)
    assert moved < again  # eight groups of layers: seven forwards take longer than 139 microseconds
    assert token_seconds(forwards=8, waves=8, **large)[0] > again  # none is fed beside another


def test_the_choice_is_stated_and_can_be_forced(model, saes):
    def asked(split: Any, **means: Any) -> Any:
        options = {"dtype": model.dtype, "memory": two_encoders(model), "max_tokens": 1024}
        return share(model, saes, Means(workers=2, **means), split=split, **options)

    assert asked("auto").way == "streams"
    assert asked("auto", device="cuda").way == "layers"
    assert asked("streams", device="cuda").way == "streams"
    assert asked("layers").way == "layers"
    assert asked("documents").way == "documents"
    parameters = sum(weight.numel() for weight in model.model.layers.parameters())
    token = LAYERS * HIDDEN * model.dtype.itemsize
    again, moved = 1000 * 2 * 2 * parameters / FLOPS["cpu"], 1000 * token / BANDWIDTH
    assert asked("auto").said == (
        "2 workers, encoders of 0.00 GB, room for 0.00 GB on each: 2 groups of layers, each kept by a worker while"
        f" there is work for it, and one forward feeds all: {again / 2 + moved:.2g} ms a token where its streams move,"
        f" {token / 1000:.3g} kB, {again:.2g} ms if not"
    )
    block = 4096 * token + 2 * 20 * LAYERS * WIDTH
    assert asked("auto", store=int(3.5 * block / STORE_SHARE)).blocks == 3
    small = int(0.9 * block / STORE_SHARE)
    assert asked("auto", store=small).way == "layers"
    assert "do not fit in the object store" in asked("auto", store=small).said
    with pytest.raises(StethoscopeError, match=r"the streams of a batch, .* do not fit") as caught:
        asked("streams", store=small)
    assert "`split: layers`" in str(caught.value.hint)


def test_streams_that_do_not_fit_are_refused_before_any_work(crew, model, tokenizer, saes):
    """A document may be so long that its streams are 150 MB; the store has 105."""
    options = {
        "max_tokens": 150_000_000 // (LAYERS * HIDDEN * model.dtype.itemsize),
        "split": "streams",
        "spread": few(crew, 2).listening,
    }
    with pytest.raises(StethoscopeError, match=r"streams of a batch, 0\.15 GB, do not fit"):
        listen(model, tokenizer, saes, TEXTS, **options)


@pytest.fixture(scope="module")
def judged(world, model, tokenizer) -> Callable[[Any], tuple[Any, Any]]:
    """Calibration and validation, wherever the work is done."""
    edits = LayerEdits(model, open_task_vector(open_checkpoint(world / "base"), world / "tuned"))
    texts = {n: list(batches(tokenize(some, tokenizer), tokenizer, batch_tokens=128)) for n, some in TEXTS.items()}
    z = {layer: float(layer * (3 - layer)) for layer in range(LAYERS)}
    scores = {"given": ("sae", {layer: float(layer % 3) for layer in range(LAYERS)})}
    seen = dict.fromkeys(texts, "0" * 64)

    def both(spread: Any) -> tuple[Any, Any]:
        options = {"provenance": Provenance(), "spread": spread}
        found = calibrate(model, edits, texts, z, seen=seen, coefficients=(0.5, 1.0), most_forwards=12.0, **options)
        return found, validate_scores(model, edits, scores, texts, random_sets=4, matched=(), **options)

    return both


@pytest.fixture(scope="module")
def judged_alone(judged) -> tuple[Any, Any]:
    return judged(None)


@WORKERS
def test_calibration_and_validation_are_the_same(crew, workers, judged, judged_alone):
    assert judged(few(crew, workers).injecting) == judged_alone


def plans() -> dict[str, EditPlan | None]:
    return {"base": None, "tuned": EditPlan.everything(), "some": EditPlan.for_layers({1: 0.5, 2: 1.0})}


@pytest.fixture(scope="module")
def outcomes(world, model, tokenizer, tmp_path_factory) -> pd.DataFrame:
    """What one process finds."""
    bench = Bench(base=world / "base", tuned=world / "tuned")
    arms = {name: (lambda plan=plan: bench.entered(plan)) for name, plan in plans().items()}
    out = tmp_path_factory.mktemp("alone")
    frame = evaluate(bench.model, tokenizer, arms, ["sums", "picks"], out=out, **asked(world)).frame
    assert frame["response"].dropna().nunique() > 10
    assert len(frame) == 3 * 2 * 20
    return frame


def asked(world: Path) -> dict[str, Any]:
    return {"include_path": world / "tasks", "batch_size": 3, "keys": {name: name for name in plans()}}


def ask(crew: Crew, world: Path, model: Any, tokenizer: Any, out: Path, **options: Any) -> pd.DataFrame:
    arms = dict.fromkeys(plans(), nullcontext)
    given = asked(world) | {"spread": crew.answering(plans()), "out": out} | options
    return evaluate(model, tokenizer, arms, ["sums", "picks"], **given).frame


@WORKERS
def test_outcomes_are_the_same(crew, workers, world, model, tokenizer, outcomes, tmp_path):
    seen: list[tuple[int, int, str]] = []
    frame = ask(few(crew, workers), world, model, tokenizer, tmp_path, progress=lambda *now: seen.append(now))
    pd.testing.assert_frame_equal(frame, outcomes, check_exact=True)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (120, 120)


def test_checkpoints_are_evaluated_the_same(crew, world, tmp_path):
    folders = {name: world / name for name in ("base", "tuned")}
    options = {"include_path": world / "tasks", "batch_size": 3, "limit": 7}
    alone = evaluate_checkpoints(folders, ["picks", "sums"], out=tmp_path / "alone", **options)
    spread = few(crew, 2).answering_from(folders)
    found = evaluate_checkpoints(folders, ["picks", "sums"], out=tmp_path / "workers", spread=spread, **options)
    pd.testing.assert_frame_equal(found.frame, alone.frame, check_exact=True)
    assert found.provenance == alone.provenance


def test_an_evaluation_whose_driver_ended_goes_on(crew, world, model, tokenizer, outcomes, tmp_path):
    """What was answered is asked of nobody again, by workers or alone, and the answers are the same."""

    def stop(done: int, *_: Any) -> None:
        if done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(few(crew, 2), world, model, tokenizer, tmp_path, progress=stop)
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "parts").glob("*.jsonl"))
    assert kept > 20
    counted: list[int] = []
    again = Counting(crew, counted)
    frame = ask(again, world, model, tokenizer, tmp_path)
    pd.testing.assert_frame_equal(frame, outcomes, check_exact=True)
    generated = sum(len(batch.prompts) for batch in counted if hasattr(batch, "prompts"))
    assert generated == 60 - kept
    assert not list((tmp_path / "parts").glob("*.jsonl"))


def test_a_recipe_gives_the_same_artefacts(crew, world, monkeypatch, tmp_path):
    """Diagnosis, calibration and outcomes, as a run writes them; the section `ray` leaves no trace in their keys."""
    for name, documents in TEXTS.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    texts = {name: {"dataset": f"{name}.jsonl"} for name in TEXTS}
    recipe = texts | {
        "base": "base",
        "tuned": "tuned",
        "saes": "saes",
        "diagnose": {"block_size": 4, "permutations": 19, "resamples": 19},
        "select": {"policy": "calibrated", "include_flagged": True},
        "calibrate": texts | {"coefficients": [0.5, 1.0]},
        "arms": ["base", "tuned", "projected"],
        "evaluate": {"tasks": ["sums"], "include_path": "tasks", "exploratory": True},
    }
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("stethoscope.scaling.crew.Crew", lambda options, bench: nullcontext(few(crew, options.workers)))
    alone = Recipe.from_yaml(world / "recipe.yaml")
    for folder, chosen in {"alone": alone, "workers": alone.model_copy(update={"ray": Ray(workers=2)})}.items():
        run_recipe(chosen, tmp_path / folder, reporter=Silent())
    for name in (
        *("diagnosis.json", "statistics.safetensors", "evidence.json", "calibration.json", "selection.json"),
        *("edits.json", "comparison.json"),
    ):
        assert (tmp_path / "workers" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    ours, theirs = (Outcomes.load(tmp_path / name / "outcomes.parquet") for name in ("workers", "alone"))
    pd.testing.assert_frame_equal(ours.frame, theirs.frame, check_exact=True)


def test_the_command_line_overrides_the_recipe(tmp_path):
    text = {"dataset": "a.jsonl"}
    recipe = dict.fromkeys(("base", "tuned", "saes"), "x") | {"target": text, "control": text, "select": {"k": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"evaluate": {"tasks": ["x"]}}))
    assert _read(path, None)[0].ray is None
    assert _read(path, None, workers=2, gpus=0.5)[0].ray == Ray(workers=2, gpus=0.5)
    path.write_text(yaml.safe_dump(recipe | {"evaluate": {"tasks": ["x"]}, "ray": {"workers": 8, "split": "layers"}}))
    assert _read(path, None)[0].ray == Ray(workers=8, split="layers")
    assert _read(path, None, ray="here:1", workers=0)[0].ray == Ray(address="here:1", workers=0, split="layers")


class Silent:
    """A reporter that shows nothing."""

    def stage(self, title: str) -> Any:
        return nullcontext(lambda _done, _total: None)

    def note(self, text: str) -> None:
        pass


class Counting:
    """A crew that notes what it is asked."""

    def __init__(self, crew: Crew, asked: list[Any]) -> None:
        self.crew, self.asked = crew, asked

    def answering(self, plans: Any) -> Callable[[Any], Any]:
        def spread(make: Any) -> Any:
            run = self.crew.answering(plans)(make)

            def noted(task: Any, pieces: Sequence[Piece]) -> Any:
                self.asked += [piece.load().asked for piece in pieces]
                return run(task, pieces)

            noted.means = run.means
            return noted

        return spread


def letters(tool: Any, document: str) -> tuple[np.ndarray, np.ndarray]:
    """Counts and sums, as a stage makes them of a document."""
    counts = np.bincount(np.frombuffer(document.encode(), dtype=np.uint8), minlength=128)
    return counts, np.sqrt(counts) / 3


def light(crew: Crew) -> CrewRun:
    """Work that needs no model."""
    return CrewRun(crew, lambda bench: None)


def by_value(task: Callable[..., Any]) -> Callable[..., Any]:
    """A function of this file as workers can get it: they do not have this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return task


def kill(pids: Sequence[int]) -> bool:
    try:
        os.kill(random.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def test_twenty_workers_killed_at_random_lose_nothing_and_count_nothing_twice(crew):
    documents = [f"{i} " * (i % 7) + chr(97 + i % 26) * (i % 11) for i in range(2000)]
    pieces = [Piece(name=f"document {i}", load=lambda i=i: documents[i]) for i in range(len(documents))]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    some = few(crew, 2)
    kills, last = 0, time.monotonic()
    while kills < 20:  # a round is as long as it takes
        found.clear()
        for number, result in light(some)(by_value(letters), pieces):
            assert number not in found
            found[number] = result
            if kills < 20 and some.pids and time.monotonic() - last > 0.3:
                kills += kill(some.pids)
                last = time.monotonic()
        assert sorted(found) == list(range(len(documents)))
        for place in (0, 1):
            ours = np.cumsum([found[i][place] for i in range(len(documents))], axis=0)[-1]
            theirs = np.cumsum([letters(None, text)[place] for text in documents], axis=0)[-1]
            assert np.array_equal(ours, theirs)


def test_a_worker_killed_while_it_listens_changes_nothing(crew, model, tokenizer, saes, heard):
    some = few(crew, 2)
    killed: list[bool] = []

    def once(done: int, _: int) -> None:
        if not killed:
            killed.append(kill(some.pids))

    found = listen(model, tokenizer, saes, TEXTS, block_size=2, spread=some.listening, progress=once)
    assert killed == [True]
    assert_same(found, listen(model, tokenizer, saes, TEXTS, block_size=2))


def deadly(tool: Any, document: str) -> str:
    if document == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if document == "broken":
        raise StethoscopeError("no such thing", hint="mend it")
    return document.upper()


def test_a_piece_that_ends_every_worker_is_given_up_and_the_others_are_done(crew, monkeypatch):
    monkeypatch.setattr("stethoscope.scaling.crew.DEATHS", 1)
    documents = ["a", "deadly", *"bcdefgh"]
    pieces = [Piece(name=f"document {i}", load=lambda i=i: documents[i]) for i in range(len(documents))]
    found = dict(light(few(crew, 2))(by_value(deadly), pieces))
    lost = found.pop(1)
    assert isinstance(lost, Lost)
    assert "1 workers died with it" in lost.why
    assert found == {i: text.upper() for i, text in enumerate(documents) if i != 1}


def test_what_a_worker_raises_is_raised_here_with_its_hint(crew):
    with pytest.raises(StethoscopeError, match="no such thing") as caught:
        list(light(crew)(by_value(deadly), [Piece(name="broken", load=lambda: "broken")]))
    assert caught.value.hint == "mend it"


def test_few_pieces_are_out_at_a_time(crew):
    """Documents are loaded when their turn comes: a consumer that is slow holds up the reading, not the memory."""
    loaded: list[int] = []
    pieces = [Piece(name=str(i), load=lambda i=i: loaded.append(i) or str(i)) for i in range(200)]
    for taken, _ in enumerate(light(crew)(by_value(deadly), pieces), 1):
        assert len(loaded) - taken <= AHEAD * 4
    assert loaded == list(range(200))


def is_deadly(work: Any) -> bool:
    """A worker would die of it."""
    return isinstance(work, Block | Forward) and any("deadly" in text for text in work.documents.values())


@pytest.mark.parametrize("split", ["layers", "streams"])
def test_broken_and_deadly_documents_are_named_and_left_out_if_asked(model, tokenizer, saes, split):
    """Document 5 has no tokens, 9 ends its worker; without them the sums are those of the others, in every group."""
    texts = {"target": list(TEXTS["target"]), "control": TEXTS["control"]}
    texts["target"][5] = ""
    with pytest.raises(StethoscopeError, match="some documents cannot be heard") as caught:
        listen(model, tokenizer, saes, texts, block_size=4)
    assert caught.value.problems == ("document 5 of `target`: some documents have no tokens",)
    assert "skip_broken: true" in str(caught.value)
    texts["target"][9] = "deadly"
    options = {"spread": lambda make: Pair(make(model, tokenizer), lose=is_deadly), "split": split}
    with pytest.raises(StethoscopeError, match="document 3 of `target`: killed"):
        listen(model, tokenizer, saes, texts | {"target": texts["target"][6:]}, block_size=4, **options)
    options["skip_broken"] = True
    found = listen(model, tokenizer, saes, texts, block_size=4, **options)["target"]
    assert found.broken == {5: "some documents have no tokens", 9: "killed"}
    blocks = [[n for n in range(i, min(i + 4, 23)) if n not in (5, 9)] for i in range(0, 23, 4)]
    for number, places in enumerate(blocks):
        alone = listen(model, tokenizer, saes, {"block": [texts["target"][n] for n in places]}, health_tokens=0)
        for layer, found_there in found.statistics.layers.items():
            expected = alone["block"].statistics.layers[layer]
            assert np.array_equal(found_there.sums[number], expected.sums[0])
            assert found_there.tokens[number] == expected.tokens[0]
    one_by_one = listen(model, tokenizer, saes, texts, block_size=1, **options)["target"]
    assert one_by_one.statistics.blocks == 21


def test_a_document_broken_for_one_group_of_layers_counts_for_none(model, tokenizer, saes):
    """Layer 3 overflows on a document; the group of layers that was heard before is heard again without it."""
    document = 7

    class Choosy(Listener):
        def _hear(self, documents: Any) -> Any:
            if 3 in self._encoders and TEXTS["target"][document] in documents.values():
                raise FloatingPointError("overflow")
            return super()._hear(documents)

    def spread(make: Any) -> Alone:
        return Alone(Choosy(model, tokenizer, **make.keywords))

    options = {"memory": two_encoders(model), "skip_broken": True, "block_size": 4}
    found = listen(model, tokenizer, saes, TEXTS, spread=spread, **options)["target"]
    assert found.broken == {document: "overflow"}
    tokens = [layer.tokens.tolist() for layer in found.statistics.layers.values()]
    assert tokens[0] == tokens[3]


def test_a_worker_keeps_to_its_key_and_changes_to_the_one_with_fewest():
    queue = _Queue([Piece(name=str(i), key=i % 2, load=int) for i in range(8)])
    first, second = (_Member(actor=None, greeting=None) for _ in range(2))
    taken = []
    for member in (first, second, first, second, first, first, first):
        taken.append(queue.take(member, [first, second]))
        member.flying = [object()]
    assert taken == [0, 1, 2, 3, 4, 6, 5]
    queue.suspect(4)
    assert len(queue) == 1
    assert queue.take_suspect(second) == 4
    assert second.key == 0
    assert queue.take(second, [first, second]) == 7


def test_what_continues_waits_for_the_worker_that_has_its_key():
    pieces = [Piece(name="", key=key, load=int, given=(0,) * given) for key, given in (("a", 0), ("b", 0), (None, 0))]
    queue, (first, second) = _Queue(pieces), (_Member(actor=None, greeting=None) for _ in range(2))
    both = [first, second]
    assert queue.take(first, both) == 2  # for anyone: goes first, and leaves the worker its key
    assert (first.key, queue.take(first, both), first.key) == (None, 0, "a")
    assert (queue.take(second, both), second.key) == (1, "b")
    pieces += [Piece(name="", key="b", load=int, given=(0,)), Piece(name="", key="c", load=int, given=(0,))]
    assert queue.look() == 2
    assert queue.take(first, both) == 4  # nobody has it
    first.key = "a"
    assert queue.take(first, both) is None
    assert queue.take(second, both) == 3
    pieces.append(Piece(name="", key="b", load=int, given=(0,)))
    queue.look()
    first.key = None  # as of one that has just come
    assert queue.take(first, both) == 5


DRIVER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs that ignore it
from stethoscope.recipe import Ray
from stethoscope.scaling import Bench, Crew
from stethoscope.scaling.crew import CrewRun
from stethoscope.work import Alone, Lost, Means, Piece

def main():
    def forever(tool, loaded):
        import os, time
        time.sleep(600 if loaded else 0)
        return os.getpid()

    with Crew(Ray(address=sys.argv[1], workers=2), Bench()) as crew:
        pieces = [Piece(name=str(i), load=lambda i=i: i) for i in range(9)]
        for _, pid in CrewRun(crew, lambda bench: None)(forever, pieces):
            print(*crew.pids, flush=True)
main()
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_workers_end_with_the_driver(crew, end):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert pids
        driver.send_signal(end)
        try:
            driver.wait(timeout=20)
        finally:
            driver.kill()
    end_of_wait = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end_of_wait, "its workers are still there"
        time.sleep(0.1)


def test_workers_with_other_versions_are_refused(crew, monkeypatch):
    monkeypatch.setattr("stethoscope.scaling.crew.versions", lambda: versions() | {"torch": "1.0"})
    member = copy.copy(crew._members[0])
    member.greeting = _greet(member.actor)
    with pytest.raises(StethoscopeError, match="has other versions than this one"):
        few(crew, 1)._welcome(member)


def test_several_gpus_for_a_worker_are_refused():
    with pytest.raises(StethoscopeError, match="`gpus: 2`: a worker computes on one GPU"):
        Crew(Ray(gpus=2.0), Bench())


def test_without_ray_workers_are_refused_in_one_line_and_nothing_else_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StethoscopeError) as caught:
        Crew(Ray(), Bench())
    assert str(caught.value) == 'workers need Ray: `pip install "sae-stethoscope[ray]"`'
    source = Path(stethoscope.__file__).parent
    imported = {
        (path.relative_to(source).as_posix(), name.split(".")[0])
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
    }
    assert {path for path, name in imported if name == "ray"} == {"scaling/crew.py"}
