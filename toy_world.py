"""The toy world: the whole method where the truth is known.

    python toy_world.py                                # world, models, all five stages, the table
    python toy_world.py --bias 0.8 --out runs/bias08   # captions that lie more often
    python toy_world.py --small --out runs/small       # half a minute: does it all run?
    python toy_world.py --study                        # what makes the difference? About an hour
    python toy_world.py --lvrpo                        # the second method: to read and to draw

An image holds two or three shapes. Its caption mixes sentences that need the image with general
facts and filler. With probability --bias it gives a shape the stereotype colour of its kind,
whatever is painted. Imitating captions teaches that bias, and nothing in the training data corrects
it. The truth is kept in truth.jsonl and used for *evaluation only*: both models learn from images
and biased captions.

base   a small Idefics3 with its real processor, trained from scratch to caption and to fill in
       hidden words, which stands in for the instruction tuning of a real model
clip   a small open_clip model. Contrastive training ends at log[p(text | image) / p(text)]: the
       captions' prior is divided out, so that CLIP prefers the painted colour although 40% of the
       colours in captions are wrong at the default --bias (reward.py builds on it)

out:   OUT/images/, train.jsonl and val.jsonl {id, image, caption}, base/, clip/, what the stages
       write, results.json, and truth.jsonl
       {id, objects: [{kind, colour, size, place, stereotype}], sentences: [{start, end,
       needs_image, object, words: [{start, end, needs_image}], lies: [{start, end, painted}]}]}
       start and end count characters of the caption; object is an index or null; a lie is a colour
       word that is not true

What results.json holds; scores, masks and predictions are those of the validation captions:

    dependency_auroc          P(a sentence that needs the image scores above one that does not) for
                              D_vis as published; ties count half
    dependency_auroc_corrected, word_auroc_corrected
                              the same for the corrected score of stage 1, for sentences and words
                              (a word by the attention rows that produce it)
    ablation_auroc            the same for log p(text | image) - log p(text | grey image)
    dependency_vs_ablation_rank_correlation, dependency_corrected_vs_ablation_rank_correlation
                              Spearman, of D_vis or the corrected score with that log-prob gain
    corrections               the same for D_vis as published and for both corrections
    mask_precision, _recall   share of masks in a sentence that needs the image; share of such
                              sentences with a mask. word_*: the same for words
    rules                     the same, and F1, for each threshold rule of stage 2
    base, sft, mmrpt          under real and blank, two conditions of evaluate.py:
      exact_match_truth       share of predictions equal to the hidden text with its lies corrected
      exact_match_caption     share of predictions equal to the hidden text as the caption has it
      stereotype_rate         of the masks that hide the colour of an object not painted in its
                              stereotype colour, the share of predictions that name that colour
                              and beside these two:
      prior_reliance          share of readable answers that are the same with another image
    seconds                   by stage; "in all" is elapsed time: of stages side by side, the
                              longest lane
toy/study.py says what study.json holds, toy/lvrpo_world.py what lvrpo.json holds.
"""

from common.script import run_script  # first: the other imports take seconds

import argparse
from pathlib import Path

from common.locks import lock_output
from common.records import check_settings, load_records, write_json
from common.stage import make_parser, number_between, parse
from toy import lvrpo_stages, lvrpo_world
from toy.drawing import make_drawing_world
from toy.lanes import Clock, run_step
from toy.metrics import (
    dependency_metrics,
    mask_metrics,
    prediction_metrics,
    prior_reliance,
    rule_metrics,
)
from toy.pieces import run_piece
from toy.stages import FULL, SMALL, stages
from toy.study import study
from toy.world import load_truth, make_world

MODELS = ("base", "sft", "mmrpt")


def draw_world(out, bias, seed, size, make):
    """Draws images and captions, unless they are there; make: make_world() or another like it."""
    if (out / "truth.jsonl").exists():
        print(f"reused {out}/truth.jsonl")
    else:
        make(out, size.n_train, size.n_val, bias, seed)
        print(f"{out}: {size.n_train} images with captions to train on, {size.n_val} held out")


def run_world(args, out, size, make, stages):
    """Draws the world and runs its stages; returns the flags, and the seconds by stage."""
    flags = {"bias": args.bias, "seed": args.seed, "small": args.small}
    settings = {**flags, "size": size._asdict()}
    lock_output(out / "world.json")
    if not check_settings(out / "world.json", settings):
        write_json(out / "world.json", {"settings": settings})
    clock = Clock(out / "world.json", settings)
    with clock.measure("world", out / "truth.jsonl"):
        draw_world(out, args.bias, args.seed, size, make)
    steps = stages(out, args.seed, size)
    for lanes in steps:
        run_step(lanes, clock, out)
    return {**flags, "seconds": {**clock.seconds, "in all": clock.in_all(steps)}}


