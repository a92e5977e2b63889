"""What goes wrong while an edit is written leaves the inputs alone and no output that looks whole."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import SMALL, build, contents, interrupt, stir

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.transfer import Output
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

PLAN = EditPlan.for_layers({0: 1.0, 1: 0.3})
KINDS = ("checkpoint", "patch")
both = pytest.mark.parametrize("kind", KINDS)


def failing(error: int):
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.fixture
def refused(base, change, tmp_path):
    """Write the edit, which must fail with a message and leave nothing; the inputs stay as they were."""
    out, before = tmp_path / "outs", contents(base.path)
    out.mkdir()

    def write(message, plan=PLAN, *, kind="checkpoint", base=base, change=change):
        with pytest.raises(CheckpointError, match=message) as caught:
            write_edit(base, change, plan, out / "out", kind=kind)
        assert list(out.iterdir()) == []
        return caught.value

    yield write
    assert contents(base.path) == before


@both
def test_a_full_disk_is_foreseen(kind, refused, monkeypatch):
    class Usage(NamedTuple):
        total: int = 1000
        used: int = 1000
        free: int = 0

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    refused("GB free", kind=kind)


@both
def test_a_limit_on_file_size(kind, refused):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        assert refused("is full", kind=kind).hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@both
@pytest.mark.parametrize("call", [0, 1, 5, 10])
def test_a_disk_that_fills_on_the_way(kind, call, refused, monkeypatch):
    calls = iter(range(1000))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: real(*args) if next(calls) < call else failing(errno.ENOSPC)())
    refused("is full", kind=kind)


WITH_A_TRANSFORM = """
import errno, os, sys
from pathlib import Path
from world import Kept
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

def full(*args):
    if next(calls, None) is None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(*args)

base = open_checkpoint(Path(sys.argv[1]))
change, plan = open_task_vector(base, Path(sys.argv[2])), EditPlan.for_layers([0, 1, 2], transform=Kept())
real, os.pwrite = os.pwrite, full
for kind in ("checkpoint", "patch"):
    calls = iter(range(8))
    try:
        write_edit(base, change, plan, Path(sys.argv[3]), kind=kind)
    except CheckpointError as error:
        print(error.hint)
