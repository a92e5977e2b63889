"""Documents of every form, and which of their tokens count."""

import datetime

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from world import GEMMA, SMALL, build, gpt2, make_tokenizer, write_lines

from stethoscope.errors import StethoscopeError
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.models.load import load_tokenizer
from stethoscope.text.documents import documents_hash, read_documents, read_prompted
from stethoscope.text.tokens import _say_cut, batches, counted_tokens, tokenize

TEXTS = ["first text", "second\u2028text", "third"]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4, I think."}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "user"},  # what the templates say themselves
        {"role": "assistant", "content": "end"},
        {"role": "user", "content": "  a <b> .*? assistant\n"},
        {"role": "assistant", "content": "assistant\n\nend of it"},
    ],
]
CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
LLAMA = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' '"
LLAMA += " + m['content'] + eos_token }}{% endfor %}"
# As Qwen 3's: thoughts are dropped but for the last turn's, where empty ones are put in.
THINKING = (
    "{% for m in messages %}{% set parts = m['content'].split('</think>') %}{% if m['role'] == 'assistant' %}"
    "{{ '<start>assistant\n' }}{% if loop.last %}{{ '<think>\n' }}{% if parts | length > 1 %}"
    "{{ parts[0].replace('<think>', '') | trim }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ (parts | last | trim) + '<end>\n' }}{% else %}{{ '<start>user\n' + m['content'] + '<end>\n' }}{% endif %}"
    "{% endfor %}"
)


def table(path, field: str, values: list):
    parquet.write_table(pa.table({"id": list(range(len(values))), field: values}), path)
    return path


def saved(path, field: str, values: list):
    datasets.Dataset.from_dict({"id": list(range(len(values))), field: values}).save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize(("field", "values"), [("text", TEXTS), ("messages", CHATS)])
def test_every_form_gives_the_same_documents(field, values, tmp_path):
    forms = [
        write_lines(tmp_path / "a.jsonl", [{field: value, "other": 1} for value in values]),
        table(tmp_path / "b.parquet", field, values),
        saved(tmp_path / "c", field, values),
    ]
    for form in forms:
        assert read_documents(form, field=field) == values
        assert read_documents(str(form), field=field, limit=1) == values[:1]
    assert len({documents_hash(read_documents(form, field=field)) for form in forms}) == 1
    assert documents_hash(values) != documents_hash(values[::-1])
    # what a table fills in is left out again
    chat = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    assert read_documents(table(tmp_path / "d.parquet", "text", [chat])) == [chat]
    (tmp_path / "a.txt").write_text("one\n\ntwo")  # one document
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo"]


def test_a_dataset_with_splits_asks_for_one(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert read_documents(tmp_path / "d") == ["train"]
    assert read_documents(tmp_path / "d", split="test") == ["test"]
    with pytest.raises(StethoscopeError, match="no split `dev`") as caught:
        read_documents(tmp_path / "d", split="dev")
    assert caught.value.hint == "it has: train, test"
    for path in (saved(tmp_path / "f", "text", TEXTS), table(tmp_path / "f.parquet", "text", TEXTS)):
        with pytest.raises(StethoscopeError, match="split"):
            read_documents(path, split="test")
    datasets.DatasetDict({"only": parts["test"]}).save_to_disk(tmp_path / "e")
    assert read_documents(tmp_path / "e") == ["test"]


def test_a_dataset_on_the_hub_must_be_in_the_cache_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("someone/corpus", "someone/corpus:test", "someone/corpus/main:test"):
        with pytest.raises(StethoscopeError, match="cannot be read") as caught:
            read_documents(name)
        assert "owner/name/config:split" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        ([{"text": "a"}, {"texts": "b"}, 3], ["no text in field `text` (it has: texts)", "(it has: int)"]),
        ([{"text": [{"role": "user"}]}], ["message 1 is not a table with `role` and `content`, both text"]),
        ([{"text": "a"}, {"text": CHATS[0]}], ["a text in some rows and a chat in others"]),
        ([{"text": [{"from": "human"}]}, {"text": 3}], ["message 1", "line 2: no text"]),
        ([{"text": [{"role": "user", "content": [{"type": "image"}]}]}, {"text": ["a"]}], ["message 1", "message 1"]),
    ],
)
def test_bad_rows_are_all_named(rows, problems, tmp_path):
    with pytest.raises(StethoscopeError) as caught:
        read_documents(write_lines(tmp_path / "a.jsonl", rows))
    for said, problem in zip(problems, caught.value.problems, strict=True):
        assert said in problem


