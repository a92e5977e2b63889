"""Collects SAE activations: one forward feeds the SAEs of all layers, and their activations go straight to sums.

    found = collect_activations(model, tokenizer, open_saes("saes/"), {"target": texts, "control": others})
    found["target"].statistics.layers[12].rate

The work is cut into blocks of documents. A block is forwarded by itself: its sums are the same whoever computes them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.diagnosis.encoding import BlockSums, Encoder, encoder_bytes, layer_groups, sae_health
from stethoscope.diagnosis.peaks import DOCUMENTS, BatchPeaks, Peaks
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.executor import Executor, Failed, LocalExecutor, WorkerContext
from stethoscope.models.sites import HookPoint, hook_point, read_activations
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.results.validation import Layers
from stethoscope.saes.activations import attention_sinks
from stethoscope.saes.open import SAEFolder, load_sae
from stethoscope.text.documents import Document
from stethoscope.text.tokens import TokenBatch, Tokens, batches, counted_tokens, tokenize

log = logging.getLogger(__name__)

# SAE health takes a forward of its own: on a small corpus it is measured on few tokens.
LEAST_HEALTH_TOKENS = 128

SAEs = Mapping[int, SAE | SAEFolder]
Activations = dict[int, Float[Tensor, "..."]]  # by layer
Health = dict[str, dict[int, SAEHealth]]  # by corpus and layer


@dataclass(frozen=True, kw_only=True)
class CollectedActivations:
    """What was collected on one corpus: feature statistics, and each SAE's health.

    Attributes:
        documents: their number, without those that are broken.
        health: by layer; variance explained and encoding error are measured on a sample, the rest on all tokens.
        broken: the documents that were left out because they cannot be processed, by place in the corpus, and why.
        peaks: by layer, where in the first documents each feature is strongest.
    """

    statistics: FeatureStatistics
    documents: int
    health: dict[int, SAEHealth] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    peaks: dict[int, Peaks] = field(default_factory=dict)


def collect_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: SAEs,
    corpora: Mapping[str, Sequence[Document]],
    *,
    site: str = "resid_post",
    block_size: int = 64,
    max_tokens: int = 1024,
    tokens: Tokens = "all",
    health_tokens: int = 2048,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    skip_broken: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, CollectedActivations]:
    """Collect the feature statistics of every layer with an SAE on some corpora, and the SAEs' health there.

    Args:
        model: the base model; neither its head nor the layers behind the last one with an SAE are run.
        saes: by layer; those given as folders are loaded when their turn comes.
        corpora: documents by name; their order decides which share a block.
        site: what the SAEs read; those given as folders say so themselves.
        block_size: documents to a block.
        max_tokens: documents are cut here.
        tokens: which count, special and template tokens apart: all, the assistant's, or the last.
        health_tokens: variance explained and encoding error are measured on about the first so many tokens of each
            corpus, or on an eighth of its documents if that is fewer, but on 128 tokens at least; 0 for none.
        memory: bytes that a worker's encoders may take. Layers that do not fit wait for another forward over the
            corpora, so that each SAE is read once; all at once by default.
        dtype: of the encoders' products; by default bfloat16 if the model computes in it, else float32. SAE health
            says what it costs.
        skip_broken: leave out documents that cannot be processed, instead of ending with their names.
        executor: runs the work; here if None. The results are equal to the bit.
        progress: called with characters of text done and in all.

    Raises:
        SAEError: an SAE gave values that are not finite, or the model has no such site.
        StethoscopeError: documents that cannot be processed, by name; a corpus has no token to count.
    """
    dtype = dtype or (torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32)
    collector = partial(
        Collector,
        saes=saes,
        site=site,
        max_tokens=max_tokens,
        tokens=tokens,
        dtype=dtype,
        health_tokens=health_tokens,
    )
    here = LocalExecutor(model=model, tokenizer=tokenizer)
    samples = {name: collector(here).first_documents(name, some) for name, some in corpora.items()}
    run = partial((executor or here).map_pieces, Collector.collect, setup=collector)
    widths = {n: sae.width if isinstance(sae, SAEFolder) else int(sae.cfg.d_sae) for n, sae in saes.items()}
    groups = layer_groups({layer: encoder_bytes(sae, dtype) for layer, sae in saes.items()}, memory)
    counts = {name: -(-len(some) // block_size) for name, some in corpora.items()}
    found = {
        name: CollectedActivations(statistics=FeatureStatistics.zeros(widths, counts[name]), documents=len(some))
        for name, some in corpora.items()
    }
    blocks = [Block(layers, name, n) for layers in groups for name, count in counts.items() for n in range(count)]
    collected: dict[Block, frozenset[int]] = {}  # the documents whose sums are there
    peaks: dict[Block, dict[int, Peaks]] = {}

    def places(block: Block) -> range:
        return range(len(corpora[block.corpus]))[block.number * block_size :][:block_size]

    sizes = {b: sum(min(len(str(corpora[b.corpus][n])), 4 * max_tokens) for n in places(b)) for b in blocks}

    def sound(block: Block) -> frozenset[int]:
        return frozenset(places(block)).difference(found[block.corpus].broken)

    def piece(block: Block) -> Piece:  # the first of a group of layers measures their health, too
        documents = {n: corpora[block.corpus][n] for n in sorted(sound(block))}
        first = block[1:] == (next(iter(corpora)), 0) and block.layers[0] not in found[block.corpus].health
        return Piece(layers=block.layers, documents=documents, samples=samples if first else {})

    # again, where a document turned out broken for another group of layers
    while todo := [block for block in blocks if collected.get(block) != sound(block)]:
        crashed: dict[Block, Failed] = {}
        for index, made in run(map(piece, todo)):
            block = todo[index]
            if isinstance(made, Failed):
                crashed[block] = made
            else:
                collected[block] = made.places
                found[block.corpus].broken.update(made.broken)
                for name, layers in made.health.items():
                    found[name].health.update(layers)
                if made.statistics:
                    found[block.corpus].statistics.put(block.number, made.statistics)
                    peaks[block] = made.peaks
                if progress:
                    progress(sum(sizes[done] for done in collected), sum(sizes.values()))
            if not skip_broken and (crashed or found[block.corpus].broken):
                break
        for block, failure in crashed.items():
            found[block.corpus].broken.update(_crashing(run, block, piece(block), failure))
        broken = [f"document {n} of `{name}`: {why}" for name, one in found.items() for n, why in one.broken.items()]
        if broken and not skip_broken:
            raise StethoscopeError(
                "some documents cannot be processed",
                problems=broken,
                hint="mend them, or leave them out with `diagnose: {skip_broken: true}` in the recipe",
            )
    return {
        name: _finished(name, one, {b: peaks[b] for b, places in collected.items() if b.corpus == name and places})
        for name, one in found.items()
    }


class Block(NamedTuple):
    """Documents that are processed together, with the SAEs of a group of layers."""

    layers: Layers
    corpus: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The work on a block: its documents by place, and samples of all corpora to measure SAE health on, if any."""

    layers: Layers
    documents: Mapping[int, Document]
    samples: Mapping[str, Sequence[Document]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The result of a `Piece`: statistics and peaks of the documents at ``places``; why others are broken; health."""

    statistics: FeatureStatistics | None
    peaks: dict[int, Peaks]
    places: frozenset[int]
    broken: Mapping[int, str]
    health: Health


def _crashing(run: Callable[..., Any], block: Block, piece: Piece, failure: Failed) -> dict[int, str]:
    """The documents of a block that crash a worker by themselves, and how."""
    places = list(piece.documents)
    alone = run(replace(piece, documents={n: piece.documents[n]}, samples={}) for n in places)
    if crashing := {places[index]: made.why for index, made in alone if isinstance(made, Failed)}:
        return crashing
    raise StethoscopeError(
        f"documents {places[0]} to {places[-1]} of `{block.corpus}` crash every worker together: {failure.why}",
        hint="is its memory enough?",
    )


def _finished(
    name: str, one: CollectedActivations, blocks: Mapping[Block, Mapping[int, Peaks]]
) -> CollectedActivations:
    """The result on a corpus, with the blocks that have documents."""
    statistics, kept = one.statistics, sorted({block.number for block in blocks})
    if not any((layer.tokens + layer.sinks)[kept].any() for layer in statistics.layers.values()):
        raise _nothing_to_count(name)
    if len(kept) < statistics.blocks:
        statistics = statistics.regroup([np.array([number]) for number in kept])
    return replace(
        one,
        statistics=statistics,
        documents=one.documents - len(one.broken),
        health={n: one.health[n].on(layer.rate, int(layer.tokens.sum())) for n, layer in statistics.layers.items()},
        broken=dict(sorted(one.broken.items())),
        peaks={n: Peaks.strongest([some[n] for some in blocks.values() if n in some]) for n in statistics.layers},
    )


def _nothing_to_count(name: str) -> StethoscopeError:
    return StethoscopeError(
        f"no document of `{name}` has a token to count", hint="raise `max_tokens`, or count `all` tokens"
    )


@dataclass
class Collector:
    """A worker's model with the SAEs of its layers; the options are those of `collect_activations`."""

    worker: WorkerContext | LocalExecutor
    saes: SAEs
    site: str
    max_tokens: int
    tokens: Tokens
    dtype: torch.dtype = torch.float32
    health_tokens: int = 0
    encoders: dict[int, Encoder] = field(default_factory=dict)  # of the layers last asked for

    @cached_property
    def points(self) -> dict[int, HookPoint]:
        """Where the SAEs read, in order of depth; those given as folders say so themselves."""
        points = {}
        for layer, sae in sorted(self.saes.items()):
            site, tap = (sae.site, sae.tap) if isinstance(sae, SAEFolder) else (self.site, None)
            points[layer] = hook_point(self.worker.model, layer, site, tap)
        return points

    def load(self, layer: int) -> SAE:
        """A layer's SAE."""
        sae = self.saes[layer]
        return load_sae(sae) if isinstance(sae, SAEFolder) else sae

    def read(self, documents: Sequence[Document]) -> Iterator[tuple[TokenBatch, Activations, Bool[Tensor, "..."]]]:
        """Batches of documents, every layer's activations ``[rows, tokens, d_in]``, and the positions that count.

        An attention sink's norm drops again in the last layers while it stays unlike any other token: a sink in any
        layer is left out of all.
        """
        if not documents:
            return
        rows = tokenize(documents, self.worker.tokenizer, max_tokens=self.max_tokens)
        for batch in batches(rows, self.worker.tokenizer, counted=self._counted(documents)):
            hidden = read_activations(self.worker.model, self.points, batch.input_ids)
            sinks = attention_sinks(hidden.values(), batch.attention_mask)
            yield batch, hidden, (batch.countable & ~sinks).to(self.worker.model.device)

    def _counted(self, documents: Sequence[Document]) -> list[list[bool]]:
        return counted_tokens(documents, self.worker.tokenizer, max_tokens=self.max_tokens, tokens=self.tokens)

    def first_documents(self, name: str, documents: Sequence[Document]) -> list[Document]:
        """The first documents of a corpus that hold enough tokens for SAE health, without those that cannot be read.

        Raises:
            StethoscopeError: none of the documents has a token that counts, or can be read.
        """
        found: list[Document] = []
        held = 0
        refused = _nothing_to_count(name)
        for document in documents:
            try:
                (counted,) = self._counted([document])
            except Exception as error:  # its block names it
                refused = error if isinstance(error, StethoscopeError) else refused
                continue
            found.append(document)
            held += sum(counted)
            many = 8 * len(found) >= len(documents)
            if held >= max(min(self.health_tokens, LEAST_HEALTH_TOKENS) if many else self.health_tokens, 1):
                return found if self.health_tokens else []
        if not held:
            raise refused
        return found

    @torch.inference_mode()
    def collect(self, piece: Piece) -> Collected:
        """A block's statistics without the documents that cannot be processed, which are named.

        Raises:
            SAEError: an SAE gave values that are not finite.
            Exception: whatever keeps all of the documents from being processed, or only keeps them together.
        """
        health = self._prepare(piece)
        sound: Mapping[int, Document] = piece.documents
        broken: dict[int, str] = {}
        try:
            statistics, peaks = self._sums(sound)
        except Exception:  # whatever a tokenizer, a chat template or the model's own code raises
            broken = {n: why for n, document in sound.items() if (why := self._why_broken(document))}
            if not broken or len(broken) == len(sound) > 1:
                raise  # the fault lies not in single documents
            sound = {n: document for n, document in sound.items() if n not in broken}
            statistics, peaks = self._sums(sound)
        return Collected(statistics=statistics, peaks=peaks, places=frozenset(sound), broken=broken, health=health)

    def _prepare(self, piece: Piece) -> Health:
        """Load the layers' encoders; returns the SAEs' health on the samples."""
        health: Health = {name: {} for name in piece.samples}
        if not piece.samples and tuple(self.encoders) == piece.layers:
            return health
        self.encoders = {}  # before the next are loaded
        with ThreadPoolExecutor(1) as reader:  # of the next SAE, while the model or the one before computes
            ahead = reader.submit(self.load, piece.layers[0])
            samples = {name: self._sample(some) for name, some in piece.samples.items()}
            for layer, following in zip_longest(piece.layers, piece.layers[1:]):
                sae = ahead.result()
                if following is not None:
                    ahead = reader.submit(self.load, following)
                self.encoders[layer] = Encoder(sae, dtype=self.dtype, device=self.worker.model.device)
                for name, found in samples.items():
                    health[name][layer] = sae_health(sae, self.encoders[layer], found.get(layer))
        return health

    def _sums(self, documents: Mapping[int, Document]) -> tuple[FeatureStatistics | None, dict[int, Peaks]]:
        if not documents:
            return None, {}
        device, places = self.worker.model.device, list(documents)
        sums = {layer: BlockSums(encoder.width, device) for layer, encoder in self.encoders.items()}
        peaks: dict[int, list[Peaks]] = {layer: [] for layer in self.encoders}
        for batch, hidden, counted in self.read(list(documents.values())):
            counts = counted.sum(1).tolist()
            spans = {
                place: range(end - count, end)
                for row, count, end in zip(batch.documents, counts, accumulate(counts), strict=True)
                if (place := places[row]) < DOCUMENTS
            }
            for layer, encoder in self.encoders.items():
                sums[layer].sinks += int(batch.countable.sum() - counted.sum())
                found = BatchPeaks(spans, encoder.width, device)
                encoder.add(hidden[layer][counted], sums[layer], found)
                peaks[layer].append(found.freeze(encoder.threshold, counted.nonzero()[:, 1]))
        layers = {layer: some.freeze() for layer, some in sums.items()}
        for layer, summed in layers.items():
            if not np.isfinite(summed.sums).all():
                raise SAEError(f"the model overflows in layer {layer} or before, or its SAE: try bfloat16 or float32")
        return FeatureStatistics(layers=layers), {layer: Peaks.strongest(some) for layer, some in peaks.items()}

    def _why_broken(self, document: Document) -> str | None:
        """Why a document cannot be processed by itself, if it cannot."""
        try:
            self._sums({0: document})
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        return None

    def _sample(self, documents: Sequence[Document]) -> Activations:
        """Every layer's activations on the first tokens that count, without documents that cannot be processed."""
        parts: list[Activations] = []
        try:
            parts = [{n: h[counted] for n, h in hidden.items()} for _, hidden, counted in self.read(documents)]
        except Exception:
            log.debug("a sample of %d documents cannot be processed", len(documents), exc_info=True)
        if not all(bool(hidden.isfinite().all()) for part in parts for hidden in part.values()):
            parts = []
        if not parts and len(documents) > 1:
            parts = [part for one in documents if (part := self._sample([one]))]
        return {n: torch.cat([part[n] for part in parts])[: self.health_tokens] for n in self.points if parts}
