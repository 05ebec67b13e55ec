"""toy_world.py: its commands, its benchmark, and how it ends when something is wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy_world
from benchmarks.tsv import load_images, read_tsv
from toy import stages as toy_stages
from toy.questions import write_benchmark
from toy.stages import FULL, SMALL, Stage, stages
from toy.world import COLOURS, building, load_truth, make_world

ROOT = Path(toy_world.__file__).parent


def test_a_world_with_other_settings_is_refused_in_one_line(tmp_path):
    settings = {"bias": 0.9, "seed": 0, "small": True}
    (tmp_path / "world.json").write_text(json.dumps({"settings": settings}))
    command = [sys.executable, toy_world.__file__, "--small", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "belongs to another run (bias was 0.9, is 0.5)" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_stage_that_fails_is_named_in_one_line(capfd):
    command = ["build_masks.py", "--scores", "no/such/file", "--out", "no/such/masks"]
    with pytest.raises(SystemExit, match="the stage 'mask train' failed with exit status 1"):
        toy_world.run_stage(Stage("mask train", "no/such/masks", command, ""))
    printed = capfd.readouterr()
    assert "$ python build_masks.py --scores no/such/file" in printed.out
    assert "no/such/file: no such file" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("size", (FULL, SMALL))
def test_every_printed_command_is_one_that_its_script_accepts(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in stages("runs/x", 1, size):
        script, *arguments = stage.command
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        args = importlib.import_module(Path(script).stem).parse_args()
        assert args.out == stage.written
        # no path of another world is left over from the recipe
        paths = [v for v in vars(args).values() if isinstance(v, str) and v.startswith("runs/")]
        assert all(path.startswith("runs/x/") for path in paths), stage.name


def test_the_commands_of_the_first_run_are_the_recipes_and_little_more():
    commands = {stage.name: stage.command for stage in stages("runs/toy", 0, FULL)}
    assert commands["score train"] == ["score_dependency.py", "@recipes/toy/score.txt"]
    assert commands["mask train"] == ["build_masks.py", "@recipes/toy/mask.txt"]
    assert commands["train mmrpt"] == ["grpo_train.py", "@recipes/toy/train.txt"]
    assert commands["train sft"] == ["grpo_train.py", "@recipes/toy/sft.txt"]
    assert commands["evaluate base"] == ["evaluate.py", "@recipes/toy/evaluate.txt"]
    assert commands["ask base"] == ["evaluate.py", "@recipes/toy/questions.txt"]
    assert commands["evaluate mmrpt"] == [
        "evaluate.py",
        "@recipes/toy/evaluate.txt",
        *("--model", "runs/toy/mmrpt/checkpoint-150"),
        *("--compare", "runs/toy/eval_base"),
        *("--out", "runs/toy/eval_mmrpt"),
    ]


def test_mmrpt_and_sft_differ_in_what_they_learn_from_and_in_nothing_else(monkeypatch):
    monkeypatch.chdir(ROOT)
    grpo_train = importlib.import_module("grpo_train")
    args = {}
    for recipe in ("train", "sft"):
        monkeypatch.setattr(sys, "argv", ["grpo_train.py", f"@recipes/toy/{recipe}.txt"])
        args[recipe] = vars(grpo_train.parse_args())
    different = {name for name in args["sft"] if args["sft"][name] != args["train"][name]}
    # SFT samples nothing, and nothing rewards it
    assert different <= {"objective", "out", "beta", "reward", "clip", "temperature"}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "toy").glob("*.txt")))
def test_every_recipe_says_how_it_is_used(recipe):
    """The first comment is the command, and the command's script takes the recipe."""
    lines = recipe.read_text().splitlines()
    usage = next(line for line in lines if "python " in line)
    assert lines[0].startswith("#") and usage.endswith(f"@recipes/toy/{recipe.name}")
    assert (ROOT / usage.split()[2]).exists()


def test_a_second_run_keeps_the_seconds_of_the_first(tmp_path):
    path = tmp_path / "world.json"
    path.write_text('{"settings": {}, "seconds": {"base": 300.0, "clip": 200.0}}')
    (tmp_path / "base").mkdir()
    clock = toy_world.Clock(path, {})
    for name in ("base", "clip"):
        clock.measure(name, tmp_path / name, lambda: None)
    assert clock.seconds["base"] == 300.0
    assert clock.seconds["clip"] < 1
    # kept after every stage, so that a kill loses none
    assert json.loads(path.read_text())["seconds"] == clock.seconds


def test_what_is_being_built_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), building(tmp_path / "base") as folder:
        folder.mkdir()
        raise KeyError
    assert not (tmp_path / "base").exists()
    with building(tmp_path / "base") as folder:
        # nothing is left of the first attempt
        assert not folder.exists()
        folder.mkdir()
    assert (tmp_path / "base").is_dir()


def test_the_benchmark_asks_about_every_object_in_all_rotations(tmp_path):
    make_world(tmp_path, 2, 3, 0.5, 0)
    write_benchmark(tmp_path)
    table = read_tsv(tmp_path / "val.tsv")
    records = [record for _, record in table.records]
    truth = load_truth(tmp_path)
    objects = []
    for name in truth:
        if name.startswith("val"):
            objects += truth[name]["objects"]
    assert len(records) == 5 * len(objects)
    for i, record in enumerate(records):
        thing = objects[i % len(objects)]
        assert record["copy"] == i // len(objects)
        assert record["options"][record["answer"]] == thing["colour"]
        assert sorted(record["options"].values()) == sorted(COLOURS)
        assert record["category"] == thing["kind"] and thing["place"] in record["question"]
    column = table.columns.index("image")
    offset = table.image_offsets[records[0]["image"]]
    image = load_images(tmp_path / "val.tsv", column, offset, 64 * 64)[0]
    assert image.size == (64, 64)


def test_the_table_fits_a_terminal(capsys):
    metrics = {"exact_match_truth": 0.5, "stereotype_rate": 0.1, "exact_match_caption": 0.3}
    questions = {"accuracy": {"value": 44.0}, "circular": {"value": 42.0}}
    results = {name: {"real": metrics, "questions": questions} for name in toy_world.MODELS}
    for name in ("dependency_auroc", "dependency_auroc_corrected", "mask_precision", "mask_recall"):
        results[name] = 0.9
    toy_world.print_results("runs/toy", {**results, "small": True, "seconds": {"base": 90.0}})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "stereotype rate                        0.100   0.100   0.100" in printed
    assert "1.5 minutes in all" in printed and "only shows that everything runs" in printed
    assert "runs/toy/eval_mmrpt/results.html" in printed


def test_the_small_run_is_smaller_in_everything():
    for name in toy_stages.Size._fields:
        full = getattr(FULL, name)
        assert full is None or getattr(SMALL, name) < full
