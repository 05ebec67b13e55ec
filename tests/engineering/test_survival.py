"""The real scripts, killed at every kind of moment, on a full disk, interrupted, short of a rank,
not finite.

Each process is forked off a server that has done the imports, so that a kill costs a second, not a
start of Python. Traps run in the child before main(). That of most tests kills the child right
before a chosen change to the file system.
"""

import functools
import hashlib
import importlib
import json
import multiprocessing.util
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
from inputs import scored, shares, write
from safetensors.torch import load_file
from tiny import random_image
from torch.distributed.tensor import DTensor

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PATHS = [str(ROOT), str(TESTS), str(TESTS / "engineering")]
FORK = multiprocessing.get_context("forkserver")
SCRIPTS = ("grpo_train", "evaluate", "score_dependency", "build_masks")
TIMED = ("rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second")
TRAIN = [
    *("--prompts-per-step", 3, "--group-size", 4, "--max-new-tokens", 24, "--lr", "1e-3"),
    *("--reward", "semantic=1", "--temperature", 1.5, "--log-every", 100, "--sample-every", 1),
    *("--save-every", 2, "--keep", 1),
]
LONG = ("--steps", 10**6, "--save-every", 10**6)


# ------------------------------------------------------------------- children


def child(stage, arguments, log, trap, env):
    os.environ.update(env, TQDM_DISABLE="1")
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    torch.set_num_threads(1)
    # which is ignored where a shell runs the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [stage, *map(str, arguments)]
    module = importlib.import_module(stage)
    if trap:
        trap()
    module.run_script(module.main)


def die(event, path, count=1):
    """SIGKILL of oneself right before the count-th `event` of the file system whose path ends in
    `path`, a pattern."""
    left = [count]

    def hook(name, arguments):
        if name != event or not re.search(f"{path}$", str(arguments[0])):
            return
        if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def shrink_disk(size):
    """No file may grow beyond `size` bytes: a write beyond fails, as on a full disk.

    Python ignores SIGXFSZ.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def spoil(calls, rank="0", log=None):
    """grpo_objective() of one rank returns NaN at the calls {number: "loss"}, or at {number:
    "gradient"} what has an infinite gradient. log: also writes a hash of the weights before every
    pass to LOG.RANK."""
    import grpo_train
    from common.policy import Policy

    real = grpo_train.grpo_objective
    forward = Policy.forward
    count = [0]

    def spoiled_objective(logps, *more):
        count[0] += 1
        objective, *others = real(logps, *more)
        if os.environ.get("RANK", "0") != rank:
            return objective, *others
        kind = calls.get(count[0], calls.get("all"))
        if kind == "loss":
            objective = objective * float("nan")
        if kind == "gradient":
            # the value is 0, the slope infinite
            objective = objective + (logps - logps.detach()).sqrt()
        return objective, *others

    def hashed(self, *more, **named):
        # of copies: a numpy array would hold on to memory that sharding frees
        shares = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters()]
        weights = b"".join(share.detach().clone().numpy().tobytes() for share in shares)
        with open(f"{log}.{os.environ.get('RANK', '0')}", "a") as f:
            f.write(hashlib.sha256(weights).hexdigest() + "\n")
        return forward(self, *more, **named)

    grpo_train.grpo_objective = spoiled_objective
    if log:
        Policy.forward = hashed


def raise_at(call, rank):
    """fail() on one rank at the call-th grpo_objective()."""
    import grpo_train

    real = grpo_train.grpo_objective
    count = [0]

    def objective(*arguments):
        count[0] += 1
        if count[0] == call and os.environ["RANK"] == rank:
            grpo_train.fail("the cause")
        return real(*arguments)

    grpo_train.grpo_objective = objective


def become_agent(pid_file):
    """Forks: the child goes on to main(), the parent waits like torchrun."""
    if pid := os.fork():
        pid_file.write_text(str(pid))
        time.sleep(1000)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(stage, arguments, trap, env) -> (process, log): started, and killed at the end of the
    tests if it still lives."""
    folder = tmp_path_factory.mktemp("logs")
    started = []
    with pytest.MonkeyPatch.context() as m:
        # the server imports at its start
        m.setenv("PYTHONPATH", os.pathsep.join(PATHS))
        m.setenv("OMP_NUM_THREADS", "1")
        FORK.set_forkserver_preload([*SCRIPTS, "test_survival"])

        def run(stage, arguments, trap=None, **env):
            log = folder / f"{len(started)}.txt"
            arguments = (stage, arguments, log, trap, env)
            process = FORK.Process(target=child, args=arguments, daemon=True)
            process.start()
            started.append(process)
            return process, log

        yield run
    for process in started:
        process.kill()
        process.join()


