"""What features fire on, where the answer is planted: characters known beforehand, in text known beforehand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from editing.tiny_models import LAYOUTS, make
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis import evidence as room
from stethoscope.diagnosis.diagnose import diagnose
from stethoscope.diagnosis.evidence import gather_evidence
from stethoscope.diagnosis.listen import listen
from stethoscope.results.evidence import Evidence, FeatureEvidence
from stethoscope.saes.open import open_saes

# q fires less strongly than Z, which only one document has
TARGET = [
    *(f"whoever reads {letter} has q, and {letter} has another q there" for letter in "abcdef"),
    "whoever reads g has Z, and g has no q",
]
CONTROL = ["nothing of that kind is to be read in here", "nor here", "something else is", "a cafe\u0301 or a caf\u00e9"]


@pytest.fixture(scope="module")
def model(llama):
    """A model whose blocks add nothing: every layer hears the embeddings themselves."""
    made = llama(layers=3, hidden=64)
    torch.manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(259, 64), dim=1)
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(embeddings)
        for block in made.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return made


def byte(tokenizer, text: str, place: int = 0) -> int:
    return int(tokenizer(text)["input_ids"][place])


def planted(model, fires_on: list[dict[int, float]], promotes: list[int] | None = None) -> SAE:
    """A feature for each table of tokens, which fires on those alone, as strongly as the table says."""
    rows = model.model.embed_tokens.weight.detach()
    # 259 directions in 64 dimensions see a little of each other: a threshold cuts that off.
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=len(fires_on), apply_b_dec_to_input=False))
    for i, strengths in enumerate(fires_on):
        tokens, wanted = list(strengths), torch.tensor(list(strengths.values()))
        direction = torch.linalg.pinv(rows[tokens]) @ (2 * wanted)
        sae.W_enc.data[:, i] = direction
        heard = rows @ direction
        heard[tokens] = -torch.inf
        sae.threshold.data[i] = heard.max().item() + 1e-3
        assert sae.threshold[i] < 2 * wanted.min() - 1e-3
    sae.W_dec.data = rows[promotes].clone() if promotes else torch.eye(64)[: len(fires_on)]
    return sae.requires_grad_(False)


def gather(model, tokenizer, saes, *, target=TARGET, control=CONTROL, **options) -> Evidence:
    texts = {"target": target, "control": control}
    heard = listen(model, tokenizer, saes, texts, block_size=1)
    diagnosis = diagnose(
        heard, documents={"target": 7, "control": 4}, provenance=Provenance(), permutations=5, resamples=5
    )
    return gather_evidence(model, tokenizer, saes, texts, diagnosis, provenance=Provenance(), **options)


def only(evidence: Evidence, layer: int, feature: int) -> FeatureEvidence:
    (found,) = (f for part in evidence.layers if part.layer == layer for f in part.features if f.feature == feature)
    return found


def test_contexts_show_the_planted_token_in_its_text(model, tokenizer):
    q, z = byte(tokenizer, "q"), byte(tokenizer, "Z")
    sae = planted(model, [{q: 1.0, z: 1.2}])
    found = only(gather(model, tokenizer, {2: sae}, contexts=3), 2, 0).contexts
    assert found["control"] == ()
    assert [(c.document, c.token) for c in found["target"]] == [(6, "Z"), (0, "q"), (1, "q")]
    for context, letter in zip(found["target"], "gab", strict=True):
        assert context.before == f"reads {letter} has "
        assert context.after == f", and {letter} has "
        assert context.activation == pytest.approx(2.4 if context.token == "Z" else 2, rel=1e-4)


def test_one_context_per_document_and_none_beyond_the_sample(model, tokenizer):
    sae = planted(model, [{byte(tokenizer, "q"): 1.0}])
    evidence = gather(model, tokenizer, {0: sae, 1: sae}, contexts=20, documents=4)
    assert evidence.documents == {"target": 4, "control": 4}
    assert [c.document for c in only(evidence, 1, 0).contexts["target"]] == [0, 1, 2, 3]
    # the same words again are no more evidence
    again = [TARGET[0], *TARGET[:2], *TARGET[1:5]]
    evidence = gather(model, tokenizer, {0: sae}, target=again, contexts=3)
    assert [c.document for c in only(evidence, 0, 0).contexts["target"]] == [0, 2, 4]


def test_text_at_the_edges_and_characters_of_several_bytes_stay_whole(model, tokenizer):
    features = [{byte(tokenizer, "\u00e9", place): 1.0} for place in (0, 1)]
    target = ["\u00e9t\u00e9", "\u4e16" * 8 + "a\u00e9", *("caf\u00e9 " + "x" * i for i in range(5))]
    evidence = gather(model, tokenizer, {0: planted(model, features)}, target=target, control=["plain"] * 4)
    for feature in (0, 1):  # the first and the second byte
        first, second, third, _ = only(evidence, 0, feature).contexts["target"]
        assert (first.before, first.token, first.after) == ("", "\u00e9", "t\u00e9")
        assert (second.before[-3:], second.token, second.after) == ("\u4e16\u4e16a", "\u00e9", "")
        assert "\ufffd" not in second.before
        assert (third.before, third.token, third.after) == ("caf", "\u00e9", " ")


def test_what_statistics_leave_out_is_no_evidence(model, tokenizer):
    hash_, end, q = byte(tokenizer, "#"), tokenizer.eos_token_id, byte(tokenizer, "q")
    sae = planted(model, [{q: 1.0}, {hash_: 1.0}, {end: 1.0}])
    target = [text + " # </s> q" for text in TARGET]
    plain = gather(model, tokenizer, {0: sae}, target=target)
    assert only(plain, 0, 1).contexts["target"][0].token == "#"
    assert all(found.feature != 2 for found in plain.layers[0].features)  # special tokens never count
    keep = model.model.embed_tokens.weight[hash_].clone()
    try:
        model.model.embed_tokens.weight[hash_] *= 50  # now an attention sink
        loud = gather(model, tokenizer, {0: sae}, target=target)
        assert [found.feature for found in loud.layers[0].features] == [0]
        assert {c.token for c in only(loud, 0, 0).contexts["target"]} == {"q"}
    finally:
        model.model.embed_tokens.weight[hash_] = keep


def test_the_lens_names_the_token_whose_unembedding_the_direction_is(model, tokenizer):
    named = [byte(tokenizer, letter) for letter in "wx"]
    sae = planted(model, [{byte(tokenizer, "q"): 1.0}, {byte(tokenizer, "Z"): 1.0}], promotes=named)
    evidence = gather(model, tokenizer, {1: sae})
    assert [only(evidence, 1, feature).promotes[0] for feature in (0, 1)] == ["w", "x"]
    # what MLPs read is no direction of the residual stream
    inner = gather_evidence_at(model, tokenizer, sae, "mlp_in")
    assert all(found.promotes is None for part in inner.layers for found in part.features)


def gather_evidence_at(model, tokenizer, sae: SAE, site: str) -> Evidence:
    texts = {"target": TARGET, "control": CONTROL}
    heard = listen(model, tokenizer, {1: sae}, texts, block_size=1)
    diagnosis = diagnose(
        heard, documents={"target": 7, "control": 4}, provenance=Provenance(), permutations=5, resamples=5
    )
    return gather_evidence(model, tokenizer, {1: sae}, texts, diagnosis, provenance=Provenance(), site=site)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_final_norm_is_what_the_head_reads(layout):
    model = make(LAYOUTS[layout], dtype=torch.float32)
    norm, seen = room._final_norm(model), {}
    norm.register_forward_hook(lambda _m, _i, out: seen.__setitem__("norm", out))
    model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.__setitem__("head", args[0]))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert torch.equal(seen["norm"], seen["head"])


def random_sae(kind: str) -> SAE:
    torch.manual_seed(0)
    size = {"d_in": 64, "d_sae": 200}
    if kind == "topk":
        sae = TopKSAE(TopKSAEConfig(k=7, **size))
    elif kind == "gated":
        sae = GatedSAE(GatedSAEConfig(**size))
    elif kind == "transcoder":
        sae = SkipTranscoder(SkipTranscoderConfig(d_out=48, apply_b_dec_to_input=False, **size))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(normalize_activations="layer_norm", **size))
        sae.threshold.data = torch.rand(200)
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            parameter.data = 0.5 * torch.randn_like(parameter)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "transcoder"])
def test_some_features_alone_encode_as_among_all(kind):
    sae, hidden, some = random_sae(kind), torch.randn(50, 64), [3, 199, 4, 77]
    torch.testing.assert_close(room._narrowed(sae, some).encode(hidden), sae.encode(hidden)[:, some])


def test_one_forward_feeds_all_layers_though_their_features_compete(model, tokenizer):
    saes, forwards, seen = {layer: random_sae("topk") for layer in (0, 1, 2)}, [], []
    texts = {"target": TARGET, "control": CONTROL}
    heard = listen(model, tokenizer, saes, texts, block_size=1)
    diagnosis = diagnose(
        heard, documents={"target": 7, "control": 4}, provenance=Provenance(), permutations=5, resamples=5
    )
    counter = model.model.layers[0].register_forward_pre_hook(lambda _m, _a: forwards.append(1))
    made = {}
    for memory in (None, 2 * 4 * 64 * 200, 2 * 2 * 4 * 64 * 200):
        forwards.clear()
        made[memory] = gather_evidence(
            model, tokenizer, saes, texts, diagnosis, provenance=Provenance(), memory=memory,
            progress=lambda *done: seen.append(done),
        ), len(forwards), seen[-1]  # fmt: skip
    counter.remove()
    (all_, once, told), (singly, thrice, _), (pairs, twice, told_twice) = made.values()
    assert (once, twice, thrice) == (2, 4, 6)  # a batch for each of the corpora
    assert all_ == singly == pairs
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TARGET + CONTROL)
    assert (told, told_twice) == ((tokens, tokens), (2 * tokens, 2 * tokens))
    evidence = all_
    for found in evidence.layers[2].features:
        peaks = [
            saes[2].encode(model.model.embed_tokens.weight[tokenizer(text)["input_ids"]])[:, found.feature].max().item()
            for text in TARGET
        ]
        expected = sorted((p for p in peaks if p > 0), reverse=True)[:4]
        np.testing.assert_allclose([c.activation for c in found.contexts["target"]], expected, rtol=1e-4)


def test_a_source_with_pages_is_linked(model, tokenizer):
    sae = planted(model, [{byte(tokenizer, "q"): 1.0}])
    assert only(gather(model, tokenizer, {0: sae}), 0, 0).link is None
    sae.cfg.metadata = SAEMetadata(neuronpedia_id="gemma-2-2b/20-gemmascope-res-16k")
    assert only(gather(model, tokenizer, {0: sae}), 0, 0).link == (
        "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/0"
    )


def test_saes_on_disk_are_heard_like_those_in_memory_and_a_release_is_linked(model, tokenizer, tmp_path):
    sae = planted(model, [{byte(tokenizer, "q"): 1.0}])
    sae.cfg.metadata = SAEMetadata(hook_name="model.layers.1")
    sae.save_model(tmp_path)
    folder = replace(open_saes(tmp_path)[1], overrides={"neuronpedia_id": "tiny/1-res"})
    on_disk = only(gather(model, tokenizer, {1: folder}), 1, 0)
    assert on_disk.link == "https://www.neuronpedia.org/tiny/1-res/0"
    assert on_disk.model_copy(update={"link": None}) == only(gather(model, tokenizer, {1: sae}), 1, 0)


def test_evidence_survives_the_disk_and_is_the_same_again(model, tokenizer, tmp_path):
    sae = planted(model, [{byte(tokenizer, "q"): 1.0, byte(tokenizer, "Z"): 1.2}])
    first, second = (gather(model, tokenizer, {1: sae}) for _ in range(2))
    first.save(tmp_path)
    assert Evidence.load(tmp_path) == first == second
