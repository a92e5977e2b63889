"""Kill a process that writes edits at a random moment, over and over; then look at what it left.

    python tests/editing/kill_loop.py 1000

What must hold after each kill: the output is absent, or it is complete to the last bit; the inputs are as they were.
"""

import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from stethoscope.artifacts import sha256_file
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import OutputKind, write_edit

KINDS: tuple[OutputKind, ...] = ("checkpoint", "patch")
PLAN = EditPlan.for_layers({0: 1.0, 2: 0.5})


def make_pair(folder: Path) -> None:
    """Base and tuned of 13 MB each in two files: large enough to be killed in the middle of."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"num_hidden_layers": 4, "hidden_size": 512}')
        weight_map = {}
        for shard in range(2):
            tensors = {
                f"model.layers.{layer}.mlp.{module}_proj.weight": torch.randn(512, 1024, generator=generator)
                for layer in (2 * shard, 2 * shard + 1)
                for module in ("up", "gate", "down")
            }
            file = f"model-{shard + 1:05d}-of-00002.safetensors"
            save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / name / file)
            weight_map |= dict.fromkeys(tensors, file)
        index = '{"weight_map": ' + str(weight_map).replace("'", '"') + "}"
        (folder / name / "model.safetensors.index.json").write_text(index)


def write_once(folder: str, kind: OutputKind, out: str, overwrite: bool) -> None:
    """What the child does: one edit."""
    base = open_checkpoint(Path(folder) / "base")
    change = open_task_vector(base, Path(folder) / "tuned")
    write_edit(base, change, PLAN, Path(folder) / out, kind=kind, overwrite=overwrite)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def kill_loop(folder: Path, kills: int, *, seed: int = 0) -> tuple[int, int]:
    """Run and kill; return how many children were killed before they were done, and how many were done.

    Raises:
        AssertionError: something was lost, or looks whole and is not.
    """
    make_pair(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_loop"])
    inputs = {name: contents(folder / name) for name in ("base", "tuned")}
    expected, longest = {}, 0.0
    for kind in KINDS:
        for out in (f"reference-{kind}", f"again-{kind}"):
            start = time.perf_counter()
            child = context.Process(target=write_once, args=(str(folder), kind, out, False))
            child.start()
            child.join()
            longest = time.perf_counter() - start  # the first child also waits for the server's imports
        expected[kind] = contents(folder / f"reference-{kind}")
    chance = random.Random(seed)
    killed = done = 0
    for i in range(kills):
        kind, out = KINDS[i % 2], folder / "out" / KINDS[i % 2]
        overwrite = chance.random() < 0.5
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        child = context.Process(target=write_once, args=(str(folder), kind, f"out/{kind}", overwrite))
        child.start()
        time.sleep(chance.random() * 1.2 * longest)
        finished = not child.is_alive()
        child.kill()
        child.join()
        killed, done = killed + (not finished), done + finished
        if out.exists():
            assert contents(out) == expected[kind], f"kill {i}: half an edit"
        else:
            assert not finished, f"kill {i}: an edit that was done is gone"
    for name, hashes in inputs.items():
        assert contents(folder / name) == hashes, f"the input {name} was touched"
    for kind in KINDS:
        # the next run clears what the killed ones left
        write_once(str(folder), kind, f"out/{kind}", True)
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(KINDS)
    return killed, done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        killed, done = kill_loop(Path(scratch) / "kills", int(sys.argv[1]))
        sys.stdout.write(f"{killed} killed on the way, {done} were done first; nothing lost, nothing half-written\n")
