"""SAEs trained on a tiny model, and health on an SAE whose answer is known."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from world import BYTES, build, contents, exact_sae, random_sae, write_lines

from stethoscope.cli import main
from stethoscope.errors import SAEError
from stethoscope.models.sites import SITES, hook_point
from stethoscope.saes.activations import ActivationStream
from stethoscope.saes.health import health_rows, measure_health
from stethoscope.saes.open import load_sae, open_saes
from stethoscope.saes.train import FastBatchTopK, TrainingSettings, hold_out, train_saes

Llama = Callable[..., LlamaForCausalLM]
DOCUMENTS = [f"{n} cats and {n * n % 97} dogs met at house {n % 13} in the year {1900 + n}." for n in range(120)]
FEW = DOCUMENTS[:12]  # over a dozen passes
SHORT = TrainingSettings(width=16, k=4, tokens=3072, batch=128, buffer=512, layers=[0, 2], site="mlp_out")
SETTINGS = TrainingSettings(width=64, k=8, tokens=16384, batch=256, buffer=1024)


@pytest.fixture(scope="module")
def trained(llama, tokenizer, tmp_path_factory) -> Path:
    out, done = tmp_path_factory.mktemp("saes") / "trained", []
    held_out = {"first": DOCUMENTS[:10], "second": DOCUMENTS[10:20]}
    options = {"settings": SETTINGS, "held_out": held_out, "progress": lambda tokens, _total: done.append(tokens)}
    train_saes(llama(layers=3), tokenizer, DOCUMENTS[20:], out, **options)
    assert done[-1] == SETTINGS.tokens
    return out


def activations(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layer: int) -> torch.Tensor:
    stream = ActivationStream(model, tokenizer, [layer])
    return torch.cat([part[stream.hooks[layer]] for part in stream.outputs(stream.tokenize(DOCUMENTS[:20]))])


def test_trained_saes_explain_held_out_text(trained):
    report = json.loads((trained / "health.json").read_text())["layers"]
    assert report.keys() == {"0", "1", "2"}
    for kinds in report.values():
        assert kinds.keys() == {"first", "second", "all"}
        assert kinds["all"]["variance_explained"] > 0.7
        assert 4 < kinds["all"]["l0"] < 16
        assert kinds["all"]["tokens"] == kinds["first"]["tokens"] + kinds["second"]["tokens"]


def test_saved_saes_are_jumprelu_in_sae_lens_layout(trained):
    saes = open_saes(trained, sae_id="layer_{layer}")
    assert list(saes) == [0, 1, 2]
    assert (saes[1].site, saes[1].d_in, saes[1].model_name) == ("resid_post", 32, None)
    assert saes[1].architecture == "jumprelu"
    sae = load_sae(saes[1])
    stored = load_file(trained / "layer_1" / "sae_weights.safetensors")
    assert set(stored) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    for name, value in stored.items():
        assert value.dtype == (torch.bfloat16 if name.startswith("W") else torch.float32)
        assert torch.equal(getattr(sae, name), value.float())
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(64), atol=0.01)
    x = torch.randn(7, 32)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.allclose(sae.encode(x), z.relu() * (z > sae.threshold), atol=1e-5)


@pytest.fixture(scope="module")
def train(llama, tokenizer) -> Callable[..., list[int]]:
    """Train, with a checkpoint after every step; ``stop_at`` tokens it is interrupted. Returns the progress."""
    model = llama(layers=3)

    def run(out: Path, *, stop_at: int | None = None, model=model, documents=FEW, **changed) -> list[int]:
        done: list[int] = []

        def progress(tokens: int, _total: int) -> None:
            done.append(tokens)
            if tokens == stop_at:
                raise KeyboardInterrupt

        options = {"settings": SHORT, "checkpoint_seconds": 0.0, "held_out": {"some": DOCUMENTS[90:]}, **changed}
        options |= {"progress": progress}
        with pytest.raises(KeyboardInterrupt) if stop_at else nullcontext():
            train_saes(model, tokenizer, documents, out, **options)
        return done

    return run


def test_a_training_that_was_stopped_again_and_again_gives_the_same_bytes(train, tmp_path):
    """One checkpoint is kept, and a half one of a process that was killed does not count."""
    checkpoints = tmp_path / "stopped.training"
    train(tmp_path / "whole", checkpoint_seconds=1e9)
    for stop_at in (128, 256, 1408, 2944):
        done = train(tmp_path / "stopped", stop_at=stop_at)
        assert not (tmp_path / "stopped").exists()
        assert len(list(checkpoints.glob("*"))) == (stop_at > 128)
        half = checkpoints / ".step_99.abc.stethoscope-partial"
        half.mkdir(parents=True, exist_ok=True)
        (half / "training.json").write_text("{")
    # the step that was interrupted had not been saved
    assert done[0] == 1408 - 128
    assert train(tmp_path / "stopped")[0] == 2944 - 128
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"stopped", "whole"}


def test_other_settings_text_or_model_are_refused_by_name(train, llama, tmp_path):
    train(tmp_path / "saes", stop_at=512)
    kept = contents(tmp_path / "saes.training")
    with pytest.raises(SAEError, match="checkpoints of another training") as caught:
        train(tmp_path / "saes", settings=replace(SHORT, k=5, seed=1, layers=[0]))
    assert sorted(caught.value.problems) == [
        "k was `4`, now it is `5`",
        "layers was `[0, 2]`, now it is `[0]`",
        "seed was `0`, now it is `1`",
    ]
    with pytest.raises(SAEError) as caught:
        train(tmp_path / "saes", documents=FEW[::-1])
    assert [problem.split()[0] for problem in caught.value.problems] == ["text"]
    tuned = llama(layers=3)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight += 1e-3
    with pytest.raises(SAEError) as caught:
        train(tmp_path / "saes", model=tuned)
    assert [problem.split()[0] for problem in caught.value.problems] == ["model"]
    assert contents(tmp_path / "saes.training") == kept


def test_what_cannot_be_trained_is_refused_at_once(train, tmp_path):
    with pytest.raises(SAEError) as caught:
        TrainingSettings(width=4, k=8, tokens=0, max_tokens=1, site="resid")
    assert [problem.split()[0] for problem in caught.value.problems] == ["tokens", "k", "max_tokens", "there"]
    with pytest.raises(SAEError) as caught:
        train(tmp_path / "saes", settings=replace(SHORT, layers=[0, 3, 7]))
    assert caught.value.problems == ("layer 3", "layer 7")
    with pytest.raises(SAEError, match="only one token"):
        train(tmp_path / "saes", documents=["a", "b"])
    with pytest.raises(SAEError) as caught:
        replace(SHORT, learning_rate=float("nan"), buffer=0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["learning_rate", "buffer"]
    for held_out in ({"all": FEW}, {"some": FEW, "none": []}, {"short": ["a", "b"]}):
        with pytest.raises(SAEError, match="held-out"):
            train(tmp_path / "saes", held_out=held_out)
    assert not any(tmp_path.iterdir())


def test_text_and_models_that_give_nothing_to_train_on_are_refused(train, llama, tmp_path):
    with pytest.raises(SAEError, match="too few for a batch of 128"):
        train(tmp_path / "saes", documents=["</s></s></s>"] * 8)
    for value in (float("nan"), 1e30):
        model = llama(layers=3)
        model.model.layers[0].mlp.up_proj.weight[0] = value
        with pytest.raises(SAEError, match="activations are not finite"):
            train(tmp_path / "other", model=model)


@pytest.mark.parametrize("site", SITES)
def test_saes_of_every_site_of_gemma_are_opened_where_they_were_trained(site, train, tokenizer, tmp_path):
    model = build("Gemma3", **BYTES, num_hidden_layers=2, head_dim=8)
    train(tmp_path / "saes", model=model, settings=replace(SHORT, tokens=128, layers=range(1, 2), site=site))
    (sae,) = open_saes(tmp_path / "saes").values()
    points = ActivationStream(model, tokenizer, [1], site=site).points
    assert [hook_point(model, sae.layer, sae.site, sae.tap)] == [*points.values()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_saes_are_trained_on_a_gpu(train, llama, tmp_path):
    train(tmp_path / "saes", model=llama(layers=3).to("cuda"))
    assert list(open_saes(tmp_path / "saes")) == [0, 2]


def test_health_is_shown_by_kind_with_all_of_it_last():
    whole = {"variance_explained": 0.9, "l0": 31.7, "dead": 0.125, "dense": None}
    kinds = {"a": {"variance_explained": 0.25}, "all": whole, "b": {"variance_explained": None}}
    assert health_rows({3: kinds}) == [
        ["layer", "a", "b", "all", "L0", "dead, %", "dense, %"],
        ["3", "0.250", "-", "0.900", "32", "12.5", "-"],
    ]
    assert health_rows({0: {"a": whole, "all": whole}})[0] == ["layer", "a", "L0", "dead, %", "dense, %"]


def test_every_twentieth_document_is_held_out():
    train, held = hold_out([str(i) for i in range(100)])
    assert held == ["10", "30", "50", "70", "90"]
    assert sorted([*train, *held], key=int) == [str(i) for i in range(100)]
    assert hold_out(["a", "b"]) == (["a", "b"], ["a", "b"])
    assert len(hold_out(["a"] * 5000)[1]) == 64


def test_the_command_trains_and_shows_health_by_kind(llama, tokenizer, tmp_path, capsys):
    llama(layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = str(write_lines(tmp_path / "text.jsonl", ({"body": text} for text in DOCUMENTS)))
    command = ["train-saes", "--base", str(tmp_path / "model"), "--text", text, "--field", "body", "--layers", "0,2"]
    command += ["--k", "6", "--batch", "64"]
    main([*command, "--out", str(tmp_path / "long"), "--tokens", "38400", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["width"] == 128
    assert found["layers"]["2"]["held out"]["variance_explained"] > 0.5
    main([*command, "--out", str(tmp_path / "short"), "--tokens", "256", "--held-out", f"{text}=all text"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[:3]] == ["layer", "0", "2"]
    assert "all text" in shown


def test_a_lean_step_is_sae_lens_batch_top_k():
    sae = FastBatchTopK(BatchTopKTrainingSAEConfig(d_in=16, d_sae=64, k=6, rescale_acts_by_decoder_norm=False))
    x = torch.randn(128, 16)
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    ours = sae.training_forward_pass(step)
    expected = BatchTopK(6)((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    fired, meant = ours.feature_acts > 0, expected > 0
    # bfloat16 moves a few values over the cut
    assert (fired != meant).float().mean() < 0.01
    both = fired & meant
    assert torch.allclose(ours.feature_acts[both].float(), expected[both], rtol=0.02, atol=0.02)


def test_an_exact_sae_explains_everything(llama, tokenizer):
    sae = exact_sae()
    model = llama(layers=3)
    for layer in range(3):
        health = measure_health(sae, activations(model, tokenizer, layer)).health()
        assert health.variance_explained == pytest.approx(1)
        assert health.l0 == pytest.approx(32, abs=1)


def test_the_stream_reads_each_layer_without_first_and_special_tokens(llama, tokenizer):
    model, documents = llama(layers=2), ["abcd</s>efg", "hi"]
    stream = ActivationStream(model, tokenizer, [0, 1], batch_tokens=4)
    parts = list(stream.outputs(stream.tokenize(documents)))
    first, second = (torch.cat([part[stream.hooks[layer]] for part in parts]) for layer in (0, 1))
    states = [
        model.model(**tokenizer(document, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        for document in documents
    ]
    assert torch.allclose(first, torch.cat([states[0][[1, 2, 3, 5, 6, 7]], states[1][1:]]), atol=1e-5)
    assert not torch.allclose(first, second)


def test_health_merges_in_any_grouping_and_of_nothing_is_undefined():
    sae, hidden = random_sae(d=8, width=16), torch.randn(60, 8)
    sae.b_enc.data[3] = -1e6
    whole = measure_health(sae, hidden).health()
    parts = [measure_health(sae, hidden[a:b], chunk=5) for a, b in ((0, 7), (7, 50), (50, 60))]
    merged = (parts[0] + (parts[1] + parts[2])).health()
    assert merged.variance_explained == pytest.approx(whole.variance_explained)
    assert (merged.l0, merged.dead, merged.dense) == (whole.l0, whole.dead, whole.dense)
    features = sae.encode(hidden)
    assert whole.dead == float((features == 0).all(0).float().mean()) >= 1 / 16
    residual, variance = hidden - sae.decode(features), hidden - hidden.mean(0)
    assert whole.variance_explained == pytest.approx(1 - float(residual.square().sum() / variance.square().sum()))
    none = measure_health(sae, hidden[:0]).health()
    assert (none.variance_explained, none.l0) == (None, None)


def test_a_checkpoint_of_a_training_that_is_damaged_is_not_used(train, tmp_path, caplog):
    train(tmp_path / "whole", checkpoint_seconds=1e9)
    for file in ("training.json", "*.safetensors"):
        train(tmp_path / "saes", stop_at=1408)
        (newest,) = (tmp_path / "saes.training").iterdir()
        damaged = next(newest.rglob(file))
        damaged.write_bytes(damaged.read_bytes()[:-9])
        (tmp_path / "saes.training" / "step_other").mkdir()
        shutil.copytree(newest, tmp_path / "saes.training" / "step_1")
        assert train(tmp_path / "saes")[0] == 128
        assert "is damaged: the training begins again" in caplog.text
        assert contents(tmp_path / "saes") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "saes")
        caplog.clear()
