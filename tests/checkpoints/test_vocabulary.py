"""A fine-tune with added tokens, or with fewer rows: its layers are edited all the same, in the base's vocabulary."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from world import make, make_tokenizer, planted_documents, stir, write_lines

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.editing.apply import applied
from stethoscope.editing.patch import apply_patch
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.preview import preview
from stethoscope.editing.verify import verify
from stethoscope.editing.vocabulary import extend_vocabulary
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

IDS = torch.tensor([[1, 5, 9, 13, 21, 3, 47]])
ROWS = 48
LAYOUTS = ["llama tied", "llama untied", "gemma3 text", "gemma3 multimodal", "gpt2", "phi"]
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
EVERYTHING = {"layer 1": EditPlan.for_layers([1]), "everything": EditPlan.everything()}


def canonical(model):
    """The weights of a model by canonical name."""
    return {parse_name(key).canonical: tensor.clone() for key, tensor in model.state_dict().items()}


def logits_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def expected_logits(base, weights, plan):
    """The base with a plan's tensors replaced by those of `weights`, as far as it has rows."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            name = parse_name(key).canonical
            if plan.coefficient(name) and name in weights:
                shared = min(len(tensor), len(weights[name]))
                tensor[:shared] = weights[name][:shared]
    return model(IDS).logits


@pytest.mark.parametrize("rows", [53, 40])
@pytest.mark.parametrize("plan", EVERYTHING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_has_the_vocabulary_of_the_base(layout, plan, rows, tmp_path):
    plan = EVERYTHING[plan]
    model = make(layout)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    stir(model).save_pretrained(tmp_path / "tuned")
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, tmp_path / "tuned")
    edit = write_edit(base, change, plan, tmp_path / "edited")
    tuned = canonical(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32))
    expected = expected_logits(base.path, tuned, plan)
    assert torch.equal(logits_of(edit.path), expected)
    assert verify(edit.path, base=base).ok
    live = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with applied(live, change, plan):
        torch.testing.assert_close(live(IDS).logits, expected)
    half = change.edited("embed_tokens.weight", 0.5).float()
    shared = min(rows, ROWS)
    between = (base["embed_tokens.weight"][:shared].float() + tuned["embed_tokens.weight"][:shared]) / 2
    torch.testing.assert_close(half[:shared], between, rtol=1e-2, atol=1e-3)
    assert torch.equal(half[shared:], base["embed_tokens.weight"][shared:].float())
    said = f"{abs(rows - ROWS)} rows {'more' if rows > ROWS else 'fewer'}"
    assert said in "\n".join(edit.warnings)
    assert said in "\n".join(edit.manifest["notes"])
    assert said in (edit.path / "README.md").read_text()


def with_larger_vocabulary(folder):
    """A base in `base`, and in `tuned` its fine-tune with more tokens."""
    model = make("llama untied")
    model.save_pretrained(folder / "base")
    model.resize_token_embeddings(53)
    stir(model).save_pretrained(folder / "tuned")
    return open_checkpoint(folder / "base")


def test_a_patch_takes_it_back(tmp_path):
    base = with_larger_vocabulary(tmp_path)
    patch = write_edit(
        base, open_task_vector(base, tmp_path / "tuned"), EditPlan.everything(), tmp_path / "patch", kind="patch"
    )
    apply_patch(patch.path, base.path, tmp_path / "edited")
    assert "5 rows more" in (tmp_path / "edited" / "README.md").read_text()
    apply_patch(patch.path, tmp_path / "edited", tmp_path / "again", undo=True)
    for name in base.files:
        assert (tmp_path / "again" / name).read_bytes() == (base.path / name).read_bytes()


ADAPTERS = {
    "saved because it was resized": {"target_modules": ["q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 50]},
    "tokens of both": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 50], "lm_head": [4, 51]},
    },
    "LoRA of embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "DoRA of the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}  # fmt: skip


def save_resized_adapter(folder, layout, rows, **options):
    """A base and a random adapter of the base with another number of rows; what PEFT merges, by canonical name."""
    from peft import LoraConfig, get_peft_model

    make(layout, dtype=torch.float32).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(init_lora_weights=False, r=2, **options))
        for key, parameter in peft.named_parameters():
            if "modules_to_save" in key or "magnitude" in key or "tokens_delta" in key:
                parameter.data += 0.1 * torch.rand_like(parameter)
        peft.save_pretrained(folder / "adapter")
        return canonical(peft.merge_and_unload())


