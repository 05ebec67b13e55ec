"""Stages that run side by side, and how long they take."""

import contextlib
import json
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from common.records import fail, write_json
from toy.commands import describe_status, finish, start, stop_all


class Clock:
    """Seconds by stage, kept in a file, so that a continued run still knows the earlier ones."""

    def __init__(self, path, settings):
        self.path = path
        self.settings = settings
        self.seconds = {}
        self.lock = threading.Lock()
        if path.exists():
            self.seconds = json.loads(path.read_text()).get("seconds", {})

    @contextlib.contextmanager
    def measure(self, name, written):
        """Measures a block that succeeds, and that may find `written` there already."""
        was_there = Path(written).exists()
        began = time.time()
        yield
        with self.lock:
            if not (was_there and name in self.seconds):
                self.seconds[name] = round(time.time() - began, 1)
            write_json(self.path, {"settings": self.settings, "seconds": self.seconds})

    def in_all(self, steps):
        """Elapsed seconds: the world, plus the longest lane of every step."""
        total = self.seconds["world"]
        for lanes in steps:
            total += max(sum(self.seconds[stage.name] for stage in lane) for lane in lanes)
        return round(total, 1)


class StageFailed(Exception):
    """A stage ended with an exit status other than 0."""


def run_step(lanes, clock, folder):
    """Runs lanes of stages side by side. If a stage fails, the others are stopped, and all ends.

    The first lane prints as it runs. The output of the others is kept in folder/logs, and follows
    when all are done.
    """
    stop = threading.Event()
    logs = [None]
    for lane in lanes[1:]:
        logs.append(Path(folder, "logs", f"{lane[0].name.replace(' ', '-')}.txt"))
        logs[-1].parent.mkdir(parents=True, exist_ok=True)
        logs[-1].write_bytes(b"")

    def run_lane(lane, log):
        for stage in lane:
            if stop.is_set():
                return
            with clock.measure(stage.name, stage.written):
                try:
                    process = start(stage.command, log, heading_of(stage))
                except (OSError, EOFError) as error:
                    raise StageFailed(f"the stage '{stage.name}' did not start: {error}") from None
                if stop.is_set():
                    process.terminate()
                status = finish(process)
                if status:
                    where = f"see {log}" if log else "see above"
                    reason = f"{describe_status(status)}, {where}"
                    raise StageFailed(f"the stage '{stage.name}' {reason}")

    try:
        with ThreadPoolExecutor(len(lanes)) as pool:
            running = [pool.submit(run_lane, *lane) for lane in zip(lanes, logs)]
            try:
                for lane in as_completed(running):
                    lane.result()
            except BaseException:
                stop.set()
                stop_all()
                raise
    except KeyboardInterrupt:
        end_line()
        raise
    except StageFailed as error:
        show(logs[1:])
        end_line()
        fail(f"{error}; the same command tries it again")
    show(logs[1:])


def end_line():
    """Begins a new line on the screen: a stage that was stopped may have left its bar on this."""
    print(file=sys.stderr)


def show(logs):
    """Prints logs of lanes, each line without the bars that it overwrote."""
    for log in logs:
        text = log.read_bytes().decode(errors="replace").replace("\r\n", "\n")
        lines = [line.rpartition("\r")[2] for line in text.split("\n")]
        print("\n".join(lines), end="", flush=True)


def heading_of(stage):
    """What a stage does, and its command, at most 100 columns wide."""
    command = textwrap.wrap(" ".join(["python", *stage.command]), 92, break_on_hyphens=False)
    return f"\n{stage.about}\n$ " + " \\\n      ".join(command)
