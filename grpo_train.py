"""Stage 4: GRPO, written out by hand.

For each masked caption the policy samples G completions, the reward compares them with each other,
and the policy moves towards the better ones. With the ratio rho = exp(logp - logp_old) per token
and the advantage A per completion (reward.py, equation 2):

    objective = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL                   (3)
    KL        = exp(ref - logp) - (ref - logp) - 1        k3, of a frozen reference            (4)
    loss      = - sum over completions and tokens  u objective / N                             (5)

               u                      N                         (2) divides by std
    grpo       1 / completion length  completions of the step   yes     arXiv 2402.03300
    dr_grpo    1 / max-new-tokens     completions of the step   no      arXiv 2503.20783
    dapo       1                      tokens of the step        yes     arXiv 2503.14476

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

from common.script import run_script  # first: the other imports take seconds

import copy
import functools
import time

import torch

from common.captions import image_root, load_image
from common.masks import load_masks
from common.policies import load_policies, prepare_policy
from common.policy import decode
from common.prompts import Example, Prompts
from common.ranks import setup_distributed
from common.records import fail
from common.rollout import Rollout, reference_logps, run_policy
from common.run import open_run, settings_of
from common.stage import make_parser, parse, prefetch
from common.step_log import count, log_samples, step_metrics, step_seconds
from common.training import (
    StepSums,
    make_optimizer,
    match_passes,
    pack,
    set_gradient_sync,
    update,
    wrap_for_ranks,
    zero_anchor,
    zero_gradients,
)
from common.training_flags import add_training_flags, check_training_flags
from common.vlm import chat_prompt, encode_prompt, encode_responses, join_prompts
from reward import FILL_PROMPT, add_reward_flags, advantages, load_reward, target_completion

# ---------------------------------------------------------------- equations (3) to (5)


def grpo_objective(logps, rollout, args):
    """Equations (3) and (4): the objective, the KL, and whether rho was clipped, all (B*G, S).

    logps and what `rollout` holds are (B*G, S), its advantage (B, G) or (B*G,). With rho = 1.5 and
    eps 0.2, A = 1 gives 1.2 (clipped) and A = -1 gives -1.5.

    Everything is masked before exp(), and log-ratios are kept below 20: exp() of what stands at
    padding is inf, and inf * 0 is NaN. Far below 0, the gradient of the KL is 1: none is lost.
    """
    mask = rollout.mask.bool()
    A = rollout.advantage.flatten()[:, None]
    low = 1 - args.clip_eps[0]
    high = 1 + args.clip_eps[1]

    rho = (logps - rollout.old_logps).masked_fill(~mask, 0).clamp(max=20).exp()
    objective = torch.minimum(rho * A, rho.clamp(low, high) * A)
    clipped = ((rho < low) & (A < 0)) | ((rho > high) & (A > 0))

    kl = torch.zeros_like(logps)
    if rollout.ref_logps is not None:
        d = (rollout.ref_logps - logps).masked_fill(~mask, 0).clamp(max=20)
        kl = d.exp() - d - 1
    return (objective - args.beta * kl).masked_fill(~mask, 0), kl, clipped & mask


def imitation_objective(logps, mask):
    """What SFT maximises: the log-probs of the given tokens. Same returns as grpo_objective()."""
    zeros = torch.zeros_like(logps)
    return logps * mask, zeros, zeros


def weighting(args, tasks):
    """The row of the table above, or sft, which is that of dapo.

    Imitation of two tasks weighs completions alike: an image has more codes than a phrase tokens.
    """
    if args.objective == "grpo":
        return args.loss
    return "sft" if len(tasks) == 1 else "grpo"


def token_weights(mask, loss, max_length):
    """u of equation (5), the weight of each token: (B*G, S) in fp32."""
    mask = mask.float()
    if loss == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    if loss == "dr_grpo":
        return mask / max_length
    return mask


def loss_normaliser(loss, completions, tokens):
    """N of equation (5), from the counts of the whole step over all ranks."""
    if loss in ("grpo", "dr_grpo"):
        return completions
    return tokens  # dapo, and sft


# ---------------------------------------------------------------- the loop


def train(policy, reference, tasks, args, run):
    """Runs GRPO (or imitation, with --objective sft) on `tasks` until the last step of `run`.

    tasks: FillMask below shows their methods. reference: a frozen Policy for the KL, or None.
    """
    is_sft = args.objective == "sft"
    loss_kind = weighting(args, tasks)
    net = wrap_for_ranks(policy, run.world, args.shard)
    optimizer = make_optimizer(policy, args.lr)
    run.restore(policy, optimizer)

    load_step = functools.partial(micro_batches_of_step, tasks, args, run.rank, run.world)
    for step, micro_batches in zip(run.steps(), prefetch(load_step, run.steps())):
        began = time.time()
        # with idle passes, of weight 0, where other ranks have more: collectives have to match
        micro_batches = match_passes(net, micro_batches)
        rollouts = [None] * len(micro_batches)
        n_skipped = 0
        for _ in range(args.updates):
            zero_gradients(net, optimizer)
            sums = StepSums()
            for i, (task, examples) in enumerate(micro_batches):
                set_gradient_sync(net, is_last=i + 1 == len(micro_batches))
                batch = join_prompts(policy.model, [example.prompt for example in examples])

                # 1. Rollout (or given completions) and log-probs, from one pass over the prompts.
                if is_sft:
                    rollouts[i] = Rollout(*task.sft_completions(examples))
                is_new = rollouts[i] is None
                rollout, logps, entropy = run_policy(net, batch, rollouts[i], task, examples, step)

                # 2. Reward and advantage, once per rollout. The first update has rho = 1.
                if is_new:
                    rollout.old_logps = logps.detach()
                    rollout.ref_logps = reference_logps(reference, batch, rollout, task.medium)
                    judge(rollout, task, examples, args.loss)
                    log_samples(run, step, task, examples, rollout, args)
                    rollouts[i] = rollout

                # 3. The loss of this micro-batch: a sum, as N counts the whole step.
                if is_sft:
                    objective, kl, clipped = imitation_objective(logps, rollout.mask)
                else:
                    objective, kl, clipped = grpo_objective(logps, rollout, args)
                u = token_weights(rollout.mask, loss_kind, task.max_length)
                loss = -(objective * u).sum() + zero_anchor(net)
                (loss * (not examples[0].is_idle)).backward()
                if not examples[0].is_idle:
                    count(sums, policy, batch, rollout, task, loss, entropy, kl, clipped)

            # 4. One update for the whole step. Gradients are means over ranks, hence the world.
            sums = sums.over_ranks()
            N = loss_normaliser(loss_kind, sums["completions"], sums["tokens"])
            grad_norm, is_finite = update(net, optimizer, sums["loss"], run.world / N, args)
            n_skipped += not is_finite

        metrics = step_metrics(step, sums, N, tasks)
        metrics |= {"grad_norm": grad_norm, "lr": args.lr, "skipped_update": n_skipped}
        run.log_step(metrics | step_seconds(began, rollouts, sums))
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
    """The task of MMRPT: fill [MASK] from the image and the rest of the caption.

    records: of build_masks.py. places: of the prompts of a step, those of this task. scorer: a
    Reward, or None for imitation.
    """

    name = "fill"
    medium = "text"
    flag = "--data"

    def __init__(self, args, root, policy, records, places, scorer):
        self.args = args
        self.root = root
        self.policy = policy
        self.max_length = args.max_new_tokens
        # a tokenizer cannot serve two threads ("Already borrowed")
        self.processor = copy.deepcopy(policy.processor)
        self.prompts = Prompts(records, self.encode, places, args.seed, self.flag)
        self.scorer = scorer
        self.weights = scorer.weights if scorer else {}

    def encode(self, place, record):
        image = load_image(self.root, record["image"], self.args.max_pixels)
        target, _, _ = encode_responses(self.processor, [target_completion(record)], "cpu")
        room = max(self.max_length, target.shape[1] + 1)
        text = FILL_PROMPT.format(masked_caption=record["masked_caption"])
        prompt = chat_prompt(self.processor, text)
        encoded = encode_prompt(self.policy.model, self.processor, prompt, [image], room)
        return Example(place, record, image, encoded)

    def tokens_of(self, prompt_tokens, group):
        """Tokens of a pass over a prompt and its completions, which share it where they may."""
        if self.policy.shares_prompt(prompt_tokens + self.max_length):
            return prompt_tokens + group * self.max_length
        return group * (prompt_tokens + self.max_length)

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


def micro_batches_of_step(tasks, args, rank, world, step):
    """[(task, [Example, ...]), ...] of a step, each of at most --tokens-per-forward tokens.

    They are this rank's share; a rank without any gets a prompt of weight 0.
    """
    group = 1 if args.objective == "sft" else args.group_size
    micro_batches = []
    for task in tasks:
        examples = task.prompts.examples_of_step(step, rank, world)
        tokens_of = functools.partial(task.tokens_of, group=group)
        for part in pack(examples, tokens_of, args.tokens_per_forward):
            micro_batches.append((task, part))
    return micro_batches or [(tasks[0], [tasks[0].prompts.first().as_idle()])]


# ---------------------------------------------------------------- flags


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder")
    add("--data", required=True, help="masks, of build_masks.py")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", required=True, help="folder of the run")
    add_training_flags(parser)
    add_reward_flags(parser)
    args = parse(parser)
    args.reward = dict(args.reward)
    if args.objective == "grpo" and not any(args.reward.values()):
        fail("--reward: all weights are 0, so nothing is rewarded")
    check_training_flags(args)
    return args


def main():
    args = parse_args()
    rank, world, device = setup_distributed()
    root = image_root(args.image_root, args.data)
    run = open_run(args, settings_of(args, ("model", "data", "clip", "clip_weights")), rank, world)
    if run is None:
        return

    policy, reference = load_policies(args, run.checkpoint, device, world)
    records = load_masks(args.data)
    scorer = None
    if args.objective == "grpo":
        scorer = load_reward(args, records, root, policy)
    task = FillMask(args, root, policy, records, range(args.prompts_per_step), scorer)
    prepare_policy(policy, reference, [task], args)
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    run.begin(
        f"{args.objective} on {world} x {device.type}: {millions:.2f}M parameters, "
        f"{len(records)} masks"
    )
    train(policy, reference, [task], args, run)
    if scorer and scorer.clip:
        scorer.clip.report_truncated()
    run.report_done(device, len(task.prompts.bad))


if __name__ == "__main__":
    run_script(main)
