"""`compare` on logs that lm_eval itself wrote, on runs, and on both; what it refuses; what the command prints."""

import json
import shutil
from pathlib import Path

import datasets
import lm_eval
import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from made_arms import save_pair, task_writer

from stethoscope import cli
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.harness_logs import join, read_results
from stethoscope.evaluation.run import evaluate_checkpoints


def write_logs(model: Path, tasks: Path, out: Path, *, limit: int | None = None, samples: bool = True, shots=2) -> Path:
    """What `lm_eval --model hf --model_args pretrained=MODEL --output_path OUT --log_samples` does."""
    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=["sums", "choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=shots,
        batch_size=4,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
        log_samples=samples,
        evaluation_tracker=tracker,
    )
    logged = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=logged or None)
    for task, rows in logged.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    return next(path for path in out.iterdir() if path.is_dir())


CHOICE = """
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/sums.test.jsonl
    train: {folder}/sums.train.jsonl
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 2
fewshot_config:
  sampler: first_n
doc_to_text: "{{{{problem}}}}"
doc_to_choice: ["one", "two", "eleven"]
doc_to_target: 1
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> Path:
    """Two checkpoints, tasks whose right answers are what the base writes on every second item, and lm_eval's logs."""
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        tasks = task_writer(folder, patch)()
        sums = tasks / "sums.yaml"
        sums.write_text(sums.read_text().replace("([a-z]+)", "([a-zA-Z0-9]+)"))
        (tasks / "choice.yaml").write_text(CHOICE.format(folder=tasks))
        models = save_pair(folder, tokenizer)
        file = tasks / "sums.test.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        first = read_results(write_logs(models["base"], tasks, folder / "first")).rows("base", "sums")["answer"]
        for number, row in enumerate(rows):
            row["answer"] = first[number] if number % 2 == 0 else "never written"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, model in models.items():
            write_logs(model, tasks, folder / "logs" / name)
    return folder


