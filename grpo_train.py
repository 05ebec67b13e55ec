"""Stage 4: GRPO, written out by hand.

For each masked caption the policy samples G completions, the reward compares them with each other,
and the policy moves towards the better ones. With the ratio rho = exp(logp - logp_old) per token
and the advantage A per completion (reward.py, equation 2):

    objective = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL                   (3)
    KL        = exp(ref - logp) - (ref - logp) - 1        k3, of a frozen reference            (4)
    loss      = - sum over completions and tokens  u objective / N                             (5)

               u                      N                              (2) divides by std
    grpo       1 / completion length  completions of the step        yes     arXiv 2402.03300
    dr_grpo    1                      completions * max-new-tokens   no      arXiv 2503.20783
    dapo       1                      tokens of the step             yes     arXiv 2503.14476

N counts the whole step over all ranks: each micro-batch backpropagates an undivided sum, and the
accumulated gradient is divided by N once, before the update. With --loss grpo, one update per
rollout and no KL, the loss is 0 although its gradient is not, since rho is 1 and the advantages of
a group sum to 0: watch advantage_abs, grad_norm and the reward.

    python grpo_train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data masks.jsonl --out run
    python grpo_train.py @recipes/toy/train.txt      # flags from a file, which others override
    torchrun --nproc_per_node 8 grpo_train.py --model ... --data ... --out ...

in:   JSONL of build_masks.py
out:  OUT/metrics.jsonl (a line per step), OUT/curves.png, OUT/samples.txt, OUT/checkpoint-N

Ours: reward components are normalised one by one (reward.py); the prompt of a group is run once
(common/policy.py). No KL unless --beta is given, as in RPT (arXiv 2506.08007).
"""

import copy
import functools
import time
from argparse import BooleanOptionalAction

import torch

from build_masks import load_masks
from common.captions import image_root, load_image
from common.policy import Policy, decode, freeze_unused
from common.prompts import Example, Prompts
from common.ranks import setup_distributed
from common.records import fail
from common.rollout import Rollout, reference_logps, run_policy
from common.run import open_run, settings_of
from common.stage import make_parser, non_negative, parse, positive_int, prefetch, run_script
from common.step_log import count, log_samples, step_metrics, step_seconds
from common.training import (
    StepSums,
    autocast,
    make_optimizer,
    pack,
    set_gradient_sync,
    update,
    wrap_for_ranks,
    zero_gradients,
)
from common.vlm import chat_prompt, encode_prompt, encode_responses, join_prompts, load_vlm
from reward import FILL_PROMPT, add_reward_flags, advantages, load_reward, target_completion

# ---------------------------------------------------------------- equations (3) to (5)


def grpo_objective(logps, rollout, args):
    """Equations (3) and (4): the objective, the KL, and whether rho was clipped, all (B*G, S).

    logps and what `rollout` holds are (B*G, S), its advantage (B, G) or (B*G,). With rho = 1.5 and
    eps 0.2, A = 1 gives 1.2 (clipped) and A = -1 gives -1.5.

    Everything is masked before exp(), and log-ratios are kept within +-20: exp() of what stands at
    padding is inf, and inf * 0 is NaN.
    """
    mask = rollout.mask.bool()
    A = rollout.advantage.flatten()[:, None]
    low = 1 - args.clip_eps[0]
    high = 1 + args.clip_eps[1]

    rho = (logps - rollout.old_logps).masked_fill(~mask, 0).clamp(-20, 20).exp()
    objective = torch.minimum(rho * A, rho.clamp(low, high) * A)
    clipped = ((rho < low) & (A < 0)) | ((rho > high) & (A > 0))

    kl = torch.zeros_like(logps)
    if rollout.ref_logps is not None:
        d = (rollout.ref_logps - logps).masked_fill(~mask, 0).clamp(-20, 20)
        kl = d.exp() - d - 1
    return (objective - args.beta * kl).masked_fill(~mask, 0), kl, clipped & mask


