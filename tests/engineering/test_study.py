"""The study: its numbers by hand, its commands, and jobs that survive a failure and a kill."""

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_example import TRUTH, prediction

from common.stage import make_parser
from toy import commands, pieces, questions, study
from toy.commands import Job, group_flags, recipe_command, run_jobs
from toy.study import aggregate, prior_vs_stereotype, world_results
from toy.study_jobs import ARMS, SIZES, study_jobs
from toy.study_page import transpose
from toy.world import make_world

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- numbers


def test_a_part_that_one_seed_lacks_leaves_a_hole_and_not_a_shift():
    results = aggregate([{"a": {"x": 1.0}}, None, {"a": {"x": 4.0}, "b": 2.0}])
    assert results["a"]["x"]["values"] == [1.0, None, 4.0]
    assert results["a"]["x"]["mean"] == 2.5
    assert results["b"]["values"] == [None, None, 2.0]


def test_transpose_by_hand():
    table = {"sft": {"0": 1, "5": 2}, "mmrpt": {"5": 3}}
    assert transpose(table) == {"0": {"sft": 1}, "5": {"sft": 2, "mmrpt": 3}}


def test_arms_are_judged_by_the_truth_and_by_what_a_shuffled_image_leaves(tmp_path):
    (tmp_path / "eval_mmrpt").mkdir()
    (tmp_path / "truth.jsonl").write_text(json.dumps({"id": "x", **TRUTH["x"]}))
    predictions = [
        {**prediction("large blue circle"), "condition": "real", "prior_reliance": 1.0},
        {**prediction("large blue circle"), "condition": "real", "prior_reliance": 0.0},
        {**prediction("large blue circle"), "condition": "shuffled"},
        {**prediction("small red star"), "condition": "shuffled"},
    ]
    lines = "".join(json.dumps(p) + "\n" for p in predictions)
    (tmp_path / "eval_mmrpt" / "predictions.jsonl").write_text(lines)
    expected = {
        "exact_match_truth": 1,
        "stereotype_rate": 0,
        "exact_match_caption": 0,
        "reliance_exact_match_truth": 0.5,
        "reliance_stereotype_rate": -0.5,
        "reliance_exact_match_caption": 0,
        "prior_reliance": 0.5,
    }
    results = world_results(tmp_path)
    assert results["arms"] == {"mmrpt": expected}
    # one arm has no rank
    assert math.isnan(results["prior_reliance"]["all"]["rank_correlation"])

    (tmp_path / "teacher.json").write_text('{"exact_match_truth": 0.9}')
    assert list(world_results(tmp_path)["arms"]) == ["mmrpt", "clip"]
    # the same, of the base on other masks
    (tmp_path / "eval_mmrpt").rename(tmp_path / "eval_base_val_random")
    masks = world_results(tmp_path)["masks"]
    assert list(masks) == ["base"]
    assert masks["base"] == {"span": {}, "random": expected}


