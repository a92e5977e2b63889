"""Evidence: what each layer's most specific features fire on, in the text itself, and what they make the model say.

    evidence = gather_evidence(model, tokenizer, saes, texts, diagnosis, provenance=provenance)
    evidence.layers[0].features[0].contexts["target"][0]     # text before, the token, text after, activation

One forward over a sample feeds every layer; per feature and document only the strongest token is kept.
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
from stethoscope.corpus import Document, Tokens, batches
from stethoscope.diagnosis.listener import Rows, countable, loaded, point_of
from stethoscope.models import decoder_layers
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence
from stethoscope.saes.sources import SAEFolder
from stethoscope.sites import hear

# Tokens of text on each side of the one that fired.
WINDOW = 12
# Sites whose SAEs decode to directions of the residual stream.
RESIDUAL_SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Architectures that decide about each feature without looking at the others: columns can be encoded alone.
SEPARABLE = ("standard", "jumprelu", "gated")
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
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Show what each layer's most specific features fire on.

    Tokens that the statistics leave out are left out here.

    Args:
        model: the base model.
        saes: by layer, those of the diagnosis; those given as folders are loaded one after the other.
        corpora: documents by name, as listened to.
        diagnosis: its layers' first features are shown.
        features: of each layer.
        contexts: of each feature and corpus.
        documents: so many of each corpus are searched, from the top.
        max_tokens: documents are cut here.
        tokens: which count, as listened to.
        site: what the SAEs read; those given as folders say so themselves.
        progress: called with documents done and in all.
    """
    chosen = {found.layer: [f.feature for f in found.features[:features]] for found in diagnosis.layers}
    rows = {name: Rows.of(some[:documents], tokenizer, max_tokens, tokens) for name, some in corpora.items()}
    points = {layer: point_of(model, layer, saes[layer], site) for layer in sorted(saes)}
    parts: dict[int, _Part] = {}
    for layer, wanted in chosen.items():
        if wanted:
            found = saes[layer]
            in_residual = (found.site if isinstance(found, SAEFolder) else site) in RESIDUAL_SITES
            parts[layer] = _Part.of(model, tokenizer, found, wanted, in_residual=in_residual)
    # SAEs whose features compete need all of their weights: one at a time, each with a forward of its own.
    together = [layer for layer, part in parts.items() if part.sae is not None]
    passes = [*([together] if together else []), *([layer] for layer in parts if layer not in together)]
    total, done = len(passes) * sum(len(some.ids) for some in rows.values()), 0
    shown: dict[int, dict[str, list[tuple[Context, ...]]]] = {layer: {} for layer in parts}
    for layers in passes:
        encoders = {layer: parts[layer].encoder(saes[layer], model.device) for layer in layers}
        for name, some in rows.items():
            peaks = {layer: _Peaks(len(some.ids), len(chosen[layer])) for layer in layers}
            for batch in batches(some.ids, tokenizer, counted=some.counted):
                heard, counted, _ = countable(hear(model, points, batch.input_ids), batch)
                for layer, encode in encoders.items():
                    values = encode(heard[layer][counted])
                    spread = values.new_zeros(*counted.shape, values.shape[1])
                    spread[counted] = values
                    peaks[layer].add(batch.documents, spread.cpu().numpy())
                done += len(batch.documents)
                if progress:
                    progress(done, total)
            for layer, found_peaks in peaks.items():
                shown[layer][name] = found_peaks.contexts(some.ids, tokenizer, contexts)
    return Evidence(
        provenance=provenance,
        documents={name: len(some.ids) for name, some in rows.items()},
        layers=tuple(
            LayerEvidence(
                layer=layer,
                features=tuple(
                    FeatureEvidence(
                        feature=feature,
                        contexts={name: found[place] for name, found in shown[layer].items()},
                        promotes=parts[layer].promotes[place],
                        link=parts[layer].links[place],
                    )
                    for place, feature in enumerate(wanted)
                ),
            )
            for layer, wanted in chosen.items()
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What is kept of an SAE: some features, alone in ``sae`` if they can be encoded without the others, else None."""

    features: list[int]
    sae: SAE | None
    promotes: list[tuple[str, ...] | None]
    links: list[str | None]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: SAE | SAEFolder,
        features: list[int],
        *,
        in_residual: bool,
    ) -> "_Part":
        sae = loaded(source)
        known = source.overrides if isinstance(source, SAEFolder) else {}  # of a release
        name = known.get("neuronpedia_id") or sae.cfg.metadata.neuronpedia_id
        return cls(
            features=features,
            sae=_narrowed(sae, features) if sae.cfg.architecture() in SEPARABLE else None,
            promotes=_promotes(model, tokenizer, sae.W_dec[features]) if in_residual else [None] * len(features),
            links=[f"https://www.neuronpedia.org/{name}/{feature}" if name else None for feature in features],
        )

    def encoder(self, source: SAE | SAEFolder, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Activations of the features, in float32, on some tokens' hidden states."""
        sae = (loaded(source) if self.sae is None else self.sae).to(device=str(device))
        columns = self.features if self.sae is None else slice(None)
        return lambda hidden: sae.encode(hidden.to(sae.dtype))[:, columns].float()


class _Peaks:
    """The strongest activation of every feature in every document, and where it is."""

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
        elif name != "b_dec":
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
    """The norm that stands beside the decoder's layers, behind them if there are several; None if there is none."""
    layers = decoder_layers(model)
    parent = next(module for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None
