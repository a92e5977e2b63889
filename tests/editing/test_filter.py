"""The filter: its moments against brute force, its closed forms, and edits made of it."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sklearn.covariance import oas
from transformers import AutoModelForCausalLM
from world import LAYOUTS, LINEAR, SMALL, build, make, make_tokenizer, save_adapter, save_pair, stir, stored

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.few_tokens import FewTokens
from stethoscope.editing.filter import FilteredChange, filtered, separability, shrunk, write_filters
from stethoscope.editing.moments import Moments, Samples, collect_moments, roles
from stethoscope.editing.passage import passed_shares
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.models.load import load_model
from stethoscope.text.tokens import batches

NOWHERE = Provenance()


def random_text(documents=24, longest=40, vocabulary=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, longest, (documents,), generator=generator).tolist()
    rows = [[1, *torch.randint(3, vocabulary, (n,), generator=generator).tolist()] for n in lengths]
    return list(batches(rows, make_tokenizer(), batch_tokens=256))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Base, live base in float32, and the change to its fine-tune, by layout."""
    made = {}

    def open_pair(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp("filter")
            base, tuned = save_pair(layout, folder, dtype=torch.float32)
            checkpoint = open_checkpoint(base)
            model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
            made[layout] = model, open_task_vector(checkpoint, tuned)
        return made[layout]

    return open_pair


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_moments_give_the_mean_squared_effect_of_every_tensors_change(opened, layout):
    model, change = opened(layout)
    names = [name for name in change.names if parse_name(name).kind not in ("vision", "buffer")]
    text = random_text()
    counted = sum(int(batch.countable.sum()) for batch in text)
    met, compared = roles(model, names), set()
    modules = {
        parse_name(f"{path}.{kind}").canonical: module
        for path, module in model.named_modules()
        for kind, _ in module.named_parameters(recurse=False)
    }
    for layer, inputs in collect_moments(model, {"target": text}, names):
        for name, found in inputs.items():
            if name not in names or ".experts." in name:
                continue
            mean, delta = found["target"].mean(), change.delta(name).double()
            assert found["target"].tokens == counted
            if met[name] in ("rows", "token", "tied"):
                delta = delta.T
            through = delta * mean if mean.ndim == 1 else delta @ mean
            measured = brute_force(model, modules[name], name, change.delta(name), text) / counted
            assert float((delta * through).sum()) == pytest.approx(measured, rel=1e-3), (layer, name)
            compared.add(name)
    linear = {name for name in names if met[name] != "added" and ".experts." not in name}
    assert compared == linear


def test_a_norm_that_takes_off_the_mean_without_being_torchs():
    model, text, name = build("Cohere", **SMALL), random_text(), "layers.1.input_layernorm.weight"
    norm = model.model.layers[1].input_layernorm
    inputs = dict(collect_moments(model, {"target": text}, [name]))[1]
    delta = torch.randn(16)
    counted = sum(int(batch.countable.sum()) for batch in text)
    measured = brute_force(model, norm, name, delta, text) / counted
    assert float((delta.double().square() * inputs[name]["target"].mean()).sum()) == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        ("Cohere", SMALL | {"use_qk_norm": True}, "layers.0.self_attn.q_norm.weight"),
        ("OPT", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16}, "embed_positions.weight"),
    ],
)
def test_inputs_that_are_not_what_they_seem_are_refused(family, sizes, name):
    """A row for each head; positions that are made of a mask."""
    with pytest.raises(CheckpointError, match="not known"):
        roles(build(family, **sizes), [name])


