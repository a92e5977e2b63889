"""Hashes of tensors and of whole checkpoints.

BLAKE3: as strong as SHA-256 and about four times as fast (6.6 against 1.8 GB/s on one core), which is the
difference between a hash per tensor that hides behind the copy and one that doubles its time.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from blake3 import blake3

from stethoscope.artifacts import canonical_json
from stethoscope.checkpoints.checkpoint import Checkpoint, Entry
from stethoscope.errors import CheckpointError

SAMPLE = 4096


@runtime_checkable
class Digest(Protocol):
    """What hashlib's and BLAKE3's objects have in common."""

    def update(self, data: Any, /) -> object: ...
    def hexdigest(self) -> str: ...


ALGORITHM = "blake3"
ALGORITHMS: dict[str, Callable[[], Digest]] = {"blake3": blake3, "sha256": hashlib.sha256}


def new_digest(algorithm: str = ALGORITHM) -> Digest:
    """A hash to be fed; the algorithm's name is kept in every manifest."""
    if algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"the manifest uses the unknown hash `{algorithm}`", hint="it was made by a newer version of stethoscope"
        )
    return ALGORITHMS[algorithm]()


def hash_tensor(checkpoint: Checkpoint, entry: Entry, algorithm: str = ALGORITHM) -> str:
    """The hash of a tensor's bytes as stored, read in pieces."""
    digest = new_digest(algorithm)
    for piece in checkpoint.pieces(entry):
        digest.update(piece)
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint, *, without: frozenset[str] = frozenset(), algorithm: str = ALGORITHM) -> str:
    """One hash of a checkpoint's names, shapes and dtypes and of the ends and the middle of every tensor.

    It tells checkpoints apart in a few thousand small reads, independently of layout and sharding. It does not
    prove that two are equal; hashes of whole tensors do.

    Args:
        without: canonical names of tensors whose contents do not count.
    """
    digest = new_digest(algorithm)
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(canonical_json([name, entry.dtype, list(entry.shape)]).encode())
        if name in without:
            continue
        starts = {entry.start, entry.start + (entry.nbytes // 2), max(entry.start, entry.end - SAMPLE)}
        for start in sorted(starts):
            sample = memoryview(bytearray(min(SAMPLE, entry.end - start)))
            checkpoint.read_into(entry, start, sample)
            digest.update(sample)
    return digest.hexdigest()
