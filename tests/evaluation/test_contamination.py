"""An item that a selection has seen is found, whatever stands around it; one with other numbers is not."""

import numpy as np
import pytest
from world import write_task

from stethoscope.errors import StethoscopeError
from stethoscope.evaluation.contamination import Seen, seen_items
from stethoscope.evaluation.tasks import load_tasks

DOCUMENT = (
    "Problem:\nSolve $t + 26 = 28$ for $t$.\n\nSolution: $t = 2$.\n\nProblem: How many legs have 3 cats and 2 ants?"
)
ROOTS = [
    "What is the sum of the roots of $b^2 - 4b + 3 = 0$?",
    "What is the product of the roots of $b^2 - 5b + 6 = 0$?",
    "What is the sum of the roots of $z^2 - 9b + 8 = 0$?",
]
CHAT = [
    {"role": "user", "content": "Name the capital of the Netherlands, please."},
    {"role": "assistant", "content": None},
]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Solve $t + 26 = 28$ for $t$.", True),
        ("solve   $T+26 = 28$\nfor $t$.", True),
        ("Solve $t + 26 = 29$ for $t$.", False),
        ("Solve $t + 26 = 28$ for $t$. Then double it at once and say so.", False),
        ("How many legs have 3 cats and 2 ants?", True),
        ("How many legs have 2 cats and 3 ants?", False),
        ("have 3 cats and", True),  # four words
        ("3 cats", False),  # too short to tell
        ("What is the sum of the roots of $b^2 - 4b + 3 = 0$?", True),
        ("What is the sum of the roots of $b^2 - 5b + 6 = 0$?", False),  # only their product was asked for
        ("Name the capital of the Netherlands, please.", True),
    ],
)
def test_what_is_held(text, held, tmp_path):
    Seen.of([DOCUMENT, CHAT, *ROOTS]).save(tmp_path)
    assert Seen.load(tmp_path).holds(text) is held


def test_nothing_seen_holds_nothing():
    assert not Seen.of([]).holds("How many legs have 3 cats and 2 ants?")


TEXT = "The trophy does not fit into the brown suitcase because it is far too large for it."


@pytest.mark.parametrize(
    "settings",
    [
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        {
            "output_type": "multiple_choice", "doc_to_text": "{{ {'1': 0, '2': 1}[answer] }}",
            "doc_to_choice": "{{ ['a ' + text[:9], 'b ' + text[:9]] }}", "doc_to_target": "{{text[9:]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        {"doc_to_text": "Q: {{text}}"},
    ],
)  # fmt: skip
def test_an_item_is_judged_by_its_text_whatever_its_prompt_is(settings, make_task):
    folder, other = make_task(), "A text of other words that nobody has seen before."
    rows = [{"text": text, "answer": "1"} for text in (other, TEXT)]
    write_task(folder, "own", rows, **{"generation_kwargs": None, "metric_list": None} | settings)
    assert seen_items(load_tasks(["own"], folder), Seen.of([TEXT])) == {"own": (1,)}


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "seen.npy").write_bytes(b"not numpy")
    with pytest.raises(StethoscopeError, match="cannot be read"):
        Seen.load(tmp_path)
    np.save(tmp_path / "seen.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(StethoscopeError, match="cannot be read"):
        Seen.load(tmp_path)
