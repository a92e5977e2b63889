"""Evidence: the text on which each layer's most specific features fire, and the tokens that they promote.

    evidence = gather_evidence(model, tokenizer, saes, texts, diagnosis, provenance=provenance)
    evidence.layers[0].features[0].contexts["target"][0]     # text before, the token, text after, activation

One forward over a sample feeds every layer; for each feature and document only the strongest token is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sae_lens import SAE
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.collect import Collector, SAEs, layer_groups, shape
from stethoscope.executor import LocalExecutor
from stethoscope.models.load import decoder_layers
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence
from stethoscope.saes.open import SAEFolder
from stethoscope.text.documents import Document
from stethoscope.text.tokens import Tokens, agreement

WINDOW = 12  # tokens of text on each side of the one that fired
# Sites whose SAEs decode to directions of the residual stream.
RESIDUAL_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Architectures that encode each feature without looking at the others: the shown ones alone are kept in memory.
SEPARABLE = (
    *("standard", "jumprelu", "gated"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
PROMOTED = 8  # tokens of the logit lens that are shown
_HEAD_ROWS = 16384  # of the head that are multiplied in float32 at once

Encode = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens features"]]


@torch.inference_mode()
def gather_evidence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: SAEs,
    corpora: Mapping[str, Sequence[Document]],
    diagnosis: Diagnosis,
    *,
    provenance: Provenance,
    features: int = 8,
    passed: Mapping[int, Mapping[int, float]] | None = None,
    contexts: int = 4,
    documents: int = 64,
    max_tokens: int = 1024,
    tokens: Tokens = "all",
    site: str = "resid_post",
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Find the contexts in which each layer's most specific features fire.

    Model, SAEs, corpora, ``max_tokens``, ``tokens`` and ``site`` are those of the diagnosis, see `collect_activations`;
    tokens that its statistics leave out are left out here.

    Args:
        diagnosis: its layers' first features are shown.
        features: of each layer.
        passed: by layer, features to show instead, with the share of the change that a filter passes along each.
        contexts: of each feature and corpus.
        documents: so many of each corpus are searched, from the top.
        memory: bytes that SAEs may take whose features compete (TopK), for all of their weights are needed. Layers that
            do not fit wait for another forward over the sample; by default one forward feeds all layers.
        progress: called with documents done and in all.
    """
    first = {found.layer: [f.feature for f in found.features[:features]] for found in diagnosis.layers}
    chosen = first if passed is None else {layer: list(shares) for layer, shares in passed.items()}
    searched = {name: list(some[:documents]) for name, some in corpora.items()}
    here = LocalExecutor(model=model, tokenizer=tokenizer)
    reader = Collector(here, saes=saes, site=site, max_tokens=max_tokens, tokens=tokens)
    groups = layer_groups({layer: _bytes(saes[layer]) for layer, wanted in chosen.items() if wanted}, memory)
    total, done = len(groups) * sum(map(len, searched.values())), 0
    shown: dict[int, tuple[FeatureEvidence, ...]] = dict.fromkeys(chosen, ())
    for group in groups:
        encoders: dict[int, Encode] = {}  # those of the group before are freed
        about: dict[int, list[dict[str, Any]]] = {}
        for layer in group:
            encoders[layer], about[layer] = _prepare(reader, layer, chosen[layer])
        found: dict[int, list[dict[str, tuple[Context, ...]]]] = {layer: [{} for _ in chosen[layer]] for layer in group}
        for name, some in searched.items():
            rows, peaks = _search(reader, some, encoders)
            for layer, (strongest, places) in peaks.items():
                for i, of_feature in enumerate(found[layer]):
                    of_feature[name] = _contexts(strongest[:, i], places[:, i], rows, tokenizer, contexts)
            done += len(some)
            if progress:
                progress(done, total)
        for layer in group:
            shown[layer] = tuple(
                FeatureEvidence(
                    feature=feature, contexts=by_corpus, passed=passed[layer][feature] if passed else None, **known
                )
                for feature, by_corpus, known in zip(chosen[layer], found[layer], about[layer], strict=True)
            )
    return Evidence(
        provenance=provenance,
        documents={name: len(some) for name, some in searched.items()},
        layers=tuple(LayerEvidence(layer=layer, features=features) for layer, features in shown.items()),
    )


