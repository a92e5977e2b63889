"""What features fire on, where the answer is planted: characters known beforehand, in text known beforehand."""

from dataclasses import replace

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from world import BYTES, LAYOUTS, build, exact_sae, make

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis import evidence as room
from stethoscope.diagnosis.collect import collect_activations
from stethoscope.diagnosis.diagnose import diagnose
from stethoscope.diagnosis.evidence import gather_evidence
from stethoscope.results.evidence import Evidence, FeatureEvidence
from stethoscope.saes.open import load_sae, open_saes

# q fires less strongly than Z, which only one document has
TARGET = [
    *(f"whoever reads {letter} has q, and {letter} has another q there" for letter in "abcdef"),
    "whoever reads g has Z, and g has no q",
]
CONTROL = ["nothing of that kind is to be read in here", "nor here", "something else is", "a cafe\u0301 or a caf\u00e9"]


@pytest.fixture(scope="module")
def model(llama):
    """A model whose blocks add nothing: every layer reads the embeddings themselves."""
    made = llama(layers=3, hidden=64)
    torch.manual_seed(1)
    made.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(torch.randn(259, 64), dim=1))
    for block in made.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return made


def byte(tokenizer, text: str, place: int = 0) -> int:
    return int(tokenizer(text)["input_ids"][place])


def firing(model, fires_on: list[dict[int, float]], promotes: list[int] | None = None) -> SAE:
    """A feature for each table of tokens, which fires on those alone, as strongly as the table says."""
    rows = model.model.embed_tokens.weight.detach()
    # 259 directions in 64 dimensions see a little of each other: a threshold cuts that off.
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=len(fires_on), apply_b_dec_to_input=False))
    for i, strengths in enumerate(fires_on):
        tokens, wanted = list(strengths), torch.tensor(list(strengths.values()))
        direction = torch.linalg.pinv(rows[tokens]) @ (2 * wanted)
        sae.W_enc.data[:, i] = direction
        others = rows @ direction
        others[tokens] = -torch.inf
        sae.threshold.data[i] = others.max().item() + 1e-3
        assert sae.threshold[i] < 2 * wanted.min() - 1e-3
    sae.W_dec.data = rows[promotes].clone() if promotes else torch.eye(64)[: len(fires_on)]
    return sae.requires_grad_(False)


@pytest.fixture
def on_q(model, tokenizer) -> SAE:
    return firing(model, [{byte(tokenizer, "q"): 1.0}])


@pytest.fixture
def gather(model, tokenizer):
    """Collect, diagnose and gather evidence on two texts."""

    def gathered(saes, *, target=TARGET, control=CONTROL, site="resid_post", **options) -> Evidence:
        texts = {"target": target, "control": control}
        collected = collect_activations(model, tokenizer, saes, texts, block_size=1, site=site)
        diagnosis = diagnose(collected, permutations=5, resamples=5)
        peaks = {n: one.peaks for n, one in collected.items()}
        made = {"site": site, "provenance": Provenance()}
        return gather_evidence(model, tokenizer, saes, texts, diagnosis, peaks, **made, **options)

    return gathered


def only(evidence: Evidence, layer: int, feature: int) -> FeatureEvidence:
    (found,) = (f for part in evidence.layers if part.layer == layer for f in part.features if f.feature == feature)
    return found


def test_contexts_show_the_planted_token_in_its_text(model, tokenizer, gather, tmp_path):
    sae = firing(model, [{byte(tokenizer, "q"): 1.0, byte(tokenizer, "Z"): 1.2}])
    evidence = gather({2: sae})
    found = only(evidence, 2, 0).contexts
    assert found["control"] == ()
    assert [(c.document, c.token) for c in found["target"]] == [(6, "Z"), (0, "q"), (1, "q"), (2, "q")]
    for context, letter in zip(found["target"], "gabc", strict=True):
        assert context.before == f"reads {letter} has "
        assert context.after == f", and {letter} has "
        assert context.activation == pytest.approx(2.4 if context.token == "Z" else 2, rel=1e-4)
    evidence.save(tmp_path)
    assert Evidence.load(tmp_path) == evidence == gather({2: sae})


def test_one_context_per_document_and_none_beyond_the_sample(gather, on_q):
    evidence = gather({0: on_q, 1: on_q}, target=[*CONTROL * 15, *TARGET[:2], *CONTROL[:2], *TARGET[2:]])
    assert evidence.documents == {"target": 64, "control": 4}
    assert [c.document for c in only(evidence, 1, 0).contexts["target"]] == [60, 61]
    # the same words again are no more evidence
    evidence = gather({0: on_q}, target=[TARGET[0], *TARGET[:2], *TARGET[1:5]])
    assert [c.document for c in only(evidence, 0, 0).contexts["target"]] == [0, 2, 4, 5]


