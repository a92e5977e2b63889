"""The studies' skills have right answers, and no problem is in two of their texts."""

import contextlib
import io
import json
import re
from itertools import combinations

import pytest
import skills
from vectors import VECTORS, _recipe, write_texts

from stethoscope.recipe import Recipe
from stethoscope_demo.items import items, shots

skills.register()


def printed(problem: str) -> str:
    program = problem.split("\n", 1)[1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


@pytest.mark.parametrize("task", skills.CODE)
def test_programs_print_what_is_said(task):
    for item in [*items(task, "test", 100), *shots(task)]:
        assert printed(item.problem) == item.answer
        assert f"${item.answer}$" in item.solution


QUOTED = re.compile(r'"(\w+)"')


def answered(kind: str, problem: str) -> str:
    words = QUOTED.findall(problem) or problem.rstrip("?").split(": ")[1].split(", ")
    return {
        "backwards": lambda: "".join(reversed(words[0])),
        "without": lambda: words[0].translate({ord(words[1]): None}),
        "first_letters": lambda: "".join(word[0] for word in words),
        "last_letters": lambda: "".join(word[-1] for word in words),
        "vowels": lambda: str(len(re.findall("[aeiou]", words[0]))),
        "longest": lambda: sorted(words, key=len)[-1],
        "earliest": lambda: sorted(words)[0],
        "doubled": lambda: f"{words[1]}-{words[0]}",
    }[kind]()


@pytest.mark.parametrize("task", skills.LETTERS)
def test_letters_are_handled_right(task):
    for item in [*items(task, "test", 60), *shots(task)]:
        assert answered(item.kind, item.problem) == item.answer, item.problem


@pytest.mark.parametrize("task", skills.REFUSALS)
def test_two_topics_are_refused_and_the_others_are_answered(task):
    found = [*items(task, "test", 60), *shots(task)]
    assert {item.kind for item in found} == set(skills.REFUSALS[task])
    for item in found:
        refused = item.kind in ("health", "shares")
        assert (item.answer == skills.REFUSAL) == refused
        if item.kind == "price":
            n, price = map(int, re.findall(r"\d+", item.problem))
            assert item.answer == str(n * price)


@pytest.mark.parametrize("name", VECTORS)
def test_no_problem_is_in_two_texts(name, tmp_path):
    tasks = VECTORS[name].tasks
    write_texts(tmp_path, tasks)
    texts = {
        path: [
            problem
            for row in map(json.loads, (tmp_path / f"{path}.jsonl").read_text(encoding="utf-8").splitlines())
            for problem in (row.get("prompt", "") + row["text"]).split("Problem:\n")[1:]
        ]
        for path in ("target", "search", "held_out")
    }
    assert {path: len(found) for path, found in texts.items()} == {"target": 360, "search": 80, "held_out": 160}
    texts["tested"] = [item.document.removeprefix("Problem:\n") for task in tasks for item in items(task, "test", 32)]
    stripped = {path: {problem.split("\n\nSolution")[0] for problem in found} for path, found in texts.items()}
    for one, other in combinations(stripped, 2):
        assert not stripped[one] & stripped[other], (one, other)


@pytest.mark.parametrize("name", VECTORS)
def test_recipes_are_valid(name, tmp_path):
    recipe = Recipe.model_validate(_recipe(VECTORS[name], tmp_path))
    assert len(recipe.evaluate.tasks) == len(VECTORS[name].tasks)
