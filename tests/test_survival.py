"""The real scripts, killed at every kind of moment, on a full disk, interrupted, short of a rank, not finite.

Each process is forked off a server that has the imports behind it, so that a kill costs a second, not a start of Python.
Traps run in the child before main(). The one of most tests kills it right before a chosen change to the file system.
"""
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import picture

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("forkserver")
SCRIPTS = ("grpo_train", "evaluate", "score_dependency", "build_masks", "reward")
TIMED = ("rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second")
TRAIN = ["--prompts-per-step", 3, "--group-size", 4, "--max-new-tokens", 24, "--lr", "1e-3", "--w-visual", 0, "--temperature", 1.5,
         "--log-every", 100, "--sample-every", 1, "--save-every", 2, "--keep", 1]


# ------------------------------------------------------------------- children


def child(stage, arguments, log, trap, env):
    os.environ.update(env, TQDM_DISABLE="1")
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)             # ignored where a shell runs the tests in the background
    sys.argv = [stage, *map(str, arguments)]
    module = importlib.import_module(stage)
    if trap:
        trap()
    module.cli(module.main)


def die(event, path, count=1):
    """SIGKILL of oneself right before the count-th `event` of the file system whose path ends in `path`, a pattern."""
    left = [count]

    def hook(name, arguments):
        if name == event and re.search(f"{path}$", str(arguments[0])) and (
                name != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def shrink_disk(size):
    """No file may grow beyond `size` bytes: a write beyond fails, as on a full disk (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def spoil(calls, rank="0", log=None):
    """grpo_terms() of one rank returns NaN at the calls {number: "loss"}, or at {number: "gradient"} an infinite gradient;
    log: also writes a hash of the weights before every pass to LOG.RANK."""
    import grpo_train
    real, forward, count = grpo_train.grpo_terms, grpo_train.Policy.forward, [0]

    def terms(logps, *more):
        count[0] += 1
        kind = calls.get(count[0], calls.get("all")) if os.environ.get("RANK", "0") == rank else None
        made = real(logps, *more)
        wrong = {"loss": made[0] * float("nan"), None: made[0],
                 "gradient": made[0] + (logps - logps.detach()).sqrt()}                             # its value is 0, its slope inf
        return wrong[kind], *made[1:]

    def hashed(self, *more, **named):
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.parameters())).hexdigest()
        with open(f"{log}.{os.environ.get('RANK', '0')}", "a") as f:
            f.write(digest + "\n")
        return forward(self, *more, **named)
    grpo_train.grpo_terms = terms
    if log:
        grpo_train.Policy.forward = hashed


def raise_at(call, rank):
    """fail() on one rank at the call-th grpo_terms()."""
    import grpo_train
    real, count = grpo_train.grpo_terms, [0]

    def terms(*arguments):
        count[0] += 1
        if count[0] == call and os.environ["RANK"] == rank:
            grpo_train.fail("the cause")
        return real(*arguments)
    grpo_train.grpo_terms = terms


def become_agent(pid_file):
    """Forks: the child goes on to main(), the parent waits like torchrun."""
    if pid := os.fork():
        pid_file.write_text(str(pid))
        time.sleep(1000)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(stage, arguments, trap, env) -> (process, log): started, and killed at the end of the tests if it still lives."""
    folder, started = tmp_path_factory.mktemp("logs"), []
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))                # the server imports at its start
        m.setenv("OMP_NUM_THREADS", "1")
        FORK.set_forkserver_preload([*SCRIPTS, "test_survival"])

        def run(stage, arguments, trap=None, **env):
            log = folder / f"{len(started)}.txt"
            process = FORK.Process(target=child, args=(stage, arguments, log, trap, env), daemon=True)
            process.start()
            started.append(process)
            return process, log
        yield run
    for process in started:
        process.kill()
        process.join()


def ended(process, log, within=60):
    """(exit code, output) of a child, -9 for a kill; a child that does not end fails the test."""
    process.join(within)
    output = log.read_text() if log.exists() else ""
    assert process.exitcode is not None, f"still running after {within} s: {output}"
    return process.exitcode, output


@pytest.fixture(scope="module")
def run(launch):
    """run(stage, arguments, trap) -> (exit code, output)."""
    return lambda *arguments, **env: ended(*launch(*arguments, **env))


