"""Damaged and lying files: none of a thousand seeded cases ends in anything but a result or an error for the user."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from hostile import assert_no_tracebacks, chances, damage, damaged
from world import make, save_adapter, save_pair

from stethoscope.artifacts import Provenance, sha256_file
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.evaluation.harness import journal_line, read_journal
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.recipe import Recipe
from stethoscope.results.comparison import Claim
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.run import run_recipe


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A base in shards, its fine-tune, and an adapter for it."""
    folder = tmp_path_factory.mktemp("sound")
    save_pair("llama untied", folder, shard="8KB")
    save_adapter(make("llama untied"), folder / "lora", r=2, target_modules=["q_proj", "up_proj"])
    return folder


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


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_artefacts(kind, finished, tmp_path):
    def case(chance):
        path = shutil.copy(finished / kind.FILE, tmp_path / kind.FILE)
        damage(Path(path), chance)
        assert kind.load_if_current(tmp_path, Provenance()) is None
        kind.load(tmp_path)

    assert_no_tracebacks(kind.__name__, 20, case)


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
