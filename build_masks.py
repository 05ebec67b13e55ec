"""Stage 2: hide what depends on the image.

A sentence s is vision-dependent if its score reaches a threshold tau (in MMRPT, its D_vis). The
sentence, or the words in it that depend most on the image, is replaced by [MASK]. How tau adapts is
not published. These rules are offered:

    position       one tau for the file: Otsu's cut of D_vis minus the position baseline
    density        one tau for the file: Otsu's cut of the density ratio
    otsu           one tau for the file: Otsu's cut of D_vis, that with the largest variance between
                   the classes above and below it
    mean           one tau per caption: the mean D_vis of its sentences
    gap            one tau per caption: the upper edge of the largest gap between its sorted D_vis
    quantile:0.5   one tau for the file: the D_vis below which this share of all sentences lies
    0.62           a fixed tau for D_vis

Position baseline and density ratio are those of score_dependency.py, which explains why D_vis needs
a correction. The paper's finer granularity is not public either. Ours is the run of words in a
chosen sentence that has the largest sum of (word score - mean word score of the sentence). Words
are always compared by a corrected score of the rows that produce them: density for rule `density`,
else D_vis minus the position baseline, even if the rule uses plain D_vis for sentences.

    python build_masks.py --scores scores.jsonl --out masks.jsonl

in:   JSONL of score_dependency.py
out:  JSONL {id, image, masked_caption, answer, sentence, start, end, score, threshold}, a record
      per mask: answer is caption[start:end]; masked_caption and sentence are caption and sentence
      with [MASK] in its place; score and threshold are in the rule's quantity
"""

from common.script import run_script  # first: the other imports take seconds

import itertools
import math
import random
from functools import partial

import numpy as np

from common.records import BadRecord, fail, fingerprint, load_records
from common.scored import read_scores
from common.stage import (
    make_parser,
    map_records,
    parse,
    positive_int,
    require_output,
    setup_distributed,
)
from common.stats import spearman
from common.text import ANSWER_TAG, MASK

# ---------------------------------------------------------------- which sentences: tau


def otsu(scores):
    """The cut of `scores` with the largest variance between the two classes (Otsu, 1979).

    The between-class variance of n and m scores is proportional to n m (mean_n - mean_m)^2. The cut
    is the lowest score of the upper class: 6 for [7, 0, 12, 1, 6, 2], as 3 x 3 (25/3 - 1)^2 = 484.
    """
    x = np.sort(np.asarray(scores, dtype=np.float64))
    if x[0] == x[-1]:
        return float(x[0])
    lower_sum = np.cumsum(x)[:-1]
    lower = np.arange(1, len(x))
    upper = len(x) - lower
    difference = (x.sum() - lower_sum) / upper - lower_sum / lower
    variance = lower * upper * difference**2
    # no cut between equal scores
    variance[x[1:] == x[:-1]] = -1
    return float(x[1:][variance.argmax()])


def largest_gap(scores):
    """The upper edge of the largest gap between neighbours in sorted order.

    If all scores are equal, or there is only one, it is that score: all are chosen.
    """
    x = sorted(scores)
    gaps = [upper - lower for lower, upper in itertools.pairwise(x)]
    if not gaps or max(gaps) == 0:
        return x[0]
    return x[gaps.index(max(gaps)) + 1]


def quantity(rule, scores):
    """The score of a sentence or a word that `rule` compares."""
    if rule == "density":
        return scores["density"]
    if rule == "position":
        return round(scores["d_vis"] - scores["position_baseline"], 6)
    return scores["d_vis"]


