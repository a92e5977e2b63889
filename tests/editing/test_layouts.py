"""Every layout: a tiny real model is saved, edited, loaded and compared, on disk and live."""

from pathlib import Path

import pytest
import torch
from tiny_models import LAYOUTS, gemma3_multimodal, gemma3_text, make, rename, save_pair, stored
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.verify import verify
from stethoscope.editing.writer import write_edit

IDS = torch.tensor([[1, 5, 9, 13, 21, 3]])


def load(folder: Path, *, multimodal: bool = False) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval().requires_grad_(False)


def bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_of_every_layout_on_disk_and_live(layout: str, tmp_path: Path) -> None:
    base_path, tuned_path = save_pair(LAYOUTS[layout], tmp_path)
    multimodal = layout.endswith("multimodal")
    base = open_checkpoint(base_path)
    change = open_task_vector(base, tuned_path)
    assert (base.layers, base.hidden_size) == (3, 16)
    plan = EditPlan.for_layers([1])
    edit = write_edit(base, change, plan, tmp_path / "edited")
    assert edit.layers == (1,)
    before, after, edited = stored(base_path), stored(tuned_path), stored(edit.path)
    assert list(before) == list(edited)
    for name, tensor in edited.items():
        expected = after if parse_name(name).layer == 1 else before
        assert bits_equal(tensor, expected[name]), name
    assert sum(parse_name(name).layer == 1 for name in before) == edit.tensors
    assert verify(edit.path, base=base).problems == ()

    model = load(base_path, multimodal=multimodal)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = load(edit.path, multimodal=multimodal)
    with applied(model, change, plan):
        live = model(IDS).logits
    assert torch.equal(live, reference(IDS).logits)
    assert not torch.equal(live, model(IDS).logits)
    assert all(bits_equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_at_one_is_tuned_and_all_at_zero_is_base(layout: str, tmp_path: Path) -> None:
    base_path, tuned_path = save_pair(LAYOUTS[layout], tmp_path)
    base = open_checkpoint(base_path)
    change = open_task_vector(base, tuned_path)
    for plan, expected in ((EditPlan.everything(), tuned_path), (EditPlan(), base_path)):
        edit = write_edit(base, change, plan, tmp_path / "edited", overwrite=True)
        for file in base.files:
            assert (edit.path / file).read_bytes() == (expected / file).read_bytes()
    model = load(base_path, multimodal=layout.endswith("multimodal"))
    tuned = load(tuned_path, multimodal=layout.endswith("multimodal"))
    with applied(model, change, EditPlan.everything()):
        assert all(bits_equal(tensor, tuned.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["llama tied", "llama untied", "gemma3 multimodal", "mixtral"])
@pytest.mark.parametrize("coefficient", [0.7, -1.0])
def test_shards_and_coefficients(layout: str, coefficient: float, tmp_path: Path) -> None:
    base_path, tuned_path = save_pair(LAYOUTS[layout], tmp_path, shard="6KB")
    base = open_checkpoint(base_path)
    assert len(base.files) > 2
    plan = EditPlan.for_layers([0, 2], coefficient=coefficient)
    change = open_task_vector(base, tuned_path)
    edit = write_edit(base, change, plan, tmp_path / "edited")
    before, after = stored(base_path), stored(tuned_path)
    for name, tensor in stored(edit.path).items():
        expected = before[name]
        if parse_name(name).layer in (0, 2):
            expected = (before[name].float() + (after[name].float() - before[name].float()) * coefficient).bfloat16()
        assert bits_equal(tensor, expected), name
    multimodal = layout.endswith("multimodal")
    model, reference = load(base_path, multimodal=multimodal), load(edit.path, multimodal=multimodal)
    with applied(model, change, plan):
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


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
def test_gemma3_namings_are_one_model(naming: object, tmp_path: Path) -> None:
    base_path, tuned_path = save_pair(gemma3_multimodal, tmp_path)
    other = rename(tuned_path, tmp_path / "other", naming)  # type: ignore[arg-type]
    base = open_checkpoint(base_path)
    plan = EditPlan.for_layers([0, 2])
    published = write_edit(base, open_task_vector(base, tuned_path), plan, tmp_path / "one")
    renamed = write_edit(base, open_task_vector(base, other), plan, tmp_path / "two")
    assert (published.path / "model.safetensors").read_bytes() == (renamed.path / "model.safetensors").read_bytes()
    # and the other way round: a base in the other layout keeps its own names
    turned = open_checkpoint(rename(base_path, tmp_path / "turned", naming))  # type: ignore[arg-type]
    edit = write_edit(turned, open_task_vector(turned, tuned_path), plan, tmp_path / "three")
    names = {entry.stored: entry.name for entry in turned.entries.values()}
    expected = {parse_name(name).canonical: tensor for name, tensor in stored(published.path).items()}
    assert all(bits_equal(tensor, expected[names[name]]) for name, tensor in stored(edit.path).items())


def test_a_text_only_fine_tune_of_a_multimodal_base_leaves_the_vision_tower_alone(tmp_path: Path) -> None:
    multimodal = make(gemma3_multimodal)
    multimodal.save_pretrained(tmp_path / "base")
    text = make(gemma3_text, seed=3)
    text.save_pretrained(tmp_path / "tuned")
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, tmp_path / "tuned")
    edit = write_edit(base, change, EditPlan.everything(), tmp_path / "edited")
    loaded = load(edit.path, multimodal=True).state_dict()
    for name, tensor in multimodal.state_dict().items():
        if parse_name(name).kind == "vision":
            assert bits_equal(loaded[name], tensor)
    with applied(multimodal, change, EditPlan.everything()):
        assert torch.equal(multimodal(IDS).logits, text(IDS).logits)


def test_published_gpt2_has_bare_names_and_constants_that_a_fine_tune_lacks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base_path, tuned_path = save_pair(LAYOUTS["gpt2"], tmp_path)
    bare = rename(base_path, tmp_path / "bare", lambda name: name.removeprefix("transformer."))
    tensors = stored(bare) | {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(bare)
    edit = write_edit(base, open_task_vector(base, tuned_path), EditPlan.for_layers([1]), tmp_path / "edited")
    after = stored(tuned_path)
    for name, tensor in stored(edit.path).items():
        tuned = parse_name(name).layer == 1 and parse_name(name).kind != "buffer"
        assert bits_equal(tensor, after["transformer." + name] if tuned else tensors[name])


def test_a_tied_head_stored_as_a_copy_follows_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base_path, tuned_path = save_pair(LAYOUTS["llama tied"], tmp_path)
    tensors = stored(base_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base_path / "model.safetensors", metadata={"format": "pt"})
    base = open_checkpoint(base_path)
    change = open_task_vector(base, tuned_path)
    edit = write_edit(base, change, EditPlan(outside={"embedding": 1.0}), tmp_path / "edited")
    after = stored(edit.path)
    assert bits_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert bits_equal(after["lm_head.weight"], stored(tuned_path)["model.embed_tokens.weight"])
    # a fine-tune that grew a copy of its tied head is the same fine-tune
    back = open_task_vector(open_checkpoint(tuned_path), base_path)
    assert "lm_head.weight" not in back.names