@pytest.mark.parametrize(
    ("layout", "case"),
    [*(("llama untied", case) for case in ADAPTERS), ("llama tied", "saved because it was resized"),
     ("llama tied", "trainable tokens")],
)  # fmt: skip
def test_an_adapter_of_a_resized_base(layout, case, tmp_path):
    from peft import PeftModel

    options = ADAPTERS[case]
    merged = save_resized_adapter(tmp_path, layout, 53, **options)
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, tmp_path / "adapter")
    assert "left out" in "\n".join(change.notes)
    live = AutoModelForCausalLM.from_pretrained(base.path)
    with applied(live, change, EditPlan.everything()):
        expected = expected_logits(base.path, merged, EditPlan.everything())
        torch.testing.assert_close(live(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    for plan in EVERYTHING.values():
        edit = write_edit(base, change, plan, tmp_path / "edited", overwrite=True)
        torch.testing.assert_close(logits_of(edit.path), expected_logits(base.path, merged, plan), rtol=1e-5, atol=1e-6)
    for name in change.names:
        assert change.energy(name) == pytest.approx(float(change.delta(name).double().square().sum()), rel=1e-5)
    # an adapter of one layer fits the base as it is
    small = write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "small", kind="adapter")
    assert open_task_vector(base, small.path).notes == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), small.path)
    expected = expected_logits(base.path, merged, EditPlan.for_layers([1]))
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert preview(base, change, EditPlan.everything(), tmp_path / "large", kind="adapter").problems


def test_an_adapter_with_fewer_rows(tmp_path):
    merged = save_resized_adapter(tmp_path, "llama untied", 40, target_modules=["q_proj", "embed_tokens", "lm_head"])
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, tmp_path / "adapter")
    edit = write_edit(base, change, EditPlan.everything(), tmp_path / "edited")
    expected = expected_logits(base.path, merged, EditPlan.everything())
    torch.testing.assert_close(logits_of(edit.path), expected, rtol=1e-5, atol=1e-6)


