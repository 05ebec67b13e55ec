"""The flags of the GRPO loop, whatever it is trained on."""

from argparse import BooleanOptionalAction

from common.records import fail
from common.stage import non_negative, positive_int


def add_training_flags(parser):
    """The flags of the loop, whatever the tasks; defaults of RPT (2506.08007), where published."""
    add = parser.add_argument
    add("--objective", default="grpo", choices=("grpo", "sft"), help="sft: imitate (%(default)s)")
    add(
        "--loss",
        default="grpo",
        choices=("grpo", "dr_grpo", "dapo"),
        help="see grpo_train.py (%(default)s)",
    )
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
    add("--freeze", choices=("vision",), help="leave the vision tower out of training")
    add("--max-pixels", type=positive_int, default=1003520, help="per image: 1,280 tokens of 28^2")
    add("--seed", type=int, default=0, help="of data order and sampling (%(default)s)")

    # speed, duration and paths: these may change when a run is resumed
    add("--tokens-per-forward", type=positive_int, default=4096, help="of a micro-batch (a group)")
    add("--resume", action=BooleanOptionalAction, default=True, help="from the newest checkpoint")
    add("--save-every", type=positive_int, default=50, help="steps per checkpoint (%(default)s)")
    add("--log-every", type=positive_int, default=10, help="steps per printed line (%(default)s)")
    add("--sample-every", type=positive_int, default=10, help="steps per sample (%(default)s)")
    add("--keep", type=positive_int, default=2, help="newest checkpoints to keep (%(default)s)")
    add("--shard", action="store_true", help="a share of weights and optimizer per rank (FSDP2)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def check_training_flags(args):
    """Ends the program for flags of the loop that cannot work; makes --clip-eps a pair."""
    if args.objective == "grpo" and args.group_size < 2:
        fail("--group-size must be at least 2: an advantage compares the completions of one prompt")
    if not args.max_grad_norm:
        fail("--max-grad-norm 0 would leave nothing of any gradient")
    if not args.temperature:
        fail("--temperature must be above 0: an advantage compares different completions")
    if len(args.clip_eps) > 2:
        fail("--clip-eps takes one or two numbers: eps_low [eps_high]")
    args.clip_eps = (args.clip_eps[0], args.clip_eps[-1])
