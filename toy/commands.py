"""Commands of the stages: a recipe, and the flags that differ from it; run as processes, or jobs."""

import multiprocessing
import os
import runpy
import shlex
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from common.ranks import die_with_parent

ROOT = Path(__file__).resolve().parents[1]


def group_flags(tokens):
    """{flag: values}: ["--lr", "1e-6", "--zero"] gives {"--lr": ["1e-6"], "--zero": []}."""
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

    Flags of which the recipe has the same values are left out, so that a command is as short as a
    person would type it.
    """
    text = (ROOT / recipe).read_text(encoding="utf-8")
    given = group_flags(shlex.split(text, comments=True))
    command = [script, f"@{recipe}"]
    for flag, values in group_flags(map(str, arguments)).items():
        if given.get(flag) != values:
            command += [flag, *values]
    return command


# ---------------------------------------------------------------- processes

# imported once, by a server of which every process is a copy: importing them takes six seconds
PRELOAD = ["build_masks", "evaluate", "grpo_train", "score_dependency", "toy.pieces"]


def start(command, log, heading):
    """Starts a script of this repository, from any folder, in a process of its own.

    log: the file that gets the heading and what the script prints, or None for this process's own
    output. The process has one thread: with models this small, two processes side by side do more
    than two threads in turn, threads that wait for each other can take ten times as long, and sums
    are rounded alike on every machine. OMP_NUM_THREADS overrides it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    method = "forkserver"
    if method not in multiprocessing.get_all_start_methods():
        method = "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOAD)
    sys.stdout.flush()
    process = context.Process(target=run_here, args=(command, log, heading, os.getcwd()))
    process.start()
    return process


def run_here(command, log, heading, folder):
    """Runs a script in this process, as Python would: python script arguments."""
    die_with_parent()
    os.chdir(folder)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
    print(heading, flush=True)

    script, *arguments = command
    sys.argv = [str(ROOT / script)]
    for argument in arguments:
        if argument.startswith("@"):
            argument = f"@{ROOT / argument[1:]}"
        sys.argv.append(argument)
    runpy.run_path(sys.argv[0], run_name="__main__")


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
    finally:
        # after Ctrl-C nothing new is started
        pool.shutdown(cancel_futures=True)
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
        process.join()
    except OSError as error:
        return str(error), f"FAILED: {error}"
    if process.exitcode or not Path(job.written).exists():
        reason = f"exit status {process.exitcode}, see {log}"
        return reason, f"FAILED: {reason}"
    return None, f"{time.time() - began:7.1f} s"
