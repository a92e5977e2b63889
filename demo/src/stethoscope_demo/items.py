"""Short problems with exact answers in the spirit of the seven MATH subjects, and two control tasks.

    for item in items("algebra", "test", 200): print(item.document)

Numbers come from `reasoning-gym` where it has a fitting generator and from small generators here where it has not;
the wording is always this file's own, because generation costs tokens. A problem's split follows from a hash of its
words, so that a training stream of any length can never contain a test problem.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice
from typing import Any

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
CONTROL_TASKS = ("word_sorting", "letter_counting")
TASKS = MATH_SUBJECTS + CONTROL_TASKS

# Share of the item space in percent. `shots` is small because only four are ever drawn from it.
SPLITS = {"train": 57, "calibration": 15, "test": 23, "shots": 5}
SHOTS = 4

Draft = tuple[str, str, str]
"""A problem, its working (may be empty) and its answer."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One problem of one task."""

    task: str
    kind: str
    problem: str
    solution: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Problem:\n{self.problem}\n\nSolution:"

    @property
    def document(self) -> str:
        return f"{self.prompt} {self.solution}"


def items(task: str, split: str, count: int, *, seed: int = 0) -> list[Item]:
    """The first `count` distinct items of a split."""
    return list(islice(stream(task, split, seed=seed), count))