"""


def test_a_disk_that_fills_while_changes_are_transformed(pair, tmp_path):
    """In a process of its own: threads that wait for each other would never end."""
    command = [sys.executable, "-c", WITH_A_TRANSFORM, *map(str, pair), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["free some space"] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"), [("access", "cannot be written to"), ("pwrite", "Permission denied")]
)  # fmt: skip
def test_an_output_that_cannot_be_written(name, message, refused, monkeypatch):
    monkeypatch.setattr(os, name, (lambda *_: False) if name == "access" else failing(errno.EACCES))
    refused(message)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("pwrite", lambda handle, data, offset, real=os.pwrite: real(handle, data[:7], offset)),  # short writes
        ("posix_fallocate", failing(errno.EOPNOTSUPP)),
    ],
)
def test_what_a_file_system_lacks_is_made_up_for(name, instead, base, change, tmp_path, monkeypatch):
    expected = contents(write_edit(base, change, PLAN, tmp_path / "one").path)
    monkeypatch.setattr(os, name, instead)
    assert contents(write_edit(base, change, PLAN, tmp_path / "two").path) == expected


def test_a_file_system_that_shares_blocks(base, change, tmp_path, monkeypatch):
    """Where the clone works, only what changes is written: a clone is stood in for by a plain copy."""

    def clone(self: Output, source: Path) -> bool:
        os.pwrite(self.handle, source.read_bytes(), 0)
        return True

    expected = write_edit(base, change, PLAN, tmp_path / "one")
    monkeypatch.setattr(Output, "clone", clone)
    cloned = write_edit(base, change, PLAN, tmp_path / "two")
    assert contents(cloned.path) == contents(expected.path)
    assert cloned.bytes_written == sum(e.nbytes for e in base.entries.values() if e.layer in (0, 1))


@pytest.mark.parametrize("coefficient", [1.0, 0.5])
@both
def test_not_a_number_is_not_written(kind, coefficient, pair, base, refused, tmp_path):
    bad = shutil.copytree(pair[1], tmp_path / "bad")
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(entry.file for entry in base.entries.values() if entry.stored == name)
    tensors = load_file(bad / file)
    tensors[name][5, 5] = float("nan")
    save_file(tensors, bad / file, metadata={"format": "pt"})
    change = open_task_vector(base, bad)
    plan = EditPlan.for_layers([1], coefficient=coefficient)
    refused(r"layers\.1\.mlp\.up_proj.*NaN", plan, kind=kind, change=change)
    # a layer that is not selected does not stand in the way
    write_edit(base, change, EditPlan.for_layers([0], coefficient=coefficient), tmp_path / "out", kind=kind)


def test_a_failed_overwrite_keeps_the_old_edit_and_a_failed_write_leaves_none(base, change, tmp_path):
    old = contents(write_edit(base, change, EditPlan(), tmp_path / "out").path)
    for out, overwrite in ((tmp_path / "out", True), (tmp_path / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            write_edit(base, change, PLAN, out, overwrite=overwrite, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == old
    assert verify(tmp_path / "out").ok


def test_an_input_that_shrinks_while_it_is_read(pair, base, refused, tmp_path):
    tuned = shutil.copytree(pair[1], tmp_path / "tuned")
    change = open_task_vector(base, tuned)
    for path in tuned.glob("*.safetensors"):
        os.truncate(path, 1000)
    refused("shorter while it was being read", EditPlan.for_layers([0, 1, 2]), change=change)


def test_a_base_that_shrinks_while_it_is_copied(pair, refused, tmp_path, monkeypatch):
    own = open_checkpoint(shutil.copytree(pair[0], tmp_path / "base"))
    allocate = Output.allocate

    def cut(self: Output) -> None:
        allocate(self)
        os.truncate(own.path / own.files[0], 3000)

    monkeypatch.setattr(Output, "allocate", cut)
    plan = EditPlan.for_layers([1])
    refused("shorter while it was being read", plan, base=own, change=open_task_vector(own, pair[1]))


def test_torch_keeps_its_threads(base, change, tmp_path):
    """Also for threads that begin later."""
    threads, later = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        write_edit(base, change, PLAN, tmp_path / "out")
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *later] == [2, 2]
    finally:
        torch.set_num_threads(threads)


SERVER = """
import os, sys
from pathlib import Path
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit

for line in sys.stdin:
    folder, kind, out, overwrite = line.split()
    if not (child := os.fork()):
        base = open_checkpoint(Path(folder) / "base")
        change, plan = open_task_vector(base, Path(folder) / "tuned"), EditPlan.for_layers({0: 1.0, 2: 0.5})
        write_edit(base, change, plan, Path(out), kind=kind, overwrite=overwrite == "True")
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_moment_an_edit_is_absent_or_whole(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    model = build("Llama", **SMALL | sizes).to(torch.bfloat16)  # large enough to be killed in the middle of
    for name in ("base", "tuned"):
        stir(model).save_pretrained(tmp_path / name, max_shard_size="10MB")
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(kind, out, *, overwrite=False, seconds=None) -> bool:
        """Write an edit in a process that is killed after so many seconds; whether it was done before."""
        server.stdin.write(f"{tmp_path} {kind} {tmp_path / out} {overwrite}\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(server.stdout.readline()) == 0

    inputs = [contents(tmp_path / name) for name in ("base", "tuned")]
    expected, longest, chance = {}, 0.0, random.Random(0)
    for kind in KINDS:
        start = time.perf_counter()
        assert write(kind, f"reference-{kind}")
        longest = max(longest, time.perf_counter() - start)
        expected[kind] = contents(tmp_path / f"reference-{kind}")
    for i in range(20):
        kind, overwrite = KINDS[i % 2], chance.random() < 0.5
        out = tmp_path / "out" / kind
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        finished = write(kind, f"out/{kind}", overwrite=overwrite, seconds=chance.random() * 1.2 * longest)
        assert contents(out) == expected[kind] if out.exists() else not finished, f"kill {i}"
    assert [contents(tmp_path / name) for name in ("base", "tuned")] == inputs
    assert all(write(kind, f"out/{kind}", overwrite=True) for kind in KINDS)  # clears what the killed ones left
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(KINDS)
    server.communicate()
