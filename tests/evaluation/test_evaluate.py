"""`evaluate`: arms truly swap, runs resume, what cannot be run or compared is refused."""

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext

import pandas as pd
import pytest
import torch
from world import gpt2, interrupt, write_task

from stethoscope.errors import CheckpointError, EvaluationError
from stethoscope.evaluation import run
from stethoscope.evaluation import tasks as task_files
from stethoscope.evaluation.comparison import aa_floor, compare
from stethoscope.evaluation.names import task_functions
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate, evaluate_checkpoints, load_tasks, weights_hash
from stethoscope.evaluation.tasks import prompts_hash
from stethoscope.models.load import load_model

BASE = {"base": nullcontext}


def edited(model, scale=3.0):
    @contextmanager
    def enter():
        weight = model.model.layers[1].mlp.down_proj.weight
        before = weight.clone()
        weight.mul_(scale)
        try:
            yield
        finally:
            weight.copy_(before)

    return enter


def test_arms_swap_and_share_items_and_a_repeated_arm_differs_nowhere(stirred_llama, tokenizer, make_task, tmp_path):
    arms = {"base": nullcontext, "edited": edited(stirred_llama), "base_again": nullcontext}
    seen = []
    options = {"out": tmp_path / "out", "include_path": make_task(), "batch_size": 5}
    outcomes = evaluate(
        stirred_llama, tokenizer, arms, ["sums"], progress=lambda *a: seen.append(a), **options
    )  # fmt: skip
    assert outcomes.arms == list(arms)
    assert len(outcomes.frame) == 48
    one, other, again = (outcomes.rows(arm, "sums") for arm in outcomes.arms)
    pd.testing.assert_frame_equal(one.drop(columns="arm"), again.drop(columns="arm"))
    assert (one["response"] != other["response"]).any()
    assert one["prompt_hash"].tolist() == other["prompt_hash"].tolist()
    (floor,) = aa_floor(outcomes, "base", "base_again")
    assert (floor.n, floor.changed, floor.responses, floor.low) == (16, 0, 0, 0.0)
    assert 0.1 < floor.high < 0.3  # 16 items cannot show more
    assert seen[-1][:2] == (48, 48)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    pd.testing.assert_frame_equal(Outcomes.load(tmp_path / "out" / "outcomes.parquet").frame, outcomes.frame)
    row = outcomes.frame.iloc[0]
    assert row["extracted"] == (row["answer"] != "[invalid]")
    assert 1 <= row["generated_tokens"] <= 24
    assert not list((tmp_path / "out" / "parts").glob("*.jsonl"))


def test_sampled_shots_are_the_same_for_every_arm(stirred_llama, tokenizer, make_task, tmp_path):
    arms = {"base": nullcontext, "edited": edited(stirred_llama)}
    folder = make_task(sampler="default")
    outcomes = evaluate(stirred_llama, tokenizer, arms, ["sums"], out=tmp_path, include_path=folder, limit=6)
    prompts = outcomes.frame.groupby("arm")["prompt_hash"].apply(list)
    assert prompts["base"] == prompts["edited"]


def test_interrupted_run_goes_on(stirred_llama, tokenizer, make_task, tmp_path):
    folder = make_task()
    make_task("more")

    def go(arms, **kwargs):
        options = {"out": tmp_path / "out", "include_path": folder, "batch_size": 4, **kwargs}
        return evaluate(stirred_llama, tokenizer, arms, ["sums", "more"], **options)

    with pytest.raises(KeyboardInterrupt):
        go({"base": nullcontext, "edited": interrupt})
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(stored) == 2
    calls = []
    both = {"base": nullcontext, "edited": edited(stirred_llama)}
    whole = go(both, progress=lambda done, *_: calls.append(done))
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert calls[:2] == [16, 32]  # the base's two tasks came from disk at once
    pd.testing.assert_frame_equal(whole.frame, go(both, out=tmp_path / "fresh").frame)
    # another arm under the same name, another limit: neither is taken for what is stored
    other = go({"base": nullcontext, "edited": edited(stirred_llama, 5.0)})
    assert (other.rows("edited", "sums")["response"] != whole.rows("edited", "sums")["response"]).any()
    assert len(go(BASE, limit=3).frame) == 6


