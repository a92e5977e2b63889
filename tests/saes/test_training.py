"""SAEs trained on a tiny model, and health on an SAE whose answer is known."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stethoscope.cli import main
from stethoscope.errors import SAEError
from stethoscope.saes.activations import ActivationStream
from stethoscope.saes.health import HealthSums, health_rows, measure_health
from stethoscope.saes.open import check_fit, load_sae, open_saes
from stethoscope.saes.train import FastBatchTopK, TrainingSettings, hold_out, train_saes

Llama = Callable[..., LlamaForCausalLM]
DOCUMENTS = [f"{n} cats and {n * n % 97} dogs met at house {n % 13} in the year {1900 + n}." for n in range(120)]
SHORT = TrainingSettings(width=16, k=4, tokens=3072, batch=128, buffer=512)
SETTINGS = TrainingSettings(width=64, k=8, tokens=16384, batch=256, buffer=1024)


@pytest.fixture(scope="module")
def trained(
    llama: Llama, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LlamaForCausalLM]:
    model = llama(layers=3)
    out = tmp_path_factory.mktemp("saes") / "trained"
    done: list[int] = []
    held_out = {"first": DOCUMENTS[:10], "second": DOCUMENTS[10:20]}
    options = {"settings": SETTINGS, "held_out": held_out, "progress": lambda tokens, _total: done.append(tokens)}
    train_saes(model, tokenizer, DOCUMENTS[20:], out, **options)
    assert done[-1] == SETTINGS.tokens
    return out, model


def activations(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layer: int) -> torch.Tensor:
    stream = ActivationStream(model, tokenizer, [layer])
    return torch.cat([part[stream.hooks[layer]] for part in stream.outputs(stream.tokenize(DOCUMENTS[:20]))])


def test_trained_saes_explain_held_out_text(trained: tuple[Path, LlamaForCausalLM]) -> None:
    out, _ = trained
    report = json.loads((out / "health.json").read_text())["layers"]
    assert report.keys() == {"0", "1", "2"}
    for kinds in report.values():
        assert kinds.keys() == {"first", "second", "all"}
        assert kinds["all"]["variance_explained"] > 0.7
        assert 4 < kinds["all"]["l0"] < 16
        assert kinds["all"]["tokens"] == kinds["first"]["tokens"] + kinds["second"]["tokens"]


def test_training_beats_no_training(
    trained: tuple[Path, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    out, model = trained
    options = {"settings": replace(SETTINGS, tokens=256), "held_out": {"all of it": DOCUMENTS[:20]}, "layers": [1]}
    health = train_saes(model, tokenizer, DOCUMENTS[20:], tmp_path / "hurried", **options)
    hidden = activations(model, tokenizer, 1)
    explained = measure_health(SAE.load_from_disk(out / "layer_1"), hidden).health().variance_explained
    hurried = health[1]["all"].variance_explained
    assert explained is not None
    assert hurried is not None
    assert explained > hurried + 0.1


def test_saved_saes_are_jumprelu_in_sae_lens_layout(trained: tuple[Path, LlamaForCausalLM]) -> None:
    out, _ = trained
    saes = open_saes(out, sae_id="layer_{layer}")
    check_fit(saes, hidden_size=32, num_layers=3)
    assert saes[1].architecture == "jumprelu"
    sae = load_sae(saes[1])
    stored = load_file(out / "layer_1" / "sae_weights.safetensors")
    assert stored.keys() == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    for name, value in stored.items():
        assert value.dtype == (torch.bfloat16 if name.startswith("W") else torch.float32)
        assert torch.equal(getattr(sae, name), value.float())
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(64), atol=0.01)
    x = torch.randn(7, 32)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.allclose(sae.encode(x), z.relu() * (z > sae.threshold), atol=1e-5)


def test_training_again_gives_the_same_bytes(
    trained: tuple[Path, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, model = trained
    settings = TrainingSettings(width=16, k=4, tokens=512, batch=256, buffer=512)
    options = {"settings": settings, "held_out": {"x": DOCUMENTS[:4]}, "layers": [0]}
    for name in ("one", "two"):
        train_saes(model, tokenizer, DOCUMENTS, tmp_path / name, **options)
    weights = [tmp_path / name / "layer_0" / "sae_weights.safetensors" for name in ("one", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@dataclass(frozen=True)
class Training:
    """One training that is stopped here and there, and what it should give."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    settings: TrainingSettings = SHORT
    documents: Sequence[str] = tuple(DOCUMENTS[:12])  # over a dozen passes

    def run(self, out: Path, *, stop_at: int | None = None, **changed: Any) -> list[int]:
        """Train, with a checkpoint after every step; ``stop_at`` tokens it is interrupted. Returns the progress."""
        done: list[int] = []

        def progress(tokens: int, _total: int) -> None:
            done.append(tokens)
            if tokens == stop_at:
                raise KeyboardInterrupt

        options = {"settings": self.settings, "documents": self.documents, "layers": [0, 2], "site": "mlp_out"}
        options |= {"checkpoint_seconds": 0.0, "held_out": {"some": DOCUMENTS[90:]}, **changed}
        with pytest.raises(KeyboardInterrupt) if stop_at else nullcontext():
            train_saes(self.model, self.tokenizer, out=out, progress=progress, **options)
        return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def training(llama: Llama, tokenizer: PreTrainedTokenizerFast) -> Training:
    return Training(llama(layers=3), tokenizer)


