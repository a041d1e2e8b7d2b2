"""Executes the notebooks of docs/notebooks/ and stores what their cells put out.

    python scripts/notebooks.py              # all of them
    python scripts/notebooks.py own_network  # or by name

Each runs from top to bottom, in a process of its own and an empty folder. Neither times nor anything about
the machine is stored. `pytest -m "" tests/test_notebooks.py` compares what is stored with what comes out.
Needs the extra `test`.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SECONDS = 600  # for one cell
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}


def executed(notebook, folder):
    """A copy of `notebook` with what its cells put out, run in `folder`.

    Raises `nbclient.exceptions.CellExecutionError` with the cell and its traceback where a cell fails.
    """
    notebook = nbformat.from_dict(notebook)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of its own connection to this process
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(*names):
    for name in names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(notebook, folder), path)
        print(path.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
