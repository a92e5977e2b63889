"""A checkpoint as it lies on disk: a lazy mapping from canonical name to tensor, headers only until one is read.

    base = open_checkpoint("google/gemma-3-4b-it")     # or a folder
    base["layers.12.self_attn.q_proj.weight"]

Opening reads config.json, the index and the headers, and says everything that is wrong with them at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Shaped

from stethoscope.checkpoints.files import read_json_object, weight_files
from stethoscope.checkpoints.header import Slot, read_header
from stethoscope.checkpoints.hub import from_hub, headers_from_hub
from stethoscope.checkpoints.names import Kind, parse_name
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# What a task vector can be computed in. 8-bit floats come with scales in other tensors, so they are not among them.
ARITHMETIC = frozenset({"F16", "BF16", "F32", "F64"})


def torch_dtype(stored: str) -> torch.dtype:
    """PyTorch's dtype for a stored one that has a tensor form."""
    found: torch.dtype = getattr(torch, TORCH_NAMES[stored])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint: its names, what it is, and where its bytes lie in which file."""

    name: str
    stored: str
    layer: int | None
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix of its last dimension: what chunked reading counts in."""
        size = 1
        for extent in self.shape[:-1]:
            size *= extent
        return size

    @property
    def columns(self) -> int:
        """Elements per row: the last dimension, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1


class Checkpoint:
    """A model's weights on disk: a mapping from canonical name to tensor that holds no file open.

    Opened with `open_checkpoint`.

    Attributes:
        path: the folder.
        source: what the user called it: a hub id, or the folder's name.
        config: config.json.
        entries: canonical name -> Entry, in the order of files and bytes.
        files: the weight files' names, in order.
        layers: the number of decoder blocks.
        hidden_size: the width of the residual stream.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], entries: dict[str, Entry], *, source: str, revision: str | None
    ) -> None:
        self.path = path
        self.source = source
        self.revision = revision
        self.config = config
        self.entries = entries
        self.files = tuple(sorted({entry.file for entry in entries.values()}))
        self.layers = 1 + max((e.layer for e in entries.values() if e.layer is not None), default=-1)
        self.hidden_size = int(config_value(config, "hidden_size", "n_embd", "d_model") or 0)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def keys(self) -> KeysView[str]:
        """The canonical names, in the order of files and bytes."""
        return self.entries.keys()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.layers} layers)"

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: nothing stored for it, or the config says so."""
        return "lm_head.weight" not in self.entries or bool(config_value(self.config, "tie_word_embeddings"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """The entry of a canonical name.

        Raises:
            CheckpointError: there is no such tensor; the hint names the nearest.
        """
        try:
            return self.entries[name]
        except KeyError:
            from difflib import get_close_matches

            near = get_close_matches(name, self.entries, n=1)
            raise CheckpointError(
                f"`{self.source}` has no tensor `{name}`", hint=f"did you mean `{near[0]}`?" if near else None
            ) from None

    def read(self, name: str) -> Shaped[torch.Tensor, "..."]:
        """The tensor in its stored dtype and shape, in memory of its own."""
        entry = self.entry(name)
        return self.read_rows(name, 0, entry.rows).reshape(entry.shape)

    def read_rows(
        self, name: str, start: int, stop: int, *, buffer: torch.Tensor | None = None
    ) -> Shaped[torch.Tensor, "rows columns"]:
        """Rows ``start`` to ``stop`` of the tensor seen as a matrix of its last dimension; a scalar is 1 by 1.

        Args:
            buffer: bytes (uint8) to read into and to return a view of; new memory by default.
        """
        entry = self.entry(name)
        if entry.dtype not in TORCH_NAMES:
            raise CheckpointError(
                f"`{entry.stored}` has the packed dtype `{entry.dtype}`, which has no tensor form",
                hint="use an unquantised checkpoint of this model",
            )
        row = entry.nbytes // entry.rows if entry.rows else 0
        size = (stop - start) * row
        data = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer[:size]
        self.read_into(entry, entry.start + start * row, data.numpy().data)
        return data.view(torch_dtype(entry.dtype)).view(stop - start, entry.columns)

    def read_bytes(self, name: str) -> bytes:
        """The tensor's bytes as stored."""
        entry = self.entry(name)
        data = bytearray(entry.nbytes)
        self.read_into(entry, entry.start, memoryview(data))
        return bytes(data)

    def read_into(self, entry: Entry, offset: int, view: memoryview) -> None:
        """Fill ``view`` from the entry's file, ``offset`` counted from the file's first byte."""
        path = self.path / entry.file
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                read_exactly(handle, view, offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise CheckpointError(f"cannot read `{entry.stored}` from `{path}`: {error.strerror or error}") from error


def read_exactly(handle: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset``; a file that ends first has been changed since its header was read."""
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise OSError(None, "the file became shorter while it was being read")
        done += count


def open_checkpoint(
    path: str | Path, *, revision: str | None = None, cache: Path | None = None, headers_only: bool = False
) -> Checkpoint:
    """Open a local folder or a hub id; reads headers only.

    Args:
        path: a folder with config.json and safetensors, or `owner/name` on the hub.
        revision: a branch, tag or commit of the hub repository.
        cache: the hub's cache folder; the library's own by default.
        headers_only: do not download weights that are not in the cache; such a checkpoint can be looked at, not read.

    Raises:
        CheckpointError: with everything that is wrong with the checkpoint.
    """
    folder = Path(path)
    source = folder.resolve().name
    remote = not folder.exists()
    if remote:
        source = str(path)
        folder = from_hub(source, revision, cache, weights=not headers_only)
        revision = folder.name  # the commit
    if not folder.is_dir():
        raise CheckpointError(f"`{path}` is not a folder", hint="give the folder that holds config.json")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"`{path}` is a PEFT adapter, not a checkpoint", hint="adapters can be `tuned`, not `base`"
        )
    config = read_json_object(folder / "config.json", hint="a checkpoint folder has a config.json")
    if remote and headers_only and not any(folder.glob("*.safetensors")):
        entries = _entries(source, headers_from_hub(source, revision), [])
    else:
        entries = _entries(str(folder), *_read_headers(folder))
    checkpoint = Checkpoint(folder, config, entries, source=source, revision=revision)
    _check_layers(checkpoint)
    return checkpoint


def config_value(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of ``keys`` that a config has, looking in a multimodal config's text part first."""
    for table in (config.get("text_config"), config):
        if isinstance(table, Mapping):
            for key in keys:
                if table.get(key) is not None:
                    return table[key]
    return None


def _read_headers(folder: Path) -> tuple[dict[str, dict[str, Slot]], list[str]]:
    """The tensors of each weight file, and what is wrong with the files or differs from the index."""
    headers: dict[str, dict[str, Slot]] = {}
    problems: list[str] = []
    for file, promised in weight_files(folder).items():
        try:
            slots = headers[file] = read_header(folder / file)
        except CheckpointError as error:
            problems += [f"`{file}`: {problem}" for problem in error.problems or (error.message,)]
            continue
        if promised is not None:
            lacking, unlisted = sorted(promised - set(slots)), sorted(set(slots) - promised)
            problems += [f"`{file}` lacks `{name}`, which the index says it has" for name in lacking]
            # Transformers reads a whole shard whatever the index says, so an unlisted tensor is a second truth
            problems += [f"`{file}` has `{name}`, which the index does not list there" for name in unlisted]
    return headers, problems


def _entries(source: str, headers: Mapping[str, Mapping[str, Slot]], problems: list[str]) -> dict[str, Entry]:
    """All files' tensors by canonical name; raises ``problems`` and those of names."""
    entries: dict[str, Entry] = {}
    for file, slots in headers.items():
        for stored, slot in slots.items():
            entry = make_entry(stored, slot, file)
            other = entries.get(entry.name)
            if other is None:
                entries[entry.name] = entry
            elif other.stored == stored:
                problems.append(f"`{stored}` is in `{other.file}` and in `{file}`")
            else:
                problems.append(f"`{other.stored}` and `{stored}` are the same tensor, `{entry.name}`")
    if problems:
        raise CheckpointError(
            f"the checkpoint `{source}` is damaged", problems=problems, hint="fetch the files named here again"
        )
    return entries


def make_entry(stored: str, slot: Slot, file: str) -> Entry:
    """The entry of a file's tensor, its name understood."""
    name = parse_name(stored)
    return Entry(
        name=name.canonical, stored=stored, layer=name.layer, kind=name.kind,
        dtype=slot.dtype, shape=slot.shape, file=file, start=slot.start, end=slot.end,
    )  # fmt: skip


def _check_layers(checkpoint: Checkpoint) -> None:
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
    # layers beyond the config's are extra heads for multi-token prediction, not part of the stack
    checkpoint.layers = count
