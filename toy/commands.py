"""The stages as commands: a recipe and the flags that differ from it; run as processes or jobs."""

import functools
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def group_flags(tokens):
    """{flag: values}: ["--lr", "1e-6", "--shard"] gives {"--lr": ["1e-6"], "--shard": []}."""
    flags = {}
    for token in tokens:
        if token.startswith("--"):
            flags[token] = []
            values = flags[token]
        else:
            values.append(token)
    return flags


def recipe_command(script, recipe, *arguments):
    """[script, "@recipe", arguments that say something else than the recipe].

    script: a file, or "-m module".

    Flags of which the recipe has the same values are left out, so that a command is as short as a
    person would type it.
    """
    text = (ROOT / recipe).read_text(encoding="utf-8")
    given = group_flags(shlex.split(text, comments=True))
    command = [*script.split(), f"@{recipe}"]
    for flag, values in group_flags(map(str, arguments)).items():
        if given.get(flag) != values:
            command += [flag, *values]
    return command


# ---------------------------------------------------------------- processes

# imported once, by the server that every process is forked from: the imports take six seconds
PRELOAD = ["build_masks", "evaluate", "grpo_train", "score_dependency", "toy.pieces"]
PRELOAD += ["lvrpo.tasks", "lvrpo.reward"]
# multiprocessing looks after all processes at once, whichever thread asks
LOCK = threading.Lock()


@functools.cache
def process_context():
    """Where processes come from: on Linux a server with everything imported, else a new Python."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # the server looks for modules in its working directory
    folder = os.getcwd()
    os.chdir(ROOT)
    # Ctrl-C is for this program, which ends the others: each of them would print a line. (The
    # tracker, which the server needs, would unblock it again)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.chdir(folder)
    return context


def start(command, log, heading):
    """Starts a script of this repository, from any folder, in a process of its own.

    log: the file for the heading and the script's output; None: this program's own output. Each
    process has one thread: with models this small, two processes do more than two threads, threads
    that wait for each other can be ten times slower, and sums are rounded alike on every machine.
    OMP_NUM_THREADS overrides this. The process ends when this program is killed.
    """
    sys.stdout.flush()
    with LOCK:
        process = process_context().Process(
            target=run_here, args=(command, log, heading, os.getcwd())
        )
        process.start()
    return process


def finish(process):
    """Waits for a process that start() returned; its exit status."""
    multiprocessing.connection.wait([process.sentinel])
    with LOCK:
        process.join()
    return process.exitcode


def describe_status(status):
    """The exit status of finish() in words: "was killed (SIGKILL)"."""
    if status < 0:
        return f"was killed ({signal.Signals(-status).name})"
    return f"failed with exit status {status}"


def stop_all():
    """Ends all processes of start()."""
    with LOCK:
        for process in multiprocessing.active_children():
            process.terminate()


def run_here(command, log, heading, folder):
    """Runs a script in this process, as Python would: python script arguments."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    # tqdm's own is a semaphore between processes, of whose loss a kill would make a warning
    tqdm.set_lock(threading.RLock())
    os.chdir(folder)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
    print(heading, flush=True)

    arguments = []
    for argument in command:
        if argument.startswith("@"):
            argument = f"@{ROOT / argument[1:]}"
        arguments.append(argument)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def end_with(parent):
    """Kills this process when `parent`, the program that started it, has ended."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# ---------------------------------------------------------------- jobs


class Job(NamedTuple):
    """A command, the names of the jobs that it needs, and the path that says that it is done."""

    name: str
    needs: list
    written: str
    command: list


def run_jobs(jobs, folder, workers=2):
    """Runs the jobs whose result is missing, `workers` at a time, each as soon as it can start.

    What a job prints goes to folder/logs/. Returns {name: reason} of the jobs that failed, or need
    one that did; all others are run.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    missing = sum(not Path(job.written).exists() for job in jobs)
    print(f"{len(jobs) - missing} of {len(jobs)} jobs are done", flush=True)

    by_name = {job.name: job for job in jobs}
    order = TopologicalSorter({job.name: job.needs for job in jobs})
    order.prepare()
    failed = {}
    running = {}
    finished = 0
    pool = ThreadPoolExecutor(workers)
    try:
        while order.is_active():
            for name in order.get_ready():
                future = pool.submit(run_job, by_name[name], failed, logs)
                running[future] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                reason, message = future.result()
                if reason is not None:
                    failed[name] = reason
                finished += 1
                if message is not None:
                    print(f"[{finished:3d}/{len(jobs)}] {name:36s} {message}", flush=True)
                order.done(name)
    except BaseException:
        # Ctrl-C, as a rule
        pool.shutdown(wait=False, cancel_futures=True)
        stop_all()
        raise
    pool.shutdown()
    return failed


def run_job(job, failed, logs):
    """Runs one job, unless its result exists or a job that it needs has failed.

    Returns (the reason of a failure or None, what to print or None).
    """
    if Path(job.written).exists():
        return None, None
    blocked = [name for name in job.needs if name in failed]
    if blocked:
        reason = f"needs {blocked[0]}"
        return reason, f"FAILED: {reason}"

    log = logs / f"{job.name.replace(' ', '-')}.txt"
    began = time.time()
    try:
        log.unlink(missing_ok=True)
        process = start(job.command, log, f"$ python {shlex.join(job.command)}")
        status = finish(process)
    except (OSError, EOFError) as error:
        return str(error), f"FAILED: {error}"
    if status or not Path(job.written).exists():
        reason = f"{describe_status(status).removeprefix('failed with ')}, see {log}"
        return reason, f"FAILED: {reason}"
    return None, f"{time.time() - began:7.1f} s"
