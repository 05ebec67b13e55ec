"""The rooms of the repository and who may import whom, read from the import statements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("score_dependency", "build_masks", "reward", "grpo_train", "evaluate")

# room: the rooms it may import, besides itself
ALLOWED = {
    "common": set(),
    "report": {"common"},
    "score_dependency": {"common", "report"},
    "build_masks": {"common", *STAGES[:1]},
    "reward": {"common", *STAGES[:2]},
    "grpo_train": {"common", *STAGES[:3]},
    "evaluate": {"common", "benchmarks", "report", *STAGES[:4]},
    "benchmarks": {"common", "report", "reward"},
    "lvrpo": {"common", "reward", "grpo_train"},
    "toy": {"common", "report", "benchmarks", "lvrpo", *STAGES},
    "toy_world": {"common", "report", "benchmarks", "lvrpo", "toy", *STAGES},
}


def source_files():
    """The Python files of the repository that are no tests."""
    files = sorted(ROOT.glob("*.py"))
    for folder in sorted(path for path in ROOT.iterdir() if path.is_dir()):
        if folder.name != "tests" and not folder.name.startswith("."):
            files += sorted(folder.rglob("*.py"))
    return files


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    """(line number, room) of every import of ours in a file, wherever in it that is."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [room_of(path)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and is_import_call(node):
            names = [node.args[0].value]
        for name in names:
            imports.append((node.lineno, name.partition(".")[0]))
    return [(line, room) for line, room in imports if room in {*ALLOWED, "tests"}]


def is_import_call(call):
    """Whether this is import_module("name") or __import__("name")."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    is_constant = bool(call.args) and isinstance(call.args[0], ast.Constant)
    return name in ("import_module", "__import__") and is_constant


def test_every_file_stands_in_a_room_that_the_layout_names():
    assert {room_of(path) for path in source_files()} <= set(ALLOWED)


def test_no_room_imports_another_that_it_may_not_know():
    forbidden = []
    for path in source_files():
        room = room_of(path)
        for line, imported in imported_rooms(path):
            if imported != room and imported not in ALLOWED[room]:
                forbidden.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert not forbidden, "\n".join(forbidden)


def test_the_pages_of_stage_1_are_written_in_its_last_lines_only():
    """The method comes first: report is used by the functions that hand files over."""
    tree = ast.parse((ROOT / "score_dependency.py").read_text(encoding="utf-8"))
    shown = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("report"):
            shown |= {alias.name for alias in node.names}
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    users = []
    for function in functions:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if names & shown:
            users.append(function.name)
    names = [function.name for function in functions]
    assert users and set(users) <= set(names[names.index("parse_args") :]), users


@pytest.mark.parametrize(
    "source, rooms",
    [
        ("import evaluate", ["evaluate"]),
        ("import json, toy.world as world", ["toy"]),
        ("from reward import advantages", ["reward"]),
        ("def f():\n    from common.text import MASK", ["common"]),
        ("from . import text", ["common"]),
        ('importlib.import_module("toy.study")', ["toy"]),
        ("import torch\nfrom pathlib import Path", []),
    ],
)
def test_an_import_is_seen_in_whatever_form_it_is_written(tmp_path, monkeypatch, source, rooms):
    monkeypatch.setattr("test_layout.ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    path = tmp_path / "common" / "file.py"
    path.write_text(source)
    assert [room for _, room in imported_rooms(path)] == rooms