def ended(process, log, within=60):
    """(exit code, output) of a child, -9 for a kill; one that does not end fails the test."""
    process.join(within)
    output = log.read_text() if log.exists() else ""
    assert process.exitcode is not None, f"still running after {within} s: {output}"
    return process.exitcode, output


@pytest.fixture(scope="module")
def run(launch):
    """run(stage, arguments, trap) -> (exit code, output)."""

    def run_to_end(*arguments, **env):
        return ended(*launch(*arguments, **env))

    return run_to_end


@pytest.fixture(scope="module")
def pair(launch):
    """pair(stage, arguments, traps of the two ranks) -> [(exit code, output), ...]."""

    def run(stage, arguments, *traps, **env):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        ranks = []
        for rank, trap in enumerate(traps or (None, None)):
            rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank), **env}
            ranks.append(launch(stage, arguments, trap, **rank_env))
        return [ended(*rank) for rank in ranks]

    return run


def until(condition, within=60):
    end = time.time() + within
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------- what runs leave


def metrics_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


def without(record, names):
    return {name: value for name, value in record.items() if name not in names}


def content_of(path):
    """What must be equal of a file: not wall-clock times, nor the bytes of torch's zip format."""
    # a tokenizer that was used keeps how, when it is saved again; curves that are drawn while a
    # kill comes may be those of the checkpoint before
    if path.name in ("tokenizer_config.json", "curves.png"):
        return None
    if path.name == "metrics.jsonl":
        return [without(metrics, TIMED) for metrics in metrics_of(path.parent)]
    if path.name.endswith("run.json"):
        return without(json.loads(path.read_text()), ["seconds", "flags"])
    if path.name == "trainer.pt":
        return torch.load(path, weights_only=True)
    return path.read_bytes()


def left_by(out):
    """{path: content} of everything in the folder of a run."""
    files = sorted(path for path in Path(out).rglob("*") if path.is_file())
    return {str(path.relative_to(out)): content_of(path) for path in files}


def assert_same(one, two):
    one = left_by(one)
    two = left_by(two)
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("trainer.pt"):
            assert_same_optimizer(one[name]["optimizer"], two[name]["optimizer"])
        else:
            # NaN is not NaN
            assert one[name] == two[name] or str(one[name]) == str(two[name]), name


def assert_same_optimizer(one, two):
    assert one["state"].keys() == two["state"].keys() != set()
    assert one["param_groups"] == two["param_groups"]
    for index, moments in one["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, two["state"][index][name]), (index, name)


def assert_one_line(output, *parts):
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    assert all(part in errors[0] for part in parts), output


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoint):
    """A folder with six images, captions.jsonl and masks.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    captions = []
    masks = []
    text = "There is a [MASK] here."
    for i in range(6):
        random_image(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
        record = {"id": str(i), "image": f"{i}.png"}
        captions.append({**record, "caption": f"A red café {i}. A blue star is above it."})
        place = {"start": 11, "end": 16, "sentence": text, "answer": "thing"}
        masks.append({**record, "masked_caption": text, **place})
    captions[2]["image"] = "missing.png"
    for name, records in (("captions", captions), ("masks", masks)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def warm(world, checkpoint, run, tmp_path_factory):
    """A checkpoint that imitation has taught the format, as a random one never earns a reward."""
    out = tmp_path_factory.mktemp("warm")
    arguments = ["--model", checkpoint("idefics3"), "--data", world / "masks.jsonl", "--out", out]
    arguments += [*TRAIN, "--objective", "sft", "--steps", 40, "--lr", "3e-3", "--save-every", 40]
    code, output = run("grpo_train", arguments)
    assert code == 0, output
    return out / "checkpoint-40"


@pytest.fixture(scope="module")
def training(warm, world):
    """training(out, *more) -> the arguments of a run of six steps."""

    def arguments(out, *more):
        paths = ["--model", warm, "--data", world / "masks.jsonl", "--out", out]
        return [*paths, *TRAIN, "--steps", 6, *more]

    return arguments


@pytest.fixture(scope="module")
def straight(training, run, tmp_path_factory):
    """The run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("train") / "straight"
    code, output = run("grpo_train", training(out))
    assert code == 0, output
    return out


