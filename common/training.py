"""What a training step needs besides the method: which prompts, micro-batches, sums, ranks."""

import collections
import functools
import math
import random
import resource
import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
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


def wrap_for_ranks(policy, world, shard):
    """The policy if there is one rank; several hold it whole each (DDP), or a share each (FSDP2)."""
    if world == 1:
        return policy
    if shard:
        return shard_over_ranks(policy)
    return DistributedDataParallel(policy, gradient_as_bucket_view=True)


def shard_over_ranks(policy):
    """Leaves each rank a share of the fp32 weights, gradients and optimizer state.

    The first pass of an update gathers the weights, in bf16 on a GPU, and update() drops them:
    decoding gathers nothing. The gradients of a pass are reduced at once, layer by layer: kept
    until the last pass, as DDP does, they would take four bytes per parameter on every rank.
    """
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if policy.model.device.type == "cuda":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # turns codes into pixels between the passes, in fp32
    vqvae = getattr(policy.model.model, "vqmodel", nn.Module())
    settings = {"mp_policy": precision, "reshard_after_forward": False}

    # every pass of every rank reaches these layers, in this order, so collectives match. All else
    # is one group, gathered before them and reduced at the end of the pass
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer, **settings)
    fully_shard(policy, **settings, ignored_params=set(vqvae.parameters()))
    policy.set_reshard_after_backward(False)
    # nothing changes the log-probs that it returns in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    return policy


def match_passes(net, micro_batches):
    """Where every pass has collectives, the micro-batches and as many as some rank has more.

    Those are idle: copies of the last one, with weight 0.
    """
    if not isinstance(net, FSDPModule):
        return micro_batches
    missing = max(gather(len(micro_batches))) - len(micro_batches)
    task, examples = micro_batches[-1]
    return micro_batches + [(task, [examples[0].as_idle()])] * missing


def set_gradient_sync(net, is_last):
    """Lets DDP exchange gradients in the last backward pass of an update only, as no_sync() does.

    Ranks may differ in their number of passes, as only the last one waits for the others.
    """
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = is_last


def zero_anchor(net):
    """0, with a gradient of 0 for every trained parameter in a pass that reduces the gradients.

    All ranks must then have the same ones, and not all passes use all: one of drawing does not use
    the head of text.
    """
    if isinstance(net, DistributedDataParallel):
        is_reduced = net.require_backward_grad_sync
    else:
        is_reduced = isinstance(net, FSDPModule)
    if not is_reduced:
        return 0.0
    # the gradient of a sum takes no memory
    return 0 * sum(p.sum() for p in net.parameters() if p.requires_grad)


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


def make_optimizer(policy, lr):
    """AdamW over the trained parameters, of each of which a rank may hold a share."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def zero_gradients(net, optimizer):
    """Before an update. DDP's gradients are views of its buckets: they are zeroed in place."""
    optimizer.zero_grad(set_to_none=not isinstance(net, DistributedDataParallel))


def update(net, optimizer, loss_sum, scale, args):
    """Multiplies the gradients by `scale`, clips their norm to --max-grad-norm and takes a step.

    Returns (gradient norm before clipping, whether a step was taken): where the norm or the loss
    is not finite there is none, and the decision is the same on every rank.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            # the gathered weights are about to be old
            module.reshard()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad *= scale
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.item()
    is_finite = math.isfinite(norm) and math.isfinite(loss_sum)
    if is_finite:
        optimizer.step()
    return norm, is_finite


def autocast(device):
    """bf16 compute on a GPU; the weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def peak_memory():
    """Bytes in use at most so far: of tensors on a GPU, of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
