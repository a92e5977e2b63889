import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from math import cos, gcd, lcm, radians, sin
from pathlib import Path

import pytest
import yaml

pytest.importorskip("reasoning_gym", reason="the generators' packages need a C compiler to install")

from stethoscope.evaluation.contamination import Seen
from stethoscope.text.documents import read_documents
from stethoscope_demo.items import (
    MATH_SUBJECTS,
    SHOTS,
    SPLITS,
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


def drawn(task: str) -> list[Item]:
    return items(task, "test", 250) + items(task, "calibration", 150) + list(islice(stream(task, "train"), 500))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_large_distinct_and_disjoint(task: str) -> None:
    test = {item.problem for item in items(task, "test", 250)}
    calibration = {item.problem for item in items(task, "calibration", 150)}
    train = {item.problem for item in islice(stream(task, "train"), 3000)}
    assert (len(test), len(calibration)) == (250, 150)
    assert not test & calibration
    assert not train & (test | calibration)
    assert not {item.problem for item in shots(task)} & (train | test | calibration)


def test_the_order_of_numbers_does_not_change_the_split() -> None:
    from stethoscope_demo.items import _key, _split_of

    one, other = (_key("gcd", f"the gcd of {a} and {b}") for a, b in ((12, 18), (18, 12)))
    assert one == other
    assert _split_of(one) in SPLITS


def test_items_do_not_depend_on_hash_seed_or_on_what_was_drawn_before() -> None:
    code = (
        "import json; from stethoscope_demo.items import *\n"
        "print(json.dumps({t: [i.document for i in items(t, 'test', 20)] for t in reversed(TASKS)}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {t: [i.document for i in items(t, "test", 20)] for t in TASKS}


def test_importing_items_does_not_import_reasoning_gym() -> None:
    code = "import sys, stethoscope_demo.items; raise SystemExit('reasoning_gym' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_exhausted_split_says_so() -> None:
    with pytest.raises(ValueError, match=r"`intermediate_algebra` has only \d+ different items in its split `shots`"):
        items("intermediate_algebra", "shots", 10_000)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_found_in_the_solution_and_is_right(task: str) -> None:
    for item in drawn(task):
        assert re.findall(ANSWER, item.solution) == [item.answer]
        assert item.solution.endswith("I hope it is correct.")
        assert recomputed(item) == item.answer, item
        assert_working_is_true(item)


def recomputed(item: Item) -> str:
    """The answer from the problem's text alone, by another way than the generator's where there is one."""
    numbers = [int(n) for n in re.findall(r"\d+", item.problem)]
    words = re.findall(r"[a-z]+", item.problem)
    match item.kind:
        case "linear_equation" | "shifted_equation":
            left, right = re.search(r"\$(.*?)\$", item.problem)[1].split(" = ")  # type: ignore[index]
            expression = re.sub(r"(\d)([a-z])", r"\1*\2", left)
            name = re.search(r"[a-z]", left)[0]  # type: ignore[index]
            (root,) = [x for x in range(-200, 201) if eval(expression, {name: x}) == int(right)]
            return str(root)
        case "substitution":
            return str(numbers[1] * numbers[0] + numbers[2])
        case "outfits":
            return str(sum(1 for _ in range(numbers[0]) for _ in range(numbers[1])))
        case "marbles":
            favoured = re.search(r"drawing a (\w+)", item.problem)[1]  # type: ignore[index]
            counts = {colour: int(n) for n, colour in re.findall(r"(\d+) (\w+)", item.problem)}
            return latex(Fraction(counts[favoured], sum(counts.values())))
        case "handshakes":
            return str(sum(range(numbers[1])))
        case "rectangle_area":
            return str(numbers[0] * numbers[1])
        case "rectangle_perimeter":
            return str(numbers[0] + numbers[1] + numbers[0] + numbers[1])
        case "third_angle":
            return str(180 - sum(numbers))
        case "complex_sum":
            value = eval(item.problem.removeprefix("Compute $")[:-2].replace("i", "j"))
            return f"{int(value.real)} + {int(value.imag)}i"
        case "root_sum":
            middle, last = numbers[1:3]
            (roots,) = [(p, middle - p) for p in range(1, middle // 2 + 1) if p * (middle - p) == last]
            return str(sum(roots) if "sum" in words else roots[0] * roots[1])
        case "expansion":
            name = re.search(r"\((\w)", item.problem)[1]  # type: ignore[index]
            p, q = numbers
            return f"{name}^2 + {(1 + p) * (1 + q) - 1 - p * q}{name} + {p * q}"
        case "gcd":
            return str(gcd(*numbers))
        case "lcm":
            return str(lcm(*numbers))
        case "remainder":
            return str(numbers[0] % numbers[1])
        case "sum_of_terms":
            return str(eval(item.problem.removeprefix("Compute $")[:-2]))
        case "fraction":
            return latex(Fraction(*numbers))
        case "legs":
            legs = {"cow": 4, "dog": 4, "hen": 2, "duck": 2, "ant": 6, "bee": 6, "spider": 8, "cat": 4, "bird": 2}
            animals = re.findall(r"(\d+) ([a-z]+)", item.problem)
            return str(sum(int(n) * ({**legs, "flie": 6, "fly": 6}[name.removesuffix("s")]) for n, name in animals))
        case "dot_product":
            a, b, c, d = numbers
            return str(a * c + b * d)
        case "vector_sum":
            a, b, c, d = numbers
            return f"({a + c}, {b + d})"
        case "special_angle":
            value = (sin if "sin" in words else cos)(radians(numbers[0]))
            named = {"0": 0.0, "1": 1.0, r"\frac{1}{2}": 0.5, r"\frac{\sqrt{3}}{2}": 3**0.5 / 2}
            (size,) = [name for name, x in named.items() if abs(abs(value) - x) < 1e-9]
            return size if value > -1e-9 else f"-{size}"
        case "word_sorting":
            return ", ".join(sorted(item.problem.split(": ")[1].split(", ")))
        case "letter_counting":
            letter, word = re.findall(r'"(\w+)"', item.problem)
            return str(len(word.split(letter)) - 1)
    raise AssertionError(item.kind)


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def assert_working_is_true(item: Item) -> None:
    """Every chain of equal numbers in the working is one."""
    working = item.solution.split("Final Answer")[0]
    for chain in re.findall(r"\$(.*?)\$", working):
        sides = [
            re.sub(r"\\frac\{(.*?)\}\{(.*?)\}", r"(\1)/(\2)", s).replace(r"\cdot", "*") for s in chain.split(" = ")
        ]
        values = {round(eval(side), 9) for side in sides if not re.search(r"[a-z\\]", side)}
        assert len(values) <= 1, item


def test_training_documents_have_the_tested_form() -> None:
    item = items("algebra", "test", 1)[0]
    prompt = few_shot_prompt(item)
    assert prompt.count("Problem:\n") == SHOTS + 1
    assert prompt.endswith(f"{item.problem}\n\nSolution:")
    document = next(train_documents(1, problems=3))
    assert re.fullmatch(r"(Problem:\n[^\n]+\n\nSolution: [^\n]+(\n[^\n]+)?(\n\n|$)){3}", document)
    assert list(train_documents(9, seed=3)) == list(train_documents(9, seed=3))
    assert list(train_documents(3, seed=3)) != list(train_documents(3, seed=4))


def test_text_for_diagnosis(tmp_path: Path) -> None:
    write_text_corpora(tmp_path)
    lines = (tmp_path / "target.jsonl").read_text(encoding="utf-8").split("\n")
    target = [json.loads(line) for line in lines if line]
    assert {row["subject"] for row in target} == set(MATH_SUBJECTS)
    assert len({row["text"] for row in target}) == len(target)
    problems = {item.problem for subject in MATH_SUBJECTS for item in items(subject, "test", 250)}
    assert not problems & set(re.findall(r"Problem:\n(.*)\n", "\n".join(row["text"] for row in target)))
    halves = [[row["text"] for row in general_documents(split)] for split in ("calibration", "test")]
    assert not set(halves[0]) & set(halves[1])
    assert min(map(len, halves)) >= 200
    assert all(text.startswith("Problem:\n") for half in halves for text in half)
    assert len(list(target_documents(8))) == 8


def test_packaged_items_are_what_the_generators_make() -> None:
    for path, text in generate_items():
        assert path.read_text(encoding="utf-8") == text, path


def test_the_harness_loads_the_tasks_and_scores_gold_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
    document = next(iter(loaded.test_docs()))
    item = items("precalculus", "test", 1)[0]
    assert loaded.fewshot_context(document, num_fewshot=SHOTS) == few_shot_prompt(item)
    loaded.build_all_requests(limit=8, rank=0, world_size=1)
    for instance in loaded.instances:
        instance.resps = [instance.doc["solution"].split(" I hope")[0]]
    loaded.apply_filters()
    for instance in loaded.instances:
        (found,) = instance.filtered_resps.values()
        assert loaded.process_results(instance.doc, [found])["exact_match"] == 1.0


def test_no_test_item_stands_in_the_text_that_layers_are_chosen_on(tmp_path):
    write_text_corpora(tmp_path)
    seen = Seen.of(text for name in ("target", "control") for text in read_documents(tmp_path / f"{name}.jsonl"))
    rows = [json.loads(line) for task in TASKS for line in packaged(task, "test").read_text().splitlines()]
    assert len(rows) == 2250
    assert [row["problem"] for row in rows if seen.holds(row["problem"])] == []
    used = [json.loads(line) for line in packaged("algebra", "calibration").read_text().splitlines()]
    assert seen.holds(used[0]["problem"])
