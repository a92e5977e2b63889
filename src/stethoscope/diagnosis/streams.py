"""What travels where one forward feeds several groups of layers: batches of text, and residual streams."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from torch import Tensor

from stethoscope.results.hearing import Layers
from stethoscope.text.documents import Document
from stethoscope.text.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A batch to be forwarded for groups of layers on any workers: a block's first, or one of those that it gave.

    Attributes:
        documents: of a block.
        batch: if not its first.
    """

    groups: tuple[Layers, ...]
    documents: Mapping[int, Document] = field(default_factory=dict)
    batch: TokenBatch | None = None


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A block whose first batch has been forwarded.

    Attributes:
        batches: the others.
        silent: how many of its documents have no token that counts.
    """

    batches: tuple[TokenBatch, ...]
    silent: int


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What some layers' SAEs read on a batch's tokens that count.

    Attributes:
        values: by layer, as bytes: NumPy has no bfloat16, and Ray maps arrays without copying them.
        dtypes: by layer, of the values.
        sinks: tokens left out.
    """

    values: Mapping[int, UInt8[ndarray, "tokens bytes"]]
    dtypes: Mapping[int, torch.dtype]
    sinks: int

    @classmethod
    def of(
        cls,
        heard: Mapping[int, Float[Tensor, "rows tokens d_in"]],
        counted: Bool[Tensor, "rows tokens"],
        sinks: int,
    ) -> "Streams":
        """From a model's device, layer by layer."""
        return cls(
            values={layer: some[counted].cpu().contiguous().view(torch.uint8).numpy() for layer, some in heard.items()},
            dtypes={layer: some.dtype for layer, some in heard.items()},
            sinks=sinks,
        )

    def of_layer(self, layer: int, device: torch.device) -> Float[Tensor, "tokens d_in"]:
        """On the device of whoever reads, as it was."""
        # a copy: what is mapped cannot be written to, and may lie where products take another path
        return torch.tensor(self.values[layer]).view(self.dtypes[layer]).to(device)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Streams to be read by the SAEs of some layers; ``last`` if they are those of a block's last batch."""

    layers: Layers
    last: bool
