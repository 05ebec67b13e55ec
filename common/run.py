"""The folder of a training run: settings, checkpoints, logs, and how it resumes.

OUT/run.json         the resolved settings
OUT/metrics.jsonl    a line per step
OUT/curves.png       those metrics as curves
OUT/samples.txt      completions with their rewards, as text to be read
OUT/samples/         drawings with their rewards, of a model that draws
OUT/checkpoint-N     loads with AutoModelForImageTextToText; trainer.pt is what a resume needs
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from common.checkpoints import (
    checkpoints,
    delete_checkpoint,
    gather_state,
    load_optimizer,
    load_trainer,
    newest_checkpoint,
    prune_checkpoints,
    set_aside_damaged,
    write_checkpoint,
)
from common.locks import lock_output
from common.ranks import barrier, broadcast
from common.records import (
    TRAINER,
    BadRecord,
    check_settings,
    fail,
    fingerprint,
    open_for_writing,
    read_jsonl,
    write_atomically,
    write_json,
)
from common.training import peak_memory

ROOT = Path(__file__).resolve().parents[1]

# settings that may change when a run is resumed: they affect speed, duration or paths, never an
# update
FREE_SETTINGS = (
    "out",
    "steps",
    "tokens_per_forward",
    "shard",
    "resume",
    "save_every",
    "log_every",
    "sample_every",
    "keep",
    "image_root",
    "trust_remote_code",
)


def settings_of(args, paths):
    """The flags that an update depends on; `paths` are compared by content, not by name."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    for name in paths:
        if settings[name] is not None:
            settings[name] = fingerprint(settings[name])
    return settings


def open_run(args, settings, rank, world):
    """The Run in args.out, or None if its steps are done already.

    Without --resume what a run of this script left there is deleted; a folder of anything else, or
    of other settings, ends the program.
    """
    out = Path(args.out)
    if rank == 0:
        lock_output(out / "run.json")
    barrier()  # nobody looks before it is ours
    files = _written_files(out)
    if files and not (out / "run.json").exists():
        # a Trainer's, say: neither continued nor deleted
        fail(
            f"{out} holds {files[0].name} but no run.json: not a run of this script, choose "
            "another --out"
        )
    barrier()
    # torchrun restarts a run with --no-resume too: then it continues with what it has written
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and files
    if not args.resume and not is_restart and rank == 0:
        for path in files:
            _delete(path)
    barrier()

    check_settings(out / "run.json", settings)
    if rank == 0:
        set_aside_damaged(out, args.steps)
    barrier()
    checkpoint, step = newest_checkpoint(out)
    if broadcast(step) != step:
        fail(
            f"{out} holds another checkpoint on this node than on the first: --out must be a "
            "folder that all nodes share"
        )
    run = Run(out, settings, checkpoint, step, args, rank, world)
    if step >= args.steps:
        if rank == 0:
            prune_checkpoints(out, args.keep)
            print(f"reused {checkpoint}: its {step} steps are done; --no-resume starts over")
        return None
    barrier()
    return run