def imitation_objective(logps, mask):
    """What SFT maximises: the log-probs of the given tokens. Same returns as grpo_objective()."""
    zeros = torch.zeros_like(logps)
    return logps * mask, zeros, zeros


def token_weights(mask, loss):
    """u of equation (5), the weight of each token: (B*G, S) in fp32."""
    mask = mask.float()
    if loss == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    return mask


def loss_normaliser(loss, completions, tokens, max_new_tokens):
    """N of equation (5), from the counts of the whole step over all ranks."""
    if loss == "grpo":
        return completions
    if loss == "dr_grpo":
        return completions * max_new_tokens
    return tokens  # dapo, and sft


# ---------------------------------------------------------------- the loop


def train(policy, reference, tasks, args, run):
    """Runs GRPO (or imitation, with --objective sft) on `tasks` until the last step of `run`.

    tasks: FillMask below shows their methods. reference: a frozen Policy for the KL, or None.
    """
    is_sft = args.objective == "sft"
    loss_kind = "sft" if is_sft else args.loss
    net = wrap_for_ranks(policy, run.world)
    # a rank without prompts runs a copy of the first, only so that DDP's collectives match
    is_idle = run.rank >= args.prompts_per_step
    optimizer = make_optimizer(policy, args.lr, shard=args.zero and run.world > 1)
    run.restore(optimizer)

    load_step = functools.partial(micro_batches_of_step, tasks, args)
    for step, micro_batches in zip(run.steps(), prefetch(load_step, run.steps())):
        began = time.time()
        policy.rollout_seconds = 0.0
        rollouts = [None] * len(micro_batches)
        n_skipped = 0
        for _ in range(args.updates):
            zero_gradients(optimizer, run.world)
            sums = StepSums()
            for i, (task, examples) in enumerate(micro_batches):
                set_gradient_sync(net, is_last=i + 1 == len(micro_batches))
                batch = join_prompts(policy.model, [example.prompt for example in examples])

                # 1. Rollout (or given completions) and log-probs, from one pass over the prompts.
                if is_sft:
                    rollouts[i] = Rollout(*task.sft_completions(examples))
                is_new = rollouts[i] is None
                rollout, logps, entropy = run_policy(net, batch, rollouts[i], examples, step, args)

                # 2. Reward and advantage, once per rollout. The first update has rho = 1.
                if is_new:
                    rollout.old_logps = logps.detach()
                    rollout.ref_logps = reference_logps(reference, batch, rollout)
                    judge(rollout, task, examples, args.loss)
                    log_samples(run, step, task, examples, rollout, args)
                    rollouts[i] = rollout

                # 3. The loss of this micro-batch: a sum, as N counts the whole step.
                if is_sft:
                    objective, kl, clipped = imitation_objective(logps, rollout.mask)
                else:
                    objective, kl, clipped = grpo_objective(logps, rollout, args)
                loss = -(objective * token_weights(rollout.mask, loss_kind)).sum()
                (loss * (not is_idle)).backward()
                if not is_idle:
                    count(sums, policy, batch, rollout, loss, entropy, kl, clipped)

            # 4. One update for the whole step. DDP has averaged over ranks, hence the world.
            sums = sums.over_ranks()
            N = loss_normaliser(loss_kind, sums["completions"], sums["tokens"], args.max_new_tokens)
            grad_norm, is_finite = update(optimizer, sums["loss"], run.world / N, args)
            n_skipped += not is_finite

        metrics = step_metrics(step, sums, N, tasks[0].weights)
        metrics |= {"grad_norm": grad_norm, "lr": args.lr, "skipped_update": n_skipped}
        run.log_step(metrics | step_seconds(began, policy, rollouts, sums))
        run.save_checkpoint(step, policy, optimizer)


