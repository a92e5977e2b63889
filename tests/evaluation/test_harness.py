"""The shared-prefix path writes what the harness' own writes."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast
from world import make_tokenizer

from stethoscope.errors import EvaluationError
from stethoscope.evaluation import decoding, harness
from stethoscope.evaluation.harness import SharedPrefixLM, read_journal
from stethoscope.evaluation.run import load_tasks


@pytest.fixture
def asked(make_task):
    """16 requests with shots in common."""
    (task,) = load_tasks(["sums"], make_task()).values()
    task.build_all_requests()
    return task.instances


def plainly(model, tokenizer, requests, batch_size=4):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_same_responses_as_the_harness(any_model, tokenizer, asked, decoded, batch_size):
    short_window = (getattr(any_model.config, "sliding_window", None) or 512) < 64
    plain = plainly(any_model, tokenizer, asked)
    ours = SharedPrefixLM(any_model, tokenizer, batch_size=batch_size)
    before = any_model.config._attn_implementation
    assert ours.generate_until(asked) == plain
    assert any_model.config._attn_implementation == before
    assert bool(decoded) is not short_window  # a window shorter than the prompts goes the harness' own way
    assert len(set(plain)) > 3
    generations = [ours.generation(*i.args) for i in asked]
    assert len({g.tokens for g in generations}) > 1  # rows left the batch at different steps
    assert {g.truncated for g in generations} == {True, False} or all(g.tokens < 24 for g in generations)


@pytest.mark.parametrize(("batch_size", "batches"), [(64, [[16, 5, 16]]), (20, [[16, 4], [1, 16]])])
def test_tasks_with_other_shots_are_decoded_in_one_batch(batch_size, batches, any_model, tokenizer, make_task, decoded):
    make_task("short", num_fewshot=0, items=5)
    make_task("shorter", num_fewshot=1)
    several = load_tasks(["sums", "short", "shorter"], make_task()).values()
    for task in several:
        task.build_all_requests()
    asked = [request for task in several for request in task.instances]
    plain = plainly(any_model, tokenizer, asked)
    ours = SharedPrefixLM(any_model, tokenizer, batch_size=batch_size)
    assert ours.generate_until(asked) == plain
    assert decoded in ([], batches)


def test_both_paths_record_the_same(stirred_llama, tokenizer, asked, monkeypatch):
    fast, slow = (SharedPrefixLM(stirred_llama, tokenizer, batch_size=3) for _ in range(2))
    responses = fast.generate_until(asked)
    monkeypatch.setattr(harness, "can_share", lambda *_: False)
    assert responses == slow.generate_until(asked)
    assert [fast.generation(*i.args) for i in asked] == [slow.generation(*i.args) for i in asked]


def test_prompts_that_share_nothing(stirred_llama, tokenizer):
    settings = {"until": ["e"], "max_gen_toks": 12}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=i)
        for i, text in enumerate(["Alpha", "beta is", "c", "c", "delta and more of it"])
    ]
    plain = plainly(stirred_llama, tokenizer, requests, batch_size=1)
    assert SharedPrefixLM(stirred_llama, tokenizer, batch_size=8).generate_until(requests) == plain


def test_bfloat16_runs(stirred_llama, tokenizer, asked):
    assert len(SharedPrefixLM(stirred_llama.to(torch.bfloat16), tokenizer, batch_size=8).generate_until(asked)) == 16


def test_settings_that_greedy_decoding_would_ignore_take_the_harness_path(stirred_llama, tokenizer, asked, decoded):
    stirred_llama.generation_config.repetition_penalty = 1.3
    plain = plainly(stirred_llama, tokenizer, asked)
    assert SharedPrefixLM(stirred_llama, tokenizer, batch_size=4).generate_until(asked) == plain
    assert not decoded


def test_a_model_that_does_not_fit_is_noticed(stirred_llama, monkeypatch):
    assert decoding.agrees(stirred_llama, list(range(40)))
    layer = stirred_llama.model.layers[1].self_attn
    monkeypatch.setattr(layer, "layer_idx", 0)  # reads another layer's states
    assert not decoding.agrees(stirred_llama, list(range(40)))


def test_a_temperature_alone_samples_every_repeat(stirred_llama, tokenizer, decoded):
    arguments = ("one and", {"until": ["\n"], "temperature": 1.0, "max_gen_toks": 8})
    repeats = [Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)] * 4
    assert len(set(SharedPrefixLM(stirred_llama, tokenizer, batch_size=4).generate_until(repeats))) > 1
    assert not decoded


def test_journal_survives_a_torn_line(stirred_llama, tokenizer, asked, decoded, tmp_path, caplog):
    lm = SharedPrefixLM(stirred_llama, tokenizer, batch_size=4)
    lm.journal = tmp_path / "journal.jsonl"
    whole = lm.generate_until(asked)
    lines = lm.journal.read_text().splitlines(keepends=True)
    lm.journal.write_text("".join(lines[:9]) + lines[9][:20])  # two batches and a bit
    again, seen = SharedPrefixLM(stirred_llama, tokenizer, batch_size=4), []
    again.journal, again.on_items = lm.journal, seen.append
    decoded.clear()
    assert again.generate_until(asked) == whole
    assert decoded == [[4], [4]]
    assert sum(seen) == 16
    caplog.clear()
    assert read_journal(lm.journal).keys() == again._generations.keys()
    assert not caplog.records  # the torn batch's first line stands there twice and is sound


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("begin", ["<s>", None])
def test_a_tokenizer_without_padding_and_end_token(begin, shares, stirred_llama, tokenizer, asked, monkeypatch):
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, bos_token=begin)
    stirred_llama.generation_config.eos_token_id = stirred_llama.config.eos_token_id = None
    if not shares:
        monkeypatch.setattr(harness, "can_share", lambda *_: False)
    ours, known = (SharedPrefixLM(stirred_llama, one, batch_size=5) for one in (bare, tokenizer))
    assert ours.generate_until(asked) == known.generate_until(asked)
    assert (bare.pad_token, bare.eos_token, len(bare)) == (None, None, 259)  # left as it was
    choices = [Instance("loglikelihood", {}, ("one and", text), i) for i, text in enumerate((" one", " twelve"))]
    assert ours.loglikelihood(choices) == known.loglikelihood(choices)
    texts = [Instance("loglikelihood_rolling", {}, ("one and one",), 0)]
    if begin:
        assert ours.loglikelihood_rolling(texts) == known.loglikelihood_rolling(texts)
    else:
        with pytest.raises(EvaluationError, match="no begin and no end token"):
            ours.loglikelihood_rolling(texts)