@pytest.fixture(scope="module")
def pair(launch):
    """pair(stage, arguments, traps of the two ranks) -> [(exit code, output), ...]."""
    def run(stage, arguments, *traps, **env):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
        traps = traps or (None, None)
        ranks = [launch(stage, arguments, trap, RANK=str(r), LOCAL_RANK=str(r), **env) for r, trap in enumerate(traps)]
        return [ended(*rank) for rank in ranks]
    return run


def until(condition, within=60):
    end = time.time() + within
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------- what runs leave


def left_by(out):
    """What must be equal: everything in the folder of a run, but wall-clock times and the bytes of torch's zip format."""
    left = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file()):
        if path.name == "tokenizer_config.json":                # a tokenizer that was used keeps how, when it is saved again
            left[str(path.relative_to(out))] = None
        elif path.name == "metrics.jsonl":
            left[path.name] = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in path.open()]
        elif path.name.endswith("run.json"):
            left[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.name == "trainer.pt":
            left[str(path.relative_to(out))] = torch.load(path, weights_only=True)
        else:
            left[str(path.relative_to(out))] = path.read_bytes()
    return left


def assert_same(one, two):
    one, two = left_by(one), left_by(two)
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("trainer.pt"):
            a, b = (x[name]["optimizer"] for x in (one, two))
            assert a["state"].keys() == b["state"].keys() != set() and a["param_groups"] == b["param_groups"]
            assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i]), name
        else:
            assert one[name] == two[name] or str(one[name]) == str(two[name]), name               # NaN is not NaN