def judge(rollout, task, examples, loss):
    """Completes a Rollout: completions, reward components, and the advantage of equation (2)."""
    began = time.time()
    rollout.completions = task.decode(rollout.ids, rollout.mask)
    rollout.components = task.reward(examples, rollout.completions)
    advantage = advantages(rollout.components, task.weights, scale=loss != "dr_grpo")
    rollout.advantage = advantage.to(rollout.ids.device)
    rollout.reward_seconds = time.time() - began


# ---------------------------------------------------------------- the task: fill the mask


class FillMask:
    """The task of MMRPT: fill [MASK] from the image and the rest of the caption."""

    def __init__(self, args, root, policy, rank, world):
        self.args = args
        self.root = root
        self.policy = policy
        # a tokenizer cannot serve two threads ("Already borrowed")
        self.processor = copy.deepcopy(policy.processor)
        self.prompts = Prompts(load_masks(args.data), self.encode, args, rank, world)
        self.examples_of_step = self.prompts.examples_of_step
        self.scorer = None
        self.weights = {}
        if args.objective == "grpo":
            self.scorer = load_reward(args, self.prompts.records, root, policy)
            self.weights = self.scorer.weights

    def encode(self, place, record):
        image = load_image(self.root, record["image"], self.args.max_pixels)
        target, _, _ = encode_responses(self.processor, [target_completion(record)], "cpu")
        room = max(self.args.max_new_tokens, target.shape[1] + 1)
        text = FILL_PROMPT.format(masked_caption=record["masked_caption"])
        prompt = chat_prompt(self.processor, text)
        encoded = encode_prompt(self.policy.model, self.processor, prompt, [image], room)
        return Example(place, record, image, encoded)

    def decode(self, ids, mask):
        """Completions as B lists of G texts."""
        texts = decode(self.policy.processor, ids, mask)
        group = self.args.group_size
        return [texts[i : i + group] for i in range(0, len(texts), group)]

    def reward(self, examples, completions):
        """{component: (B, G)} of completions[b][g]."""
        records = [example.record for example in examples]
        images = [example.image for example in examples]
        return self.scorer(records, images, completions)

    def sft_completions(self, examples):
        """ids and mask (B, S) of what imitation learns to write."""
        texts = [target_completion(example.record) for example in examples]
        eos = self.policy.eos_ids[0]
        ids, mask, _ = encode_responses(self.policy.processor, texts, self.policy.model.device, eos)
        return ids, mask

    def heading(self, example):
        """What samples.txt shows of a prompt."""
        record = example.record
        return f"{record['image']}\n{record['sentence']}   <-   {record['answer']}"

    def describe(self, example, completion):
        """What samples.txt shows of a completion."""
        return repr(completion)


def micro_batches_of_step(tasks, args, step):
    """[(task, [Example, ...]), ...] of a step, each of at most --tokens-per-forward tokens."""
    group = 1 if args.objective == "sft" else args.group_size
    room = group * args.max_new_tokens
    micro_batches = []
    for task in tasks:
        for examples in pack(task.examples_of_step(step), room, args.tokens_per_forward):
            micro_batches.append((task, examples))
    return micro_batches


