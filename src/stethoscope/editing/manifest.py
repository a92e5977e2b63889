"""What lies beside the weights of an edit: manifest.json, the model card, the base's config and tokenizer.

The manifest says for every tensor where it came from and what its bytes hash to. It holds no time and no path,
so that two runs of the same edit are the same files.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from stethoscope.artifacts import canonical_json, sha256_bytes, write_json, write_text
from stethoscope.checkpoints.checkpoint import ALGORITHM, fingerprint
from stethoscope.checkpoints.files import read_json_object
from stethoscope.checkpoints.header import DTYPES, Entry
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.card import mergekit_recipe, model_card
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import CheckpointError

SCHEMA = "stethoscope.edit/1"
MANIFEST = "manifest.json"
CARD, BASE_CARD, RECIPE = "README.md", "BASE_README.md", "mergekit.yaml"
# weights in other formats would contradict the edited ones, and code is nobody's who has not read it
NOT_COPIED = frozenset(
    {".py", ".so", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}
)


def describe_tensor(entry: Entry, more: Mapping[str, Any], *, file: str | None = None) -> dict[str, Any]:
    """What a manifest says of a tensor."""
    return {"file": file or entry.file, "dtype": entry.dtype, "shape": list(entry.shape), **more}


def describe_edit(
    kind: str, task_vector: TaskVector, plan: EditPlan, chosen: Mapping[str, float], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of an edit, but for the files beside the weights."""
    base, tuned, described = task_vector.base, task_vector.store, plan.to_json()
    about_base = {"source": base.source, "revision": base.revision, "fingerprint": fingerprint(base)}
    if kind == "patch":
        about_base["rest_fingerprint"] = fingerprint(base, without=frozenset(chosen))
    return {
        "schema": SCHEMA,
        "stethoscope": version("sae-stethoscope"),
        "versions": {"torch": version("torch")},
        "kind": kind,
        "hash": ALGORITHM,
        "plan": described,
        "plan_hash": sha256_bytes(canonical_json(described).encode()),
        "layers": sorted({layer for name in chosen if (layer := base.entries[name].layer) is not None}),
        "base": about_base,
        "tuned": {"source": task_vector.source, "revision": tuned.revision, "fingerprint": fingerprint(tuned)},
        "notes": list(task_vector.notes),
        "mergekit": mergekit_recipe(task_vector, plan) if kind == "checkpoint" else None,
        "tensors": dict(tensors),
    }


def write_generated(manifest: dict[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """The card, the mergekit recipe if there is one, and last the manifest with the hash of every other file."""
    write_text(folder / CARD, model_card(manifest, config))
    if manifest.get("mergekit"):
        write_text(folder / RECIPE, manifest["mergekit"])
    weights = {record["file"] for record in manifest["tensors"].values()}
    others = sorted(path for path in folder.iterdir() if path.name not in weights)
    manifest["files"] = {path.name: blake3(path.read_bytes()).hexdigest() for path in others}
    write_json(folder / MANIFEST, manifest)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Put what an evaluation found into an edit's card and manifest; no weight is touched, and `verify` still passes.

    Args:
        results: from `Contrast.summary`.

    Raises:
        CheckpointError: the folder is no edit.
    """
    manifest = read_manifest(folder) | {"results": dict(results)}
    card = model_card(manifest, read_json_object(folder / "config.json", hint="write the edit again"))
    manifest["files"][CARD] = blake3(card.encode()).hexdigest()
    write_text(folder / CARD, card)
    write_json(folder / MANIFEST, manifest)


def copy_side_files(source: Path, folder: Path, *, undo: bool = False) -> None:
    """Config, tokenizer, index and whatever else is not weights; the base's card under another name, or back."""
    card, copy = (BASE_CARD, CARD) if undo else (CARD, BASE_CARD)
    for path in sorted(source.iterdir()):
        copied = path.is_file() and path.suffix not in NOT_COPIED and not path.name.startswith(".")
        if copied and path.name not in (MANIFEST, RECIPE, copy):
            shutil.copyfile(path, folder / (copy if path.name == card else path.name))


def known_files(manifest: Mapping[str, Any]) -> set[str]:
    """The files of an edit that its manifest knows, the manifest among them."""
    return {MANIFEST, *manifest["files"], *(record["file"] for record in manifest["tensors"].values())}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an edit.

    Raises:
        CheckpointError: there is none, it is of another schema, or it lacks what it must have.
    """
    hint = "give a folder that `stethoscope edit` has written"
    manifest = read_json_object(folder / MANIFEST, hint=hint)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"`{folder / MANIFEST}` is not of schema `{SCHEMA}`", hint=hint)
    wanted = {"stethoscope": str, "kind": str, "hash": str, "layers": list, "tensors": dict, "files": dict}
    parts = {"base": ["source"], "tuned": ["source"], "plan": ["transform"]}
    wanted |= dict.fromkeys(parts, dict)
    problems = [f"`{key}` is missing" for key, type_ in wanted.items() if not isinstance(manifest.get(key), type_)]
    if manifest.get("hash", ALGORITHM) != ALGORITHM:
        problems.append(f"it uses the unknown hash `{manifest['hash']}`")
    fields = {"file", "dtype", "shape", "hash"}
    if manifest.get("kind") == "patch":
        fields |= {"base_hash", "edited_hash", "from", "coefficient"}
        parts["base"].append("rest_fingerprint")
    if not problems:
        problems = [f"`{key}` lacks `{part}`" for key in parts for part in parts[key] if part not in manifest[key]]
    for name, record in manifest.get("tensors", {}).items() if not problems else ():
        if not isinstance(record, dict) or not fields <= set(record) or str(record["dtype"]) not in DTYPES:
            problems.append(f"the record of `{name}` is incomplete")
        elif Path(str(record["file"])).name != record["file"]:
            problems.append(f"the file of `{name}` leads out of the folder")
    if problems:
        raise CheckpointError(f"`{folder / MANIFEST}` is damaged", problems=problems, hint="write the edit again")
    return manifest
