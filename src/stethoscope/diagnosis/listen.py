"""The pass: one forward feeds every layer's SAE, whose activations go straight to sums and are never kept.

    heard = listen(model, tokenizer, open_saes("saes/"), {"target": texts, "control": others})
    heard["target"].statistics.layers[12].rate

Blocks of documents are the pieces of the work; see `listener.py` for what is done with one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from sae_lens import SAE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import Document, Tokens, counted_tokens
from stethoscope.diagnosis.listener import Block, Listener, Sample
from stethoscope.diagnosis.statistics import FeatureStatistics, StatisticsTable
from stethoscope.errors import StethoscopeError
from stethoscope.saes.health import SAEHealth
from stethoscope.saes.sources import SAEFolder
from stethoscope.work import Alone, Lost, Piece, Run, Spread

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Split = Literal["auto", "documents", "layers"]
Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """What `listen` heard on one corpus: feature statistics, and each SAE's health on it.

    Attributes:
        health: by layer; variance explained and encoding error are measured on a sample, the rest on all tokens.
        broken: the documents that were left out because they cannot be heard, by place in the corpus, and why.
    """

    statistics: FeatureStatistics
    health: dict[int, SAEHealth]
    broken: Mapping[int, str] = field(default_factory=dict)


def listen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, SAE | SAEFolder],
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
    split: Split = "auto",
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> dict[str, Listening]:
    """Feature statistics of every layer with an SAE on some corpora, and the SAEs' health there.

    Args:
        model: the base model; its head is never run, nor what lies behind the last layer with an SAE.
        tokenizer: the model's own.
        saes: by layer; those given as folders are loaded when their turn comes.
        corpora: documents by name; their order decides which share a block.
        site: what the SAEs read; those given as folders say so themselves.
        block_size: documents to a block.
        max_tokens: documents are cut here.
        tokens: which count, special and template tokens apart: all, those that an assistant says, or the last.
        health_tokens: SAE health is measured on about the first so many tokens of each corpus; 0 for none.
        memory: bytes that a worker's encoders may take. What does not fit waits for another forward over the corpora,
            so that each SAE is read once; all at once by default.
        dtype: of the encoders' products; by default bfloat16 if the model computes in it, else float32. SAE health
            says what it costs.
        skip_broken: leave out documents that cannot be heard, instead of ending with their names.
        split: what several workers share. By default the documents if all encoders fit in one worker's ``memory``, else
            the layers: a worker keeps to one group of layers for as long as there is work for it. ``layers`` makes a
            group for every worker also where all would fit; ``documents`` takes all workers through one group of
            layers after another. The statistics are the same.
        spread: where the work is done; here if None.
        progress: called with documents done and in all.

    Raises:
        SAEError: an SAE gave values that are not finite, or does not fit its site.
        StethoscopeError: documents that cannot be heard, by name; a corpus has no token to count.
    """
    dtype = dtype or encoder_dtype(model)
    make = partial(Listener, saes=saes, site=site, max_tokens=max_tokens, tokens=tokens, dtype=dtype)
    run = spread(make) if spread else Alone(make(model, tokenizer))
    groups = _groups(saes, dtype, memory, run.workers if split == "layers" else 1)
    if run.workers > 1:
        log.info(how_shared(saes, dtype=dtype, memory=memory, split=split, workers=run.workers))
    opening = {
        name: _opening(name, some, tokenizer, max_tokens, tokens, health_tokens) for name, some in corpora.items()
    }
    heard = _Pass(corpora, groups, block_size, keep_groups=split != "documents")
    for group in groups:
        heard.samples[group] = Sample(layers=group, documents=opening, tokens=health_tokens)
    while todo := heard.todo():
        lost: list[tuple[_Part, Lost]] = []
        for number, found in run(Listener.attend, [heard.piece(part) for part in todo]):
            if isinstance(found, Lost):
                lost.append((todo[number], found))
                if not skip_broken:
                    break
            else:
                heard.take(todo[number], found)
                if progress:
                    progress(heard.done, heard.total)
            if not skip_broken:
                heard.refuse_broken()
        for part, end in lost:
            heard.find_deadly(run, part, end)
        if not skip_broken:
            heard.refuse_broken()
    return {name: heard.listening(name, sorted(saes)) for name in corpora}


def encoder_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the encoders' products if nothing else is said: bfloat16 if the model computes in it, else float32."""
    return torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32


