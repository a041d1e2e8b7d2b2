"""The documentation site: what the hooks make of pages, and what the check finds in a site.

`.ci/site` builds the site itself; these tests build small ones.
"""

import ast
import base64
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")
griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).parents[1]
MKDOCS = """
site_name: small
use_directory_urls: false
strict: true
theme: {name: mkdocs}
plugins: []
hooks: [HOOKS]
markdown_extensions: [pymdownx.superfences, {pymdownx.arithmatex: {generic: true}}]
validation: {nav: {omitted_files: warn}, links: {anchors: warn, unrecognized_links: warn}}
nav: [index.md, Notebooks: "notebooks/*.ipynb"]
"""
PROJECT = '[project]\nname = "small"\n[project.urls]\nSource = "https://host.example/small"\n'
# One pixel.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module
    for name in ("site_hooks", "site_check", "site_docstrings"):
        sys.modules.pop(name, None)


def small_site(folder, page):
    """A project of one page; the built page, and what MkDocs said."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    (folder / "mkdocs.yml").write_text(MKDOCS.replace("HOOKS", str(ROOT / "scripts" / "site_hooks.py")))
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "results").mkdir()
    (folder / "results" / "one.md").write_text("# One\n")
    (folder / "results" / "one.png").write_bytes(PICTURE)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder / "site")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    built = folder / "site" / "index.html"
    return done, built.read_text() if done.returncode == 0 else ""


def test_links_that_leave_the_pages(tmp_path):
    done, html = small_site(
        tmp_path,
        "# Start\n\n[a file](../results/one.md#one) [a folder](../results)\n\n"
        "![a picture](../results/one.png)\n\n"
        "```\n[code](../results/none.md)\n```\n\n[here](#start) and $x_1$\n\n$$\\sum_b s_b$$\n",
    )
    assert done.returncode == 0, done.stderr
    assert 'href="https://host.example/small/blob/main/results/one.md#one"' in html
    assert 'href="https://host.example/small/tree/main/results"' in html
    assert 'src="repository/results/one.png"' in html
    assert (tmp_path / "site" / "repository" / "results" / "one.png").read_bytes() == PICTURE
    assert "[code](../results/none.md)" in html
    assert html.count("<math") == 2
    assert '<div class="formula"><math' in html
    assert "arithmatex" not in html


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("[none](../results/none.md)", "index.md links to ../results/none.md, which does not exist"),
        ("[none](none.md)", "none.md"),
        ("[none](#nowhere)", "#nowhere"),
        (r"$\nosuchcommand{x}$", r"commands that are not known: \nosuchcommand"),
        ("$x^$", "cannot be read"),
        (r"$\frac{x}{y$", "braces that do not match"),
    ],
    ids=["outside", "page", "anchor", "command", "formula", "braces"],
)
def test_what_does_not_exist_ends_the_build(tmp_path, page, complaint):
    done, _ = small_site(tmp_path, f"# Start\n\n{page}\n")
    assert done.returncode != 0
    assert complaint in done.stderr


def test_a_notebook_is_a_page_with_its_outputs(scripts):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print('```')"],
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[31m```\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": base64.b64encode(PICTURE).decode()}},
                {"output_type": "execute_result", "data": {"text/markdown": ["| a |"], "text/plain": ["x"]}},
            ],
        },
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    page, pictures = scripts("site_hooks").notebook_page({"cells": cells}, "first.ipynb")
    assert page == (
        "# Title\ntext\n\nThis page is a notebook: [first.ipynb](first.ipynb).\n\n"
        "````python\nprint('```')\n````\n\n````text\n```\n````\n\n"
        "![Output of the cell above](first_1_1.png)\n\n| a |\n"
    )
    assert pictures == {"first_1_1.png": PICTURE}


def test_public_names_are_those_of_the_package(scripts):
    hooks = scripts("site_hooks")
    both = ast.parse("from a.b import x as x\nfrom a.c import y, z\n__all__ = ['z', 'x']")
    assert hooks.public_names(both) == {"x": "a.b.x", "z": "a.c.z"}
    assert hooks.public_names(ast.parse("from a.b import x as x, y\nfrom a import c as d")) == {"x": "a.b.x"}
    # Of every subpackage, what can be imported: the page's names exist where they are said to be.
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        if path.stem != "index":
            tree = ast.parse((ROOT / "repopt_jax" / path.stem / "__init__.py").read_text())
            package = importlib.import_module(f"repopt_jax.{path.stem}")
            for name, origin in hooks.public_names(tree).items():
                module, _, attribute = origin.rpartition(".")
                assert getattr(package, name) is getattr(importlib.import_module(module), attribute)


def test_docstrings_become_markdown(scripts):
    docstrings = scripts("site_docstrings")
    text = (
        "Sums <g, P(g)> and `<g>`::\n\n    code()\n\nArgs:\n  a, b: both\n    of them.\n  c: one, d: no.\n\n"
        "Raises:\n  TypeError, ValueError: never.\n"
    )
    assert docstrings.for_markdown(text) == (
        "Sums &lt;g, P(g)> and `<g>`:\n\n    code()\n\n"
        "Args:\n  a: both\n    of them.\n  b: both\n    of them.\n"
        "  c: one, d: no.\n\nRaises:\n  TypeError, ValueError: never.\n"
    )


PAGE = '<html><body><h1 id="top">A page</h1>{}</body></html>'


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        ('<a href="#top">x</a><a href="https://a.example">x</a><img src="data:image/png;base64,">', None),
        ('<a href="other.html#top">x</a>', "index.html links to other.html#top, which does not exist"),
        ('<a href="#nowhere">x</a>', "index.html links to #nowhere: no such place on that page"),
        ('<script src="https://a.example/x.js"></script>', "index.html loads https://a.example/x.js"),
        ('<img src="none.png">', "index.html loads none.png, which does not exist"),
        ('<link rel="stylesheet" href="//a.example/x.css">', "index.html loads //a.example/x.css"),
        ('<span class="arithmatex">x</span>', "index.html has a formula that is not typeset"),
    ],
)
def test_what_is_wrong_in_a_site_is_found(scripts, tmp_path, inside, found):
    (tmp_path / "index.html").write_text(PAGE.format(inside))
    assert scripts("site_check").problems(tmp_path) == ([] if found is None else [found])


def test_a_style_sheet_that_loads_a_font_is_found(scripts, tmp_path):
    (tmp_path / "index.html").write_text(PAGE.format(""))
    (tmp_path / "x.css").write_text('@font-face { src: url("https://a.example/x.woff2") }')
    assert scripts("site_check").problems(tmp_path) == ["x.css loads https://a.example/x.woff2"]


def test_a_page_wider_than_its_window_is_found(scripts, tmp_path):
    check = scripts("site_check")
    browser = next(filter(None, map(shutil.which, check.BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    (tmp_path / "index.html").write_text(PAGE.format(""))
    (tmp_path / "wide.html").write_text(PAGE.format('<div style="width:600px">x</div>'))
    found = check.problems_in_browser(tmp_path, browser)
    assert any(line.startswith("wide.html is 6") and "in a window of 390" in line for line in found)
    assert not any(line.startswith("index.html") or "1280" in line for line in found)
    assert "the search finds nothing for multiplier" in found  # it has none
