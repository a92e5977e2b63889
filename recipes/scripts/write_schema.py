"""Write recipe.schema.json, by which editors complete and check recipes: python recipes/scripts/write_schema.py"""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import stethoscope.recipe
from stethoscope.recipe import Recipe

SCHEMA = Path(__file__).parents[1] / "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, each field described as its section's docstring does."""
    schema = Recipe.model_json_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        section["description"], fields = described(getattr(stethoscope.recipe, name))
        for field, text in fields.items():
            section["properties"][field]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Stethoscope recipe"}


def described(section: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """The sentence of a docstring, and what it says of each attribute."""
    text, _, attributes = (section.__doc__ or "").partition("Attributes:")
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    return text.strip(), {name: " ".join(lines.split()) for name, lines in found}


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(recipe_schema(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {SCHEMA}")
