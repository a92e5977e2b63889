"""Bytes from one file to another, hashed on the way, by as many threads as the disk can feed.

Where the file system shares blocks between files (Btrfs, XFS), nothing is written at all: see `Output.clone`. Else the
kernel copies a piece, which is then hashed as it lies in the new file while it is still in the processor's cache;
across file systems a piece is read, hashed and written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from stethoscope.artifacts import new_folder
from stethoscope.checkpoints.checkpoint import Checkpoint, Entry, read_exactly
from stethoscope.checkpoints.hashing import PIECE, Digest, hash_tensor
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # bytes done, bytes in all
FICLONE = 0x40049409  # linux/fs.h: share the blocks of one file with another


class Output:
    """A new file of known size that several threads fill."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        # The kernel lets one thread write to a file at a time, and the others burn processor time waiting: wait here.
        self._turn = threading.Lock()
        self.size = size

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

    def copy(self, source: int, offset: int, size: int) -> bool:
        """Have the kernel copy bytes from the same place of an open file; False if it cannot between these two."""
        with self._turn:
            while size:
                try:
                    count = os.copy_file_range(source, self.handle, size, offset, offset)
                except OSError as error:
                    if error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                        return False
                    raise
                if count == 0:
                    raise OSError(None, "an input became shorter while it was being read")
                offset, size = offset + count, size - count
        return True

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
def disk_errors(path: Path) -> Iterator[None]:
    """Say what the operating system's errors mean to someone who writes to ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message, hint = f"the disk of `{path}` is full", "free some space, or write `patch` instead of `checkpoint`"
        else:
            message, hint = f"cannot write `{path}`: {error.strerror or error}", "choose a folder that you can write to"
        raise CheckpointError(message, hint=hint) from error


@contextmanager
def output_folder(out: Path, *, overwrite: bool, sync: bool) -> Iterator[Path]:
    """A folder that becomes ``out`` if the block succeeds; with ``sync``, once it is on the disk itself."""
    with disk_errors(out), new_folder(out, overwrite=overwrite) as folder:
        yield folder
        if sync:
            for path in (*folder.iterdir(), folder):
                _sync(path)
    if sync:
        _sync(out.parent)


@contextmanager
def output_file(path: Path, header: bytes, size: int) -> Iterator[Output]:
    """A new file with its header written and ``size`` bytes claimed behind it."""
    output = Output(path, len(header) + size)
    try:
        output.allocate()
        output.write(0, memoryview(header))
        yield output
    finally:
        output.close()


def stored_pieces(checkpoint: Checkpoint, entry: Entry) -> Iterator[memoryview]:
    """A tensor's bytes as stored, in pieces; each is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(PIECE, entry.nbytes)))
    for offset in range(entry.start, entry.end, PIECE):
        piece = buffer[: min(PIECE, entry.end - offset)]
        checkpoint.read_into(entry, offset, piece)
        yield piece


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def send(pieces: Iterable[memoryview], digest: Digest, output: Output | None, offset: int) -> None:
    """Hash pieces and write them one behind the other; with no output, only hash."""
    for piece in pieces:
        digest.update(piece)
        if output is not None:
            output.write(offset, piece)
        offset += len(piece)


def copy_tensor(checkpoint: Checkpoint, entry: Entry, digest: Digest, output: Output, *, shared: bool) -> None:
    """Copy a tensor to the same place of a file with the same layout, and hash it; only hash it if ``shared``."""
    if shared:
        return send(stored_pieces(checkpoint, entry), digest, None, entry.start)
    buffer = memoryview(bytearray(min(PIECE, entry.nbytes)))
    source = os.open(checkpoint.path / entry.file, os.O_RDONLY)
    try:
        for offset in range(entry.start, entry.end, PIECE):
            piece = buffer[: min(PIECE, entry.end - offset)]
            copied = output.copy(source, offset, len(piece))
            read_exactly(output.handle if copied else source, piece, offset)
            digest.update(piece)
            if not copied:
                output.write(offset, piece)
    finally:
        os.close(source)


def in_parallel(
    jobs: Sequence[tuple[int, Callable[[], Result]]],
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    arithmetic: bool = False,
) -> list[Result]:
    """Run jobs (size in bytes, function) on a few threads; the first failure stops the rest and is raised.

    The functions spend their time in reads, hashes and tensor arithmetic, which all let other threads run.

    Args:
        arithmetic: each worker is one thread of PyTorch's: two levels of threads would fight over the same cores.
    """
    total = sum(size for size, _ in jobs)
    stopped = threading.Event()
    finished = 0
    lock = threading.Lock()

    def run(size: int, job: Callable[[], Result]) -> Result | None:
        nonlocal finished
        if stopped.is_set():
            return None
        result = job()
        with lock:
            finished += size
        return result

    pool = ThreadPoolExecutor(
        workers or min(4, os.cpu_count() or 1),
        "stethoscope-edit",
        initializer=(lambda: torch.set_num_threads(1)) if arithmetic else None,
    )
    try:
        futures = [pool.submit(run, size, job) for size, job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if progress is not None:
                progress(finished, total)
        return [future.result() for future in futures]  # type: ignore[misc]  # None only after a failure
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


def hash_tensors(
    checkpoint: Checkpoint, entries: Iterable[Entry], algorithm: str, *, progress: Progress | None = None
) -> list[str]:
    """The hash of each tensor's stored bytes."""
    jobs = [(entry.nbytes, partial(hash_tensor, checkpoint, entry, algorithm)) for entry in entries]
    return in_parallel(jobs, progress=progress)


def rewrite(
    source: Checkpoint,
    folder: Path,
    fill: Callable[[Entry, Output, bool], Result],
    *,
    progress: Progress | None = None,
    arithmetic: bool = False,
) -> dict[str, Result]:
    """Make weight files in ``folder`` with the layout of ``source``; return what ``fill`` says by stored name.

    ``fill(entry, output, shared)`` writes one tensor in its place, or leaves it where ``shared`` says that the
    source's bytes are there already.
    """
    jobs: list[tuple[float, int, str, Callable[[], Result]]] = []
    with ExitStack() as stack:
        for file in source.files:
            path = source.path / file
            output = Output(folder / file, path.stat().st_size)
            stack.callback(output.close)
            inside = [entry for entry in source.entries.values() if entry.file == file]
            shared = output.clone(path)
            if not shared:
                output.allocate()
                with path.open("rb") as header:
                    output.write(0, memoryview(header.read(min(entry.start for entry in inside))))
            jobs += [
                (entry.start / output.size, entry.nbytes, entry.stored, partial(fill, entry, output, shared))
                for entry in inside
            ]
        # the kernel lets one thread write to a file at a time: go through all files at once
        jobs.sort(key=lambda job: job[0])
        done = in_parallel([(size, job) for _, size, _, job in jobs], progress=progress, arithmetic=arithmetic)
        return {stored: result for (_, _, stored, _), result in zip(jobs, done, strict=True)}
