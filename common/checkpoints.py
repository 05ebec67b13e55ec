"""Checkpoints of a training run: complete or absent, the oldest deleted."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

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


def write_checkpoint(out, step, policy, weights, moments):
    """OUT/checkpoint-<step>, complete or absent: it is written beside its name and renamed.

    weights, moments: of gather_state().
    """
    temporary = Path(out, "checkpoint.tmp")
    path = Path(out, f"checkpoint-{step}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.model.save_pretrained(temporary, state_dict=weights)
        policy.processor.save_pretrained(temporary)
        state = {"step": step, "optimizer": moments}
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


# ---------------------------------------------------------------- what a checkpoint holds


def gather_state(policy, optimizer):
    """(weights, the optimizer's state), on the CPU and on rank 0 only; all ranks must call this.

    Both are by parameter name and whole, so that any number of ranks can load them.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy.model, options=whole)
    # tied weights were gathered twice, and safetensors would take them for two
    named = [*policy.model.named_parameters(), *policy.model.named_buffers()]
    names = {name for name, _ in named}
    weights = {name: tensor for name, tensor in weights.items() if name in names}
    return weights, get_optimizer_state_dict(policy.model, optimizer, options=whole)


def load_optimizer(policy, optimizer, moments, path):
    """Gives the optimizer, or a rank's share of it, the moments of gather_state() from `path`."""
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    if moments["param_groups"][0]["params"] != trained:
        fail(
            f"{path} is of other parameters than are trained here, or of an earlier version: choose "
            f"another --out, with --model {path.parent}"
        )
    if not moments["state"]:
        return  # no step was taken before it
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(policy.model, optimizer, moments, options=whole)
    else:
        # the function above would hold the state of the whole model twice for a while
        optimizer.load_state_dict(moments)
