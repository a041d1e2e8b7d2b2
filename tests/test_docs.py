"""README.md, its neighbours and the pages in docs/: links lead to files, commands exist, and programs run.

The Python blocks of a page are run one after the other, in one namespace. A comment before a block, unseen by
readers, says what is different about it:

    <!-- fragment -->     it is not run: it needs files or names that only a reader has
    <!-- long -->         the page is run by `pytest -m long`
    <!-- given LINES -->  lines that are run before it, several of them
"""

import json
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


# -- speeds: the pages have those of the results file


def speeds():
    """Title of each table of the results file -> candidate -> what was measured of it."""
    found = json.loads((ROOT / "scripts" / "results" / "bench_cpu.json").read_text())["sections"]
    return {section["title"]: section["candidates"] for section in found}


def rows_of(page, heading):
    """The cells of the table whose first column has this heading."""
    (rows,) = re.findall(
        rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", (DOCS / page).read_text(), re.MULTILINE
    )
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


def ratio(facts, base):
    found = facts["ratios"][base]
    if set(found.values()) == {1.0}:
        return "1.00"
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**found)


def test_the_cost_of_a_step_is_what_was_measured():
    measured = speeds()["Training step, vgg-cifar-small, float32, 128 images of 32 px"]
    names = {
        "plain": "plain",
        "plain with repopt_mask": "RepOpt",
        "search, merged in weight space": "search, merged in weight space",
        "RepVGG": "RepVGG",
    }
    assert rows_of("networks.md", "training step, cifar-small, 128 images of 32 px") == [
        [
            row,
            f"{measured[name]['ms']['median']:.0f}",
            ratio(measured[name], "plain"),
            f"{measured[name]['peak_bytes'] / 1e6:.0f} MB",
        ]
        for row, name in names.items()
    ]
    repvgg = f"{measured['RepVGG']['ratios']['plain']['median']:.1f} times (RepVGG on a CPU)"
    assert f"| {repvgg} |" in (DOCS / "method.md").read_text()


def test_the_gain_over_xla_is_what_was_measured():
    networks = {
        "cifar-small": ("vgg-cifar-small", 128, 32),
        "RepOpt-VGG-B1": ("repopt-vgg-b1", 4, 64),
        "MobileOne-s0": ("mobileone-s0", 128, 32),
        "RepGhost-0.5": ("repghost-0.5", 128, 32),
        "`vgg-digits`": ("vgg-digits", 64, 16),
        "`repopt-ghostnet-digits`": ("repopt-ghostnet-digits", 64, 16),
        "`mobileone-digits`": ("mobileone-digits", 64, 16),
    }
    measured = {
        row: (images, size, speeds()[f"Training step, {name}, float32, {images} images of {size} px"])
        for row, (name, images, size) in networks.items()
    }
    rows = {
        row: [f"{images} of {size} px", ratio(found["plain, XLA's convolutions"], "plain")]
        for row, (images, size, found) in measured.items()
    }
    text = (DOCS / "networks.md").read_text().partition("\n## On a CPU\n")[2].partition("\n## ")[0]
    found = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert {row.strip(): [cell.strip() for cell in cells] for row, *cells in found} == rows


def test_the_cost_of_an_update_is_what_was_measured():
    of_title = {title.partition(", repopt-vgg-b1")[0]: found for title, found in speeds().items()}
    measured = of_title["Optimizer update, SGD"]
    assert rows_of("method.md", "optimizer update, 51.8 M parameters") == [
        [
            name,
            f"{measured[name]['ms']['median']:.0f}",
            ratio(measured[name], "plain SGD"),
            f"{measured[name]['extra_state_bytes'] / 1e6:.1f} MB",
        ]
        for name in ("plain SGD", "repopt_mask", "stored multiplier")
    ]
    measured = of_title["Optimizer update, other optimizers"]
    names = {
        "`repopt_adamw`": "repopt_adamw",
        "`repopt_lion`": "repopt_lion",
        "`repopt_sgd`, with decay": "repopt_sgd with decay",
        "`repopt_mask`, no decay": "repopt_mask, optax.sgd",
        "`reparameterize(optax.sgd)`": "reparameterize(optax.sgd)",
        "`reparameterize`, with decay": "reparameterize(optax.sgd with decay)",
    }
    assert rows_of("optimizers.md", "optimizer update, 51.8 M parameters") == [
        [
            row,
            measured[name]["baseline"],
            ratio(measured[name], measured[name]["baseline"]),
            f"{measured[name]['extra_state_bytes'] / 1e6:.1f} MB",
        ]
        for row, name in names.items()
    ]