def test_a_training_that_was_stopped_again_and_again_gives_the_same_bytes(training: Training, tmp_path: Path) -> None:
    training.run(tmp_path / "whole", checkpoint_seconds=1e9)
    for stop_at in (128, 256, 1408, 2944):
        done = training.run(tmp_path / "stopped", stop_at=stop_at)
        assert not (tmp_path / "stopped").exists()
    # the step that was interrupted had not been saved
    assert done[0] == 1408 - 128
    assert training.run(tmp_path / "stopped")[0] == 2944 - 128
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"stopped", "whole"}


def test_one_checkpoint_is_kept_and_half_ones_do_not_count(training: Training, tmp_path: Path) -> None:
    training.run(tmp_path / "saes", stop_at=1024)
    checkpoints = tmp_path / "saes.training"
    assert [path.name for path in checkpoints.iterdir()] == ["step_7"]
    half = checkpoints / ".step_8.abc.partial"
    half.mkdir()
    (half / "training.json").write_text("{")
    training.run(tmp_path / "saes", stop_at=1280)
    assert [path.name for path in checkpoints.iterdir()] == ["step_9"]


def test_other_settings_text_or_model_are_refused_by_name(training: Training, llama: Llama, tmp_path: Path) -> None:
    training.run(tmp_path / "saes", stop_at=512)
    kept = contents(tmp_path / "saes.training")
    with pytest.raises(SAEError, match="checkpoints of another training") as caught:
        training.run(tmp_path / "saes", settings=replace(training.settings, k=5, seed=1), layers=[0])
    assert sorted(caught.value.problems) == [
        "k was `4`, now it is `5`",
        "layers was `[0, 2]`, now it is `[0]`",
        "seed was `0`, now it is `1`",
    ]
    with pytest.raises(SAEError) as caught:
        training.run(tmp_path / "saes", documents=training.documents[::-1])
    assert [problem.split()[0] for problem in caught.value.problems] == ["text"]
    tuned = llama(layers=3)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight += 1e-3
    with pytest.raises(SAEError) as caught:
        replace(training, model=tuned).run(tmp_path / "saes")
    assert [problem.split()[0] for problem in caught.value.problems] == ["model"]
    assert contents(tmp_path / "saes.training") == kept


def test_a_stream_goes_on_from_any_place(training: Training) -> None:
    stream = ActivationStream(training.model, training.tokenizer, [0, 1])
    rows = stream.tokenize(training.documents)
    options = {"batch": 100, "buffer": 330, "seed": 3}
    whole = list(islice(stream.shuffled(rows, **options), 25))
    assert any(position.rest for _, position in whole)
    assert whole[-1][1].taken > 2 * len(rows)
    for place in (0, 1, 2, 3, 4, 11, 20):
        rest = stream.shuffled(rows, start=whole[place][1], **options)
        for (batch, position), (again, there) in zip(whole[place + 1 :], rest, strict=False):
            assert position.taken == there.taken
            assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_what_cannot_be_trained_is_refused_at_once(training: Training, tmp_path: Path) -> None:
    with pytest.raises(SAEError) as caught:
        TrainingSettings(width=4, k=8, tokens=0, max_tokens=1)
    assert [problem.split()[0] for problem in caught.value.problems] == ["tokens", "k", "max_tokens"]
    with pytest.raises(SAEError, match="no site `resid`"):
        training.run(tmp_path / "saes", site="resid")
    with pytest.raises(SAEError, match="only one token"):
        training.run(tmp_path / "saes", documents=["a", "b"])
    assert not any(tmp_path.iterdir())


def test_health_is_shown_by_kind_with_all_of_it_last() -> None:
    whole = {"variance_explained": 0.9, "l0": 31.7, "dead": 0.125, "dense": None}
    kinds = {"a": {"variance_explained": 0.25}, "all": whole, "b": {"variance_explained": None}}
    assert health_rows({3: kinds}) == [
        ["layer", "a", "b", "all", "L0", "dead, %", "dense, %"],
        ["3", "0.250", "-", "0.900", "32", "12.5", "-"],
    ]
    assert health_rows({0: {"a": whole, "all": whole}})[0] == ["layer", "a", "L0", "dead, %", "dense, %"]


