"""`evaluate`: arms truly swap, runs resume, what cannot be run or compared is refused."""

from contextlib import contextmanager, nullcontext

import pandas as pd
import pytest
import torch

from stethoscope.errors import EvaluationError
from stethoscope.evaluation import Outcomes
from stethoscope.evaluation.run import evaluate, load_tasks, weights_hash


def changed(model, scale=3.0):
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


def test_arms_swap_and_share_items(stirred_llama, tokenizer, make_task, tmp_path):
    arms = {"base": nullcontext, "edited": changed(stirred_llama), "again": nullcontext}
    seen = []
    outcomes = evaluate(
        stirred_llama,
        tokenizer,
        arms,
        ["sums"],
        out=tmp_path / "out",
        include_path=make_task(),
        batch_size=4,
        progress=lambda *a: seen.append(a),
    )
    assert outcomes.arms == ["base", "edited", "again"]
    assert len(outcomes.frame) == 48
    base, edited, again = (outcomes.rows(arm, "sums") for arm in outcomes.arms)
    pd.testing.assert_frame_equal(base.drop(columns="arm"), again.drop(columns="arm"))
    assert (base["response"] != edited["response"]).any()
    assert base["prompt_hash"].tolist() == edited["prompt_hash"].tolist()
    assert seen[-1][:2] == (48, 48)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    stored = Outcomes.load(tmp_path / "out" / "outcomes.parquet")
    pd.testing.assert_frame_equal(stored.frame, outcomes.frame)
    row = outcomes.frame.iloc[0]
    assert row["extracted"] == (row["answer"] != "[invalid]")
    assert 1 <= row["generated_tokens"] <= 24
    assert not list((tmp_path / "out" / "parts").glob("*.jsonl"))


def test_sampled_shots_are_the_same_for_every_arm(stirred_llama, tokenizer, make_task, tmp_path):
    arms = {"base": nullcontext, "edited": changed(stirred_llama)}
    folder = make_task(sampler="default")
    outcomes = evaluate(stirred_llama, tokenizer, arms, ["sums"], out=tmp_path, include_path=folder, limit=6)
    prompts = outcomes.frame.groupby("arm")["prompt_hash"].apply(list)
    assert prompts["base"] == prompts["edited"]


def test_interrupted_run_goes_on(stirred_llama, tokenizer, make_task, tmp_path):
    folder = make_task()
    make_task("more")

    def run(arms, **kwargs):
        options = {"out": tmp_path / "out", "include_path": folder, "batch_size": 4, **kwargs}
        return evaluate(stirred_llama, tokenizer, arms, ["sums", "more"], **options)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run({"base": nullcontext, "edited": broken})
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(stored) == 2
    calls = []
    whole = run({"base": nullcontext, "edited": changed(stirred_llama)}, progress=lambda done, *_: calls.append(done))
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert calls[:2] == [16, 32]  # the base's two tasks came from disk at once
    fresh = run({"base": nullcontext, "edited": changed(stirred_llama)}, out=tmp_path / "fresh")
    pd.testing.assert_frame_equal(whole.frame, fresh.frame)
    # another arm under the same name, another limit: neither is taken for what is stored
    other = run({"base": nullcontext, "edited": changed(stirred_llama, 5.0)})
    assert (other.rows("edited", "sums")["response"] != whole.rows("edited", "sums")["response"]).any()
    assert len(run({"base": nullcontext}, limit=3).frame) == 6


def test_given_keys_stand_for_weights(stirred_llama, tokenizer, make_task, tmp_path):
    folder = make_task()
    options = {"out": tmp_path, "include_path": folder, "limit": 4, "keys": {"edited": "abc"}}
    first = evaluate(stirred_llama, tokenizer, {"edited": changed(stirred_llama)}, ["sums"], **options)
    second = evaluate(stirred_llama, tokenizer, {"edited": nullcontext}, ["sums"], **options)
    pd.testing.assert_frame_equal(first.frame, second.frame)


def test_unknown_and_empty_tasks_are_named(make_task, monkeypatch):
    folder = make_task()
    make_task("hollow", items=0)
    with pytest.raises(EvaluationError, match="could not be built"):
        load_tasks(["hollow"], folder)
    import stethoscope.evaluation.tasks as tasks

    manager = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path, include_defaults=False)
    )
    with pytest.raises(EvaluationError, match=r"`sum` .*sums") as caught:
        load_tasks(["sums", "sum", "zzz"], folder)
    assert "`zzz`" in str(caught.value)
    with pytest.raises(EvaluationError, match="does not exist"):
        load_tasks(["sums"], folder / "nowhere")
    with pytest.raises(EvaluationError, match="no task"):
        load_tasks([], folder)


def test_no_arm_and_no_items_are_refused(stirred_llama, tokenizer, tmp_path):
    with pytest.raises(EvaluationError, match="no arm"):
        evaluate(stirred_llama, tokenizer, {}, ["sums"], out=tmp_path)
    with pytest.raises(EvaluationError, match="`0` items"):
        evaluate(stirred_llama, tokenizer, {"base": nullcontext}, ["sums"], out=tmp_path, limit=0)


def test_weights_hash_sees_one_element(stirred_llama):
    before = weights_hash(stirred_llama)
    with torch.no_grad():
        stirred_llama.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    assert weights_hash(stirred_llama) != before
