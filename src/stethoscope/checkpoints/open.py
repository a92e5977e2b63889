"""Open a checkpoint, and the change from it to a tuned one, whatever form that has.

    base = open_checkpoint("google/gemma-3-4b-it")              # or a folder
    change = open_task_vector(base, "tuned-or-adapter")

Opening reads config.json, the index and the headers, and says everything that is wrong with them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from stethoscope.checkpoints.adapter import CONFIG, AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint, config_value
from stethoscope.checkpoints.files import read_config, refuse_links, weight_files
from stethoscope.checkpoints.header import Entry, read_header
from stethoscope.checkpoints.hub import from_hub, headers_from_hub
from stethoscope.checkpoints.pair import match
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.errors import CheckpointError

# What makes a plain model of a quantised one, by quant_method
LOAD = "from_pretrained(NAME, quantization_config={}(dequantize=True))"
DEQUANTISE = {
    "fp8": LOAD.format("FineGrainedFP8Config"),
    "mxfp4": LOAD.format("Mxfp4Config"),
    "compressed-tensors": LOAD.format("CompressedTensorsConfig"),
    "bitsandbytes": "from_pretrained(NAME).dequantize()",
}
QUANTISED = (".qweight", ".weight_scale", ".weight_scale_inv", ".weight.absmax", ".weight_packed", ".SCB", "_blocks")


def open_checkpoint(path: str | Path, *, revision: str | None = None, headers_only: bool = False) -> Checkpoint:
    """Open a local folder or a hub id; reads headers only.

    Args:
        path: a folder with config.json and safetensors, or `owner/name` on the hub.
        revision: a branch, tag or commit of the hub repository.
        headers_only: do not download weights that are not in the cache; such a checkpoint can be looked at, not read.

    Raises:
        CheckpointError: with everything that is wrong with the checkpoint.
    """
    folder = Path(path)
    source = folder.resolve().name
    remote = not folder.exists()
    if not remote and revision:
        raise CheckpointError(f"the folder `{path}` has no revision `{revision}`", hint="only a hub's repository has")
    if remote:
        source = str(path)
        folder = from_hub(source, revision, weights=not headers_only)
        revision = folder.name  # the commit
    if not folder.is_dir():
        raise CheckpointError(f"`{path}` is not a folder", hint="give the folder that holds config.json")
    if holds_adapter(folder):
        raise CheckpointError(
            f"`{path}` is a PEFT adapter, not a checkpoint", hint="adapters can be `tuned`, not `base`"
        )
    refuse_links(folder)
    config = read_config(folder)
    if named := config.get("transformers_weights"):
        raise CheckpointError(
            f"config.json of `{path}` has Transformers load other weights, `transformers_weights: {named}`",
            hint="take that key out, or keep those weights alone under their usual names",
        )
    if remote and headers_only and not _has_weights(folder):
        entries = named_entries(source, headers_from_hub(source, revision))
    else:
        entries = named_entries(str(folder), *_read_headers(folder))
    checkpoint = Checkpoint(folder, config, entries, source=source, revision=revision)
    # layers beyond the config's are extra heads for multi-token prediction, not part of the stack
    checkpoint.layers = _count_layers(checkpoint)
    return checkpoint


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot of the hub holds all of its weights; a download may have been interrupted."""
    with suppress(CheckpointError):
        return bool(weight_files(folder))
    return False


