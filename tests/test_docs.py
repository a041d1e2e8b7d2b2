"""README.md and the pages in docs/: their links lead to files, and the commands that they name exist."""

import re
from pathlib import Path

import pytest

from repopt_jax.cli import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_tests_and_commands_exist(page):
    text = page.read_text()
    files = re.findall(r"\b(?:scripts|tests|examples|configs)/\w+\.(?:py|sh|sbatch)", text)
    missing = [name for name in files if not (ROOT / name).exists() and "NAME" not in name]
    assert missing == []
    # `repopt train ...` in a block of commands or in the text.
    found = re.findall(r"(?:^|`|/bin/|&& )repopt (\w[\w-]*)", text, re.MULTILINE)
    named = {name.replace("-", "_") for name in found}
    known = {"evaluate": "eval"}
    assert named <= {known.get(name, name) for name in vars(commands) if not name.startswith("_")}


def test_the_readme_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []
