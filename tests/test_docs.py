"""README.md, its neighbours and the pages in docs/: links lead to files, commands exist, and programs run.

The Python blocks of a page are run one after the other, in one namespace. A comment before a block, unseen by
readers, says what is different about it:

    <!-- fragment -->     it is not run: it needs files or names that only a reader has
    <!-- long -->         the page is run by `pytest -m long`
    <!-- given LINES -->  lines that are run before it, several of them
"""

import re
from pathlib import Path

import pytest

from repopt_jax.cli import commands

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*FRONT, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("api/*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>fragment|long|given)(?P<given>(?:(?!-->).)*?)-->\n)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text()) if block["mark"] != "fragment"]


def programs() -> list:
    found = []
    for page in PAGES:
        if page.name == "questions.md":  # its Python needs its commands: tests/test_questions.py runs both
            continue
        if run := blocks(page):
            long = any(block["mark"] == "long" for block in run)
            found.append(pytest.param(page, id=name_of(page), marks=[pytest.mark.long] if long else []))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_tests_and_commands_exist(page):
    text = page.read_text()
    files = re.findall(r"\b(?:scripts|tests|examples|configs)/\w+\.(?:py|sh|sbatch)", text)
    missing = [name for name in files if not (ROOT / name).exists() and "NAME" not in name]
    assert missing == []
    # `repopt train ...` in a block of commands or in the text.
    named = set(re.findall(r"(?:^|`|/bin/|&& )repopt ([\w-]+)", text, re.MULTILINE))
    known = {"evaluate": "eval"}
    assert named <= {
        known.get(name, name).replace("_", "-") for name in vars(commands) if not name.startswith("_")
    }


def test_the_start_names_every_page():
    start = (DOCS / "index.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"({page.name})" not in start] == ["index.md"]
    # README is the start where the code is hosted; what it leaves out, the start of the site has.
    assert sum(f"docs/{page.name}" in (ROOT / "README.md").read_text() for page in DOCS.glob("*.md")) > 10


def test_every_block_is_read():
    # A block that the expression missed, of another indentation, would never be run.
    for page in PAGES:
        assert len(re.findall(r"```python", page.read_text())) == len(BLOCK.findall(page.read_text())), page


@pytest.mark.parametrize("page", programs())
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "program_of_a_page"}
    for block in blocks(page):
        # The line numbers of an error are those of the page.
        line = page.read_text().count("\n", 0, block.start("code"))
        given = (block["given"] or "").strip() if block["mark"] == "given" else ""
        exec(given, names)
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)
