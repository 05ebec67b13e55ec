"""What a training step logs: metrics, seconds, samples. docs/metrics.md explains each metric."""

import time

import torch

from common.sheets import sheet


def count(sums, policy, batch, rollout, task, loss, entropy, kl, clipped):
    """Adds a micro-batch to the sums of the update: to those of all tasks, and to its task's."""
    mask = rollout.mask
    sums.add(loss=loss, completions=len(mask), tokens=mask.sum())
    counted = {
        "loss": loss,
        "completions": len(mask),
        "tokens": mask.sum(),
        "prompts": len(batch["input_ids"]),
        "visual_tokens": (batch["input_ids"] == policy.model.config.image_token_id).sum(),
        "entropy": (entropy * mask).sum(),
        "kl": (kl * mask).sum(),
        "clipped": clipped.sum(),
        "truncated": count_truncated(policy.media[task.medium], rollout),
    }
    if rollout.advantage is not None:
        advantage = rollout.advantage.abs()
        counted["advantage"] = advantage.sum()
        counted["zero_std"] = (advantage.amax(1) < 1e-6).sum()
        counted |= {f"reward_{name}": r.sum() for name, r in rollout.components.items()}
    sums.add(**{f"{name}/{task.name}": value for name, value in counted.items()})


def count_truncated(medium, rollout):
    """How many completions end without a token that ends them; an image always has all codes."""
    if medium.length:
        return 0
    eos_ids = torch.tensor(medium.stop_ids, device=rollout.ids.device, dtype=torch.long)
    has_ended = (torch.isin(rollout.ids, eos_ids) & rollout.mask.bool()).any(1)
    return (~has_ended).sum()


def step_metrics(step, sums, N, tasks):
    """The metrics of a step from its sums over all ranks; docs/metrics.md explains each.

    Those of one task among several have its name: "entropy/drawing".
    """
    metrics = {"step": step, "loss": sums["loss"] / N}
    for task in tasks:
        for name, value in task_metrics(task, sums).items():
            metrics[name if len(tasks) == 1 else f"{name}/{task.name}"] = value
    return metrics


def task_metrics(task, sums):
    """The metrics of one task: {name: number}."""

    def of_task(name):
        return sums[f"{name}/{task.name}"]

    completions = of_task("completions")
    tokens = of_task("tokens")
    weights = task.weights
    total = sum(weight * of_task(f"reward_{name}") for name, weight in weights.items())
    metrics = {"reward": total / completions / (sum(weights.values()) or 1)}
    for name in weights:
        metrics[f"reward_{name}"] = of_task(f"reward_{name}") / completions
    if task.medium == "text":
        metrics["format_ok"] = of_task("reward_format") / completions
    return metrics | {
        "advantage_abs": of_task("advantage") / completions,
        "zero_std_fraction": of_task("zero_std") / of_task("prompts"),
        "entropy": of_task("entropy") / tokens,
        "kl": of_task("kl") / tokens,
        "clip_fraction": of_task("clipped") / tokens,
        "completion_tokens": tokens / completions,
        "truncated_fraction": of_task("truncated") / completions,
        "visual_tokens": of_task("visual_tokens") / of_task("prompts"),
    }


def step_seconds(began, rollouts, sums):
    """Where the time of a step went on this rank, and completions per second on all."""
    seconds = time.time() - began
    rollout_seconds = sum(rollout.rollout_seconds for rollout in rollouts)
    reward_seconds = sum(rollout.reward_seconds for rollout in rollouts)
    return {
        "rollout_seconds": rollout_seconds,
        "reward_seconds": reward_seconds,
        "update_seconds": seconds - rollout_seconds - reward_seconds,
        "completions_per_second": sums["completions"] / seconds,
    }


def log_samples(run, step, task, examples, rollout, args):
    """Every --sample-every steps: the group of the task's first prompt, as text to be read.

    Drawings go to samples/step-N.png as well.
    """
    places = [example.place for example in examples]
    of_rank_0 = [place for place in task.prompts.places if place % run.world == 0]
    if run.rank or (step - 1) % args.sample_every or of_rank_0[0] not in places:
        return
    b = places.index(of_rank_0[0])
    lines = []
    for g in range(len(rollout.completions[b])):
        rewards = "  ".join(f"{k} {v[b, g]:.2f}" for k, v in rollout.components.items())
        lines.append(f"A {rollout.advantage[b, g]:+.2f}  {rewards}")
    if task.medium == "image":
        run.log_drawings(step, sheet(rollout.completions[b], lines, columns=4))

    shown = [f"=== step {step}  {task.heading(examples[b])}"]
    for line, completion in zip(lines, rollout.completions[b]):
        shown.append(f"  {line}  {task.describe(examples[b], completion)}")
    run.log_samples("\n".join(shown) + "\n\n")