def measure(out):
    """The metrics of the docstring, from the files of the stages in `out`."""
    truth = load_truth(out)
    scores = load_records(out / "scores_val.jsonl")
    masks = load_records(out / "masks_val.jsonl")
    results = dependency_metrics(scores, truth) | mask_metrics(masks, scores, truth)
    results["rules"] = rule_metrics(scores, truth)
    for name in MODELS:
        predictions = load_records(out / f"eval_{name}" / "predictions.jsonl")
        results[name] = {}
        for condition in ("real", "blank"):
            shown = [p for p in predictions if p["condition"] == condition]
            results[name][condition] = prediction_metrics(shown, truth)
        results[name]["prior_reliance"] = prior_reliance(predictions)
    return results


def print_results(out, results):
    """The table, at most 100 columns wide."""
    published = results["dependency_auroc"]
    precision = results["mask_precision"]
    recall = results["mask_recall"]
    print(
        "\nStage 1 separates sentences that need the image from others with an AUROC of "
        f"{results['dependency_auroc_corrected']:.3f}\n(D_vis as published: {published:.3f}). "
        f"Stage 2: {precision:.0%} of the masks lie in such a sentence, and\n{recall:.0%} of such "
        "sentences have a mask.\n"
    )
    print(f"{'held-out masks':36s}{'base':>8s}{'SFT':>8s}{'MMRPT':>8s}")
    for metric, label, remark in (
        ("exact_match_truth", "exact match with the truth", "higher is better"),
        ("stereotype_rate", "stereotype rate", "lower is better"),
        ("exact_match_caption", "exact match with the caption", "lies included"),
    ):
        values = [results[name]["real"][metric] for name in MODELS]
        print(f"{label:36s}" + "".join(f"{value:8.3f}" for value in values) + f"   {remark}")

    if results["small"]:
        print("\n--small only shows that everything runs: its models have learned next to nothing.")
    elif results["bias"]:
        print(
            "\nCaptions lie about colours. SFT imitates them, lies included; MMRPT should name the "
            "painted\ncolour, so look at the stereotype rate first."
        )
    minutes = results["seconds"]["in all"] / 60
    print(
        f"Answers before and after training: {out}/eval_mmrpt/results.html\n"
        f"Sentences shaded by how much they need the image: {out}/scores_val.jsonl.html\n"
        f"Every number: {out}/results.json ({minutes:.1f} minutes in all)"
    )


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", help="folder (runs/toy, where the recipes look; or runs/study, runs/lvrpo)")
    # of as many bits as torch takes
    seed = number_between(0, 2**63 - 1, int)
    bias = "P(stereotype colour in a caption) (%(default)s)"
    add("--bias", type=number_between(0, 1), default=0.5, help=bias)
    add("--seed", type=seed, default=0, help="of world, models and training (%(default)s)")
    add("--small", action="store_true", help="everything at a reduced size: whether it runs")
    add("--study", action="store_true", help="every claim tested; a killed study continues")
    add("--lvrpo", action="store_true", help="LVRPO, which reads and draws, in a world of its own")
    seeds = "of --study (%(default)s; with --small the first only)"
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help=seeds)
    add("--piece", nargs="+", help=argparse.SUPPRESS)
    return parse(parser)


def main():
    args = parse_args()
    name = "study" if args.study else "lvrpo" if args.lvrpo else "toy"
    out = Path(args.out or f"runs/{name}")
    if args.study:
        seeds = args.seeds[:1] if args.small else args.seeds
        study(out, seeds, args.small)
        return
    if args.piece:
        run_piece(out, args.bias, args.seed, *args.piece)
        return

    if args.lvrpo:
        size = lvrpo_stages.SMALL if args.small else lvrpo_stages.FULL
        results = run_world(args, out, size, make_drawing_world, lvrpo_stages.stages)
        lvrpo_world.report(out, results | lvrpo_world.measure(out))
        return

    size = SMALL if args.small else FULL
    results = run_world(args, out, size, make_world, stages) | measure(out)
    write_json(out / "results.json", results)
    print_results(out, results)


if __name__ == "__main__":
    run_script(main)
