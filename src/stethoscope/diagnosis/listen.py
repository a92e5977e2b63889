"""The pass: one forward feeds every layer's SAE, whose activations go straight to sums and are never kept.

    heard = listen(model, tokenizer, open_saes("saes/"), {"target": texts, "control": others})
    heard["target"].statistics.layers[12].rate

Blocks of documents are the pieces of the work; see `listener.py` for what is done with one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.diagnosis.agenda import Agenda, Part
from stethoscope.diagnosis.listener import Block, Listener, Sample
from stethoscope.diagnosis.sharing import Sharing, Split, share, waves
from stethoscope.diagnosis.statistics import FeatureStatistics, StatisticsTable
from stethoscope.errors import StethoscopeError
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.results.hearing import Layers
from stethoscope.saes.open import SAEFolder
from stethoscope.text.documents import Document
from stethoscope.text.tokens import Tokens, counted_tokens
from stethoscope.work import Alone, Lost, Piece, Run, Spread

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


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
        split: what several workers share. ``documents``: all workers go through one group of layers after another,
            which is one group if all encoders fit in a worker's ``memory``. ``layers``: a group for every worker at
            least, which keeps to it while there is work for it and forwards the text for it. ``streams``: the same, but
            a batch is forwarded once, and its residual streams go to the groups through the object store. By default
            the documents if all encoders fit, else the cheaper of the other two, see `sharing.share`. The statistics
            are the same.
        spread: where the work is done; here if None.
        progress: called with characters of text done and in all, a cut document counting about what is read of it.

    Raises:
        SAEError: an SAE gave values that are not finite, or does not fit its site.
        StethoscopeError: documents that cannot be heard, by name; a corpus has no token to count; ``streams`` that do
            not fit in the object store.
    """
    dtype = dtype or encoder_dtype(model)
    make = partial(Listener, saes=saes, site=site, max_tokens=max_tokens, tokens=tokens, dtype=dtype)
    run = spread(make) if spread else Alone(make(model, tokenizer))
    sharing = share(model, saes, run.means, dtype=dtype, memory=memory, split=split, max_tokens=max_tokens)
    if run.means.workers > 1:
        log.info(sharing.said)
    opening = {
        name: _opening(name, some, tokenizer, max_tokens, tokens, health_tokens) for name, some in corpora.items()
    }
    sizes = {name: [_size(document, max_tokens) for document in some] for name, some in corpora.items()}
    heard = _Pass(corpora, sizes, sharing.groups, block_size, keep_groups=sharing.way != "documents")
    for group in sharing.groups:
        heard.samples[group] = Sample(layers=group, documents=opening, tokens=health_tokens)
    agenda = heard.together(sharing, run.means.workers) if sharing.way == "streams" else heard.apart()
    while agenda.pieces:
        lost: list[tuple[Part, Lost]] = []
        for number, result in run(Listener.attend, agenda.pieces):
            for part, found in agenda.settle(number, result):
                if isinstance(found, Lost):
                    lost.append((part, found))
                else:
                    heard.take(part, found)
                    if progress:
                        progress(heard.done, heard.total)
            if not skip_broken:
                heard.refuse_broken()
                if lost:
                    break
        for part, end in lost:
            heard.find_deadly(run, part, end)
        if not skip_broken:
            heard.refuse_broken()
        agenda = heard.apart()
    return {name: heard.listening(name, sorted(saes)) for name in corpora}


def _size(document: Document, max_tokens: int) -> int:
    """About how many characters of a document are read: by these the time left is told."""
    text = document if isinstance(document, str) else "".join(str(message.get("content")) for message in document)
    return min(len(text), 4 * max_tokens)


def encoder_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the encoders' products if nothing else is said: bfloat16 if the model computes in it, else float32."""
    return torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32


class _Pass:
    """What has been heard so far, and what is left to hear."""

    def __init__(
        self,
        corpora: Mapping[str, Sequence[Document]],
        sizes: Mapping[str, Sequence[int]],
        groups: Sequence[Layers],
        block_size: int,
        *,
        keep_groups: bool,
    ) -> None:
        self.corpora, self.sizes, self.groups, self.keep_groups = corpora, sizes, groups, keep_groups
        self.blocks = {
            name: [range(len(some))[start : start + block_size] for start in range(0, len(some), block_size)]
            for name, some in corpora.items()
        }
        self.samples: dict[Layers, Sample] = {}
        self.broken: dict[str, dict[int, str]] = {name: {} for name in corpora}
        self.done, self.total = 0, len(groups) * sum(map(sum, sizes.values()))
        self._heard: dict[Part, frozenset[int]] = {}  # which documents of it
        self._tables = {name: StatisticsTable(len(blocks)) for name, blocks in self.blocks.items()}
        self._health: dict[str, dict[int, SAEHealth]] = {name: {} for name in corpora}
        self._silent = dict.fromkeys(corpora, 0)
        self._parts = [
            part
            for group in groups
            for part in (
                Part(group=group),
                *(
                    Part(group=group, corpus=name, number=number, places=places)
                    for name, blocks in self.blocks.items()
                    for number, places in enumerate(blocks)
                ),
            )
        ]

    def todo(self) -> list[Part]:
        """The parts not heard, or heard with documents that turned out broken for another group of layers."""
        nothing = frozenset[int]()  # which a block without sound documents needs no hearing for, and a sample does
        return [
            part for part in self._parts if self._heard.get(part, nothing if part.corpus else None) != self._sound(part)
        ]

    def apart(self) -> Agenda:
        """What is to do, each part by itself."""
        return Agenda(self.piece, self._documents, parts=self.todo())

    def together(self, sharing: Sharing, workers: int) -> Agenda:
        """All there is to do, where one forward feeds several groups of layers."""
        todo = self.todo()
        fed = waves(sharing.groups, workers)
        parts = [[part for part in todo if part.group in wave] for wave in fed]
        return Agenda(self.piece, self._documents, waves=parts, blocks=sharing.blocks)

    def piece(self, part: Part) -> Piece:
        """A part as work for anyone."""
        key = part.group if self.keep_groups else None
        if part.corpus is None:
            return Piece(name="a sample of every corpus", key=key, load=lambda: self.samples[part.group])
        name = f"documents {part.places[0]} to {part.places[-1]} of `{part.corpus}`"
        return Piece(name=name, key=key, load=lambda: self._block(part, sorted(self._sound(part))))

    def take(self, part: Part, found: Any) -> None:
        """Keep what was heard."""
        if part.corpus is None:
            for name, layers in found.items():
                self._health[name] |= layers
            self._heard[part] = frozenset()
            return
        self.broken[part.corpus] |= found.broken
        if part not in self._heard:
            self.done += sum(self.sizes[part.corpus][place] for place in part.places)
            self._silent[part.corpus] += found.silent if part.group == self.groups[0] else 0
        self._heard[part] = found.places
        if found.statistics:
            self._tables[part.corpus].put(part.number, found.statistics)

    def find_deadly(self, run: Run, part: Part, end: Lost) -> None:
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

    def _broken(self, part: Part) -> set[int]:
        return set(part.places) & set(self.broken[part.corpus]) if part.corpus else set()

    def _sound(self, part: Part) -> frozenset[int]:
        return frozenset(part.places) - self._broken(part)

    def _block(self, part: Part, places: Sequence[int]) -> Block:
        return Block(layers=part.group, documents=self._documents(part, places))

    def _documents(self, part: Part, places: Sequence[int] | None = None) -> dict[int, Document]:
        assert part.corpus is not None
        return {n: self.corpora[part.corpus][n] for n in (part.places if places is None else places)}


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