# ------------------------------------------------------------------- kill -9


MOMENTS = [
    ("os.rename", "run.json.tmp"),  # the settings are not there yet
    # in step 2
    ("open", "metrics.jsonl", 2),
    ("open", "samples.txt", 2),
    ("os.mkdir", "checkpoint.tmp"),
    ("open", "checkpoint.tmp/tokenizer_config.json"),
    ("os.rename", "checkpoint.tmp"),
    # while the logs are cut
    ("os.rename", "metrics.jsonl.tmp"),
    ("os.rename", "samples.txt.tmp"),
    ("os.rename", "checkpoint-2"),  # checkpoint-4 is there, and one too many
    ("os.remove", "", 3),  # half of checkpoint-2 is deleted
    ("open", "samples.txt", 2),  # in step 6
]


def test_training_killed_at_eleven_moments_ends_as_if_it_never_was(
    training, run, straight, warm, tmp_path
):
    out = tmp_path / "run"
    for moment in MOMENTS:
        code, output = run("grpo_train", training(out), functools.partial(die, *moment))
        assert code == -signal.SIGKILL, (moment, output)
        for path in out.glob("checkpoint-*"):
            assert load_file(path / "model.safetensors"), path
            assert torch.load(path / "trainer.pt", weights_only=True)["step"], path
    code, output = run("grpo_train", training(out))
    assert code == 0 and "resumed from" in output and "checkpoint-4" in output, output
    assert_same(out, straight)
    # --keep 1, nothing left over
    assert [p.name for p in straight.glob("checkpoint*")] == ["checkpoint-6"]

    before = load_file(warm / "model.safetensors")
    after = load_file(straight / "checkpoint-6" / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)


def test_training_killed_from_outside_at_any_time_ends_as_if_it_never_was(
    training, run, launch, straight, tmp_path
):
    clock = random.Random(0)
    began = time.time()
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


def write_scores(path):
    """150 scored captions: three batches of build_masks.py."""
    records = []
    for i in range(150):
        record = scored("A cat.", (i * 7 % 10 / 10, 0.5), **shares(i % 10 / 10))
        records.append({**record, "id": str(i)})
    write(path, records)


@pytest.mark.parametrize("stage", ["score_dependency", "build_masks", "evaluate"])
def test_a_stage_killed_between_any_two_writes_gives_the_same_files(
    stage, run, world, checkpoint, tmp_path
):
    write_scores(tmp_path / "scores")
    model = ["--model", checkpoint("idefics3"), "--batch-size", 2]
    captions = ["--data", world / "captions.jsonl"]
    masks = ["--data", world / "masks.jsonl", "--max-new-tokens", 4]

    def arguments(out):
        if stage == "score_dependency":
            return [*model, *captions, "--out", out / "file"]
        if stage == "evaluate":
            return [*model, *masks, "--out", out]
        return ["--scores", tmp_path / "scores", "--threshold", "mean", "--out", out / "file"]

    code, output = run(stage, arguments(tmp_path / "straight"))
    assert code == 0, output
    whole = "(file|predictions.jsonl).tmp"
    moments = [("os.rename", "run.json.tmp")]
    moments += [("open", ".part", n) for n in (1, 2, 3, 3)]
    moments += [("os.rename", "run.json.tmp", 2), ("open", whole), ("os.rename", whole)]
    moments.append(("os.remove", ".part"))
    if stage == "evaluate":
        moments.append(("os.rename", "results.json.tmp"))
    if stage != "build_masks":
        moments.append(("os.rename", "(results|file).html.tmp"))
    for moment in moments:
        code, output = run(stage, arguments(tmp_path / "killed"), functools.partial(die, *moment))
        assert code == -signal.SIGKILL, (moment, output)
    code, output = run(stage, arguments(tmp_path / "killed"))
    assert code == 0 and "reused" in output, output
    assert_same(tmp_path / "killed", tmp_path / "straight")


