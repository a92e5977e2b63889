"""Patches: there and back again to the bit, and for no other base."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import contents, flip, stored

from stethoscope.editing.patch import apply_patch
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

PLAN = replace(EditPlan.for_layers({0: 1.0, 1: 0.3}), outside={"head": 1.0})


@pytest.fixture
def patch(base, change, tmp_path):
    return write_edit(base, change, PLAN, tmp_path / "patch", kind="patch").path


def test_there_and_back(base, change, patch, tmp_path):
    edited = apply_patch(patch, base.path, tmp_path / "edited")
    whole = write_edit(base, change, PLAN, tmp_path / "whole").path
    for file in base.files:
        assert (edited / file).read_bytes() == (whole / file).read_bytes()
    assert verify(edited, base=base).ok
    assert verify(patch).ok
    assert verify(patch, base=base).ok
    for number, source in enumerate((edited, whole)):
        back = apply_patch(patch, source, tmp_path / f"back {number}", undo=True)
        assert contents(back) == contents(base.path)
    selected = sum(e.nbytes for e in base.entries.values() if e.layer in (0, 1) or e.kind == "head")
    assert selected < (patch / "patch.safetensors").stat().st_size < selected + 6000  # as large as what it changes


def test_the_wrong_way_round_is_refused(base, patch, tmp_path):
    edited = apply_patch(patch, base.path, tmp_path / "edited")
    with pytest.raises(CheckpointError, match="was made for"):
        apply_patch(patch, edited, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="has made"):
        apply_patch(patch, base.path, tmp_path / "twice", undo=True)
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_base_that_differs_in_one_bit(name, base, patch, tmp_path):
    """Also where the patch changes nothing: small tensors are in the fingerprint whole."""
    other = shutil.copytree(base.path, tmp_path / "other")
    entry = next(e for e in base.entries.values() if e.stored == name)
    flip(other / entry.file, entry.start + 7)
    with pytest.raises(CheckpointError, match="is not the checkpoint"):
        apply_patch(patch, other, tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


def test_a_damaged_patch(base, patch, tmp_path):
    flip(patch / "patch.safetensors", -3)
    assert not verify(patch).ok
    with pytest.raises(CheckpointError, match="is damaged"):
        apply_patch(patch, base.path, tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest.pop("layers"),
        lambda manifest: manifest.pop("stethoscope"),
        lambda manifest: manifest["base"].pop("source"),
        lambda manifest: manifest["plan"].pop("transform"),
        lambda manifest: manifest.update(base=5),
        lambda manifest: next(iter(manifest["tensors"].values())).update(dtype="F17"),
    ],
)
def test_a_damaged_manifest(damage, base, patch, tmp_path):
    manifest = json.loads((patch / "manifest.json").read_text())
    damage(manifest)
    (patch / "manifest.json").write_text(json.dumps(manifest))
    for act in (verify, lambda folder: apply_patch(folder, base.path, tmp_path / "edited")):
        with pytest.raises(CheckpointError, match="is damaged"):
            act(patch)
    assert not (tmp_path / "edited").exists()


def test_an_edited_model_saved_in_another_layout_can_still_be_undone(base, patch, tmp_path):
    edited = apply_patch(patch, base.path, tmp_path / "edited")
    (tmp_path / "single").mkdir()
    save_file(stored(edited), tmp_path / "single" / "model.safetensors")
    shutil.copy(edited / "config.json", tmp_path / "single")
    back = load_file(apply_patch(patch, tmp_path / "single", tmp_path / "back", undo=True) / "model.safetensors")
    assert all(torch.equal(tensor, back[name]) for name, tensor in stored(base.path).items())


def test_what_is_not_a_patch(base, change, tmp_path):
    edit = write_edit(base, change, PLAN, tmp_path / "edited")
    with pytest.raises(CheckpointError, match="kind `checkpoint`"):
        apply_patch(edit.path, base.path, tmp_path / "back", undo=True)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        apply_patch(base.path, edit.path, tmp_path / "back", undo=True)
    with pytest.raises(CheckpointError, match="changes nothing"):
        write_edit(base, change, EditPlan(), tmp_path / "nothing", kind="patch")