# ---------------------------------------------------------------- flags


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder")
    add("--data", required=True, help="masks, of build_masks.py")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", required=True, help="folder of the run")

    # the method; RPT (2506.08007) is the closest relative whose settings are published
    add("--objective", default="grpo", choices=("grpo", "sft"), help="sft: imitate (%(default)s)")
    add("--loss", default="grpo", choices=("grpo", "dr_grpo", "dapo"), help="see the table above")
    add("--steps", type=positive_int, default=500, help="in all (500: 16,000 prompts)")
    add("--prompts-per-step", type=positive_int, default=32, help="of all ranks (32: common)")
    add("--group-size", type=positive_int, default=8, help="G, completions per prompt (8, as RPT)")
    add("--max-new-tokens", type=positive_int, default=256, help="(256: a thought and a phrase)")
    add("--temperature", type=non_negative, default=0.8, help="of sampling (0.8, as RPT)")
    add("--updates", type=positive_int, default=1, help="per rollout (default 1: on-policy)")
    add("--lr", type=non_negative, default=1e-6, help="for billions of parameters (1e-6, as RPT)")
    add("--beta", type=non_negative, default=0.0, help="weight of the KL (default 0, as RPT)")
    add("--clip-eps", type=non_negative, nargs="+", default=[0.2], help="low [high] (0.2, as RPT)")
    add("--max-grad-norm", type=non_negative, default=1.0, help="(%(default)s: common practice)")
    add("--max-pixels", type=positive_int, default=1003520, help="per image: 1,280 tokens of 28^2")
    add("--seed", type=int, default=0, help="of data order and sampling (%(default)s)")
    add_reward_flags(parser)

    # speed, duration and paths: these may change when a run is resumed
    add("--tokens-per-forward", type=positive_int, default=4096, help="of a micro-batch (a group)")
    add("--resume", action=BooleanOptionalAction, default=True, help="from the newest checkpoint")
    add("--save-every", type=positive_int, default=50, help="steps per checkpoint (%(default)s)")
    add("--log-every", type=positive_int, default=10, help="steps per printed line (%(default)s)")
    add("--sample-every", type=positive_int, default=10, help="steps per sample (%(default)s)")
    add("--keep", type=positive_int, default=2, help="newest checkpoints to keep (%(default)s)")
    add("--zero", action="store_true", help="shard optimizer state over ranks (ZeRO-1)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    args = parse(parser)
    check_args(args)
    return args


def check_args(args):
    """Ends the program for flags that cannot work; makes --reward a dict and --clip-eps a pair."""
    args.reward = dict(args.reward)
    if args.objective == "grpo" and not any(args.reward.values()):
        fail("--reward: all weights are 0, so nothing is rewarded")
    if args.objective == "grpo" and args.group_size < 2:
        fail("--group-size must be at least 2: an advantage compares the completions of one prompt")
    if not args.max_grad_norm:
        fail("--max-grad-norm 0 would leave nothing of any gradient")
    if not args.temperature:
        fail("--temperature must be above 0: an advantage compares different completions")
    if len(args.clip_eps) > 2:
        fail("--clip-eps takes one or two numbers: eps_low [eps_high]")
    args.clip_eps = (args.clip_eps[0], args.clip_eps[-1])


def main():
    args = parse_args()
    rank, world, device = setup_distributed()
    root = image_root(args.image_root, args.data)
    run = open_run(args, settings_of(args, ("model", "data", "clip")), rank, world)
    if run is None:
        return

    # fp32 master weights: at lr 1e-6 a bf16 weight would round every update away (AReaL PR#1634)
    name = str(run.checkpoint or args.model)
    model, processor = load_vlm(name, device, args.trust_remote_code, torch.float32)
    policy = Policy(model, processor, 1.0 if args.objective == "sft" else args.temperature)
    reference = None
    if args.beta and args.objective == "grpo":
        # in the policy's numerics, or the KL would not start at 0
        start, _ = load_vlm(args.model, device, args.trust_remote_code, torch.float32)
        reference = Policy(start.requires_grad_(False), processor, args.temperature)

    task = FillMask(args, root, policy, rank, world)
    with autocast(device):
        freeze_unused(policy, join_prompts(model, [task.prompts.example(place=0, index=0).prompt]))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    run.begin(
        f"{args.objective} on {world} x {device.type}: {millions:.2f}M parameters, "
        f"{len(task.prompts.records)} masks"
    )
    train(policy, reference, [task], args, run)
    if task.scorer and task.scorer.clip:
        task.scorer.clip.report_truncated()
    run.report_done(device, len(task.prompts.bad))


if __name__ == "__main__":
    run_script(main)