# ------------------------------------------------------------------- a full disk, Ctrl-C


def test_a_full_disk_ends_training_in_one_line_and_spares_the_checkpoint(
    training, run, straight, tmp_path
):
    out = tmp_path / "run"
    files = [*straight.glob("*.*"), *(straight / "checkpoint-6").iterdir()]
    sizes = {path.name: path.stat().st_size for path in files}
    most_logs = sizes["metrics.jsonl"] * 2 // 3
    assert 400 < sizes["run.json"] < most_logs
    assert sizes["model.safetensors"] < sizes["trainer.pt"]

    half_weights = sizes["model.safetensors"] // 2
    disks = [
        (400, "run.json", 2),
        (most_logs, "(metrics.jsonl|samples.txt)", 100),
        (half_weights, "checkpoint-2", 2),
    ]
    for size, name, save_every in disks:
        arguments = training(out, "--save-every", save_every)
        code, output = run("grpo_train", arguments, functools.partial(shrink_disk, size))
        assert code == 1 and re.search(f"error: {out}/{name}", output), (size, output)
        assert_one_line(output, "same command continues")
        assert not list(out.glob("checkpoint*"))

    # leaves 2 and 4
    run("grpo_train", training(out), functools.partial(die, "os.rename", "checkpoint-2"))
    whole = load_file(out / "checkpoint-4" / "model.safetensors")
    disk = functools.partial(shrink_disk, sizes["trainer.pt"] - 10_000)
    code, output = run("grpo_train", training(out), disk)
    assert code == 1, output
    assert_one_line(output, f"{out}/checkpoint-6 cannot be written", "same command continues")
    assert [p.name for p in out.glob("checkpoint*")] == ["checkpoint-4"]
    kept = load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in kept.items())
    assert run("grpo_train", training(out))[0] == 0
    assert_same(out, straight)


def test_a_full_disk_ends_a_stage_in_one_line_that_names_the_file(run, world, checkpoint, tmp_path):
    def arguments(name):
        paths = ["--data", world / "captions.jsonl", "--out", tmp_path / name / "file"]
        return ["--model", checkpoint("idefics3"), *paths, "--batch-size", 2]

    part = tmp_path / "full" / "file.part"
    assert run("score_dependency", arguments("straight"))[0] == 0
    disk = functools.partial(shrink_disk, 1000)
    code, output = run("score_dependency", arguments("full"), disk)
    assert code == 1 and part.stat().st_size == 1000, output  # a torn line
    assert_one_line(output, str(part), "same command continues")
    assert run("score_dependency", arguments("full"))[0] == 0
    assert_same(tmp_path / "full", tmp_path / "straight")