def test_every_twentieth_document_is_held_out() -> None:
    train, held = hold_out([str(i) for i in range(100)])
    assert held == ["10", "30", "50", "70", "90"]
    assert sorted([*train, *held], key=int) == [str(i) for i in range(100)]
    assert hold_out(["a", "b"]) == (["a", "b"], ["a", "b"])
    assert len(hold_out(["a"] * 5000)[1]) == 64


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_command_killed_goes_on_and_gives_the_same_bytes(
    llama: Llama, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))

    def command(out: str) -> list[str]:
        return [
            "train-saes", "--base", str(tmp_path / "model"), "--text", str(tmp_path / "text.jsonl"), "--field", "body",
            "--out", str(tmp_path / out), "--layers", "0,2", "--k", "6", "--tokens", "38400", "--batch", "64",
            "--checkpoint-seconds", "0",
        ]  # fmt: skip

    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "stethoscope.cli", *command("killed")],
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoints = tmp_path / "killed.training"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step_??"))) == 0:  # ten steps at least
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    log.close()
    assert not (tmp_path / "killed").exists()
    slow = ["--checkpoint-seconds", "1000"]
    main([*command("killed"), *slow, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["width"] == 128
    assert found["layers"]["2"]["held out"]["variance_explained"] > 0.5
    main([*command("whole"), *slow, "--quiet"])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    capsys.readouterr()
    main([*command("short"), "--tokens", "256", "--held-out", f"{tmp_path / 'text.jsonl'}=all text"])
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[:3]] == ["layer", "0", "2"]
    assert "all text" in shown


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stethoscope.corpus.read_documents", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["train-saes", "--base", "a", "--text", "b", "--out", "c"])
    assert caught.value.code == 130
    assert "go on with\n  stethoscope train-saes --base a --text b --out c\n" in capsys.readouterr().err


def test_a_lean_step_is_sae_lens_batch_top_k() -> None:
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


def test_layers_out_of_range_are_all_named(llama: Llama, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(SAEError) as caught:
        train_saes(
            llama(layers=2), tokenizer, DOCUMENTS, tmp_path / "x", settings=SETTINGS, held_out={}, layers=[0, 2, 7]
        )
    assert caught.value.problems == ("layer 2", "layer 7")
    assert not (tmp_path / "x").exists()


def test_an_exact_sae_explains_everything(llama: Llama, tokenizer: PreTrainedTokenizerFast) -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, apply_b_dec_to_input=False))
    eye = torch.eye(32)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    model = llama(layers=3)
    for layer in range(3):
        health = measure_health(sae, activations(model, tokenizer, layer)).health()
        assert health.variance_explained == pytest.approx(1)
        assert health.l0 == pytest.approx(32, abs=1)


def test_the_stream_reads_each_layer_without_first_and_special_tokens(
    llama: Llama, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, documents = llama(layers=2), ["abcd</s>efg", "hi"]
    stream = ActivationStream(model, tokenizer, [0, 1], batch_tokens=4)
    heard = {0: [], 1: []}  # type: dict[int, list[torch.Tensor]]
    for part in stream.outputs(stream.tokenize(documents)):
        for layer in heard:
            heard[layer].append(part[stream.hooks[layer]])
    states = []
    for document in documents:
        out = model.model(**tokenizer(document, return_tensors="pt"), output_hidden_states=True)
        states.append(out.hidden_states[1][0])
    assert torch.allclose(torch.cat(heard[0]), torch.cat([states[0][[1, 2, 3, 5, 6, 7]], states[1][1:]]), atol=1e-5)
    assert not torch.allclose(torch.cat(heard[0]), torch.cat(heard[1]))


def test_health_merges_in_any_grouping() -> None:
    torch.manual_seed(0)
    hidden, features = torch.randn(60, 8), torch.randn(60, 16).relu()
    features[:, 3] = 0
    decoded = hidden + 0.1 * torch.randn(60, 8)
    whole = HealthSums.of(hidden, features, decoded).health()
    parts = [HealthSums.of(hidden[a:b], features[a:b], decoded[a:b]) for a, b in ((0, 7), (7, 50), (50, 60))]
    merged = (parts[0] + (parts[1] + parts[2])).health()
    assert merged.variance_explained == pytest.approx(whole.variance_explained)
    assert (merged.l0, merged.dead, merged.dense) == (whole.l0, whole.dead, whole.dense)
    assert whole.dead == 1 / 16
    assert whole.variance_explained == pytest.approx(0.99, abs=0.01)


def test_health_of_nothing_is_undefined_not_zero() -> None:
    none = HealthSums.of(torch.zeros(0, 4), torch.zeros(0, 8), torch.zeros(0, 4)).health()
    assert none.variance_explained is None
    assert none.l0 is None
