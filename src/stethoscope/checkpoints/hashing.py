"""Hashes of tensors and of whole checkpoints: BLAKE3, as strong as SHA-256 and fast enough to hide behind a copy."""

from blake3 import blake3

from stethoscope.artifacts import canonical_json
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.header import Entry

ALGORITHM = "blake3"  # kept in every manifest
SAMPLE = 4096


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
        starts = {entry.start, entry.start + (entry.nbytes // 2), max(entry.start, entry.end - SAMPLE)}
        for start in sorted(starts):
            sample = memoryview(bytearray(min(SAMPLE, entry.end - start)))
            checkpoint.read_into(entry, start, sample)
            digest.update(sample)
    return digest.hexdigest()