def test_tasks_that_fit_into_one_batch_are_run_together_with_the_same_outcomes(
    stirred_llama, tokenizer, make_task, tmp_path, decoded
):
    make_task("few", items=3, num_fewshot=1)
    make_task("drawn", items=2, generation_kwargs={"do_sample": True, "temperature": 0.5, "max_gen_toks": 3})
    folder, names = make_task(), ["sums", "few", "drawn"]
    seen: list[int] = []

    def asked(size: int) -> pd.DataFrame:
        options = {"out": tmp_path / str(size), "include_path": folder, "batch_size": size}
        found = evaluate(stirred_llama, tokenizer, BASE, names, progress=lambda done, *_: seen.append(done), **options)
        return found.frame[found.frame["task"] != "drawn"]

    together = asked(19)
    assert seen == sorted(seen)
    pd.testing.assert_frame_equal(together, asked(16))
    assert decoded == [[16, 3], [16], [3]]
    next((tmp_path / "19" / "parts").glob("base.few.*")).unlink()
    pd.testing.assert_frame_equal(together, asked(19))
    assert decoded == [[16, 3], [16], [3], [16, 3]]  # as before, in one batch
    assert not list((tmp_path / "19" / "parts").glob("*.jsonl"))


def test_given_keys_stand_for_weights(stirred_llama, tokenizer, make_task, tmp_path):
    options = {"out": tmp_path, "include_path": make_task(), "limit": 4, "keys": {"edited": "abc"}}
    first, second = (
        evaluate(stirred_llama, tokenizer, {"edited": arm}, ["sums"], **options)
        for arm in (edited(stirred_llama), nullcontext)
    )
    pd.testing.assert_frame_equal(first.frame, second.frame)
    both = {"base": nullcontext, "edited": nullcontext, "the same": interrupt}
    keys = {"edited": "abc", "the same": "abc"}
    found = evaluate(stirred_llama, tokenizer, both, ["sums"], **{**options, "keys": keys})
    assert found.arms == list(both)
    one, other = (found.rows(arm, "sums").drop(columns="arm") for arm in ("edited", "the same"))
    pd.testing.assert_frame_equal(one, other)


def test_unknown_and_empty_tasks_are_named(make_task, monkeypatch):
    folder = make_task()
    make_task("hollow", items=0)
    with pytest.raises(EvaluationError, match="nothing to compare") as caught:
        load_tasks(["sums", "hollow"], folder)
    assert "`hollow`" in str(caught.value)
    assert "`sums`" not in str(caught.value)
    manager = task_files.TaskManager
    monkeypatch.setattr(
        task_files, "TaskManager", lambda include_path, **_: manager(include_path=include_path, include_defaults=False)
    )
    with pytest.raises(EvaluationError, match=r"`sum` .*sums") as caught:
        load_tasks(["sums", "sum", "zzz"], folder)
    assert "`zzz`" in str(caught.value)
    for names, place, said in ((["sums"], folder / "nowhere", "does not exist"), ([], folder, "no task")):
        with pytest.raises(EvaluationError, match=said):
            load_tasks(names, place)


def test_no_arm_and_no_items_are_refused(stirred_llama, tokenizer, tmp_path):
    with pytest.raises(EvaluationError, match="no arm"):
        evaluate(stirred_llama, tokenizer, {}, ["sums"], out=tmp_path)
    with pytest.raises(EvaluationError, match="`0` items"):
        evaluate(stirred_llama, tokenizer, BASE, ["sums"], out=tmp_path, limit=0)
    for size in (0, -1):
        with pytest.raises(EvaluationError, match=f"`{size}` prompts"):
            evaluate(stirred_llama, tokenizer, BASE, ["sums"], out=tmp_path, batch_size=size)


def test_weights_hash_sees_one_element(stirred_llama):
    before = weights_hash(stirred_llama)
    stirred_llama.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    assert weights_hash(stirred_llama) != before


def test_checkpoints_are_evaluated_as_live_models_one_at_a_time_and_only_if_needed(
    checkpoints, tokenizer, make_task, tmp_path, monkeypatch
):
    alive, loaded = [], []

    def load(folder, **kwargs):
        gc.collect()
        assert not any(model() is not None for model in alive)
        model = load_model(folder, **kwargs)
        alive.append(weakref.ref(model))
        loaded.append(folder.name)
        return model

    options = {"include_path": make_task(), "batch_size": 4}
    live = load_model(checkpoints["edited"], dtype=torch.float32)
    live = evaluate(live, tokenizer, {"edited": nullcontext}, ["sums"], out=tmp_path / "live", **options)
    monkeypatch.setattr(run, "load_model", load)
    options |= {"out": tmp_path / "out", "dtype": torch.float32}
    first = evaluate_checkpoints(checkpoints, ["sums"], **options)
    assert loaded == ["base", "edited"]
    pd.testing.assert_frame_equal(first.rows("edited", "sums"), live.rows("edited", "sums"))
    assert (first.rows("base", "sums")["response"] != first.rows("edited", "sums")["response"]).any()
    again = evaluate_checkpoints(checkpoints | {"third": checkpoints["base"]}, ["sums"], **options)
    assert loaded == ["base", "edited", "base"]
    assert again.arms == ["base", "edited", "third"]
    pd.testing.assert_frame_equal(again.frame[again.frame["arm"] != "third"], first.frame)


