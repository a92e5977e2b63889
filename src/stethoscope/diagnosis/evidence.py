"""Evidence: the text on which each layer's most specific features fire, and the tokens that they promote.

    evidence = gather_evidence(model, tokenizer, saes, texts, diagnosis, provenance=provenance)
    evidence.layers[0].features[0].contexts["target"][0]     # text before, the token, text after, activation

One forward over a sample feeds every layer; for each feature and document only the strongest token is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sae_lens import SAE
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.listener import Rows, countable, loaded, point_of
from stethoscope.models.load import decoder_layers
from stethoscope.models.sites import read_activations
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence
from stethoscope.saes.open import SAEFolder
from stethoscope.text.documents import Document
from stethoscope.text.tokens import Tokens, batches

# Tokens of text on each side of the one that fired.
WINDOW = 12
# Sites whose SAEs decode to directions of the residual stream.
RESIDUAL_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Architectures that encode each feature without looking at the others: the shown ones alone are kept in memory.
SEPARABLE = (
    *("standard", "jumprelu", "gated"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
PROMOTED = 8  # tokens of the logit lens that are shown
_HEAD_ROWS = 16384  # of the head that are multiplied in float32 at once


@torch.inference_mode()
def gather_evidence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, SAE | SAEFolder],
    corpora: Mapping[str, Sequence[Document]],
    diagnosis: Diagnosis,
    *,
    provenance: Provenance,
    features: int = 8,
    contexts: int = 4,
    documents: int = 64,
    max_tokens: int = 1024,
    tokens: Tokens = "all",
    site: str = "resid_post",
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Find the contexts in which each layer's most specific features fire.

    Tokens that the statistics leave out are left out here.

    Args:
        model: the base model.
        saes: those of the diagnosis, by layer; those given as folders are loaded once.
        corpora: documents by name, as listened to.
        diagnosis: its layers' first features are shown.
        features: of each layer.
        contexts: of each feature and corpus.
        documents: so many of each corpus are searched, from the top.
        max_tokens: documents are cut here.
        tokens: which count, as listened to.
        site: what the SAEs read; those given as folders say so themselves.
        memory: bytes that SAEs may take whose features compete (TopK), for all of their weights are needed. Layers that
            do not fit wait for another forward over the sample; by default one forward feeds all layers.
        progress: called with tokens done and in all.
    """
    chosen = {found.layer: [f.feature for f in found.features[:features]] for found in diagnosis.layers}
    rows = {name: Rows.of(some[:documents], tokenizer, max_tokens, tokens) for name, some in corpora.items()}
    points = {layer: point_of(model, layer, saes[layer], site) for layer in sorted(saes)}
    groups = _groups({layer: saes[layer] for layer, wanted in chosen.items() if wanted}, memory)
    total, done = len(groups) * sum(len(row) for some in rows.values() for row in some.ids), 0
    shown: dict[int, tuple[FeatureEvidence, ...]] = dict.fromkeys(chosen, ())
    for group in groups:
        parts = {layer: _Part.of(model, tokenizer, saes[layer], chosen[layer], site) for layer in group}
        peaks = {
            (layer, name): _Peaks(len(some.ids), len(chosen[layer])) for layer in group for name, some in rows.items()
        }
        for name, some in rows.items():
            for batch in batches(some.ids, tokenizer, counted=some.counted):
                heard, counted, _ = countable(read_activations(model, points, batch.input_ids), batch)
                for layer, part in parts.items():
                    values = part.encode(heard[layer][counted])
                    spread = values.new_zeros(*counted.shape, values.shape[1])
                    spread[counted] = values
                    peaks[layer, name].add(batch.documents, spread.cpu().numpy())
                done += sum(len(some.ids[document]) for document in batch.documents)
                if progress:
                    progress(done, total)
        for layer, part in parts.items():
            found = {name: peaks[layer, name].contexts(some.ids, tokenizer, contexts) for name, some in rows.items()}
            shown[layer] = tuple(
                FeatureEvidence(
                    feature=feature,
                    contexts={name: of_feature[place] for name, of_feature in found.items()},
                    promotes=part.promotes[place],
                    link=part.links[place],
                )
                for place, feature in enumerate(part.features)
            )
        del part, parts  # the next group needs their memory
    return Evidence(
        provenance=provenance,
        documents={name: len(some.ids) for name, some in rows.items()},
        layers=tuple(LayerEvidence(layer=layer, features=features) for layer, features in shown.items()),
    )


