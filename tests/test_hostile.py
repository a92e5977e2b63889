"""Damaged and lying files: none of a thousand seeded cases ends in anything but a result or an error for the user."""

import shutil

import pytest
from hostile import assert_no_tracebacks, damage
from world import make, save_adapter, save_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit


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
