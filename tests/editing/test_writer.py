"""Edits on disk: which bytes they hold, that they repeat, and what a manifest proves."""

import json
import os
import re
import shutil
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from world import Kept, contents, flip, make, save_adapter, save_pair, stored

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import check_edit, preview
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

IDS = torch.tensor([[1, 5, 9, 13, 21, 3]])


@pytest.fixture
def adapter(tmp_path):
    """A base, and the task vector of an adapter of some of its modules."""
    save_adapter(make("llama tied", dtype=torch.float32), tmp_path, r=4, target_modules=["q_proj", "up_proj"])
    base = open_checkpoint(tmp_path / "base")
    return base, open_task_vector(base, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["checkpoint", "patch"])
def test_two_runs_are_the_same_files_as_the_preview_says(kind, base, change, tmp_path):
    plan = EditPlan.for_layers({0: 1.0, 1: 0.3})
    expected = preview(base, change, plan, tmp_path / "one", kind=kind)
    assert expected.problems == ()
    seen = []
    one = write_edit(base, change, plan, tmp_path / "one", kind=kind, progress=lambda *counts: seen.append(counts))
    two = write_edit(base, change, plan, tmp_path / "two", kind=kind, sync=False)
    assert contents(one.path) == contents(two.path)
    assert one.manifest == json.loads((two.path / "manifest.json").read_text())
    assert (expected.layers, expected.tensors) == (one.layers, one.tensors)
    if kind == "checkpoint":
        assert (expected.bytes_written, expected.bytes_read) == (one.bytes_written, one.bytes_read)
        assert seen[-1] == (base.nbytes, base.nbytes)
    else:
        assert expected.bytes_written == expected.bytes_changed < base.nbytes


def test_a_transform_may_leave_a_tensor_exact(base, change, tmp_path):
    edit = write_edit(base, change, EditPlan.for_layers([1], transform=Kept()), tmp_path / "edited")
    edited, q, up = stored(edit.path), "layers.1.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"
    assert torch.equal(edited["model." + q], change.edited(q, 1.0))
    assert torch.equal(edited["model." + up], change.edited(up, 0.5))
    assert edit.manifest["plan"]["transform"] == {"kind": "kept"}
    assert edit.manifest["mergekit"] is None


def test_a_full_checkpoint_takes_back_an_earlier_edit_and_that_is_said(base, change, pair, adapter, tmp_path, capsys):
    first = write_edit(base, change, EditPlan.for_layers([1], coefficient=-1.0), tmp_path / "first")
    assert not first.warnings
    options = ["--base", str(first.path), "--tuned", str(pair[1]), "--layers", "0-1", "--out", str(tmp_path / "two")]
    main(["edit", *options])
    assert "takes that edit back in layers 1;" in " ".join(capsys.readouterr().err.split())
    before, after, two = stored(first.path), stored(pair[1]), stored(tmp_path / "two")
    name = next(name for name in two if ".layers.1." in name and not torch.equal(before[name], after[name]))
    assert torch.equal(two[name], after[name])  # nothing of the first edit is left
    plan = EditPlan.for_layers([1])
    again = open_checkpoint(write_edit(*adapter, plan, tmp_path / "third").path)
    assert not preview(again, open_task_vector(again, tmp_path / "adapter"), plan, tmp_path / "fourth").warnings


def test_the_manifest_says_where_every_tensor_comes_from(base, change, pair, tmp_path):
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
    assert not verify(edit.path, base=open_checkpoint(pair[1])).ok
    with pytest.raises(CheckpointError, match="manifest"):
        verify(pair[0])


def third(folder):
    return sorted(folder.glob("*.safetensors"))[2]


def reread(folder, old, new):
    """Let a weight file's header say other things of the same bytes."""
    data = third(folder).read_bytes()
    third(folder).write_bytes(re.sub(old, new, data, count=1))


