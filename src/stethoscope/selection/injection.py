"""What edits of layers do to the loss, measured in memory: the truth about layers and sets of them.

texts = {"target": list(batches(...)), "control": list(batches(...))}
edits = LayerEdits(model, task_vector)
measure(model, edits, texts, [{3: 1.0}, {4: 1.0}]).score()     # each layer alone
measure(model, edits, texts, [{3: 1.0, 4: 0.5}])    # any set, at any coefficients
local_effect(model, edits, texts).score()           # to first order, through activations
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
from transformers import PreTrainedModel

from stethoscope.diagnosis.attribution import own_changes
from stethoscope.editing.layers import Amount, LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor, Failed, LocalExecutor, WorkerContext
from stethoscope.models.forward import Recording, token_losses
from stethoscope.models.load import decoder_layers
from stethoscope.models.sites import hook_point
from stethoscope.text.tokens import TokenBatch

Texts = Mapping[str, Sequence[TokenBatch]]
Change = Mapping[int, Amount]  # layer -> coefficient, or coefficient and the filter's strength
Progress = Callable[[int, int], None]
TRIALS = 64  # changes that share a forward of the base: few enough for a bar that moves


@dataclass(frozen=True, kw_only=True)
class Gains:
    """By how much changes to a model lower the loss on texts; a text's unit is a document, or a batch of them.

    Attributes:
        changes: layer -> amount of each change.
        sums: corpus -> nats by which each unit's summed loss falls under each change; negative where it rises.
        losses: corpus -> the base's summed loss of each unit.
        tokens: corpus -> predicted tokens of each unit.
    """

    changes: tuple[Change, ...]
    sums: Mapping[str, Float64[np.ndarray, "units changes"]]
    losses: Mapping[str, Float64[np.ndarray, " units"]]
    tokens: Mapping[str, Int64[np.ndarray, " units"]]

    def mean(self, corpus: str) -> Float64[np.ndarray, " changes"]:
        """Nats per token by which each change lowers the loss."""
        return self.sums[corpus].sum(0) / self.tokens[corpus].sum()

    def score(self, control: str = "control") -> Float64[np.ndarray, " changes"]:
        """Gain on target less gain on a control corpus."""
        return self.mean("target") - self.mean(control)

    def by_layer(self, control: str = "control") -> dict[int, float]:
        """`score` by layer, where each change is of one layer."""
        scores = self.score(control).tolist()
        return {layer: value for change, value in zip(self.changes, scores, strict=True) for layer in change}


def standard_error(
    sums: Float64[np.ndarray, "units changes"], tokens: Int64[np.ndarray, " units"]
) -> Float64[np.ndarray, " changes"]:
    """Of sums.sum(0) / tokens.sum() over units that are drawn together with their tokens: a ratio's error."""
    units = len(tokens)
    if units < 2:
        return np.full(sums.shape[1], np.nan)
    rest = sums - tokens[:, None] * (sums.sum(0) / tokens.sum())
    return np.sqrt((rest**2).sum(0) * units / (units - 1)) / tokens.sum()


@torch.no_grad()
def inject(
    context: WorkerContext | LocalExecutor, trial: tuple[TokenBatch, Sequence[Change]]
) -> tuple[Float64[np.ndarray, " rows"], Float64[np.ndarray, "rows changes"]]:
    """The base's loss of every row, and by how much each change lowers it; a forward restarts where it changes."""
    model, (batch, changes) = context.model, trial
    depth = len(decoder_layers(model))
    starts = [_start(change, depth) for change in changes]
    recording = Recording(model, batch.input_ids, starts=set(starts) - {depth})
    losses = _loss(model, recording.output, batch)
    gains = np.zeros((len(losses), len(starts)))
    for i, (change, start) in enumerate(zip(changes, starts, strict=True)):
        if start < depth:
            with context.edits.entered({n: c for n, c in change.items() if c}):
                gains[:, i] = losses - _loss(model, recording.replay(start), batch)
    return losses, gains


