"""The five stages on the toy world, as commands that can be typed by hand."""

from typing import NamedTuple

from toy.commands import recipe_command


class Size(NamedTuple):
    """How much of everything; None: as the recipe has it."""

    n_train: int = 12000
    n_val: int = 300
    base_steps: int = 850
    clip_steps: int = 700
    scored: int = 1500
    updates: int = 150
    judged: int | None = None
    question_steps: int = 100
    asked: int = 150


FULL = Size()
SMALL = Size(300, 40, 60, 20, 100, 4, 40, 4, 8)


class Stage(NamedTuple):
    """A command, the path that it writes, and what it does, in a sentence."""

    name: str
    written: str
    command: list
    about: str


ABOUT = {
    "score": "Stage 1. Which sentences of the {} captions need the image?",
    "mask": "Stage 2. Hide what needs the image, in the {} captions.",
    "train sft": "The baseline: imitate the hidden text, lies included (SFT).",
    "train mmrpt": "Stages 3 and 4. Reward answers that fit the image, and train on that by GRPO.",
    "evaluate": "Stage 5. The {} model fills held-out masks, seeing the image, a grey one, or another image.",
    "teach": "A short tuning of the {} model on multiple-choice questions, which it has never seen.",
    "ask": "Multiple-choice questions about held-out images, put to the {} model.",
}


IN_WORDS = {"train": "training", "val": "held-out", "sft": "SFT", "mmrpt": "MMRPT"}


def about(name):
    """What a stage does, for people who read the output."""
    kind, _, which = name.partition(" ")
    return ABOUT.get(name, ABOUT.get(kind, "")).format(IN_WORDS.get(which, which))


def stages(out, seed, size):
    """Every stage in the world `out`, in order."""
    return [
        *score_stages(out, size),
        *mask_stages(out, seed),
        *train_stages(out, seed, size),
        *evaluate_stages(out, size),
        *question_stages(out, seed, size),
    ]


def stage(name, script, recipe, written, *arguments):
    """A Stage that runs `script` with a recipe and what differs from it."""
    recipe = f"recipes/toy/{recipe}.txt"
    command = recipe_command(script, recipe, *arguments, "--out", written)
    return Stage(name, written, command, about(name))


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


def question_stages(out, seed, size):
    """A short tuning on questions, which the toy's models have never seen, and then val.tsv."""
    for name in ("base", "mmrpt"):
        written = f"{out}/questions_{name}"
        command = ["toy_world.py", "--piece", "questions", str(size.question_steps)]
        command += [checkpoint(out, name, size), "--seed", str(seed), "--out", written]
        yield Stage(f"teach {name}", written, command, about(f"teach {name}"))
    for name in ("base", "mmrpt"):
        compare = () if name == "base" else ("--compare", f"{out}/asked_base")
        yield stage(
            f"ask {name}",
            "evaluate.py",
            "questions",
            f"{out}/asked_{name}",
            *("--model", f"{out}/questions_{name}"),
            *("--data", f"{out}/val.tsv"),
            *("--limit", size.asked),
            *compare,
        )