def threshold_rule(rule, sentences):
    """A function from the sentences of one caption to its tau.

    rule: as in --threshold. sentences: all of the file.
    """

    def mean_of_caption(caption_sentences):
        return sum(s["d_vis"] for s in caption_sentences) / len(caption_sentences)

    def gap_of_caption(caption_sentences):
        return largest_gap([s["d_vis"] for s in caption_sentences])

    def same_for_all(caption_sentences):
        return tau

    if rule == "mean":
        return mean_of_caption
    if rule == "gap":
        return gap_of_caption
    scores = [quantity(rule, sentence) for sentence in sentences]
    try:
        if rule in ("position", "density", "otsu"):
            tau = otsu(scores)
        elif rule.startswith("quantile:"):
            tau = float(np.quantile(scores, float(rule.removeprefix("quantile:"))))
        else:
            tau = float(rule)
        if not math.isfinite(tau):
            raise ValueError
    except ValueError:
        fail(
            f"--threshold {rule}: not position, density, otsu, mean, gap, quantile:Q with Q in "
            "[0, 1], or a number"
        )
    return same_for_all


# ---------------------------------------------------------------- which words


def maximum_sum_span(scores):
    """(first, last) of the run of words with the largest sum of (score - mean score).

    This is the maximum-sum subarray (Kadane). Of several such runs, the longest is taken.
    [0.1, 0.2, 0.8, 0.7, 0.2] has the mean 0.4, leaving -0.3 -0.2 +0.4 +0.3 -0.2: the run (2, 3).
    """
    centred = np.asarray(scores) - np.mean(scores)
    # rounded, so that equal sums compare as equal
    sums = np.append(0, np.cumsum(centred)).round(9)
    start = 0
    runs = []
    for last in range(len(scores)):
        if sums[last] < sums[start]:
            start = last
        run_sum = round(sums[last + 1] - sums[start], 8)
        runs.append((run_sum, last - start, start, last))
    *_, first, last = max(runs, key=lambda run: run[:2])
    return first, last


def random_spans(sentences, spans, rng):
    """The control: random spans, as many and as long as `spans`, at most one per sentence.

    The longest is drawn first, so that each finds a sentence with enough words.
    """
    remaining = list(sentences)
    lengths = sorted((last - first for _, first, last in spans), reverse=True)
    chosen = []
    for length in lengths:
        fitting = [i for i, s in enumerate(remaining) if len(s["words"]) > length]
        sentence = remaining.pop(rng.choice(fitting))
        first = rng.randrange(len(sentence["words"]) - length)
        chosen.append((sentence, first, first + length))
    return chosen


def mask_caption(
    record, rule, tau_of, granularity="span", select="dependency", max_masks=4, seed=0
):
    """The mask records of one scored caption, in the order of the text.

    rule: as in --threshold, and tau_of its threshold_rule(). select="random" is the control: see
    random_spans(). Raises BadRecord for a caption that cannot be masked.
    """
    caption = record["caption"]
    if MASK in caption or ANSWER_TAG.search(caption):
        # a second [MASK] is ambiguous, and an answer tag could never be parsed
        raise BadRecord(f"the caption contains {MASK} or an answer tag itself")
    sentences = record["sentences"]
    if not sentences:
        raise BadRecord("no sentences")

    tau = tau_of(sentences)
    dependent = [s for s in sentences if quantity(rule, s) >= tau]
    dependent.sort(key=partial(quantity, rule), reverse=True)
    # words are compared by a corrected score, even if the rule uses plain D_vis for sentences
    word_rule = "density" if rule == "density" else "position"
    spans = []
    for sentence in dependent[:max_masks]:
        span = (0, 0)
        if granularity == "span":
            scores = [quantity(word_rule, word["producing"]) for word in sentence["words"]]
            span = maximum_sum_span(scores)
        spans.append((sentence, *span))
    if select == "random":
        spans = random_spans(sentences, spans, random.Random(f"{seed} {record['id']}"))

    masks = []
    for sentence, first, last in sorted(spans, key=lambda span: span[0]["start"]):
        start, end = sentence["start"], sentence["end"]
        if granularity == "span":
            start, end = sentence["words"][first]["start"], sentence["words"][last]["end"]
        mask = {"id": record["id"], "image": record["image"]}
        mask["masked_caption"] = caption[:start] + MASK + caption[end:]
        mask["answer"] = caption[start:end]
        before = caption[sentence["start"] : start]
        after = caption[end : sentence["end"]]
        mask["sentence"] = before + MASK + after
        mask |= {"start": start, "end": end}
        mask |= {"score": quantity(rule, sentence), "threshold": round(tau, 6)}
        masks.append(mask)
    return masks


