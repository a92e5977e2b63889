"""What mkdocs fills in when it builds: the command line from its own help, and a recipe's keys from its schema."""

import json
from pathlib import Path
from typing import Any

import typer.main
from typer.cli import get_docs_for_click

from stethoscope.cli import app

SCHEMA = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with each page's source."""
    for mark, fill in (("<!-- commands -->", command_line), ("<!-- recipe keys -->", recipe_keys)):
        if mark in markdown:
            markdown = markdown.replace(mark, fill())
    return markdown


def command_line() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    commands = getattr(group, "commands")  # noqa: B009 - typed as any command
    with group.make_context("stethoscope", [], resilient_parsing=True) as context:
        return "\n".join(
            get_docs_for_click(obj=command, ctx=context, name=name, indent=1, call_prefix="stethoscope")
            for name, command in commands.items()
        )


def recipe_keys() -> str:
    """A table of keys for the recipe and each section."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    parts = [_table("Recipe", schema)]
    parts += [_table(name, section) for name, section in schema["$defs"].items()]
    return "\n".join(parts)


def _table(name: str, section: dict[str, Any]) -> str:
    rows = ["", f"### {name}", "", section["description"], "", "| key | value | if left out | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        needed = key in section.get("required", ())
        default = "needed" if needed else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        rows.append(f"| `{key}` | {_kind(field)} | {default} | {field.get('description', '')} |".replace("``", "`"))
    return "\n".join([*rows, ""])


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    if field.get("type") == "object":
        return f"name: {_kind(field['additionalProperties'])}"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "yes or no", "null": "none"}[
        field["type"]
    ]
