"""`edit --keep --protect`: an edit from two models and two texts, chosen and measured by itself."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from world import BYTES, build, contents, planted_documents, save_adapter, write_lines

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.cli import main
from stethoscope.editing.verify import verify
from stethoscope.errors import StethoscopeError
from stethoscope.keep import Wanted, keep_skill
from stethoscope.results.keeping import Keeping
from stethoscope.run import Silent


@pytest.fixture(scope="module")
def folder(planted, tokenizer, tmp_path_factory):
    """Base and tuned of a planted skill, with texts that nothing was trained on."""
    folder = tmp_path_factory.mktemp("keep")
    shutil.copytree(planted.task_vector.base.path, folder / "base")
    shutil.copytree(planted.task_vector.store.path, folder / "tuned")
    tokenizer.save_pretrained(folder / "base")
    for name, kind in (("sums", "target"), ("words", "control"), ("more", "control")):
        seed = {"sums": 5, "words": 6, "more": 7}[name]
        write_lines(folder / f"{name}.jsonl", ({"text": text} for text in planted_documents(kind, 200, seed)))
    return folder


def edit(folder, out, *options):
    given = {"--base": folder / "base", "--tuned": folder / "tuned", "--out": out}
    main(["edit", *(str(part) for pair in given.items() for part in pair), *map(str, options)])


def test_it_keeps_the_gain_and_leaves_protected_text_nearer_to_the_base(folder, tmp_path, capsys):
    texts = ["--keep", folder / "sums.jsonl", "--protect", folder / "words.jsonl"]
    edit(folder, tmp_path / "out", *texts, "--protect", f"{folder / 'more.jsonl'}=0.5", "--json")
    found = Keeping.model_validate_json(capsys.readouterr().out)
    filtered, tuned = found.variants["filtered"], found.variants["tuned"]
    assert tuned.gain.low > 0
    assert filtered.kept.value > 0.85
    for text in ("words", "more"):
        farthest, whole = (max(-one.damage[text].low, one.damage[text].high) for one in (filtered, tuned))
        assert farthest < whole
        assert filtered.damage[text].low <= filtered.damage[text].value <= filtered.damage[text].high
    assert found.variants["base"].damage["words"].value == 0
    assert verify(tmp_path / "out", base=open_checkpoint(folder / "base")).ok
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["plan"]["transform"]["weights"] == {"words": 1.0, "more": 0.5}
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_strength_layers_and_kind_are_the_users(folder, tmp_path, capsys):
    texts = ["--keep", folder / "sums.jsonl", "--protect", folder / "words.jsonl"]
    edit(folder, tmp_path / "patch", *texts, "--strength", "0", "--layers", "1,4", "--kind", "patch", "--quiet")
    assert "strength 0" in capsys.readouterr().out
    main(["apply", str(tmp_path / "patch"), "--base", str(folder / "base"), "--out", str(tmp_path / "edited")])
    main(["undo", str(tmp_path / "patch"), "--edited", str(tmp_path / "edited"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "base/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "edited" / "manifest.json").read_text())["layers"] == [1, 4]


def test_a_prompt_is_read_and_its_loss_does_not_count(folder, tmp_path):
    base = open_checkpoint(folder / "base")
    change = open_task_vector(base, folder / "tuned")
    sums, words = planted_documents("target", 40, 8), planted_documents("control", 40, 9)
    gains = []
    for prompts in ((), words):
        wanted = Wanted(
            keep=[a + b for a, b in zip(words, sums, strict=True)],
            prompts=prompts,
            protect={"words": planted_documents("control", 40, 10)},
            strength=1.0,
        )
        out = tmp_path / f"out-{len(prompts)}"
        gains.append(keep_skill(base, change, wanted, out)[1].variants["tuned"].gain.value)
    assert min(gains) > 0
    assert gains[0] != gains[1]


def test_two_runs_write_the_same_bytes(folder, tmp_path, capsys):
    for name in "ab":
        edit(
            folder, tmp_path / name, "--keep", folder / "sums.jsonl", "--protect", folder / "words.jsonl", "--quiet",
            "--strength", "1",
        )  # fmt: skip
        main(shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))[1:])  # it verifies
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ([], 0),
        (["--protect", "words.jsonl", "--layers", "1"], 0),
        (["--keep", "sums.jsonl"], 1),
        (["--keep", "missing.jsonl", "--protect", "words.jsonl=heavy"], 2),
        (["--keep", "sums.jsonl", "--protect", "sums.jsonl"], 1),
        (["--keep", "sums.jsonl", "--protect", "words.jsonl", "--protect", "words.jsonl"], 1),
        (["--keep", "sums.jsonl", "--protect", "words.jsonl", "--share", "1.5"], 1),
        (["--keep", "few.jsonl", "--protect", "words.jsonl"], 1),
        (["--keep", "chats.jsonl", "--prompt", "q", "--protect", "words.jsonl"], 1),
        (["--keep", "sums.jsonl", "--protect", "words.jsonl", "--kind", "adapter"], 1),
        (["--keep", "sums.jsonl", "--protect", "words.jsonl", "--coefficient", "2"], 0),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(folder, tmp_path, capsys, options, problems):
    write_lines(folder / "few.jsonl", [{"text": "1+1=2"}] * 20)
    chat = [{"role": "user", "content": "1+1"}]
    write_lines(folder / "chats.jsonl", ({"q": f"{i}: ", "text": chat} for i in range(20)))
    options = [str(folder / option) if ".jsonl" in option else option for option in options]
    with pytest.raises(SystemExit) as stopped:
        edit(folder, tmp_path / "out", *options)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n  - ") == problems
    assert "hint:" in said
    assert not list(tmp_path.iterdir())


def test_no_gain_is_no_evidence(folder, tmp_path):
    base = open_checkpoint(folder / "base")
    wanted = Wanted(keep=planted_documents("control", 20, 1), protect={"sums": planted_documents("target", 20, 2)})
    _, found = keep_skill(base, open_task_vector(base, folder / "base"), wanted, tmp_path / "out")
    assert found.variants["filtered"].kept.value is None
    assert "No evidence" in found.verdict
    with pytest.raises(StethoscopeError):
        keep_skill(base, open_task_vector(base, folder / "tuned"), wanted, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"word": 2.0}},
        {"prompts": ["Add: "] * 19},
        {"prompts": ["Sum: "] * 20},
        {"prompts": ["Add: "] * 20, "protect": {"words": [str(n) for n in range(40)]}},
    ],
    ids=["no such text", "too few prompts", "other prompts", "kept and protected"],
)
def test_what_contradicts_itself_is_refused(folder, tmp_path, changes):
    base = open_checkpoint(folder / "base")
    given = {"keep": [f"Add: {n}" for n in range(20)], "protect": {"words": planted_documents("control", 40, 1)}}
    with pytest.raises(StethoscopeError) as refused:
        keep_skill(base, open_task_vector(base, folder / "tuned"), Wanted(**given | changes), tmp_path / "out")
    assert len(refused.value.problems) == 1
    assert not list(tmp_path.iterdir())


def test_a_document_that_repeats_another_does_not_measure_what_it_made(folder, tmp_path):
    base = open_checkpoint(folder / "base")
    texts = {name: list(dict.fromkeys(planted_documents(name, 40, 1)))[:20] for name in ("target", "control")}
    prompts = [document[:1] for document in texts["target"]]
    found = []
    for times in (1, 3):
        wanted = Wanted(
            keep=texts["target"] * times, prompts=prompts * times, protect={"words": texts["control"] * times},
            strength=1.0,
        )  # fmt: skip
        found.append(keep_skill(base, open_task_vector(base, folder / "tuned"), wanted, tmp_path / str(times))[1])
    assert (found[0].documents, found[0].variants) == (found[1].documents, found[1].variants)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_an_adapter_that_no_filtered_one_can_be_made_of_is_named_before_any_work(options, folder, tokenizer, tmp_path):
    model = build("Qwen2", **BYTES, num_hidden_layers=3, tie_word_embeddings=False)
    save_adapter(model, tmp_path, r=2, **{"target_modules": ["q_proj"]} | options)
    tokenizer.save_pretrained(tmp_path / "base")
    started = []

    class Stages(Silent):
        def stage(self, title):
            started.append(title)
            return super().stage(title)

    base = open_checkpoint(tmp_path / "base")
    wanted = Wanted(keep=planted_documents("target", 40, 1), protect={"words": planted_documents("control", 40, 2)})
    change = open_task_vector(base, tmp_path / "adapter")
    with pytest.raises(StethoscopeError) as refused:
        keep_skill(base, change, wanted, tmp_path / "out", kind="adapter", reporter=Stages())
    assert refused.value.problems
    assert not started


@pytest.mark.skipif("STETHOSCOPE" not in os.environ, reason="`make wheel` names the command of an installed wheel")
def test_an_installed_wheel_edits_without_extras_and_names_those_that_are_missing(folder, tmp_path):
    def ended(*arguments):
        return subprocess.run([os.environ["STETHOSCOPE"], *map(str, arguments)], capture_output=True, text=True)

    pair = ("--base", folder / "base", "--tuned", folder / "tuned", "--out", tmp_path / "out")
    made = ended("edit", *pair, "--keep", folder / "sums.jsonl", "--protect", folder / "words.jsonl")
    assert made.returncode == 0, made.stderr
    assert "filtered" in made.stdout
    assert ended("verify", tmp_path / "out", "--base", folder / "base").returncode == 0
    for command, extra in ((("demo",), "demo"), (("train-saes", *pair[:2], "--text", "x.jsonl", *pair[4:]), "run")):
        refused = ended(*command)
        assert refused.returncode == 2
        assert f"sae-stethoscope[{extra}]" in refused.stderr
