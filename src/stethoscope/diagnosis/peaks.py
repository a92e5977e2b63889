"""Peaks: in which documents each feature is strongest, and on which token; what evidence shows.

They are found in the tiles that are summed, so that no text is read and no SAE is loaded a second time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32
from numpy import ndarray
from torch import Tensor

KEPT = 8  # documents of each feature: more than are shown, for those of equal wording are shown once
DOCUMENTS = 64  # of each corpus are searched, from the top; their places share 64 bits with feature and activation
_FAR = 1e30


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """One layer's strongest activations on one corpus: of each feature in `KEPT` documents at most, once in each.

    They are in the order of features, and of one feature the strongest first, of equal ones the first document's. A
    feature takes 128 bytes at most: 2 MB for 16,384 features, 34 MB for 262,144.

    Attributes:
        documents: places in the corpus.
        tokens: places among a document's token ids.
    """

    features: Int32[ndarray, " peaks"]
    documents: Int32[ndarray, " peaks"]
    tokens: Int32[ndarray, " peaks"]
    activations: Float32[ndarray, " peaks"]

    @classmethod
    def strongest(cls, parts: Sequence["Peaks"]) -> "Peaks":
        """Those of parts with other documents that are to be kept, the same in whatever order the parts are."""
        columns = {one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls)}
        # one number to sort by is many times as fast as three; the bits of positive floats are in their order
        bits = np.uint64(0x7FFFFFFF) - columns["activations"].view(np.uint32)
        features, documents = (columns[name].astype(np.uint64) for name in ("features", "documents"))
        order = np.argsort(features << np.uint64(41) | bits << np.uint64(10) | documents)
        first = np.flatnonzero(np.diff(columns["features"][order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        return cls(**{name: column[order[rank < KEPT]] for name, column in columns.items()})

    def of(self, feature: int) -> "Peaks":
        """One feature's."""
        some = slice(*np.searchsorted(self.features, [feature, feature + 1]))
        return Peaks(**{one.name: getattr(self, one.name)[some] for one in fields(self)})


class BatchPeaks:
    """Each feature's strongest activation in each document of a batch, while tiles of its tokens come by.

    Args:
        spans: by a document's place in the corpus, its tokens among those of the batch.
    """

    def __init__(self, spans: Mapping[int, range], width: int, device: torch.device) -> None:
        self.spans = spans
        self.largest = torch.zeros(len(spans), width, device=device)
        self.tokens = torch.zeros(len(spans), width, device=device)  # exact up to 2^24

    def add(self, part: slice, values: Float[Tensor, "tokens part"], first: int) -> None:
        """Look at a tile: the activations of features ``part`` on the tokens from ``first`` on, less a threshold."""
        places = torch.arange(first, first + len(values), dtype=torch.float32, device=values.device)[:, None]
        for n, span in enumerate(self.spans.values()):
            rows = slice(max(span.start - first, 0), max(span.stop - first, 0))
            if len(places[rows]):
                largest = values[rows].amax(0)
                # An index from `max` costs a CPU ten times as much: here the largest is 0 and all others are far below.
                token = -torch.sub(-places[rows], largest - values[rows], alpha=_FAR).amax(0)
                self.tokens[n, part] = torch.where(largest > self.largest[n, part], token, self.tokens[n, part])
                torch.maximum(self.largest[n, part], largest, out=self.largest[n, part])

    def freeze(self, threshold: Tensor | None, places: Int[Tensor, " tokens"]) -> Peaks:
        """What was found, not in order.

        Args:
            places: of the batch's tokens among the ids of their documents.
        """
        document, feature = self.largest.nonzero(as_tuple=True)
        found = self.largest[document, feature]
        if threshold is not None:
            found = found + threshold[feature]
        tokens = places.to(self.tokens.device)[self.tokens[document, feature].long()]
        return Peaks(
            features=feature.cpu().numpy().astype(np.int32),
            documents=np.array(list(self.spans), dtype=np.int32)[document.cpu().numpy()],
            tokens=tokens.cpu().numpy().astype(np.int32),
            activations=found.cpu().numpy(),
        )
