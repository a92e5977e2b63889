"""Minerva Math on local files: the harness' own seven tasks, prompts and metrics, with no network."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType

import pytest
from lm_eval.tasks.minerva_math import utils as harness

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.run import evaluate, load_tasks
from stethoscope.evaluation.tasks import SUBJECTS, prompts_hash

DATA = Path(__file__).parent / "data" / "math"


@pytest.fixture
def tasks():
    return load_tasks(["minerva_math"], data=DATA)


def gold(doc):
    return f" {doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."


def test_seven_tasks_with_the_harness_prompts(tasks):
    assert list(tasks) == list(SUBJECTS)
    for name, task in tasks.items():
        task.build_all_requests()
        assert {doc["type"] for doc in task.eval_docs} == {SUBJECTS[name]}
        assert len(task.instances) == 3
        doc = task.eval_docs[0]
        shots = [harness.doc_to_text(shot) + " " + shot["solution"] for shot in harness.list_fewshot_samples()]
        prompt, settings = task.instances[0].args
        assert prompt == "\n\n".join([*shots, harness.doc_to_text(doc)])
        assert settings == {"until": ["Problem:"], "do_sample": False, "temperature": 0.0}


def test_the_hash_of_the_prompts_does_not_change_from_process_to_process(tasks):
    task = tasks["minerva_math_geometry"]
    before, shown = prompts_hash(task, 2, 0), task.config.fewshot_config
    function = shown.process_docs  # as another process has it: elsewhere in memory
    shown.process_docs = FunctionType(function.__code__, function.__globals__, function.__name__)
    assert prompts_hash(task, 2, 0) == before != prompts_hash(task, 3, 0)


def test_gold_answers_score_in_both_metrics(tasks):
    for task in tasks.values():
        for doc in task.eval_docs:
            assert task.process_results(doc, [gold(doc)]) == {"exact_match": 1, "math_verify": 1}
        assert task.process_results(doc, [doc["solution"]]) == {"exact_match": 0, "math_verify": 1}  # no sentence
        assert task.process_results(doc, [" I do not know."]) == {"exact_match": 0, "math_verify": 0}


def test_all_seven_run_and_gold_responses_are_right(llama, tokenizer, tmp_path, monkeypatch):
    model = llama(layers=2)
    model.config.max_position_embeddings = 2500
    solutions = {doc["problem"]: gold(doc) for task in load_tasks(["minerva_math"], data=DATA).values()
                 for doc in task.eval_docs}  # fmt: skip
    monkeypatch.setattr("stethoscope.evaluation.run.SharedPrefixLM.max_gen_toks", 12)
    options = {"out": tmp_path, "data": DATA, "limit": 2, "batch_size": 2}
    run = evaluate(model, tokenizer, {"base": nullcontext}, ["minerva_math"], **options)
    assert run.tasks == list(SUBJECTS)
    assert len(run.frame) == 14
    assert run.metrics == ["exact_match", "math_verify"]
    assert not run.frame["extracted"].any()
    assert run.frame["truncated"].notna().all()

    def recite(self, requests, disable_tqdm=False):
        return [solutions[r.args[0].rpartition("Problem:\n")[2].removesuffix("\n\nSolution:")] for r in requests]

    monkeypatch.setattr("stethoscope.evaluation.run.SharedPrefixLM.generate_until", recite)
    right = evaluate(model, tokenizer, {"gold": nullcontext}, ["minerva_math"], **options)
    assert (right.frame[["exact_match", "math_verify"]] == 1).all(axis=None)
    assert right.frame["extracted"].all()
    assert right.frame["item_hash"].tolist() == run.frame["item_hash"].tolist()


def test_one_file_for_all_subjects_gives_the_same_items(tasks, tmp_path):
    lines = "".join((DATA / f"{name}.jsonl").read_text() for name in ("precalculus", "number_theory", "algebra"))
    (tmp_path / "test.jsonl").write_text(lines)
    (tmp_path / "train.jsonl").write_text(lines.replace("?", "??"))  # never read
    for data in (tmp_path, tmp_path / "test.jsonl"):
        found = load_tasks(["minerva_math_num_theory", "minerva_math_precalc"], data=data)
        assert list(found) == ["minerva_math_num_theory", "minerva_math_precalc"]
        for name, task in found.items():
            assert list(task.eval_docs) == list(tasks[name].eval_docs)
    with pytest.raises(EvaluationError, match="`minerva_math_geometry`: nothing of type `Geometry`"):
        load_tasks(["minerva_math"], data=tmp_path)


def test_everything_that_is_not_in_the_schema_is_named(tmp_path):
    rows = [{"problem": "p", "solution": "no answer", "type": "Algebra"}, {"problem": "p", "solution": " "},
            {"problem": "p", "solution": "$\\boxed{1}$", "type": "Alchemy"}, []]  # fmt: skip
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    with pytest.raises(EvaluationError, match="MATH schema") as caught:
        load_tasks(["minerva_math"], data=tmp_path)
    said = str(caught.value)
    wrong = (
        r"the solution has no `\boxed{}`",
        "no text in `solution`",
        "the type `Alchemy`",
        "not an object",
        "not JSON",
    )
    for number, problem in enumerate(wrong, 1):
        assert f"line {number}: {problem}" in said
    shutil.copy(tmp_path / "all.jsonl", tmp_path / "more.jsonl")
    for task, data, said in (
        ("minerva_math", tmp_path, "no file of a subject"),
        ("minerva_math", tmp_path / "nowhere", "does not exist"),
        ("arc_easy", tmp_path, "none of the tasks"),
    ):
        with pytest.raises(EvaluationError, match=said):
            load_tasks([task], data=data)
