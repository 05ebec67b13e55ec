"""What a training step logs: metrics, seconds, samples. docs/metrics.md explains each metric."""

import time

import torch


def count(sums, policy, batch, rollout, loss, entropy, kl, clipped):
    """Adds a micro-batch to the sums of the update."""
    mask = rollout.mask
    eos_ids = torch.tensor(policy.eos_ids, device=mask.device)
    has_ended = (torch.isin(rollout.ids, eos_ids) & mask.bool()).any(1)
    sums.add(
        loss=loss,
        completions=len(mask),
        tokens=mask.sum(),
        prompts=len(batch["input_ids"]),
        visual_tokens=(batch["input_ids"] == policy.model.config.image_token_id).sum(),
        entropy=(entropy * mask).sum(),
        kl=(kl * mask).sum(),
        clipped=clipped.sum(),
        truncated=(~has_ended).sum(),
    )
    if rollout.advantage is not None:
        advantage = rollout.advantage.abs()
        zero_std = (advantage.amax(1) < 1e-6).sum()
        sums.add(advantage=advantage.sum(), zero_std=zero_std)
        sums.add(**{name: reward.sum() for name, reward in rollout.components.items()})


def step_metrics(step, sums, N, weights):
    """The metrics of a step from its sums over all ranks; docs/metrics.md explains each."""
    completions = sums["completions"]
    tokens = sums["tokens"]
    total = sum(weight * sums[name] for name, weight in weights.items())
    metrics = {
        "step": step,
        "loss": sums["loss"] / N,
        "reward": total / completions / (sum(weights.values()) or 1),
    }
    for name in weights:
        metrics[f"reward_{name}"] = sums[name] / completions
    return metrics | {
        "format_ok": sums["format"] / completions,
        "advantage_abs": sums["advantage"] / completions,
        "zero_std_fraction": sums["zero_std"] / sums["prompts"],
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "completion_tokens": tokens / completions,
        "truncated_fraction": sums["truncated"] / completions,
        "visual_tokens": sums["visual_tokens"] / sums["prompts"],
    }


def step_seconds(began, policy, rollouts, sums):
    """Where the time of a step went on this rank, and completions per second on all."""
    seconds = time.time() - began
    reward_seconds = sum(rollout.reward_seconds for rollout in rollouts)
    return {
        "rollout_seconds": policy.rollout_seconds,
        "reward_seconds": reward_seconds,
        "update_seconds": seconds - policy.rollout_seconds - reward_seconds,
        "completions_per_second": sums["completions"] / seconds,
    }


def log_samples(run, step, task, examples, rollout, args):
    """Every --sample-every steps: the group of the step's first prompt, as text to be read."""
    places = [example.place for example in examples]
    if run.rank or 0 not in places or (step - 1) % args.sample_every:
        return
    b = places.index(0)
    lines = [f"=== step {step}  {task.heading(examples[b])}"]
    for g, completion in enumerate(rollout.completions[b]):
        rewards = "  ".join(f"{k} {v[b, g]:.2f}" for k, v in rollout.components.items())
        A = rollout.advantage[b, g]
        lines.append(f"  A {A:+.2f}  {rewards}  {task.describe(examples[b], completion)}")
    run.log_samples("\n".join(lines) + "\n\n")