def measure(
    model: PreTrainedModel,
    edits: LayerEdits,
    texts: Texts,
    changes: Sequence[Change],
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Gains:
    """The truth about any sets of layers, each at any amounts; see `forwards` for what it costs.

    Args:
        executor: runs the work; here if None. Where batches are fewer than workers, several share the changes to a
            batch, each with a forward of the base of its own.
        progress: called with pieces of the work done and in all.

    Returns:
        per document.

    Raises:
        StethoscopeError: no token of a text counts; a batch ends whoever works on it.
    """
    tokens = {name: _tokens(text) for name, text in texts.items()}
    if empty := [f"`{name}`" for name, found in tokens.items() if not found.any()]:
        raise StethoscopeError(
            "no token of a text counts",
            problems=empty,
            hint="what follows a document's first token counts, and its prompt's do not: give longer documents",
        )
    executor = executor or LocalExecutor(model=model, edits=edits)
    # Neighbours share edited layers, so that few are read again where not all fit in memory.
    order = sorted(range(len(changes)), key=lambda i: [(n, str(amount)) for n, amount in sorted(changes[i].items())])
    total = sum(map(len, texts.values()))
    parts = max(-(-len(order) // TRIALS), min(len(order), -(-2 * executor.workers // total)))
    chosen = [part.tolist() for part in np.array_split(np.array(order, dtype=int), max(1, parts))]
    places = [(name, batch, part) for name, text in texts.items() for batch in text for part in chosen]
    trials = ((batch, [changes[i] for i in part]) for _, batch, part in places)
    sums = {name: np.zeros((_documents(text), len(changes))) for name, text in texts.items()}
    losses = {name: np.zeros(len(found)) for name, found in sums.items()}
    setup = partial(_with_filters, edits.filters)
    for done, (index, found) in enumerate(executor.map_pieces(inject, trials, setup=setup), 1):
        name, batch, part = places[index]
        rows = list(batch.documents)
        if isinstance(found, Failed):
            raise StethoscopeError(
                f"documents {', '.join(map(str, rows))} of `{name}` end every worker: {found.why}",
                hint="is its memory enough?",
            )
        losses[name][rows] = found[0]
        sums[name][np.ix_(rows, part)] = found[1]
        if progress:
            progress(done, len(places))
    return Gains(changes=tuple(map(dict, changes)), sums=sums, losses=losses, tokens=tokens)


def forwards(changes: Sequence[Change], depth: int) -> float:
    """What `measure` costs in forwards of the whole text: one for the base, and each change's share of the blocks."""
    return 1 + sum(1 - _start(change, depth) / depth for change in changes)


def local_effect(
    model: PreTrainedModel, edits: LayerEdits, texts: Texts, *, site: str = "resid_post", coefficient: float = 1.0
) -> Gains:
    """-dL/dh . dh at every block's site, dh being what the block's own edit does on the base's input to it.

    The first-order effect through activations: one forward, one backward, and every block once more.

    Returns:
        per document; ``changes`` are the layers in order.
    """
    points = {layer: hook_point(model, layer, site) for layer in range(len(decoder_layers(model)))}
    sums = {name: np.zeros((_documents(text), len(points))) for name, text in texts.items()}
    losses = {name: np.zeros(len(found)) for name, found in sums.items()}
    for name, text in texts.items():
        for batch in text:
            own = own_changes(model, edits, points, batch, coefficient=coefficient)
            losses[name][list(batch.documents)] = own.losses.cpu().numpy()
            for layer, change in own.changes.items():
                gain = change.gain().where(batch.attention_mask.to(change.gradient.device), 0.0)
                sums[name][list(batch.documents), layer] = gain.sum(1).cpu().numpy()
    tokens = {name: _tokens(text) for name, text in texts.items()}
    return Gains(changes=tuple({n: coefficient} for n in points), sums=sums, losses=losses, tokens=tokens)


def _with_filters(filters: Path | None, context: WorkerContext | LocalExecutor) -> WorkerContext | LocalExecutor:
    context.edits.filters = filters
    return context


def _start(change: Change, depth: int) -> int:
    return min((layer for layer, coefficient in change.items() if coefficient), default=depth)


def _loss(model: PreTrainedModel, output: object, batch: TokenBatch) -> Float64[np.ndarray, " rows"]:
    return token_losses(model, output, batch.input_ids, batch.predicted[:, 1:]).double().sum(1).cpu().numpy()


def _documents(text: Sequence[TokenBatch]) -> int:
    return 1 + max(i for batch in text for i in batch.documents)


def _tokens(text: Sequence[TokenBatch]) -> Int64[np.ndarray, " documents"]:
    counts = np.zeros(_documents(text), dtype=np.int64)
    for batch in text:
        counts[list(batch.documents)] = batch.predicted.sum(1).numpy()
    return counts
