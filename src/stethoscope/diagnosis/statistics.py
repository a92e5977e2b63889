"""Feature statistics: sums over blocks of documents, which any number of workers can compute in any order.

A block is what a permutation test relabels and a bootstrap draws, because tokens of one document are not
independent. Blocks never share a batch, so a block's sums do not depend on the other blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stethoscope.artifacts import new_file
from stethoscope.errors import StethoscopeError

Found = TypeVar("Found", bound=Any)
_NAMES = ("sums", "fired", "tokens", "sinks")


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One layer's feature statistics on one corpus.

    Attributes:
        sums: sum of each feature's activation over a block's counted tokens.
        fired: number of a block's counted tokens on which each feature is active.
        tokens: a block's counted tokens, special and sink tokens left out.
        sinks: tokens of a block left out because their norm marks them as attention sinks.
    """

    sums: Float64[ndarray, "blocks width"]
    fired: Int64[ndarray, "blocks width"]
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
    """Every layer's feature statistics on one corpus; ``layers`` is in ascending order."""

    layers: Mapping[int, LayerStatistics]

    @classmethod
    def zeros(cls, widths: Mapping[int, int], blocks: int) -> "FeatureStatistics":
        """Zeros for so many blocks, to be filled by `put`; ``widths`` are numbers of features by layer."""
        return cls(
            layers={
                layer: LayerStatistics(
                    sums=np.zeros((blocks, width)),
                    fired=np.zeros((blocks, width), dtype=np.int64),
                    tokens=np.zeros(blocks, dtype=np.int64),
                    sinks=np.zeros(blocks, dtype=np.int64),
                )
                for layer, width in sorted(widths.items())
            }
        )

    @property
    def blocks(self) -> int:
        """Number of blocks of documents."""
        return len(next(iter(self.layers.values())).tokens)

    def put(self, number: int, block: "FeatureStatistics") -> None:
        """Copy one block's statistics of some layers to its place."""
        for layer, found in block.layers.items():
            for name in _NAMES:
                getattr(self.layers[layer], name)[number] = getattr(found, name)[0]

    def regroup(self, groups: Sequence[Int64[ndarray, " group"]]) -> "FeatureStatistics":
        """New blocks, each the sum of some of these; blocks may be left out.

        Statistics with a block per document give those of any split of the documents.
        """

        def gathered(layer: LayerStatistics) -> LayerStatistics:
            return LayerStatistics(**{n: np.stack([getattr(layer, n)[g].sum(0) for g in groups]) for n in _NAMES})

        return FeatureStatistics(layers={n: gathered(layer) for n, layer in self.layers.items()})


def save_layers(path: Path, corpora: Mapping[str, Mapping[int, Any]]) -> None:
    """Write what was found by corpus and layer, dataclasses of arrays, to one safetensors file."""
    arrays = {
        f"{corpus}.{layer}.{one.name}": np.ascontiguousarray(getattr(found, one.name))
        for corpus, layers in corpora.items()
        for layer, found in layers.items()
        for one in fields(found)
    }
    with new_file(path) as temporary:
        save_file(arrays, temporary)


def load_layers(path: Path, kind: type[Found]) -> dict[str, dict[int, Found]]:
    """Read what `save_layers` wrote, in order of layers; ``kind`` is the dataclass. Arrays that it lacks are left out.

    Raises:
        StethoscopeError: the file is missing or damaged.
    """
    known = {one.name for one in fields(kind)}
    corpora: dict[str, dict[int, dict[str, ndarray]]] = {}
    try:
        for key, array in load_file(path).items():
            corpus, layer, name = key.rsplit(".", 2)
            if name in known:
                corpora.setdefault(corpus, {}).setdefault(int(layer), {})[name] = array
        return {corpus: {n: kind(**found) for n, found in sorted(layers.items())} for corpus, layers in corpora.items()}
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise StethoscopeError(f"the {path.stem} `{path}` cannot be read: {error}") from error


def load_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """Read the statistics of corpora that `save_layers` wrote.

    Raises:
        StethoscopeError: the file is missing or damaged.
    """
    return {name: FeatureStatistics(layers=layers) for name, layers in load_layers(path, LayerStatistics).items()}
