"""The pass: one forward feeds every layer's SAE, whose activations go straight to sums and are never kept.

    heard = listen(model, tokenizer, open_saes("saes/"), {"target": texts, "control": others})
    heard["target"].statistics.layers[12].rate

Blocks of documents are the pieces of the work; see `listener.py` for what is done with one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.diagnosis.encoding import PLAIN
from stethoscope.diagnosis.listener import Block, HeardBlock, Listener, Sample
from stethoscope.diagnosis.statistics import FeatureStatistics, StatisticsTable
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor, Failed, LocalExecutor
from stethoscope.results.diagnosis import SAEHealth
from stethoscope.results.validation import Layers
from stethoscope.saes.open import SAEFolder
from stethoscope.text.documents import Document
from stethoscope.text.tokens import Tokens, counted_tokens

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
    executor: Executor | None = None,
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
        executor: runs the work; here if None. The results are equal to the bit.
        progress: called with characters of text done and in all, a cut document counting about what is read of it.

    Raises:
        SAEError: an SAE gave values that are not finite, or does not fit its site.
        StethoscopeError: documents that cannot be heard, by name; a corpus has no token to count.
    """
    dtype = dtype or encoder_dtype(model)
    options: dict[str, Any] = {"site": site, "max_tokens": max_tokens, "tokens": tokens, "dtype": dtype}
    executor = executor or LocalExecutor(model=model, tokenizer=tokenizer)
    run = partial(
        executor.map_pieces,
        Listener.attend,
        setup=lambda context: Listener(context.model, context.tokenizer, saes=saes, **options),
    )
    opening = {
        name: _opening(name, some, tokenizer, max_tokens, tokens, health_tokens) for name, some in corpora.items()
    }
    sizes = {name: [_size(document, max_tokens) for document in some] for name, some in corpora.items()}
    groups = layer_groups(saes, dtype, memory)
    samples = {group: Sample(layers=group, documents=opening, tokens=health_tokens) for group in groups}
    heard = _Pass(corpora, sizes, samples, block_size)
    while todo := heard.todo():
        failed: list[tuple[Part, Failed]] = []
        for index, found in run(map(heard.work, todo)):
            if isinstance(found, Failed):
                failed.append((todo[index], found))
            else:
                heard.take(todo[index], found)
                if progress:
                    progress(heard.done, heard.total)
            if not skip_broken:
                heard.refuse_broken()
                if failed:
                    break
        for part, failure in failed:
            heard.find_crashing(run, part, failure)
        if not skip_broken:
            heard.refuse_broken()
    return {name: heard.listening(name, sorted(saes)) for name in corpora}


def layer_groups(
    saes: Mapping[int, SAE | SAEFolder], dtype: torch.dtype, memory: int | None = None
) -> tuple[Layers, ...]:
    """The layers in order of depth, in groups whose encoders fit in so many bytes; each group has one at least."""
    groups: list[list[int]] = [[]]
    used = 0
    for layer, sae in sorted(saes.items()):
        size = _encoder_bytes(sae, dtype)
        if groups[-1] and memory is not None and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return tuple(tuple(group) for group in groups)


def _encoder_bytes(sae: SAE | SAEFolder, dtype: torch.dtype) -> int:
    """Of an encoder; where SAELens encodes itself, of the whole SAE in float32."""
    if isinstance(sae, SAEFolder):
        values, architecture = sae.width * sae.d_in, sae.architecture
    else:
        values, architecture = int(sae.cfg.d_sae) * int(sae.cfg.d_in), sae.cfg.architecture()
    plain = architecture in PLAIN or architecture.endswith("batchtopk")  # which is read as a JumpReLU
    return values * dtype.itemsize if plain else 2 * values * torch.float32.itemsize


def _size(document: Document, max_tokens: int) -> int:
    """About how many characters of a document are read: by these the time left is told."""
    text = document if isinstance(document, str) else "".join(str(message.get("content")) for message in document)
    return min(len(text), 4 * max_tokens)


