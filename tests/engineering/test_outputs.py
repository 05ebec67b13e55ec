"""Whose output is it? One process writes it at a time, and a run goes on only from what it read."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inputs import assert_one_line, read, scored, write
from tiny import random_image

import build_masks
import common.locks
import evaluate
import grpo_train
import lvrpo.evaluate
import lvrpo.train
import score_dependency
import toy_world
from common.records import fingerprint

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """import sys
import common.locks
from common.locks import lock_output, release_outputs
common.locks.PATIENCE = float(sys.argv[2])
lock_output(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
release_outputs()
"""


@pytest.fixture
def hold():
    """hold(path) -> a process that holds the lock of an output until its standard input closes."""
    started = []

    def start(path):
        command = [sys.executable, "-c", HOLDER, str(path), "0"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- locks

MASK = {"id": "0", "image": "0.png", "masked_caption": "A [MASK].", "sentence": "A [MASK]."}
QUESTION = "index\timage\tquestion\tA\tB\tanswer\n1\t0\tWhich?\tone\ttwo\tA\n"
# of a run: the script, the file that is locked in OUT, and its flags besides --out
RUNS = {
    "score": (score_dependency, "", ["--model", "none", "--data", "captions.jsonl"]),
    "masks": (build_masks, "", ["--scores", "scores.jsonl"]),
    "train": (grpo_train, "run.json", ["--model", "none", "--data", "masks.jsonl"]),
    "start over": (
        grpo_train,
        "run.json",
        ["--model", "none", "--data", "masks.jsonl", "--no-resume"],
    ),
    "evaluate": (evaluate, "predictions.jsonl", ["--model", "none", "--data", "masks.jsonl"]),
    "benchmark": (evaluate, "predictions.jsonl", ["--model", "none", "--data", "val.tsv"]),
    "draw": (lvrpo.evaluate, "drawings.jsonl", ["--model", "none", "--prompts", "prompts.jsonl"]),
    "lvrpo": (lvrpo.train, "run.json", ["--model", "none", "--data", "masks.jsonl"]),
    "toy": (toy_world, "world.json", ["--small"]),
    "toy of lvrpo": (toy_world, "world.json", ["--small", "--lvrpo"]),
    "study": (toy_world, "run.json", ["--study", "--small"]),
    "piece": (toy_world, "base", ["--piece", "base", "3"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_second_run_is_refused_in_one_line_that_names_the_first(
    name, stage, hold, tmp_path, monkeypatch
):
    module, locked, flags = RUNS[name]
    write(tmp_path / "captions.jsonl", [{"id": "0", "image": "0.png", "caption": "A cat."}])
    write(tmp_path / "scores.jsonl", [scored("Two cats.")])
    write(tmp_path / "masks.jsonl", [{**MASK, "answer": "cat"}])
    write(tmp_path / "prompts.jsonl", [{"id": "0", "prompt": "a cat"}])
    (tmp_path / "val.tsv").write_text(QUESTION)
    if module is lvrpo.train:
        flags = [*flags, "--draw-share", 0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.locks, "PATIENCE", 0)

    process = hold(Path("out", locked).resolve())
    before = sorted(tmp_path.rglob("*"))
    error, _ = stage(module, *flags, "--out", "out")
    assert_one_line(error, "error: out", f"written by process {process.pid} on ", "another --out")
    assert len(error) <= 200
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_that_a_kill_has_left_blocks_nobody_and_nothing_is_left_at_the_end(
    stage, hold, tmp_path
):
    scores = write(tmp_path / "scores.jsonl", [scored("Two cats.")])
    process = hold(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    error, _ = stage(build_masks, "--scores", scores, "--out", tmp_path / "out")
    assert error is None and len(read(tmp_path / "out")) == 1
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_waits_for_one_that_is_about_to_end_and_has_its_lock_to_itself(hold, tmp_path):
    """The lock file of the first is deleted while the second waits for it."""
    out = tmp_path / "out"
    first = hold(out)
    command = [sys.executable, "-c", HOLDER, str(out)]
    pipe = subprocess.PIPE
    second = subprocess.Popen([*command, "60"], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    time.sleep(0.5)
    first.communicate()
    assert second.stdout.readline() == "held\n"
    third = subprocess.run([*command, "0"], capture_output=True, text=True, cwd=ROOT)
    assert third.returncode == 1 and f"process {second.pid} on" in third.stderr, third.stderr
    second.communicate()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_named_and_used(stage, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    scores = write(tmp_path / "scores.jsonl", [scored("Two cats.")])
    error, printed = stage(build_masks, "--scores", scores, "--out", tmp_path / "out")
    assert error is None and len(read(tmp_path / "out")) == 1
    assert f"{tmp_path}/out: this file system has no locks" in printed
    assert not list(tmp_path.glob("*.lock"))


# ---------------------------------------------------------------- what a run has read


def replace_byte(path, place):
    """Changes one byte of a file; its size and its times stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 1, 3 * 2**19, 3 * 2**20 - 1])
def test_any_byte_of_any_file_of_a_checkpoint_is_part_of_its_fingerprint(place, tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(os.urandom(3 * 2**20))
    (tmp_path / "trainer.pt").write_bytes(b"for a resume only")
    before = fingerprint(tmp_path)
    replace_byte(tmp_path / "trainer.pt", 0)
    assert fingerprint(tmp_path) == before
    replace_byte(tmp_path / "model-1.safetensors", place)
    assert fingerprint(tmp_path) != before


def test_other_weights_in_the_same_folder_are_not_those_that_were_scored(
    stage, checkpoint, tmp_path
):
    model = shutil.copytree(checkpoint("idefics3"), tmp_path / "model")
    random_image(0, (40, 40)).save(tmp_path / "0.png")
    data = write(tmp_path / "data.jsonl", [{"id": "0", "image": "0.png", "caption": "A cat."}])
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out"]
    assert stage(score_dependency, *arguments)[0] is None
    error, printed = stage(score_dependency, *arguments)
    assert error is None and "reused" in printed

    weights = model / "model.safetensors"
    replace_byte(weights, weights.stat().st_size // 2)
    before = (tmp_path / "out").read_bytes()
    error, _ = stage(score_dependency, *arguments)
    assert_one_line(error, "belongs to another run (model was ", "choose another --out")
    assert (tmp_path / "out").read_bytes() == before
