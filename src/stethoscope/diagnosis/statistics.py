"""Feature statistics: sums over blocks of documents, which any number of workers can gather and merge.

A block is what a permutation test relabels and a bootstrap draws, because tokens of one document are not
independent. Blocks never share a batch, so a block's sums do not depend on what else was listened to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stethoscope.errors import StethoscopeError

_NAMES = ("sums", "fired", "maxima", "tokens", "sinks")


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One layer's feature statistics on one corpus.

    Attributes:
        sums: sum of each feature's activation over a block's counted tokens.
        fired: number of a block's counted tokens on which each feature is active.
        maxima: each feature's largest activation in a block.
        tokens: a block's counted tokens, special and sink tokens left out.
        sinks: tokens of a block left out because their norm marks them as attention sinks.
    """

    sums: Float64[ndarray, "blocks width"]
    fired: Int64[ndarray, "blocks width"]
    maxima: Float32[ndarray, "blocks width"]
    tokens: Int64[ndarray, " blocks"]
    sinks: Int64[ndarray, " blocks"]

    @property
    def mean(self) -> Float[ndarray, " width"]:
        """Mean activation per counted token; a in the formulas."""
        return self.sums.sum(0) / self.tokens.sum()

    @property
    def rate(self) -> Float[ndarray, " width"]:
        """Share of counted tokens on which each feature fires; p in the formulas."""
        return self.fired.sum(0) / self.tokens.sum()

    @property
    def mass(self) -> Float[ndarray, " width"]:
        """Each feature's share of the layer's activation mass; m in the formulas. All 0 where nothing fires."""
        total = self.sums.sum()
        return self.sums.sum(0) / total if total > 0 else np.zeros(self.sums.shape[1])

    def toward(self, control: "LayerStatistics") -> Int64[ndarray, " width"]:
        """The features in order of how much larger their share of mass is here than on a control, largest first."""
        return np.argsort(control.mass - self.mass, kind="stable")


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """What every layer's features did on one corpus; ``layers`` is in ascending order."""

    layers: Mapping[int, LayerStatistics]

    @property
    def blocks(self) -> int:
        """How many blocks of documents there are."""
        return len(next(iter(self.layers.values())).tokens)

    @classmethod
    def merge(cls, parts: Sequence["FeatureStatistics"]) -> "FeatureStatistics":
        """Join the blocks of several parts, in the order given.

        Raises:
            StethoscopeError: the parts listened to different layers.
        """
        layers = list(parts[0].layers)
        if any(list(part.layers) != layers for part in parts):
            raise StethoscopeError("statistics of different layers cannot be merged")
        return cls(
            layers={
                layer: LayerStatistics(
                    **{n: np.concatenate([getattr(part.layers[layer], n) for part in parts]) for n in _NAMES}
                )
                for layer in layers
            }
        )

    def regroup(self, groups: Sequence[Int64[ndarray, " group"]]) -> "FeatureStatistics":
        """New blocks, each the sum of some of these; blocks may be left out.

        Listening with a block per document and grouping afterwards gives the blocks of any split of the documents.
        """

        def gathered(layer: LayerStatistics) -> LayerStatistics:
            sums = {n: np.stack([getattr(layer, n)[group].sum(0) for group in groups]) for n in _NAMES if n != "maxima"}
            maxima = np.stack([layer.maxima[group].max(0) for group in groups])
            return LayerStatistics(maxima=maxima, **sums)

        return FeatureStatistics(layers={n: gathered(layer) for n, layer in self.layers.items()})


class StatisticsTable:
    """The statistics of so many blocks, filled in block by block in any order; takes no memory beside them."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.layers: dict[int, LayerStatistics] = {}

    def put(self, number: int, block: FeatureStatistics) -> None:
        """Copy one block's statistics of some layers to its place."""
        for layer, found in block.layers.items():
            if layer not in self.layers:
                arrays = {n: getattr(found, n) for n in _NAMES}
                self.layers[layer] = LayerStatistics(
                    **{n: np.zeros((self.blocks, *array.shape[1:]), array.dtype) for n, array in arrays.items()}
                )
            for name in _NAMES:
                getattr(self.layers[layer], name)[number] = getattr(found, name)[0]


def save_statistics(path: Path, corpora: Mapping[str, FeatureStatistics]) -> None:
    """Write the statistics of named corpora to one safetensors file."""
    save_file(
        {
            f"{corpus}.{layer}.{name}": np.ascontiguousarray(getattr(statistics, name))
            for corpus, features in corpora.items()
            for layer, statistics in features.layers.items()
            for name in _NAMES
        },
        path,
    )
    path.chmod(0o644)  # safetensors lets nobody but the user read what it writes


def load_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """Read what `save_statistics` wrote.

    Raises:
        StethoscopeError: the file is missing or damaged.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StethoscopeError(f"the statistics `{path}` cannot be read: {error}") from error
    places = sorted({(corpus, int(layer)) for corpus, layer, _ in (key.rsplit(".", 2) for key in arrays)})
    return {
        corpus: FeatureStatistics(
            layers={
                layer: LayerStatistics(**{n: arrays[f"{corpus}.{layer}.{n}"] for n in _NAMES})
                for found, layer in places
                if found == corpus
            }
        )
        for corpus in {corpus for corpus, _ in places}
    }
