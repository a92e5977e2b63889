"""What hears: a model, and the encoders of some of its layers; documents in, sums and SAE health out.

Documents that are heard together are forwarded on their own, so their sums are the same whoever computes them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.diagnosis.encoding import BlockSums, Encoder
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.errors import SAEError
from stethoscope.models.sites import HookPoint, hook_point, read_activations
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.results.validation import Layers
from stethoscope.saes.activations import attention_sinks, on_device
from stethoscope.saes.health import measure_health
from stethoscope.saes.open import SAEFolder, load_sae
from stethoscope.text.documents import Document
from stethoscope.text.tokens import TokenBatch, Tokens, batches, counted_tokens, tokenize

log = logging.getLogger(__name__)

# SAELens encodes and decodes so many tokens at once; on a GPU several times their features has to fit beside the rest.
HEALTH_TOKENS = {"cpu": 4096, "cuda": 512}
BATCH_TOKENS = 4096  # of a forward, padding included; a document that is longer by itself has its own

Heard = dict[int, Float[Tensor, "tokens d_in"]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Documents to be heard together, by their place in the corpus, and the layers whose SAEs listen."""

    layers: tuple[int, ...]
    documents: Mapping[int, Document]


@dataclass(frozen=True, kw_only=True)
class HeardBlock:
    """What was heard of a block.

    Attributes:
        statistics: of the documents that could be heard; None if there are none.
        places: theirs.
        silent: how many of them have no token that counts.
        broken: the documents that could not be heard, and why.
    """

    statistics: FeatureStatistics | None
    places: frozenset[int] = frozenset()
    silent: int = 0
    broken: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first documents of every corpus, on about so many tokens of which some layers' SAEs are examined."""

    layers: tuple[int, ...]
    documents: Mapping[str, Sequence[Document]]
    tokens: int


