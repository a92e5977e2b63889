"""The shared-prefix path writes what the harness' own writes."""

from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from stethoscope.evaluation import decoding
from stethoscope.evaluation.harness import SharedPrefixLM
from stethoscope.evaluation.run import load_tasks


def requests(folder: Path, *names: str):
    instances = []
    for task in load_tasks(names, folder).values():
        task.build_all_requests()
        instances += task.instances
    return instances


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_same_responses_as_the_harness(any_model, tokenizer, make_task, batch_size, monkeypatch):
    asked = requests(make_task(), "sums")
    short_window = (
        (any_model.config.sliding_window or 512) < 64 if hasattr(any_model.config, "sliding_window") else False
    )
    used = []
    monkeypatch.setattr(
        "stethoscope.evaluation.harness.decode_greedily",
        lambda *a, **k: used.append(1) or decoding.decode_greedily(*a, **k),
    )
    plain = HFLM(pretrained=any_model, tokenizer=tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    ours = SharedPrefixLM(any_model, tokenizer, batch_size=batch_size)
    before = any_model.config._attn_implementation
    assert ours.generate_until(asked) == plain
    assert any_model.config._attn_implementation == before
    assert bool(used) is not short_window  # a window shorter than the prompts goes the harness' own way
    assert len(set(plain)) > 3
    generations = [ours.generation(*i.args) for i in asked]
    assert len({g.tokens for g in generations}) > 1  # rows left the batch at different steps
    assert {g.truncated for g in generations} == {True, False} or all(g.tokens < 24 for g in generations)


def test_both_paths_record_the_same(stirred_llama, tokenizer, make_task, monkeypatch):
    asked = requests(make_task(), "sums")
    fast, slow = (SharedPrefixLM(stirred_llama, tokenizer, batch_size=3) for _ in range(2))
    responses = fast.generate_until(asked)
    monkeypatch.setattr("stethoscope.evaluation.harness.can_share", lambda *_: False)
    assert responses == slow.generate_until(asked)
    assert [fast.generation(*i.args) for i in asked] == [slow.generation(*i.args) for i in asked]


def test_prompts_that_share_nothing(stirred_llama, tokenizer):
    from lm_eval.api.instance import Instance

    texts = ["Alpha", "beta is", "c", "c", "delta and more of it"]
    settings = {"until": ["e"], "max_gen_toks": 12}
    asked = [
        Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=i)
        for i, text in enumerate(texts)
    ]
    plain = HFLM(pretrained=stirred_llama, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert SharedPrefixLM(stirred_llama, tokenizer, batch_size=8).generate_until(asked) == plain


def test_bfloat16_runs(stirred_llama, tokenizer, make_task):
    lm = SharedPrefixLM(stirred_llama.to(torch.bfloat16), tokenizer, batch_size=8)
    assert len(lm.generate_until(requests(make_task(), "sums"))) == 16


def test_settings_that_greedy_decoding_would_ignore_take_the_harness_path(
    stirred_llama, tokenizer, make_task, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("not this way")

    monkeypatch.setattr("stethoscope.evaluation.harness.decode_greedily", refuse)
    stirred_llama.generation_config.repetition_penalty = 1.3
    asked = requests(make_task(), "sums")
    plain = HFLM(pretrained=stirred_llama, tokenizer=tokenizer, batch_size=4).generate_until(asked, disable_tqdm=True)
    assert SharedPrefixLM(stirred_llama, tokenizer, batch_size=4).generate_until(asked) == plain


def test_a_model_that_does_not_fit_is_noticed(stirred_llama, monkeypatch):
    assert decoding.agrees(stirred_llama, list(range(40)))
    layer = stirred_llama.model.layers[1].self_attn
    monkeypatch.setattr(layer, "layer_idx", 0)  # reads another layer's states
    assert not decoding.agrees(stirred_llama, list(range(40)))


def test_common_prefix_leaves_a_token_of_each_prompt():
    assert decoding.common_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert decoding.common_prefix([[1, 2], [1, 2, 3, 4]]) == [1]
    assert decoding.common_prefix([[4], [5, 6]]) == []


def test_journal_survives_a_torn_line(stirred_llama, tokenizer, make_task, tmp_path, monkeypatch):
    asked = requests(make_task(), "sums")
    lm = SharedPrefixLM(stirred_llama, tokenizer, batch_size=4)
    lm.journal = tmp_path / "journal.jsonl"
    whole = lm.generate_until(asked)
    lines = lm.journal.read_text().splitlines(keepends=True)
    lm.journal.write_text("".join(lines[:9]) + lines[9][:20])  # two batches and a bit
    again, seen = SharedPrefixLM(stirred_llama, tokenizer, batch_size=4), []
    again.journal, again.on_items = lm.journal, seen.append
    decoded = []
    monkeypatch.setattr(
        "stethoscope.evaluation.harness.decode_greedily",
        lambda model, prompts, *a, **k: (
            decoded.append(len(prompts)) or decoding.decode_greedily(model, prompts, *a, **k)
        ),
    )
    assert again.generate_until(asked) == whole
    assert decoded == [4, 4]
    assert sum(seen) == 16
