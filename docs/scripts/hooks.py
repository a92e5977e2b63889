"""What mkdocs fills in when it builds: the command line from its own help, and a recipe's keys from its schema."""

import json
from pathlib import Path
from typing import Any

import typer.main
from typer.cli import get_docs_for_click

from stethoscope.cli import app

# sections that several keys hold
TEXTS = {"Text": "a text", "LossText": "a text for the loss", "ProtectedText": "a protected text"}
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
    keys = {_section(field): key for key, field in schema["properties"].items()} | TEXTS
    tables = [_table(keys[name], schema["$defs"][name]) for name in {**keys, **schema["$defs"]} if name]
    return "\n".join([_table("recipe", schema), *tables])


def _table(name: str, section: dict[str, Any]) -> str:
    rows = [
        "",
        f"### {name}",
        "",
        section["description"],
        "",
        "| key | what | value | if left out |",
        "|---|---|---|---|",
    ]
    for key, field in section["properties"].items():
        needed = key in section.get("required", ())
        default = "needed" if needed else _default(field["default"])
        text = field.get("description", "").replace("``", "`")
        rows.append(f"| `{key}` | {text} | {_kind(field)} | {default} |")
    return "\n".join([*rows, ""])


def _section(field: dict[str, Any]) -> str:
    """The name of the section that a field holds, empty for others."""
    return str((field.get("anyOf") or [field])[0].get("$ref", "")).rsplit("/", 1)[-1]


def _default(value: Any) -> str:
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, dict):
        return "below"
    return ", ".join(f"`{one}`" for one in value) if isinstance(value, list) else f"`{json.dumps(value)}`"


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return TEXTS.get(_section(field), "a section")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return _kind(field["anyOf"][0])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    if field.get("type") == "object":
        return f"name: {_kind(field['additionalProperties'])}"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "yes or no", "null": "none"}[
        field["type"]
    ]
