"""The pages as built: complete, in light and dark, and with nothing from elsewhere."""

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from pages import ROOT

import stethoscope


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"", text)
        assert fetched
        assert not [address for address in fetched if re.match(r"(?:https?:)?//", address)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_pages_have_light_and_dark(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'data-md-color-scheme="slate"' in text
    assert 'data-md-color-scheme="default"' in text


def test_every_public_name_and_command_has_its_place(site):
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in stethoscope.__all__:
        assert f'.{name}"' in api, name
    commands = (site / "commands.html").read_text(encoding="utf-8")
    helped = runpy.run_path(str(ROOT / "docs/scripts/hooks.py"))["command_line"]()
    names = re.findall(r"^## `stethoscope ([\w-]+)`", helped, re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert f'id="stethoscope-{name}"' in commands, name


def test_every_page_is_in_the_navigation():
    listed = re.findall(
        r"[\w-]+\.(?:md|ipynb)", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    )
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert there <= set(listed)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_docs_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "preferred-citation"} <= set(citation)
    assert citation["version"] == version("sae-stethoscope")
    assert "2605.28649" in citation["preferred-citation"]["url"]
