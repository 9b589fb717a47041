"""docs/quickstart.ipynb runs in a new kernel, and is committed with its outputs."""

import re

import nbformat

from helpers import ROOT, run

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CELLS = 40


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= CELLS
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Return what a cell shows: the MIME types of its results, or "stream"."""
    return [kind for output in cell.outputs for kind in output.get("data", {"stream": None})]


def text_of(cells):
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_notebook_runs_and_shows_what_it_is_committed_with(tmp_path):
    run(["python", ROOT / "tests" / "docs_notebook.py", tmp_path / "again.ipynb"])
    committed, again = code_cells(NOTEBOOK), code_cells(tmp_path / "again.ipynb")
    pictures = [kind for cell in again for kind in kinds(cell) if kind == "image/png"]
    assert len(pictures) >= 4
    for one, other in zip(committed, again, strict=True):
        assert one.source == other.source and one.execution_count == other.execution_count
        assert set(kinds(one)) == set(kinds(other))
    for cells in (committed, again):
        text = text_of(cells)
        assert "%|" not in text and "Traceback" not in text
        right, of = map(int, re.search(r"(\d+) of (\d+) captions are exactly right", text).groups())
        assert right > of / 5  # a guess is right in one of 48
