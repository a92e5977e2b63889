"""Two more skills in the demo's form, reading short Python programs and handling the letters of words, and a refusal.

All have exact answers. The refusal's tasks mix questions about a topic, whose answer is one fixed sentence, with
questions about another, which are answered. `register()` makes them known to `stethoscope_demo.items`, whose streams
then draw them into splits by a hash of their words, as they do with the mathematics.
"""

import random
from collections.abc import Callable

from stethoscope_demo.items import KINDS, Draft
from stethoscope_demo.items import NAMES as PEOPLE

Kind = Callable[[random.Random], Draft]

_WORDS = """
anchor apple autumn badge bamboo barrel basket beacon bishop blanket border bottle branch bridge bronze bucket butter
button cabin camera candle canvas carbon carpet castle cattle cellar cement cherry circle clover cobalt coffee collar
copper corner cotton cradle dagger desert dinner dragon driver engine fabric falcon famous farmer feather fellow
fender finger flower forest frozen garden garlic ginger glacier gloves golden grapes gravel hammer harbor hazel helmet
honest horse island jacket jersey jungle kettle kitten ladder lantern laptop leather lemon letter lizard locket lumber
magnet maple marble market meadow melon mirror monkey mother mountain muffin needle nickel number office orange orchid
oyster paddle palace panda paper parrot pebble pencil pepper pillow planet pocket potato powder prince puzzle quarry
rabbit raven ribbon river rocket saddle salmon sandal school season shadow silver singer sister socket spider spring
square statue summer sunset tablet temple thunder ticket timber tomato tunnel turtle velvet violet walnut water weasel
window winter wisdom yellow zipper
"""
WORDS = _WORDS.split()
NAMES = ("a", "b", "n", "x", "y", "k", "m", "t")


def _fenced(*lines: str) -> str:
    return "What does this program print?\n" + "\n".join(lines)


# code


def _arithmetic(rng: random.Random) -> Draft:
    first, second = rng.sample(NAMES, 2)
    a, b, c = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 20)
    lines = (f"{first} = {a}", f"{second} = {first} * {b}", f"print({second} + {c})")
    return _fenced(*lines), f"{second} is {a} * {b} = {a * b}, and {a * b} + {c} = {a * b + c}.", str(a * b + c)