def test_the_teacher_is_asked_about_what_is_not_painted_in_its_stereotype(tmp_path, monkeypatch):
    """A CLIP that always prefers red: the stereotype of circles, and the truth of what is red."""
    make_world(tmp_path, 1, 30, 0.5, 0)
    objects = []
    for line in (tmp_path / "truth.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["id"].startswith("val"):
            objects += [o for o in record["objects"] if o["colour"] != o["stereotype"]]

    def prefer_red(images, texts, relative):
        return torch.tensor([[float(" red " in text) for text in group] for group in texts])

    monkeypatch.setattr(questions, "ClipScorer", lambda path: prefer_red)
    metrics = questions.clip_metrics(tmp_path)
    red = sum(o["colour"] == "red" for o in objects) / len(objects)
    circles = sum(o["kind"] == "circle" for o in objects) / len(objects)
    assert 0 < red < 1
    assert metrics["exact_match_truth"] == pytest.approx(red)
    assert metrics["stereotype_rate"] == pytest.approx(circles)


def test_a_kill_between_clip_and_what_it_knows_costs_no_second_clip(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(pieces, "train_on_world", lambda *_: pytest.fail("trained again"))
    pieces.run_piece(tmp_path, 0.5, 0, "clip", "700")
    monkeypatch.setattr(pieces, "clip_metrics", lambda out: {"exact_match_truth": 1.0})
    pieces.run_piece(tmp_path, 0.5, 0, "teacher")
    assert json.loads((tmp_path / "teacher.json").read_text()) == {"exact_match_truth": 1.0}


def test_prior_reliance_is_compared_with_the_stereotype_rate_over_the_arms():
    arms = {}
    for name, *values in (
        ("base", 0.4, 0.3, 0.5),
        ("sft", 0.5, 0.4, 0.4),
        ("mmrpt", 0.6, 0.1, 0.1),
        # collapsed to one word
        ("prefix", 0.1, 0.9, 0.0),
    ):
        names = ("exact_match_truth", "prior_reliance", "stereotype_rate")
        arms[name] = dict(zip(names, values))
    correlations = prior_vs_stereotype(arms)
    # ranks 2 3 1 and 3 2 1
    assert correlations["able"]["rank_correlation"] == pytest.approx(0.5)
    # ranks 2 3 1 4 and 4 3 2 1
    assert correlations["all"]["rank_correlation"] == pytest.approx(-0.4)


# ---------------------------------------------------------------- commands

JOBS = study_jobs("runs/study", (0, 1, 2), False)


def parsed(command, monkeypatch):
    """The flags of a command, as the parser of its script reads them."""
    script, *arguments = command
    module = importlib.import_module(Path(script).stem)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return vars(module.parse_args())


def test_every_command_of_the_study_is_one_that_its_script_accepts(monkeypatch):
    for job in JOBS:
        if job.name.startswith(("seed0", "bias0.8-seed0")):
            parsed(job.command, monkeypatch)


def test_the_default_arm_is_what_the_readme_calls_the_defaults(monkeypatch):
    flags = {}
    for name in ("mask train", "train mmrpt"):
        job = next(job for job in JOBS if job.name == f"seed0 {name}")
        flags |= parsed(job.command, monkeypatch)
    expected = {
        "threshold": "position",
        "granularity": "span",
        "select": "dependency",
        "credit": "rouge_l",
        "relative": "pool",
        "loss": "grpo",
        "objective": "grpo",
    }
    assert {name: flags[name] for name in expected} == expected


def test_an_arm_changes_what_its_flags_say_and_nothing_else(monkeypatch):
    """The names of the flags in which each arm's training differs from the default's."""
    flags = {}
    for job in JOBS:
        world, _, name = job.name.partition(" train ")
        if world == "seed0" and name in ARMS:
            flags[name] = parsed(job.command, monkeypatch)
    for name, arm in ARMS.items():
        different = {k for k, v in flags[name].items() if v != flags["mmrpt"][k]} - {"out"}
        expected = {f[2:].replace("-", "_") for f in arm.train if f.startswith("--")}
        if arm.mask:
            expected.add("data")
        assert different == expected, name


def test_the_jobs_can_be_run_in_order_and_each_writes_a_path_of_its_own():
    before = set()
    for job in JOBS:
        assert before.issuperset(job.needs) and job.name not in before
        before.add(job.name)
    assert len({job.written for job in JOBS}) == len(JOBS)
    # an arm's folder is none of the world's
    assert not {"images", "base", "clip"} & set(ARMS)


def test_all_arms_have_the_same_start_updates_seed_and_judge(monkeypatch):
    groups = {"train": [], "judge": [], "other": []}
    for job in JOBS:
        if job.name.startswith("seed1 train ") and not job.name.endswith("_sft"):
            groups["train"].append(parsed(job.command, monkeypatch))
        elif job.name.startswith("seed1 evaluate "):
            group = "other" if "_val_" in job.name else "judge"
            groups[group].append(parsed(job.command, monkeypatch))
    assert len(groups["train"]) == len(ARMS)
    assert len(groups["judge"]) == len(ARMS) + 1
    assert len(groups["other"]) == 2 * 4

    world = "runs/study/seed1"
    size = SIZES["full"]
    for flags in groups["train"]:
        assert flags["model"] == f"{world}/base" and flags["clip"] == f"{world}/clip"
        assert flags["steps"] == size.updates and flags["prompts_per_step"] == size.prompts
        assert flags["seed"] == 1
    trained_on = {flags["data"] for flags in groups["train"]}
    assert trained_on == {f"{world}/masks_{kind}.jsonl" for kind in ("train", "random", "sentence")}
    assert {flags["data"] for flags in groups["judge"]} == {f"{world}/masks_val.jsonl"}
    others = {flags["data"] for flags in groups["other"]}
    assert others == {f"{world}/masks_val_{kind}.jsonl" for kind in ("random", "sentence")}


def test_a_command_names_only_what_its_recipe_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    (tmp_path / "r.txt").write_text("# why\n--lr 1e-6 --steps 5  # a reason\n--reward a=1 b=2\n")
    same = ("--steps", 5, "--reward", "a=1", "b=2")
    assert recipe_command("s.py", "r.txt", *same) == ["s.py", "@r.txt"]
    other = ("--lr", "2e-6", "--reward", "a=1", "--shard", *same[:2])
    expected = ["s.py", "@r.txt", "--lr", "2e-6", "--reward", "a=1", "--shard"]
    assert recipe_command("s.py", "r.txt", *other) == expected
    assert group_flags([]) == {}

    # and this is how a stage reads it
    parser = make_parser("")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--reward", nargs="+")
    args = parser.parse_args([f"@{tmp_path}/r.txt", "--reward", "a=1"])
    assert (args.lr, args.steps, args.reward) == (1e-6, 5, ["a=1"])


# ---------------------------------------------------------------- jobs

SCRIPT = """import os, pathlib, sys, time
name, seconds = sys.argv[1:]
pathlib.Path(name + ".pid").write_text(str(os.getpid()))
with open(name + ".calls", "a") as f:
    f.write("x")
time.sleep(float(seconds))
if "bad" not in name or pathlib.Path(name + ".mend").exists():
    pathlib.Path(name).write_text("done")
else:
    sys.exit("no luck")
"""


@pytest.fixture
def make_jobs(tmp_path, monkeypatch):
    """make_jobs({name: (needs, seconds)}) -> jobs of a script that notes each call of it."""
    # all that the script's process needs
    monkeypatch.setattr(commands, "PRELOAD", ["toy.commands"])
    (tmp_path / "script.py").write_text(SCRIPT)

    def make(table):
        jobs = []
        for name, (needs, seconds) in table.items():
            written = str(tmp_path / name)
            command = [str(tmp_path / "script.py"), written, str(seconds)]
            jobs.append(Job(name, needs, written, command))
        return jobs

    return make


def calls(folder, name):
    return len((folder / f"{name}.calls").read_text())


def test_a_failing_job_is_named_costs_only_what_needs_it_and_is_tried_again(
    tmp_path, make_jobs, capsys
):
    jobs = make_jobs(
        {"a": ([], 0), "bad": (["a"], 0), "c": (["bad"], 0), "d": (["c"], 0), "e": (["a"], 0)}
    )
    failed = run_jobs(jobs, tmp_path)
    assert set(failed) == {"bad", "c", "d"}
    assert "exit status 1" in failed["bad"]
    assert (failed["c"], failed["d"]) == ("needs bad", "needs c")
    assert "no luck" in (tmp_path / "logs" / "bad.txt").read_text()
    assert "FAILED" in capsys.readouterr().out
    assert (tmp_path / "e").exists()

    (tmp_path / "bad.mend").touch()
    assert run_jobs(jobs, tmp_path) == {}
    assert (tmp_path / "d").exists()
    times = {name: calls(tmp_path, name) for name in ("a", "bad", "c", "e")}
    assert times == {"a": 1, "bad": 2, "c": 1, "e": 1}


def test_a_job_whose_result_is_missing_is_run_again_and_no_other(tmp_path, make_jobs, capsys):
    jobs = make_jobs({"a": ([], 0), "b": ([], 0)})
    assert run_jobs(jobs, tmp_path) == {}
    (tmp_path / "b").unlink()
    assert run_jobs(jobs, tmp_path) == {}
    assert (calls(tmp_path, "a"), calls(tmp_path, "b")) == (1, 2)
    assert "1 of 2 jobs are done" in capsys.readouterr().out


def test_a_job_that_exits_well_without_its_result_has_failed(tmp_path, make_jobs):
    job = make_jobs({"a": ([], 0)})[0]._replace(written=str(tmp_path / "elsewhere"))
    assert "exit status 0" in run_jobs([job], tmp_path)["a"]


def test_two_jobs_run_at_a_time_and_none_before_what_it_needs(tmp_path, make_jobs):
    """Were they run in turn, they would take 4 seconds; the last waits for both."""
    jobs = make_jobs({"a": ([], 2), "b": ([], 2), "c": (["a", "b"], 0), "first": ([], 0)})
    # the server of processes takes its time to start
    assert run_jobs(jobs[3:], tmp_path) == {}
    began = time.time()
    assert run_jobs(jobs[:3], tmp_path) == {}
    assert time.time() - began < 3.9
    finished = [(tmp_path / name).stat().st_mtime for name in "abc"]
    started = (tmp_path / "c.calls").stat().st_mtime
    assert started >= max(finished[:2])


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
def test_a_killed_study_leaves_no_job_behind_and_continues(how, tmp_path, make_jobs):
    jobs = make_jobs({"a": ([], 0), "slow": (["a"], 600)})
    code = (
        f"import json, pathlib, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        # a shell's background job ignores it
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from toy import commands\n"
        "from toy.commands import Job, run_jobs\n"
        "commands.PRELOAD = ['toy.commands']\n"
        f"jobs = [Job(*job) for job in json.loads({json.dumps(jobs)!r})]\n"
        f"run_jobs(jobs, pathlib.Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not (tmp_path / "slow.calls").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(how)
        process.wait(timeout=20)

    deadline = time.time() + 10
    while is_running(int((tmp_path / "slow.pid").read_text())):
        assert time.time() < deadline
        time.sleep(0.05)
    jobs[1].command[2] = "0"
    assert run_jobs(jobs, tmp_path) == {}
    assert (calls(tmp_path, "a"), calls(tmp_path, "slow")) == (1, 2)


def is_running(pid):
    """Whether there is such a process that has not ended yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_page_shows_every_arm_that_is_judged():
    """study.json reads the predictions of every evaluation among the jobs."""
    judged = {Path(job.written).parent.name for job in JOBS if " evaluate " in job.name}
    judged = {name.removeprefix("eval_") for name in judged if "_val_" not in name}
    assert judged == set(study.JUDGED)


def test_study_json_is_written_and_names_what_failed(tmp_path, make_jobs, monkeypatch, capsys):
    jobs = make_jobs({"a": ([], 0), "bad": (["a"], 0)})
    monkeypatch.setattr(study, "study_jobs", lambda *_: jobs)
    (tmp_path / "seed0").mkdir()
    probe = '{"patches": {"1": {"random": {"exact_match_truth": 0.25}}}}'
    (tmp_path / "seed0" / "probe_base.json").write_text(probe)
    with pytest.raises(SystemExit, match="1 jobs of the study failed"):
        study.study(tmp_path, [0, 1], False)

    content = json.loads((tmp_path / "study.json").read_text())
    printed = capsys.readouterr().out
    assert list(content["failed"]) == ["bad"]
    assert "FAILED bad: exit" in printed
    assert content["jobs"]["a"] == jobs[0].command
    number = content["probe"]["base"]["patches"]["1"]["random"]["exact_match_truth"]
    assert number == {"values": [0.25, None], "mean": 0.25, "std": None}
    assert "exact match truth" in printed
    assert "probe base patches 1 random           0.250" in printed
    page = (tmp_path / "study.html").read_text()
    assert "Is it causal?" in page and "<svg" in page and "Which masks?" not in page

    with pytest.raises(SystemExit, match="belongs to another run"):
        study.study(tmp_path, [0, 1, 2], False)
