"""Whether completions may share their prompt: checked once, on two prompts of the user's own data.

Sharing is exact for softmax attention over the whole sequence. With convolutions, linear or
cross-attention, or inputs of a family that are laid out in another way, it would give wrong
log-probs and gradients without any error. So it is compared with the model's own forward() of each
prompt and completion alone: no padding, no cache, no attention of ours. A model that fails is
trained and evaluated by the plain computation (common/plain.py), which is compared likewise; one
that fails both is refused.
"""

import contextlib
import math

import torch

from common.attention import use_grouped_attention, use_plain_attention
from common.plain import plain_logps, plain_sample
from common.ranks import broadcast, print_once
from common.records import fail
from common.training import autocast
from common.vlm import append_responses, join_prompts, token_logps

# tokens of the completions that are compared
LENGTH = 4
# what rounding may do: to log-probs, in nats per token on average, and to the gradient norm, as a
# share of it. Computations that are equal in theory differ by 1e-6 nats in fp32; in bf16, which
# keeps 8 bits, by 0.01 to 0.08 with 24 layers of random weights. Families for which sharing is
# wrong are off by 0.8 and more
ROUNDING = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.25, 0.1)}


def choose_computation(policy, prompts, group=1, max_length=1, trains=False, reference=None):
    """Decides how `policy` computes, on all ranks alike, and says so in one line.

    prompts: one or two, of encode_prompt(). group, max_length: completions per prompt and their
    tokens at most. trains: gradients matter too. reference: a Policy that is to do the same.
    """
    if not prompts:
        return
    # in fp32 a real difference cannot hide behind rounding; then as the run computes
    precisions = [contextlib.nullcontext()]
    if trains and policy.model.device.type == "cuda":
        precisions.append(autocast(policy.model.device))

    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    if policy.shares_prompt(longest + LENGTH):
        shared = (shared_sample, shared_logps)
        problem = broadcast(difference(policy, prompts, trains, precisions, *shared))
    else:
        problem = f"some layers see only {policy.shared_limit} tokens back"
    if problem:
        policy.shared_limit = 0
        use_plain_attention(policy.model)
    if policy.shared_limit < math.inf:
        check_plain(policy, prompts, trains, precisions)
    if reference:
        reference.shared_limit = policy.shared_limit
        reference.uses_cache = policy.uses_cache
    report(policy, problem, longest, group, max_length)


def check_plain(policy, prompts, trains, precisions):
    """Ends the program if the plain computation differs from the model's own forward() too.

    A family whose cache does not give what its forward() gives decodes without one.
    """
    for policy.uses_cache in (True, False):
        plain = (plain_sample, plain_logps)
        problem = broadcast(difference(policy, prompts, trains, precisions, *plain))
        if not problem:
            return
    family = policy.model.config.model_type
    fail(f"{family} cannot be used: generate() and log-probs differ from its forward(): {problem}")


def report(policy, problem, prompt_tokens, group, max_length):
    """Prints which computation it is, and what it costs."""
    family = policy.model.config.model_type
    if policy.shared_limit == math.inf:
        print_once(
            f"{family}: completions share their prompt; checked on your prompts, it is exact"
        )
        return
    ratio = group * (prompt_tokens + max_length) / (prompt_tokens + group * max_length)
    cost = f"{ratio:.1f} times the tokens, and decoding one prompt at a time"
    if not policy.uses_cache:
        cost += " without a cache"
    if problem:
        print_once(f"{family}: sharing prompts would be wrong ({problem}). Plain passes: {cost}")
    else:
        print_once(
            f"{family}: sharing prompts is exact within the {policy.shared_limit} tokens that some "
            f"layers see. Plain passes for longer ones: {cost}"
        )


# ---------------------------------------------------------------- the comparison


