"""LVRPO on the drawing world, as commands that can be typed by hand."""

from typing import NamedTuple

from toy.stages import Stage, recipe_command


class Size(NamedTuple):
    """How much of everything; None: as the recipe has it."""

    n_train: int = 12000
    n_val: int = 300
    vq_steps: int = 700
    base_steps: int = 950
    clip_steps: int = 400
    judge_steps: int = 400
    scored: int = 1200
    updates: int = 150
    drawn: int | None = None
    judged: int | None = None


FULL = Size()
SMALL = Size(300, 40, 30, 20, 20, 20, 100, updates=2, drawn=8, judged=20)

# what is trained: (its name, how it differs from the recipe)
RUNS = {
    "both": (),
    "sft": ("--objective", "sft"),
    "drawing": ("--draw-share", "1", "--prompts-per-step", "16"),
    "reading": ("--draw-share", "0", "--prompts-per-step", "16"),
}
MODELS = ("base", "sft", "drawing", "reading", "both")
# how drawings are sampled: (name, guidance, temperature, samples per prompt)
SAMPLINGS = (("guidance 1", 1, 1, 4), ("guidance 2", 2, 1, 1), ("greedy", 1, 0, 1))
ABOUT = {
    "both": "LVRPO. Half of the prompts are read, half drawn; rewards compare the completions.",
    "sft": "The baseline: imitate captions and codes, lies included (SFT).",
    "drawing": "LVRPO on drawing alone. What does it cost reading?",
    "reading": "LVRPO on reading alone. What does it cost drawing?",
}


def stages(out, seed, size):
    """Every stage in the world `out`: a list of steps of lanes of stages, as toy/stages.py has."""
    base, clip, judge = model_stages(out, seed, size)
    scores, masks = mask_stages(out, seed, size)
    runs = {name: train_stage(out, name, seed, size) for name in RUNS}
    evaluations = [stage for name in MODELS for stage in evaluate_stages(out, name, size)]
    return [
        [[base], [clip]],
        [[stage] for stage in scores],
        [[stage] for stage in masks],
        [[runs["both"], runs["reading"]], [judge, runs["drawing"], runs["sft"]]],
        [evaluations[::2], evaluations[1::2]],
    ]


def model_stages(out, seed, size):
    """Training of the tiny Janus and of its two judges."""
    pieces = {
        "base": ["janus", str(size.vq_steps), str(size.base_steps)],
        "clip": ["clip", str(size.clip_steps)],
        "judge": ["judge", str(size.judge_steps)],
    }
    about = {
        "base": "A tiny Janus: its VQ-VAE, then reading and drawing, from biased captions.",
        "clip": "CLIP, the judge of r_sem: it learns which text belongs to which image.",
        "judge": "The judge of r_kn: a copy of the base, which learns to say yes or no.",
    }
    for name, piece in pieces.items():
        command = ["toy_world.py", "--piece", *piece, "--seed", str(seed), "--out", f"{out}"]
        yield Stage(name, f"{out}/{name}", command, about[name])


def mask_stages(out, seed, size):
    """Stages 1 and 2 for the captions of both splits, with the recipes of the toy world."""
    scores = []
    masks = []
    for split in ("train", "val"):
        written = f"{out}/scores_{split}.jsonl"
        flags = ("--model", f"{out}/base", "--data", f"{out}/{split}.jsonl")
        flags += ("--limit", size.scored, "--out", written)
        command = recipe_command("score_dependency.py", "recipes/toy/score.txt", *flags)
        about = f"Stage 1. Which sentences of the {split} captions need the image?"
        scores.append(Stage(f"score {split}", written, command, about))

        flags = ("--scores", written, "--seed", seed, "--out", f"{out}/masks_{split}.jsonl")
        command = recipe_command("build_masks.py", "recipes/toy/mask.txt", *flags)
        about = f"Stage 2. Hide what needs the image, in the {split} captions."
        masks.append(Stage(f"mask {split}", f"{out}/masks_{split}.jsonl", command, about))
    return scores, masks


def train_stage(out, name, seed, size, *flags):
    """Training of one of RUNS; flags: what else differs from the recipe."""
    written = f"{out}/{name}"
    arguments = [*RUNS.get(name, ()), *flags]
    arguments += ["--model", f"{out}/base", "--data", f"{out}/masks_train.jsonl"]
    arguments += ["--prompts", f"{out}/prompts_train.jsonl", "--clip", f"{out}/clip"]
    arguments += ["--steps", size.updates, "--seed", seed, "--out", written]
    command = recipe_command("-m lvrpo.train", "recipes/lvrpo-toy/train.txt", *arguments)
    about = ABOUT.get(name, "LVRPO on drawing alone, with other rewards.")
    return Stage(f"train {name}", written, command, about)


def evaluate_stages(out, name, size):
    """What a model draws, sampled in three ways, and what it reads."""
    model = f"{out}/base" if name == "base" else f"{out}/{name}/checkpoint-{size.updates}"
    limit = ("--limit", size.drawn) if size.drawn else ()
    for sampling, guidance, temperature, samples in SAMPLINGS:
        written = drawings_folder(out, name, sampling)
        flags = ("--guidance", guidance, "--temperature", temperature, "--samples", samples)
        if sampling == "guidance 1":
            # judges that did not give the verdict: r_sem and r_kn
            flags += ("--clip", f"{out}/clip", "--knowledge", f"{out}/judge")
        command = recipe_command(
            "-m lvrpo.evaluate",
            "recipes/lvrpo-toy/evaluate.txt",
            *("--model", model, "--prompts", f"{out}/prompts_val.jsonl"),
            *flags,
            *limit,
            *("--out", written),
        )
        yield Stage(f"draw {name}, {sampling}", written, command, f"{name} draws: {sampling}.")

    written = f"{out}/eval_{name}"
    limit = ("--limit", size.judged) if size.judged else ()
    flags = ("--model", model, "--data", f"{out}/masks_val.jsonl", "--clip", f"{out}/clip")
    command = recipe_command(
        "evaluate.py", "recipes/toy/evaluate.txt", *flags, *limit, "--out", written
    )
    yield Stage(f"read {name}", written, command, f"Stage 5. {name} fills held-out masks.")


def drawings_folder(out, name, sampling):
    return f"{out}/drawings_{name}_{sampling.replace(' ', '')}"
