"""What a training step needs besides the method: which prompts, micro-batches, sums, ranks."""

import collections
import functools
import math
import random
import resource

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from common.ranks import gather

# ---------------------------------------------------------------- which prompts


def prompt_order(step, count, size, seed):
    """Indices of the `count` prompts of a step (from 1) in data of `size` records.

    Epochs of fresh permutations follow each other; no state is kept, so a resumed run needs none.
    """
    places = range((step - 1) * count, step * count)
    return [_permutation(seed, place // size, size)[place % size] for place in places]


@functools.lru_cache(2)
def _permutation(seed, epoch, size):
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def uniforms_of(step, places, group, length, seed):
    """(len(places) * G, S) numbers in [0, 1), one per token.

    Those of a prompt depend on seed, step and its place in the step, and on no rank or batch.
    """
    uniforms = []
    for place in places:
        generator = torch.Generator().manual_seed(hash((seed, step, place)) % 2**63)
        uniforms.append(torch.rand(group, length, generator=generator))
    return torch.cat(uniforms)


def pack(examples, tokens_of, budget):
    """Splits examples into micro-batches of at most `budget` tokens each.

    tokens_of(P): the tokens that a prompt of P tokens takes with its completions. Padding counts.
    An example that is larger alone is a micro-batch of its own. Prompts of like length go together,
    which saves padding.
    """

    def length(example):
        return tokens_of(example.prompt["input_ids"].shape[1])

    micro_batches = []
    for example in sorted(examples, key=length, reverse=True):
        if not micro_batches:
            micro_batches.append([])
        last = micro_batches[-1]
        if last and (len(last) + 1) * length(last[0]) > budget:
            last = []
            micro_batches.append(last)
        last.append(example)
    return micro_batches


# ---------------------------------------------------------------- ranks


def wrap_for_ranks(policy, world):
    """The policy, wrapped in DDP if there are several ranks."""
    if world == 1:
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True)


def set_gradient_sync(net, is_last):
    """Lets DDP exchange gradients in the last backward pass of an update only, as no_sync() does.

    Ranks may differ in their number of passes, as only the last one waits for the others.
    """
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = is_last


def zero_anchor(net, tasks):
    """0, with a gradient of 0 for every trained parameter where DDP waits for the gradients of all.

    A pass of one of several tasks gives the head of the other medium none.
    """
    is_awaited = isinstance(net, DistributedDataParallel) and net.require_backward_grad_sync
    if len(tasks) == 1 or not is_awaited:
        return 0.0
    return sum((0 * p).sum() for p in net.parameters() if p.requires_grad)


class StepSums(collections.Counter):
    """Sums of one update: of completions, tokens, losses, rewards ..."""

    def add(self, **values):
        for name, value in values.items():
            self[name] += value.item() if torch.is_tensor(value) else value

    def over_ranks(self):
        """The sums over all ranks, on every rank."""
        total = StepSums()
        for sums in gather(self):
            total.update(sums)  # `+` would drop what is negative or not a number
        return total


# ---------------------------------------------------------------- the optimizer


def make_optimizer(policy, lr, shard):
    """AdamW over the trained parameters; shard: its state is shared over the ranks."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    settings = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if shard:
        return ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(trained, **settings)


def zero_gradients(optimizer, world):
    """Before an update. DDP's gradients are views of its buckets: they are zeroed in place."""
    optimizer.zero_grad(set_to_none=world == 1)


def update(optimizer, loss_sum, scale, args):
    """Multiplies the gradients by `scale`, clips their norm to --max-grad-norm and takes a step.

    Returns (gradient norm before clipping, whether a step was taken): where the norm or the loss
    is not finite there is none, and the decision is the same on every rank.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad *= scale
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    is_finite = math.isfinite(norm) and math.isfinite(loss_sum)
    if is_finite:
        optimizer.step()
    return norm, is_finite


def autocast(device):
    """bf16 compute on a GPU; the weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def peak_memory(device):
    """Bytes in use at most so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
