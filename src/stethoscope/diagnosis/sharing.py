"""What workers share of the listening, by arithmetic: documents, or groups of layers, and then what moves between them.

A document's activations have to reach all groups of layers. Either each group's workers forward the text themselves, or
one forward per batch feeds all of them, and its residual streams travel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens import SAE
from transformers import PreTrainedModel

from stethoscope.diagnosis.encoding import PLAIN
from stethoscope.errors import StethoscopeError
from stethoscope.models.load import decoder_layers
from stethoscope.saes.open import SAEFolder
from stethoscope.work import Means

Split = Literal["auto", "documents", "layers", "streams"]
Layers = tuple[int, ...]

# The rule's constants. They need only be right to a factor of a few: on a CPU the two ways lie 70 times apart.
FLOPS = {
    "cpu": 1e11,  # a second and thread: SmolLM2-135M, 0.2 GFLOP a token, takes 2 ms
    "cuda": 2e14,  # a second and GPU: what large products reach on an A100 or H100 in bfloat16
}
BANDWIDTH = 1.25e9  # bytes a second from worker to worker: 10 Gb/s; on one machine the object store is hardly faster
BATCH_TOKENS = 4096  # of a forward, padding included; a document that is longer by itself has its own
STORE_SHARE = 0.5  # of a machine's object store for streams on their way; the rest is for what else Ray keeps there
OPEN_BLOCKS = 2  # for each worker that are under way, a batch of each: one is forwarded while another is read
SUMS_BYTES = 8 + 8 + 4  # of a feature of a block: sum, count, maximum


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What workers share.

    Attributes:
        groups: of layers whose encoders are in a worker's memory together.
        way: ``documents``: all workers go through one group after another; ``layers``: a worker keeps to a group, and
            forwards the text for it; ``streams``: it is given the streams.
        said: one sentence on it, and why.
        blocks: that may be under way at once where streams move.
    """

    groups: tuple[Layers, ...]
    way: Literal["documents", "layers", "streams"]
    said: str
    blocks: int


def share(
    model: PreTrainedModel,
    saes: Mapping[int, SAE | SAEFolder],
    means: Means,
    *,
    dtype: torch.dtype,
    memory: int | None,
    split: Split,
    max_tokens: int,
) -> Sharing:
    """What workers share in `stethoscope.diagnosis.listen.listen`, which see for the arguments.

    Raises:
        StethoscopeError: streams are asked for, and a batch's do not fit in a machine's object store.
    """
    groups = _groups(saes, dtype, memory, means.workers if split in ("layers", "streams") else 1)
    token = sum(_d_in(sae) for sae in saes.values()) * model.dtype.itemsize
    batch = token * max(BATCH_TOKENS, max_tokens)
    # while a batch is read, its block has the sums before it and those with it
    block = batch + 2 * SUMS_BYTES * sum(_width(sae) for sae in saes.values())
    room = None if means.store is None else int(means.store * STORE_SHARE / block)
    blocks = OPEN_BLOCKS * means.workers if room is None else min(OPEN_BLOCKS * means.workers, room)
    moved, again = token_seconds(
        forwards=len(groups),
        waves=len(waves(groups, means.workers)),
        flop=2.0 * _parameters(model, max(saes)),
        flops=FLOPS[means.device] * means.share,
        stream_bytes=float(token),
    )
    costs = f"{1000 * moved:.2g} ms a token where its streams move, {token / 1e3:.3g} kB, {1000 * again:.2g} ms if not"
    way: Literal["documents", "layers", "streams"]
    if split == "documents" or len(groups) == 1:
        way = "documents"
    elif split == "layers" or means.workers == 1 or (split == "auto" and (moved >= again or not blocks)):
        way = "layers"
    else:
        way = "streams"
    if way == "streams" and not blocks:
        raise StethoscopeError(
            f"the streams of a batch, {block / 1e9:.2f} GB, do not fit in the object store",
            problems=[f"{STORE_SHARE:.0%} of the smallest machine's: {STORE_SHARE * (means.store or 0) / 1e9:.2f} GB"],
            hint="a larger store, a smaller `max_tokens`, or `split: layers`, which forwards the text for each group",
        )
    how = {
        "documents": f"all go through {len(groups)} groups of layers, one after another",
        "layers": f"{len(groups)} groups of layers, each kept by a worker while there is work for it, and forwarded for"
        f" each again: {costs}",
        "streams": f"{len(groups)} groups of layers, each kept by a worker while there is work for it, and one forward"
        f" feeds {'all' if len(groups) <= means.workers else f'{means.workers} of them'}: {costs}",
    }[way]
    if way == "layers" and not blocks:
        how += f", and a batch's, {block / 1e9:.2f} GB, do not fit in the object store"
    if len(groups) == 1:
        how = "each holds all and hears a part of the documents"
    size = sum(_bytes(sae, dtype) for sae in saes.values()) / 1e9
    limit = "no limit" if memory is None else f"room for {memory / 1e9:.2f} GB"
    said = f"{means.workers} workers, encoders of {size:.2f} GB, {limit} on each: {how}"
    return Sharing(groups=groups, way=way, said=said, blocks=max(blocks, 1))


def token_seconds(*, forwards: int, waves: int, flop: float, flops: float, stream_bytes: float) -> tuple[float, float]:
    """Seconds of a worker that a token costs beside its encoding: if its streams move, and if each group forwards it.

    Args:
        forwards: how many groups of layers there are.
        waves: how often a token is forwarded though its streams move: as many groups as workers are fed at once.
        flop: of a token's forward.
        flops: of a worker in a second.
        stream_bytes: of a token at the layers that listen.
    """
    forward = flop / flops
    return waves * forward + stream_bytes / BANDWIDTH, forwards * forward


def waves(groups: tuple[Layers, ...], workers: int) -> list[tuple[Layers, ...]]:
    """The groups that are fed at once: one for a worker, so that each SAE is read about once."""
    return [groups[start : start + workers] for start in range(0, len(groups), workers)]


def _groups(
    saes: Mapping[int, SAE | SAEFolder], dtype: torch.dtype, memory: int | None, least: int
) -> tuple[Layers, ...]:
    """The layers in order of depth, cut where the next encoder would not fit; each group has one at least.

    Args:
        least: so many groups, of about as many bytes each, if there are as many layers.
    """
    sizes = {layer: _bytes(sae, dtype) for layer, sae in sorted(saes.items())}
    share = -(-sum(sizes.values()) // max(least, 1))
    limit = share if memory is None else min(memory, share)
    groups: list[list[int]] = [[]]
    used = 0
    for layer, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return tuple(tuple(group) for group in groups)


def _bytes(sae: SAE | SAEFolder, dtype: torch.dtype) -> int:
    """Of an encoder; where SAELens encodes itself, of the whole SAE in float32."""
    values = _width(sae) * _d_in(sae)
    architecture = sae.architecture if isinstance(sae, SAEFolder) else sae.cfg.architecture()
    plain = architecture in PLAIN or architecture.endswith("batchtopk")  # which is read as a JumpReLU
    return values * dtype.itemsize if plain else 2 * values * torch.float32.itemsize


def _width(sae: SAE | SAEFolder) -> int:
    return sae.width if isinstance(sae, SAEFolder) else int(sae.cfg.d_sae)


def _d_in(sae: SAE | SAEFolder) -> int:
    return sae.d_in if isinstance(sae, SAEFolder) else int(sae.cfg.d_in)


def _parameters(model: PreTrainedModel, last: int) -> int:
    """Of the blocks up to the last that an SAE reads; all experts of a mixture, of which a token uses some."""
    blocks = decoder_layers(model)[: last + 1]
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