def difference(policy, prompts, trains, precisions, sample, score):
    """How a computation differs from the model's own forward() by more than rounding, or None.

    sample(policy, prompts, uniforms) -> ids, mask and score(policy, prompts, ids, mask) -> logps,
    entropy are the computation.
    """
    try:
        for precision in precisions:
            with precision, torch.set_grad_enabled(trains):
                nats, gradient = compare(policy, prompts, sample, score)
                most_nats, most_gradient = ROUNDING[dtype_of(policy)]
            if not math.isfinite(nats + gradient):
                return "log-probs or gradients are no numbers: is NaN among the weights?"
            if nats > most_nats:
                return f"log-probs are {nats:.2g} nats off"
            if gradient > most_gradient:
                return f"the gradient is {gradient:.0%} off"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # whatever a family raises at a cache or mask that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it fails: {reason[:60]}"
    finally:
        policy.zero_grad(set_to_none=True)
    return None


def compare(policy, prompts, sample, score):
    """(nats per token, largest share of a gradient norm) between a computation and forward().

    Two completions per prompt: the greedy one, whose tokens forward() must find likeliest too, and
    the same with its tokens rotated.
    """
    with greedy_without_end(policy):
        greedy, _ = sample(policy, prompts, torch.zeros(len(prompts), LENGTH))
    ids = torch.stack([greedy, greedy.roll(1, 1)], 1).flatten(0, 1)
    logps, _ = score(policy, prompts, ids, torch.ones_like(ids))

    offs = []
    regrets = []
    gradients = []
    for prompt, completions, ours in zip(prompts, ids.split(2), logps.split(2)):
        norm = gradient_norm(policy, ours)
        true, best = forward_logps(policy, prompt, completions)
        true_norm = gradient_norm(policy, true)
        offs.append((ours - true).detach().abs())
        regrets.append((best - true.detach())[0])
        gradients.append(abs(norm - true_norm) / max(true_norm, 1e-12))

    nats = torch.maximum(torch.cat(offs).mean(), torch.cat(regrets).mean())
    # max() of Python would lose a NaN
    return nats.item(), torch.tensor(gradients).max().item()


def forward_logps(policy, prompt, ids):
    """Log-probs of completions ids (n, S) and of the likeliest tokens, by the model's forward().

    One pass, for this family as for any other: no padding, no cache, its own attention and head.
    """
    use_plain_attention(policy.model)
    try:
        batch = join_prompts(policy.model, [prompt] * len(ids))
        joined = append_responses(batch, ids, torch.ones_like(ids))
        S = ids.shape[1]
        logits = policy.model(**joined, use_cache=False, logits_to_keep=S + 1).logits
    finally:
        if policy.shared_limit:
            use_grouped_attention(policy.model)
    logits = policy.shape_logits(logits[:, -S - 1 : -1])
    return token_logps(logits, ids), logits.detach().log_softmax(-1).amax(-1)


def shared_sample(policy, prompts, uniforms):
    batch = join_prompts(policy.model, prompts)
    return policy.sample(batch, *policy.prefill(batch), uniforms)


def shared_logps(policy, prompts, ids, mask):
    group = len(ids) // len(prompts)
    _, _, logps, entropy = policy(join_prompts(policy.model, prompts), group, ids=ids, mask=mask)
    return logps, entropy


@contextlib.contextmanager
def greedy_without_end(policy):
    """Inside, the policy decodes greedily and no token ends a completion."""
    medium = policy.media["text"]
    temperature = policy.temperature
    policy.media["text"] = medium._replace(stop_ids=())
    policy.temperature = 0
    try:
        yield
    finally:
        policy.media["text"] = medium
        policy.temperature = temperature


def gradient_norm(policy, logps):
    """Norm of the gradient of these log-probs, whose graph is kept; 0 without a graph.

    A gradient is dropped as soon as it is counted: all at once would take as much memory as the
    weights, which a run with --shard need not have.
    """
    if not logps.requires_grad:
        return 0.0
    squares = []

    def count(parameter):
        squares.append(parameter.grad.float().square().sum())
        parameter.grad = None

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in trained]
    logps.sum().backward(retain_graph=True)
    for hook in hooks:
        hook.remove()
    return torch.stack(squares).sum().sqrt().item()


def dtype_of(policy):
    """The precision that a pass computes in."""
    device = policy.model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return policy.model.dtype
