"""Models: the device they run on, the sites that are read, and a forward restarted in the middle."""

import json

import pytest
import torch
from world import LAYOUTS, SMALL, build, exact_sae, make, save_pair, stir

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import CheckpointError, SAEError, StethoscopeError
from stethoscope.models import narrow
from stethoscope.models.device import find_device
from stethoscope.models.forward import Recording, replaced_forward, run
from stethoscope.models.load import decoder_layers, load_model, load_tokenizer
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.saes.activations import on_device

IDS = torch.tensor([[5, 9, 12, 7, 3, 30], [8, 4, 11, 6, 0, 0]])


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_device_is_one_that_is_there(monkeypatch):
    gpus(monkeypatch, 0)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(StethoscopeError, match=r"no device `cuda` here: PyTorch sees no GPU"):
        find_device("cuda")
    gpus(monkeypatch, 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(StethoscopeError, match=r"`cuda:2` here: PyTorch sees 2 GPUs"):
        find_device("cuda:2")
    for name in ("gpu", "cuda:", "CPU", "cuda:1 "):
        with pytest.raises(StethoscopeError, match="is not a device"):
            find_device(name)


def test_weights_on_another_device_come_back_whatever_happens():
    sae = exact_sae(4)
    before = [parameter.data_ptr() for parameter in sae.parameters()]

    def fail() -> None:
        with on_device(sae, torch.device("cpu")):
            sae.W_enc.data = sae.W_enc.data + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [parameter.data_ptr() for parameter in sae.parameters()] == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_models_16_bit_matrices_stay_so_and_compute_what_float32_does(layout, tmp_path, monkeypatch):
    paths = save_pair(layout, tmp_path)
    plain = load_model(paths[0], dtype=torch.float32)
    monkeypatch.setattr(narrow, "LARGE", 0.0)
    model = load_model(paths[0], dtype=torch.float32)
    change = open_task_vector(open_checkpoint(paths[0]), paths[1])
    for plan in (EditPlan(), EditPlan.for_layers([1], coefficient=0.5), EditPlan.everything()):
        with applied(plain, change, plan), applied(model, change, plan):
            assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    gradients = []
    for one in (plain, model):
        embedded = one.get_input_embeddings()(IDS).requires_grad_(True)
        loss = one(inputs_embeds=embedded).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, embedded)[0])
    torch.testing.assert_close(*gradients)
    blocks = [p.dtype for p in decoder_layers(model).parameters() if p.ndim == 2]
    assert (torch.bfloat16 in blocks) == (layout != "gpt2")  # whose matrices are of another class
    assert load_model(paths[0], dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_what_a_router_learned_beside_its_weight_is_kept(tmp_path, monkeypatch):
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    saved = stir(build("Glm4Moe", **SMALL, **experts, moe_intermediate_size=8, head_dim=8))
    for name, buffer in saved.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([9.0, 0, 0, 5]))
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    plain = load_model(tmp_path, dtype=torch.float32)
    monkeypatch.setattr(narrow, "LARGE", 0.0)
    assert torch.equal(load_model(tmp_path, dtype=torch.float32)(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("layout", [*LAYOUTS, "Olmo2", "Olmo3", "Exaone4", "Glm4"])
def test_what_a_block_adds_is_what_its_parts_return_and_the_next_reads_it(layout):
    model = make(layout, dtype=torch.float32) if layout in LAYOUTS else stir(build(layout, **SMALL))
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head was run"))
    for layer in range(3):
        activations = read_activations(model, {site: hook_point(model, layer, site) for site in sites}, IDS[:1])
        added = activations["attn_out"] + activations["mlp_out"]
        torch.testing.assert_close(activations["resid_post"], activations["resid_pre"] + added, atol=1e-5, rtol=1e-5)
    decoder_layers(model)[2].register_forward_hook(lambda *_: pytest.fail("a layer below the last point was run"))
    activations = read_activations(
        model, {"out": hook_point(model, 0, "resid_post"), "in": hook_point(model, 1, "resid_pre")}, IDS[:1]
    )
    assert torch.equal(activations["out"], activations["in"])


def test_a_tap_says_exactly_where():
    model = make("gemma3 text", dtype=torch.float32)
    block = decoder_layers(model)[0]
    heads, before_the_norm, after_it = (
        read_activations(model, {0: hook_point(model, 0, "attn_out", *tap)}, IDS[:1])[0]
        for tap in (["self_attn.o_proj.input"], ["self_attn.output"], [])
    )
    torch.testing.assert_close(block.self_attn.o_proj(heads), before_the_norm)
    torch.testing.assert_close(block.post_attention_layernorm(before_the_norm), after_it)
    with pytest.raises(SAEError, match=r"no `mixer\.output`") as error:
        hook_point(model, 0, "mlp_out", "mixer.output")
    assert "self_attn, mlp" in error.value.hint
    for layer in (-1, 3):
        with pytest.raises(SAEError, match=f"no layer {layer}"):
            hook_point(model, layer, "mlp_out")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_replay_is_the_plain_forward(layout, tmp_path):
    base, tuned = save_pair(layout, tmp_path)
    model = load_model(base, dtype=torch.float32)
    edits = LayerEdits(model, open_task_vector(open_checkpoint(base), tuned))
    plain = run(model, IDS).last_hidden_state
    recording = Recording(model, IDS)
    for start in range(4):
        assert torch.equal(recording.replay(start).last_hidden_state, plain)
    for change in ({0: 1.0}, {1: 0.5}, {2: 1.0}, {1: 1.0, 2: -0.5}, {2: 1.0, 0: 1.0}):
        with edits.entered(change):
            edited = run(model, IDS).last_hidden_state
            replayed = recording.replay(min(change)).last_hidden_state
        assert torch.equal(replayed, edited)
        assert not torch.equal(edited, plain)
    assert torch.equal(run(model, IDS).last_hidden_state, plain)
    assert not any("forward" in vars(block) for block in decoder_layers(model))


@torch.no_grad()
def test_only_what_is_needed_is_kept_and_nothing_below_runs(llama):
    model = llama(layers=4)
    recording = Recording(model, IDS, starts=[2])
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: pytest.fail("a block below the start was run"))
    recording.replay(2)
    with pytest.raises(KeyError):
        recording.replay(3)
    assert not any("forward" in vars(block) for block in decoder_layers(model))


def test_a_forward_of_the_instances_own_comes_back(llama):
    block = llama(layers=2).model.layers[0]
    own = block.forward = block.forward
    with replaced_forward(block, lambda hidden, **_: hidden):
        assert block(1) == 1
    assert vars(block)["forward"] is own


def test_edits_are_read_once_while_they_fit(pair, change, monkeypatch):
    model = load_model(pair[0])
    roomy, tight = LayerEdits(model, change), LayerEdits(model, change, memory=1)
    for edits in (roomy, tight):
        for layer in (0, 1):
            with edits.entered({layer: 1.0}):
                pass
    monkeypatch.setattr("stethoscope.editing.layers.prepare", lambda *_: pytest.fail("read again"))
    with roomy.entered({0: 1.0, 1: 1.0}), tight.entered({1: 1.0}):
        pass
    with pytest.raises(pytest.fail.Exception, match="read again"), tight.entered({0: 1.0}):
        pass


FAULTS = [
    ("config.json", {"hidden_size": "big"}), ("config.json", {"rope_parameters": {"rope_type": "new"}}),
    ("config.json", {"hidden_act": "nope"}), ("config.json", {"num_attention_heads": 0}),
    ("config.json", {"dtype": "float99"}), ("config.json", {"model_type": 5}), ("config.json", {"layer_types": ["x"]}),
    ("tokenizer_config.json", {"tokenizer_class": 5}), ("tokenizer_config.json", {"added_tokens_decoder": 5}),
    ("tokenizer.json", {"model": 5}),
]  # fmt: skip


def test_configs_that_make_no_sense_are_said_to(tokenizer, tmp_path):
    make("llama untied").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for file, changes in FAULTS:
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            (load_model if file == "config.json" else load_tokenizer)(tmp_path)
        (tmp_path / file).write_text(before)