def test_a_filtered_edit_of_a_fine_tune_with_added_tokens(planted, tokenizer, tmp_path, capsys):
    shutil.copytree(planted.task_vector.base.path, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = AutoModelForCausalLM.from_pretrained(planted.task_vector.store.path)
    tuned.resize_token_embeddings(tuned.config.vocab_size + 3)
    tuned.save_pretrained(tmp_path / "tuned")
    larger = make_tokenizer()
    larger.add_tokens(["<a>", "<b>", "<c>"])
    larger.save_pretrained(tmp_path / "tuned")
    for name, kind in (("sums", "target"), ("words", "control")):
        write_lines(tmp_path / f"{name}.jsonl", ({"text": text} for text in planted_documents(kind, 40, 5)))
    given = {"base": "base", "tuned": "tuned", "keep": "sums.jsonl", "protect": "words.jsonl", "out": "out"}
    options = [part for name, path in given.items() for part in (f"--{name}", str(tmp_path / path))]
    main(["edit", *options, "--strength", "1"])
    assert "3 rows more" in " ".join(capsys.readouterr().err.split())
    assert verify(tmp_path / "out", base=open_checkpoint(tmp_path / "base")).ok
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 259
    before = (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before


def test_embeddings_that_are_asked_for_by_name_are_refused(tmp_path):
    base = with_larger_vocabulary(tmp_path)
    change = open_task_vector(base, tmp_path / "tuned")
    asked = EditPlan(outside={"embedding": 1.0})
    assert "vocabulary" in "\n".join(preview(base, change, asked, tmp_path / "edited").problems)


def with_tokenizers(folder, tokenizer):
    """The tokenizers of a base in `base` and of a fine-tune with more tokens in `tuned`."""
    tokenizer.save_pretrained(folder / "base")
    larger = make_tokenizer()
    larger.add_tokens(["<a>", "<b>", "<c>", "<d>", "<e>"])
    larger.save_pretrained(folder / "tuned")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_takes_the_vocabulary_of_its_fine_tune(layout, tokenizer, tmp_path, capsys):
    model = make(layout)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model.resize_token_embeddings(53)
    stir(model).to(torch.float32).save_pretrained(tmp_path / "tuned")
    with_tokenizers(tmp_path, tokenizer)
    (tmp_path / "base" / "merges.txt").write_text("of another tokenizer")
    (tmp_path / "tuned" / "tokenization_mine.py").write_text("code")
    names = [f"--{name}={tmp_path / name}" for name in ("base", "tuned")]
    main(["extend-vocabulary", *names, "--out", str(tmp_path / "larger"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert set(rows.values()) == {53}
    base, larger, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "larger", "tuned"))
    for name in base:
        own = base[name]
        assert torch.equal(larger[name][: len(own)] if name in rows else larger[name], own)
        if name in rows:
            assert torch.equal(larger[name][len(own) :], tuned[name][len(own) :].to(own.dtype))
    assert (larger.path / "tokenizer.json").read_bytes() == (tuned.path / "tokenizer.json").read_bytes()
    assert not {path.name for path in larger.path.iterdir()} & {"merges.txt", "tokenization_mine.py"}
    added = torch.tensor([[1, 5, 50, 52]])
    assert AutoModelForCausalLM.from_pretrained(larger.path)(added).logits.shape[-1] == 53
    # an edit of it may ask for embeddings, and all of the change makes tuned
    plan = EditPlan(default=1.0, outside={"embedding": 1.0})
    change = open_task_vector(larger, tuned.path)
    assert not any("vocabulary" in note for note in change.notes)
    edited = write_edit(larger, change, plan, tmp_path / "edited").path
    made, wanted = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (edited, tuned.path))
    torch.testing.assert_close(made(added).logits, wanted(added).logits, rtol=1e-2, atol=1e-2)


def test_a_head_that_is_stored_beside_the_embedding_grows_with_it(tokenizer, tmp_path):
    model = make("llama tied")
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model.resize_token_embeddings(53)
    stir(model).save_pretrained(tmp_path / "tuned")
    with_tokenizers(tmp_path, tokenizer)
    base = open_checkpoint(tmp_path / "base")
    assert len(extend_vocabulary(base, open_task_vector(base, tmp_path / "tuned"), tmp_path / "larger")) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "larger")(torch.tensor([[52]])).logits.shape[-1] == 53


def test_an_adapters_whole_rows_are_taken(tokenizer, tmp_path):
    merged = save_resized_adapter(tmp_path, "llama untied", 53, **ADAPTERS["modules to save"])
    with_tokenizers(tmp_path, tokenizer)
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        extend_vocabulary(base, open_task_vector(base, tmp_path / "adapter"), tmp_path / "larger")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    extend_vocabulary(base, open_task_vector(base, tmp_path / "adapter"), tmp_path / "larger")
    larger = open_checkpoint(tmp_path / "larger")
    edit = write_edit(
        larger, open_task_vector(larger, tmp_path / "adapter"), EditPlan.everything(), tmp_path / "edited"
    )
    model = AutoModelForCausalLM.from_pretrained(edit.path)
    for name, tensor in canonical(model).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_taken_is_refused(tokenizer, tmp_path):
    save_resized_adapter(tmp_path, "llama untied", 53, **ADAPTERS["LoRA of embedding and head"])
    with_tokenizers(tmp_path, tokenizer)
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="computed from the base's"):
        extend_vocabulary(base, open_task_vector(base, tmp_path / "adapter"), tmp_path / "larger")
    with pytest.raises(CheckpointError, match="no more rows"):
        extend_vocabulary(base, open_task_vector(base, tmp_path / "base"), tmp_path / "larger")
    assert not (tmp_path / "larger").exists()


def test_another_vocabulary_is_no_fine_tune(tokenizer, tmp_path):
    for name, rows in (("base", 259), ("tuned", 300)):
        model = make("llama tied")
        model.resize_token_embeddings(rows)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    path = tmp_path / "tuned" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] = {token: 299 - number for token, number in value["model"]["vocab"].items()}
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="numbers") as caught:
        open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["wpe.weight", "layers.1.mlp.c_fc.weight"])
def test_other_tensors_keep_their_shape(name, tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path / "base")
    part = model.transformer.wpe if name == "wpe.weight" else model.transformer.h[1].mlp.c_fc
    part.weight = torch.nn.Parameter(torch.cat([part.weight, part.weight]))
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"(wpe|c_fc)\.weight` is"):
        open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
