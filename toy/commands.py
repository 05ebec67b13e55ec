"""Commands of the stages: a recipe, and the flags that differ from it; run in turn, or as jobs."""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from common.ranks import die_with_parent
from common.records import open_for_writing

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


def run_command(command, **options):
    """Runs a script of this repository from any folder; subprocess.run()'s result."""
    script, *arguments = command
    words = [sys.executable, str(ROOT / script)]
    for argument in arguments:
        if argument.startswith("@"):
            argument = f"@{ROOT / argument[1:]}"
        words.append(argument)
    return subprocess.run(words, **options)


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
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

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
                future = pool.submit(run_job, by_name[name], failed, logs, environment)
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


def run_job(job, failed, logs, environment):
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
        with open_for_writing(log) as output:
            output.write(f"$ python {shlex.join(job.command)}\n")
            output.flush()
            result = run_command(
                job.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
            )
    except OSError as error:
        return str(error), f"FAILED: {error}"
    if result.returncode or not Path(job.written).exists():
        reason = f"exit status {result.returncode}, see {log}"
        return reason, f"FAILED: {reason}"
    return None, f"{time.time() - began:7.1f} s"
