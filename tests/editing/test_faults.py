"""What goes wrong while an edit is written leaves the inputs alone and no output that looks whole."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kill_loop import kill_loop
from safetensors.torch import load_file, save_file
from test_writer import contents

from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import OutputKind, write_edit
from stethoscope.errors import CheckpointError

PLAN = EditPlan.for_layers({0: 1.0, 1: 0.3})
KINDS: list[OutputKind] = ["checkpoint", "patch"]


def assert_nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == []


def test_killed_at_any_moment(tmp_path: Path) -> None:
    killed, done = kill_loop(tmp_path / "kills", 20)
    assert killed + done == 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_foreseen(
    kind: OutputKind, base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int = 1000
        used: int = 1000
        free: int = 0

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    with pytest.raises(CheckpointError, match="GB free"):
        write_edit(base, change, PLAN, tmp_path / "out", kind=kind)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_on_file_size(kind: OutputKind, base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(CheckpointError, match="is full") as caught:
            write_edit(base, change, PLAN, tmp_path / "out", kind=kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [0, 1, 5, 10])
def test_a_disk_that_fills_on_the_way(
    kind: OutputKind, call: int, base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def filling(real: Callable[..., int]) -> Callable[..., int]:
        def write(*args: Any) -> int:
            if next(calls) >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return write

    monkeypatch.setattr(os, "pwrite", filling(os.pwrite))
    with pytest.raises(CheckpointError, match="is full"):
        write_edit(base, change, PLAN, tmp_path / "out", kind=kind)
    assert_nothing_left(tmp_path)


def test_short_writes_are_continued(
    base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(write_edit(base, change, PLAN, tmp_path / "one").path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:7], offset))
    assert contents(write_edit(base, change, PLAN, tmp_path / "two").path) == expected


def test_a_file_system_without_fallocate(
    base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(write_edit(base, change, PLAN, tmp_path / "one").path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert contents(write_edit(base, change, PLAN, tmp_path / "two").path) == expected


def test_a_file_system_that_shares_blocks(
    base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the clone works, only what changes is written: a clone is stood in for by a plain copy."""
    from stethoscope.editing.transfer import Output

    def clone(self: Output, source: Path) -> bool:
        os.pwrite(self.handle, source.read_bytes(), 0)
        return True

    expected = write_edit(base, change, PLAN, tmp_path / "one")
    monkeypatch.setattr(Output, "clone", clone)
    cloned = write_edit(base, change, PLAN, tmp_path / "two")
    assert contents(cloned.path) == contents(expected.path)
    assert cloned.bytes_written == sum(e.nbytes for e in base.entries.values() if e.layer in (0, 1))


def test_an_output_that_cannot_be_written(
    base: Checkpoint, change: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        write_edit(base, change, PLAN, tmp_path / "out")
    monkeypatch.undo()

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        write_edit(base, change, PLAN, tmp_path / "out")
    monkeypatch.undo()
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("coefficient", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_is_not_written(
    kind: OutputKind, coefficient: float, pair: tuple[Path, Path], base: Checkpoint, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(pair[1], bad)
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(entry.file for entry in base.entries.values() if entry.stored == name)
    tensors = load_file(bad / file)
    tensors[name][5, 5] = float("nan")
    save_file(tensors, bad / file, metadata={"format": "pt"})
    change = open_task_vector(base, bad)
    (tmp_path / "outs").mkdir()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        write_edit(
            base, change, EditPlan.for_layers([1], coefficient=coefficient), tmp_path / "outs" / "out", kind=kind
        )
    assert_nothing_left(tmp_path / "outs")
    # a layer that is not selected does not stand in the way
    write_edit(base, change, EditPlan.for_layers([0], coefficient=coefficient), tmp_path / "outs" / "out", kind=kind)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_interrupted(raised: type[BaseException], base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise raised

    before = contents(base.path)
    with pytest.raises(raised):
        write_edit(base, change, PLAN, tmp_path / "out", progress=stop)
    assert_nothing_left(tmp_path)
    assert contents(base.path) == before


def test_a_failed_overwrite_keeps_the_old_edit(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    old = contents(write_edit(base, change, EditPlan(), tmp_path / "out").path)
    with pytest.raises(KeyboardInterrupt):
        write_edit(base, change, PLAN, tmp_path / "out", overwrite=True, progress=stop)
    assert contents(tmp_path / "out") == old
    assert verify(tmp_path / "out").ok


def test_an_input_that_shrinks_while_it_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "tuned")
    base = open_checkpoint(pair[0])
    change = open_task_vector(base, tmp_path / "tuned")
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        os.truncate(path, 1000)
    (tmp_path / "outs").mkdir()
    with pytest.raises(CheckpointError, match="shorter while it was being read"):
        write_edit(base, change, EditPlan.for_layers([0, 1, 2]), tmp_path / "outs" / "out")
    assert_nothing_left(tmp_path / "outs")


def test_a_base_that_shrinks_while_it_is_copied(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stethoscope.editing.transfer import Output

    shutil.copytree(pair[0], tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, pair[1])
    allocate = Output.allocate

    def cut(self: Output) -> None:
        allocate(self)
        os.truncate(tmp_path / "base" / base.files[0], 3000)

    monkeypatch.setattr(Output, "allocate", cut)
    (tmp_path / "outs").mkdir()
    with pytest.raises(CheckpointError, match="shorter while it was being read"):
        write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "outs" / "out")
    assert_nothing_left(tmp_path / "outs")


def test_torch_keeps_its_threads(base: Checkpoint, change: TaskVector, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    write_edit(base, change, PLAN, tmp_path / "out")
    assert torch.get_num_threads() == threads
