"""One kernel for all notebooks: its start and the imports of torch and Lightning cost more than most of their cells."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

# what a notebook leaves is gone before the next one: names, figures, its own modules, where it was, what it was given
CLEARED = """
%reset -f
import os, sys, tempfile
from matplotlib import pyplot
pyplot.close("all")
sys.path[:] = [place for place in sys.path if not place.startswith({temporary!r})]
for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", "")).startswith({temporary!r}):
        del sys.modules[name]
for name in [name for name in os.environ if name.startswith("KD_")]:
    del os.environ[name]
os.environ.update({environment!r})
tempfile.tempdir = None
os.chdir({folder!r})
%reset -f
"""


class Kernel:
    """Executes notebooks one after the other. ``temporary``: the folder below which all of theirs are."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = str(temporary)
        self.client = NotebookClient(nbformat.v4.new_notebook(), timeout=400)

    def execute(self, notebook: nbformat.NotebookNode, folder: Path, **environment: str) -> list[nbformat.NotebookNode]:
        """Return the code cells of a notebook after it ran in a folder, which also holds its temporary files."""
        given = {"TMPDIR": str(folder), **environment}
        cleared = CLEARED.format(temporary=self.temporary, environment=given, folder=str(folder))
        self._run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cleared)]))
        self._run(notebook)
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    def _run(self, notebook: nbformat.NotebookNode) -> None:
        self.client.nb = notebook
        self.client.execute(cleanup_kc=False)

    def stop(self) -> None:
        """End the kernel's process."""
        self.client.nb = nbformat.v4.new_notebook()
        self.client.execute(cleanup_kc=True)


def text_of(cell: nbformat.NotebookNode) -> str:
    """Everything a code cell printed or showed, as plain text."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(shown)


def pictures(cells: list[nbformat.NotebookNode]) -> int:
    """How many pictures code cells show."""
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
