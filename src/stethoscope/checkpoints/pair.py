"""What base and tuned have in common, tensor by tensor, and what an edit leaves of the rest as the base has it."""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from jaxtyping import Float32

from stethoscope.checkpoints.checkpoint import Checkpoint, config_value, is_copy
from stethoscope.checkpoints.config import config_notes
from stethoscope.checkpoints.files import read_json_object
from stethoscope.checkpoints.header import DTYPES, Entry
from stethoscope.checkpoints.names import VOCABULARY
from stethoscope.errors import CheckpointError

# Heads are cut out of matrices whose shapes do not show how: a difference here would pass every check of shapes.
HEADS = (("num_attention_heads", "n_head"), ("num_key_value_heads", "num_kv_heads"), ("head_dim",))
ROUNDED = {("F32", "BF16"), ("F32", "F16"), ("F16", "BF16")}  # types of base and tuned
SAMPLE = 4096  # elements of each tensor
RENUMBERED = 0.01  # share of the base's tokens that may have other numbers in tuned: some tokens are moved on purpose


def match(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, str], dict[str, int], tuple[str, ...]]:
    """Match a full checkpoint's tensors with the base's, and cut its vocabulary to the base's rows.

    A vision tower may be missing on either side, and so may constants and a tied head's copy. What predicts tokens
    further ahead is left as the base has it.

    Returns:
        own, rows and notes, as `TaskVector` has them.

    Raises:
        CheckpointError: with every tensor that is missing, extra or of another shape.
    """
    head, embedding = "lm_head.weight", "embed_tokens.weight"
    problems, says_tied = [], config_value(tuned.config, "tie_word_embeddings")
    for keys in HEADS:
        one, two = config_value(base.config, *keys), config_value(tuned.config, *keys)
        if one is not None and two is not None and one != two:
            problems.append(f"`{keys[0]}` is {one} in `{base.source}`, {two} in `{tuned.source}`")
    if base.layers != tuned.layers:
        problems.append(f"`{base.source}` has {base.layers} layers, `{tuned.source}` {tuned.layers}")
    # in order: the first is named
    ahead = {entry.stored: None for one in (base, tuned) for entry in one.entries.values() if one.predicts_ahead(entry)}
    for name, entry in tuned.entries.items():
        if name in base.entries or entry.kind in ("buffer", "vision") or entry.stored in ahead:
            continue
        if name != head or not is_copy(tuned, head, embedding):
            problems.append(f"`{entry.stored}` of `{tuned.source}` is missing in `{base.source}`")
    own: dict[str, str] = {}
    rows: dict[str, int] = {}
    for name, entry in base.entries.items():
        tied = name == head and name not in tuned.entries and (base.tied or says_tied)
        other = tuned.entries.get(embedding if tied else name)
        if entry.kind == "buffer" or (other is None and entry.kind == "vision") or entry.stored in ahead:
            continue
        if other is None:
            problems.append(f"`{entry.stored}` is missing in `{tuned.source}`")
        elif not fits(entry, other.shape):
            shapes = f"{list(entry.shape)} in `{base.source}`, {list(other.shape)} in `{tuned.source}`"
            problems.append(f"`{entry.stored}` is {shapes}")
        else:
            own[name] = other.name
            if other.shape != entry.shape:
                rows[name] = other.shape[0]
    for name in rows:  # after all are compared: a head and an embedding may be one tensor of tuned's
        tuned.entries[own[name]] = tuned.entries[own[name]].first_rows(base.entries[name].shape[0])
    if not problems and rows:
        problems += _renumbered(base, tuned)
    if problems:
        raise CheckpointError(
            f"`{tuned.source}` is not a fine-tune of `{base.source}` as it stands",
            problems=problems,
            hint="base and tuned must be the same architecture, and number the tokens that both have alike",
        )
    notes = (*vocabulary_notes(base, tuned.source, rows), *config_notes(base.config, tuned.config))
    if ahead:
        notes += (f"what predicts tokens further ahead stays the base's, such as `{next(iter(ahead))}`",)
    return own, rows, notes + rounding_notes(base, tuned, own)


def fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of tuned's can stand for the base's: of a vocabulary, more or fewer rows can."""
    return entry.shape == shape or (
        entry.name in VOCABULARY and len(shape) == len(entry.shape) and entry.shape[1:] == shape[1:] and 0 not in shape
    )


def vocabulary_notes(base: Checkpoint, tuned: str, rows: Mapping[str, int]) -> tuple[str, ...]:
    """What is said of a fine-tune whose vocabulary has another number of rows, by name of the tensor."""
    return tuple(
        f"`{tuned}` has {abs(number - own)} rows {'more' if number > own else 'fewer'} than `{base.source}` in its"
        f" vocabulary ({number}, not {own}): {'they are left out' if number > own else 'the others stay as they are'},"
        " and an edit has the base's vocabulary and tokenizer"
        f"{'; `stethoscope extend-vocabulary` gives the base these rows' if number > own else ''}"
        for number, own in sorted({(number, base.entries[name].shape[0]) for name, number in rows.items()})
    )


def rounding_notes(base: Checkpoint, tuned: Checkpoint, own: Mapping[str, str]) -> tuple[str, ...]:
    """What is said of a tuned that was rounded to a coarser type: how much of the change that makes, by a sample."""
    both = [(base.entries[name], tuned.entries[other]) for name, other in own.items()]
    both = [(one, two) for one, two in both if (one.dtype, two.dtype) in ROUNDED]
    if not both:
        return ()
    rounding = change = 0.0
    # of a checkpoint on the hub only the headers are here; NaN is found by what reads all of a tensor
    with suppress(CheckpointError), np.errstate(all="ignore"):
        for one, two in both:
            before, after = _sample(base, one), _sample(tuned, two)
            size = min(len(before), len(after))
            rounding += float(np.square(_round(before, two.dtype) - before)[:size].sum())
            change += float(np.square(after[:size] - before[:size]).sum())
    share = f"about {min(100, 100 * rounding / change):.0f} %" if 0 < change < np.inf else "an unknown share"
    return (
        f"`{tuned.source}` was rounded to {both[0][1].dtype}, `{base.source}` is {both[0][0].dtype}: {share} of the"
        " change's energy is rounding, and every layer counts as changed",
    )


def _sample(checkpoint: Checkpoint, entry: Entry) -> Float32[np.ndarray, " n"]:
    """The first elements of a tensor."""
    data = bytearray(min(entry.nbytes, SAMPLE * DTYPES[entry.dtype].bits // 8))
    checkpoint.read_into(entry, entry.start, memoryview(data))
    if entry.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[entry.dtype]).astype("<f4")


def _round(values: Float32[np.ndarray, " n"], dtype: str) -> Float32[np.ndarray, " n"]:
    if dtype == "F16":
        return values.astype("<f2").astype("<f4")
    bits = values.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype("<u4").view("<f4")  # to even


def _renumbered(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """The problem that tuned numbers its tokens otherwise, so that a row of the one is no row of the other."""
    one, two = _numbers(base), _numbers(tuned)
    moved = [token for token, number in one.items() if two.get(token, number) != number]
    if len(moved) <= RENUMBERED * len(one):
        return []
    return [f"{len(moved)} of {len(one)} tokens have other numbers in `{tuned.source}`, for instance `{moved[0]}`"]


def _numbers(checkpoint: Checkpoint) -> dict[str, int]:
    """The number of each token by tokenizer.json; empty where there is none, or none that says."""
    path = checkpoint.path / "tokenizer.json"
    model = read_json_object(path, hint="fetch the tokenizer again").get("model") if path.is_file() else None
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):  # of Unigram: [token, score]
        return {str(pair[0]): number for number, pair in enumerate(listed) if isinstance(pair, list) and pair}
    return listed if isinstance(listed, dict) else {}