def _groups(saes: Mapping[int, SAE | SAEFolder], memory: int | None) -> list[list[int]]:
    """Layers that one forward feeds: all, unless SAEs whose features compete do not fit in memory together."""
    groups: list[list[int]] = [[]] if saes else []
    used = 0
    for layer, sae in saes.items():
        if isinstance(sae, SAEFolder):
            architecture, values = sae.architecture, sae.width * sae.d_in
        else:
            architecture, values = sae.cfg.architecture(), sae.cfg.d_sae * sae.cfg.d_in
        size = 2 * values * torch.float32.itemsize if architecture.startswith("topk") else 0
        if memory is not None and groups[-1] and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return groups


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A layer's features that are shown.

    Attributes:
        encode: hidden states ``[tokens, d_in]`` to the features' activations ``[tokens, features]`` in float32.
        promotes: for each feature, as in `FeatureEvidence`; ``links`` too.
    """

    features: list[int]
    encode: Callable[[Tensor], Tensor]
    promotes: list[tuple[str, ...] | None]
    links: list[str | None]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: SAE | SAEFolder,
        features: list[int],
        site: str,
    ) -> "_Part":
        sae = loaded(source)
        site, known = (source.site, source.overrides) if isinstance(source, SAEFolder) else (site, {})
        promotes = _promotes(model, tokenizer, sae.W_dec[features]) if site in RESIDUAL_SITES else None
        name = known.get("neuronpedia_id") or sae.cfg.metadata.neuronpedia_id
        alone = sae.cfg.architecture() in SEPARABLE
        encoder = (_narrowed(sae, features) if alone else sae).to(device=str(model.device))
        columns = slice(None) if alone else features
        return cls(
            features=features,
            encode=lambda hidden: encoder.encode(hidden.to(encoder.dtype))[:, columns].float(),
            promotes=promotes or [None] * len(features),
            links=[f"https://www.neuronpedia.org/{name}/{feature}" if name else None for feature in features],
        )


class _Peaks:
    """The strongest activation of every feature in every document, and the position of its token."""

    def __init__(self, documents: int, features: int) -> None:
        self._strongest = np.zeros((documents, features), dtype=np.float32)
        self._place = np.zeros((documents, features), dtype=np.int64)

    def add(self, documents: Sequence[int], activations: Float[ndarray, "rows tokens features"]) -> None:
        self._place[list(documents)] = activations.argmax(1)
        self._strongest[list(documents)] = activations.max(1)

    def contexts(
        self, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, count: int
    ) -> list[tuple[Context, ...]]:
        """Each feature's strongest contexts; of equally strong or equally worded ones the first documents'."""
        found = []
        for strongest, places in zip(self._strongest.T, self._place.T, strict=True):
            shown: dict[tuple[str, str, str], Context] = {}
            for i in np.argsort(-strongest, kind="stable").tolist():
                if strongest[i] <= 0 or len(shown) == count:
                    break
                made = _context(rows[i], int(places[i]), tokenizer, document=i, activation=float(strongest[i]))
                shown.setdefault((made.before, made.token, made.after), made)
            found.append(tuple(shown.values()))
        return found


def _context(
    row: Sequence[int], place: int, tokenizer: PreTrainedTokenizerBase, *, document: int, activation: float
) -> Context:
    """A token and the text around it, cut from one decoded text, for a token may be part of a character or a space."""
    first = max(0, place - WINDOW)
    whole, upto, including = (
        str(tokenizer.decode(list(row[first:end]), clean_up_tokenization_spaces=False))
        for end in (place + WINDOW + 1, place, place + 1)
    )
    start = _agreement(upto, whole)
    end = max(_agreement(including, whole), start + 1)
    return Context(
        document=document,
        before=whole[:start].lstrip("\ufffd"),  # half a character at the window's edge
        token=whole[start:end],
        after=whole[end:].rstrip("\ufffd"),
        activation=activation,
    )


def _agreement(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _narrowed(sae: SAE, features: Sequence[int]) -> SAE:
    """An SAE with some of the features only, which encodes them as the whole one does."""
    config = deepcopy(sae.cfg)
    config.d_sae, config.dtype, config.device = len(features), "float32", "cpu"
    small = type(sae)(config)
    for name, kept in small.state_dict().items():
        value = getattr(sae, name).detach()
        if name == "W_enc":
            value = value[:, features]
        elif name not in ("b_dec", "W_skip"):
            value = value[features]
        kept.copy_(value)
    return small


def _promotes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directions: Float[Tensor, "features d_in"]
) -> list[tuple[str, ...] | None]:
    """The tokens whose logits each direction of the residual stream raises most: the logit lens.

    What the final norm and the head add whatever the direction, their biases, is left out.
    """
    norm, head = _final_norm(model), model.get_output_embeddings()
    if norm is None or head is None:
        return [None] * len(directions)
    weight = next(norm.parameters())
    directions = directions.to(device=weight.device, dtype=weight.dtype)
    normed = (norm(directions) - norm(torch.zeros_like(directions))).float()
    rows: Tensor = head.weight
    logits = torch.cat([functional.linear(normed.to(rows.device), part.float()) for part in rows.split(_HEAD_ROWS)], 1)
    best = logits.topk(min(PROMOTED, logits.shape[1])).indices.tolist()
    return [tuple(str(tokenizer.decode([token])) for token in tokens) for tokens in best]


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the decoder's layers, a sibling of theirs; None if there is none."""
    layers = decoder_layers(model)
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None
