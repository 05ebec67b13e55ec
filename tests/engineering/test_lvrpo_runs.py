"""Runs of LVRPO: ranks that read and draw at once, a kill, a resume, other settings."""

from common.script import run_script

import contextlib
import io
import json
import socket
import sys
from pathlib import Path

import pytest
import test_survival
import torch
from safetensors.torch import load_file
from tiny import random_image

import common.run
from common.judges import Detection
from lvrpo import train as lvrpo_train

# processes forked off a server that has imported torch, the same for both files
launch = test_survival.launch
QUARTERS = {"dog": (8, 8), "cat": (24, 8), "cup": (8, 24), "bus": (24, 24)}
TINY_RUN = (
    "--prompts-per-step 2 --draw-share 0.5 --group-size 4 --max-new-tokens 28 --temperature 1 "
    "--draw-reward ins=1 --read-reward ins=1 --detector test_lvrpo_runs:find_reddish "
    "--lr 1e-6 --updates 2 --beta 0.1 --save-every 2 --keep 2 --log-every 1 --sample-every 1"
)
SECONDS = ("rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second")


def find_reddish(images, records):
    """A detector that finds a class if the middle of its quarter is more red than green."""
    found = []
    for image in images:
        found.append({})
        for name, middle in QUARTERS.items():
            red, green, _ = image.getpixel(middle)
            if red > green:
                found[-1][name] = [Detection((0, 0, 8, 8), 0.95)]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three masks and three prompts, with images for both."""
    folder = tmp_path_factory.mktemp("data")
    masks = []
    prompts = []
    for i, answer in enumerate(["red thing", "blue thing", "green one"]):
        random_image(i).save(folder / f"{i}.png")
        text = f"There {'really ' * i}is a [MASK] here."
        record = {"id": str(i), "image": f"{i}.png", "masked_caption": text}
        masks.append({**record, "sentence": "A [MASK].", "answer": answer})
        include = [{"class": name, "count": 1} for name in QUARTERS]
        prompts.append({"prompt": f"Draw {i}.", "image": f"{i}.png", "include": include})
    for name, records in (("masks", masks), ("prompts", prompts)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def flags_of(model, data, out, flags):
    """The flags of a run; `flags`: more of them, separated by spaces."""
    paths = f"--model {model} --data {data}/masks.jsonl --prompts {data}/prompts.jsonl --out {out}"
    return f"{paths} {TINY_RUN} {flags}".split()


def train(*run):
    """Runs main() of the script in this process, on one rank, and returns what it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr("common.run.draw_curves", lambda out: None)
        patch.setattr(sys, "argv", ["lvrpo.train", *flags_of(*run)])
        run_script(lvrpo_train.main)
    return printed.getvalue()


def draw_no_curves():
    common.run.draw_curves = lambda out: None


def weights(out, step):
    return load_file(Path(out) / f"checkpoint-{step}" / "model.safetensors")


def metrics(out):
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in SECONDS} for record in records]


def distance(a, b):
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).square().sum() for name in a).sqrt()


def drawings(out):
    return {path.name: path.read_bytes() for path in (Path(out) / "samples").iterdir()}


@pytest.fixture(scope="module")
def warm(checkpoint, data, tmp_path_factory):
    """A checkpoint that imitation has taught both tasks a little: a random one writes nothing of
    the form that earns a reward."""
    out = tmp_path_factory.mktemp("warm") / "run"
    flags = "--objective sft --steps 24 --lr 3e-3 --prompts-per-step 4 --draw-share 0.25"
    train(checkpoint("janus"), data, out, flags)
    return out / "checkpoint-24"


@pytest.fixture(scope="module")
def straight(warm, data, tmp_path_factory):
    """Three steps in one go, on one rank: what every other way of running must reproduce."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(warm, data, out, "--steps 3")
    return out


def test_a_run_of_both_tasks_learns_from_both(warm, straight):
    """What the other tests compare is not only zeros."""
    for task in ("reading", "drawing"):
        assert max(record[f"advantage_abs/{task}"] for record in metrics(straight)) > 0.1, task
    assert distance(load_file(warm / "model.safetensors"), weights(straight, 3)) > 0
    assert drawings(straight).keys() == {"step-1.png", "step-2.png", "step-3.png"}


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("shard", ["", "--shard"], ids=["whole", "sharded"])
def test_ranks_of_different_media_and_an_idle_one_give_the_run_of_one_rank(
    warm, data, straight, launch, tmp_path, shard
):
    """Of three ranks the first reads, the second draws, and the third has no prompt."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    flags = flags_of(warm, data, tmp_path / "run", f"--steps 3 {shard}")
    ranks = []
    for rank in map(str, range(3)):
        env |= {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(launch("lvrpo.train", flags, draw_no_curves, **env))
    for rank in ranks:
        code, printed = test_survival.ended(*rank)
        assert code == 0, printed

    several = metrics(tmp_path / "run")
    for one, other in zip(metrics(straight), several, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    start = load_file(warm / "model.safetensors")
    moved = distance(start, weights(straight, 3))
    assert distance(weights(straight, 3), weights(tmp_path / "run", 3)) < 0.01 * moved


def test_a_frozen_vision_tower_leaves_both_tasks_to_train(warm, data, tmp_path):
    train(warm, data, tmp_path / "run", "--steps 1 --freeze vision")
    state = torch.load(tmp_path / "run" / "checkpoint-1" / "trainer.pt", weights_only=True)
    names = state["optimizer"]["param_groups"][0]["params"]
    trained = {name.split(".")[1] for name in names if name.startswith("model.")}
    assert {"aligner", "generation_head", "language_model"} <= trained
    assert not trained & {"vision_model", "vqmodel"}


# ---------------------------------------------------------------- resume


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(warm, data, straight, tmp_path):
    out = tmp_path / "run"
    train(warm, data, out, "--steps 2")
    # a kill in step 3, after the checkpoint
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    with open(out / "samples.txt", "a") as file:
        file.write("=== step 3  lost\n")
    (out / "samples" / "step-3.png").write_bytes(b"half an image")

    assert "resumed from" in train(warm, data, out, "--steps 3")
    assert distance(weights(out, 3), weights(straight, 3)) == 0
    assert metrics(out) == metrics(straight)
    assert (out / "samples.txt").read_text() == (straight / "samples.txt").read_text()
    assert drawings(out) == drawings(straight)


def test_a_resume_with_another_share_of_drawings_is_refused_in_one_line(warm, data, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as error:
        train(warm, data, straight, "--steps 4 --draw-share 1")
    message = str(error.value)
    assert "belongs to another run" in message and "draw_share was 0.5, is 1.0" in message
    assert message.startswith("error: ") and "\n" not in message
    assert "reused" in train(warm, data, straight, "--steps 3")
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_no_resume_starts_over_and_leaves_no_drawing_of_the_run_before(warm, data, tmp_path):
    out = tmp_path / "run"
    train(warm, data, out, "--steps 2")
    before = drawings(out)
    printed = train(warm, data, out, "--steps 1 --seed 5 --no-resume")
    assert "steps 1 to 1" in printed and "resumed" not in printed
    assert [record["step"] for record in metrics(out)] == [1]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (out / "samples.txt").read_text().count("=== step") == 2  # one per task
    after = drawings(out)
    assert after["step-1.png"] != before["step-1.png"]
    assert after.keys() == {"step-1.png"}