class Run:
    """An open run folder. Rank 0 writes; the others only read.

    checkpoint, start_step: what is resumed from, or None and 0.
    """

    def __init__(self, out, settings, checkpoint, start_step, args, rank, world):
        self.out = out
        self.settings = settings
        self.flags = vars(args)
        self.checkpoint = checkpoint
        self.start_step = start_step
        self.last_step = args.steps
        self.updates = args.updates
        self.keep = args.keep
        self.save_every = args.save_every
        self.log_every = args.log_every
        self.rank = rank
        self.world = world
        self.skipped = []  # updates skipped, one number per step
        self.bar = None
        self.loaded_memory = 0  # bytes at most before the first step

    def begin(self, description):
        """Binds the settings and cuts the logs to the checkpoint, when everything is loaded.

        A run that was refused before this binds no settings, so that the right command can follow.
        """
        self.loaded_memory = peak_memory()
        metrics = metrics_until(self.out, self.start_step, self.rank)
        skipped = [record.get("skipped_update") for record in metrics]
        self.skipped = [count for count in skipped if type(count) is int]
        if self.rank == 0:
            write_json(self.out / "run.json", {"settings": self.settings, "flags": self.flags})
            self._cut_logs(metrics)
            prune_checkpoints(self.out, self.keep)
            resumed = f", resumed from {self.checkpoint}" if self.checkpoint else ""
            print(f"{description}, steps {self.start_step + 1} to {self.last_step}{resumed}")
        self.bar = tqdm(
            total=self.last_step,
            initial=self.start_step,
            desc=self.out.name,
            unit="step",
            disable=self.rank > 0,
            leave=False,
        )

    def restore(self, policy, optimizer):
        """Loads the optimizer's state of the checkpoint that is resumed from, if any."""
        if not self.checkpoint:
            return
        moments = load_trainer(self.checkpoint)["optimizer"]
        load_optimizer(policy, optimizer, moments, self.checkpoint / TRAINER)

    def steps(self):
        """The steps that are left."""
        return range(self.start_step + 1, self.last_step + 1)

    def log_step(self, metrics):
        """Appends a line to metrics.jsonl, and prints a line every --log-every steps.

        Ten steps in a row without any finite update end the program, on every rank alike.
        """
        step = metrics["step"]
        if self.rank == 0:
            rounded = {name: round(value, 6) for name, value in metrics.items()}
            with open_for_writing(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(rounded) + "\n")
            if step % self.log_every == 0 or step == self.last_step:
                tqdm.write(_summary(metrics))
        self.bar.update()

        self.skipped.append(metrics["skipped_update"])
        if len(self.skipped) >= 10 and min(self.skipped[-10:]) == self.updates:
            fail(
                f"loss or gradient was not finite in ten steps up to {step}: see grad_norm in "
                f"{self.out}/metrics.jsonl, and start another --out with a lower --lr"
            )

    def log_samples(self, text):
        """Appends one block of samples.txt; it begins with '=== step N' and ends with a blank."""
        with open_for_writing(self.out / "samples.txt", "a") as file:
            file.write(text)

    def log_drawings(self, step, page):
        """OUT/samples/step-N.png: the drawings of a group, as one PIL image."""
        path = self.out / "samples" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        page.save(path)

    def save_checkpoint(self, step, policy, optimizer):
        """Every --save-every steps and at the last: OUT/checkpoint-<step>, and the curves."""
        if step % self.save_every and step != self.last_step:
            return
        weights, moments = gather_state(policy, optimizer)
        if self.rank == 0:
            self.checkpoint = write_checkpoint(self.out, step, policy, weights, moments)
            prune_checkpoints(self.out, self.keep)
            draw_curves(self.out)

    def report_done(self, device, unusable_records):
        """The last lines: what it took, what was written and skipped, and what to run next."""
        self.bar.close()
        if self.rank == 0:
            owner = "this rank's tensors" if device.type == "cuda" else "the whole process"
            print(
                f"{sum(self.skipped)} updates skipped, {unusable_records} records could not be used;"
                f" peak memory: {peak_memory() / 2**20:.0f} MiB ({owner}; "
                f"{self.loaded_memory / 2**20:.0f} before the first step)"
            )
            print(f"{self.checkpoint}: done. Next: evaluate.py --model {self.checkpoint} ...")

    def _cut_logs(self, metrics):
        """Drops what a killed run logged after the checkpoint."""
        lines = (json.dumps(record) + "\n" for record in metrics)
        write_atomically(self.out / "metrics.jsonl", lines)
        for path in self.out.glob("samples/step-*.png"):
            if int(path.stem.removeprefix("step-")) > self.start_step:
                path.unlink()
        samples = self.out / "samples.txt"
        if not samples.exists():
            return
        text = samples.read_bytes().decode("utf-8", "replace")
        end = None
        for match in re.finditer(r"^=== step (\d+)  ", text, re.MULTILINE):
            if int(match[1]) > self.start_step:
                end = match.start()
                break
        # a block ends in an empty line: half a block goes too
        write_atomically(samples, text[:end].rpartition("\n\n")[:2])


def _summary(metrics):
    """The printed line of a step: the rewards, or for SFT the loss, and what warns of trouble."""
    # "" of the only task, or "/drawing" of one among several
    tasks = [name.removeprefix("reward") for name in metrics if re.fullmatch("reward(/.*)?", name)]
    shown = [_task_summary(metrics, task) for task in tasks]
    shown = [text for text in shown if text] or [f"loss {metrics['loss']:.3f}"]
    return f"step {metrics['step']:4d}  {' | '.join(shown)}  grad {metrics['grad_norm']:.2f}"


def _task_summary(metrics, task):
    """The rewards of one task; nothing without any, as in SFT."""
    rewards = []
    for name, value in metrics.items():
        match = re.fullmatch(f"reward_(?!seconds)([^/]+){task}", name)
        if match:
            rewards.append(f"{match[1]} {value:.2f}")
    if not rewards:
        return ""
    name = task.removeprefix("/") or "reward"
    shown = f"{name} {metrics['reward' + task]:.3f} ({', '.join(rewards)})"
    if f"format_ok{task}" in metrics:
        shown += f" format {metrics['format_ok' + task]:.2f}"
    shown += f" entropy {metrics['entropy' + task]:.2f}"
    if f"format_ok{task}" in metrics:
        shown += f" tokens {metrics['completion_tokens' + task]:.1f}"
    return shown


def draw_curves(out):
    """OUT/curves.png, drawn by a process of its own: no plot can end a training run."""
    command = [sys.executable, "-m", "report.curves", str(Path(out).resolve())]
    try:
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        tqdm.write(f"{out}/curves.png could not be drawn: {error}")


def metrics_until(out, step, rank=0):
    """The records of metrics.jsonl up to `step`, one per step.

    A line that a kill has cut, or that says no step, is left out. Rank 0 names what is missing.
    """
    path = Path(out, "metrics.jsonl")
    by_step = {}
    if path.exists():
        for _, record in read_jsonl(path, ("step",)):
            if not isinstance(record, BadRecord) and type(record["step"]) is int:
                by_step[record["step"]] = record
    missing = [i for i in range(1, step + 1) if i not in by_step]
    if missing and rank == 0:
        print(
            f"{path} lacks {len(missing)} of {step} steps, the first of them {missing[0]}: the "
            "weights are not affected, the curves and the number of skipped updates are"
        )
    return [by_step[i] for i in sorted(by_step) if 1 <= i <= step]


def _written_files(out):
    """What a run of this script may have written in `out`."""
    names = ("metrics.jsonl", "samples.txt", "curves.png", "run.json")
    logs = [out / name for name in names if (out / name).exists()]
    drawings = sorted(out.glob("samples/step-*.png"))
    return [*checkpoints(out).values(), *logs, *drawings]


def _delete(path):
    if path.is_dir():
        delete_checkpoint(path)
    else:
        path.unlink(missing_ok=True)
