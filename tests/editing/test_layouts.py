"""Every layout: a tiny real model is saved, edited, loaded and compared, on disk and live."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from world import LAYOUTS, Kept, make, rename, save_pair, stored

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit

IDS = torch.tensor([[1, 5, 9, 13, 21, 3]])


def load(folder, layout=""):
    auto = AutoModelForImageTextToText if layout.endswith("multimodal") else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval().requires_grad_(False)


def bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def edit_of(base, tuned, plan, out):
    base = open_checkpoint(base)
    return write_edit(base, open_task_vector(base, tuned), plan, out, overwrite=True).path


SHARDED = ("llama tied", "llama untied", "gemma3 multimodal", "mixtral")


@pytest.mark.parametrize(
    ("layout", "layers", "coefficient", "shard"),
    [(layout, [1], 1.0, "5GB") for layout in LAYOUTS]
    + [(layout, [0, 2], coefficient, "6KB") for layout in SHARDED for coefficient in (0.7, -1.0)],
)
def test_layers_of_every_layout_on_disk_and_live(layout, layers, coefficient, shard, tmp_path):
    base_path, tuned_path = save_pair(layout, tmp_path, shard=shard)
    base = open_checkpoint(base_path)
    change = open_task_vector(base, tuned_path)
    assert (base.layers, base.hidden_size) == (3, 16)
    assert (len(base.files) > 2) == (shard == "6KB")
    plan = EditPlan.for_layers(layers, coefficient=coefficient)
    edit = write_edit(base, change, plan, tmp_path / "edited")
    assert edit.layers == tuple(layers)
    before, after, edited = stored(base_path), stored(tuned_path), stored(edit.path)
    assert list(before) == list(edited)
    for name, tensor in edited.items():
        expected = before[name]
        if parse_name(name).layer in layers:
            difference = after[name].float() - before[name].float()
            expected = after[name] if coefficient == 1 else (before[name].float() + difference * coefficient).bfloat16()
        assert bits_equal(tensor, expected), name
    assert sum(parse_name(name).layer in layers for name in before) == edit.tensors
    assert verify(edit.path, base=base).problems == ()

    model, reference = load(base_path, layout), load(edit.path, layout)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with applied(model, change, plan):
        live = model(IDS).logits
    assert torch.equal(live, reference(IDS).logits)
    assert not torch.equal(live, model(IDS).logits)
    assert all(bits_equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_at_one_is_tuned_and_all_at_zero_is_base(layout, tmp_path):
    base, tuned = save_pair(layout, tmp_path)
    for plan, expected in ((EditPlan.everything(), tuned), (EditPlan(), base)):
        edited = edit_of(base, tuned, plan, tmp_path / "edited")
        assert (edited / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    model, wanted = load(base, layout), load(tuned, layout).state_dict()
    with applied(model, open_task_vector(open_checkpoint(base), tuned), EditPlan.everything()):
        assert all(bits_equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def runtime_name(name: str) -> str:
    """Gemma 3's published name -> the name that newer versions of Transformers run it under."""
    for old, new in {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."}.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return "model." + name


def text_name(name: str) -> str | None:
    prefix = "language_model."
    return name[len(prefix) :] if name.startswith(prefix) else None


def nested_vision_name(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.") if name.startswith("vision_tower.") else name


@pytest.mark.parametrize("naming", [runtime_name, text_name, nested_vision_name], ids=lambda f: f.__name__)
def test_gemma3_namings_are_one_model(naming, tmp_path):
    base, tuned = save_pair("gemma3 multimodal", tmp_path)
    plan = EditPlan.for_layers([0, 2])
    published = edit_of(base, tuned, plan, tmp_path / "one")
    renamed = edit_of(base, rename(tuned, tmp_path / "other", naming), plan, tmp_path / "two")
    assert (published / "model.safetensors").read_bytes() == (renamed / "model.safetensors").read_bytes()
    # and the other way round: a base in the other layout keeps its own names
    turned = open_checkpoint(rename(base, tmp_path / "turned", naming))
    edited = edit_of(turned.path, tuned, plan, tmp_path / "three")
    names = {entry.stored: entry.name for entry in turned.entries.values()}
    expected = {parse_name(name).canonical: tensor for name, tensor in stored(published).items()}
    assert all(bits_equal(tensor, expected[names[name]]) for name, tensor in stored(edited).items())


def test_a_text_only_fine_tune_of_a_multimodal_base_leaves_the_vision_tower_alone(tmp_path):
    multimodal, text = make("gemma3 multimodal"), make("gemma3 text", seed=3)
    multimodal.save_pretrained(tmp_path / "base")
    text.save_pretrained(tmp_path / "tuned")
    edited = edit_of(tmp_path / "base", tmp_path / "tuned", EditPlan.everything(), tmp_path / "edited")
    loaded = load(edited, "multimodal").state_dict()
    for name, tensor in multimodal.state_dict().items():
        if parse_name(name).kind == "vision":
            assert bits_equal(loaded[name], tensor)
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
    with applied(multimodal, change, EditPlan.everything()):
        assert torch.equal(multimodal(IDS).logits, text(IDS).logits)


def test_published_gpt2_has_bare_names_and_constants_that_a_fine_tune_lacks(tmp_path):
    base, tuned = save_pair("gpt2", tmp_path)
    bare = rename(base, tmp_path / "bare", lambda name: name.removeprefix("transformer."))
    tensors = stored(bare) | {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    after = stored(tuned)
    for name, tensor in stored(edit_of(bare, tuned, EditPlan.for_layers([1]), tmp_path / "edited")).items():
        moved = parse_name(name).layer == 1 and parse_name(name).kind != "buffer"
        assert bits_equal(tensor, after["transformer." + name] if moved else tensors[name])


def test_a_tied_head_stored_as_a_copy_follows_the_embedding(tmp_path):
    base, tuned = save_pair("llama tied", tmp_path)
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model, change = load(base), open_task_vector(open_checkpoint(base), tuned)
    for transform in (None, Kept()):
        plan = EditPlan(outside={"embedding": 1.0}, transform=transform)
        after = stored(write_edit(change.base, change, plan, tmp_path / "edited", overwrite=True).path)
        assert bits_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
        expected = change.edited("embed_tokens.weight", 0.5 if transform else 1.0)
        assert bits_equal(after["lm_head.weight"], expected)
        with applied(model, change, plan):
            assert bits_equal(model.lm_head.weight, expected)
    # a fine-tune that grew a copy of its tied head is the same fine-tune
    assert "lm_head.weight" not in open_task_vector(open_checkpoint(tuned), base).names