def test_checkpoints_that_cannot_be_compared_are_refused(checkpoints, make_task, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    options = {"out": tmp_path / "out", "include_path": make_task(), "limit": 4}
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["edited"])
    GenerationConfig(repetition_penalty=1.2).save_pretrained(checkpoints["edited"])
    with pytest.raises(EvaluationError, match=r"other decoding settings than `base`.*\n.*`edited`"):
        evaluate_checkpoints(checkpoints, ["sums"], **options)
    (checkpoints["edited"] / "generation_config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="generation_config"):
        evaluate_checkpoints(checkpoints, ["sums"], **options)
    tokenizer.add_tokens(["twenty"])
    tokenizer.save_pretrained(checkpoints["edited"])
    with pytest.raises(EvaluationError, match=r"other tokenizers than `base`.*\n.*`edited`"):
        evaluate_checkpoints(checkpoints, ["sums"], **options)


def test_tasks_that_give_no_result_per_item_are_refused_before_any_work(make_task):
    folder = make_task()
    for name, output, metric in (("cola", "multiple_choice", "mcc"), ("wmt", "generate_until", "bleu")):
        choice = {"doc_to_choice": ["one", "two"], "generation_kwargs": None} if name == "cola" else {}
        whole = [{"metric": metric, "aggregation": {"mcc": "matthews_corrcoef"}.get(metric, metric)}]
        write_task(folder, name, [{"problem": "a", "answer": "one"}], output_type=output, metric_list=whole, **choice)
    with pytest.raises(EvaluationError, match=r"`cola` scores no item(.|\n)*`wmt` scores no item"):
        load_tasks(["sums", "cola", "wmt"], folder)


def test_a_metric_without_aggregation_is_told(make_task):
    folder = make_task()
    (folder / "own.py").write_text("def t_func(references, predictions):\n    return 1.0\n")
    write_task(folder, "own", [{"problem": "a", "answer": "b"}], metric_list=[{"metric": "OWN"}])
    task = folder / "own.yaml"
    task.write_text(task.read_text().replace("OWN", "!function own.t_func"))
    with pytest.raises(EvaluationError, match=r"`own`: .*needs `aggregation`"):
        load_tasks(["own"], folder, task_code=True)


@pytest.mark.parametrize("place", ["process_results", "metric_list"])
def test_outcomes_are_not_kept_when_a_scoring_function_changes(place, make_task):
    """Not even where the change is in what the named function calls."""
    folder, found = make_task(), []
    metric = {"metric": "OWN", "aggregation": "mean", "higher_is_better": True}
    settings = {"process_results": "OWN"} if place == "process_results" else {"metric_list": [metric]}
    for value in (0, 0, 1):
        grade = f"def grade(a):\n    return {value}.0\n\n"
        (folder / "own.py").write_text(f"{grade}def score(doc, results):\n    return {{'exact_match': grade(doc)}}\n")
        write_task(folder, "own", [{"problem": "a", "answer": "b"}], **settings)
        task = folder / "own.yaml"
        task.write_text(task.read_text().replace("OWN", "!function own.score"))
        found.append(prompts_hash(load_tasks(["own"], folder, task_code=True)["own"], None, 0))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("place", ["in the file", "included", "in a group", "by its path", "importable"])
def test_python_that_task_files_of_ones_own_name_runs_only_if_allowed(place, make_task, tmp_path):
    folder = make_task()
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n\ndef text(doc):\n    return doc['problem']\n")
    write_task(folder, "own", [{"problem": "a", "answer": "b"}], doc_to_text="TEXT")
    task = folder / "own.yaml"
    name = "os.path.basename" if place == "importable" else "own.text"
    task.write_text(task.read_text().replace("TEXT", f"!function {name}"))
    asked = str(task) if place == "by its path" else "own"
    if place == "included":
        task.rename(folder / "_base.yaml")
        task.write_text("include: _base.yaml\ntask: own\n")
    if place == "in a group":
        (folder / "g.yaml").write_text("group: both\ntask: [own, sums]\n")
        asked = "both"
    with pytest.raises(EvaluationError, match=rf"`!function {name}` in .* would run Python"):
        load_tasks([asked], folder)
    assert not ran.exists()
    if place not in ("in a group", "importable"):
        files = task_functions([asked, "sums"], folder)
        assert list(files.values()) == [["own.text"]]
        assert "own" in load_tasks([asked], folder, task_code=True)
        assert ran.exists()
    assert task_functions(["sums", "minerva_math"], folder) == {}  # the harness' own are not named


def test_templates_of_task_files_run_in_a_sandbox(make_task, tmp_path):
    folder = make_task()
    ran = tmp_path / "ran"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    write_task(folder, "jinja", [{"problem": "a", "answer": "b"}], doc_to_text=template)
    with pytest.raises(EvaluationError, match=r"`jinja`: .*unsafe"):
        load_tasks(["jinja"], folder)
    assert not ran.exists()


ROLLING = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{problem}}",
    "generation_kwargs": None, "metric_list": None,
}  # fmt: skip