def open_task_vector(
    base: Checkpoint, tuned: str | Path, *, revision: str | None = None, headers_only: bool = False
) -> TaskVector:
    """The change from ``base`` to a full checkpoint or a PEFT adapter (folder or hub id); reads headers only.

    Args:
        headers_only: as for `open_checkpoint`; an adapter is small and is fetched all the same.

    Raises:
        CheckpointError: with every tensor that is missing, extra or of another shape.
    """
    refuse_quantised(base)
    folder, remote = Path(tuned), not Path(tuned).exists()
    if remote:
        folder = from_hub(str(tuned), revision, weights=False)
        if (folder / CONFIG).is_file():
            folder = from_hub(str(tuned), revision)
    if holds_adapter(folder):
        refuse_links(folder)
        return AdapterTaskVector(base, folder, source=str(tuned) if remote else None)
    store = open_checkpoint(tuned, revision=revision, headers_only=headers_only)
    refuse_quantised(store)
    own, rows, notes = match(base, store)
    change = TaskVector(base, store, own)
    change.rows, change.notes = rows, notes
    return change


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter, whatever config.json lies beside it: by the weights that are there.

    Raises:
        CheckpointError: there are weights of both kinds.
    """
    if not (folder / CONFIG).is_file():
        return False
    names = {path.name for path in folder.iterdir()}
    adapter = {name for name in names if name.startswith("adapter_model.")}
    whole = {name for name in names - adapter if name.endswith(".safetensors") or name.startswith("pytorch_model")}
    if adapter and whole:
        raise CheckpointError(
            f"`{folder}` holds both an adapter and a whole model",
            problems=[f"`{name}`" for name in sorted(adapter | whole)],
            hint="put the adapter's files and the model's into folders of their own, and give the one that is meant",
        )
    return bool(adapter) or not (folder / "config.json").is_file()


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise for quantised weights, whose differences mean nothing."""
    about = config_value(checkpoint.config, "quantization_config", "compression_config")
    packed = [entry.stored for entry in checkpoint.entries.values() if entry.stored.endswith(QUANTISED)]
    if not about and not packed:
        return
    how = str(about.get("quant_method") or "") if isinstance(about, dict) else ""
    hint = "take the model that it was made from, which an adapter of it fits, too"
    if how in DEQUANTISE:
        # in its original format Transformers would write it quantised again
        save = "save_pretrained(OUT, save_original_format=False)"
        hint += f"; or `AutoModelForCausalLM.{DEQUANTISE[how]}` and `{save}`"
    raise CheckpointError(
        f"`{checkpoint.source}` is quantised{f' ({how})' if how else ''}: its weights cannot be subtracted or edited",
        problems=[f"for instance `{name}`" for name in packed[:1]],
        hint=hint,
    )


def _read_headers(folder: Path) -> tuple[dict[str, dict[str, Entry]], list[str]]:
    """The tensors of each weight file, and what is wrong with the files or differs from the index."""
    headers: dict[str, dict[str, Entry]] = {}
    problems: list[str] = []
    for file, promised in weight_files(folder).items():
        try:
            entries = headers[file] = read_header(folder / file)
        except CheckpointError as error:
            problems += [f"`{file}`: {problem}" for problem in error.problems or (error.message,)]
            continue
        if promised is not None:
            lacking, unlisted = sorted(promised - set(entries)), sorted(set(entries) - promised)
            problems += [f"`{file}` lacks `{name}`, which the index says it has" for name in lacking]
            # Transformers reads a whole shard whatever the index says, so an unlisted tensor is a second truth
            problems += [f"`{file}` has `{name}`, which the index does not list there" for name in unlisted]
    return headers, problems


def named_entries(
    source: str, headers: Mapping[str, Mapping[str, Entry]], found: Iterable[str] = ()
) -> dict[str, Entry]:
    """All files' tensors by canonical name; raises the problems ``found`` so far and those of names."""
    problems = list(found)
    entries: dict[str, Entry] = {}
    for file, inside in headers.items():
        for stored, entry in inside.items():
            other = entries.setdefault(entry.name, entry)
            if other is not entry and other.stored == stored:
                problems.append(f"`{stored}` is in `{other.file}` and in `{file}`")
            elif other is not entry:
                problems.append(f"`{other.stored}` and `{stored}` are the same tensor, `{entry.name}`")
    if problems:
        raise CheckpointError(
            f"the checkpoint `{source}` is damaged", problems=problems, hint="fetch the files named here again"
        )
    return entries


def _count_layers(checkpoint: Checkpoint) -> int:
    """The number of layers that the config says, all of which must be there."""
    present = {entry.layer for entry in checkpoint.entries.values() if entry.layer is not None}
    if not present:
        raise CheckpointError(
            f"no decoder layer is recognised in `{checkpoint.source}`",
            problems=[f"for instance `{name}`" for name in list(checkpoint.entries)[:3]],
            hint="the tables in stethoscope/checkpoints/names.py list the layouts that are known",
        )
    wanted = config_value(checkpoint.config, "num_hidden_layers", "n_layer", "num_layers")
    count = wanted if type(wanted) is int and wanted > 0 else checkpoint.layers
    if missing := sorted(set(range(min(count, 10_000))) - present):
        raise CheckpointError(
            f"the config of `{checkpoint.source}` says {count} layers, the files lack some",
            problems=[f"layer {layer} has no tensor" for layer in missing],
            hint="a shard may be missing",
        )
    return count
