"""Logs of lm_eval: read and compared, alone or with runs of ours; and runs of ours written as such logs."""

import json
import shutil

import numpy as np
import pytest
import torch
from world import read_lines, write_lines, write_logs, write_task

from stethoscope import cli
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.harness_logs import join, read_results, to_rows
from stethoscope.evaluation.harness_logs import write_logs as save_logs
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate_checkpoints
from stethoscope.evaluation.tasks import load_tasks

TASKS = ["sums", "choice"]


def run_cli(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def compared(capsys, *arguments) -> dict:
    """The first contrast that the command prints, with its tasks by name."""
    code, out, _ = run_cli(capsys, "compare", *arguments, "--json")
    assert code == 0
    found = json.loads(out)["contrasts"][0]
    return found | {"tasks": {task["task"]: task for task in found["tasks"]}}


def test_two_lm_eval_logs_are_compared(logs, outcomes, tmp_path, capsys):
    joined, left_out = join(*(read_results(logs[name], arm=name) for name in ("base", "edited")))
    assert left_out == []
    assert sorted(joined.tasks) == ["choice", "sums"]
    (contrast,) = compare(joined).contrasts
    choice, sums = sorted(contrast.tasks, key=lambda task: task.task)
    base, edited = (joined.rows(arm, "sums") for arm in ("base", "edited"))
    assert (sums.n, sums.accuracy_a) == (16, 0.5)  # as planted, where the base's answers could be read
    assert sums.mcnemar.b == int((base["exact_match"] > edited["exact_match"]).sum())
    for rows in (base, edited):
        assert (~rows["extracted"]).tolist() == [answer == "[invalid]" for answer in rows["answer"]]
    assert set(sums.flips.lost) == {"format", "correctness"}
    assert "not recorded" in sums.flips.reason
    assert (choice.metric, choice.flips) == ("acc", None)
    assert choice.reasons["flips"] == "no extraction is recorded"
    # the same numbers as from a run of our own on these checkpoints
    own = next(task for task in compare(outcomes).contrasts[0].tasks if task.task == "sums")
    assert (own.mcnemar, own.difference) == (sums.mcnemar, sums.difference)
    # ... and as the command says them, from the logs, the run, or one of each
    outcomes.save(tmp_path / "run" / "outcomes.parquet")
    for other in (logs["edited"], tmp_path / "run"):
        found = compared(capsys, f"{logs['base']}=base", f"{other}=edited")
        assert found["tasks"]["sums"]["difference"]["difference"] == sums.difference.difference
    assert read_results(tmp_path / "run", arm="edited").arms == ["edited"]
    with pytest.raises(EvaluationError, match="holds 2 arms"):
        read_results(tmp_path / "run")
    with pytest.raises(EvaluationError, match="no arm `nobody`"):
        read_results(tmp_path / "run" / "outcomes.parquet", arm="nobody")


def test_the_command_prints_tables_and_a_verdict(logs, tmp_path, capsys):
    saved = tmp_path / "comparison.json"
    code, out, err = run_cli(
        capsys, "compare", logs["base"], logs["edited"], "--margin", "0.5", "--margin", "choice=0.3", "--out", saved
    )
    assert (code, err) == (0, "")
    for said in ("base to edited", "no answer found", "is not recorded", "Verdict: "):
        assert said in out
    tasks = json.loads(saved.read_text())["contrasts"][0]["tasks"]
    assert {task["task"]: task["non_inferiority"]["margin"] for task in tasks} == {"choice": 0.3, "sums": 0.5}


def test_an_arm_with_itself_differs_nowhere(logs, capsys):
    contrast = compared(capsys, logs["base"], logs["base"])
    assert (contrast["a"], contrast["b"]) == ("base (a)", "base (b)")
    assert [task["mcnemar"]["p_value"] for task in contrast["tasks"].values()] == [1.0, 1.0]
    assert contrast["verdict"].startswith("No evidence of benefit")


def test_the_newest_log_of_each_task_is_read(logs, tmp_path):
    (old,) = logs["base"].glob("samples_sums_*.jsonl")
    (logs["base"] / "samples_sums_2001-01-01T00-00-00.000000.jsonl").write_text("")
    assert len(read_results(logs["base"]).rows("base", "sums")) == 16
    old.unlink()
    with pytest.raises(EvaluationError, match="it is empty"):
        read_results(logs["base"])
    one = shutil.copy(next(logs["edited"].glob("samples_sums_*.jsonl")), tmp_path / "one.jsonl")
    assert read_results(one).tasks == ["one"]


def test_items_that_one_arm_lacks_are_listed(logs, models, tasks, tmp_path, capsys):
    few = write_logs(models["edited"], tasks, tmp_path / "few", TASKS, limit=10)
    code, _, err = run_cli(capsys, "compare", logs["base"], few)
    assert code == 2
    assert "task `sums`: `edited` lacks 6 of `base`'s items (10, 11, 12, 13, 14 and 1 more)" in err
    assert "hint: `--shared-only`" in err
    code, out, err = run_cli(capsys, "compare", logs["base"], few, "--shared-only", "--json")
    assert code == 0
    assert {task["n"] for task in json.loads(out)["contrasts"][0]["tasks"]} == {10}
    assert "left out: task `sums`: `edited` lacks 6" in err


def test_what_cannot_be_compared_is_refused(models, tasks, logs, tmp_path):
    other = write_logs(models["edited"], tasks, tmp_path / "other", TASKS, num_fewshot=1)
    with pytest.raises(EvaluationError, match="another prompt at 16 items"):
        join(read_results(logs["base"]), read_results(other))
    bare = write_logs(models["base"], tasks, tmp_path / "bare", TASKS, limit=2, samples=False)
    with pytest.raises(EvaluationError, match="holds no samples") as caught:
        read_results(bare)
    assert "--log_samples" in caught.value.hint
    (tmp_path / "x.jsonl").write_text('{"doc_id": 1}\nnonsense\n')
    for name, said in (
        ("logs", "logs of 2 models"),
        ("nowhere", "does not exist"),
        ("x.jsonl", r"line 1: lacks `doc_hash`(.|\n)*line 2: not JSON"),
    ):
        with pytest.raises(EvaluationError, match=said):
            read_results(tmp_path / name)


def test_items_are_joined_on_their_hash_whatever_their_order(logs):
    (path,) = logs["edited"].glob("samples_sums_*.jsonl")

    def found():
        return compare(join(read_results(logs["base"]), read_results(logs["edited"]))[0], baseline="base").contrasts

    before = found()
    write_lines(path, [row | {"doc_id": number} for number, row in enumerate(reversed(read_lines(path)))])
    assert found() == before


def test_evaluate_command(models, tasks, tmp_path, capsys):
    command = ["evaluate", "--tasks", "sums,choice", "--include-path", tasks, "--out", tmp_path / "run", "--quiet"]
    both = ["--model", models["base"], "--model", f"{models['edited']}=mine"]
    code, out, _ = run_cli(capsys, *command, *both, "--limit", "4", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert {(row["arm"], row["n"]) for row in json.loads(out)["accuracy"]} == {("base", 4), ("mine", 4)}
    code, out, _ = run_cli(capsys, *command, "--model", models["base"], "--limit", "1")
    assert code == 0
    assert "exact_match" in out
    assert "Verdict" not in out
    code, _, err = run_cli(capsys, *command, *both[:2], *both[:2])
    assert (code, "same name" in err) == (2, True)
    code, _, err = run_cli(capsys, *command, *both, "--backend", "vllm")
    assert code == 2
    assert "vLLM is not installed" in err
    assert "hint: pip install 'lm_eval[vllm]==0.4.13'" in err


def test_items_that_share_a_source_widen_the_interval(logs, capsys):
    for folder in logs.values():
        for path in folder.glob("samples_*.jsonl"):
            rows = [row | {"doc": row["doc"] | {"passage": row["doc_id"]}} for row in read_lines(path)]
            write_lines(path, [row | {"doc_id": 16 * k + row["doc_id"]} for k in range(4) for row in rows])
    sources = (logs["base"], logs["edited"])
    plain = compared(capsys, *sources)["tasks"]["sums"]["difference"]
    task = compared(capsys, *sources, "--cluster", "passage")["tasks"]["sums"]
    clustered = task["difference"]
    assert (plain["n"], plain["clusters"], clustered["clusters"]) == (64, 64, 16)
    assert clustered["standard_error"] == pytest.approx(2 * plain["standard_error"], rel=0.05)
    assert (task["mcnemar"], "share sources" in task["reasons"]["p"]) == (None, True)
    code, _, err = run_cli(capsys, "compare", *sources, "--cluster", "chapter")
    assert (code, "the document has no `chapter`" in err) == (2, True)
    (path,) = logs["edited"].glob("samples_sums_*.jsonl")
    write_lines(path, [row | {"doc": row["doc"] | {"passage": row["doc_id"] or None}} for row in read_lines(path)])
    code, _, err = run_cli(capsys, "compare", *sources, "--cluster", "passage")
    assert (code, "line 1: the document has no `passage`" in err) == (2, True)


def test_logs_are_those_of_the_harness(outcomes, written, tmp_path):
    save_logs(outcomes, tmp_path, load_tasks(["sums", "choice"], written / "tasks"))
    for arm in ("base", "edited"):
        theirs = next((written / "logs" / arm).iterdir())
        for task in ("sums", "choice"):
            ours, harness = (
                read_lines(next(folder.glob(f"samples_{task}_*.jsonl"))) for folder in (tmp_path / arm, theirs)
            )
            for one, other in zip(ours, sorted(harness, key=lambda row: row["doc_id"]), strict=True):
                assert set(one) == set(other)
                same = set(one) - {"resps", "filtered_resps"}
                assert {key: one[key] for key in same} == {key: other[key] for key in same}
                if task == "sums":
                    assert (one["filtered_resps"], one["resps"]) == (other["filtered_resps"], other["resps"])
                else:  # log likelihoods, to the last digits that batches leave alike
                    values = [[float(choice[0]) for choice in row["filtered_resps"]] for row in (one, other)]
                    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_logs_read_back_compare_the_same(outcomes, written, tmp_path):
    expected = compare(outcomes, baseline="base").contrasts[0]
    for known in (None, load_tasks(["sums", "choice"], written / "tasks")):
        folder = tmp_path / str(bool(known))
        save_logs(outcomes, folder, known)
        joined, left_out = join(read_results(folder / "base"), read_results(folder / "edited"))
        assert left_out == []
        found = compare(joined, baseline="base").contrasts[0]
        told = [{t.task: (t.mcnemar, t.difference) for t in contrast.tasks} for contrast in (found, expected)]
        assert told[0] == told[1]
        assert joined.rows("base", "sums")["extracted"].tolist() == outcomes.rows("base", "sums")["extracted"].tolist()


def test_a_long_name_of_a_task_is_kept(outcomes, tmp_path):
    name = "a task of a (very) long name, " + "x" * 64
    save_logs(Outcomes(frame=outcomes.frame.assign(task=name).drop_duplicates(["arm", "item"])), tmp_path)
    assert read_results(tmp_path / "base").tasks == [name]


@pytest.mark.parametrize("task", ["minerva_math_algebra", "leaderboard_math_algebra_hard", "putnam_axiom_original"])
def test_answers_are_sought_in_the_logs_of_tasks_that_extract_while_they_score(task, tmp_path):
    line = {
        "doc_id": 0, "doc": {}, "target": "4", "doc_hash": "a", "prompt_hash": "b", "target_hash": "c",
        "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {"until": []}}}, "filter": "none",
        "metrics": ["exact_match"], "exact_match": 0,
    }  # fmt: skip
    said = ("I do not know", "Final Answer: The final answer is $4$. I hope it is correct.")
    log = tmp_path / f"samples_{task}_2025-01-01T00-00-00.000000.jsonl"
    write_lines(log, [line | {"doc_id": i, "resps": [[s]], "filtered_resps": [s]} for i, s in enumerate(said)])
    frame = read_results(tmp_path, arm="x").frame
    assert frame["extracted"].tolist() == [False, True]
    assert frame["answer"][1].startswith("$4$")


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5])
def test_a_metric_may_be_any_scalar(value):
    sample = {
        "doc_id": 0, "doc_hash": "a", "prompt_hash": "b", "target": "4", "arguments": [("q", {"until": []})],
        "resps": [["r"]], "filtered_resps": ["r"], "filter": "none", "metrics": ["own"], "own": value,
    }  # fmt: skip
    assert to_rows("base", "t", [sample])["own"].tolist() == [0.5]


