"""Headers that lie: whatever a file claims, it is either read as it is or refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from stethoscope.checkpoints.header import DTYPES, build_header, parse_header, read_header
from stethoscope.errors import CheckpointError

FILE = Path("model.safetensors")


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def claim(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_safetensors_wrote(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    slots = read_header(tmp_path / FILE)
    data = (tmp_path / FILE).read_bytes()
    for name, tensor in tensors.items():
        assert slots[name].shape == tuple(tensor.shape)
        assert data[slots[name].start : slots[name].end] == tensor.flatten().view(torch.uint8).numpy().tobytes()


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, st.lists(st.integers(0, 4), max_size=3), max_size=6))
def test_what_we_build_safetensors_reads_and_so_do_we(shapes):
    from safetensors import deserialize

    header = build_header({name: ("BF16", shape) for name, shape in shapes.items()})
    data = bytes(sum(2 * torch.Size(shape).numel() for shape in shapes.values()))
    assert {name: info["shape"] for name, info in deserialize(header + data)} == shapes
    slots = parse_header(header[8:], size=len(header) + len(data), path=FILE)
    assert {name: list(slot.shape) for name, slot in slots.items()} == shapes
    assert len(header) % 8 == 0


LIES: dict[str, tuple[Any, str]] = {
    "a list": ([1], "not a JSON object"),
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "twice the same": (b'{"a": 1, "a": 2}', "occurs twice"),
    "metadata": ({"__metadata__": {"format": 3}, "a": claim()}, "not a table of strings"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [2]}}, "does not say exactly"),
    "a field too many": ({"a": claim() | {"more": 1}}, "does not say exactly"),
    "dtype": ({"a": claim(dtype="F31")}, "unknown dtype"),
    "dtype is a list": ({"a": claim(dtype=[])}, "unknown dtype"),
    "negative shape": ({"a": claim(shape=[-2])}, "has the shape"),
    "bool shape": ({"a": claim(shape=[True, 2])}, "has the shape"),
    "float shape": ({"a": claim(shape=[2.0])}, "has the shape"),
    "huge shape": ({"a": claim(shape=[2**63])}, "has the shape"),
    "overflowing shape": ({"a": claim(shape=[2**62, 4])}, "byte range holds"),
    "negative range": ({"a": claim(offsets=[-8, 0])}, "byte range"),
    "turned range": ({"a": claim(offsets=[8, 0])}, "byte range"),
    "three offsets": ({"a": claim(offsets=[0, 8, 9])}, "byte range"),
    "shape and range differ": ({"a": claim(shape=[3])}, "byte range holds 8"),
    "overlap": ({"a": claim(), "b": claim()}, "overlaps"),
    "gap": ({"a": claim(offsets=[8, 16])}, "leaves a gap"),
    "beyond the end": ({"a": claim(shape=[8], offsets=[0, 32])}, "truncated"),
    "bytes left over": ({"a": claim(shape=[1], offsets=[0, 4])}, "follow its last tensor"),
}


FILES = {name: (with_header(header, bytes(8)), message) for name, (header, message) in LIES.items()} | {
    "no bytes": (b"", "empty"),
    "four bytes": (b"1234", "too few"),
    "eight bytes": (b"\xff" * 8, "announces a header"),
    "a long header": ((50).to_bytes(8, "little") + b"{}", "announces a header of 50"),
}


@pytest.mark.parametrize("lie", FILES)
def test_lies_are_named(lie, tmp_path):
    content, message = FILES[lie]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / FILE)
    assert caught.value.hint


def test_all_lies_at_once(tmp_path):
    (tmp_path / FILE).write_bytes(with_header({"a": claim(dtype="X"), "b": claim(shape=[3]), "c": 7}, bytes(8)))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / FILE)
    assert len(caught.value.problems) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
claims = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 8), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-8, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300)
@given(
    header=json_values | st.dictionaries(st.text(max_size=4), claims | json_values, max_size=4),
    extra=st.integers(0, 64),
)
def test_any_header_is_refused_or_sound(header, extra):
    text = json.dumps(header).encode()
    size = 8 + len(text) + extra
    try:
        slots = parse_header(text, size=size, path=FILE)
    except CheckpointError:
        return
    end = 8 + len(text)
    for slot in slots.values():
        assert slot.start == end
        end = slot.end
    assert end == size


GOOD = save({"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16)})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_a_damaged_file_is_refused_or_safetensors_reads_it_too(tmp_path, at, value, cut):
    damaged = bytearray(GOOD)
    damaged[at] = value
    path = tmp_path / FILE
    path.write_bytes(damaged[:cut] if cut % 2 else damaged)
    try:
        slots = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert set(slots) == names
