"""Run docs/quickstart.ipynb and write it with its outputs.

python tests/docs_notebook.py [FILE]
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


def joined(outputs):
    """Return a cell's outputs with one output for consecutive parts of a stream, without terminal codes."""
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = TERMINAL_CODES.sub("", output.text)
            if kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
                continue
        kept.append(output)
    return kept


def execute(target):
    """Run all cells in a new kernel, and write the notebook to a file without what differs from run to run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, target)


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