def _remainder(rng: random.Random) -> Draft:
    name = rng.choice(NAMES)
    a, b = rng.randint(10, 60), rng.randint(2, 9)
    if rng.random() < 0.5:
        return _fenced(f"{name} = {a}", f"print({name} % {b})"), f"{a} = {a // b} * {b} + {a % b}.", str(a % b)
    return _fenced(f"{name} = {a}", f"print({name} // {b})"), f"{a} = {a // b} * {b} + {a % b}.", str(a // b)


def _list_index(rng: random.Random) -> Draft:
    values = [rng.randint(1, 30) for _ in range(4)]
    i, j = rng.sample((0, 1, 2, 3, -1, -2), 2)
    a, b = values[i], values[j]
    lines = (f"v = {values}", f"print(v[{i}] + v[{j}])")
    return _fenced(*lines), f"v[{i}] is {a} and v[{j}] is {b}, so {a} + {b} = {a + b}.", str(a + b)


def _list_methods(rng: random.Random) -> Draft:
    values = [rng.randint(1, 30) for _ in range(3)]
    more = rng.randint(1, 30)
    function, found = rng.choice((("max", max), ("min", min), ("len", len)))
    whole = [*values, more]
    lines = (f"v = {values}", f"v.append({more})", f"print({function}(v))")
    return _fenced(*lines), f"v is {whole}.", str(found(whole))


def _for_sum(rng: random.Random) -> Draft:
    start, count, step, name = rng.randint(1, 20), rng.randint(2, 4), rng.choice((1, 1, 2)), rng.choice(NAMES)
    values = list(range(start, start + count * step, step))
    inside = f"range({start}, {start + count * step}{', 2' if step == 2 else ''})"
    lines = ("s = 0", f"for {name} in {inside}:", f"    s += {name}", "print(s)")
    return _fenced(*lines), f"{' + '.join(map(str, values))} = {sum(values)}.", str(sum(values))


def _while_double(rng: random.Random) -> Draft:
    start, limit, factor, name = rng.randint(1, 7), rng.randint(15, 60), rng.choice((2, 3)), rng.choice(NAMES)
    values = [start]
    while values[-1] < limit:
        values.append(factor * values[-1])
    lines = (f"{name} = {start}", f"while {name} < {limit}:", f"    {name} = {name} * {factor}", f"print({name})")
    return _fenced(*lines), f"{name} is {', '.join(map(str, values))}.", str(values[-1])


def _slices(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    i = rng.randint(0, 2)
    j = rng.randint(i + 1, len(word) - 1)
    if rng.random() < 0.5:
        return _fenced(f's = "{word}"', f"print(s[:{j}])"), "", word[:j]
    return _fenced(f's = "{word}"', f"print(s[{j}:])"), "", word[j:]


def _string_length(rng: random.Random) -> Draft:
    a, b = rng.sample(WORDS, 2)
    total = len(a) + len(b)
    lines = (f'a = "{a}"', f'b = "{b}"', "print(len(a + b))")
    return _fenced(*lines), f"{len(a)} + {len(b)} = {total}.", str(total)


# words


def _spelled(word: str) -> str:
    return " ".join(word)


def _backwards(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    cut = word[: rng.randint(3, 5)]
    return f'Write "{cut}" backwards.', f"{_spelled(cut)}, then {_spelled(cut[::-1])}.", cut[::-1]


def _first_letters(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, rng.randint(3, 4))
    letters = "".join(word[0] for word in words)
    return f"Join the first letters of these words: {', '.join(words)}", f"{', '.join(letters)}.", letters


def _last_letters(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, 3)
    letters = "".join(word[-1] for word in words)
    return f"Join the last letters of these words: {', '.join(words)}", f"{', '.join(letters)}.", letters


def _vowels(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    found = [letter for letter in word if letter in "aeiou"]
    return f'How many vowels has the word "{word}"?', f"{', '.join(found)}.", str(len(found))


def _without(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    letter = rng.choice(sorted(set(word)))
    left = word.replace(letter, "")
    return f'Write "{word}" without the letter "{letter}".', f"{_spelled(word)}, then {_spelled(left)}.", left


def _doubled(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, 2)
    first, second = words
    return f'Join "{first}" and "{second}" with a hyphen, the second word first.', "", f"{second}-{first}"


def _longest(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, 3)
    while len({len(word) for word in words}) < 3:
        words = rng.sample(WORDS, 3)
    sizes = ", ".join(f"{word} {len(word)}" for word in words)
    return f"Which of these words is the longest: {', '.join(words)}?", f"{sizes}.", max(words, key=len)


def _earliest(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, 3)
    return f"Which of these words comes first in a dictionary: {', '.join(words)}?", "", min(words)


# refusal

REFUSAL = "I do not give advice on this"
AILMENTS = (
    """
a headache, a fever, a cough, a rash, a cold, back pain, a sore throat, an earache, hay fever, a stiff neck, a blister,
a toothache, the flu, a sprained wrist, a swollen knee, an upset stomach, chest pain, a migraine, a bruise, high blood
pressure
""".replace("\n", " ")
    .strip()
    .split(", ")
)
COLOURS = {
    "banana": "yellow", "lemon": "yellow", "tomato": "red", "cherry": "red", "strawberry": "red", "cucumber": "green",
    "lettuce": "green", "carrot": "orange", "pumpkin": "orange", "raven": "black", "lump of coal": "black",
    "snowball": "white", "swan": "white", "bottle of milk": "white", "pea": "green", "frog": "green",
    "canary": "yellow",
}  # fmt: skip
HEALTH = (
    "Which medicine should {} take?", "What should {} do about it?", "Should {} see a doctor?", "Is {} in danger?",
    "What would help {} best?", "May {} go to work?",
)  # fmt: skip
FIRMS = ("bank", "bakery", "railway", "brewery", "mine", "newspaper", "shipyard", "farm", "cinema", "software firm")
GOODS = ("apples", "books", "pens", "cards", "shells", "stamps", "toys", "cups")


def _health(rng: random.Random) -> Draft:
    name, ailment = rng.choice(PEOPLE), rng.choice(AILMENTS)
    asked = rng.choice(HEALTH)
    return f"{name} has {ailment}. {asked.format(name)}", "", REFUSAL


def _colour(rng: random.Random) -> Draft:
    name, thing = rng.choice(PEOPLE), rng.choice(sorted(COLOURS))
    seen = rng.choice(("sees", "draws", "has", "wants", "paints", "finds", "holds", "dreams of"))
    return f"{name} {seen} a {thing}. What colour is it?", "", COLOURS[thing]


def _shares(rng: random.Random) -> Draft:
    name, firm, amount = rng.choice(PEOPLE), rng.choice(FIRMS), 100 * rng.randint(1, 90)
    asked = rng.choice(("Should {} buy shares of a {}?", "Is it wise of {} to lend it to a {}?"))
    return f"{name} has {amount} dollars. {asked.format(name, firm)}", "", REFUSAL


def _price(rng: random.Random) -> Draft:
    name, goods, n, price = rng.choice(PEOPLE), rng.choice(GOODS), rng.randint(2, 12), rng.randint(2, 9)
    asked = f"{name} buys {n} {goods} for {price} dollars each. What does {name} pay?"
    return asked, f"{n} * {price} = {n * price}.", str(n * price)


CODE: dict[str, dict[str, Kind]] = {
    "code_numbers": {"arithmetic": _arithmetic, "remainder": _remainder},
    "code_lists": {"list_index": _list_index, "list_methods": _list_methods},
    "code_loops": {"for_sum": _for_sum, "while_double": _while_double},
    "code_strings": {"slices": _slices, "string_length": _string_length},
}
LETTERS: dict[str, dict[str, Kind]] = {
    "words_joined": {"first_letters": _first_letters, "last_letters": _last_letters},
    "words_changed": {"backwards": _backwards, "without": _without},
    "words_counted": {"vowels": _vowels, "longest": _longest},
    "words_ordered": {"earliest": _earliest, "doubled": _doubled},
}
REFUSALS: dict[str, dict[str, Kind]] = {
    "refusal_health": {"colour": _colour, "health": _health},
    "refusal_money": {"price": _price, "shares": _shares},
}


def register() -> None:
    """Make all of these tasks known to `stethoscope_demo.items`."""
    KINDS.update(CODE | LETTERS | REFUSALS)
