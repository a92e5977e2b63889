"""Damaged and lying files: none of a thousand seeded cases ends in anything but a result or an error for the user."""

import json
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hostile import ODD, assert_no_tracebacks, chances, contradicting, damage, damaged, odd, outcome
from safetensors.torch import load_file, save_file
from world import changed, make, save_adapter, save_pair

from stethoscope.artifacts import Provenance, file_name, sha256_file, write_text
from stethoscope.check import check_recipe
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.manifest import write_results
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.evaluation.harness import journal_line, read_journal
from stethoscope.evaluation.harness_logs import write_logs
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.recipe import Recipe
from stethoscope.report import render_report
from stethoscope.results.comparison import Claim
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.run import run_recipe
from stethoscope.stages import STAGES


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A base in shards, its fine-tune, and an adapter for it."""
    folder = tmp_path_factory.mktemp("sound")
    save_pair("llama untied", folder, shard="8KB")
    save_adapter(make("llama untied"), folder / "lora", r=2, target_modules=["q_proj", "up_proj"])
    return folder


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi")
)
TABLES = "b: &b {x: 1}\n" + "".join(f"c{n}: &c{n} {{<<: [*b, *b], x: *b}}\nb: &b *c{n}\n" for n in range(30))
WRITTEN = [
    BOMB,
    TABLES,
    "[" * 5000,
    "{a: " * 3000,
    "seed: 2026-13-45",
    "base: ~nobody-at-all/x",
    'base: "\\0"',
    "\0",
    "a: &a [*a]",
    "? [a]\n: b",
    "!!bool maybe",
    "!!timestamp x",
    "!!python/object:os.system x",
    "a: 0b_",
    "a: *nope",
    "a: " + "9" * 5000,
    "a: .inf\nseed: .nan",
    "x: " * 200,
    "x" * 200_000,
    "{<<: 3}",
    "1: 2\nnull: 3",
    "--- a\n--- b",
    "evaluate: {tasks: [../../x], data: ~nobody/x, include_path: " + "x" * 5000 + "}",
    "%YAML 9.9\n---\na",
    "calibrate: {coefficients: [.nan]}\ntradeoff: {strengths: [.inf]}\ndiagnose: {sae_memory_gb: .inf}",
]


def test_recipes(world, tmp_path):
    whole = yaml.safe_load((world / "recipe.yaml").read_text()) | {
        "controls": {"other": {"dataset": "data/code.jsonl"}},
        "calibrate": {side: {"dataset": f"data/calibration-{side}.jsonl"} for side in ("target", "control")},
        "edit": {"filter": 1.5, "protect": {"code": {"dataset": "data/code.jsonl", "weight": 2.0}}},
        "diagnose": {"block_size": 4, "sae_memory_gb": 1.0},
    }
    path = world / "hostile.yaml"  # paths in it are relative to itself

    def check(changes=()):
        check_recipe(Recipe.from_yaml(path, changes), tmp_path / "run", offline=True)

    def case(chance):
        path.write_bytes(odd(whole, chance).encode() if chance.random() < 0.8 else damaged(safe, chance))
        check()

    safe = yaml.safe_dump(whole).encode()
    try:
        assert_no_tracebacks("recipes", 120, case)
        for text in WRITTEN:
            start = time.monotonic()
            key, _, value = text.partition(": ")
            rest = {name: one for name, one in whole.items() if name != key}
            for written in (text, f"{yaml.safe_dump(rest)}\n{text}"):
                path.write_text(written, encoding="utf-8")
                outcome(check)
            path.write_bytes(safe)
            outcome(lambda key=key, value=value: check([f"{key}={value}"]))
            assert time.monotonic() - start < 30, text[:80]
    finally:
        path.unlink()


@pytest.mark.parametrize("text", [BOMB, "[" * 5000, "a: &a [*a]", "a: 2026-13-45", "x: " + "y" * 200_000])
def test_a_yaml_file_beyond_the_limits_is_refused(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="not YAML that can be used"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("file", ["model-*.safetensors", "model.safetensors.index.json", "config.json", "adapter_*"])
def test_checkpoints_and_adapters(file, sound, tmp_path):
    def case(chance):
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        case = shutil.copytree(sound, tmp_path / "case")
        damage(chance.choice(sorted(case.rglob(file))), chance)
        base, tuned = ("lora/base", "lora/adapter") if "adapter" in file else ("base", "tuned")
        opened = open_checkpoint(case / base)
        plan = EditPlan.for_layers([0, 1], coefficient=chance.choice([1.0, 0.5]))
        write_edit(opened, open_task_vector(opened, case / tuned), plan, case / "out")

    assert_no_tracebacks(file, 120, case)


def test_journals(tmp_path):
    path = tmp_path / "journal.jsonl"
    entries = [{"key": f"k{i}", "response": f"answer \u2028 {i}", "tokens": i, "truncated": i > 3} for i in range(6)]
    whole = "".join(map(journal_line, entries)).encode()
    path.write_bytes(whole)
    sound = read_journal(path)
    assert len(sound) == 6

    def case(chance):
        path.write_bytes(damaged(whole, chance))
        found = read_journal(path)
        assert found.items() <= sound.items()
        assert read_journal(path) == found

    assert_no_tracebacks("journals", 150, case)


def test_parts(finished, tmp_path):
    stored = next((finished / "parts").glob("*.parquet"))
    sound, path = Outcomes.load(stored), tmp_path / "part.parquet"

    def case(chance):
        path.write_bytes(damaged(stored.read_bytes(), chance))
        pd.testing.assert_frame_equal(Outcomes.load(path).frame, sound.frame)

    assert_no_tracebacks("parts", 100, case)


ARTIFACTS = [Diagnosis, Evidence, Selection, Geometry, Edits, Claim]


def test_every_name_becomes_a_file_of_its_own_in_its_folder(world, finished, tmp_path):
    names = [name for name in ODD if isinstance(name, str)] + ["a/b", "a-b", "..", ".", "é" * 400, "general", "a.b"]
    found = [file_name(name) for name in names]
    assert len({name.lower() for name in found}) == len(set(names))
    assert found[-2:] == ["general", "a.b"]
    for name in found:
        write_text(tmp_path / "inside" / name, "")
        assert (tmp_path / "inside" / name).resolve().parent == tmp_path / "inside"
    outcomes = Outcomes.load(finished / "outcomes.parquet")
    frame = outcomes.frame.assign(arm="../../esc", task="../" + outcomes.frame["task"])
    first = frame.drop_duplicates(["task", "item"])
    written = write_logs(Outcomes(frame=first), tmp_path / "logs" / "deep")
    assert all(path.is_relative_to(tmp_path / "logs" / "deep") and path.exists() for path in written)
    hostile = {"controls": {"../../esc": {"dataset": "data/code.jsonl"}}, "validation": {"control": "../../esc"}}
    recipe = Recipe.model_validate(yaml.safe_load((world / "recipe.yaml").read_text()) | hostile)
    (stage,) = (stage for stage in STAGES if stage.name == "validate")
    assert all(".." not in name for name in stage.wrote(recipe))


def test_a_card_shows_names_from_elsewhere_as_text(sound, tmp_path):
    name = "x`|<script>alert(1)</script>[y](https://z) ``` end " + "long " * 20
    base = shutil.copytree(sound / "base", tmp_path / name.replace("/", ":"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["A|b\n\n# c`<img src=x>[y](z)"]}))
    opened = open_checkpoint(base)
    write_edit(opened, open_task_vector(opened, sound / "tuned"), EditPlan.for_layers([1]), tmp_path / "out")
    scores = {"items": 3, "baseline": 0.5, "accuracy": 0.6, "p_adjusted": None}
    row = {"task": name, "metric": name, "scale": "", "shown": ["50.0", "60.0", "+10.0"], **scores}
    write_results(tmp_path / "out", {"verdict": f"`{name}` gains", "baseline": name, "tasks": [row]})
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    text, fence, _ = body.partition("```yaml\n")
    assert fence
    assert not re.search(r"<\w|\[\w*\]\(|^# c", text, re.MULTILINE)
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables) == {3, 8}
    assert re.findall(r"^ {0,3}```", body, re.MULTILINE) == ["```", "```"]


def test_a_message_can_be_printed_whatever_the_file_holds(tmp_path):
    (tmp_path / Claim.FILE).write_text('{"schema_version": "\\ud83d"}')
    with pytest.raises(StethoscopeError) as caught:
        Claim.load(tmp_path)
    assert "\\ud83d" in str(caught.value).encode("utf-8").decode()


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_artefacts(kind, finished, tmp_path):
    def case(chance):
        path = shutil.copy(finished / kind.FILE, tmp_path / kind.FILE)
        damage(Path(path), chance)
        assert kind.load_if_current(tmp_path, Provenance()) is None
        kind.load(tmp_path)

    assert_no_tracebacks(kind.__name__, 20, case)


def test_a_report_of_results_that_contradict_each_other(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    files = [path for path in sorted(finished.glob("*.json")) if path.name != "seen.json"]

    def case(chance):
        path = chance.choice(files)
        (run / path.name).write_text(contradicting(json.loads(path.read_text()), chance))
        try:
            assert render_report(run).stat().st_size > 10_000
        finally:
            shutil.copy(path, run / path.name)

    assert_no_tracebacks("contradictions", 25, case)


def test_a_finished_run_of_which_much_is_damaged_is_made_whole_again(world, finished, tmp_path, caplog):
    files = sorted(path for path in finished.rglob("*") if path.is_file() and path.suffix not in (".html", ".npy"))
    for number, chance in enumerate(chances("runs", 3)):
        run = shutil.copytree(finished, tmp_path / str(number))
        for path in chance.sample(files, 8):
            damage(run / path.relative_to(finished), chance)
        shutil.rmtree(run / "losses" / "general" / "tuned")
        run_recipe(Recipe.from_yaml(world / "recipe.yaml"), run)
        for name in ("comparison.json", "edits.json", "statistics.safetensors", "edited/model.safetensors"):
            assert sha256_file(run / name) == sha256_file(finished / name), (number, name)
        assert verify(run / "edited").ok
    assert "made again" in caplog.text


@pytest.mark.parametrize(
    ("model", "file", "value", "said"),
    [
        (
            "tuned",
            "adapter_model.safetensors",
            float("nan"),
            r"layers\.2\.mlp\.up_proj\S*` in `\S*/tuned/adapter_model",
        ),
        ("base", "model.safetensors", float("inf"), r"layers\.2\.mlp\.up_proj\S*` in `\S*/base/model"),
        ("base", "model.safetensors", 3e38, "overflows in layer 2"),
    ],
)
def test_weights_that_are_no_numbers_are_named_before_listening(model, file, value, said, world, tmp_path):
    folder = shutil.copytree(world / model, tmp_path / model)
    tensors = load_file(folder / file)
    for name in tensors:
        if "layers.2.mlp.up_proj" in name:
            tensors[name][1:, 1:] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})
    recipe = Recipe.from_yaml(changed(world, tmp_path, **{model: str(folder)}))
    with pytest.raises(StethoscopeError, match=said):
        run_recipe(recipe, tmp_path / "run", until="diagnose")
    assert not (tmp_path / "run" / "diagnosis.json").exists()