def _bytes(sae: SAE | SAEFolder) -> int:
    """That an SAE takes whose features compete; the shown features of others take next to nothing."""
    architecture, width, d_in = shape(sae)
    return 2 * width * d_in * torch.float32.itemsize if architecture.startswith("topk") else 0


def _prepare(reader: Collector, layer: int, features: list[int]) -> tuple[Encode, list[dict[str, Any]]]:
    """A function that encodes some features of a layer's SAE, and what each promotes and its page."""
    sae, source, model = reader.load(layer), reader.saes[layer], reader.worker.model
    site, known = (source.site, source.overrides) if isinstance(source, SAEFolder) else (reader.site, {})
    promotes = _promotes(model, reader.worker.tokenizer, sae.W_dec[features]) if site in RESIDUAL_SITES else None
    name = known.get("neuronpedia_id") or sae.cfg.metadata.neuronpedia_id
    alone = sae.cfg.architecture() in SEPARABLE
    encoder = (_narrowed(sae, features) if alone else sae).to(device=str(model.device))
    columns = slice(None) if alone else features
    return lambda hidden: encoder.encode(hidden.to(encoder.dtype))[:, columns].float(), [
        {
            "promotes": promotes and promotes[place],
            "link": f"https://www.neuronpedia.org/{name}/{feature}" if name else None,
        }
        for place, feature in enumerate(features)
    ]


def _search(
    reader: Collector, documents: Sequence[Document], encoders: Mapping[int, Encode]
) -> tuple[dict[int, list[int]], dict[int, tuple[ndarray, ndarray]]]:
    """Token ids by document; by layer, each feature's strongest activation in each document and its token's place."""
    rows: dict[int, list[int]] = {}
    parts: dict[int, list[ndarray]] = {layer: [] for layer in encoders}
    for batch, hidden, counted in reader.read(documents):
        for row, document in enumerate(batch.documents):
            rows[document] = batch.input_ids[row, batch.attention_mask[row]].tolist()
        for layer, encode in encoders.items():
            values = encode(hidden[layer][counted])
            padded = values.new_zeros(*counted.shape, values.shape[1])
            padded[counted] = values
            parts[layer].append(np.stack([padded.cpu().numpy().max(1), padded.cpu().numpy().argmax(1)]))
    order = np.argsort(list(rows))  # batches are by length
    return rows, {layer: tuple(np.concatenate(some, axis=1)[:, order]) for layer, some in parts.items()}


def _contexts(
    strongest: Float[ndarray, " documents"],
    places: Float[ndarray, " documents"],
    rows: Mapping[int, Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> tuple[Context, ...]:
    """A feature's strongest contexts; of equally strong or equally worded ones the first documents'."""
    shown: dict[tuple[str, str, str], Context] = {}
    for i in np.argsort(-strongest, kind="stable").tolist():
        if strongest[i] <= 0 or len(shown) == count:
            break
        before, token, after = _around(rows[i], int(places[i]), tokenizer)
        context = Context(document=i, before=before, token=token, after=after, activation=float(strongest[i]))
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
) -> list[tuple[str, ...]] | None:
    """The tokens whose logits each direction of the residual stream raises most: the logit lens.

    The biases of the final norm and the head, which are the same for all directions, are left out. None if the model
    has no norm after its decoder's layers, or no head.
    """
    norm, head = final_norm(model), model.get_output_embeddings()
    if norm is None or head is None:
        return None
    weight = next(norm.parameters())
    directions = directions.to(device=weight.device, dtype=weight.dtype)
    normed = (norm(directions) - norm(torch.zeros_like(directions))).float()
    rows: Tensor = head.weight
    logits = torch.cat([functional.linear(normed.to(rows.device), part.float()) for part in rows.split(_HEAD_ROWS)], 1)
    best = logits.topk(min(PROMOTED, logits.shape[1])).indices.tolist()
    return [tuple(str(tokenizer.decode([token])) for token in tokens) for tokens in best]


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the decoder's layers, a sibling of theirs; None if there is none."""
    layers = decoder_layers(model)
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None
