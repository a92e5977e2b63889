"""Checkpoints as they lie on disk, whole and damaged."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import parse_local_safetensors_file_metadata as parse_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.files import INDEX
from stethoscope.checkpoints.open import open_checkpoint
from stethoscope.errors import CheckpointError


@pytest.fixture
def sharded(llama, tmp_path):
    llama(layers=2, hidden=16).save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    return tmp_path / "sharded"


@pytest.fixture
def single(llama, tmp_path):
    llama(layers=2, hidden=16).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def test_a_mapping_from_canonical_name_to_tensor(llama, sharded, single):
    weights = llama(layers=2, hidden=16).state_dict()
    for folder in (sharded, single):
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.layers, checkpoint.hidden_size, checkpoint.tied) == (2, 16, True)
        assert "lm_head.weight" not in checkpoint
        assert len(checkpoint) == len(weights) - 1
        for name in checkpoint:
            assert torch.equal(checkpoint[name], weights[checkpoint.entries[name].stored])
            pieces = b"".join(map(bytes, checkpoint.pieces(checkpoint.entries[name])))
            assert pieces == checkpoint[name].numpy().tobytes()
    with pytest.raises(CheckpointError, match="no tensor") as caught:
        checkpoint["layers.0.self_attn.q_porj.weight"]
    assert "q_proj" in str(caught.value.hint)


def reindex(change):
    def edit(folder) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def listed(file):
    return reindex(lambda index: index["weight_map"].update(x=file))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def link(path: Path, target: Path) -> None:
    """Put a link in a file's place."""
    path.rename(target)
    path.symlink_to(target)


def second(folder) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def repeat_tensor(folder) -> None:
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    save_file(load_file(two) | {name: load_file(one)[name]}, two)


def name_twice(folder) -> None:
    """One file, so that no index stands in the way."""
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    (folder / INDEX).unlink()
    save_file(tensors | {"language_model.model.norm.weight": torch.ones(16)}, folder / "model.safetensors")


FAULTS = {
    "two names of one tensor": (name_twice, "are the same tensor"),
    "truncated shard": (lambda f: truncate(second(f)), "truncated"),
    "zero-byte file": (lambda f: second(f).write_bytes(b""), "is empty"),
    "missing shard": (lambda f: second(f).unlink(), "is missing"),
    "the same tensor twice": (repeat_tensor, "the index does not list"),
    "index leads out": (listed("../x.safetensors"), "leads out"),
    "index is absolute": (listed("/x.safetensors"), "leads out"),
    "index names a pickle": (listed("x.bin"), "not a safetensors"),
    "index names a number": (listed(3), "not a name"),
    "index promises more": (lambda f: listed(second(f).name)(f), "lacks `x`"),
    "index is empty": (reindex(lambda index: index.clear()), "no `weight_map`"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index is missing": (lambda f: (f / INDEX).unlink(), "and no `model.safetensors.index.json`"),
    "shards beside one file": (lambda f: shutil.copy(second(f), f / "model.safetensors"), "several sets of weights"),
    "a config that names others": (
        lambda f: (f / "config.json").write_text(json.dumps({"transformers_weights": "x.safetensors"})),
        "transformers_weights",
    ),
    "a link out": (lambda f: link(second(f), f.parent / "elsewhere"), "leads to"),
    "a config that is a link out": (lambda f: link(f / "config.json", f.parent / "elsewhere"), "leads to"),
    "a side file that is a link out": (lambda f: (f / "tokenizer.json").symlink_to("/etc/hostname"), "leads to"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config wants more layers": (
        lambda f: (f / "config.json").write_text(json.dumps({"num_hidden_layers": 4})),
        "layer 3 has no tensor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, sharded):
    damage, message = FAULTS[fault]
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(sharded)
    assert caught.value.hint


def test_a_pickle_is_refused_and_not_opened(single):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(single / "exploded"),))

    (single / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        open_checkpoint(single)
    assert "save_pretrained" in str(caught.value.hint)
    assert not (single / "exploded").exists()


def test_a_lone_file_beside_a_pickle_is_not_what_transformers_loads(single):
    (single / "model.safetensors").rename(single / "other.safetensors")
    assert len(open_checkpoint(single)) == 20
    (single / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="several sets of weights"):
        open_checkpoint(single)


def test_links_inside_a_folder_are_followed(single):
    link(single / "model.safetensors", single / "weights")
    assert torch.equal(open_checkpoint(single)["norm.weight"], torch.ones(16))


def test_all_damage_at_once(sharded):
    for path in sorted(sharded.glob("*.safetensors"))[:3]:
        truncate(path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert len(caught.value.problems) == 3


def test_a_checkpoint_is_not_read_when_it_is_opened_and_may_shrink_after(single, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read"))
        checkpoint = open_checkpoint(single)
    os.truncate(single / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match="shorter while it was being read"):
        checkpoint["norm.weight"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.text(max_size=24) | st.integers() | st.none(), max_size=5))
def test_any_index_is_refused_or_stays_in_its_folder(sharded, weight_map):
    original = (sharded / INDEX).read_text()
    try:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError):
            open_checkpoint(sharded)
    finally:
        (sharded / INDEX).write_text(original)


COMMIT = "a" * 40


@pytest.fixture
def cache(single, tmp_path, monkeypatch):
    """The hub library's own cache layout: blobs, a snapshot of links to them, and a ref."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "models--someone--tiny"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in single.iterdir():
        (root / "blobs" / path.name).write_bytes(path.read_bytes())
        (root / "snapshots" / COMMIT / path.name).symlink_to(root / "blobs" / path.name)
    return root / "snapshots" / COMMIT


@pytest.mark.usefixtures("cache")
def test_a_hub_id_is_found_in_the_cache(single):
    for revision in (None, "main", COMMIT):
        checkpoint = open_checkpoint("someone/tiny", revision=revision)
        assert (checkpoint.source, checkpoint.revision) == ("someone/tiny", COMMIT)
        assert torch.equal(checkpoint["norm.weight"], open_checkpoint(single)["norm.weight"])


def test_headers_of_a_hub_id_without_its_weights(single, cache, monkeypatch):
    class Found:
        files_metadata = {"model.safetensors": parse_header(single / "model.safetensors")}  # noqa: RUF012

    (cache / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: Found)
    checkpoint = open_checkpoint("someone/tiny", headers_only=True)
    assert (checkpoint.layers, len(checkpoint)) == (2, 20)
    assert checkpoint.entries["norm.weight"].shape == (16,)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read("norm.weight")


@pytest.mark.parametrize("name", ["someone/absent", "absent", "no/such/folder", "./nowhere", "a b"])
def test_what_is_neither_folder_nor_in_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert caught.value.hint
    assert name in caught.value.message
