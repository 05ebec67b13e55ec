"""The completions of a micro-batch: sampled by the policy, or given."""

from dataclasses import dataclass

import torch

from common.training import autocast, uniforms_of


@dataclass
class Rollout:
    """The completions of a micro-batch of B prompts, and what they were found to be worth."""

    ids: torch.Tensor  # (B*G, S)
    mask: torch.Tensor  # (B*G, S): ends with the first eos token
    old_logps: torch.Tensor = None  # (B*G, S), nats
    ref_logps: torch.Tensor = None  # (B*G, S), nats
    completions: list = None  # (B, G) texts or images
    components: dict = None  # {name: (B, G)} in [0, 1]
    advantage: torch.Tensor = None  # (B, G)
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0


def run_policy(net, batch, rollout, task, examples, step):
    """Scores the completions of `rollout`, or samples them if it is None.

    Returns (Rollout, logps, entropy), the latter two (B*G, S) in nats and with a graph.
    """
    device = batch["input_ids"].device
    with autocast(device):
        if rollout is not None:
            group = len(rollout.ids) // len(examples)
            given = {"ids": rollout.ids, "mask": rollout.mask}
            _, _, logps, entropy = net(batch, group, **given, medium=task.medium)
            return rollout, logps, entropy

        G = task.args.group_size
        places = [example.place for example in examples]
        uniforms = uniforms_of(step, places, G, task.max_length, task.args.seed).to(device)
        ids, mask, logps, entropy = net(batch, G, uniforms, medium=task.medium)
        rollout = Rollout(ids, mask, rollout_seconds=task.policy.rollout_seconds)
        return rollout, logps, entropy


def reference_logps(reference, batch, rollout, medium):
    """Log-probs (B*G, S) of the rollout under the frozen reference; None without one."""
    if reference is None:
        return None
    group = len(rollout.ids) // len(batch["input_ids"])
    with torch.no_grad(), autocast(rollout.ids.device):
        given = {"ids": rollout.ids, "mask": rollout.mask}
        _, _, logps, _ = reference(batch, group, **given, medium=medium)
    return logps
