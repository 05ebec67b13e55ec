"""Recipes and flags, and what importing a stage must not do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import build_masks
import evaluate
import grpo_train
import lvrpo.evaluate
import lvrpo.train
import score_dependency
from common.stage import make_parser, parse

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("recipes/*/*.txt"))
SCRIPTS = {
    "score": score_dependency,
    "mask": build_masks,
    "sft": grpo_train,
    "train": grpo_train,
    "evaluate": evaluate,
    "questions": evaluate,
}
# those of LVRPO, and of Janus, which only LVRPO trains
LVRPO_SCRIPTS = {
    "train": lvrpo.train,
    "train-8-gpus": lvrpo.train,
    "evaluate": lvrpo.evaluate,
    "draw": lvrpo.evaluate,
}

# ---------------------------------------------------------------- recipes

RECIPE = """# a known run
--lr 1e-3 --steps 7        # several flags per line

--reward semantic=1 visual=1.5
   # an indented comment
--out "a folder"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.txt"
    path.write_text(RECIPE)
    return f"@{path}"


def parse_flags(*argv):
    parser = make_parser("A stage.")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--reward", nargs="+", default=["semantic=1"])
    parser.add_argument("--out", required=True)
    return parse(parser, argv)


def test_a_recipe_holds_comments_and_several_flags_per_line(recipe):
    args = parse_flags(recipe)
    assert args.lr == 1e-3
    assert args.steps == 7
    assert args.reward == ["semantic=1", "visual=1.5"]
    assert args.out == "a folder"


@pytest.mark.parametrize("place", range(4))
def test_the_command_line_overrides_the_recipe_wherever_it_is_named(recipe, place):
    argv = ["--lr", "0.5", "--reward", "semantic=2"]
    argv.insert(place, recipe)
    args = parse_flags(*argv)
    assert args.lr == 0.5
    assert args.reward == ["semantic=2"]
    # what the command line leaves open is the recipe's
    assert args.steps == 7


def test_the_later_of_two_recipes_overrides_the_earlier(recipe, tmp_path):
    later = tmp_path / "later.txt"
    later.write_text("--steps 9\n")
    args = parse_flags(recipe, f"@{later}")
    assert args.steps == 9
    assert args.lr == 1e-3


def test_a_recipe_that_does_not_exist_is_refused_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_flags(f"@{tmp_path / 'none.txt'}")
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert "No such file" in message
    assert "none.txt" in message


def script_of(path):
    """The script that a recipe is for, by the name of its file and its folder."""
    if path.parent.name == "lvrpo-toy":
        return LVRPO_SCRIPTS[path.stem]
    if path.parent.name == "janus-pro-1b" and path.stem != "evaluate":
        return LVRPO_SCRIPTS.get(path.stem) or SCRIPTS[path.stem]
    return SCRIPTS[path.stem]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_is_understood_by_its_script(path, monkeypatch):
    """With the paths that a recipe of a real model leaves open."""
    script = script_of(path)
    paths = ["--out", "out"]
    if script is build_masks:
        paths += ["--scores", "scores.jsonl"]
    elif script is lvrpo.evaluate:
        paths += ["--model", "model", "--prompts", "prompts.jsonl"]
    elif script is lvrpo.train:
        paths += ["--model", "model", "--data", "data.jsonl", "--prompts", "prompts.jsonl"]
    else:
        paths += ["--model", "model", "--data", "data.jsonl"]
    monkeypatch.setattr(sys, "argv", [script.__name__, f"@{path}", *paths])
    assert script.parse_args().out == "out"


@pytest.mark.parametrize("missing", ("--model", "--data", "--out"))
def test_training_asks_for_model_data_and_out(stage, missing):
    flags = {"--model": "m", "--data": "d", "--out": "o"}
    del flags[missing]
    error, printed = stage(grpo_train, *(x for flag in flags.items() for x in flag))
    assert error == "2"
    *_, message = printed.strip().splitlines()
    assert message.endswith(f"the following arguments are required: {missing}")


# ---------------------------------------------------------------- imports

IMPORTS = """
import csv, importlib, json, os, sys, warnings
import open_clip, torch, transformers
from PIL import Image

# lazy parts of transformers that the stages use
from transformers.integrations import sdpa_attention
from transformers.utils import logging


def state():
    return {
        "attention": sorted(transformers.AttentionInterface()),
        "masks": sorted(transformers.AttentionMaskInterface()),
        "field size limit": csv.field_size_limit(),
        "warnings": repr(warnings.filters),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "pixel limit": Image.MAX_IMAGE_PIXELS,
        "verbosity": logging.get_verbosity(),
        "progress bars": logging.is_progress_bar_enabled(),
        "environment": sorted(os.environ.items()),
        "random": torch.get_rng_state().sum().item(),
    }


before = state()
after = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    after[name] = state()
print(json.dumps([before, after]))
"""


def test_importing_a_stage_changes_no_global_state():
    """Compared with a process that has only imported torch, transformers and open_clip."""
    stages = ["score_dependency", "build_masks", "reward", "grpo_train", "evaluate"]
    command = [sys.executable, "-c", IMPORTS, *stages]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = json.loads(run.stdout.splitlines()[-1])
    assert before["attention"]
    assert list(after) == stages
    for name in stages:
        assert after[name] == before, name