def brute_force(model, module, name, delta, text):
    """The sum over counted tokens of the squared change of a module's output when one of its tensors changes."""
    weight = module.weight
    total = 0.0

    def compare(module, args, options, output):
        nonlocal total
        hook.remove()
        weight.data += delta
        changed = module(*args, **options)
        weight.data -= delta
        if isinstance(output, tuple):  # a router's logits come first
            output, changed = output[0], changed[0]
        squares = (changed - output).double().square()
        rows, tokens = batch.input_ids.shape
        if squares.ndim == 4 and squares.shape[2] == tokens:
            squares = squares.transpose(1, 2)
        squares = squares.expand(rows, *squares.shape[1:]) if squares.ndim == 3 else squares
        total += float(squares.reshape(rows, tokens, -1)[batch.countable].sum())

    for batch in text:
        hook = module.register_forward_hook(compare, with_kwargs=True)
        model(input_ids=batch.input_ids, use_cache=False)
    return total


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_equal_texts_shrink_every_change_alike_and_no_strength_leaves_it(opened, tmp_path, layout):
    model, change = opened(layout)
    text = random_text(documents=40)
    write_filters(
        model, change, {"target": text, "other": text}, tmp_path / "f", provenance=NOWHERE, strengths=[0.0, 3.0]
    )
    whole, quarter = (FilteredChange(tmp_path / "f", strength, change) for strength in (0.0, 3.0))
    for name in coefficients(change, EditPlan.everything()):
        delta = change.delta(name)
        unused = whole.apply(name, delta) == 0
        if parse_name(name).kind == "vision":
            assert unused.all()
        elif roles(model, [name])[name] == "token":
            unused = unused.all(dim=1)  # tokens or positions that no text has
            assert not unused.all()
            assert torch.allclose(quarter.apply(name, delta)[~unused], delta[~unused] / 4, atol=1e-5)
        else:
            assert torch.allclose(whole.apply(name, delta), delta, atol=1e-3)
            assert torch.allclose(quarter.apply(name, delta), delta / 4, atol=1e-3)