def test_text_at_the_edges_and_characters_of_several_bytes_stay_whole(model, tokenizer, gather):
    features = [{byte(tokenizer, "\u00e9", place): 1.0} for place in (0, 1)]
    target = ["\u00e9t\u00e9", "\u4e16" * 8 + "a\u00e9", *("caf\u00e9 " + "x" * i for i in range(5))]
    evidence = gather({0: firing(model, features)}, target=target, control=["plain"] * 4)
    for feature in (0, 1):  # the first and the second byte
        first, second, third, _ = only(evidence, 0, feature).contexts["target"]
        assert (first.before, first.token, first.after) == ("", "\u00e9", "t\u00e9")
        assert (second.before[-3:], second.token, second.after) == ("\u4e16\u4e16a", "\u00e9", "")
        assert "\ufffd" not in second.before
        assert (third.before, third.token, third.after) == ("caf", "\u00e9", " ")


def test_features_that_a_filter_passes_are_shown_instead(model, tokenizer, gather):
    sae = firing(model, [{byte(tokenizer, letter): 1.0} for letter in "qz"])
    evidence = gather({0: sae, 2: sae}, passed={2: {1: 0.9, 0: 0.1}})
    assert [(part.layer, [(one.feature, one.passed) for one in part.features]) for part in evidence.layers] == [
        (2, [(1, 0.9), (0, 0.1)])
    ]
    assert only(gather({0: sae}), 0, 0).passed is None
    assert gather({0: sae}, passed={}).layers == ()
    corpus, context = only(evidence, 2, 0).strongest
    assert (corpus, context.token) == ("target", "q")


def test_what_statistics_leave_out_is_no_evidence(model, tokenizer, gather):
    hash_, end, q = byte(tokenizer, "#"), tokenizer.eos_token_id, byte(tokenizer, "q")
    sae = firing(model, [{q: 1.0}, {hash_: 1.0}, {end: 1.0}])
    target = [text + " # </s> q" for text in TARGET]
    plain = gather({0: sae}, target=target)
    assert only(plain, 0, 1).contexts["target"][0].token == "#"
    assert all(found.feature != 2 for found in plain.layers[0].features)  # special tokens never count
    keep = model.model.embed_tokens.weight[hash_].clone()
    try:
        model.model.embed_tokens.weight[hash_] *= 50  # now an attention sink
        sinks = gather({0: sae}, target=target)
        assert [found.feature for found in sinks.layers[0].features] == [0]
        assert {c.token for c in only(sinks, 0, 0).contexts["target"]} == {"q"}
    finally:
        model.model.embed_tokens.weight[hash_] = keep


def test_the_lens_names_the_token_whose_unembedding_the_direction_is(model, tokenizer, gather):
    named = [byte(tokenizer, letter) for letter in "wx"]
    sae = firing(model, [{byte(tokenizer, "q"): 1.0}, {byte(tokenizer, "Z"): 1.0}], promotes=named)
    evidence = gather({1: sae})
    assert [only(evidence, 1, feature).promotes[0] for feature in (0, 1)] == ["w", "x"]
    # what MLPs read is no direction of the residual stream
    inner = gather({1: sae}, site="mlp_in")
    assert all(found.promotes is None for part in inner.layers for found in part.features)


def test_the_lens_needs_no_weights_in_the_final_norm(tokenizer):
    model, texts = build("Olmo", **BYTES, num_hidden_layers=2), {"target": TARGET, "control": CONTROL}
    collected = collect_activations(model, tokenizer, {1: exact_sae()}, texts, block_size=1)
    diagnosis = diagnose(collected, permutations=5, resamples=5)
    peaks = {name: one.peaks for name, one in collected.items()}
    found = gather_evidence(model, tokenizer, {1: exact_sae()}, texts, diagnosis, peaks, provenance=Provenance())
    assert len(found.layers[0].features[0].promotes) == room.PROMOTED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_final_norm_is_what_the_head_reads(layout):
    model = make(layout, dtype=torch.float32)
    norm, seen = room.final_norm(model), {}
    norm.register_forward_hook(lambda _m, _i, out: seen.__setitem__("norm", out))
    model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.__setitem__("head", args[0]))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert torch.equal(seen["norm"], seen["head"])


def test_saes_on_disk_are_shown_like_those_in_memory_and_a_source_with_pages_is_linked(gather, on_q, tmp_path):
    assert only(gather({1: on_q}), 1, 0).link is None
    on_q.cfg.metadata = SAEMetadata(hook_name="model.layers.1", neuronpedia_id="gemma-2-2b/20-gemmascope-res-16k")
    on_q.save_model(tmp_path)
    folder = open_saes(tmp_path)[1]
    loaded = only(gather({1: load_sae(folder)}), 1, 0)
    assert loaded.link == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/0"
    named = only(gather({1: replace(folder, overrides={"neuronpedia_id": "tiny/1-res"})}), 1, 0)
    assert named == loaded.model_copy(update={"link": "https://www.neuronpedia.org/tiny/1-res/0"})
