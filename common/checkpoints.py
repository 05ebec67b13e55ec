"""Checkpoints of a training run: complete or absent, the oldest deleted."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from common.records import fail


def checkpoints(out):
    """{step: path} of the complete checkpoints of a run folder, oldest first."""
    paths = {}
    for path in Path(out).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal():
            paths[int(step)] = path
    return dict(sorted(paths.items()))


def newest_checkpoint(out):
    """(path, step) of the newest complete checkpoint of a run folder, or (None, 0)."""
    paths = checkpoints(out)
    if not paths:
        return None, 0
    step = max(paths)
    return paths[step], step


def write_checkpoint(out, step, policy, optimizer):
    """OUT/checkpoint-<step>, complete or absent: it is written beside its name and renamed."""
    temporary = Path(out, "checkpoint.tmp")
    path = Path(out, f"checkpoint-{step}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.model.save_pretrained(temporary)
        policy.processor.save_pretrained(temporary)
        state = {"step": step, "optimizer": optimizer.state_dict()}
        torch.save(state, temporary / "trainer.pt")
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as content:
                # or a power cut may leave the new name on empty files
                os.fsync(content.fileno())
    except (OSError, RuntimeError, SafetensorError) as error:
        # a full disk: safetensors and torch each raise their own
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(
            f"{path} cannot be written ({reason}); the checkpoints before it are whole, and the "
            "same command continues from the newest"
        )
    os.replace(temporary, path)
    return path


def delete_checkpoint(path):
    """Deletes a checkpoint; it is renamed first, as half of one must not be taken for one."""
    old = path.with_name("checkpoint.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)


def prune_checkpoints(out, keep):
    """Deletes all but the `keep` newest checkpoints, and what a kill has left of others."""
    shutil.rmtree(Path(out, "checkpoint.old"), ignore_errors=True)
    for old in list(checkpoints(out).values())[:-keep]:
        delete_checkpoint(old)


def gather_optimizer(optimizer):
    """consolidate_state_dict() by all ranks at once: torch's own takes minutes per gigabyte."""
    state = optimizer.optim.state_dict()
    on_cpu = {}
    for index, moments in state["state"].items():
        on_cpu[index] = {name: tensor.cpu() for name, tensor in moments.items()}
    state["state"] = on_cpu

    shards = None
    if dist.get_rank() == 0:
        shards = [None] * dist.get_world_size()
    dist.gather_object(state, shards)
    if dist.get_rank() == 0:
        optimizer._all_state_dicts = shards
