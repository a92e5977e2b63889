"""An SAE's encoder made ready for sums over tokens: nothing of the size tokens x width outlives a tile.

A JumpReLU feature with threshold t >= 0 is t + relu(z - t) where z > t, so its sum over tokens is that of
relu(z - t) plus t for each time it fired. Hence ReLU and JumpReLU take the same passes over a tile that fits the
processor's caches: product, shift, relu, sum, maximum, count. Comparisons that make booleans, and products with them,
cost ten times as much per element on a CPU. Other architectures are encoded by SAELens.
"""

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from stethoscope.diagnosis.statistics import LayerStatistics

# Elements of a tile: on a CPU what a core's caches hold, on a GPU what keeps it busy.
TILE_TOKENS = {"cpu": 512, "cuda": 4096}
TILE_WIDTH = {"cpu": 1024, "cuda": 32768}
PLAIN = ("standard", "jumprelu")


class BlockSums:
    """Sums over the tokens of a block of documents, on the encoder's device until `freeze`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.fired = torch.zeros(width, dtype=torch.int64, device=device)
        self.maxima = torch.zeros(width, device=device)
        self.tokens = self.sinks = 0

    def add(self, part: slice, positive: Float[Tensor, "tokens part"], threshold: Tensor | None) -> None:
        """Add a tile of features ``part``, whose values are activations less ``threshold``; overwrites it."""
        sums = self.sums[part]
        sums += positive.sum(0)
        largest = positive.amax(0)
        fired = positive.gt_(0).sum(0).to(torch.int64)
        self.fired[part] += fired
        if threshold is not None:
            sums += threshold[part].double() * fired
            largest = torch.where(fired > 0, largest + threshold[part], 0.0)
        torch.maximum(self.maxima[part], largest, out=self.maxima[part])

    def freeze(self) -> LayerStatistics:
        """The block's statistics."""
        return LayerStatistics(
            sums=self.sums.cpu().numpy()[None],
            fired=self.fired.cpu().numpy()[None],
            maxima=self.maxima.cpu().numpy()[None],
            tokens=np.array([self.tokens]),
            sinks=np.array([self.sinks]),
        )


class Encoder:
    """One SAE, ready to be summed.

    Attributes:
        width: number of features.
        exact: whether activations are SAELens' own; else products are taken in ``dtype``, the rest in float32.
    """

    def __init__(self, sae: SAE, *, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = int(sae.cfg.d_sae), dtype, device
        self.exact = (
            sae.cfg.architecture() not in PLAIN
            or sae.cfg.normalize_activations != "none"
            or sae.cfg.reshape_activations != "none"
        )
        if self.exact:
            self._sae = sae.to(device=str(device))
            return
        weights = sae.W_enc.detach().float()
        shift = sae.b_enc.detach().float()
        if sae.cfg.apply_b_dec_to_input:
            shift = shift - sae.b_dec.detach().float() @ weights
        self._threshold: Tensor | None = None
        if sae.cfg.architecture() == "jumprelu":
            # activations are positive, so a negative threshold lets through what 0 does
            self._threshold = sae.threshold.detach().float().clamp(min=0).to(device)
            shift = shift - self._threshold.to(shift.device)
        self._shift = shift.to(device)
        step = TILE_WIDTH[device.type]
        self._parts = [
            (slice(start, start + part.shape[1]), part.to(device=device, dtype=dtype).contiguous())
            for start, part in zip(range(0, self.width, step), weights.split(step, 1), strict=True)
        ]
        # on a GPU it is large, and the allocator gives the same memory to one layer after another
        self._tile = self._new_tile() if device.type == "cpu" else None

    def add(self, hidden: Float[Tensor, "tokens d_in"], sums: BlockSums) -> None:
        """Add the activations of some tokens to a block's sums."""
        sums.tokens += len(hidden)
        for values in hidden.split(TILE_TOKENS[self.device.type]) if len(hidden) else ():
            if self.exact:
                sums.add(slice(None), self._sae.encode(values.to(self._sae.dtype)).float().clamp_(min=0), None)
                continue
            values, tile = values.to(self.dtype), self._tile or self._new_tile()
            for part, weights in self._parts:
                rows, columns = len(values), weights.shape[1]
                product, wide = (some[: rows * columns].view(rows, columns) for some in tile)
                torch.mm(values, weights, out=product)
                sums.add(part, wide.copy_(product).add_(self._shift[part]).relu_(), self._threshold)

    def _new_tile(self) -> tuple[Tensor, Tensor]:
        """Memory for a product and for its activations, which every tile uses again."""
        size = TILE_TOKENS[self.device.type] * min(TILE_WIDTH[self.device.type], self.width)
        return torch.empty(size, dtype=self.dtype, device=self.device), torch.empty(size, device=self.device)
