"""The tour, run anew on runs/quickstart and rendered: python tests/make_tour.py"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / "train" / "quickstart" / "tour.ipynb"
PAGE = NOTEBOOK.with_suffix(".html")


def executed(folder: Path) -> NotebookNode:
    """The notebook with what its cells print and draw in that folder, without warnings, times and places."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, record_timing=False, coalesce_streams=True, resources=place).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def rendered(notebook: NotebookNode) -> str:
    """A page that asks nothing of any other server: the scripts of nbconvert's template come from several."""
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": "A tour"}})
    return re.sub(r"<script.*?</script>\s*", "", page, flags=re.DOTALL)


def main() -> None:
    notebook = executed(REPOSITORY)
    nbformat.write(notebook, NOTEBOOK)
    PAGE.write_text(rendered(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
