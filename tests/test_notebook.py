"""In a notebook a capture and its figures show themselves; the example notebook and the page of the docs run as they stand."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "notebook.ipynb"
MANY = """
import torch
from convtap import capture, timeline
many = torch.nn.Sequential(*(torch.nn.Conv1d(1, 1, 3, padding=1) for _ in range(40)))
times = timeline(many, torch.zeros(1, 1, 9))
with torch.no_grad(), capture(many) as deep:
    many(torch.zeros(1, 1, 9))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The example notebook as it comes out of a fresh kernel, with one more cell: a figure after pyplot is imported."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = copy.deepcopy(nbformat.read(EXAMPLE, as_version=4))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    notebook.cells.append(nbformat.v4.new_code_cell("import matplotlib.pyplot as plt\nacts.plot()"))
    notebook.cells.append(nbformat.v4.new_code_cell(MANY + "deep"))
    notebook.cells.append(nbformat.v4.new_code_cell("deep.plot(layers='?', timeline=times, span=(2, 8))"))
    notebook.cells.append(nbformat.v4.new_code_cell("# as a table\ndeep.statistics()"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder


def outputs(notebook, source):
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.endswith(source)]
    return [output.get("data", {}) for output in cell.outputs]


def test_a_capture_shows_as_a_table(executed):
    (data,) = outputs(executed[0], "\nacts")
    assert ">(2, 8, 4000)</td>" in data["text/html"]
    (data,) = outputs(executed[0], "acts.coverage")
    assert "5 layers: 5 captured" in data["text/html"]


def test_a_long_table_folds_beyond_30_rows_without_a_script(executed):
    for source in ("\ndeep", "deep.statistics()"):
        (data,) = outputs(executed[0], source)
        above, folded = data["text/html"].split("<details>")
        assert above.count("<tr>") == 1 + 30
        assert folded.count("<tr>") == 1 + 10
        assert "10 more rows" in folded
        assert "<script" not in data["text/html"]


@pytest.mark.parametrize(
    "source", ["span=(2, 8))", "sample_rate=8000)", '"8"])', "distributions(acts)", "channels=8)", "plt\nacts.plot()"]
)
def test_a_figure_shows_once_as_a_picture(executed, source):
    (data,) = outputs(executed[0], source)
    assert data["image/png"].startswith("iVBORw0KGgo")


def test_the_notebook_writes_its_report(executed):
    assert (executed[1] / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_outputs_kept_in_the_example_are_those_it_has(executed):
    kept = nbformat.read(EXAMPLE, as_version=4)
    for cell, fresh in zip(kept.cells, executed[0].cells, strict=False):
        if cell.cell_type != "code":
            continue
        assert [sorted(output.get("data", {})) for output in cell.outputs] == [
            sorted(output.get("data", {})) for output in fresh.outputs
        ]
        for output, other in zip(cell.outputs, fresh.outputs, strict=True):
            assert output.get("data", {}).get("text/html") == other.get("data", {}).get("text/html")


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "docs/pictures.md", "exec"), namespace)
    assert sorted(os.listdir(tmp_path)) == ["maps.pdf", "maps.png", "page-0.png", "report.html"]


def test_the_pictures_of_the_docs_are_there_and_small():
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((pictures/[a-z]+\.png)\)", text))
    drawn = set(re.findall(r'"([a-z]+\.png)"\)', (ROOT / "docs" / "draw_pictures.py").read_text(encoding="utf-8")))
    assert shown == {f"pictures/{name}" for name in drawn}
    assert all(0 < (ROOT / "docs" / name).stat().st_size <= 150_000 for name in shown)