def test_bad_files_say_what_is_wrong(tmp_path):
    table(tmp_path / "a.parquet", "body", TEXTS)
    saved(tmp_path / "a", "body", TEXTS)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "blank.txt").write_text(" \n")
    saved(tmp_path / "torn", "text", TEXTS)
    (tmp_path / "torn" / "state.json").write_text("{}")
    for path, said in {
        "a.parquet": r"no field `text` \(it has: id, body\)",
        "a": r"no field `text` \(it has: id, body\)",
        "torn.parquet": "cannot be read",
        "empty": "cannot be read",
        "torn": "cannot be read",
        "a.csv": "there is no text",
        "blank.txt": "holds no documents",
    }.items():
        with pytest.raises(StethoscopeError, match=said):
            read_documents(tmp_path / path)


def counted_text(tokenizer, documents: list, **options) -> list[list[str]]:
    """What counts, as runs of neighbouring tokens."""
    rows, masks = tokenize(documents, tokenizer), counted_tokens(documents, tokenizer, **options)
    found = []
    for row, mask in zip(rows, masks, strict=True):
        runs: list[list[int]] = [[]]
        for token, counts in zip(row, mask, strict=True):
            runs[-1] += [token] if counts else []
            if not counts and runs[-1]:
                runs.append([])
        found.append([tokenizer.decode(run) for run in runs if run])
    return found


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA])
def test_what_the_messages_say_counts_and_what_the_template_adds_does_not(template, chat_tokenizer):
    tokenizer = chat_tokenizer(template)
    strip = str.strip if template == GEMMA else str
    said = [[strip(message["content"]) for message in chat] for chat in CHATS]
    assert counted_text(tokenizer, CHATS) == said
    assert counted_text(tokenizer, CHATS, tokens="assistant") == [[said[0][1]], [said[1][2], said[1][4]]]
    assert counted_text(tokenizer, CHATS, tokens="last") == [["."], ["t"]]
    for chat, row in zip(CHATS, tokenize(CHATS, tokenizer), strict=True):
        assert row == tokenizer.apply_chat_template(chat)["input_ids"]
        assert row.count(tokenizer.bos_token_id) == (template != CHATML)


def test_a_chat_that_its_owner_rendered_begins_once(chat_tokenizer):
    tokenizer = chat_tokenizer(GEMMA)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert tokenize(rendered, tokenizer) == tokenize(CHATS, tokenizer)
    assert tokenize([rendered[0], "a text"], tokenizer)[1][0] == tokenizer.bos_token_id


def test_thoughts_that_the_template_drops_or_moves_are_told_from_it(chat_tokenizer):
    tokenizer = chat_tokenizer(THINKING)
    assert counted_text(tokenizer, CHATS[:1]) == [["What is 2 + 2?", "4, I think."]]
    chat = [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "<think>\nlonger\n\nthought\n</think>\n\nso it is"},
    ]
    assert counted_text(tokenizer, [chat]) == [["why", "so", "and?", "longer\n\nthought", "so it is"]]
    assert counted_text(tokenizer, [chat], tokens="assistant") == [["so", "longer\n\nthought", "so it is"]]


