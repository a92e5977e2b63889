"""A base with the vocabulary of its fine-tune: what an edit is made of that shall speak the fine-tune's new tokens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from jaxtyping import Shaped

from stethoscope.artifacts import write_json
from stethoscope.checkpoints.checkpoint import Checkpoint, config_value, torch_dtype
from stethoscope.checkpoints.files import INDEX, read_json_object, refuse_links
from stethoscope.checkpoints.header import Entry, build_header
from stethoscope.checkpoints.task_vector import TaskVector, bytes_finite, not_finite
from stethoscope.editing.manifest import NOT_COPIED, copy_side_files
from stethoscope.editing.preview import output_problems
from stethoscope.editing.transfer import Progress, output_folder, tensor_bytes
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

TOKENIZER = ("token", "vocab", "merges", "chat_template", "special", "added")  # how files begin
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def extend_vocabulary(
    base: Checkpoint, task_vector: TaskVector, out: Path, *, progress: Progress | None = None
) -> dict[str, int]:
    """Write the base with its fine-tune's further rows, tokenizer and special tokens; all else is as it was.

    An edit of that base has the fine-tune's vocabulary, and its plan may ask for embeddings.

    Args:
        out: a new folder.
        progress: called with bytes done and in all.

    Returns:
        the vocabulary's tensors and how many rows each has now.

    Raises:
        CheckpointError: the fine-tune has no further rows, no tokenizer, or computes its rows, as LoRA does.
    """
    store = task_vector.store
    refuse_links(store.path)
    rows = {name: n for name, n in task_vector.rows.items() if n > base.entries[name].shape[0]}
    files = [
        path
        for path in sorted(store.path.iterdir())
        if path.name.startswith((*TOKENIZER, "generation_config")) and path.suffix not in NOT_COPIED and path.is_file()
    ]
    problems = [] if rows else [f"`{task_vector.source}` has no more rows than `{base.source}` in its vocabulary"]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt") for path in files):
        problems.append(f"`{task_vector.source}` has no tokenizer")
    problems += [
        f"`{base.entries[name].stored}` of the adapter is computed from the base's, which lacks the rows"
        for name in rows
        if name not in task_vector.own
    ]
    problems += output_problems(out, base.path, store.path)
    if problems:
        raise CheckpointError(
            "the base cannot take the fine-tune's vocabulary",
            problems=problems,
            hint="merge an adapter with PEFT and give the merged checkpoint, with its tokenizer",
        )
    done = 0
    with output_folder(out) as folder:
        copy_side_files(base.path, folder)
        for path in folder.iterdir():
            if path.name.startswith(TOKENIZER):  # the base's own; the fine-tune's may have other files
                path.unlink()
        for path in files:
            shutil.copyfile(path, folder / path.name)
        for file in base.files:
            inside = [entry for entry in base.entries.values() if entry.file == file]
            shapes = {e.stored: (e.dtype, (rows[e.name], *e.shape[1:]) if e.name in rows else e.shape) for e in inside}
            with (folder / file).open("xb") as output:
                output.write(build_header(shapes))
                for entry in inside:
                    for piece in base.pieces(entry):
                        output.write(piece)
                    if entry.name in rows:
                        output.write(tensor_bytes(_further_rows(task_vector, entry, rows[entry.name])))
                    done += entry.nbytes
                    if progress:
                        progress(done, base.nbytes)
        _write_configs(base, store, rows, folder)
    return rows


def _further_rows(task_vector: TaskVector, like: Entry, rows: int) -> Shaped[torch.Tensor, "..."]:
    """What tuned's tensor has behind the base's rows, in the base's dtype."""
    store = task_vector.store
    entry = store.entries[task_vector.own[like.name]]  # cut to the base's rows: the others follow
    count = rows - like.shape[0]
    data = bytearray(entry.nbytes // entry.shape[0] * count)
    store.read_into(entry, entry.end, memoryview(data))
    if not bytes_finite(memoryview(data), entry.dtype):
        raise not_finite(like.name, task_vector.source)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).to(torch_dtype(like.dtype))


def _write_configs(base: Checkpoint, store: Checkpoint, rows: Mapping[str, int], folder: Path) -> None:
    """The config and the index with the new sizes, and the special tokens of a full fine-tune's config."""
    config = deepcopy(base.config)
    text = config.get("text_config")
    tables = [table for table in (config, text) if isinstance(table, dict)]
    new = {key: value for key in IDS if (value := config_value(store.config, key)) is not None}
    for key, value in {**new, "vocab_size": max(rows.values())}.items():
        for table in [one for one in tables if key in one] or tables[-1:]:
            table[key] = value
    write_json(folder / "config.json", config)
    if (folder / INDEX).is_file():
        index = read_json_object(folder / INDEX, hint="fetch it again")
        added = sum(
            base.entries[name].nbytes // base.entries[name].shape[0] * (count - base.entries[name].shape[0])
            for name, count in rows.items()
        )
        index["metadata"] = {**index.get("metadata", {}), "total_size": base.nbytes + added}
        write_json(folder / INDEX, index)
