"""The header of a safetensors file, read and written here, because it is where a lying file lies.

Every claim is checked before a tensor is touched: lengths against the file's size, shapes against byte ranges,
ranges against each other. All that is wrong with a file is said at once. Format: 8 bytes little-endian header
length, that many bytes of JSON, then the tensors with no gap between them.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stethoscope.checkpoints.names import Kind, parse_name
from stethoscope.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself accepts


class Dtype(NamedTuple):
    """A stored dtype.

    Attributes:
        bits: per element.
        torch: PyTorch's name; None for packed ones, which are copied, never computed with.
        exponent: for floats, the bits that are all set in NaN and infinity alone.
    """

    bits: int
    torch: str | None = None
    exponent: int = 0


DTYPES = {
    "BOOL": Dtype(8, "bool"), "U8": Dtype(8, "uint8"), "I8": Dtype(8, "int8"), "U16": Dtype(16, "uint16"),
    "I16": Dtype(16, "int16"), "U32": Dtype(32, "uint32"), "I32": Dtype(32, "int32"), "U64": Dtype(64, "uint64"),
    "I64": Dtype(64, "int64"), "C64": Dtype(64, "complex64"), "F16": Dtype(16, "float16", 0x7C00),
    "BF16": Dtype(16, "bfloat16", 0x7F80), "F32": Dtype(32, "float32", 0x7F80 << 16),
    "F64": Dtype(64, "float64", 0x7FF0 << 48), "F8_E4M3": Dtype(8, "float8_e4m3fn", 0x7F),
    "F8_E5M2": Dtype(8, "float8_e5m2", 0x7C), "F8_E8M0": Dtype(8), "F4": Dtype(4), "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a weight file.

    Attributes:
        name, layer, kind: what its stored name means.
        start, end: where its bytes lie, counted from the file's first byte.
    """

    name: str
    stored: str
    layer: int | None
    kind: Kind
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix of its last dimension: what chunked reading counts in."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Elements per row: the last dimension, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    def first_rows(self, count: int) -> "Entry":
        """The same tensor cut along its first dimension, as far as it is longer: what is left lies first."""
        rows = min(count, self.shape[0])
        return replace(self, shape=(rows, *self.shape[1:]), end=self.start + self.nbytes // self.shape[0] * rows)


def make_entry(stored: str, file: str, dtype: str, shape: Sequence[int], start: int, end: int) -> Entry:
    """The entry of a file's tensor, its name understood."""
    name, layer, kind = parse_name(stored)
    return Entry(name, stored, layer, kind, file, dtype, tuple(shape), start, end)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by stored name, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, empty, truncated, or its header contradicts itself or the file.
    """
    try:
        with path.open("rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if size < 8:
                few = f"the file has {size} bytes, too few for a header"
                raise _damaged(path, [few if size else "the file is empty"])
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, [f"it announces a header of {length:,} bytes in a file of {size:,}"])
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read `{path}`: {error.strerror}", hint="check the path and its permissions"
        ) from error
    return parse_header(text, size=size, path=path)


def parse_header(text: bytes, *, size: int, path: Path) -> dict[str, Entry]:
    """Check a header's JSON against a file of ``size`` bytes."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, [f"its header is not valid JSON: {error}"]) from error
    if not isinstance(header, dict):
        raise _damaged(path, ["its header is not a JSON object"])
    metadata = header.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("`__metadata__` is not a table of strings")
    entries: list[Entry] = []
    for name, claim in header.items():
        if problem := _problem_of(claim):
            problems.append(f"`{name}` {problem}")
        else:
            start, end = (8 + len(text) + offset for offset in claim["data_offsets"])
            entries.append(make_entry(name, path.name, claim["dtype"], claim["shape"], start, end))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    if problems := problems or _coverage_problems(entries, 8 + len(text), size):
        raise _damaged(path, problems)
    return {entry.stored: entry for entry in entries}


def _problem_of(claim: Any) -> str | None:
    """What is wrong with what a header says of a tensor."""
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        return "does not say exactly dtype, shape and data_offsets"
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype `{dtype}`"
    if not _naturals(shape):
        return f"has the shape {str(shape)[:60]}"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the byte range {str(offsets)[:60]}"
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPES[dtype].bits != 8 * nbytes:
        return f"is {dtype} {str(shape)[:60]} but its byte range holds {nbytes:,} bytes"
    return None


def _coverage_problems(entries: Sequence[Entry], start: int, size: int) -> list[str]:
    """Gaps, overlaps and bytes left over."""
    problems = []
    end, before = start, "the header"
    for entry in entries:
        if entry.start != end:
            word = "overlaps" if entry.start < end else "leaves a gap behind"
            problems.append(f"`{entry.stored}` {word} {before}")
        end, before = max(end, entry.end), f"`{entry.stored}`"
    if end > size:
        problems.append(f"its tensors need {end:,} bytes but the file has {size:,}: it is truncated")
    elif end < size:
        problems.append(f"{size - end:,} bytes follow its last tensor")
    return problems


def build_header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """The leading bytes of a safetensors file holding these tensors (name -> dtype, shape) back to back, in order.

    Padded with spaces so that data starts at a multiple of 8. One metadata key, hence the same bytes every time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` occurs twice")
    return table


def _naturals(value: Any) -> bool:
    # bool is an int to Python, but not a size
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _damaged(path: Path, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"`{path}` is not a sound safetensors file",
        problems=problems,
        hint="the download or copy may have been cut short: fetch the file again",
    )
