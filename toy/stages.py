"""The five stages on the toy world, as commands that can be typed by hand."""

from typing import NamedTuple

from toy.commands import recipe_command


class Size(NamedTuple):
    """How much of everything; None: as the recipe has it."""

    n_train: int = 12000
    n_val: int = 300
    base_steps: int = 950
    clip_steps: int = 400
    scored: int = 1200
    updates: int = 150
    judged: int | None = None


FULL = Size()
SMALL = Size(n_train=300, n_val=40, base_steps=40, clip_steps=20, scored=100, updates=4, judged=40)


class Stage(NamedTuple):
    """A command, the path that it writes, and what it does, in a sentence."""

    name: str
    written: str
    command: list
    about: str


ABOUT = {
    "base": "The model to be trained: it learns to caption images and to fill in hidden words.",
    "clip": "CLIP, the judge of the visual reward: it learns which text belongs to which image.",
    "score train": "Stage 1. Which sentences of the training captions need the image?",
    "score val": "Stage 1 for the held-out captions.",
    "mask train": "Stage 2. Hide what needs the image, in the training captions.",
    "mask val": "Stage 2 for the held-out captions.",
    "train sft": "The baseline: imitate the hidden text, lies included (SFT).",
    "train mmrpt": "Stages 3 and 4. Reward answers that fit the image, and train on that by GRPO.",
    "evaluate base": "Stage 5. The base fills held-out masks over the image, a grey one, another.",
    "evaluate sft": "Stage 5 for the model trained by SFT.",
    "evaluate mmrpt": "Stage 5 for the model trained by MMRPT.",
}


def stages(out, seed, size):
    """Every stage in the world `out`: a list of steps.

    A step is a list of lanes that run side by side, and a lane is a list of stages that run in
    turn.
    """
    base, clip = model_stages(out, seed, size)
    score = score_stages(out, size)
    mask = mask_stages(out, seed)
    sft, mmrpt = train_stages(out, seed, size)
    evaluate_base, evaluate_sft, evaluate_mmrpt = evaluate_stages(out, size)
    return [
        [[base], [clip]],
        [[stage] for stage in score],
        [[stage] for stage in mask],
        [[mmrpt], [sft, evaluate_base, evaluate_sft]],
        [[evaluate_mmrpt]],
    ]


def model_stages(out, seed, size):
    """Training of the base and of CLIP, by toy/training.py."""
    for name, steps in (("base", size.base_steps), ("clip", size.clip_steps)):
        command = ["toy_world.py", "--piece", name, str(steps)]
        command += ["--seed", str(seed), "--out", f"{out}"]
        yield Stage(name, f"{out}/{name}", command, ABOUT[name])


def stage(name, script, recipe, written, *arguments):
    """A Stage that runs `script` with a recipe and what differs from it."""
    recipe = f"recipes/toy/{recipe}.txt"
    command = recipe_command(script, recipe, *arguments, "--out", written)
    return Stage(name, written, command, ABOUT[name])


def score_stages(out, size):
    for split, flags in (("train", ()), ("val", ("--ablation",))):
        yield stage(
            f"score {split}",
            "score_dependency.py",
            "score",
            f"{out}/scores_{split}.jsonl",
            *("--model", f"{out}/base"),
            *("--data", f"{out}/{split}.jsonl"),
            *("--limit", size.scored),
            *flags,
        )


def mask_stages(out, seed):
    for split in ("train", "val"):
        yield stage(
            f"mask {split}",
            "build_masks.py",
            "mask",
            f"{out}/masks_{split}.jsonl",
            *("--scores", f"{out}/scores_{split}.jsonl"),
            *("--seed", seed),
        )


def train_stages(out, seed, size):
    for name, recipe in (("sft", "sft"), ("mmrpt", "train")):
        # imitation needs no reward
        clip = ("--clip", f"{out}/clip") if name == "mmrpt" else ()
        yield stage(
            f"train {name}",
            "grpo_train.py",
            recipe,
            f"{out}/{name}",
            *("--model", f"{out}/base"),
            *("--data", f"{out}/masks_train.jsonl"),
            *("--steps", size.updates),
            *("--seed", seed),
            *clip,
        )


def checkpoint(out, name, size):
    """The folder of the base, or of the last checkpoint of a training."""
    if name == "base":
        return f"{out}/base"
    return f"{out}/{name}/checkpoint-{size.updates}"


def evaluate_stages(out, size):
    limit = ("--limit", size.judged) if size.judged else ()
    for name in ("base", "sft", "mmrpt"):
        compare = () if name == "base" else ("--compare", f"{out}/eval_base")
        yield stage(
            f"evaluate {name}",
            "evaluate.py",
            "evaluate",
            f"{out}/eval_{name}",
            *("--model", checkpoint(out, name, size)),
            *("--data", f"{out}/masks_val.jsonl"),
            *("--clip", f"{out}/clip"),
            *limit,
            *compare,
        )