def test_texts_are_scored_in_bits_per_byte_each_and_fewer_are_better(
    stirred_llama, tokenizer, make_task, tmp_path, capfd
):
    folder = make_task()
    texts = ["one and one", "two\u00e9 and more of it", "x" * 700]  # the last is longer than the model's window
    write_task(folder, "rolling", [{"problem": text} for text in texts], **ROLLING)
    arms = {"base": nullcontext, "edited": edited(stirred_llama, 30.0)}
    outcomes = evaluate(stirred_llama, tokenizer, arms, ["rolling"], out=tmp_path, include_path=folder, batch_size=2)
    base = outcomes.rows("base", "rolling")
    assert outcomes.metric_of("rolling") == "bits_per_byte"
    for text, bits, nats in zip(texts[:2], base["bits_per_byte"], base["byte_perplexity"], strict=False):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        losses = -stirred_llama(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert bits == pytest.approx(float(losses.sum()) / len(text.encode()) / math.log(2), rel=1e-4)
        assert nats == pytest.approx(bits * math.log(2))
    (contrast,) = compare(outcomes).contrasts
    (task,) = contrast.tasks
    assert (task.scale.unit, task.scale.higher_is_better) == ("bits per byte", False)
    assert task.difference.difference == pytest.approx(task.accuracy_a - task.accuracy_b)
    assert capfd.readouterr().err.count("it/s") == 0  # no bar of the harness


def test_log_likelihoods_of_items_are_nats_and_more_are_better(stirred_llama, tokenizer, make_task, tmp_path, capfd):
    folder = make_task()
    metrics = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    rows = [{"problem": f"one and {n}", "answer": "x"} for n in ("one", "two", "three")]
    write_task(folder, "lambada", rows, output_type="loglikelihood", generation_kwargs=None, metric_list=metrics)
    outcomes = evaluate(stirred_llama, tokenizer, BASE, ["lambada"], out=tmp_path, include_path=folder)
    assert (outcomes.frame["perplexity"] < 0).all()
    scale = outcomes.scale("lambada")
    assert (scale.unit, scale.higher_is_better) == ("nats", True)
    assert capfd.readouterr().err.count("it/s") == 0


def test_prompts_longer_than_the_models_window_lose_their_beginning_and_it_is_said(
    checkpoints, tokenizer, make_task, tmp_path, caplog
):
    folder = make_task()
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["one", "two"], "doc_to_target": 1}
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    rows = [{"problem": "a" * n, "answer": "a"} for n in (3, 90)]
    write_task(folder, "choice", rows, metric_list=metrics, generation_kwargs=None, **choice)
    model = gpt2(vocab_size=259, n_positions=64)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    options = {"out": tmp_path / "out", "include_path": folder, "batch_size": 4}
    outcomes = evaluate_checkpoints({"base": tmp_path / "gpt2"}, ["sums", "choice"], **options)
    assert len(outcomes.frame) == 16 + 2
    said = [record.getMessage() for record in caplog.records if "beginning" in record.getMessage()]
    assert said == [
        "16 of 16 prompts are longer than the 40 tokens that leave room for 24 new ones: their beginning is cut off",
        "2 of 4 prompts are longer than the model's 64 tokens: their beginning is cut off",
    ]
    write_task(folder, "long", rows, generation_kwargs={"until": ["x"], "max_gen_toks": 64})
    with pytest.raises(EvaluationError, match="no room for 64 new"):
        evaluate_checkpoints({"base": tmp_path / "gpt2"}, ["long"], **options)
    write_task(
        folder, "wide", rows, metric_list=metrics, generation_kwargs=None, **choice | {"doc_to_choice": ["a", "b" * 70]}
    )
    with pytest.raises(EvaluationError, match="answer is longer"):
        evaluate_checkpoints({"base": tmp_path / "gpt2"}, ["wide"], **options)
