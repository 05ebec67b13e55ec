"""LVRPO: the loop of grpo_train.py on two tasks, reading and drawing, in one unified model.

Each step holds prompts of both kinds. The policy samples G completions for each, texts or images,
the rewards of lvrpo/reward.py compare them with each other, and equations (2) to (5) apply
unchanged: a drawing is a sequence of codes, sampled from a head of its own, whose log-probs are as
exact as those of text.

    python -m lvrpo.train --model deepseek-community/Janus-Pro-1B --data masks.jsonl \\
        --prompts prompts.jsonl --out run
    torchrun --nproc_per_node 8 -m lvrpo.train @recipes/janus-pro-1b/train-8-gpus.txt

in:   --data: masks of build_masks.py, or {id, image, question, answer}, for reading
      --prompts: {id, prompt, image?, tag?, include?, exclude?}, for drawing; r_ins checks GenEval's
      `include` and `exclude`, and --objective sft imitates `image`
out:  that of grpo_train.py, with metrics per task ("entropy/drawing"), and OUT/samples/step-N.png

The paper (arXiv 2603.27693) trains BAGEL, which draws by flow matching; Janus draws by discrete
codes. That, --draw-share, and normalising each component before adding are ours.
"""

from common.script import run_script  # first: the other imports take seconds

from common.captions import image_root
from common.drawing_prompts import load_prompts
from common.drawings import require_drawing
from common.masks import load_masks
from common.policies import load_policies, prepare_policy
from common.ranks import setup_distributed
from common.records import fail
from common.run import open_run, settings_of
from common.stage import make_parser, parse
from common.training_flags import add_training_flags, check_training_flags
from grpo_train import train
from lvrpo.reward import (
    RawSum,
    ReadingReward,
    add_lvrpo_reward_flags,
    check_judges,
    load_drawing_reward,
    load_judges,
)
from lvrpo.tasks import Drawing, Reading


def load_tasks(args, root, policy):
    """The tasks of a run: reading, drawing, or both, in the share of --draw-share."""
    n_read, n_drawn = prompts_of_step(args)
    is_rewarded = args.objective == "grpo"
    clip, detector, knowledge = load_judges(args, judged_by(args), policy.model.device)

    tasks = []
    if n_read:
        records = load_masks(args.data)
        scorer = None
        if is_rewarded:
            scorer = ReadingReward(
                args.read_reward,
                tokenizer=policy.processor.tokenizer,
                clip=clip,
                hidden=[record["answer"] for record in records],
                knowledge=knowledge,
            )
        tasks.append(Reading(args, root, policy, records, range(n_read), scorer))
    if n_drawn:
        require_drawing(policy, args.model)
        records = load_prompts(args.prompts)
        scorer = None
        if is_rewarded:
            scorer = load_drawing_reward(args, records, clip, detector, knowledge)
        places = range(n_read, n_read + n_drawn)
        tasks.append(Drawing(args, root, policy, records, places, scorer))
    for task in tasks:
        if is_rewarded and args.raw_sum:
            task.scorer = RawSum(task.scorer)
            task.weights = task.scorer.weights
    return tasks


def prompts_of_step(args):
    """How many prompts of a step are read, and how many are drawn."""
    n_drawn = round(args.draw_share * args.prompts_per_step)
    return args.prompts_per_step - n_drawn, n_drawn


def judged_by(args):
    """The components that need a judge. Answers are compared with the caption's by rule."""
    if args.objective == "sft":
        return set()
    drawing = {name for name, weight in args.draw_reward.items() if weight}
    reading = {name for name, weight in args.read_reward.items() if weight}
    return drawing | (reading - {"ins"})


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder of a model that reads and draws")
    add("--data", help="masks or questions, to read")
    add("--prompts", help="what to draw")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", required=True, help="folder of the run")
    add("--draw-share", type=float, default=0.5, help="of the prompts of a step (%(default)s)")
    note = "of drawing, in training: 1 is none, above it costs twice the passes (%(default)s)"
    add("--guidance", type=float, default=1.0, help=note)
    add_training_flags(parser)
    add_lvrpo_reward_flags(parser)
    args = parse(parser)
    check_args(args)
    check_training_flags(args)
    return args


def check_args(args):
    """Ends the program for flags of the two tasks that cannot work; makes dicts of the weights."""
    if not 0 <= args.draw_share <= 1:
        fail("--draw-share must lie between 0 (reading only) and 1 (drawing only)")
    n_read, n_drawn = prompts_of_step(args)
    # what is not done needs no judge
    args.read_reward = dict(args.read_reward) if n_read else {}
    args.draw_reward = dict(args.draw_reward) if n_drawn else {}
    if not 1 <= args.guidance < float("inf"):
        fail("--guidance must be at least 1, which is none")
    if n_drawn and not args.prompts:
        fail("drawing needs --prompts; --draw-share 0 only reads")
    if n_read and not args.data:
        fail("reading needs --data; --draw-share 1 only draws")
    if 0 < args.draw_share < 1 and not (n_read and n_drawn):
        fail("--draw-share leaves one of the tasks no prompt: raise --prompts-per-step")
    if args.objective == "grpo" and args.loss == "dapo" and n_read and n_drawn:
        fail("--loss dapo weighs tokens alike, so images would outweigh texts: use grpo or dr_grpo")
    for flag, n in (("read_reward", n_read), ("draw_reward", n_drawn)):
        if args.objective == "grpo" and n and not any(getattr(args, flag).values()):
            fail(f"--{flag.replace('_', '-')}: all weights are 0, so nothing is rewarded")
    check_judges(args, judged_by(args))


def main():
    args = parse_args()
    rank, world, device = setup_distributed()
    root = image_root(args.image_root, args.data or args.prompts)
    paths = ("model", "data", "prompts", "clip", "clip_weights", "knowledge", "detector")
    run = open_run(args, settings_of(args, paths), rank, world)
    if run is None:
        return

    policy, reference = load_policies(args, run.checkpoint, device, world)
    tasks = load_tasks(args, root, policy)
    prepare_policy(policy, reference, tasks, args)
    counts = ", ".join(f"{len(task.prompts.records)} for {task.name}" for task in tasks)
    run.begin(f"{args.objective} on {world} x {device.type}: records: {counts}")
    train(policy, reference, tasks, args, run)
    for clip in {getattr(task.scorer, "clip", None) for task in tasks} - {None}:
        clip.report_truncated()
    run.report_done(device, sum(len(task.prompts.bad) for task in tasks))


if __name__ == "__main__":
    run_script(main)