@pytest.fixture
def tasks(written, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return written / "tasks"


@pytest.fixture
def checkpoints(written) -> dict[str, Path]:
    return {name: written / "models" / name for name in ("base", "edited")}


@pytest.fixture
def logs(written, tmp_path) -> dict[str, Path]:
    """Both checkpoints' logs, free to be changed."""
    shutil.copytree(written / "logs", tmp_path / "logs")
    return {name: next((tmp_path / "logs" / name).iterdir()) for name in ("base", "edited")}


def run_cli(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_two_lm_eval_logs_are_compared(logs, checkpoints, tasks, tmp_path, capsys):
    a, b = (read_results(logs[name], arm=name) for name in ("base", "edited"))
    joined, left_out = join(a, b)
    assert left_out == []
    assert sorted(joined.tasks) == ["choice", "sums"]
    found = compare(joined)
    (contrast,) = found.contrasts
    sums = next(t for t in contrast.tasks if t.task == "sums")
    base, edited = (joined.rows(arm, "sums") for arm in ("base", "edited"))
    known = [sum(row == "[invalid]" for row in rows["answer"]) for rows in (base, edited)]
    assert (sums.n, sums.accuracy_a) == (16, 0.5)  # as planted, where the base's answers could be read
    assert sums.mcnemar.b == int((base["exact_match"] > edited["exact_match"]).sum())
    assert [int((~rows["extracted"]).sum()) for rows in (base, edited)] == known
    assert set(sums.flips.lost) == {"format", "correctness"}
    assert "not recorded" in sums.flips.reason
    choice = next(t for t in contrast.tasks if t.task == "choice")
    assert choice.metric == "acc"
    assert choice.flips is None
    assert choice.reasons["flips"] == "no extraction is recorded"
    # the same numbers as from a run of our own on these checkpoints
    ours = evaluate_checkpoints(
        checkpoints, ["sums", "choice"], out=tmp_path / "run", include_path=tasks, batch_size=4, dtype=torch.float32
    )
    again = compare(ours).contrasts[0]
    task = next(t for t in again.tasks if t.task == "sums")
    assert (task.mcnemar, task.difference) == (sums.mcnemar, sums.difference)
    # ... and as the command says them, from the logs, the run, or one of each
    code, out, _ = run_cli(capsys, "compare", f"{logs['base']}=base", f"{logs['edited']}=edited", "--json")
    assert code == 0
    assert json.loads(out)["contrasts"] == found.to_dict()["contrasts"]
    code, out, _ = run_cli(capsys, "compare", f"{logs['base']}=base", f"{tmp_path / 'run'}=edited", "--json")
    mixed = json.loads(out)["contrasts"][0]
    assert (
        next(t for t in mixed["tasks"] if t["task"] == "sums")["difference"]["difference"] == task.difference.difference
    )


def test_the_command_prints_tables_and_a_verdict(logs, tmp_path, capsys):
    saved = tmp_path / "comparison.json"
    code, out, err = run_cli(
        capsys, "compare", logs["base"], logs["edited"], "--margin", "0.5", "--margin", "choice=0.3", "--out", saved
    )
    assert (code, err) == (0, "")
    assert "base to edited" in out
    assert "mended and broken by edited" in out
    assert "no answer found" in out
    assert "whether responses were cut off is not recorded" in out
    assert "Verdict: " in out
    margins = {
        t["task"]: t["non_inferiority"]["margin"] for t in json.loads(saved.read_text())["contrasts"][0]["tasks"]
    }
    assert margins == {"choice": 0.3, "sums": 0.5}


def test_an_arm_with_itself_differs_nowhere(logs, capsys):
    code, out, _ = run_cli(capsys, "compare", logs["base"], logs["base"], "--json")
    contrast = json.loads(out)["contrasts"][0]
    assert (code, contrast["a"], contrast["b"]) == (0, "base (a)", "base (b)")
    assert [t["mcnemar"]["p_value"] for t in contrast["tasks"]] == [1.0, 1.0]
    assert contrast["verdict"].startswith("No evidence of benefit")


def test_the_newest_log_of_each_task_is_read(logs, tmp_path):
    (old,) = logs["base"].glob("samples_sums_*.jsonl")
    empty = logs["base"] / "samples_sums_2001-01-01T00-00-00.000000.jsonl"
    empty.write_text("")
    assert len(read_results(logs["base"]).rows("base", "sums")) == 16
    old.unlink()
    with pytest.raises(EvaluationError, match="it is empty"):
        read_results(logs["base"])
    one = tmp_path / "one.jsonl"
    shutil.copy(next(logs["edited"].glob("samples_sums_*.jsonl")), one)
    assert read_results(one).tasks == ["one"]


def test_items_that_one_arm_lacks_are_listed(logs, checkpoints, tasks, tmp_path, capsys):
    few = write_logs(checkpoints["edited"], tasks, tmp_path / "few", limit=10)
    code, _, err = run_cli(capsys, "compare", logs["base"], few)
    assert code == 2
    assert "task `sums`: `edited` lacks 6 of `base`'s items (10, 11, 12, 13, 14, ...)" in err
    assert "hint: `--shared-only`" in err
    code, out, err = run_cli(capsys, "compare", logs["base"], few, "--shared-only", "--json")
    assert code == 0
    assert {t["n"] for t in json.loads(out)["contrasts"][0]["tasks"]} == {10}
    assert "left out: task `sums`: `edited` lacks 6" in err


def test_other_prompts_are_refused(logs, checkpoints, tasks, tmp_path):
    other = write_logs(checkpoints["edited"], tasks, tmp_path / "other", shots=1)
    with pytest.raises(EvaluationError, match="another prompt at 16 items"):
        join(read_results(logs["base"]), read_results(other))


def test_what_holds_no_samples_is_refused(checkpoints, tasks, logs, tmp_path):
    bare = write_logs(checkpoints["base"], tasks, tmp_path / "bare", limit=2, samples=False)
    with pytest.raises(EvaluationError, match="holds no samples") as caught:
        read_results(bare)
    assert "--log_samples" in caught.value.hint
    with pytest.raises(EvaluationError, match="logs of 2 models"):
        read_results(tmp_path / "logs")
    with pytest.raises(EvaluationError, match="does not exist"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "x.jsonl").write_text('{"doc_id": 1}\nnonsense\n')
    with pytest.raises(EvaluationError, match=r"line 1: lacks `doc_hash`(.|\n)*line 2: not JSON"):
        read_results(tmp_path / "x.jsonl")


def test_a_run_of_several_arms_needs_a_name(checkpoints, tasks, tmp_path):
    options = {"out": tmp_path / "run", "include_path": tasks, "limit": 2}
    evaluate_checkpoints(checkpoints, ["sums"], **options)
    assert read_results(tmp_path / "run", arm="edited").arms == ["edited"]
    with pytest.raises(EvaluationError, match="holds 2 arms"):
        read_results(tmp_path / "run")
    with pytest.raises(EvaluationError, match="no arm `nobody`"):
        read_results(tmp_path / "run" / "outcomes.parquet", arm="nobody")


def test_items_are_joined_on_their_hash_whatever_their_order(logs):
    (path,) = logs["edited"].glob("samples_sums_*.jsonl")
    before = compare(join(read_results(logs["base"]), read_results(logs["edited"]))[0], baseline="base")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(reversed(rows)):
        row["doc_id"] = number
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    after = compare(join(read_results(logs["base"]), read_results(logs["edited"]))[0], baseline="base")
    assert after.contrasts == before.contrasts


def test_evaluate_command(checkpoints, tasks, tmp_path, capsys):
    command = ["evaluate", "--tasks", "sums,choice", "--include-path", tasks, "--out", tmp_path / "run", "--quiet"]
    models = ["--model", checkpoints["base"], "--model", f"{checkpoints['edited']}=mine"]
    code, out, _ = run_cli(capsys, *command, *models, "--limit", "4", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert {(row["arm"], row["n"]) for row in json.loads(out)["accuracy"]} == {("base", 4), ("mine", 4)}
    code, out, _ = run_cli(capsys, *command, "--model", checkpoints["base"], "--limit", "1")
    assert code == 0
    assert "exact_match" in out
    assert "Verdict" not in out
    code, _, err = run_cli(capsys, *command, *models[:2], *models[:2])
    assert (code, "same name" in err) == (2, True)
    code, _, err = run_cli(capsys, *command, *models, "--backend", "vllm")
    assert code == 2
    assert err.strip() == "error: vLLM is not installed\n\nhint: pip install 'lm_eval[vllm]==0.4.13'"


def test_items_that_share_a_source_widen_the_interval(logs, capsys):
    for folder in logs.values():
        for path in folder.glob("samples_*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:  # four copies of each item
                row["doc"]["passage"] = row["doc_id"]
            copies = [row | {"doc_id": 16 * k + row["doc_id"]} for k in range(4) for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in copies))
    found = {}
    for name, options in {"plain": (), "clustered": ("--cluster", "passage")}.items():
        code, out, _ = run_cli(capsys, "compare", logs["base"], logs["edited"], "--json", *options)
        assert code == 0
        found[name] = next(t for t in json.loads(out)["contrasts"][0]["tasks"] if t["task"] == "sums")
    plain, clustered = (found[name]["difference"] for name in ("plain", "clustered"))
    assert (plain["n"], plain["clusters"], clustered["clusters"]) == (64, 64, 16)
    assert clustered["standard_error"] == pytest.approx(2 * plain["standard_error"], rel=0.05)
    assert "p-values are not" in found["clustered"]["reasons"]["p"]
    code, _, err = run_cli(capsys, "compare", logs["base"], logs["edited"], "--cluster", "chapter")
    assert (code, "the document has no `chapter`" in err) == (2, True)