# ---------------------------------------------------------------- the files


# ---------------------------------------------------------------- the command


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--scores", required=True, help="the output of score_dependency.py")
    add("--out", required=True, help="the masks")
    rules = "the rule for tau: position, density, otsu, mean, gap, quantile:Q or a number"
    add("--threshold", default="position", help=f"{rules} (%(default)s)")
    kinds = ("sentence", "span")
    add("--granularity", choices=kinds, default="span", help="what is hidden (%(default)s)")
    how = "how masks are chosen; random is the control (%(default)s)"
    add("--select", choices=("dependency", "random"), default="dependency", help=how)
    most = "most masks per caption, for the sentences furthest above tau (%(default)s)"
    add("--max-masks", type=positive_int, default=4, help=most)
    add("--seed", type=int, default=0, help="of --select random (%(default)s)")
    return parse(parser)


def read_sentences(path):
    """The scores of all sentences of a scores file, without their words."""
    names = ("d_vis", "position_baseline", "density", "ablation")
    sentences = []
    for _, record in read_scores(path):
        if not isinstance(record, BadRecord):
            for sentence in record["sentences"]:
                sentences.append({name: sentence[name] for name in names if name in sentence})
    if not sentences:
        fail(f"{path}: no scored caption in it; it should be the output of score_dependency.py")
    return sentences


def print_summary(args, counts, sentences):
    """What was masked, with the meaning of each number."""
    masks = load_records(args.out)
    taus = sorted({f"{mask['threshold']:.3f}" for mask in masks}, key=float)
    shares = []
    for mask in masks:
        caption_length = len(mask["masked_caption"]) - len(MASK) + len(mask["answer"])
        shares.append(len(mask["answer"]) / caption_length)
    tau = taus[0] if len(taus) == 1 else f"{taus[0]} to {taus[-1]}"
    line = f"{len(masks)} of {len(sentences)} sentences masked: rule {args.threshold}, tau {tau}"
    if args.select == "random":
        line = f"{len(masks)} random masks, as many and as long as {args.threshold} would make"
    print(f"{line}. On average a mask hides {np.mean(shares):.0%} of a caption.")

    checked = [s for s in sentences if "ablation" in s]
    if checked:
        ablation = [s["ablation"] for s in checked]
        correlations = []
        for rule, name in (("number", "D_vis"), ("position", "position"), ("density", "density")):
            value = spearman([quantity(rule, s) for s in checked], ablation)
            correlations.append(f"{name} {value:.2f}")
        print(f"Rank correlation with the image ablation: {', '.join(correlations)}.")
    print(
        f"{args.out}: {counts['written']} masks, {counts['skipped']} of {counts['records']} "
        f"captions skipped.\nNext: grpo_train.py --data {args.out}"
    )


def main():
    args = parse_args()
    rank, _, _ = setup_distributed()
    sentences = read_sentences(args.scores)
    mask = partial(
        mask_caption,
        rule=args.threshold,
        tau_of=threshold_rule(args.threshold, sentences),
        granularity=args.granularity,
        select=args.select,
        max_masks=args.max_masks,
        seed=args.seed,
    )

    def start():
        return mask, list

    settings = {"stage": "build_masks", **vars(args), "scores": fingerprint(args.scores)}
    del settings["out"]
    records = read_scores(args.scores)
    counts = map_records(records, start, args.out, settings, args.scores, batch_size=64)
    require_output(args.out, counts, f"{args.out}: nothing was masked; lower --threshold")
    if rank == 0:
        print_summary(args, counts, sentences)


if __name__ == "__main__":
    run_script(main)