def test_other_tasks_and_unknown_arms_are_refused(outcomes, written, tmp_path):
    with pytest.raises(EvaluationError, match="there is no arm `nobody`"):
        save_logs(outcomes, tmp_path, arms=["nobody"])
    changed = load_tasks(["sums"], written / "tasks")
    changed["sums"].set_config(key="doc_to_text", value="Another: {{problem}}=")
    with pytest.raises(EvaluationError, match="had another prompt"):
        save_logs(outcomes, tmp_path, changed)


def test_the_logs_command(outcomes, tmp_path, capsys):
    outcomes.save(tmp_path / "run" / "outcomes.parquet")
    _, shown, _ = run_cli(capsys, "logs", tmp_path / "run", tmp_path / "logs")
    assert "4 logs of 2 arms" in shown
    assert f"next: stethoscope compare {tmp_path / 'logs' / 'base'} {tmp_path / 'logs' / 'edited'}" in shown
    _, shown, _ = run_cli(capsys, "logs", tmp_path / "run", tmp_path / "one", "--arm", "edited", "--json")
    assert json.loads(shown) == {"edited": str(tmp_path / "one" / "edited")}


def test_the_direction_of_a_metric_comes_from_the_results_file_beside_a_log(models, tasks, tmp_path):
    choice = (tasks / "choice.yaml").read_text()
    (tmp_path / "tasks").mkdir()
    changed = choice.replace("higher_is_better: true", "higher_is_better: false").replace("task: choice", "task: lower")
    (tmp_path / "tasks" / "lower.yaml").write_text(changed)
    folders = [write_logs(m, tmp_path / "tasks", tmp_path / n, ["lower"], batch_size=4) for n, m in models.items()]
    one, two = (read_results(folder, arm=arm) for arm, folder in zip(("a", "b"), folders, strict=True))
    joined, _ = join(one, two)
    (task,) = compare(joined, baseline="a").contrasts[0].tasks
    assert task.scale.higher_is_better is False
    assert task.difference.difference == pytest.approx(task.accuracy_a - task.accuracy_b)
    # logs of ours keep it
    save_logs(joined, tmp_path / "ours")
    assert read_results(tmp_path / "ours" / "b").scale("lower") == task.scale
    # two results files that disagree, and none
    results = next(folders[1].glob("results_*.json"))
    results.write_text(results.read_text().replace('"acc": false', '"acc": true'))
    assert join(one, read_results(folders[1], arm="b"))[0].scale("lower").higher_is_better is True
    results.write_text("{")
    assert read_results(folders[1]).scale("lower").higher_is_better is True  # by its name