def assert_one_line(output, *parts):
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output and all(part in errors[0] for part in parts), output


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoint):
    """A folder with six pictures, captions.jsonl and masks.jsonl."""
    folder, captions, masks = tmp_path_factory.mktemp("world"), [], []
    for i in range(6):
        picture(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
        captions.append({"id": str(i), "image": f"{i}.png", "caption": f"A red café {i}. A blue star is above it."})
        masks.append({"id": str(i), "image": f"{i}.png", "masked_caption": "There is a [MASK] here.", "start": 11, "end": 16,
                      "sentence": "There is a [MASK] here.", "answer": "thing"})
    captions[2]["image"] = "missing.png"
    for name, rows in (("captions", captions), ("masks", masks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def warm(world, checkpoint, run, tmp_path_factory):
    """A checkpoint that imitation has taught the format, as a random one never earns a reward."""
    out = tmp_path_factory.mktemp("warm")
    code, output = run("grpo_train", ["--model", checkpoint("idefics3"), "--data", world / "masks.jsonl", "--out", out, *TRAIN,
                                      "--objective", "sft", "--steps", 40, "--lr", "3e-3", "--save-every", 40])
    assert code == 0, output
    return out / "checkpoint-40"


@pytest.fixture(scope="module")
def training(warm, world):
    """training(out, *more) -> the arguments of a run of six steps."""
    return lambda out, *more: ["--model", warm, "--data", world / "masks.jsonl", "--out", out, *TRAIN, "--steps", 6, *more]


@pytest.fixture(scope="module")
def straight(training, run, tmp_path_factory):
    """The run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("train") / "straight"
    code, output = run("grpo_train", training(out))
    assert code == 0, output
    return out


# ------------------------------------------------------------------- kill -9


MOMENTS = [("os.rename", "run.json.tmp"),                      # the settings are not there yet
           ("open", "metrics.jsonl", 2), ("open", "samples.txt", 2),       # in step 2
           ("os.mkdir", "checkpoint.tmp"), ("open", "checkpoint.tmp/tokenizer_config.json"), ("os.rename", "checkpoint.tmp"),
           ("os.rename", "metrics.jsonl.tmp"), ("os.rename", "samples.txt.tmp"),        # while the logs are cut
           ("os.rename", "checkpoint-2"),                      # checkpoint-4 is there, and one too many
           ("os.remove", "", 3),                               # half of checkpoint-2 is deleted
           ("open", "samples.txt", 2)]                         # in step 6


def test_training_killed_at_eleven_moments_ends_as_if_it_never_was(training, run, straight, warm, tmp_path):
    for moment in MOMENTS:
        code, output = run("grpo_train", training(tmp_path / "run"), functools.partial(die, *moment))
        assert code == -signal.SIGKILL, (moment, output)
        for path in (tmp_path / "run").glob("checkpoint-*"):
            assert len(load_file(path / "model.safetensors")) and torch.load(path / "trainer.pt", weights_only=True)["step"], path
    code, output = run("grpo_train", training(tmp_path / "run"))
    assert code == 0 and "resumed from" in output and "checkpoint-4" in output, output
    assert_same(tmp_path / "run", straight)
    assert [p.name for p in straight.glob("checkpoint*")] == ["checkpoint-6"]                    # --keep 1, nothing left over
    before, after = load_file(warm / "model.safetensors"), load_file(straight / "checkpoint-6" / "model.safetensors")
    assert any((before[k] != after[k]).any() for k in before)


def test_training_killed_from_outside_at_any_time_ends_as_if_it_never_was(training, run, launch, straight, tmp_path):
    clock, began = random.Random(0), time.time()
    run("grpo_train", training(tmp_path / "timed"))
    took = time.time() - began
    for _ in range(4):
        process, log = launch("grpo_train", training(tmp_path / "run"))
        process.join(clock.uniform(0.1, 0.7) * took)
        process.kill()
        ended(process, log)
    code, output = run("grpo_train", training(tmp_path / "run"))
    assert code == 0, output
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize("stage", ["score_dependency", "build_masks", "evaluate", "reward"])
def test_a_stage_killed_between_any_two_writes_gives_the_same_files(stage, run, world, checkpoint, tmp_path):
    model, masks = ["--model", checkpoint("idefics3")], world / "masks.jsonl"

    def arguments(out):
        return {"score_dependency": [*model, "--data", world / "captions.jsonl", "--batch-size", 2, "--out", out / "file"],
                "build_masks": ["--scores", tmp_path / "scores", "--threshold", "mean", "--out", out / "file"],
                "evaluate": [*model, "--data", masks, "--w-visual", 0, "--batch-size", 2, "--max-new-tokens", 4, "--out", out],
                "reward": ["--predictions", tmp_path / "predictions", "--image-root", world, "--w-visual", 0, "--batch-size", 4,
                           "--out", out / "file"]}[stage]
    if stage == "build_masks":
        with open(tmp_path / "scores", "w") as f:                                                 # three batches
            for i in range(150):
                words = [{"start": a, "end": b, "score": c, "own": 0.5} for a, b, c in ((0, 1, i * 7 % 10 / 10), (2, 5, 0.5))]
                sentence = {"text": "A cat.", "start": 0, "end": 6, "score": i % 10 / 10, "words": words}
                f.write(json.dumps({"id": str(i), "image": "0.png", "caption": "A cat.", "sentences": [sentence]}) + "\n")
    if stage == "reward":
        rows = [{**json.loads(line), "prediction": f"<think>.</think><answer>thing {n}</answer>"} for n, line in
                enumerate(list(masks.open()) * 2)]
        (tmp_path / "predictions").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, output = run(stage, arguments(tmp_path / "straight"))
    assert code == 0, output
    whole = "(file|predictions.jsonl).tmp"
    moments = [("os.rename", "run.json.tmp"), *(("open", ".part", n) for n in (1, 2, 3, 3)),
               ("os.rename", "run.json.tmp", 2), ("open", whole), ("os.rename", whole), ("os.remove", ".part")]
    moments += [("os.rename", "results.json.tmp")] * (stage == "evaluate")
    for moment in moments:
        code, output = run(stage, arguments(tmp_path / "killed"), functools.partial(die, *moment))
        assert code == -signal.SIGKILL, (moment, output)
    code, output = run(stage, arguments(tmp_path / "killed"))
    assert code == 0 and "reused" in output, output
    assert_same(tmp_path / "killed", tmp_path / "straight")


# ------------------------------------------------------------------- a full disk, Ctrl-C


def test_a_full_disk_ends_training_in_one_line_and_spares_the_checkpoint(training, run, straight, tmp_path):
    out = tmp_path / "run"
    sizes = {p.name: p.stat().st_size for p in (*straight.glob("*.*"), *(straight / "checkpoint-6").iterdir())}
    assert 400 < sizes["run.json"] < sizes["metrics.jsonl"] // 2 and sizes["model.safetensors"] < sizes["trainer.pt"]
    for size, name, every in ((400, "run.json", 2), (sizes["metrics.jsonl"] // 2, "(metrics.jsonl|samples.txt)", 100),
                              (sizes["model.safetensors"] // 2, "checkpoint-2", 2)):
        code, output = run("grpo_train", training(out, "--save-every", every), functools.partial(shrink_disk, size))
        assert code == 1 and re.search(f"error: {out}/{name}", output), (size, output)
        assert_one_line(output, "same command goes on")
        assert not list(out.glob("checkpoint*"))
    run("grpo_train", training(out), functools.partial(die, "os.rename", "checkpoint-2"))          # leaves 2 and 4
    whole = load_file(out / "checkpoint-4" / "model.safetensors")
    code, output = run("grpo_train", training(out), functools.partial(shrink_disk, sizes["trainer.pt"] - 10_000))
    assert code == 1, output
    assert_one_line(output, f"{out}/checkpoint-6 cannot be written", "same command goes on")
    assert [p.name for p in out.glob("checkpoint*")] == ["checkpoint-4"]
    assert all(torch.equal(v, whole[k]) for k, v in load_file(out / "checkpoint-4" / "model.safetensors").items())
    assert run("grpo_train", training(out))[0] == 0
    assert_same(out, straight)


def test_a_full_disk_ends_a_stage_in_one_line_that_names_the_file(run, world, checkpoint, tmp_path):
    def arguments(name):
        return ["--model", checkpoint("idefics3"), "--data", world / "captions.jsonl", "--batch-size", 2,
                "--out", tmp_path / name / "file"]
    assert run("score_dependency", arguments("straight"))[0] == 0
    code, output = run("score_dependency", arguments("full"), functools.partial(shrink_disk, 1000))
    assert code == 1 and (tmp_path / "full" / "file.part").stat().st_size == 1000, output           # a torn line
    assert_one_line(output, str(tmp_path / "full" / "file.part"), "same command goes on")
    assert run("score_dependency", arguments("full"))[0] == 0
    assert_same(tmp_path / "full", tmp_path / "straight")


def test_control_c_is_one_line(training, launch, tmp_path):
    process, log = launch("grpo_train", training(tmp_path / "run", "--steps", 10**6, "--save-every", 10**6))
    until((tmp_path / "run" / "metrics.jsonl").exists)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").stat().st_size)
    os.kill(process.pid, signal.SIGINT)
    code, output = ended(process, log)
    assert code == 1, output
    assert_one_line(output, "interrupted; the same command goes on")


def test_checkpoints_of_an_unknown_run_are_not_resumed_and_keep_is_at_least_one(training, run, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-5.bak").mkdir()                                                # no checkpoint of ours
    (tmp_path / "run" / "run.json").unlink()
    code, output = run("grpo_train", training(tmp_path / "run"))
    assert code == 1
    assert_one_line(output, "no run.json", "choose another --out")
    shutil.copy(straight / "run.json", tmp_path / "run")
    assert run("grpo_train", training(tmp_path / "run", "--keep", 0, "--steps", 7))[0] == 2
    code, output = run("grpo_train", training(tmp_path / "run", "--steps", 7))
    assert code == 0 and sorted(p.name for p in (tmp_path / "run").glob("checkpoint*")) == ["checkpoint-5.bak", "checkpoint-7"], output


# ------------------------------------------------------------------- ranks


def test_two_scoring_ranks_one_of_them_killed_end_soon_and_go_on_to_the_same_bytes(pair, world, checkpoint, tmp_path):
    def arguments(name):
        return ["--model", checkpoint("idefics3"), "--data", world / "captions.jsonl", "--batch-size", 1,
                "--out", tmp_path / name / "file"]
    assert [code for code, _ in pair("score_dependency", arguments("straight"))] == [0, 0]
    for moment in (("open", ".part", 4), ("os.rename", "file.tmp")):
        (killed, _), (code, output) = pair("score_dependency", arguments("killed"), functools.partial(die, *moment), None)
        assert killed == -signal.SIGKILL and code == 1, output
        assert_one_line(output, "rank 1: another rank ended")
    assert [code for code, _ in pair("score_dependency", arguments("killed"))] == [0, 0]
    assert_same(tmp_path / "killed", tmp_path / "straight")


def test_a_rank_that_fails_ends_the_other_and_its_message_stands_out(pair, training, tmp_path):
    trap = functools.partial(raise_at, 2, "1")
    began = time.time()
    (code, output), (other, cause) = pair("grpo_train", training(tmp_path / "run"), trap, trap,
                                          TORCHELASTIC_ERROR_FILE=str(tmp_path / "error"))
    assert code == other == 1 and time.time() - began < 60
    assert_one_line(output, "rank 0: another rank ended; its message says why")
    assert_one_line(cause, "the cause")


DRIVER = """
import functools, os, sys
sys.path[:0] = {paths}
import grpo_train, test_survival
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_survival.{trap}
grpo_train.cli(grpo_train.main)
"""


def test_torchrun_resumes_by_itself_when_a_rank_was_killed_also_with_no_resume(pair, training, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(paths=[str(ROOT), str(ROOT / "tests")],
                                                      trap="die('os.rename', 'checkpoint.tmp', 2)"))
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                          tmp_path / "driver.py", *map(str, training(tmp_path / "run", "--no-resume"))], timeout=120, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and "exitcode: -9" in run.stdout, run.stdout
    assert "resumed from" in run.stdout and "checkpoint-2" in run.stdout, run.stdout
    assert [code for code, _ in pair("grpo_train", training(tmp_path / "straight"))] == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_no_rank_lives_on_when_torchrun_itself_is_killed(training, launch, tmp_path):
    agent, _ = launch("grpo_train", training(tmp_path / "run", "--steps", 10**6, "--save-every", 10**6),
                      functools.partial(become_agent, tmp_path / "pid"), TORCHELASTIC_RUN_ID="none")
    until((tmp_path / "run" / "metrics.jsonl").exists)
    rank = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert rank.exists() and rank.read_text().split()[3] == str(agent.pid)
    agent.kill()
    until(lambda: not rank.exists() or ") Z " in rank.read_text())


# ------------------------------------------------------------------- not finite


def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_on_both_and_counted(pair, training, tmp_path):
    out, trap = tmp_path / "run", functools.partial(spoil, {2: "loss", 3: "gradient"}, "1", tmp_path / "hash")
    more = ("--steps", 5)
    ranks = pair("grpo_train", training(out, *more), trap, trap)
    assert [code for code, _ in ranks] == [0, 0] and "2 updates skipped" in ranks[0][1], ranks
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [r["skipped_update"] for r in rows] == [0, 1, 1, 0, 0]
    assert [abs(r["loss"]) < 1e9 for r in rows] == [True, False, True, True, True]
    assert [abs(r["grad_norm"]) < 1e9 for r in rows] == [True, False, False, True, True]
    zero, one = ((tmp_path / f"hash.{r}").read_text().split()[-5:] for r in (0, 1))                # before steps 1 to 5
    assert zero == one and zero[1] == zero[2] == zero[3] and len(set(zero)) == 3
    ranks = pair("grpo_train", training(out, "--steps", 6))                                      # a resumed run counts on
    assert "2 updates skipped" in ranks[0][1], ranks


def test_ten_such_steps_in_a_row_end_the_run_and_a_resumed_one_at_the_same_step(training, run, warm, tmp_path):
    trap, more = functools.partial(spoil, {"all": "loss"}), ("--steps", 30, "--save-every", 5)
    for name in ("run", "run"):
        code, output = run("grpo_train", training(tmp_path / name, *more), trap)
        assert code == 1, output
        assert_one_line(output, "ten steps in a row, the last of them 10", "metrics.jsonl", "samples.txt", "lower --lr")
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        assert [(r["step"], r["skipped_update"]) for r in rows] == [(n, 1) for n in range(1, 11)]
        assert [p.name for p in (tmp_path / name).glob("checkpoint*")] == ["checkpoint-5"]
        kept, start = (load_file(p / "model.safetensors") for p in (tmp_path / name / "checkpoint-5", warm))
        assert all(torch.equal(kept[k], start[k]) for k in start)
