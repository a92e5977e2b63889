"""A checkpoint as it lies on disk: a lazy mapping from canonical name to tensor; `open.py` makes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3
from jaxtyping import Shaped

from stethoscope.artifacts import canonical_json
from stethoscope.checkpoints.header import DTYPES, Entry
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

ALGORITHM = "blake3"  # of every hash of a tensor, as strong as SHA-256 and fast enough to hide behind a copy
PIECE = 1 << 20  # bytes read, hashed and written at a time: what stays in a core's cache


def torch_dtype(stored: str) -> torch.dtype:
    """PyTorch's dtype for a stored one that has a tensor form."""
    found: torch.dtype = getattr(torch, str(DTYPES[stored].torch))
    return found


class Checkpoint:
    """A model's weights on disk: a mapping from canonical name to tensor that holds no file open.

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
        self, path: Path, config: dict[str, Any], entries: dict[str, Entry], *, source: str, revision: str | None = None
    ) -> None:
        self.path = path
        self.source = source
        self.revision = revision
        self.config = config
        self.entries = entries
        self.files = tuple(sorted({entry.file for entry in entries.values()}))
        self.layers = 1 + max((e.layer for e in entries.values() if e.layer is not None), default=-1)
        self.hidden_size = int(config_value(config, "hidden_size", "n_embd", "d_model") or 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: nothing is stored for it, or a copy and the config says so."""
        if "lm_head.weight" not in self.entries:
            return True
        says_so = bool(config_value(self.config, "tie_word_embeddings"))
        return says_so and is_copy(self, "lm_head.weight", "embed_tokens.weight")  # as Transformers ties them

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def predicts_ahead(self, entry: Entry) -> bool:
        """Whether a tensor is of a head that predicts tokens further ahead (MTP), which Transformers does not run."""
        first = entry.stored.removeprefix("model.").split(".")[0]
        return first.split("_")[0] == "mtp" or (entry.layer is not None and entry.layer >= self.layers)

    def entry(self, name: str) -> Entry:
        """The entry of a canonical name.

        Raises:
            CheckpointError: there is no such tensor; the hint names the nearest.
        """
        try:
            return self.entries[name]
        except KeyError:
            near = get_close_matches(name, self.entries, n=1)
            raise CheckpointError(
                f"`{self.source}` has no tensor `{name}`", hint=f"did you mean `{near[0]}`?" if near else None
            ) from None

    def read(self, name: str) -> Shaped[torch.Tensor, "..."]:
        """The tensor in its stored dtype and shape, in memory of its own."""
        entry = self.entry(name)
        return self.read_rows(name, 0, entry.rows).reshape(entry.shape)

    __getitem__ = read

    def read_rows(
        self, name: str, start: int, stop: int, *, buffer: torch.Tensor | None = None
    ) -> Shaped[torch.Tensor, "rows columns"]:
        """Rows ``start`` to ``stop`` of the tensor seen as a matrix of its last dimension; a scalar is 1 by 1.

        Args:
            buffer: bytes (uint8) to read into and to return a view of; new memory by default.
        """
        entry = self.entry(name)
        if DTYPES[entry.dtype].torch is None:
            raise CheckpointError(
                f"`{entry.stored}` has the packed dtype `{entry.dtype}`, which has no tensor form",
                hint="use an unquantised checkpoint of this model",
            )
        row = entry.nbytes // entry.rows if entry.rows else 0
        size = (stop - start) * row
        data = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer[:size]
        self.read_into(entry, entry.start + start * row, data.numpy().data)
        return data.view(torch_dtype(entry.dtype)).view(stop - start, entry.columns)

    def pieces(self, entry: Entry) -> Iterator[memoryview]:
        """A tensor's bytes as stored, in pieces; each is valid until the next is asked for."""
        buffer = memoryview(bytearray(min(PIECE, entry.nbytes)))
        for offset in range(entry.start, entry.end, PIECE):
            piece = buffer[: min(PIECE, entry.end - offset)]
            self.read_into(entry, offset, piece)
            yield piece

    def read_into(self, entry: Entry, offset: int, view: memoryview) -> None:
        """Fill ``view`` from the entry's file, ``offset`` counted from the file's first byte."""
        path = self.path / entry.file
        try:
            with path.open("rb") as file:
                file.seek(offset)
                if file.readinto(view) < len(view):
                    raise OSError(None, "the file became shorter while it was being read")
        except OSError as error:
            raise CheckpointError(f"cannot read `{entry.stored}` from `{path}`: {error.strerror or error}") from error


def config_value(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of ``keys`` that a config has, looking in a multimodal config's text part first."""
    for table in (config.get("text_config"), config):
        if isinstance(table, Mapping):
            for key in keys:
                if table.get(key) is not None:
                    return table[key]
    return None


def hash_tensor(checkpoint: Checkpoint, entry: Entry) -> str:
    """The hash of a tensor's bytes as stored, read in pieces."""
    digest = blake3()
    for piece in checkpoint.pieces(entry):
        digest.update(piece)
    return digest.hexdigest()


def same_bytes(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Whether two of a checkpoint's tensors have the same dtype, shape and bytes; False if one is not there."""
    first, second = checkpoint.entries.get(one), checkpoint.entries.get(two)
    if first is None or second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return hash_tensor(checkpoint, first) == hash_tensor(checkpoint, second)


def is_copy(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """The same, where only headers may be here: their shapes decide then."""
    try:
        return same_bytes(checkpoint, one, two)
    except CheckpointError:
        return checkpoint.entries[one].shape == checkpoint.entries[two].shape


def fingerprint(checkpoint: Checkpoint, *, without: frozenset[str] = frozenset()) -> str:
    """One hash of a checkpoint's names, shapes and dtypes and of the ends and the middle of every tensor.

    It tells checkpoints apart in a few thousand small reads, independently of layout and sharding. It does not
    prove that two are equal; hashes of whole tensors do.

    Args:
        without: canonical names of tensors whose contents do not count.
    """
    digest = blake3()
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(canonical_json([name, entry.dtype, list(entry.shape)]).encode())
        if name in without:
            continue
        starts = {entry.start, entry.start + (entry.nbytes // 2), max(entry.start, entry.end - 4096)}
        for start in sorted(starts):
            sample = memoryview(bytearray(min(4096, entry.end - start)))
            checkpoint.read_into(entry, start, sample)
            digest.update(sample)
    return digest.hexdigest()
