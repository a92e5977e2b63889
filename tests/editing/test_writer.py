"""Edits on disk: which bytes they hold, that they repeat, and what a manifest proves."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_apply import Kept
from tiny_models import LAYOUTS, make, save_pair, stored
from transformers import AutoModelForCausalLM

from stethoscope.artifacts import sha256_file
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.cli import main
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import check_edit, preview
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import OutputKind, write_edit
from stethoscope.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

IDS = torch.tensor([[1, 5, 9, 13, 21, 3]])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Checkpoint, TaskVector]:
    model = make(LAYOUTS["llama tied"], dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(tmp_path / "base")
    return base, open_task_vector(base, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["checkpoint", "patch"])
def test_two_runs_are_the_same_files(kind: OutputKind, base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    plan = EditPlan.for_layers({0: 1.0, 1: 0.3})
    one = write_edit(base, change, plan, tmp_path / "one", kind=kind)
    two = write_edit(base, change, plan, tmp_path / "two", kind=kind, sync=False)
    assert contents(one.path) == contents(two.path)
    assert one.manifest == json.loads((two.path / "manifest.json").read_text())


def test_modules_of_one_kind(base: Checkpoint, change: TaskVector, pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_edit(base, change, EditPlan.for_layers([1], modules="attention"), tmp_path / "edited")
    before, after = stored(pair[0]), stored(pair[1])
    for name, tensor in stored(tmp_path / "edited").items():
        assert torch.equal(tensor, (after if ".layers.1.self_attn." in name else before)[name])


def test_a_transform(base: Checkpoint, change: TaskVector, pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit = write_edit(base, change, EditPlan.for_layers([1], transform=Kept()), tmp_path / "edited")
    edited, q, up = stored(edit.path), "layers.1.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"
    assert torch.equal(edited["model." + q], change.tuned(q))
    assert torch.equal(edited["model." + up], change.edited(up, 0.5))
    assert edit.manifest["plan"]["transform"] == {"kind": "kept"}
    assert edit.manifest["mergekit"] is None


def test_a_full_checkpoint_takes_back_an_earlier_edit_and_that_is_said(
    base: Checkpoint,
    change: TaskVector,
    pair: tuple[Path, Path],
    adapter: tuple[Checkpoint, TaskVector],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_edit(base, change, EditPlan.for_layers([1], coefficient=-1.0), tmp_path / "first")
    assert not first.warnings
    main(
        ["edit", "--base", str(first.path), "--tuned", str(pair[1]), "--layers", "0-1", "--out", str(tmp_path / "two")]
    )
    said = capsys.readouterr().err
    assert "takes that edit back in layers 1;" in " ".join(said.split())
    before, after, two = stored(first.path), stored(pair[1]), stored(tmp_path / "two")
    name = next(name for name in two if ".layers.1." in name and not torch.equal(before[name], after[name]))
    assert torch.equal(two[name], after[name])  # nothing of the first edit is left
    plan = EditPlan.for_layers([1])
    inner = write_edit(*adapter, plan, tmp_path / "third")
    again = open_checkpoint(inner.path)
    other = open_task_vector(again, adapter[1].store.path)
    assert not preview(again, other, plan, tmp_path / "fourth").warnings


def test_the_manifest_says_where_every_tensor_comes_from(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    edit = write_edit(base, change, EditPlan.for_layers({0: 1.0, 1: 0.3}), tmp_path / "edited")
    origins = {0: "tuned", 1: "computed", 2: "base", None: "base"}
    for entry in base.entries.values():
        record = edit.manifest["tensors"][entry.stored]
        assert record["from"] == origins[entry.layer]
        assert ("base_hash" in record) == (record["from"] == "computed")
    report = verify(edit.path, base=base)
    assert report.ok
    assert (report.tensors, report.untouched) == (len(base), sum(e.layer in (2, None) for e in base.entries.values()))
    assert edit.bytes_written == base.nbytes


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (lambda f: flip(sorted(f.glob("*.safetensors"))[2], -1), "are not those that were written"),
    "a lost shard": (lambda f: sorted(f.glob("*.safetensors"))[2].unlink(), "cannot read"),
    "a cut shard": (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[2], 100), "truncated|announces"),
    "another config": (lambda f: (f / "config.json").write_text("{}"), "`config.json` is not as it was written"),
    "no card": (lambda f: (f / "README.md").unlink(), "`README.md` is missing"),
    "more weights": (lambda f: (f / "more.safetensors").write_bytes(b""), "that the manifest does not know"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_sees_damage(damage: str, base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    edit = write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "edited")
    act, message = DAMAGES[damage]
    act(edit.path)
    report = verify(edit.path)
    assert not report.ok
    assert any(__import__("re").search(message, problem) for problem in report.problems)


def test_verify_knows_another_base(
    base: Checkpoint, change: TaskVector, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    edit = write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "edited")
    assert not verify(edit.path, base=open_checkpoint(pair[1])).ok
    with pytest.raises(CheckpointError, match="manifest"):
        verify(pair[0])


def test_what_lies_beside_the_weights(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base.path, tmp_path / "base")
    for name in ("README.md", "tokenizer.json", "LICENSE"):
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    own = open_checkpoint(tmp_path / "base")
    edit = write_edit(own, change, EditPlan.for_layers([1]), tmp_path / "edited")
    assert (edit.path / "BASE_README.md").read_text() == "README.md"
    assert (edit.path / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (edit.path / "pytorch_model.bin").exists()
    assert "layers changed | 1 |" in (edit.path / "README.md").read_text()
    assert set(edit.manifest["files"]) == {p.name for p in edit.path.iterdir()} - {*base.files, "manifest.json"}


def test_the_mergekit_recipe_names_layers_and_weights(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    import yaml

    edit = write_edit(base, change, EditPlan.for_layers({0: 0.5, 1: 0.5}), tmp_path / "edited")
    recipe = yaml.safe_load((edit.path / "mergekit.yaml").read_text())
    ranges = [piece["sources"][1]["layer_range"] for piece in recipe["slices"]]
    weights = [piece["sources"][1]["parameters"]["weight"] for piece in recipe["slices"]]
    assert ranges == [[0, 2], [2, 3]]
    assert weights[0][-1] == {"value": 0.5}
    assert weights[1] == 0


def test_progress_counts_to_the_end(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_edit(base, change, EditPlan(), tmp_path / "edited", progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (base.nbytes, base.nbytes)


def test_an_adapter_as_checkpoint_is_the_merged_model(adapter: tuple[Checkpoint, TaskVector], tmp_path: Path) -> None:
    base, change = adapter
    edit = write_edit(base, change, EditPlan.everything(), tmp_path / "edited")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base.path)
        merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    edited = AutoModelForCausalLM.from_pretrained(edit.path)
    torch.testing.assert_close(edited(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(edited.get_parameter("model." + name), change.tuned(name)) for name in change.names)


@pytest.mark.parametrize("coefficient", [1.0, -0.5])
@pytest.mark.parametrize("modules", ["all", "mlp"])
def test_an_adapter_of_some_layers(
    coefficient: float, modules: str, adapter: tuple[Checkpoint, TaskVector], tmp_path: Path
) -> None:
    base, change = adapter
    plan = EditPlan.for_layers([0, 2], coefficient=coefficient, modules=modules)  # type: ignore[arg-type]
    small = write_edit(base, change, plan, tmp_path / "small", kind="adapter")
    whole = write_edit(base, change, plan, tmp_path / "whole")
    again = write_edit(base, change, plan, tmp_path / "again", kind="adapter")
    assert contents(small.path) == contents(again.path)
    assert verify(small.path).ok
    model = AutoModelForCausalLM.from_pretrained(base.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(model, small.path)  # would warn of missing keys
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(small.manifest["tensors"]) // 2
    expected = AutoModelForCausalLM.from_pretrained(whole.path)(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    # and as a task vector it is the plan
    narrowed = open_task_vector(base, small.path)
    assert set(narrowed.names) == {name for name in change.names if plan.coefficient(name)}


def test_a_preview_says_what_will_happen(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    plan = EditPlan.for_layers({0: 1.0, 1: 0.3})
    expected = preview(base, change, plan, tmp_path / "edited")
    assert expected.problems == ()
    edit = write_edit(base, change, plan, tmp_path / "edited")
    assert (expected.layers, expected.tensors) == (edit.layers, edit.tensors)
    assert (expected.bytes_written, expected.bytes_read) == (edit.bytes_written, edit.bytes_read)
    small = preview(base, change, plan, tmp_path / "patch", kind="patch")
    assert small.bytes_written == small.bytes_changed < expected.bytes_written


def test_every_problem_at_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    bad = save_pair(LAYOUTS["llama tied"], tmp_path)[0]
    os.truncate(bad / "model.safetensors", 1000)
    found = check_edit(bad, tmp_path / "nowhere", EditPlan.for_layers([9]), tmp_path / "out")
    assert [
        word
        for word in ("announces|truncated", "nowhere", "exists")
        if __import__("re").search(word, str(found.problems))
    ]
    assert len(found.problems) == 3
    fine = check_edit(pair[0], pair[1], EditPlan.for_layers([9, 1]), tmp_path / "out", kind="adapter")
    assert len(fine.problems) == 3


@pytest.mark.parametrize("where", [".", "inside", "..", "a file/out"])
def test_outputs_that_cannot_be(where: str, base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "models" / "base"
    shutil.copytree(base.path, own)
    (own / "a file").write_text("")
    before = contents(own)
    with pytest.raises(CheckpointError) as caught:
        write_edit(open_checkpoint(own), change, EditPlan(), own / where, overwrite=True)
    assert caught.value.hint
    assert contents(own) == before


def test_an_output_that_exists_is_kept_unless_told_otherwise(
    base: Checkpoint, change: TaskVector, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        write_edit(base, change, EditPlan(), tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    write_edit(base, change, EditPlan(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert verify(tmp_path / "out").ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
