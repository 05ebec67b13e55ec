"""Stages that run side by side, and the seconds that they take."""

import contextlib
import json
import multiprocessing
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.records import fail, write_json
from toy.commands import start


class Clock:
    """Seconds by stage, kept in a file, so that a run that is continued knows those before it."""

    def __init__(self, path, settings):
        self.path = path
        self.settings = settings
        self.seconds = {}
        self.lock = threading.Lock()
        if path.exists():
            self.seconds = json.loads(path.read_text()).get("seconds", {})

    @contextlib.contextmanager
    def measure(self, name, written):
        """Measures the block, which may find that `written` is there already."""
        was_there = Path(written).exists()
        began = time.time()
        yield
        with self.lock:
            if not (was_there and name in self.seconds):
                self.seconds[name] = round(time.time() - began, 1)
            write_json(self.path, {"settings": self.settings, "seconds": self.seconds})

    def in_all(self, steps):
        """Seconds of the world and of all steps, of each those of its longest lane."""
        total = self.seconds["world"]
        for lanes in steps:
            total += max(sum(self.seconds[stage.name] for stage in lane) for lane in lanes)
        return round(total, 1)


def run_step(lanes, clock):
    """Runs lanes of stages side by side; if a stage fails, all end, and so does this program.

    The first lane prints as it runs, and what the others print follows when all are done.
    """
    stop = threading.Event()
    failed = []

    def run_lane(lane, log):
        for stage in lane:
            if stop.is_set():
                return
            with clock.measure(stage.name, stage.written):
                process = start(stage.command, log, heading_of(stage))
                process.join()
            if process.exitcode and not stop.is_set():
                stop.set()
                failed.append(f"'{stage.name}' failed with exit status {process.exitcode}")
                for other in multiprocessing.active_children():
                    other.terminate()

    with tempfile.TemporaryDirectory() as folder:
        logs = [None, *(Path(folder, f"lane{i}.txt") for i in range(1, len(lanes)))]
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run_lane, lanes, logs))
        for log in logs[1:]:
            # of progress bars only what they leave, which is nothing
            lines = log.read_bytes().decode().split("\n")
            print("\n".join(line.rpartition("\r")[2] for line in lines), end="", flush=True)
    if failed:
        # below the bar of a stage that was stopped
        print(file=sys.stderr)
        fail(f"the stage {failed[0]}, see above; the same command tries it again")


def heading_of(stage):
    """What a stage does, and its command, at most 100 columns wide."""
    command = textwrap.wrap(" ".join(["python", *stage.command]), 92, break_on_hyphens=False)
    return f"\n{stage.about}\n$ " + " \\\n      ".join(command)
