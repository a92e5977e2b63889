"""Evidence: the text on which each layer's most specific features fire, and the tokens that they promote.

    peaks = {name: one.peaks for name, one in collected.items()}
    evidence = gather_evidence(model, tokenizer, saes, texts, diagnosis, peaks, provenance=provenance)
    evidence.layers[0].features[0].contexts["target"][0]     # text before, the token, text after, activation

Where features are strongest was found when activations were collected; their texts are put together here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.collect import SAEs
from stethoscope.diagnosis.peaks import DOCUMENTS, Peaks
from stethoscope.models.load import decoder_layers
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence
from stethoscope.saes.open import SAEFolder, load_directions
from stethoscope.text.documents import Document
from stethoscope.text.tokens import agreement, tokenize

FEATURES = 8  # of each layer
CONTEXTS = 4  # of each feature and corpus, of its `KEPT` peaks
WINDOW = 12  # tokens of text on each side of the one that fired
# Sites whose SAEs decode to directions of the residual stream.
RESIDUAL_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
PROMOTED = 8  # tokens of the logit lens that are shown
_HEAD_ROWS = 16384  # of the head that are multiplied in float32 at once


@torch.inference_mode()
def gather_evidence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: SAEs,
    corpora: Mapping[str, Sequence[Document]],
    diagnosis: Diagnosis,
    peaks: Mapping[str, Mapping[int, Peaks]],
    *,
    provenance: Provenance,
    passed: Mapping[int, Mapping[int, float]] | None = None,
    max_tokens: int = 1024,
    site: str = "resid_post",
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Show the contexts in which each layer's most specific features fire most strongly.

    Model, SAEs, corpora, ``max_tokens`` and ``site`` are those that activations were collected with.

    Args:
        diagnosis: its layers' first features are shown.
        peaks: by corpus and layer, from `collect_activations`; their activations are those of its encoders.
        passed: by layer, features to show instead, with the share of the change that a filter passes along each.
        progress: called with layers whose SAEs are read and in all.
    """
    first = {found.layer: [f.feature for f in found.features[:FEATURES]] for found in diagnosis.layers}
    chosen = first if passed is None else {layer: list(shares) for layer, shares in passed.items()}
    ids = cache(lambda name, place: tokenize([corpora[name][place]], tokenizer, max_tokens=max_tokens)[0])
    names: dict[int, str | None] = {}  # of the SAEs' pages
    directions: dict[tuple[int, int], Tensor] = {}  # by layer and feature, those of the residual stream
    for layer, wanted in chosen.items():
        if wanted:
            sae = saes[layer]
            rows, names[layer] = load_directions(sae, wanted)
            if (sae.site if isinstance(sae, SAEFolder) else site) in RESIDUAL_SITES:
                directions |= {(layer, feature): row for feature, row in zip(wanted, rows, strict=True)}
        if progress:
            progress(1 + list(chosen).index(layer), len(chosen))
    promotes = _promotes(model, tokenizer, torch.stack([*directions.values()])) if directions else None
    promoted = dict(zip(directions, promotes or (), strict=False))

    def shown(layer: int, feature: int) -> FeatureEvidence:
        return FeatureEvidence(
            feature=feature,
            contexts={
                name: _contexts(peaks[name][layer].of(feature), partial(ids, name), tokenizer)
                for name in diagnosis.corpora
            },
            promotes=promoted.get((layer, feature)),
            link=f"https://www.neuronpedia.org/{names[layer]}/{feature}" if names[layer] else None,
            passed=passed[layer][feature] if passed else None,
        )

    return Evidence(
        provenance=provenance,
        documents={
            name: len(set(range(len(corpora[name]))[:DOCUMENTS]).difference(corpus.broken))
            for name, corpus in diagnosis.corpora.items()
        },
        layers=tuple(
            LayerEvidence(layer=layer, features=tuple(shown(layer, feature) for feature in wanted))
            for layer, wanted in chosen.items()
        ),
    )


def _contexts(
    peaks: Peaks, ids: Callable[[int], Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Context, ...]:
    """A feature's strongest contexts; of equally worded ones the strongest, or the first documents'."""
    shown: dict[tuple[str, str, str], Context] = {}
    columns = (peaks.documents.tolist(), peaks.tokens.tolist(), peaks.activations.tolist())
    for document, place, activation in zip(*columns, strict=True):
        if len(shown) < CONTEXTS:
            before, token, after = _around(ids(document), place, tokenizer)
            context = Context(document=document, before=before, token=token, after=after, activation=activation)
            shown.setdefault((before, token, after), context)
    return tuple(shown.values())


def _around(row: Sequence[int], place: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """A token and the text around it, cut from one decoded text, for a token may be part of a character or a space."""
    first = max(0, place - WINDOW)
    whole, upto, including = (
        str(tokenizer.decode(list(row[first:end]), clean_up_tokenization_spaces=False))
        for end in (place + WINDOW + 1, place, place + 1)
    )
    start = agreement(upto, whole)
    end = max(agreement(including, whole), start + 1)
    # half a character at the window's edge is left out
    return whole[:start].lstrip("\ufffd"), whole[start:end], whole[end:].rstrip("\ufffd")


def _promotes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directions: Float[Tensor, "features d_in"]
) -> list[tuple[str, ...]] | None:
    """The tokens whose logits each direction of the residual stream raises most: the logit lens.

    The biases of the final norm and the head, which are the same for all directions, are left out. None if the model
    has no norm after its decoder's layers, or no head.
    """
    norm, head = final_norm(model), model.get_output_embeddings()
    if norm is None or head is None:
        return None
    weight = next(norm.parameters(), head.weight)
    directions = directions.to(device=weight.device, dtype=weight.dtype)
    normed = (norm(directions) - norm(torch.zeros_like(directions))).float()
    parts = head.weight.split(_HEAD_ROWS)  # each is read once for all features
    found = [functional.linear(normed.to(part.device), part.float()).topk(min(PROMOTED, len(part))) for part in parts]
    logits = torch.cat([best.values for best in found], 1)
    tokens = torch.cat([best.indices + n * _HEAD_ROWS for n, best in enumerate(found)], 1)
    best = tokens.gather(1, logits.topk(min(PROMOTED, logits.shape[1])).indices).tolist()
    return [tuple(str(tokenizer.decode([token])) for token in row) for row in best]


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the decoder's layers, a sibling of theirs; None if there is none."""
    layers = decoder_layers(model)
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None
