"""Write recipe.schema.json, by which editors complete and check recipes: python recipes/scripts/write_schema.py"""

import json
from pathlib import Path
from typing import Any

from stethoscope.recipe import Recipe

SCHEMA = Path(__file__).parents[1] / "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with each field's docstring as its description on one line."""
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for field in section["properties"].values():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Stethoscope recipe"}


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(recipe_schema(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {SCHEMA}")