DAMAGES = {
    "a bit of a weight": (lambda f: flip(third(f)), "are not those that were written"),
    "another dtype": (lambda f: reread(f, rb'"BF16"', rb'"F16" '), "another dtype"),
    "another shape": (lambda f: reread(f, rb"\[(\d+),(\d+)\]", rb"[\2,\1]"), "another dtype or shape"),
    "a lost shard": (lambda f: third(f).unlink(), "cannot read"),
    "a cut shard": (lambda f: os.truncate(third(f), 100), "truncated|announces"),
    "another config": (lambda f: (f / "config.json").write_text("{}"), "`config.json` is not as it was written"),
    "no card": (lambda f: (f / "README.md").unlink(), "`README.md` is missing"),
    "more weights": (lambda f: (f / "more.safetensors").write_bytes(b""), "that the manifest does not know"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_sees_damage(damage, base, change, tmp_path):
    edit = write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "edited")
    act, message = DAMAGES[damage]
    act(edit.path)
    assert re.search(message, "\n".join(verify(edit.path).problems))


def test_what_lies_beside_the_weights(base, change, tmp_path):
    shutil.copytree(base.path, tmp_path / "base")
    for name in ("README.md", "tokenizer.json", "LICENSE", "pytorch_model.bin"):
        (tmp_path / "base" / name).write_text(name)
    own = open_checkpoint(tmp_path / "base")
    edit = write_edit(own, change, EditPlan.for_layers({0: 0.5, 1: 0.5}), tmp_path / "edited")
    assert (edit.path / "BASE_README.md").read_text() == "README.md"
    assert (edit.path / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (edit.path / "pytorch_model.bin").exists()
    assert set(edit.manifest["files"]) == {p.name for p in edit.path.iterdir()} - {*base.files, "manifest.json"}
    recipe = yaml.safe_load((edit.path / "mergekit.yaml").read_text())
    sources = [piece["sources"][1] for piece in recipe["slices"]]
    assert [source["layer_range"] for source in sources] == [[0, 2], [2, 3]]
    weights = [source["parameters"]["weight"] for source in sources]
    assert weights[0][-1] == {"value": 0.5}
    assert weights[1] == 0


def test_what_others_wrote_beside_base_and_tuned(tmp_path):
    """A manifest of another program, a config without a dtype, and one whose values are Markdown."""
    paths = save_pair("llama untied", tmp_path, dtype=torch.float32)
    (paths[0] / "manifest.json").write_text('{"name": "mine"}')
    for path, more in zip(paths, ({}, {"rms_norm_eps": "1\n\n# 2\n<img src=x> [here](http://x)"}), strict=True):
        config = json.loads((path / "config.json").read_text()) | more
        del config["dtype"]
        (path / "config.json").write_text(json.dumps(config))
    base = open_checkpoint(paths[0])
    edit = write_edit(base, open_task_vector(base, paths[1]), EditPlan.for_layers([1]), tmp_path / "edited")
    assert edit.manifest["schema"].startswith("stethoscope")
    assert yaml.safe_load((edit.path / "mergekit.yaml").read_text())["out_dtype"] == "float32"
    card = (edit.path / "README.md").read_text()
    assert "src=x" in card
    assert not re.search(r"<img|\[here\]|^# 2", card, re.MULTILINE)


@pytest.mark.parametrize(("coefficient", "value"), [(0.5, float("nan")), (1e39, 1.0)])
def test_an_adapter_that_is_no_numbers_is_not_written(coefficient, value, adapter, tmp_path):
    base, _ = adapter
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if ".1." in key and "lora_B" in key)][0, 0] = value
    save_file(tensors, path)
    plan = EditPlan.for_layers([1], coefficient=coefficient)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        write_edit(base, open_task_vector(base, path.parent), plan, tmp_path / "out", kind="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("coefficient", [1.0, -0.5])
@pytest.mark.parametrize("modules", ["all", "mlp"])
def test_an_adapter_of_some_layers(coefficient, modules, adapter, tmp_path):
    from peft import PeftModel

    base, change = adapter
    plan = EditPlan.for_layers([0, 2], coefficient=coefficient, modules=modules)
    small, again = (write_edit(base, change, plan, tmp_path / name, kind="adapter") for name in ("small", "again"))
    whole = write_edit(base, change, plan, tmp_path / "whole")
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
    assert set(open_task_vector(base, small.path).names) == {name for name in change.names if plan.coefficient(name)}


def test_every_problem_at_once(pair, tmp_path):
    (tmp_path / "out").mkdir()
    bad = save_pair("llama tied", tmp_path)[0]
    os.truncate(bad / "model.safetensors", 1000)
    found = check_edit(bad, tmp_path / "nowhere", EditPlan.for_layers([9]), tmp_path / "out")
    assert len(found.problems) == 3
    assert re.search(r"(?s)(announces|truncated).*nowhere.*exists", "\n".join(found.problems))
    fine = check_edit(pair[0], pair[1], EditPlan.for_layers([9, 1]), tmp_path / "out", kind="adapter")
    assert len(fine.problems) == 3


@pytest.mark.parametrize("where", [".", "inside", "..", "a file/out"])
def test_outputs_that_cannot_be(where, base, change, tmp_path):
    own = shutil.copytree(base.path, tmp_path / "models" / "base")
    (own / "a file").write_text("")
    before = contents(own)
    with pytest.raises(CheckpointError) as caught:
        write_edit(open_checkpoint(own), change, EditPlan(), own / where, overwrite=True)
    assert caught.value.hint
    assert contents(own) == before


def test_an_output_that_exists_is_kept_unless_told_otherwise(base, change, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        write_edit(base, change, EditPlan(), out)
    assert (out / "mine").exists()
    write_edit(base, change, EditPlan(), out, overwrite=True)
    assert not (out / "mine").exists()
    assert verify(out).ok
    assert list(tmp_path.iterdir()) == [out]
