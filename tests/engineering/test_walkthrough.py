"""docs/walkthrough.ipynb runs from its first cell to its last, and is committed with its outputs."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import build_masks
import score_dependency
from toy.training import train_on_world
from toy.world import make_world

NOTEBOOK = Path(score_dependency.__file__).parent / "docs" / "walkthrough.ipynb"


@pytest.fixture
def small_toy(tmp_path, stage):
    """A toy world at the smallest size, with models that have learned next to nothing."""
    make_world(tmp_path, 40, 8, 0.5, 0)
    for name in ("base", "clip"):
        train_on_world(tmp_path, name, 2, 0, "cpu")
    shutil.copytree(tmp_path / "base", tmp_path / "mmrpt" / "checkpoint-1")
    scores = tmp_path / "scores_val.jsonl"
    commands = {
        score_dependency: ["--model", tmp_path / "base", "--data", tmp_path / "val.jsonl"],
        build_masks: ["--scores", scores],
    }
    outputs = {score_dependency: scores, build_masks: tmp_path / "masks_val.jsonl"}
    for module, flags in commands.items():
        error, _ = stage(module, *flags, "--out", outputs[module])
        assert error is None
    return tmp_path


def test_the_notebook_runs_to_its_end_on_a_small_toy(small_toy, monkeypatch):
    monkeypatch.setenv("TOY", str(small_toy))
    monkeypatch.setenv("UPDATES", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert "gradient norm" in "".join(str(cell.outputs) for cell in code)


def test_the_notebook_is_committed_with_outputs_and_is_small():
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if "import sys" not in cell.source)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 2**20
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/home/" not in text and str(NOTEBOOK.parents[1]) not in text
