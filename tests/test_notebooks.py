"""The notebooks of docs/notebooks/: they run, their assertions hold, and what is stored is what comes out.

Each is executed in a process of its own, in an empty folder, with warnings as errors. Numbers are compared
within a tolerance, as other versions of the libraries round otherwise; pictures are not compared.
"""

import os
import re
from pathlib import Path

import nbformat
import program_cache
import programs
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Relative, of numbers in text. A cell whose numbers depend on more, such as an unstable training, says so:
# `tolerance` in its metadata. Measured: Python 3.11 and 3.13 agree within it.
TOLERANCE = 0.03
# Before the first cell. Those of the kernel's own packages are not the library's.
STRICT = """
import warnings
warnings.simplefilter("error")
for package in ("IPython", "ipykernel", "traitlets", "zmq", "jupyter_client", "tornado", "matplotlib_inline"):
    warnings.filterwarnings("ignore", module=package)
"""
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
HIDDEN = re.compile(r"/home/|/root|/tmp/|/Users/|0x[0-9a-f]{6,}|\d\d:\d\d:\d\d")


def read(path):
    return nbformat.read(path, as_version=4)


def texts(cell):
    """What a cell has put out as text, in order, streams of several parts as one."""
    found = ""
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            found += output.text
        elif output.output_type != "error":
            found += output.data.get("text/plain", "") + "\n"
    return found


def difference(stored, found, tolerance):
    """What two texts differ in; "" if the words are the same, and the numbers within the tolerance."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", found).split():
        return f"stored:\n{stored}\nnow:\n{found}"
    for a, b in zip(NUMBER.findall(stored), NUMBER.findall(found)):
        x, y = (float(text.replace(",", "")) for text in (a, b))
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return f"stored {a}, now {b}, in:\n{found}"
    return ""


@pytest.fixture
def as_in_use(monkeypatch):
    """Programs are compiled as a reader's are: trainings take longer than compiling them, and round so."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    monkeypatch.setenv("XLA_FLAGS", program_cache.flags_in_use(os.environ))


@pytest.mark.long  # a minute each; that a notebook is complete is looked at every time
@pytest.mark.usefixtures("as_in_use")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_what_comes_out(path, tmp_path):
    stored = read(path)
    strict = nbformat.from_dict(stored)
    strict.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    found = programs.load("scripts/notebooks.py").executed(strict, tmp_path)
    differences = {}
    for number, (old, new) in enumerate(zip(stored.cells, found.cells[1:], strict=True)):
        tolerance = old.metadata.get("tolerance", TOLERANCE)
        pictures = [sum("image/png" in o.get("data", {}) for o in c.get("outputs", ())) for c in (old, new)]
        if said := difference(texts(old), texts(new), tolerance):
            differences[number] = said
        assert pictures[0] == pictures[1], f"pictures of cell {number}"
    assert differences == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_complete(path):
    """A title, assertions, what was put out in one run from top to bottom, and nothing of a machine."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(cell.source.count("assert ") for cell in code) >= 3
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert HIDDEN.findall("".join(map(texts, code)) + "".join(cell.source for cell in notebook.cells)) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    sources = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", "\n".join(sources))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
    assert links


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["own_network", "pytorch_to_int8", "without_search"]


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ("98 %", "90 %"),
        ("a 1", "b 1"),
        ("1 2", "1"),
        ("loss 1e-3", "loss 2e-3"),
        ("7,514", "7,000"),
        ("", "1"),
    ],
)
def test_a_difference_is_noticed(stored, found):
    """The negative control of the comparison."""
    assert difference(stored, found, TOLERANCE)
    assert not difference(stored, stored, TOLERANCE)


def test_a_number_may_round_otherwise():
    assert not difference("98.6 % of 355", "98.9 %  of 355", TOLERANCE)


def test_a_cell_that_fails_is_noticed(tmp_path):
    """And a warning is a failure."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(STRICT + "warnings.warn('this')")])
    with pytest.raises(CellExecutionError, match="this"):
        programs.load("scripts/notebooks.py").executed(notebook, tmp_path)