def stream(task: str, split: str, *, seed: int = 0) -> Iterator[Item]:
    """Items of a split, for ever in `train`, where a problem may come again after a while.

    The other splits never repeat a problem, and end with an error when the item space is used up.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    kinds = KINDS[task]
    seen: set[str] = set()
    misses = 0
    while misses < 20_000:
        kind = rng.choice(sorted(kinds))
        problem, working, answer = kinds[kind](rng)
        key = _key(kind, problem)
        misses += 1
        if key in seen or _split_of(key) != split:
            continue
        misses = 0
        if split != "train":
            seen.add(key)
        closing = f"Final Answer: The final answer is ${answer}$. I hope it is correct."
        solution = f"{working}\n{closing}" if working else closing
        yield Item(task=task, kind=kind, problem=problem, solution=solution, answer=answer)
    raise ValueError(f"`{task}` has only {len(seen)} different items in its split `{split}`")


def shots(task: str) -> list[Item]:
    """The four fixed examples before every tested problem, one or more of each kind."""
    found: list[Item] = []
    kinds = sorted(KINDS[task])
    for item in stream(task, "shots"):
        if item.kind == kinds[len(found) % len(kinds)]:
            found.append(item)
        if len(found) == SHOTS:
            break
    return found


def train_documents(count: int, *, seed: int = 0, problems: int = 5) -> Iterator[str]:
    """Documents of several problems of one subject, in the tested few-shot form, from the training split."""
    return (join_items(group) for group in train_groups(count, seed=seed, problems=problems))


def train_groups(
    count: int, *, seed: int = 0, problems: int = 5, subjects: Sequence[str] = MATH_SUBJECTS
) -> Iterator[list[Item]]:
    """Groups of training items of one subject each; the subjects take turns in a shuffled order."""
    streams = {subject: stream(subject, "train", seed=seed) for subject in subjects}
    order = random.Random(f"order/{seed}")
    made = 0
    while made < count:
        for subject in order.sample(subjects, len(subjects))[: count - made]:
            yield list(islice(streams[subject], problems))
            made += 1


def join_items(group: list[Item]) -> str:
    """Several problems with their solutions, as the few-shot prompt joins them."""
    return "\n\n".join(item.document for item in group)


def few_shot_prompt(item: Item) -> str:
    """The whole text a model sees before it answers, as lm-evaluation-harness builds it."""
    return join_items(shots(item.task)) + "\n\n" + item.prompt


def _key(kind: str, problem: str) -> str:
    # Sorted, so that 3 + 4 and 4 + 3 are one problem and land in one split.
    return kind + " " + " ".join(sorted(re.findall(r"\d+|[A-Za-z]+|\S", problem)))


def _split_of(key: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares add up to 100")


@cache
def _gym(name: str, **options: Any) -> Any:
    # Imported late: it takes seconds and only generating needs it.
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=2**31 - 1, **options)


def _draw(rng: random.Random, name: str, **options: Any) -> dict[str, Any]:
    """One item of a reasoning-gym data set: it is a pure function of the index."""
    return _gym(name, **options)[rng.randrange(2**31 - 1)]


NAMES = ("Ann", "Ben", "Carl", "Dana", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "toys")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
SHAPES = ("garden", "field", "carpet", "wall", "poster", "table", "yard", "floor")
UNITS = ("feet", "meters", "inches", "yards")
TRIANGLES = ("ABC", "PQR", "DEF", "XYZ", "KLM", "RST", "UVW", "GHJ")
CLOTHES = ("hats", "shirts", "coats", "scarves", "socks", "belts", "ties", "shoes")


# algebra


def _linear_equation(rng: random.Random) -> Draft:
    a, x, b = rng.randint(2, 9), rng.randint(1, 10), rng.randint(1, 20)
    c = a * x + b
    v = rng.choice("xyntk")
    return f"Solve ${a}{v} + {b} = {c}$ for ${v}$.", f"${a}{v} = {c} - {b} = {a * x}$, so ${v} = {x}$.", str(x)


def _shifted_equation(rng: random.Random) -> Draft:
    x, b = rng.randint(2, 40), rng.randint(2, 30)
    v = rng.choice("xyntk")
    if rng.random() < 0.5:
        return f"Solve ${v} + {b} = {x + b}$ for ${v}$.", f"${v} = {x + b} - {b} = {x}$.", str(x)
    return f"Solve ${v} - {b} = {x}$ for ${v}$.", f"${v} = {x} + {b} = {x + b}$.", str(x + b)


def _substitution(rng: random.Random) -> Draft:
    a, x, b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
    v = rng.choice("xyntk")
    return (
        f"If ${v} = {x}$, what is ${a}{v} + {b}$?",
        f"${a} \\cdot {x} + {b} = {a * x} + {b} = {a * x + b}$.",
        str(a * x + b),
    )


# counting_and_probability


def _outfits(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    first, second = rng.sample(CLOTHES, 2)
    name = rng.choice(NAMES)
    return (
        f"{name} has {a} {first} and {b} {second}. In how many ways can {name} choose one of each?",
        f"${a} \\cdot {b} = {a * b}$.",
        str(a * b),
    )


def _marbles(rng: random.Random) -> Draft:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    first, second = rng.sample(COLOURS, 2)
    chance = Fraction(a, a + b)
    raw, answer = f"\\frac{{{a}}}{{{a + b}}}", _latex(chance)
    return (
        f"A bag has {a} {first} and {b} {second} balls. What is the chance of drawing a {first} ball?",
        f"${a} + {b} = {a + b}$, ${raw}$." if raw == answer else f"${a} + {b} = {a + b}$, ${raw} = {answer}$.",
        answer,
    )


def _handshakes(rng: random.Random) -> Draft:
    n = rng.randint(3, 12)
    thing = rng.choice(THINGS)
    name = rng.choice(NAMES)
    return (
        f"In how many ways can {name} pick 2 of {n} {thing}?",
        f"$\\frac{{{n} \\cdot {n - 1}}}{{2}} = \\frac{{{n * (n - 1)}}}{{2}} = {n * (n - 1) // 2}$.",
        str(n * (n - 1) // 2),
    )


# geometry


def _rectangle_area(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 12), rng.randint(3, 15)
    shape, unit = rng.choice(SHAPES), rng.choice(UNITS)
    return (
        f"A {shape} is {a} {unit} wide and {b} {unit} long. What is its area?",
        f"${a} \\cdot {b} = {a * b}$.",
        str(a * b),
    )


def _rectangle_perimeter(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    return (
        f"What is the perimeter of a rectangle with sides {a} and {b}?",
        f"$2 \\cdot ({a} + {b}) = 2 \\cdot {a + b} = {2 * (a + b)}$.",
        str(2 * (a + b)),
    )


def _third_angle(rng: random.Random) -> Draft:
    a, b = 5 * rng.randint(4, 17), 5 * rng.randint(4, 17)
    p, q, r = tuple(rng.choice(TRIANGLES))
    return (
        f"In triangle ${p}{q}{r}$, $\\angle {p} = {a}^\\circ$ and $\\angle {q} = {b}^\\circ$. Find $\\angle {r}$.",
        f"$180 - {a} - {b} = {180 - a} - {b} = {180 - a - b}$.",
        str(180 - a - b),
    )


# intermediate_algebra


def _complex_sum(rng: random.Random) -> Draft:
    drawn = _draw(
        rng, "complex_arithmetic", min_real=1, max_real=12, min_imag=1, max_imag=12, operations_weights=(1, 0, 0, 0)
    )["metadata"]
    a, b, c, d = (int(part) for part in drawn["num1"] + drawn["num2"])
    return (
        f"Compute $({a} + {b}i) + ({c} + {d}i)$.",
        f"${a} + {c} = {a + c}$ and ${b} + {d} = {b + d}$.",
        f"{a + c} + {b + d}i",
    )


def _root_sum(rng: random.Random) -> Draft:
    p, q, v = rng.randint(1, 9), rng.randint(1, 9), rng.choice("xyzntab")
    if rng.random() < 0.5:
        return (
            f"What is the sum of the roots of ${v}^2 - {p + q}{v} + {p * q} = 0$?",
            f"The sum is the number before ${v}$, negated: ${p + q}$.",
            str(p + q),
        )
    return (
        f"What is the product of the roots of ${v}^2 - {p + q}{v} + {p * q} = 0$?",
        f"The product is the constant: ${p * q}$.",
        str(p * q),
    )


def _expansion(rng: random.Random) -> Draft:
    p, q, v = rng.randint(1, 9), rng.randint(1, 9), rng.choice("xyzntab")
    return (
        f"Expand $({v} + {p})({v} + {q})$.",
        f"${p} + {q} = {p + q}$ and ${p} \\cdot {q} = {p * q}$.",
        f"{v}^2 + {p + q}{v} + {p * q}",
    )


# number_theory


def _gcd(rng: random.Random) -> Draft:
    drawn = _draw(rng, "gcd", min_numbers=2, max_numbers=2, min_value=2, max_value=60)
    a, b = drawn["metadata"]["numbers"]
    return f"What is the greatest common divisor of {a} and {b}?", "", str(drawn["answer"])


def _lcm(rng: random.Random) -> Draft:
    drawn = _draw(rng, "lcm", min_numbers=2, max_numbers=2, min_value=2, max_value=20)
    a, b = drawn["metadata"]["numbers"]
    rest = a // math.gcd(a, b)
    return (
        f"What is the least common multiple of {a} and {b}?",
        f"${a} = {a // rest} \\cdot {rest}$, so ${rest} \\cdot {b} = {rest * b}$.",
        str(drawn["answer"]),
    )


def _remainder(rng: random.Random) -> Draft:
    b, a = rng.randint(3, 9), rng.randint(10, 99)
    return (
        f"What is the remainder when {a} is divided by {b}?",
        f"${a} = {b} \\cdot {a // b} + {a % b}$.",
        str(a % b),
    )


# prealgebra


def _sum_of_terms(rng: random.Random) -> Draft:
    drawn = _draw(rng, "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    return f"Compute ${drawn['metadata']['expression']}$.", "", str(drawn["answer"])


def _fraction(rng: random.Random) -> Draft:
    drawn = _draw(
        rng, "fraction_simplification", min_value=1, max_value=12, min_factor=2, max_factor=9, styles=("latex_frac",)
    )["metadata"]
    a, b = drawn["numerator"], drawn["denominator"]
    g = math.gcd(a, b)
    return f"Simplify $\\frac{{{a}}}{{{b}}}$.", f"Divide by ${g}$.", _latex(Fraction(a, b))


def _legs(rng: random.Random) -> Draft:
    a, b = rng.sample(sorted(LEGS), 2)
    m, n = rng.randint(1, 9), rng.randint(1, 9)
    x, y = m * LEGS[a], n * LEGS[b]
    return (
        f"How many legs do {_plural(m, a)} and {_plural(n, b)} have in total?",
        f"${m} \\cdot {LEGS[a]} + {n} \\cdot {LEGS[b]} = {x} + {y} = {x + y}$.",
        str(x + y),
    )


LEGS = {"cow": 4, "dog": 4, "hen": 2, "duck": 2, "ant": 6, "bee": 6, "spider": 8, "cat": 4, "bird": 2, "fly": 6}


def _plural(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


# precalculus


def _dot_product(rng: random.Random) -> Draft:
    a, b, c, d = (rng.randint(1, 9) for _ in range(4))
    return (
        f"Find the dot product of $({a}, {b})$ and $({c}, {d})$.",
        f"${a} \\cdot {c} + {b} \\cdot {d} = {a * c} + {b * d} = {a * c + b * d}$.",
        str(a * c + b * d),
    )


def _vector_sum(rng: random.Random) -> Draft:
    a, b, c, d = (rng.randint(1, 20) for _ in range(4))
    return (
        f"Compute $({a}, {b}) + ({c}, {d})$ for vectors.",
        f"${a} + {c} = {a + c}$ and ${b} + {d} = {b + d}$.",
        f"({a + c}, {b + d})",
    )


SINES = {0: "0", 30: "\\frac{1}{2}", 90: "1", 150: "\\frac{1}{2}", 180: "0", 210: "-\\frac{1}{2}", 270: "-1",
         330: "-\\frac{1}{2}", 60: "\\frac{\\sqrt{3}}{2}", 120: "\\frac{\\sqrt{3}}{2}", 240: "-\\frac{\\sqrt{3}}{2}",
         300: "-\\frac{\\sqrt{3}}{2}"}  # fmt: skip


def _special_angle(rng: random.Random) -> Draft:
    angle, turns = rng.choice(sorted(SINES)), rng.randint(1, 9)
    function = rng.choice(("sin", "cos"))
    value = SINES[angle if function == "sin" else (angle + 90) % 360]
    whole = angle + 360 * turns
    return (
        f"Find $\\{function} {whole}^\\circ$.",
        f"${whole} - {360 * turns} = {angle}$, $\\{function} {angle}^\\circ = {value}$.",
        value,
    )


# controls


def _word_sorting(rng: random.Random) -> Draft:
    words = _words(rng, 3)
    return f"Sort these words alphabetically: {', '.join(words)}", "", ", ".join(sorted(words))


def _letter_counting(rng: random.Random) -> Draft:
    word = _draw(rng, "spell_backward", min_word_len=5, max_word_len=8)["metadata"]["word"].lower()
    # Letters that come again are asked for more often: else "1" would be right nearly always.
    repeated = sorted({letter for letter in word if word.count(letter) > 1})
    letter = rng.choice(repeated if repeated and rng.random() < 0.7 else sorted(set(word)))
    return f'How many times does the letter "{letter}" occur in "{word}"?', "", str(word.count(letter))


def _words(rng: random.Random, count: int) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = _draw(rng, "spell_backward", min_word_len=3, max_word_len=6)["metadata"]["word"].lower()
        if word not in words:
            words.append(word)
    return words


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


KINDS: dict[str, dict[str, Callable[[random.Random], Draft]]] = {
    "algebra": {
        "linear_equation": _linear_equation,
        "shifted_equation": _shifted_equation,
        "substitution": _substitution,
    },
    "counting_and_probability": {"outfits": _outfits, "marbles": _marbles, "handshakes": _handshakes},
    "geometry": {
        "rectangle_area": _rectangle_area,
        "rectangle_perimeter": _rectangle_perimeter,
        "third_angle": _third_angle,
    },
    "intermediate_algebra": {"complex_sum": _complex_sum, "root_sum": _root_sum, "expansion": _expansion},
    "number_theory": {"gcd": _gcd, "lcm": _lcm, "remainder": _remainder},
    "prealgebra": {"sum_of_terms": _sum_of_terms, "fraction": _fraction, "legs": _legs},
    "precalculus": {"dot_product": _dot_product, "vector_sum": _vector_sum, "special_angle": _special_angle},
    "word_sorting": {"word_sorting": _word_sorting},
    "letter_counting": {"letter_counting": _letter_counting},
}