class Listener:
    """A model with ears. The encoders of the layers last asked for stay loaded."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        saes: Mapping[int, SAE | SAEFolder],
        site: str,
        max_tokens: int,
        tokens: Tokens,
        dtype: torch.dtype,
    ) -> None:
        """As `stethoscope.diagnosis.listen.listen`, which see."""
        self.model, self.tokenizer, self.saes = model, tokenizer, saes
        self.max_tokens, self.tokens, self.dtype = max_tokens, tokens, dtype
        # all layers, also while few of them listen: a sink in any of them is left out of each
        self.points = {layer: point_of(model, layer, saes[layer], site) for layer in sorted(saes)}
        self._encoders: dict[int, Encoder] = {}

    def attend(self, work: Block | Sample) -> HeardBlock | dict[str, dict[int, SAEHealth]]:
        """Hear a block, or examine SAEs."""
        return self.hear(work) if isinstance(work, Block) else self.examine(work)

    @torch.inference_mode()
    def hear(self, block: Block) -> HeardBlock:
        """A block's statistics; the documents that cannot be heard are left out and named.

        Raises:
            SAEError: an SAE gave values that are not finite.
            Exception: whatever keeps all of the documents from being heard, or only keeps them together.
        """
        if not block.documents:
            return HeardBlock(statistics=None)
        self._load(block.layers)
        try:
            return self._hear(block.documents)
        except Exception:  # whatever a tokenizer, a chat template or the model's own code raises
            broken = {place: why for place, one in block.documents.items() if (why := self._complaint(one))}
            if not broken or len(broken) == len(block.documents) > 1:
                raise  # the fault lies not in single documents
        sound = {place: document for place, document in block.documents.items() if place not in broken}
        return replace(self._hear(sound), broken=broken) if sound else HeardBlock(statistics=None, broken=broken)

    @torch.inference_mode()
    def examine(self, sample: Sample) -> dict[str, dict[int, SAEHealth]]:
        """The health of some layers' SAEs on each corpus, without what takes all of its tokens to know."""
        heard = {name: self._activations(some, sample.tokens) for name, some in sample.documents.items()}
        found: dict[str, dict[int, SAEHealth]] = {name: {} for name in heard}
        self._encoders = {}
        for layer in sample.layers:
            sae = loaded(self.saes[layer])
            self._encoders[layer] = self._encoder(sae)
            for name, activations in heard.items():
                found[name][layer] = _health(sae, self._encoders[layer], activations.get(layer))
        return found

    def _load(self, layers: Layers) -> None:
        if tuple(self._encoders) != layers:
            self._encoders = {}  # before the next are loaded
            self._encoders = {layer: self._encoder(loaded(self.saes[layer])) for layer in layers}

    def _encoder(self, sae: SAE) -> Encoder:
        return Encoder(sae, dtype=self.dtype, device=self.model.device)

    def _hear(self, documents: Mapping[int, Document]) -> HeardBlock:
        rows = Rows.of(list(documents.values()), self.tokenizer, self.max_tokens, self.tokens)
        sums = {layer: BlockSums(encoder.width, self.model.device) for layer, encoder in self._encoders.items()}
        for batch in rows.batches(self.tokenizer):
            heard, counted, sinks = countable(read_activations(self.model, self.points, batch.input_ids), batch)
            for layer, encoder in self._encoders.items():
                sums[layer].sinks += sinks
                encoder.add(heard[layer][counted], sums[layer])
        layers = {layer: some.freeze() for layer, some in sums.items()}
        for layer, found in layers.items():
            if not np.isfinite(found.sums).all():
                raise SAEError(f"the SAE of layer {layer} gave activations that are not finite")
        return HeardBlock(
            statistics=FeatureStatistics(layers=layers),
            places=frozenset(documents),
            silent=rows.silent,
        )

    def _complaint(self, document: Document) -> str | None:
        """Why a document cannot be heard by itself, if it cannot."""
        try:
            self._hear({0: document})
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        return None

    def _activations(self, documents: Sequence[Document], tokens: int) -> Heard:
        """Every layer's activations on the first tokens that count, as far as documents can be heard."""
        try:
            found = self._sample(documents, tokens) if documents else {}
            if all(bool(some.isfinite().all()) for some in found.values()):
                return found
        except Exception:
            log.debug("a sample of %d documents cannot be heard", len(documents), exc_info=True)
        parts = [self._activations([document], tokens) for document in documents] if len(documents) > 1 else []
        return {n: torch.cat([part[n] for part in parts if part])[:tokens] for n in self.points} if any(parts) else {}

    def _sample(self, documents: Sequence[Document], tokens: int) -> Heard:
        rows = Rows.of(documents, self.tokenizer, self.max_tokens, self.tokens)
        parts: list[Heard] = []
        for batch in rows.batches(self.tokenizer):
            heard, counted, _ = countable(read_activations(self.model, self.points, batch.input_ids), batch)
            parts.append({layer: hidden[counted] for layer, hidden in heard.items()})
        return {layer: torch.cat([part[layer] for part in parts])[:tokens] for layer in self.points} if parts else {}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids per document, and which of them count."""

    ids: Sequence[Sequence[int]]
    counted: Sequence[Sequence[bool]]

    @classmethod
    def of(
        cls, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_tokens: int, tokens: Tokens
    ) -> "Rows":
        return cls(
            ids=tokenize(documents, tokenizer, max_tokens=max_tokens),
            counted=counted_tokens(documents, tokenizer, max_tokens=max_tokens, tokens=tokens, may_be_none=True),
        )

    @property
    def silent(self) -> int:
        """How many documents have no token that counts."""
        return sum(True not in counted for counted in self.counted)

    def batches(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenBatch]:
        """Of the documents, for one forward each."""
        return batches(self.ids, tokenizer, batch_tokens=BATCH_TOKENS, counted=self.counted)


def countable(
    heard: dict[int, Tensor], batch: TokenBatch
) -> tuple[dict[int, Tensor], Bool[Tensor, "rows tokens"], int]:
    """What was heard, which positions count, and how many are left out as sinks.

    A sink's norm drops again in the last layers while it stays unlike any other token: once loud, always left out.
    """
    loud = attention_sinks(heard.values(), batch.attention_mask)
    counted = batch.countable & ~loud
    device = next(iter(heard.values())).device
    return heard, counted.to(device), int((loud & batch.countable).sum())


def point_of(model: PreTrainedModel, layer: int, sae: SAE | SAEFolder, site: str) -> HookPoint:
    """Where an SAE reads; those given as folders say so themselves."""
    if isinstance(sae, SAEFolder):
        return hook_point(model, layer, sae.site, sae.tap)
    return hook_point(model, layer, site)


def loaded(sae: SAE | SAEFolder) -> SAE:
    """The SAE itself."""
    return load_sae(sae) if isinstance(sae, SAEFolder) else sae


def _health(sae: SAE, encoder: Encoder, sample: Float[Tensor, "tokens d_in"] | None) -> SAEHealth:
    """An SAE on a sample, and how far the encoder's activation mass lies from SAELens' own in float32."""
    if sample is None or not len(sample) or getattr(sae.cfg.metadata, "hook_name_out", None):
        # a transcoder has nothing to say of what it reads but features
        return SAEHealth(tokens=0, variance_explained=None, l0=None, dead=None, dense=None)
    with on_device(sae, sample.device):
        exact = measure_health(sae, sample, chunk=HEALTH_TOKENS[sample.device.type])
    fast = BlockSums(encoder.width, sample.device)
    encoder.add(sample, fast)
    shares = [sums.double() / sums.double().sum() for sums in (exact.mass, fast.sums)]
    error = float((shares[0] - shares[1]).abs().sum() / 2)
    return replace(exact.health(), encoding_error=error if np.isfinite(error) else None)
