"""The arms of the study, and its jobs: which commands in which worlds."""

from pathlib import Path
from typing import NamedTuple

from toy.commands import Job, recipe_command


class Arm(NamedTuple):
    """What one arm changes: flags of build_masks.py, flags of grpo_train.py."""

    mask: tuple = ()
    train: tuple = ()


ARMS = {
    "sft": Arm(train=("--objective", "sft")),
    # span masks, semantic + visual relative to a pool, grpo
    "mmrpt": Arm(),
    "random": Arm(mask=("--select", "random")),
    "sentence": Arm(mask=("--granularity", "sentence")),
    "exact": Arm(train=("--credit", "exact", "--reward", "semantic=1")),
    "prefix": Arm(train=("--credit", "prefix", "--reward", "semantic=1")),
    "semantic": Arm(train=("--reward", "semantic=1")),
    "visual": Arm(train=("--reward", "visual=1.5")),
    "relative_answers": Arm(train=("--relative", "answers")),
    "relative_images": Arm(train=("--relative", "images")),
    "relative_none": Arm(train=("--relative", "none")),
    "dr_grpo": Arm(train=("--loss", "dr_grpo")),
    "dapo": Arm(train=("--loss", "dapo", "--clip-eps", "0.2", "0.28")),
}
# what is done in worlds of other biases; at 0.8 the base seldom names the painted colour: what
# still lets reinforcement find it? Groups of 16 are as many completions per update
FEW = {name: ARMS[name] for name in ("sft", "mmrpt")}
MORE = {
    "relative_answers": ARMS["relative_answers"],
    "groups_of_16": Arm(train=("--group-size", "16", "--prompts-per-step", "12")),
}
BIAS_ARMS = {0.8: {**FEW, **MORE}, 0.0: FEW}
# of masks, besides the default spans
MASK_KINDS = ("random", "sentence")


class Size(NamedTuple):
    """images to train on and held out; steps of base and CLIP; captions scored; updates and prompts
    per update; masks judged; steps of the question tuning"""

    n_train: int
    n_val: int
    base_steps: int
    clip_steps: int
    scored: int
    updates: int
    prompts: int
    judged: int
    question_steps: int


SIZES = {
    "full": Size(12000, 300, 950, 400, 1200, 40, 24, 300, 100),
    "small": Size(120, 16, 6, 4, 16, 2, 2, 8, 2),
}


# ---------------------------------------------------------------- jobs


class WorldJobs:
    """The jobs of one world, collected in an order in which they can be run."""

    def __init__(self, folder, seed, bias, size):
        self.folder = folder
        self.seed = seed
        self.bias = bias
        self.size = SIZES[size]
        self.last = f"checkpoint-{self.size.updates}"
        self.jobs = {}

    def add(self, name, needs, written, command):
        world = Path(self.folder).name
        full_name = f"{world} {name}"
        needs = [f"{world} {need}" for need in needs]
        if full_name not in self.jobs:
            command = [str(word) for word in command]
            self.jobs[full_name] = Job(full_name, needs, f"{self.folder}/{written}", command)

    def add_piece(self, name, needs, written, *arguments):
        command = ["toy_world.py", "--piece", *arguments]
        command += ["--bias", self.bias, "--seed", self.seed, "--out", self.folder]
        self.add(name, needs, written, command)

    def add_scoring(self, split, *flags):
        out = f"scores_{split}.jsonl"
        command = recipe_command(
            "score_dependency.py",
            "recipes/toy/score.txt",
            *("--model", f"{self.folder}/base"),
            *("--data", f"{self.folder}/{split}.jsonl"),
            *("--out", f"{self.folder}/{out}"),
            *("--limit", self.size.scored),
            *flags,
        )
        self.add(f"score {split}", ["base"], out, command)

    def add_masking(self, kind, split, *flags):
        out = f"masks_{kind}.jsonl"
        command = recipe_command(
            "build_masks.py",
            "recipes/toy/mask.txt",
            *("--scores", f"{self.folder}/scores_{split}.jsonl"),
            *("--out", f"{self.folder}/{out}"),
            *("--seed", self.seed),
            *flags,
        )
        self.add(f"mask {kind}", [f"score {split}"], out, command)

    def add_training(self, name, model, kind, flags, needs=()):
        """flags beat those of the recipe; masks of `kind`, and CLIP, are needed besides `needs`."""
        command = recipe_command(
            "grpo_train.py",
            "recipes/toy/train.txt",
            *("--model", f"{self.folder}/{model}"),
            *("--data", f"{self.folder}/masks_{kind}.jsonl"),
            *("--out", f"{self.folder}/{name}"),
            *("--clip", f"{self.folder}/clip"),
            *("--steps", self.size.updates),
            *("--prompts-per-step", self.size.prompts),
            *("--seed", self.seed),
            *("--keep", 1),
            *flags,
        )
        needs = ["clip", f"mask {kind}", *needs]
        self.add(f"train {name}", needs, f"{name}/{self.last}", command)

    def add_evaluation(self, name, model, needs=(), masks="val"):
        label = name
        if masks != "val":
            label = f"{name}_{masks}"
        command = recipe_command(
            "evaluate.py",
            "recipes/toy/evaluate.txt",
            *("--model", f"{self.folder}/{model}"),
            *("--data", f"{self.folder}/masks_{masks}.jsonl"),
            *("--out", f"{self.folder}/eval_{label}"),
            *("--clip", f"{self.folder}/clip"),
            *("--limit", self.size.judged),
        )
        needs = ["clip", f"mask {masks}", *needs]
        self.add(f"evaluate {label}", needs, f"eval_{label}/results.json", command)


