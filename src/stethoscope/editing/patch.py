"""A patch: base XOR edited for the tensors that an edit changes. It turns either one into the other, exactly.

    apply_patch(Path("patch"), "base", Path("edited"))
    apply_patch(Path("patch"), "edited", Path("base-again"), undo=True)

Each tensor is checked against its hash before it is changed and after; a checkpoint that the patch was not made
for is refused and nothing is written.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from stethoscope.checkpoints.checkpoint import Checkpoint, fingerprint
from stethoscope.checkpoints.header import Entry, read_header
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import named_entries, open_checkpoint
from stethoscope.editing.manifest import copy_side_files, describe_tensor, read_manifest, write_generated
from stethoscope.editing.preview import output_problems
from stethoscope.editing.transfer import Output, Progress, copy_tensor, hash_tensors, output_folder, rewrite, send
from stethoscope.errors import CheckpointError

PATCH = "patch.safetensors"


def apply_patch(
    patch: Path, checkpoint: str | Path, out: Path, *, undo: bool = False, progress: Progress | None = None
) -> Path:
    """Write the edited checkpoint that a patch and its base make, or, to undo, the base of an edited one.

    Args:
        checkpoint: the base; to undo, what the patch made (or the same edit written whole).

    Raises:
        CheckpointError: ``checkpoint`` is not what the patch belongs to, or something cannot be read.
    """
    manifest = read_manifest(patch)
    if manifest["kind"] != "patch":
        raise CheckpointError(f"`{patch}` is an edit of kind `{manifest['kind']}`", hint="write it with kind `patch`")
    source = open_checkpoint(checkpoint)
    if problems := output_problems(out, source.path, patch):
        raise CheckpointError(
            "the output cannot be written", problems=problems, hint="choose another folder or remove it first"
        )
    # the patch's file is read like a checkpoint's: same checks, same errors
    entries = named_entries(str(patch), {PATCH: read_header(patch / PATCH)})
    differences = Checkpoint(patch, {}, entries, source=str(patch))
    records = {parse_name(stored).canonical: record for stored, record in manifest["tensors"].items()}
    was, becomes = ("edited_hash", "base_hash") if undo else ("base_hash", "edited_hash")
    if problems := _misfits(source, manifest, records, differences, was):
        made = "has made" if undo else "was made for"
        raise CheckpointError(
            f"`{source.source}` is not the checkpoint that the patch `{patch}` {made}",
            problems=problems,
            hint=f"it belongs to `{manifest['base']['source']}`",
        )

    def fill(entry: Entry, output: Output) -> dict[str, Any]:
        if entry.name not in records:
            return copy_tensor(source, entry, output)
        pieces = differences.pieces(differences.entries[entry.name])
        digest = send(exclusive_or(source, entry, pieces), output, entry.start)
        if digest != records[entry.name][becomes]:
            raise CheckpointError(f"`{entry.stored}` of the patch `{patch}` is damaged", hint="fetch the patch again")
        kept = {key: records[entry.name][key] for key in ("from", "coefficient", "base_hash")}
        return describe_tensor(entry, kept | {"hash": digest})

    with output_folder(out) as folder:
        tensors = rewrite(source, folder, fill, progress=progress)
        copy_side_files(source.path, folder, undo=undo)
        if not undo:
            base = {key: value for key, value in manifest["base"].items() if key != "rest_fingerprint"}
            write_generated(manifest | {"kind": "checkpoint", "base": base, "tensors": tensors}, source.config, folder)
    return out


def _misfits(
    source: Checkpoint, manifest: dict[str, Any], records: dict[str, Any], differences: Checkpoint, was: str
) -> list[str]:
    """Why a checkpoint is not what a patch was made for: names and shapes first, then hashes."""
    problems = []
    for name, record in records.items():
        entry, difference = source.entries.get(name), differences.entries.get(name)
        if difference is None:
            problems.append(f"the patch's file lacks `{name}`, which its manifest lists")
        elif entry is None:
            problems.append(f"it has no tensor `{name}`")
        elif (entry.dtype, list(entry.shape)) != (record["dtype"], record["shape"]):
            problems.append(
                f"`{entry.stored}` is {entry.dtype} {list(entry.shape)}, not {record['dtype']} {record['shape']}"
            )
        elif difference.nbytes != entry.nbytes:
            problems.append(f"the patch's file has `{name}` in another size")
    if problems:
        return problems
    rest = fingerprint(source, without=frozenset(records))
    if rest != manifest["base"]["rest_fingerprint"]:
        problems.append("the tensors that the patch leaves alone differ")
    entries = [source.entries[name] for name in records]
    found = hash_tensors(source, entries)
    return problems + [
        f"`{entry.stored}` has other contents"
        for entry, digest in zip(entries, found, strict=True)
        if digest != records[entry.name][was]
    ]


def exclusive_or(
    checkpoint: Checkpoint,
    entry: Entry,
    pieces: Iterable[memoryview],
    before: blake3 | None = None,
    after: blake3 | None = None,
) -> Iterator[memoryview]:
    """A tensor's stored bytes XOR others, piece by piece; ``before`` hashes the first, ``after`` the second."""
    offset = entry.start
    memory = np.empty(0, dtype=np.uint8)
    for piece in pieces:
        if memory.size < len(piece):
            memory = np.empty(len(piece), dtype=np.uint8)
        stored = memory[: len(piece)]
        checkpoint.read_into(entry, offset, stored.data)
        if before is not None:
            before.update(stored.data)
        if after is not None:
            after.update(piece)
        yield np.bitwise_xor(stored, np.frombuffer(piece, dtype=np.uint8), out=stored).data
        offset += len(piece)