def how_shared(
    saes: Mapping[int, SAE | SAEFolder], *, dtype: torch.dtype, memory: int | None, split: Split, workers: int
) -> str:
    """One sentence on what workers share in `listen`, and why."""
    groups = _groups(saes, dtype, memory, workers if split == "layers" else 1)
    size = sum(_bytes(sae, dtype) for sae in saes.values()) / 1e9
    room = "no limit" if memory is None else f"room for {memory / 1e9:.2f} GB"
    if len(groups) == 1:
        how = "each holds all and hears a part of the documents"
    elif split == "documents":
        how = f"all go through {len(groups)} groups of layers, one after another"
    else:
        how = f"{len(groups)} groups of layers, each kept by a worker while there is work for it"
    return f"{workers} workers, encoders of {size:.2f} GB, {room} on each: {how}"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A block of a corpus, or the samples of all (``corpus`` None), to be heard by the SAEs of a group of layers."""

    group: Layers
    corpus: str | None = None
    number: int = 0
    places: range = range(0)


class _Pass:
    """What has been heard so far, and what is left to hear."""

    def __init__(
        self, corpora: Mapping[str, Sequence[Document]], groups: Sequence[Layers], block_size: int, *, keep_groups: bool
    ) -> None:
        self.corpora, self.groups, self.keep_groups = corpora, groups, keep_groups
        self.blocks = {
            name: [range(len(some))[start : start + block_size] for start in range(0, len(some), block_size)]
            for name, some in corpora.items()
        }
        self.samples: dict[Layers, Sample] = {}
        self.broken: dict[str, dict[int, str]] = {name: {} for name in corpora}
        self.done, self.total = 0, len(groups) * sum(map(len, corpora.values()))
        self._heard: dict[_Part, frozenset[int]] = {}  # which documents of it
        self._tables = {name: StatisticsTable(len(blocks)) for name, blocks in self.blocks.items()}
        self._health: dict[str, dict[int, SAEHealth]] = {name: {} for name in corpora}
        self._silent = dict.fromkeys(corpora, 0)
        self._parts = [
            part
            for group in groups
            for part in (
                _Part(group=group),
                *(
                    _Part(group=group, corpus=name, number=number, places=places)
                    for name, blocks in self.blocks.items()
                    for number, places in enumerate(blocks)
                ),
            )
        ]

    def todo(self) -> list[_Part]:
        """The parts not heard, or heard with documents that turned out broken for another group of layers."""
        nothing = frozenset[int]()  # which a block without sound documents needs no hearing for, and a sample does
        return [
            part for part in self._parts if self._heard.get(part, nothing if part.corpus else None) != self._sound(part)
        ]

    def piece(self, part: _Part) -> Piece:
        """A part as work for anyone."""
        key = part.group if self.keep_groups else None
        if part.corpus is None:
            return Piece(name="a sample of every corpus", key=key, load=lambda: self.samples[part.group])
        name = f"documents {part.places[0]} to {part.places[-1]} of `{part.corpus}`"
        return Piece(name=name, key=key, load=lambda: self._block(part, sorted(self._sound(part))))

    def take(self, part: _Part, found: Any) -> None:
        """Keep what was heard."""
        if part.corpus is None:
            for name, layers in found.items():
                self._health[name] |= layers
            self._heard[part] = frozenset()
            return
        self.broken[part.corpus] |= found.broken
        if part not in self._heard:
            self.done += len(part.places)
            self._silent[part.corpus] += found.silent if part.group == self.groups[0] else 0
        self._heard[part] = found.places
        if found.statistics:
            self._tables[part.corpus].put(part.number, found.statistics)

    def find_deadly(self, run: Run, part: _Part, end: Lost) -> None:
        """Name the documents that end the worker that hears them.

        Raises:
            StethoscopeError: no document does so by itself.
        """
        if part.corpus is None:
            raise StethoscopeError(f"examining SAEs ends every worker: {end.why}", hint="is its memory enough?")
        places = sorted(self._sound(part))
        pieces = [
            replace(self.piece(part), name=f"document {n} of `{part.corpus}`", load=partial(self._block, part, [n]))
            for n in places
        ]
        for number, found in run(Listener.hear, pieces):
            if isinstance(found, Lost):
                self.broken[part.corpus][places[number]] = found.why
        if not self._broken(part):
            raise StethoscopeError(f"{self.piece(part).name} end every worker together: {end.why}")

    def refuse_broken(self) -> None:
        """
        Raises:
            StethoscopeError: some documents cannot be heard, with all of their names.
        """
        problems = [f"document {n} of `{name}`: {why}" for name, bad in self.broken.items() for n, why in bad.items()]
        if problems:
            raise StethoscopeError(
                "some documents cannot be heard",
                problems=problems,
                hint="mend them, or leave them out with `diagnose: {skip_broken: true}` in the recipe",
            )

    def listening(self, name: str, layers: Sequence[int]) -> Listening:
        """All that was heard on a corpus.

        Raises:
            StethoscopeError: nothing.
        """
        kept = [i for i, places in enumerate(self.blocks[name]) if set(places) - set(self.broken[name])]
        found = self._tables[name].layers if kept else {}
        if not any((found[layer].tokens + found[layer].sinks).any() for layer in found):
            raise _nothing(name)
        if without := self._silent[name]:
            log.warning("%d of %d documents of `%s` have no tokens to count", without, len(self.corpora[name]), name)
        statistics = FeatureStatistics(layers={layer: found[layer] for layer in layers})
        if len(kept) < len(self.blocks[name]):
            statistics = statistics.regroup([np.array([i]) for i in kept])
        return Listening(
            statistics=statistics,
            health={
                n: self._health[name][n].on(layer.rate, int(layer.tokens.sum()))
                for n, layer in statistics.layers.items()
            },
            broken=dict(sorted(self.broken[name].items())),
        )

    def _broken(self, part: _Part) -> set[int]:
        return set(part.places) & set(self.broken[part.corpus]) if part.corpus else set()

    def _sound(self, part: _Part) -> frozenset[int]:
        return frozenset(part.places) - self._broken(part)

    def _block(self, part: _Part, places: Sequence[int]) -> Block:
        assert part.corpus is not None
        return Block(layers=part.group, documents={n: self.corpora[part.corpus][n] for n in places})


def _nothing(name: str) -> StethoscopeError:
    return StethoscopeError(
        f"no document of `{name}` has a token to count", hint="raise `max_tokens`, or count `all` tokens"
    )


def _opening(
    name: str,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    tokens: Tokens,
    wanted: int,
) -> list[Document]:
    """The first documents of a corpus that hold so many tokens which count, those that cannot be read left out.

    Raises:
        StethoscopeError: none of the documents has such a token, or can be read.
    """
    found: list[Document] = []
    held = 0
    refused: Exception | None = None
    for document in documents:
        if held >= max(wanted, 1):
            break
        try:
            (counted,) = counted_tokens([document], tokenizer, max_tokens=max_tokens, tokens=tokens, may_be_none=True)
        except Exception as error:
            refused = error
            continue  # its block says so, by name
        found.append(document)
        held += sum(counted)
    if not held:
        raise refused if isinstance(refused, StethoscopeError) else _nothing(name)
    return found if wanted else []


def _groups(
    saes: Mapping[int, SAE | SAEFolder], dtype: torch.dtype, memory: int | None, least: int
) -> list[tuple[int, ...]]:
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
    return [tuple(group) for group in groups]


def _bytes(sae: SAE | SAEFolder, dtype: torch.dtype) -> int:
    """Of an encoder."""
    values = sae.width * sae.d_in if isinstance(sae, SAEFolder) else int(sae.cfg.d_sae) * int(sae.cfg.d_in)
    return values * dtype.itemsize