def world_jobs(folder, seed, bias, size, arms, full):
    """The jobs of the world in `folder`; full: also masks of other kinds, probes, robustness."""
    world = WorldJobs(folder, seed, bias, size)
    n_train, n_val, base_steps, clip_steps, *_ = world.size
    world.add_piece("world", [], "truth.jsonl", "world", n_train, n_val)
    world.add_piece("base", ["world"], "base", "base", base_steps)
    world.add_piece("clip", ["world"], "clip", "clip", clip_steps)
    world.add_piece("teacher", ["clip"], "teacher.json", "teacher")
    world.add_scoring("val", "--ablation")
    world.add_scoring("train")
    # the default masks: they judge every arm
    world.add_masking("val", "val")
    world.add_evaluation("base", "base")
    for name, arm in arms.items():
        kind = arm.mask[-1] if arm.mask else "train"
        world.add_masking(kind, "train", *arm.mask)
        world.add_training(name, "base", kind, arm.train)
        world.add_evaluation(name, f"{name}/{world.last}", [f"train {name}"])
    if full:
        add_other_masks(world)
        add_probes(world)
        add_questions(world)
    return list(world.jobs.values())


def add_other_masks(world):
    """Judges every policy on every kind of masks."""
    for kind in MASK_KINDS:
        masks = f"val_{kind}"
        world.add_masking(masks, "val", *ARMS[kind].mask)
        world.add_evaluation("base", "base", ["base"], masks)
        for name in ("mmrpt", *MASK_KINDS):
            world.add_evaluation(name, f"{name}/{world.last}", [f"train {name}"], masks)


def add_probes(world):
    """Probes of D_vis, and robustness after SFT on top of SFT (as many updates) and of MMRPT."""
    judged = world.size.judged
    models = {"base": ("base", "base"), "mmrpt": (f"mmrpt/{world.last}", "train mmrpt")}
    for name, (model, need) in models.items():
        out = f"probe_{name}.json"
        world.add_piece(f"probe {name}", ["mask val", need], out, "probe", out, model, judged)
    for name in ("sft", "mmrpt"):
        model = f"{name}/{world.last}"
        sft = ARMS["sft"].train
        world.add_training(f"{name}_sft", model, "train", sft, [f"train {name}"])
    for name in ("sft", "mmrpt_sft", "sft_sft"):
        out = f"robustness_{name}.json"
        needs = ["mask val", f"train {name}"]
        arguments = ("robustness", out, f"{name}/{world.last}", judged)
        world.add_piece(f"robustness {name}", needs, out, *arguments)


def add_questions(world):
    """A short tuning on multiple choice, which no model of the toy has seen, and then val.tsv."""
    world.add_piece("benchmark", ["world"], "val.tsv", "benchmark")
    for name, need in (("base", "base"), ("mmrpt", "train mmrpt")):
        model = "base" if name == "base" else f"{name}/{world.last}"
        written = f"{world.folder}/questions_{name}"
        command = ["toy_world.py", "--piece", "questions", world.size.question_steps]
        command += [f"{world.folder}/{model}", "--seed", world.seed, "--out", written]
        world.add(f"teach {name}", [need], f"questions_{name}", command)
        command = recipe_command(
            "evaluate.py",
            "recipes/toy/questions.txt",
            *("--model", written),
            *("--data", f"{world.folder}/val.tsv"),
            *("--out", f"{world.folder}/asked_{name}"),
        )
        needs = ["benchmark", f"teach {name}"]
        world.add(f"ask {name}", needs, f"asked_{name}/results.json", command)


def study_jobs(out, seeds, small):
    """world_jobs() of the whole study: every arm in the world of each seed, then other biases."""
    size = "full"
    biases = BIAS_ARMS
    if small:
        size = "small"
        biases = (0.8,)
    jobs = []
    for seed in seeds:
        jobs += world_jobs(f"{out}/seed{seed}", seed, 0.5, size, ARMS, full=True)
    for bias in biases:
        for seed in seeds:
            folder = f"{out}/bias{bias}-seed{seed}"
            jobs += world_jobs(folder, seed, bias, size, BIAS_ARMS[bias], full=False)
    return jobs
