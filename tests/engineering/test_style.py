"""The limits within which the code stays readable: of files, functions, lines, nesting, README."""

import ast

import pytest
from test_layout import ROOT, source_files

LONGEST_FILE = 350  # lines
LONGEST_FUNCTION = 60
WIDEST_LINE = 100  # columns
MOST_WIDE = 0.04  # share of a file's lines with code
DEEPEST = 4  # levels of nested blocks in train()
EQUATION_BEFORE = 120  # lines

# the function, of which one suffices, that is the equation of a stage
EQUATIONS = {
    "score_dependency.py": ("visual_share",),
    "build_masks.py": ("otsu", "threshold_rule"),
    "reward.py": ("advantages",),
    "grpo_train.py": ("grpo_objective",),
    "evaluate.py": ("text_metrics",),
}

FILES = [path.relative_to(ROOT).as_posix() for path in source_files()]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def functions_of(name):
    """The functions and methods of a file, nested ones too."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def depth(node):
    """How deeply blocks are nested below a node: 2 for an `if` within a `for`.

    An `elif` is as deep as its `if`.
    """
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        level = int(isinstance(child, BLOCKS) and not is_elif)
        deepest = max(deepest, level + depth(child))
    return deepest


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_too_long_to_be_read_in_one_go(name):
    assert len(lines_of(name)) <= LONGEST_FILE


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_a_page(name):
    long = {}
    for function in functions_of(name):
        length = function.end_lineno - function.lineno + 1
        if length > LONGEST_FUNCTION:
            long[function.name] = length
    assert not long


@pytest.mark.parametrize("name", FILES)
def test_hardly_any_line_is_wider_than_a_window(name):
    code = [line for line in lines_of(name) if line.strip()]
    wide = [line for line in code if len(line) > WIDEST_LINE]
    assert len(wide) <= MOST_WIDE * len(code), "\n".join(wide)


def test_the_training_loop_is_at_most_four_levels_deep():
    (train,) = [f for f in functions_of("grpo_train.py") if f.name == "train"]
    assert depth(train) <= DEEPEST


def test_the_depth_of_nested_blocks_is_counted_as_a_reader_does():
    source = (
        "for a in b:\n    if a:\n        pass\n    elif b:\n        with c:\n            pass\n"
    )
    assert depth(ast.parse(source)) == 3
    assert depth(ast.parse("x = 1")) == 0


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_equation_of_a_stage_stands_near_its_top(name):
    starts = {function.name: function.lineno for function in functions_of(name)}
    lines = [starts[equation] for equation in EQUATIONS[name] if equation in starts]
    assert lines and min(lines) <= EQUATION_BEFORE


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "reward.py"])
def test_a_stage_begins_with_its_equation_and_ends_with_its_main(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, FUNCTIONS)]
    assert names.index(EQUATIONS[name][0]) < names.index("parse_args")
    assert names[-1] == "main"


def test_the_readme_can_be_read_in_five_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1500
