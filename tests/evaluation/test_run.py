"""`evaluate`: arms truly swap, runs resume, what cannot be run or compared is refused."""

from contextlib import contextmanager, nullcontext

import pandas as pd
import pytest
import torch

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.evaluation.run import evaluate, evaluate_checkpoints, load_tasks, weights_hash
from stethoscope.models.load import load_model


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
    with pytest.raises(EvaluationError, match="have no items") as caught:
        load_tasks(["sums", "hollow"], folder)
    assert "`hollow`" in str(caught.value)
    assert "`sums`" not in str(caught.value)
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


def test_checkpoints_are_evaluated_as_live_models_are(checkpoints, tokenizer, make_task, tmp_path):
    edited = load_model(checkpoints["edited"], dtype=torch.float32)
    options = {"include_path": make_task(), "batch_size": 4}
    outcomes = evaluate_checkpoints(checkpoints, ["sums"], out=tmp_path / "out", dtype=torch.float32, **options)
    live = evaluate(edited, tokenizer, {"edited": nullcontext}, ["sums"], out=tmp_path / "live", **options)
    assert outcomes.arms == ["base", "edited"]
    pd.testing.assert_frame_equal(outcomes.rows("edited", "sums"), live.rows("edited", "sums"))
    assert (outcomes.rows("base", "sums")["response"] != outcomes.rows("edited", "sums")["response"]).any()


def test_one_checkpoint_is_loaded_at_a_time_and_only_if_needed(checkpoints, make_task, tmp_path, monkeypatch):
    import gc
    import weakref

    import stethoscope.evaluation.run as run

    alive, loaded = [], []

    def load(folder, **kwargs):
        gc.collect()
        assert not any(model() is not None for model in alive)
        model = load_model(folder, **kwargs)
        alive.append(weakref.ref(model))
        loaded.append(folder.name)
        return model

    monkeypatch.setattr(run, "load_model", load)
    options = {"out": tmp_path / "out", "include_path": make_task(), "limit": 4}
    first = evaluate_checkpoints(checkpoints, ["sums"], **options)
    assert loaded == ["base", "edited"]
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
    tokenizer.add_tokens(["twenty"])
    tokenizer.save_pretrained(checkpoints["edited"])
    with pytest.raises(EvaluationError, match=r"other tokenizers than `base`.*\n.*`edited`"):
        evaluate_checkpoints(checkpoints, ["sums"], **options)


def test_vllm_that_is_not_installed_is_said_in_one_line(checkpoints, make_task, tmp_path):
    with pytest.raises(EvaluationError, match="vLLM is not installed") as caught:
        evaluate_checkpoints(checkpoints, ["sums"], out=tmp_path, include_path=make_task(), backend="vllm")
    assert caught.value.hint == "pip install 'lm_eval[vllm]==0.4.13'"


ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/sums.test.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{problem}}}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


def test_a_task_without_a_metric_per_item_is_named(stirred_llama, tokenizer, make_task, tmp_path):
    folder = make_task()
    (folder / "rolling.yaml").write_text(ROLLING.format(folder=folder))
    options = {"out": tmp_path, "include_path": folder, "limit": 3}
    outcomes = evaluate(stirred_llama, tokenizer, {"base": nullcontext}, ["rolling"], **options)
    assert len(outcomes.frame) == 3
    with pytest.raises(EvaluationError, match="`rolling` has no metric per item"):
        outcomes.metric_of("rolling")


def test_the_noise_floor_of_a_repeated_run_is_zero(stirred_llama, tokenizer, make_task, tmp_path):
    """Greedy decoding at a fixed composition of batches; each arm is decoded anew, nothing is read from the other."""
    from stethoscope.evaluation.comparison import aa_floor

    arms = {"base": nullcontext, "base_again": nullcontext}
    outcomes = evaluate(stirred_llama, tokenizer, arms, ["sums"], out=tmp_path, include_path=make_task(), batch_size=5)
    (floor,) = aa_floor(outcomes, "base", "base_again")
    assert (floor.n, floor.changed, floor.responses, floor.low) == (16, 0, 0, 0.0)
    assert 0.1 < floor.high < 0.3  # 16 items cannot show more
