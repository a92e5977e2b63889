"""The demo's items: right answers, splits that share nothing, tasks that the harness loads."""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from math import cos, gcd, lcm, radians, sin

import pytest
import yaml
from world import read_lines

pytest.importorskip("reasoning_gym", reason="the generators' packages need a C compiler to install")

from stethoscope.evaluation.contamination import Seen
from stethoscope.text.documents import read_documents
from stethoscope_demo.items import (
    MATH_SUBJECTS,
    SHOTS,
    TASKS,
    Item,
    few_shot_prompt,
    items,
    shots,
    stream,
    train_documents,
)
from stethoscope_demo.tasks import (
    ANSWER,
    general_documents,
    generate_items,
    packaged,
    target_documents,
    task_name,
    write_tasks,
    write_text_corpora,
)


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_large_distinct_and_disjoint(task):
    test = {item.problem for item in items(task, "test", 250)}
    calibration = {item.problem for item in items(task, "calibration", 150)}
    train = {item.problem for item in islice(stream(task, "train"), 3000)}
    assert (len(test), len(calibration)) == (250, 150)
    assert not test & calibration
    assert not train & (test | calibration)
    assert not {item.problem for item in shots(task)} & (train | test | calibration)


def test_items_do_not_depend_on_hash_seed_or_on_what_was_drawn_before():
    code = (
        "import json, sys; from stethoscope_demo.items import *\n"
        "assert 'reasoning_gym' not in sys.modules\n"
        "print(json.dumps({t: [i.document for i in items(t, 'test', 20)] for t in reversed(TASKS)}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {t: [i.document for i in items(t, "test", 20)] for t in TASKS}


def test_an_exhausted_split_says_so():
    with pytest.raises(ValueError, match=r"`intermediate_algebra` has only \d+ different items in its split `shots`"):
        items("intermediate_algebra", "shots", 10_000)


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def root(text: str, *_: object) -> str:
    left, right = re.search(r"\$(.*?)\$", text)[1].split(" = ")
    expression, name = re.sub(r"(\d)([a-z])", r"\1*\2", left), re.search(r"[a-z]", left)[0]
    (found,) = [x for x in range(-200, 201) if eval(expression, {name: x}) == int(right)]
    return str(found)


def drawn_colour(text: str, *_: object) -> str:
    counts = {colour: int(n) for n, colour in re.findall(r"(\d+) (\w+)", text)}
    return latex(Fraction(counts[re.search(r"drawing a (\w+)", text)[1]], sum(counts.values())))


def complex_sum(text: str, *_: object) -> str:
    value = eval(text.removeprefix("Compute $")[:-2].replace("i", "j"))
    return f"{int(value.real)} + {int(value.imag)}i"


def of_roots(text: str, n: list[int]) -> str:
    ((p, q),) = [(p, n[1] - p) for p in range(1, n[1] // 2 + 1) if p * (n[1] - p) == n[2]]
    return str(p + q if "sum" in text.split() else p * q)


def expansion(text: str, n: list[int]) -> str:
    x = re.search(r"\((\w)", text)[1]
    return f"{x}^2 + {(1 + n[0]) * (1 + n[1]) - 1 - n[0] * n[1]}{x} + {n[0] * n[1]}"


def legs(text: str, *_: object) -> str:
    each = {"cow": 4, "dog": 4, "hen": 2, "duck": 2, "ant": 6, "bee": 6, "spider": 8, "cat": 4, "bird": 2, "flie": 6}
    animals = re.findall(r"(\d+) ([a-z]+)", text)
    return str(sum(int(n) * {**each, "fly": 6}[name.removesuffix("s")] for n, name in animals))


def special_angle(text: str, n: list[int]) -> str:
    value = (sin if "sin" in text else cos)(radians(n[0]))
    named = {"0": 0.0, "1": 1.0, r"\frac{1}{2}": 0.5, r"\frac{\sqrt{3}}{2}": 3**0.5 / 2}
    (size,) = [name for name, x in named.items() if abs(abs(value) - x) < 1e-9]
    return size if value > -1e-9 else f"-{size}"


def letter_counting(text: str, *_: object) -> str:
    letter, word = re.findall(r'"(\w+)"', text)
    return str(word.count(letter))


# The answer from a problem's text and its numbers alone, by another way than the generator's where there is one.
RECOMPUTED = {
    "linear_equation": root,
    "shifted_equation": root,
    "substitution": lambda _, n: str(n[1] * n[0] + n[2]),
    "outfits": lambda _, n: str(n[0] * n[1]),
    "marbles": drawn_colour,
    "handshakes": lambda _, n: str(sum(range(n[1]))),
    "rectangle_area": lambda _, n: str(n[0] * n[1]),
    "rectangle_perimeter": lambda _, n: str(n[0] + n[1] + n[0] + n[1]),
    "third_angle": lambda _, n: str(180 - sum(n)),
    "complex_sum": complex_sum,
    "root_sum": of_roots,
    "expansion": expansion,
    "gcd": lambda _, n: str(gcd(*n)),
    "lcm": lambda _, n: str(lcm(*n)),
    "remainder": lambda _, n: str(n[0] % n[1]),
    "sum_of_terms": lambda text, _: str(eval(text.removeprefix("Compute $")[:-2])),
    "fraction": lambda _, n: latex(Fraction(*n)),
    "legs": legs,
    "dot_product": lambda _, n: str(n[0] * n[2] + n[1] * n[3]),
    "vector_sum": lambda _, n: f"({n[0] + n[2]}, {n[1] + n[3]})",
    "special_angle": special_angle,
    "word_sorting": lambda text, _: ", ".join(sorted(text.split(": ")[1].split(", "))),
    "letter_counting": letter_counting,
}


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_found_in_the_solution_and_is_right(task):
    drawn = items(task, "test", 250) + items(task, "calibration", 150) + list(islice(stream(task, "train"), 500))
    for item in drawn:
        assert re.findall(ANSWER, item.solution) == [item.answer]
        assert item.solution.endswith("I hope it is correct.")
        numbers = [int(n) for n in re.findall(r"\d+", item.problem)]
        assert RECOMPUTED[item.kind](item.problem, numbers) == item.answer, item
        assert_working_is_true(item)


def assert_working_is_true(item: Item) -> None:
    """Every chain of equal numbers in the working is one."""
    for chain in re.findall(r"\$(.*?)\$", item.solution.split("Final Answer")[0]):
        sides = [
            re.sub(r"\\frac\{(.*?)\}\{(.*?)\}", r"(\1)/(\2)", s).replace(r"\cdot", "*") for s in chain.split(" = ")
        ]
        assert len({round(eval(side), 9) for side in sides if not re.search(r"[a-z\\]", side)}) <= 1, item


def test_training_documents_have_the_tested_form():
    item = items("algebra", "test", 1)[0]
    prompt = few_shot_prompt(item)
    assert prompt.count("Problem:\n") == SHOTS + 1
    assert prompt.endswith(f"{item.problem}\n\nSolution:")
    document = next(train_documents(1, problems=3))
    assert re.fullmatch(r"(Problem:\n[^\n]+\n\nSolution: [^\n]+(\n[^\n]+)?(\n\n|$)){3}", document)
    assert list(train_documents(9, seed=3)) == list(train_documents(9, seed=3))
    assert list(train_documents(3, seed=3)) != list(train_documents(3, seed=4))


def test_text_for_diagnosis_holds_no_test_item(tmp_path):
    write_text_corpora(tmp_path)
    target = read_lines(tmp_path / "target.jsonl")
    assert {row["subject"] for row in target} == set(MATH_SUBJECTS)
    assert len({row["text"] for row in target}) == len(target)
    halves = [[row["text"] for row in general_documents(split)] for split in ("calibration", "test")]
    assert not set(halves[0]) & set(halves[1])
    assert min(map(len, halves)) >= 200
    assert all(text.startswith("Problem:\n") for half in halves for text in half)
    assert len(list(target_documents(8))) == 8
    seen = Seen.of(text for name in ("target", "control") for text in read_documents(tmp_path / f"{name}.jsonl"))
    rows = [json.loads(line) for task in TASKS for line in packaged(task, "test").read_text().splitlines()]
    assert len(rows) == 2250
    assert [row["problem"] for row in rows if seen.holds(row["problem"])] == []
    used = [json.loads(line) for line in packaged("algebra", "calibration").read_text().splitlines()]
    assert seen.holds(used[0]["problem"])


def test_packaged_items_are_what_the_generators_make():
    for path, text in generate_items():
        assert path.read_text(encoding="utf-8") == text, path


def test_the_harness_loads_the_tasks_and_scores_gold_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = pytest.importorskip("lm_eval.tasks")
    names = write_tasks(tmp_path / "tasks")
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert set(names) <= set(manager.all_tasks)
    assert {"stethoscope_math", "stethoscope_control"} <= set(manager.all_groups)
    for path in (tmp_path / "tasks").glob("*.yaml"):
        yaml.safe_load(path.read_text(encoding="utf-8"))  # no `!function`: no code runs from a task
    loaded = manager.load("stethoscope_precalculus")["tasks"]["stethoscope_precalculus"]
    assert loaded.config.task == task_name("precalculus")
    prompt = loaded.fewshot_context(next(iter(loaded.test_docs())), num_fewshot=SHOTS)
    assert prompt == few_shot_prompt(items("precalculus", "test", 1)[0])
    loaded.build_all_requests(limit=8, rank=0, world_size=1)
    for instance in loaded.instances:
        instance.resps = [instance.doc["solution"].split(" I hope")[0]]
    loaded.apply_filters()
    for instance in loaded.instances:
        (found,) = instance.filtered_resps.values()
        assert loaded.process_results(instance.doc, [found])["exact_match"] == 1.0