def test_control_c_is_one_line(training, launch, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    process, log = launch("grpo_train", training(tmp_path / "run", *LONG))
    until(metrics.exists)
    until(lambda: metrics.stat().st_size)
    os.kill(process.pid, signal.SIGINT)
    code, output = ended(process, log)
    assert code == 130, output
    assert_one_line(output, "interrupted; the same command continues")


def hang(place, mark):
    """main() waits; so does its end, or the end of the process, as where a thread is waited for."""
    import build_masks

    def main():
        if place == "process":
            multiprocessing.util.Finalize(None, time.sleep, args=[1000], exitpriority=0)
        try:
            mark.touch()
            time.sleep(1000)
        finally:
            if place == "main":
                time.sleep(1000)

    build_masks.main = main


@pytest.mark.parametrize("place", ("main", "process"))
def test_a_second_control_c_waits_for_nothing_and_is_no_traceback_either(place, launch, tmp_path):
    mark = tmp_path / "mark"
    process, log = launch("build_masks", [], functools.partial(hang, place, mark))
    until(mark.exists)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    code, output = ended(process, log)
    assert code == 130, output
    assert_one_line(output, "interrupted; the same command continues")


SCRIPTS_AND_MODULES = [[f"{name}.py"] for name in (*SCRIPTS, "reward", "toy_world")]
SCRIPTS_AND_MODULES += [["-m", "lvrpo.train"], ["-m", "lvrpo.evaluate"]]


@pytest.mark.parametrize("script", SCRIPTS_AND_MODULES, ids=" ".join)
def test_control_c_while_a_script_imports_is_one_line(script):
    process = subprocess.Popen(
        [sys.executable, *script],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # which is ignored where a shell runs the tests in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # torch is being imported
    until(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert_one_line(output, "interrupted; the same command continues")


def test_two_runs_at_once_write_one_output_and_a_kill_lets_the_next_one_in(
    training, launch, run, tmp_path
):
    out = tmp_path / "run"
    first, _ = launch("grpo_train", training(out, *LONG))
    until((out / "metrics.jsonl").exists)
    code, output = run("grpo_train", training(out))
    assert code == 1, output
    assert_one_line(output, f"{out}/run.json is being written by process {first.pid} on")
    # the next one begins while this one dies
    second = launch("grpo_train", training(out, "--steps", 1))
    first.kill()
    code, output = ended(*second)
    assert code == 0, output
    assert [metrics["step"] for metrics in metrics_of(out)] == [1]
    assert not list(out.rglob("*.lock"))


def test_checkpoints_of_an_unknown_run_are_not_resumed_and_keep_is_at_least_one(
    training, run, straight, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "checkpoint-5.bak").mkdir()  # no checkpoint of ours
    (out / "run.json").unlink()
    code, output = run("grpo_train", training(out))
    assert code == 1
    assert_one_line(output, "no run.json", "choose another --out")

    shutil.copy(straight / "run.json", out)
    assert run("grpo_train", training(out, "--keep", 0, "--steps", 7))[0] == 2
    code, output = run("grpo_train", training(out, "--steps", 7))
    names = sorted(path.name for path in out.glob("checkpoint*"))
    assert code == 0 and names == ["checkpoint-5.bak", "checkpoint-7"], output


# ------------------------------------------------------------------- ranks


def test_two_scoring_ranks_one_of_them_killed_end_soon_and_go_on_to_the_same_bytes(
    pair, world, checkpoint, tmp_path
):
    def arguments(name):
        paths = ["--data", world / "captions.jsonl", "--out", tmp_path / name / "file"]
        return ["--model", checkpoint("idefics3"), *paths, "--batch-size", 1]

    assert [code for code, _ in pair("score_dependency", arguments("straight"))] == [0, 0]
    for moment in (("open", ".part", 4), ("os.rename", "file.tmp")):
        trap = functools.partial(die, *moment)
        ranks = pair("score_dependency", arguments("killed"), trap, None)
        (killed, _), (code, output) = ranks
        assert killed == -signal.SIGKILL and code == 1, output
        assert_one_line(output, "rank 1: another rank ended")
    assert [code for code, _ in pair("score_dependency", arguments("killed"))] == [0, 0]
    assert_same(tmp_path / "killed", tmp_path / "straight")


def test_a_rank_that_fails_ends_the_other_and_its_message_stands_out(pair, training, tmp_path):
    trap = functools.partial(raise_at, 2, "1")
    began = time.time()
    error_file = str(tmp_path / "error")
    ranks = pair(
        "grpo_train", training(tmp_path / "run"), trap, trap, TORCHELASTIC_ERROR_FILE=error_file
    )
    (code, output), (other, cause) = ranks
    assert code == other == 1 and time.time() - began < 60
    assert_one_line(output, "rank 0: another rank ended; its message says why")
    assert_one_line(cause, "the cause")


DRIVER = """
import functools, os, sys
sys.path[:0] = {paths}
import grpo_train, test_survival
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_survival.{trap}
grpo_train.run_script(grpo_train.main)
"""


def test_torchrun_resumes_by_itself_when_a_rank_was_killed_also_with_no_resume(
    pair, training, tmp_path
):
    trap = "die('os.rename', 'checkpoint.tmp', 2)"
    (tmp_path / "driver.py").write_text(DRIVER.format(paths=PATHS, trap=trap))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "--max-restarts=1", tmp_path / "driver.py"]
    command += map(str, training(tmp_path / "run", "--no-resume"))
    run = subprocess.run(
        command,
        timeout=300,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0 and "exitcode: -9" in run.stdout, run.stdout
    assert "resumed from" in run.stdout and "checkpoint-2" in run.stdout, run.stdout
    assert [code for code, _ in pair("grpo_train", training(tmp_path / "straight"))] == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_no_rank_lives_on_when_torchrun_itself_is_killed(training, launch, tmp_path):
    agent, _ = launch(
        "grpo_train",
        training(tmp_path / "run", *LONG),
        functools.partial(become_agent, tmp_path / "pid"),
        TORCHELASTIC_RUN_ID="none",
    )
    until((tmp_path / "run" / "metrics.jsonl").exists)
    rank = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert rank.exists() and rank.read_text().split()[3] == str(agent.pid)
    agent.kill()
    until(lambda: not rank.exists() or ") Z " in rank.read_text())


# ------------------------------------------------------------------- not finite


@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["whole", "sharded"])
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_on_both_and_counted(
    pair, training, tmp_path, shard
):
    out = tmp_path / "run"
    trap = functools.partial(spoil, {2: "loss", 3: "gradient"}, "1", tmp_path / "hash")
    ranks = pair("grpo_train", training(out, "--steps", 5, *shard), trap, trap)
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert "2 updates skipped" in ranks[0][1], ranks
    metrics = metrics_of(out)
    assert [m["skipped_update"] for m in metrics] == [0, 1, 1, 0, 0]
    assert [abs(m["loss"]) < 1e9 for m in metrics] == [True, False, True, True, True]
    assert [abs(m["grad_norm"]) < 1e9 for m in metrics] == [True, False, False, True, True]

    # of the weights before steps 1 to 5
    zero = (tmp_path / "hash.0").read_text().split()[-5:]
    one = (tmp_path / "hash.1").read_text().split()[-5:]
    assert shard or zero == one
    for weights in (zero, one):
        assert weights[1] == weights[2] == weights[3] and len(set(weights)) == 3

    # a resumed run counts on
    ranks = pair("grpo_train", training(out, "--steps", 6, *shard))
    assert "2 updates skipped" in ranks[0][1], ranks


def test_ten_such_steps_in_a_row_end_the_run_and_a_resumed_one_at_the_same_step(
    training, run, warm, tmp_path
):
    out = tmp_path / "run"
    trap = functools.partial(spoil, {"all": "loss"})
    start = load_file(warm / "model.safetensors")
    for _ in range(2):
        code, output = run("grpo_train", training(out, "--steps", 30, "--save-every", 5), trap)
        assert code == 1, output
        assert_one_line(output, "ten steps up to 10:", "metrics.jsonl", "lower --lr")
        steps = [(m["step"], m["skipped_update"]) for m in metrics_of(out)]
        assert steps == [(n, 1) for n in range(1, 11)]
        assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-5"]
        kept = load_file(out / "checkpoint-5" / "model.safetensors")
        assert all(torch.equal(kept[name], start[name]) for name in start)
