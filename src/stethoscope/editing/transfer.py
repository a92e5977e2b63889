"""Bytes into new files, hashed on the way, by as many threads as the disk can feed.

Where the file system shares blocks between files (Btrfs, XFS), nothing is copied at all: see `Output.clone`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from stethoscope.artifacts import new_folder
from stethoscope.checkpoints.checkpoint import Checkpoint, hash_tensor
from stethoscope.checkpoints.header import Entry
from stethoscope.editing.manifest import describe_tensor
from stethoscope.errors import CheckpointError, refused_by_system
from stethoscope.lazy import torch

Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # bytes done, bytes in all
FICLONE = 0x40049409  # linux/fs.h: share the blocks of one file with another


class Output:
    """A new file of known size that several threads fill behind its header.

    Attributes:
        shared: the file began as a clone of ``like``, so that whatever is the same needs no copy.
    """

    def __init__(self, path: Path, size: int, header: bytes, *, like: Path | None = None) -> None:
        self.handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        # The kernel lets one thread write to a file at a time, and the others burn processor time waiting: wait here.
        self._turn = threading.Lock()
        self.size = size
        try:
            self.shared = like is not None and self.clone(like)
            if not self.shared:
                self.allocate()
                self.write(0, memoryview(header))
        except BaseException:
            self.close()
            raise

    def allocate(self) -> None:
        """Claim the disk space now, so that a full disk is known before the first byte is written."""
        if self.size:
            try:
                os.posix_fallocate(self.handle, 0, self.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self.handle, self.size)

    def clone(self, source: Path) -> bool:
        """Share the blocks of ``source`` if the file system can; nothing is read or written then."""
        try:
            with source.open("rb") as file:
                fcntl.ioctl(self.handle, FICLONE, file.fileno())
        except OSError:
            return False
        return True

    def write(self, offset: int, data: memoryview) -> None:
        with self._turn:
            done = 0
            while done < len(data):
                done += os.pwrite(self.handle, data[done:], offset + done)

    def close(self) -> None:
        os.close(self.handle)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def output_folder(out: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """A folder that becomes ``out`` if the block succeeds; with ``sync``, once it is on the disk itself.

    Raises:
        CheckpointError: what the operating system's errors mean to someone who writes to ``out``.
    """
    try:
        with new_folder(out, overwrite=overwrite) as folder:
            yield folder
            if sync:
                for path in (*folder.iterdir(), folder):
                    _sync(path)
    except OSError as error:
        known = refused_by_system(error)
        said = known.message if known else error.strerror or str(error)
        raise CheckpointError(f"cannot write `{out}`: {said}", hint=known.hint if known else None) from error
    if sync:
        _sync(out.parent)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def send(pieces: Iterable[memoryview], output: Output | None, offset: int) -> str:
    """Write pieces one behind the other, or nowhere; return the hash of their bytes."""
    digest = blake3()
    for piece in pieces:
        digest.update(piece)
        if output is not None:
            output.write(offset, piece)
        offset += len(piece)
    return digest.hexdigest()


def copy_tensor(checkpoint: Checkpoint, entry: Entry, output: Output) -> dict[str, Any]:
    """Put a tensor as it is in the same place of a file with the same layout; return its record for the manifest."""
    digest = send(checkpoint.pieces(entry), None if output.shared else output, entry.start)
    return describe_tensor(entry, {"from": "base", "hash": digest})


def in_parallel(
    jobs: Sequence[tuple[int, Callable[[], Result]]], *, progress: Progress | None = None, arithmetic: bool = False
) -> list[Result]:
    """Run jobs (size in bytes, function) on a few threads; the first failure stops the rest and is raised.

    The functions spend their time in reads, hashes and tensor arithmetic, which all let other threads run.

    Args:
        arithmetic: each worker is one thread of PyTorch's: two levels of threads would fight over the same cores.
    """
    total, finished = sum(size for size, _ in jobs), 0
    pool = ThreadPoolExecutor(
        min(4, os.cpu_count() or 1),
        "stethoscope-edit",
        initializer=(lambda: torch.set_num_threads(1)) if arithmetic else None,
    )
    try:
        sizes = {pool.submit(job): size for size, job in jobs}
        for future in as_completed(sizes):
            future.result()
            finished += sizes[future]
            if progress is not None:
                progress(finished, total)
        return [future.result() for future in sizes]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if arithmetic:
            torch.set_num_threads(torch.get_num_threads())  # of threads to come, which workers have set to 1


def hash_tensors(checkpoint: Checkpoint, entries: Iterable[Entry], *, progress: Progress | None = None) -> list[str]:
    """The hash of each tensor's stored bytes."""
    jobs = [(entry.nbytes, partial(hash_tensor, checkpoint, entry)) for entry in entries]
    return in_parallel(jobs, progress=progress)


def rewrite(
    source: Checkpoint,
    folder: Path,
    fill: Callable[[Entry, Output], Result],
    *,
    progress: Progress | None = None,
    arithmetic: bool = False,
) -> dict[str, Result]:
    """Make weight files in ``folder`` with the layout of ``source``; return what ``fill`` says by stored name.

    ``fill(entry, output)`` writes one tensor in its place, or leaves it where the output shares the source's bytes.
    """
    jobs: list[tuple[float, Entry, Output]] = []
    with ExitStack() as stack:
        for file in source.files:
            path = source.path / file
            inside = [entry for entry in source.entries.values() if entry.file == file]
            with path.open("rb") as opened:
                header = opened.read(min(entry.start for entry in inside))
            output = Output(folder / file, path.stat().st_size, header, like=path)
            stack.callback(output.close)
            jobs += [(entry.start / output.size, entry, output) for entry in inside]
        # the kernel lets one thread write to a file at a time: go through all files at once
        jobs.sort(key=lambda job: job[0])
        calls = [(entry.nbytes, partial(fill, entry, output)) for _, entry, output in jobs]
        done = in_parallel(calls, progress=progress, arithmetic=arithmetic)
        return {entry.stored: result for (_, entry, _), result in zip(jobs, done, strict=True)}
