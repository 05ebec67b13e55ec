"""What no stage does for the toy and its study: `python toy_world.py --piece NAME ARGUMENTS`."""

import json
from argparse import ArgumentTypeError

from common.locks import lock_output
from common.records import fail, write_atomically
from common.stage import positive_int
from toy.janus import train_janus
from toy.judge import train_judge
from toy.probes import Probe
from toy.questions import clip_metrics, write_benchmark
from toy.training import accelerator, teach_questions, train_on_world
from toy.world import make_world

# name: (what it writes in the world, its arguments)
PIECES = {
    "world": ("truth.jsonl", "TRAIN VAL"),
    "base": ("base", "STEPS"),
    "clip": ("clip", "STEPS"),
    "janus": ("base", "VQ_STEPS STEPS"),
    "judge": ("judge", "STEPS"),
    "benchmark": ("val.tsv", ""),
    "teacher": ("teacher.json", ""),
    "questions": ("", "STEPS MODEL"),
    "probe": ("FILE", "FILE MODEL LIMIT"),
    "robustness": ("FILE", "FILE MODEL LIMIT"),
}
# arguments that are no numbers
NAMES = ("FILE", "MODEL")
# pieces that are not done again
MODELS = ("base", "clip", "janus", "judge", "questions")


def parse_piece(name, *words):
    """(what the piece writes, its arguments); wrong words end the program."""
    if name not in PIECES:
        fail(f"--piece {name}: no such piece; there are {', '.join(PIECES)}")
    written, usage = PIECES[name]
    try:
        arguments = {}
        for argument, word in zip(usage.split(), words, strict=True):
            arguments[argument] = word if argument in NAMES else positive_int(word)
    except (ValueError, ArgumentTypeError):
        numbers = f"{usage}: whole numbers, except FILE and MODEL" if usage else "no more words"
        fail(f"--piece {name} takes {numbers}")
    return arguments.get(written, written), list(arguments.values())


def run_piece(out, bias, seed, name, *words):
    """Runs one piece in the world `out` (for questions: in the world out.parent).

    world TRAIN VAL           draws so many images
    base STEPS, clip STEPS    trains the base, or CLIP
    janus VQ_STEPS STEPS      trains the base of the drawing world
    judge STEPS               trains the judge of the drawing world
    benchmark                 writes val.tsv, multiple choice about the painted colours
    teacher                   asks CLIP about the colours of held-out images (teacher.json)
    questions STEPS MODEL     tunes a checkpoint on questions and saves it as `out`
    probe FILE MODEL LIMIT    layers and patches of a checkpoint of the world, on LIMIT masks
    robustness FILE MODEL LIMIT
    """
    written, arguments = parse_piece(name, *words)
    path = out / written
    lock_output(path)
    if name in MODELS and path.exists():
        print(f"reused {path}")
        return

    device = accelerator()
    if name == "world":
        make_world(out, *arguments, bias, seed)
    elif name in ("base", "clip"):
        train_on_world(out, name, *arguments, seed, device)
    elif name == "janus":
        train_janus(out, *arguments, seed)
    elif name == "judge":
        train_judge(out, *arguments, seed)
    elif name == "benchmark":
        write_benchmark(out)
    elif name == "teacher":
        write_atomically(path, [json.dumps(clip_metrics(out))])
    elif name == "questions":
        steps, checkpoint = arguments
        teach_questions(out, checkpoint, steps, 32, 1e-3, seed, device)
        print(f"{out}: {checkpoint} after {steps} steps on multiple choice")
    else:
        _, checkpoint, limit = arguments
        probe = Probe(out, checkpoint, limit, device)
        if name == "robustness":
            results = probe.robustness()
        else:
            results = {"layers": probe.layers(), "patches": probe.patches(seed)}
        write_atomically(path, [json.dumps(results)])
