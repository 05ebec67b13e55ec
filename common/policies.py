"""The policy of a training run and its frozen reference: loaded, checked, and what of it is trained."""

import torch

from common.exactness import choose_computation
from common.policy import Policy
from common.records import fail
from common.training import autocast
from common.vlm import join_prompts, load_vlm


def load_policies(args, checkpoint, device, world):
    """(policy, reference) of a training run; without a KL, the reference is None.

    checkpoint: what the run resumes from, or None.
    """
    # imitation samples nothing
    is_sft = args.objective == "sft"
    temperature = 1.0 if is_sft else args.temperature
    # only a run that draws has the flag
    guidance = 1.0 if is_sft else getattr(args, "guidance", 1.0)

    # fp32 master weights: at lr 1e-6 a bf16 weight would round every update away (AReaL PR#1634)
    name = str(checkpoint or args.model)
    model, processor = load_vlm(name, device, args.trust_remote_code, torch.float32)
    policy = Policy(model, processor, temperature, guidance)
    if args.freeze == "vision":
        freeze_vision(model, name)
    if "image" in policy.media:
        # the VQ-VAE turns codes into pixels, and is no part of the policy
        model.model.vqmodel.requires_grad_(False)

    reference = None
    if args.beta and not is_sft:
        # in the policy's numerics, or the KL would not start at 0. None is the device's own dtype:
        # on a GPU, the weights of a sharded policy are gathered in bf16
        dtype = None if args.shard and world > 1 else torch.float32
        start, _ = load_vlm(args.model, device, args.trust_remote_code, dtype)
        reference = Policy(start.requires_grad_(False), processor, temperature, guidance)
    return policy, reference


def prepare_policy(policy, reference, tasks, args):
    """Decides how the policy computes, and what of it is trained, by the first prompts of `tasks`."""
    group = 1 if args.objective == "sft" else args.group_size
    first = {}
    for task in tasks:
        first[task.medium] = join_prompts(policy.model, [task.prompts.first().prompt])
        if task.medium == "text":
            prompts = task.prompts.two_lengths()
            choose_computation(policy, prompts, group, task.max_length, True, reference)
    with autocast(policy.model.device):
        freeze_unused(policy, first)


# ---------------------------------------------------------------- what is trained


def freeze_vision(model, name):
    """Takes the vision tower out of training, and with it the merger if that is a part of it.

    It is one in Qwen-VL; other families' projectors stand beside their towers and are trained.
    """
    tower = model.get_encoder(modality="image")
    if tower is model:
        fail(f"{name}: transformers names no vision tower of it: leave --freeze vision out")
    tower.requires_grad_(False)


def freeze_unused(policy, batches):
    """Freezes parameters that get no gradient, as the norm after some vision towers: DDP would
    wait for their gradients for ever. batches: {medium: inputs of join_prompts()}."""
    used = set()

    def note(parameter):
        used.add(parameter)
        parameter.grad = None  # those of all at once would take as much memory as the weights

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in trained]
    for medium, batch in batches.items():
        # any two tokens or codes
        ids = torch.ones(len(batch["input_ids"]), 2, dtype=torch.long, device=policy.model.device)
        _, _, logps, _ = policy(batch, 1, ids=ids, mask=torch.ones_like(ids), medium=medium)
        logps.sum().backward()
    for hook in hooks:
        hook.remove()
    for parameter in policy.parameters():
        parameter.requires_grad_(parameter in used)
