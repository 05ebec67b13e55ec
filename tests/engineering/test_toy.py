"""toy_world.py: its commands, its benchmark, and how it ends when something is wrong."""

import importlib
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from inputs import assert_one_line

import toy_world
from benchmarks.tsv import load_images, read_tsv
from common.vlm import chat_prompt
from toy import stages as toy_stages
from toy.lanes import Clock
from toy.models import make_base, make_processor
from toy.questions import write_benchmark
from toy.stages import FULL, SMALL, Stage, stages
from toy.training import fill_example, fill_pair, response_loss
from toy.world import COLOURS, building, load_truth, make_world, sample_pair

ROOT = Path(toy_world.__file__).parent


def test_a_world_with_other_settings_is_refused_in_one_line(tmp_path):
    settings = {"bias": 0.9, "seed": 0, "small": True, "size": SMALL._asdict()}
    (tmp_path / "world.json").write_text(json.dumps({"settings": settings}))
    command = [sys.executable, toy_world.__file__, "--small", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "belongs to another run (bias was 0.9, is 0.5)" in run.stderr
    assert "Traceback" not in run.stderr


# stages that note when they ran, and print; the name says what becomes of them
SCRIPT = """import os, pathlib, signal, sys, time
path, seconds = sys.argv[1:]
began = time.time()
print("working on", path)
for i in range(3):
    print(f"\\r{i} of 3", end="", file=sys.stderr)
    time.sleep(float(seconds) / 3)
print("\\r      \\r", end="", file=sys.stderr)
if "bad" in path:
    sys.exit("no luck")
if "killed" in path:
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path(path).write_text(f"{began} {time.time()}")
"""
RUN = """import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from toy import commands
commands.PRELOAD = ['toy.commands']
from toy.lanes import Clock, run_step
from toy.stages import Stage
folder = pathlib.Path(sys.argv[2])
lanes = []
for lane in json.loads(sys.argv[3]):
    lanes.append([])
    for name, seconds in lane:
        written = str(folder / name)
        command = [str(folder / "script.py"), written, str(seconds)]
        lanes[-1].append(Stage(name, written, command, f"What {name} does."))
run_step(lanes, Clock(folder / "clock.json", {}), folder)
"""


def run_lanes(folder, *lanes):
    """run_step() in a process of its own, as the processes that it starts write to its output."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-c", RUN, str(ROOT), str(folder), json.dumps(lanes)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_lanes_run_side_by_side_their_stages_in_turn_and_each_is_shown_whole(tmp_path):
    run = run_lanes(tmp_path, [("a", 2)], [("b", 1), ("c", 1)])
    assert run.returncode == 0
    times = {}
    for name in "abc":
        times[name] = [float(t) for t in (tmp_path / name).read_text().split()]
    assert times["b"][0] < times["a"][1] and times["b"][1] <= times["c"][0]

    # the second lane is shown after the first, without what is left of its bars
    # commands go on in indented lines
    lines = [line for line in run.stdout.splitlines() if line and line[0] != " "]
    starts = (
        "What a",
        "$ python",
        "working",
        "What b",
        "$ python",
        "working",
        "What c",
        "$ python",
    )
    assert [line[: len(start)] for line, start in zip(lines, starts)] == list(starts)
    assert "of 3" not in run.stdout
    assert set(json.loads((tmp_path / "clock.json").read_text())["seconds"]) == set("abc")


@pytest.mark.parametrize(
    "place, failing, reason",
    [
        (0, "bad", "failed with exit status 1, see above"),
        (1, "killed", "was killed (SIGKILL), see {folder}/logs/killed.txt"),
    ],
)
def test_a_stage_that_fails_is_named_in_one_line_and_ends_the_others(
    place, failing, reason, tmp_path
):
    lanes = [[("slow", 300)], [("slow", 300)]]
    lanes[place] = [(failing, 0), ("never", 0)]
    began = time.time()
    run = run_lanes(tmp_path, *lanes)
    assert time.time() - began < 100
    assert run.returncode == 1
    reason = reason.format(folder=tmp_path)
    *_, error = run.stderr.splitlines()
    assert error == f"error: the stage '{failing}' {reason}; the same command tries it again"
    assert f"working on {tmp_path}/{failing}" in run.stdout
    assert failing == "killed" or "no luck" in run.stdout + run.stderr
    assert not (tmp_path / "slow").exists() and not (tmp_path / "never").exists()
    assert "Traceback" not in run.stderr
    # nobody takes these seconds for those of the stages
    assert not (tmp_path / "clock.json").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("nonsense", "no such piece; there are world, base"),
        ("base", "takes STEPS: whole numbers"),
        ("base many", "takes STEPS: whole numbers"),
        ("base 0", "takes STEPS: whole numbers"),
        ("base 3 4", "takes STEPS: whole numbers"),
        ("world 3", "takes TRAIN VAL"),
        ("benchmark 3", "takes no more words"),
        ("probe out.json base", "takes FILE MODEL LIMIT"),
    ],
)
def test_wrong_words_for_a_piece_are_refused_in_one_line(words, says, stage, tmp_path):
    error, _ = stage(toy_world, "--out", tmp_path / "world", "--piece", *words.split())
    assert_one_line(error, f"--piece {words.split()[0]}", says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("base", "clip"))
def test_a_full_disk_under_a_model_of_the_toy_is_one_line(name, stage, tmp_path):
    make_world(tmp_path, 4, 2, 0.5, 0)
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        error, _ = stage(toy_world, "--out", tmp_path, "--piece", name, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(error, f"{tmp_path}/{name} cannot be written", "same command tries it again")
    assert sorted(tmp_path.iterdir()) == before
    error, _ = stage(toy_world, "--out", tmp_path, "--piece", name, 1)
    assert error is None and (tmp_path / name).is_dir()


def all_stages(*arguments):
    """The stages of all lanes of all steps."""
    return [stage for lanes in stages(*arguments) for lane in lanes for stage in lane]


def test_no_stage_runs_before_or_beside_what_it_reads():
    """Every path of the world that a command names was written in an earlier step or lane."""
    written = {"runs/x/train.jsonl", "runs/x/val.jsonl"}
    for lanes in stages("runs/x", 0, FULL):
        results = set()
        for lane in lanes:
            before = set(written)
            for stage in lane:
                named = [word for word in stage.command if word.startswith("runs/x/")]
                read = {path.partition("/checkpoint")[0] for path in named} - {stage.written}
                assert read <= before, stage.name
                before.add(stage.written)
            results |= before
        written |= results


@pytest.mark.parametrize("size", (FULL, SMALL))
def test_every_printed_command_is_one_that_its_script_accepts(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in all_stages("runs/x", 1, size):
        script, *arguments = stage.command
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        args = importlib.import_module(Path(script).stem).parse_args()
        if script == "toy_world.py":
            # a piece of the world itself
            assert args.out == "runs/x"
            continue
        assert args.out == stage.written
        # no path of another world is left over from the recipe
        paths = [v for v in vars(args).values() if isinstance(v, str) and v.startswith("runs/")]
        assert all(path.startswith("runs/x/") for path in paths), stage.name


def test_the_commands_of_the_first_run_are_the_recipes_and_little_more():
    commands = {stage.name: stage.command for stage in all_stages("runs/toy", 0, FULL)}
    assert commands["score train"] == ["score_dependency.py", "@recipes/toy/score.txt"]
    assert commands["mask train"] == ["build_masks.py", "@recipes/toy/mask.txt"]
    assert commands["train mmrpt"] == ["grpo_train.py", "@recipes/toy/train.txt"]
    assert commands["train sft"] == ["grpo_train.py", "@recipes/toy/sft.txt"]
    assert commands["evaluate base"] == ["evaluate.py", "@recipes/toy/evaluate.txt"]
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
    clock = Clock(path, {})
    for name in ("base", "clip"):
        with clock.measure(name, tmp_path / name):
            pass
    assert clock.seconds["base"] == 300.0
    assert clock.seconds["clip"] < 1
    # kept after every stage, so that a kill loses none
    assert json.loads(path.read_text())["seconds"] == clock.seconds


def test_of_stages_side_by_side_the_longest_lane_counts(tmp_path):
    clock = Clock(tmp_path / "world.json", {})
    clock.seconds = {"world": 1, "a": 10, "b": 4, "c": 7, "d": 2}
    lane = [Stage(name, "", [], "") for name in "abcd"]
    assert clock.in_all([[[lane[0]], lane[1:3]], [[lane[3]]]]) == 1 + 11 + 2


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


def test_the_loss_of_the_base_counts_responses_and_if_asked_the_text_behind_the_image():
    torch.manual_seed(0)
    rng = random.Random(0)
    pairs = []
    images = []
    for _ in range(3):
        image, caption, _ = sample_pair(rng, 0.5)
        pairs.append(fill_pair(fill_example(rng, caption)))
        images.append(image)
    processor = make_processor([prompt for prompt, _ in pairs])
    model = make_base(processor.tokenizer).eval()

    # one by one, without padding
    response_nats, text_nats = [], []
    for (prompt, response), image in zip(pairs, images):
        encoded = processor(text=[chat_prompt(processor, prompt)], images=[[image]])
        prompt_ids = encoded.pop("input_ids")[0]
        response_ids = processor.tokenizer(response).input_ids + [processor.tokenizer.eos_token_id]
        ids = torch.tensor([prompt_ids + response_ids])
        pixels = torch.as_tensor(encoded["pixel_values"])
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, :-1]
        nats = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        behind = len(prompt_ids) - prompt_ids[::-1].index(model.config.image_token_id)
        text_nats.append(nats[behind - 1 : len(prompt_ids) - 1])
        response_nats.append(nats[len(prompt_ids) - 1 :])

    expected = torch.cat(response_nats).mean()
    torch.testing.assert_close(response_loss(model, processor, pairs, images), expected)
    expected = expected + 2 * torch.cat(text_nats).mean()
    both = response_loss(model, processor, pairs, images, prompt_weight=2)
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("small", (True, False))
def test_the_table_fits_a_terminal_and_says_what_to_look_at(small, capsys):
    metrics = {"exact_match_truth": 0.5, "stereotype_rate": 0.1, "exact_match_caption": 0.3}
    results = {name: {"real": metrics} for name in toy_world.MODELS}
    for name in ("dependency_auroc", "dependency_auroc_corrected", "mask_precision", "mask_recall"):
        results[name] = 0.9
    results["bias"] = 0.5
    toy_world.print_results("runs/toy", {**results, "small": small, "seconds": {"in all": 90.0}})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "stereotype rate                        0.100   0.100   0.100" in printed
    assert ("only shows that everything runs" in printed) == small
    assert ("look at the stereotype rate first" in printed) != small
    assert "1.5 minutes in all" in printed
    assert "90% of the masks lie in such a sentence" in printed
    assert "runs/toy/eval_mmrpt/results.html" in printed


def test_the_small_run_is_smaller_in_everything():
    for name in toy_stages.Size._fields:
        full = getattr(FULL, name)
        assert full is None or getattr(SMALL, name) < full