def encoder_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the encoders' products if nothing else is said: bfloat16 if the model computes in it, else float32."""
    return torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block of a corpus, or the samples of all (``corpus`` None), to be heard by the SAEs of a group of layers."""

    group: Layers
    corpus: str | None = None
    number: int = 0
    places: range = range(0)


class _Pass:
    """What has been heard so far, and what is left to hear."""

    def __init__(
        self,
        corpora: Mapping[str, Sequence[Document]],
        sizes: Mapping[str, Sequence[int]],
        samples: Mapping[Layers, Sample],
        block_size: int,
    ) -> None:
        self.corpora, self.sizes, self.samples = corpora, sizes, samples
        self.blocks = {
            name: [range(len(some))[start : start + block_size] for start in range(0, len(some), block_size)]
            for name, some in corpora.items()
        }
        self.broken: dict[str, dict[int, str]] = {name: {} for name in corpora}
        self.done, self.total = 0, len(samples) * sum(map(sum, sizes.values()))
        self._heard: dict[Part, frozenset[int]] = {}  # which documents of it
        self._tables = {name: StatisticsTable(len(blocks)) for name, blocks in self.blocks.items()}
        self._health: dict[str, dict[int, SAEHealth]] = {name: {} for name in corpora}
        self._silent = dict.fromkeys(corpora, 0)
        self._parts: list[Part] = []
        for group in samples:
            self._parts.append(Part(group=group))
            for name, blocks in self.blocks.items():
                self._parts += [Part(group=group, corpus=name, number=n, places=p) for n, p in enumerate(blocks)]

    def todo(self) -> list[Part]:
        """The parts not heard, or heard with documents that turned out broken for another group of layers."""
        nothing = frozenset[int]()  # which a block without sound documents needs no hearing for, and a sample does
        return [
            part for part in self._parts if self._heard.get(part, nothing if part.corpus else None) != self._sound(part)
        ]

    def work(self, part: Part) -> Block | Sample:
        """A part as a piece of work, without the documents that turned out broken."""
        return self.samples[part.group] if part.corpus is None else self.block(part, sorted(self._sound(part)))

    def block(self, part: Part, places: Sequence[int]) -> Block:
        """Some documents of a part."""
        assert part.corpus is not None
        return Block(layers=part.group, documents={n: self.corpora[part.corpus][n] for n in places})

    def take(self, part: Part, found: HeardBlock | dict[str, dict[int, SAEHealth]]) -> None:
        """Keep what was heard."""
        if not isinstance(found, HeardBlock):
            for name, layers in found.items():
                self._health[name] |= layers
            self._heard[part] = frozenset()
            return
        assert part.corpus is not None
        self.broken[part.corpus] |= found.broken
        if part not in self._heard:
            self.done += sum(self.sizes[part.corpus][place] for place in part.places)
            self._silent[part.corpus] += found.silent if part.group == next(iter(self.samples)) else 0
        self._heard[part] = found.places
        if found.statistics:
            self._tables[part.corpus].put(part.number, found.statistics)

    def find_crashing(self, run: Callable[..., Any], part: Part, failure: Failed) -> None:
        """Find the documents of a part that crash a worker by themselves.

        Raises:
            StethoscopeError: no document does.
        """
        if part.corpus is None:
            raise StethoscopeError(f"examining SAEs ends every worker: {failure.why}", hint="is its memory enough?")
        places = sorted(self._sound(part))
        tried = run(self.block(part, [place]) for place in places)
        crashing = {places[index]: found.why for index, found in tried if isinstance(found, Failed)}
        if not crashing:
            raise StethoscopeError(
                f"documents {places[0]} to {places[-1]} of `{part.corpus}` end every worker together: {failure.why}"
            )
        self.broken[part.corpus] |= crashing

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

    def _sound(self, part: Part) -> frozenset[int]:
        return frozenset(part.places) - frozenset(self.broken[part.corpus]) if part.corpus else frozenset()


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