def test_logs_of_whole_texts_are_read_and_written_in_bits_per_byte(models, tmp_path, tasks, capsys):
    rows = [{"problem": text} for text in ("one and one", "two\u00e9 and more")]
    settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{problem}}"}
    write_task(tmp_path, "rolling", rows, **settings, generation_kwargs=None, metric_list=None)
    theirs = write_logs(models["base"], tmp_path, tmp_path / "theirs", ["rolling"], batch_size=1)
    options = {"include_path": tmp_path, "dtype": torch.float32, "out": tmp_path / "run"}
    ours = evaluate_checkpoints(models, ["rolling"], **options)
    save_logs(ours, tmp_path / "ours")
    for folder in (theirs, tmp_path / "ours" / "base"):
        read = read_results(folder, arm="base").rows("base", "rolling")["bits_per_byte"]
        assert read.tolist() == pytest.approx(ours.rows("base", "rolling")["bits_per_byte"].tolist(), rel=1e-4)
    found = compared(capsys, f"{theirs}=base", f"{tmp_path / 'ours' / 'edited'}=edited")
    assert found["tasks"]["rolling"]["scale"] == {"unit": "bits per byte", "higher_is_better": False}
    code, out, _ = run_cli(capsys, "compare", theirs, tmp_path / "ours" / "edited")
    assert (code, "points" in out, "bits per byte" in out) == (0, False, True)
