"""An SAE's encoder made ready for sums over tokens: nothing of the size tokens x width outlives a tile.

A JumpReLU feature with threshold t >= 0 is t + relu(z - t) where z > t, so its sum over tokens is that of
relu(z - t) plus t for each time it fired. Hence ReLU and JumpReLU take the same passes over a tile that fits the
processor's caches: product, shift, relu, sum, count. Comparisons that make booleans, and products with them,
cost ten times as much per element on a CPU. Other architectures are encoded by SAELens.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from stethoscope.diagnosis.peaks import BatchPeaks
from stethoscope.diagnosis.statistics import LayerStatistics
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.results.validation import Layers
from stethoscope.saes.activations import on_device
from stethoscope.saes.folder import SAEFolder
from stethoscope.saes.health import measure_health

# Elements of a tile: on a CPU what a core's caches hold, on a GPU what keeps it busy.
TILE_TOKENS = {"cpu": 512, "cuda": 4096}
TILE_WIDTH = {"cpu": 1024, "cuda": 32768}
PLAIN = ("standard", "jumprelu")
# SAELens encodes and decodes so many tokens at once; on a GPU several times their features has to fit beside the rest.
HEALTH_TOKENS = {"cpu": 4096, "cuda": 512}


class BlockSums:
    """Sums over the tokens of a block of documents, on the encoder's device until `freeze`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.fired = torch.zeros(width, dtype=torch.int64, device=device)
        self.tokens = self.sinks = 0

    def add(self, part: slice, positive: Float[Tensor, "tokens part"], threshold: Tensor | None) -> None:
        """Add a tile of features ``part``, whose values are activations less ``threshold``; overwrites it."""
        sums = self.sums[part]
        sums += positive.sum(0)
        fired = positive.gt_(0).sum(0).to(torch.int64)
        self.fired[part] += fired
        if threshold is not None:
            sums += threshold[part].double() * fired

    def freeze(self) -> LayerStatistics:
        """The block's statistics."""
        return LayerStatistics(
            sums=self.sums.cpu().numpy()[None],
            fired=self.fired.cpu().numpy()[None],
            tokens=np.array([self.tokens]),
            sinks=np.array([self.sinks]),
        )


class Encoder:
    """One SAE, ready to be summed.

    Attributes:
        width: number of features.
        threshold: what is subtracted from activations in tiles, if anything.
        exact: whether activations are SAELens' own; else products are taken in ``dtype``, the rest in float32.
    """

    def __init__(self, sae: SAE, *, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = int(sae.cfg.d_sae), dtype, device
        self.exact = (
            sae.cfg.architecture() not in PLAIN
            or sae.cfg.normalize_activations != "none"
            or sae.cfg.reshape_activations != "none"
        )
        self.threshold: Tensor | None = None
        if self.exact:
            self._sae = sae if sae.device == device else deepcopy(sae).to(device=str(device))
            return
        weights = sae.W_enc.detach().float()
        shift = sae.b_enc.detach().float()
        if sae.cfg.apply_b_dec_to_input:
            shift = shift - sae.b_dec.detach().float() @ weights
        if sae.cfg.architecture() == "jumprelu":
            # activations are positive, so a negative threshold lets through what 0 does
            self.threshold = sae.threshold.detach().float().clamp(min=0).to(device)
            shift = shift - self.threshold.to(shift.device)
        self._shift = shift.to(device)
        step = TILE_WIDTH[device.type]
        self._parts = [
            (slice(start, start + part.shape[1]), part.to(device=device, dtype=dtype).contiguous())
            for start, part in zip(range(0, self.width, step), weights.split(step, 1), strict=True)
        ]
        # on a GPU it is large, and the allocator gives the same memory to one layer after another
        self._tile = self._new_tile() if device.type == "cpu" else None

    def add(self, hidden: Float[Tensor, "tokens d_in"], sums: BlockSums, peaks: BatchPeaks | None = None) -> None:
        """Add the activations of some tokens to a block's sums, and where they are strongest to a batch's peaks."""
        sums.tokens += len(hidden)
        step = TILE_TOKENS[self.device.type]
        for first in range(0, len(hidden), step):
            for part, positive in self._tiles(hidden[first : first + step]):
                if peaks:
                    peaks.add(part, positive, first)
                sums.add(part, positive, self.threshold)

    def _tiles(self, values: Float[Tensor, "tokens d_in"]) -> Iterator[tuple[slice, Float[Tensor, "tokens part"]]]:
        """Activations less the threshold, of some features at a time, in memory that the next overwrite."""
        if self.exact:
            yield slice(None), self._sae.encode(values.to(self._sae.dtype)).float().clamp_(min=0)
            return
        values, tile = values.to(self.dtype), self._tile or self._new_tile()
        for part, weights in self._parts:
            rows, columns = len(values), weights.shape[1]
            product, wide = (some[: rows * columns].view(rows, columns) for some in tile)
            torch.mm(values, weights, out=product)
            yield part, wide.copy_(product).add_(self._shift[part]).relu_()

    def _new_tile(self) -> tuple[Tensor, Tensor]:
        """Memory for a product and for its activations, which every tile uses again."""
        size = TILE_TOKENS[self.device.type] * min(TILE_WIDTH[self.device.type], self.width)
        return torch.empty(size, dtype=self.dtype, device=self.device), torch.empty(size, device=self.device)


def layer_groups(sizes: Mapping[int, int], memory: int | None = None) -> tuple[Layers, ...]:
    """The layers in order of depth, in groups whose bytes fit in memory; each group has one at least."""
    groups, used = list[list[int]](), 0
    for layer, size in sorted(sizes.items()):
        if not groups or (memory is not None and used + size > memory):
            groups, used = [*groups, []], 0
        groups[-1].append(layer)
        used += size
    return tuple(map(tuple, groups))


def encoder_bytes(sae: SAE | SAEFolder, dtype: torch.dtype) -> int:
    """Of an encoder; where SAELens encodes itself, of the whole SAE in float32."""
    if isinstance(sae, SAEFolder):
        architecture, size, scale = sae.architecture, sae.width * sae.d_in, sae.options.get("normalize_activations")
    else:
        architecture, size, scale = sae.cfg.architecture(), sae.W_enc.numel(), sae.cfg.normalize_activations
    plain = architecture in PLAIN or architecture.endswith("batchtopk")  # which is read as a JumpReLU
    plain = plain and scale not in ("layer_norm", "constant_norm_rescale")
    return size * (dtype.itemsize if plain else 2 * torch.float32.itemsize)


def sae_health(sae: SAE, encoder: Encoder, sample: Float[Tensor, "tokens d_in"] | None) -> SAEHealth:
    """An SAE on a sample, and how far the encoder's activation mass lies from SAELens' own in float32."""
    if sample is None or not len(sample) or getattr(sae.cfg.metadata, "hook_name_out", None):
        # a transcoder does not reconstruct what it reads
        return SAEHealth(tokens=0, variance_explained=None, l0=None, dead=None, dense=None)
    with on_device(sae, sample.device):
        exact = measure_health(sae, sample, chunk=HEALTH_TOKENS[sample.device.type])
    fast = BlockSums(encoder.width, sample.device)
    encoder.add(sample, fast)
    shares = [sums.double() / sums.double().sum() for sums in (exact.mass, fast.sums)]
    error = float((shares[0] - shares[1]).abs().sum() / 2)
    return replace(exact.health(), encoding_error=error if np.isfinite(error) else None)