def test_templates_that_rewrite_leave_out_or_refuse(tokenizer, chat_tokenizer):
    rewriting = chat_tokenizer("{% for m in messages %}{{ '<' + m['content'] | upper + '>' }}{% endfor %}")
    assert tokenize(CHATS, rewriting)
    with pytest.raises(StethoscopeError, match="in document 0, what the messages say cannot be told"):
        counted_tokens(CHATS, rewriting)
    short = (
        "{% for m in messages %}{% if m['content'] %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert counted_text(chat_tokenizer(short), [chat]) == [["hi"]]
    with pytest.raises(StethoscopeError, match="has no chat template"):
        tokenize(CHATS, tokenizer)
    with pytest.raises(StethoscopeError, match="refuses document 1: roles must alternate"):
        tokenize([CHATS[0], CHATS[0][1:]], chat_tokenizer(GEMMA))
    with pytest.raises(StethoscopeError, match="refuses document 0: can only concatenate str"):
        tokenize([[{"role": "user", "content": "", "call": {}}]], chat_tokenizer("{{ 'call ' + messages[0]['call'] }}"))


def test_chats_take_a_tokenizer_that_says_where_tokens_stand():
    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(StethoscopeError, match="where in a chat"):
        counted_tokens(CHATS, slow)


def test_texts_count_but_for_special_tokens(tokenizer):
    assert counted_text(tokenizer, ["ab</s>c", "d"]) == [["ab", "c"], ["d"]]
    assert counted_text(tokenizer, ["ab</s>c</s>", "d"], tokens="last") == [["c"], ["d"]]
    with pytest.raises(StethoscopeError, match="a text has no assistant's tokens"):
        counted_tokens(["a"], tokenizer, tokens="assistant")


def test_documents_are_cut_before_tokens_are_counted(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    cut = len("<start>user\n") + 4
    assert [sum(mask) for mask in counted_tokens(CHATS[:1], tokenizer, max_tokens=cut)] == [4]
    masks = counted_tokens(CHATS, tokenizer, max_tokens=cut + 45, tokens="assistant")
    assert [len(mask) for mask in masks] == [len(row) for row in tokenize(CHATS, tokenizer, max_tokens=cut + 45)]


def test_batches_count_what_was_asked_for(tokenizer):
    documents = ["ab</s>c", "cdefg", "hijk"]
    rows = tokenize(documents, tokenizer)
    masks = [[True] * 4, [False, True, True, False, True], [False, True, False, True]]
    (batch,) = batches(rows, tokenizer, counted=masks)
    assert batch.documents == (1, 0, 2)
    assert batch.countable.tolist() == [
        [False, True, True, False, True],
        [True, True, False, True, False],  # a special token never counts
        [False, True, False, True, False],
    ]
    (plain,), (same,) = (
        batches(rows, tokenizer, counted=counted) for counted in (None, counted_tokens(documents, tokenizer))
    )
    assert torch.equal(plain.countable, same.countable)


def test_batches_are_of_similar_lengths_and_little_of_them_is_padding(tokenizer):
    lengths = [7, 100, 3, 81, 79, 250, 240, 8, 1, 100]
    found = list(batches([[5] * n for n in lengths], tokenizer, batch_tokens=400))
    assert [batch.documents for batch in found] == [(5,), (6,), (1, 9, 3), (4,), (7, 0), (2,), (8,)]
    for batch in found:
        assert batch.attention_mask.float().mean() > 0.9
        assert batch.input_ids.numel() <= 400


@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_documents_longer_than_the_models_window_are_cut_there_and_it_is_said(kind, chat_tokenizer, tmp_path, caplog):
    model = gpt2(vocab_size=259, n_positions=32) if kind == "learned" else build("Llama", **SMALL | {"vocab_size": 259})
    window = 32 if kind == "learned" else 64
    model.save_pretrained(tmp_path)
    own = chat_tokenizer(CHATML)
    own.model_max_length = 8  # as another model's
    own.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    _say_cut.cache_clear()
    for documents in (["ab" * n for n in (5, 40)], CHATS):
        rows = tokenize(documents, tokenizer)
        assert max(map(len, rows)) == window
        assert [len(mask) for mask in counted_tokens(documents, tokenizer)] == [len(row) for row in rows]
        assert document_losses(model, rows).tokens.max() == window - 1
    assert [record.getMessage() for record in caplog.records if "are cut" in record.getMessage()] == [
        f"the model reads {window} tokens at most: documents are cut there, not at 1024"
    ]
    assert [len(row) for row in tokenize(["ab" * 40], tokenizer, max_tokens=20)] == [20]


def test_a_tokenizer_without_padding_and_end_token_pads_what_is_masked(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    assert (bare.pad_token_id, bare.eos_token_id) == (None, None)
    documents = ["cdefg", "hijk"]
    (batch,), (known,) = (batches(tokenize(documents, one), one) for one in (bare, tokenizer))
    assert torch.equal(batch.attention_mask, known.attention_mask)
    assert torch.equal(batch.countable, known.countable)
    assert not batch.countable[~batch.attention_mask].any()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder"])
def test_blank_rows_are_skipped_and_counted_and_a_byte_order_mark_is_read(form, tmp_path, caplog):
    values = ["a", None, " ", "b", "", "c"]
    if form == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", [*({"text": value} for value in values), None])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    else:
        path = (table if form == "parquet" else saved)(tmp_path / f"a.{form}", "text", values)
    assert read_documents(path) == ["a", "b", "c"]
    assert f"{4 if form == 'jsonl' else 3} blank rows" in caplog.text
    assert read_documents(path, limit=2) == ["a", "b"]  # of those that are there
    with pytest.raises(StethoscopeError, match="holds no documents: its 2 rows are blank"):
        read_documents(write_lines(tmp_path / "b.jsonl", [{"text": None}, {"text": "\n"}]))


def test_documents_keep_their_prompts_where_rows_are_skipped(tmp_path):
    rows = [{"q": f"q{n}", "a": f"a{n}"} for n in range(5)]
    rows[1]["a"], rows[3]["q"] = "", None
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert read_prompted(path, field="a", prompt="q") == (["q0a0", "q2a2", "q4a4"], ["q0", "q2", "q4"])
    (tmp_path / "a.txt").write_text("no fields")
    with pytest.raises(StethoscopeError, match="has no fields"):
        read_prompted(tmp_path / "a.txt", field="a", prompt="q")
    chats = write_lines(tmp_path / "b.jsonl", [{"q": "q", "a": [{"role": "user", "content": "a"}]}])
    with pytest.raises(StethoscopeError, match="chats"):
        read_prompted(chats, field="a", prompt="q")


def test_half_a_surrogate_pair_is_read_as_a_replacement_and_said(chat_tokenizer, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b"}\n{"text": "\\uD83D\\uDE00 \\ufffd"}\n{"text": "c\\uDE00"}\n')
    documents = read_documents(path)
    assert documents == ["a\ufffd b", "\U0001f600 \ufffd", "c\ufffd"]
    assert "2 lines hold half of a surrogate pair" in caplog.text
    assert len(documents_hash(documents)) == 64
    path.write_text('{"text": [{"role": "user", "content": "\\ude00"}]}')
    ((message,),) = read_documents(path)
    assert message["content"] == "\ufffd"
    assert counted_text(chat_tokenizer(CHATML), [[message]]) == [["\ufffd"]]


SHARE = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = [
    {"role": "user", "content": "h"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "it is 3"},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (SHARE, [("system", "s"), ("user", "h"), ("assistant", "g")]),
        (PARTS, [("user", "a b")]),
        (CALLS, [("user", "h"), ("assistant", ""), ("tool", "3"), ("assistant", "it is 3")]),
    ],
    ids=["sharegpt", "parts", "calls"],
)
def test_chats_are_read_in_every_form_in_which_they_are_published(chat, said, form, chat_tokenizer, tmp_path):
    if form == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", [{"chat": chat}])
    else:
        path = (table if form == "parquet" else saved)(tmp_path / f"a.{form}", "chat", [chat])
    (found,) = read_documents(path, field="chat")
    assert [(message["role"], message["content"]) for message in found] == said
    assert counted_text(chat_tokenizer(CHATML), [found]) == [[content for _, content in said if content]]
    if chat is CALLS:
        assert found[1]["tool_calls"] == [CALL]
        assert found[2]["name"] == "add"


def test_messages_may_hold_what_json_does_not(tmp_path):
    when = datetime.datetime(2026, 1, 1)
    chats = [[{"role": "user", "content": "a", "timestamp": when, "score": float("nan")}], [*CHATS[0]]]
    found = read_documents(table(tmp_path / "a.parquet", "messages", chats), field="messages")
    assert found[0][0]["timestamp"] == when
    later = [[found[0][0] | {"timestamp": when.replace(year=2027)}], found[1]]
    assert len({documents_hash(found), documents_hash(later), documents_hash(found[1:])}) == 3


def test_chats_as_tables_of_lists_are_read(tmp_path):
    columns = {"from": ["human", "gpt"], "value": ["h", "g"]}
    (found,) = read_documents(write_lines(tmp_path / "a.jsonl", [{"text": columns}]))
    assert found == [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]
    columns["value"].pop()
    with pytest.raises(StethoscopeError, match="line 1: no text"):
        read_documents(write_lines(tmp_path / "a.jsonl", [{"text": columns}, {"text": {}}]))
