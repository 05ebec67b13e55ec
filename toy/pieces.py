"""What no stage does for the toy and its study: `python toy_world.py --piece NAME ARGUMENTS`."""

import json

from common.records import write_atomically
from toy.janus import train_janus
from toy.judge import train_judge
from toy.probes import Probe
from toy.questions import clip_metrics, write_benchmark
from toy.training import accelerator, teach_questions, train_on_world
from toy.world import make_world

# models of the drawing world: the folder and the function that writes it
DRAWING_MODELS = {"janus": ("base", train_janus), "judge": ("judge", train_judge)}


def run_piece(out, bias, seed, name, *arguments):
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
    device = accelerator()
    if name == "questions":
        if out.exists():
            print(f"reused {out}")
        else:
            steps, checkpoint = arguments
            teach_questions(out, checkpoint, int(steps), 32, 1e-3, seed, device)
            print(f"{out}: {checkpoint} after {steps} steps on multiple choice")
        return

    out.mkdir(parents=True, exist_ok=True)
    if name == "world":
        n_train, n_val = arguments
        make_world(out, int(n_train), int(n_val), bias, seed)
    elif name in DRAWING_MODELS:
        written, train = DRAWING_MODELS[name]
        if (out / written).exists():
            print(f"reused {out / written}")
        else:
            train(out, *map(int, arguments), seed)
    elif name in ("base", "clip"):
        if (out / name).exists():
            print(f"reused {out / name}")
        else:
            train_on_world(out, name, int(arguments[0]), seed, device)
    elif name == "benchmark":
        write_benchmark(out)
    elif name == "teacher":
        write_atomically(out / "teacher.json", [json.dumps(clip_metrics(out))])
    else:
        file, checkpoint, limit = arguments
        probe = Probe(out, checkpoint, int(limit), device)
        if name == "robustness":
            results = probe.robustness()
        else:
            results = {"layers": probe.layers(), "patches": probe.patches(seed)}
        write_atomically(out / file, [json.dumps(results)])