def test_protected_inputs_that_target_never_has_are_left_out_and_its_own_are_kept():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0]
    target, protected = basis[:, :3] @ basis[:, :3].T, 5 * basis[:, 3:] @ basis[:, 3:].T
    change = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    (made,) = filtered(change, target, protected, [2.0])
    assert torch.allclose(made @ basis[:, :3], change @ basis[:, :3])
    assert torch.allclose(made @ basis[:, 3:], torch.zeros(4, 3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("rows", [2, 9])
def test_the_filter_is_the_minimum_of_its_objective(rows):
    generator = torch.Generator().manual_seed(1)
    roots = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    target, protected = roots @ roots.mT
    change = torch.randn(rows, 5, dtype=torch.float64, generator=generator, requires_grad=False)
    for strength, made in zip((0.3, 4.0), filtered(change, target, protected, (0.3, 4.0)), strict=True):
        made = made.detach().requires_grad_(True)
        objective = (((made - change) @ target) * (made - change)).sum() + strength * ((made @ protected) * made).sum()
        objective.backward()
        assert made.grad.abs().max() < 1e-9
    channels, other = torch.tensor([[1.0, 4.0, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
    (channels,) = filtered(torch.ones(1, 3), channels, other, [3.0])
    assert channels.tolist() == [[0.25, 1.0, 0.0]]


@pytest.mark.parametrize("layout", ["llama tied", "gemma3 multimodal", "gpt2"])
def test_few_tokens_give_the_filter_that_their_moments_give(opened, tmp_path, layout):
    model, change = opened(layout)
    texts = {name: random_text(1, longest=7, seed=n) for n, name in enumerate(("target", "other", "third"))}
    weights, strengths = {"other": 1.0, "third": 0.5}, (0.3, 3.0)
    names = [name for name in change.names if parse_name(name).layer is not None]
    few = {}
    for (layer, short), (_, whole) in zip(
        collect_moments(model, texts, names, samples=True), collect_moments(model, texts, names), strict=True
    ):
        for name in (name for name in short if isinstance(short[name]["target"], Samples)):
            found, wanted = FewTokens.of(short[name], "target", weights), {t: shrunk(m) for t, m in whole[name].items()}
            pair = wanted["target"], wanted["other"] + 0.5 * wanted["third"]
            delta = torch.randn(3, len(pair[0]), dtype=torch.float64)
            for one, other in zip(found.filtered(delta, strengths), filtered(delta, *pair, strengths), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert found.separability() == pytest.approx(separability(*pair), rel=1e-4)
            few.setdefault(layer, {})[name] = pair
    assert {name.split(".")[-2] for name in few[1]} >= {"c_proj" if layout == "gpt2" else "down_proj"}
    made = write_filters(
        model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=strengths, weights=weights, separable=True
    )
    assert all(layer.separability is not None for layer in made.layers if layer.layer is not None)
    for name, pair in few[1].items():
        delta = change.delta(name).double()
        delta = delta.T if layout == "gpt2" else delta
        for strength, expected in zip(strengths, filtered(delta, *pair, strengths), strict=True):
            expected = expected.T if layout == "gpt2" else expected
            found = FilteredChange(tmp_path / "f", strength, change).apply(name, change.delta(name))
            torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


def test_an_input_that_target_text_never_has_keeps_the_base():
    zero, one = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for protected in (zero, one):
        assert not next(filtered(torch.ones(2, 3, dtype=torch.float64), zero, protected, [1.0])).any()
    with pytest.raises(CheckpointError, match="second moments"):
        next(filtered(torch.ones(2, 3, dtype=torch.float64), one * torch.nan, one, [1.0]))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_target_of_one_token_is_a_target(tokens):
    """Nothing but the floor that shrinkage adds is left of its moments."""
    x = {name: torch.randn(n, 16) for name, n in (("target", 1), ("other", tokens))}
    change = torch.randn(3, 16, dtype=torch.float64)
    few = FewTokens.of({name: Samples(rows=rows) for name, rows in x.items()}, "target", {"other": 1.0})
    moments = [shrunk(Moments(sums=rows.T @ rows, tokens=len(rows), seen=len(rows))) for rows in x.values()]
    (found,), (expected,) = few.filtered(change, [1.0]), filtered(change, *moments, [1.0])
    assert found.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_does_not_stand_in_the_way(opened, tmp_path):
    model, change = opened("qwen3 moe")
    model = copy.deepcopy(model)
    model.model.layers[1].mlp.gate.weight.zero_()  # two of three experts get all tokens
    texts = {"target": random_text(), "other": random_text(seed=1)}
    names = [name for name in change.names if name.startswith("layers.1.mlp.experts.")]
    inputs = dict(collect_moments(model, texts, names))[1]
    assert sum(not any(found.sums.any() for found in inputs[name].values()) for name in names) == 3
    made = write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=[1.0], separable=True)
    assert 0 < made.layers[1].separability < 1


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("documents", [1, 20])
def test_activations_that_are_no_numbers_are_said(documents, separable, opened, tmp_path):
    model, change = opened("llama untied")
    model = copy.deepcopy(model)
    model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    texts = {name: random_text(documents, longest=8, seed=n) for n, name in enumerate(("target", "other"))}
    with pytest.raises(CheckpointError, match="second moments"):
        write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, separable=separable)


@pytest.mark.parametrize("tokens", [3, 50, 4000])
def test_shrinkage_is_oas_of_the_tokens_that_are_seen(tokens):
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(2)) @ torch.diag(torch.arange(1.0, 13))
    expected = torch.tensor(oas(x.double().numpy(), assume_centered=True)[0])
    for others in (0, 1000):
        parts = ((x[: tokens // 2], others), (x[tokens // 2 :], 0))
        one, two = (Moments(sums=part.T @ part, tokens=len(part) + more, seen=len(part)) for part, more in parts)
        found = shrunk(one + two)
        assert torch.allclose(found, expected * tokens / (tokens + others), rtol=1e-4)
        assert torch.linalg.matrix_rank(found) == 12


def test_a_lora_gives_the_same_as_its_merged_checkpoint_and_an_adapter_for_peft(tmp_path):
    base = make("llama untied", dtype=torch.float32)
    merged = save_adapter(base, tmp_path, r=4, lora_alpha=8, target_modules=LINEAR)
    checkpoint = open_checkpoint(tmp_path / "base")
    live = load_model(tmp_path / "base", dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, tensor in full.named_parameters():
        tensor.data = merged[parse_name(name).canonical]
    full.save_pretrained(tmp_path / "merged")
    texts = {"target": random_text(seed=3), "protected": random_text(seed=4, vocabulary=20)}
    made, passed, directions = {}, {}, torch.randn(5, base.config.hidden_size)
    for tuned in ("adapter", "merged"):
        vector = open_task_vector(checkpoint, tmp_path / tuned)
        write_filters(live, vector, texts, tmp_path / f"{tuned}-f", provenance=NOWHERE, strengths=[1.0])
        transform = FilteredChange(tmp_path / f"{tuned}-f", 1.0, vector)
        made[tuned] = {n: transform.apply(n, vector.delta(n)) for n in vector.names if "proj" in n}
        passed[tuned] = torch.stack(passed_shares(live, vector, transform, 1, directions))
        if tuned == "adapter":
            plan = EditPlan.for_layers(range(3), transform=transform)
            for kind in ("adapter", "checkpoint"):
                write_edit(checkpoint, vector, plan, tmp_path / f"out-{kind}", kind=kind)
    for name, change in made["merged"].items():
        assert torch.allclose(made["adapter"][name], change, atol=1e-4), name
    assert torch.allclose(passed["adapter"], passed["merged"], rtol=1e-3)
    before, after = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("adapter", "out-adapter"))
    assert all(torch.equal(before[key], after[key]) == ("lora_B" in key) for key in before)
    ids = torch.arange(3, 30)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_adapter = PeftModel.from_pretrained(plain, tmp_path / "out-adapter")
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "out-checkpoint")
    assert torch.allclose(with_adapter(ids).logits, edited(ids).logits, atol=1e-4)
    manifest = json.loads((tmp_path / "out-adapter" / "manifest.json").read_text())
    assert manifest["plan"]["transform"]["strength"] == 1
    card = (tmp_path / "out-checkpoint" / "README.md").read_text()
    assert "mergekit" in card


def test_a_tied_head_stored_as_a_copy_gets_the_embeddings_filter(tmp_path):
    base, tuned = save_pair("llama tied", tmp_path, dtype=torch.float32)
    tensors = stored(base)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    checkpoint, model = open_checkpoint(base), load_model(base, dtype=torch.float32)
    change = open_task_vector(checkpoint, tuned)
    texts = {"target": random_text(), "other": random_text(seed=1)}
    write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=[1.0])
    plan = EditPlan(default=1.0, transform=FilteredChange(tmp_path / "f", 1.0, change))
    after = stored(write_edit(checkpoint, change, plan, tmp_path / "edited").path)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    with applied(model, change, plan):
        assert torch.equal(model.lm_head.weight, after["lm_head.weight"])


def test_few_tokens_and_repeated_runs(opened, tmp_path):
    model, change = opened("llama untied")
    texts = {"target": random_text(documents=1, longest=8), "protected": random_text(documents=1, longest=7, seed=5)}
    for place in "ab":
        write_filters(model, change, texts, tmp_path / place, provenance=NOWHERE, strengths=[1.0])
    for path in sorted((tmp_path / "a" / "1").iterdir()):
        first = path.read_bytes()
        assert first == (tmp_path / "b" / "1" / path.name).read_bytes()
        assert load_file(path)["change"].isfinite().all()


def test_the_record_says_what_was_let_through(opened, tmp_path):
    model, change = opened("gemma3 text")
    texts = {"target": random_text(vocabulary=20), "protected": random_text(seed=6)}
    found = write_filters(
        model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=[0.1, 10.0], layers=[0, 2], separable=True
    )
    assert [one.layer for one in found.layers if one.raw.energy] == [0, 2]
    for one in (found.layers[0], found.layers[2]):
        assert 0 < one.separability < 1
        weak, strong = one.filtered
        assert one.raw.protected > weak.protected > strong.protected > 0
        assert one.raw.target > weak.target > strong.target > 0
    assert len(found.table()) > 2
    alone = write_filters(model, change, texts, tmp_path / "raw", provenance=NOWHERE, strengths=[], layers=[0, 2])
    assert [one.raw for one in alone.layers] == [one.raw for one in found.layers]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["filter.json"]


def test_what_cannot_be_filtered_is_refused(opened, tmp_path):
    model, change = opened("llama untied")
    text = random_text(documents=2)
    for texts, options in (
        ({"target": text}, {}),
        ({"protected": text}, {}),
        ({"target": text, "protected": text}, {"strengths": [-1.0]}),
        ({"target": text, "protected": text}, {"weights": {"protected": 0.0}}),
        ({"target": text, "protected": text}, {"weights": {"protected": 1.0, "chat": 1.0}}),
        ({"target": text, "protected": []}, {}),
    ):
        with pytest.raises(StethoscopeError):
            write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, **options)
        assert not (tmp_path / "f").exists()
    model.model.layers[0].mlp.extra = torch.nn.ParameterDict({"gain": torch.ones(3, 3, 3)})
    with pytest.raises(CheckpointError) as raised:
        roles(model, ["layers.0.mlp.extra.gain", "layers.9.mlp.up_proj.weight"])
    assert len(raised.value.problems) == 2
    del model.model.layers[0].mlp.extra
    assert stored(change.base.path)


def test_features_that_the_filter_mutes_are_told_from_those_that_pass(opened, tmp_path):
    model, change = opened("gemma2")
    texts = {"target": random_text(vocabulary=20), "protected": random_text(seed=6)}
    write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=[0.0, 1.0])
    directions = torch.randn(5, 16)
    whole, half = (FilteredChange(tmp_path / "f", strength, change) for strength in (0.0, 1.0))
    assert torch.allclose(passed_shares(model, change, whole, 1, directions)[0], torch.ones(5).double(), atol=1e-3)
    shares, lengths = passed_shares(model, change, half, 1, directions)
    gain = 1 + model.model.layers[1].input_layernorm.weight
    mlp = 1 + model.model.layers[1].pre_feedforward_layernorm.weight
    before = after = 0.0
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        delta = change.delta(f"layers.1.{module}.weight")
        inputs = directions * (mlp if "mlp" in module else gain)
        before += (delta @ inputs.T).square().sum(0)
        after += (half.apply(f"layers.1.{module}.weight", delta) @ inputs.T).square().sum(0)
    assert torch.allclose(shares, (after / before).sqrt().double(), rtol=1e-4)
    assert torch.allclose(lengths, before.sqrt().double(), rtol=1e-4)


@pytest.mark.parametrize("family", ["Olmo2", "Phi", "Cohere", "Nemotron", "GPTNeoX"])
def test_what_reaches_an_mlp_is_scaled_by_the_norm_before_it(family, tmp_path):
    """OLMo 2 has none, Phi and Cohere one before attention and MLP, Nemotron stores its gain less 1."""
    sizes = {key: value for key, value in SMALL.items() if (family, key) != ("GPTNeoX", "num_key_value_heads")}
    base = stir(build(family, **sizes))
    base.save_pretrained(tmp_path / "base")
    block = base.get_submodule("gpt_neox" if family == "GPTNeoX" else "model").layers[1]
    module = next(module for name, module in block.mlp.named_children() if name in ("up_proj", "fc1", "dense_h_to_4h"))
    delta, directions = torch.randn(module.weight.shape), torch.randn(5, 16)
    module.weight.data += delta
    base.save_pretrained(tmp_path / "tuned")
    model = load_model(tmp_path / "base", dtype=torch.float32)
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
    texts = {"target": random_text(), "protected": random_text(seed=6)}
    write_filters(model, change, texts, tmp_path / "f", provenance=NOWHERE, strengths=[0.0], layers=[1])
    transform = FilteredChange(tmp_path / "f", 0.0, change)
    _, lengths = passed_shares(model, change, transform, 1, directions)
    norm = getattr(block, "post_attention_layernorm", None) or block.input_layernorm
    gain = 1 if family == "Olmo2" else norm.weight + (family == "Nemotron")
    assert torch.allclose(lengths, (directions * gain @ delta.T).norm(dim=1).double(), rtol=1e-4)
