"""The header of a safetensors file, read and written here, because it is where a lying file lies.

Every claim is checked before a tensor is touched: lengths against the file's size, shapes against byte ranges,
ranges against each other. All that is wrong with a file is said at once. Format: 8 bytes little-endian header
length, that many bytes of JSON, then the tensors with no gap between them.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor of one file: what it is and where its bytes lie, counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, Slot]:
    """The tensors of a safetensors file by stored name, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, empty, truncated, or its header contradicts itself or the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if size == 0:
                raise _damaged(path, ["the file is empty"])
            if len(first) < 8:
                raise _damaged(path, [f"the file has {size} bytes, too few for a header"])
            length = int.from_bytes(first, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, [f"it announces a header of {length:,} bytes in a file of {size:,}"])
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read `{path}`: {error.strerror}", hint="check the path and its permissions"
        ) from error
    return parse_header(text, size=size, path=path)


def parse_header(text: bytes, *, size: int, path: Path) -> dict[str, Slot]:
    """Check a header's JSON against a file of ``size`` bytes; ``path`` is for messages only."""
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
    data_start = 8 + len(text)
    slots: dict[str, Slot] = {}
    for name, claim in header.items():
        slot = _check_claim(name, claim, data_start, problems)
        if slot is not None:
            slots[name] = slot
    slots = dict(sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)))
    if not problems:
        problems += _check_coverage(slots, data_start, size)
    if problems:
        raise _damaged(path, problems)
    return slots


def _check_claim(name: str, claim: Any, data_start: int, problems: list[str]) -> Slot | None:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"`{name}` does not say exactly dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problems.append(f"`{name}` has the unknown dtype `{dtype}`")
    elif not _naturals(shape):
        problems.append(f"`{name}` has the shape {_short(shape)}")
    elif not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"`{name}` has the byte range {_short(offsets)}")
    elif math.prod(shape) * DTYPES[dtype].bits != 8 * (offsets[1] - offsets[0]):
        problems.append(
            f"`{name}` is {dtype} {_short(shape)} but its byte range holds {offsets[1] - offsets[0]:,} bytes"
        )
    else:
        return Slot(dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], end=data_start + offsets[1])
    return None


def _check_coverage(slots: Mapping[str, Slot], data_start: int, size: int) -> list[str]:
    problems = []
    end, before = data_start, "the header"
    for name, slot in slots.items():
        if slot.start != end:
            word = "overlaps" if slot.start < end else "leaves a gap behind"
            problems.append(f"`{name}` {word} {before}")
        end, before = max(end, slot.end), f"`{name}`"
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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _damaged(path: Path, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"`{path}` is not a sound safetensors file",
        problems=problems,
        hint="the download or copy may have been cut short: fetch the file again",
    )
