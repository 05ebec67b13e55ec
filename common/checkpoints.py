"""Checkpoints of a training run: complete or absent, the oldest deleted, the damaged set aside."""

import math
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

from common.records import TRAINER, fail


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
        torch.save(state, temporary / TRAINER)
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


# ---------------------------------------------------------------- damaged ones


def set_aside_damaged(out, last_step):
    """Renames the newest checkpoints to checkpoint-N.damaged, up to one that can be resumed from.

    Each costs a line; if none is left, the program ends, and nothing is renamed. A run whose
    last step is done is not resumed, so its checkpoints are not looked at.
    """
    damaged = {}
    for step, path in reversed(checkpoints(out).items()):
        reason = None if step >= last_step else damage_of(path, step)
        if reason is None:
            break
        damaged[path] = reason
    if damaged and len(damaged) == len(checkpoints(out)):
        path, reason = next(iter(damaged.items()))
        fail(
            f"{path} is damaged ({reason}), and no other can be resumed from: --no-resume starts over"
        )

    for path, reason in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        print(f"{path} is damaged ({reason}): kept as {aside.name}")


def damage_of(path, step):
    """Why the trainer.pt of a checkpoint cannot be used, or None."""
    try:
        state = load_trainer(path)
    except Exception as error:
        # torch, pickle and the system each raise their own; of code in it, torch runs none
        return f"{TRAINER} cannot be read: {type(error).__name__}"
    if not isinstance(state, dict) or state.get("step") != step:
        return f"{TRAINER} is not that of step {step}"
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= set(optimizer):
        return f"{TRAINER} has no optimizer"
    if not all(map(_is_finite, _leaves(optimizer))):
        return f"{TRAINER} is not finite"
    return None


def load_trainer(path):
    """{step, optimizer} of a checkpoint; its tensors are read when they are used."""
    return torch.load(path / TRAINER, map_location="cpu", mmap=True, weights_only=True)


def _leaves(value):
    """What nested dicts and lists hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _is_finite(value):
    if torch.is_tensor(value):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


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
    trained = {n: p.shape for n, p in policy.model.named_parameters() if p.requires_grad}
    try:
        names = moments["param_groups"][0]["params"]
        shapes = {name: state["exp_avg"].shape for name, state in moments["state"].items()}
    except (LookupError, TypeError, AttributeError):
        names = []
        shapes = {}
    # no shapes: no step was taken before it
    if names != list(trained) or shapes not in ({}, trained):
        fail(
            f"{path} is of other parameters or an earlier version: choose another --out, and that "
            "checkpoint as --model"
        )
    if not shapes:
        return
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(policy.model, optimizer, moments, options=whole)
    else:
        # the function above would hold the state of the whole model twice for a while
        optimizer.load_state_dict(moments)
