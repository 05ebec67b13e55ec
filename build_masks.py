"""Stage 2: hide what depends on the picture.

A sentence s is vision-dependent if D_vis(s) >= tau; it, or the words in it that depend most, become [MASK] (MMRPT).
How tau adapts is not published. Offered here (README: how each agrees with the toy world's truth):

    otsu           one tau for the data set: the cut of its scores with the largest variance between the two classes
    mean           one tau a caption: the mean score of its sentences
    gap            one tau a caption: the upper edge of the largest gap between its sorted scores
    quantile:0.5   one tau for the data set: this share of all sentences lies below
    0.62           a fixed number


The finer granularity of the paper is not public either. Ours: the contiguous words of highest dependency, that is
the run of words whose scores, each less the mean of its sentence, have the largest sum (the maximum subarray).

    python build_masks.py                                                        # the toy world
    python build_masks.py --scores scores.jsonl --out masks.jsonl --granularity sentence

in:   JSONL of score_dependency.py
out:  JSONL {id, image, masked_caption, answer, sentence, start, end, score, threshold}, a record a mask: answer is
      caption[start:end]; masked_caption and sentence are caption and sentence with [MASK] in its place
"""
import argparse
import itertools
import random

import numpy as np

from score_dependency import BadRecord, cli, distributed, fail, fingerprint, map_jsonl, read_jsonl

MASK = "[MASK]"


# ------------------------------------------------------------------- tau: scores of sentences -> threshold


def otsu(scores):
    """The cut of all `scores` that maximises the variance between the classes below and above it (Otsu, 1979)."""
    x = np.sort(np.asarray(scores, dtype=np.float64))
    n = np.arange(1, len(x))                                                    # size of the lower class
    low = np.cumsum(x)[:-1] / n
    high = (x.sum() - np.cumsum(x)[:-1]) / (len(x) - n)
    between = np.where(x[1:] > x[:-1], n * (len(x) - n) * (high - low) ** 2, -1)          # no cut between equals
    return float(x[1:][between.argmax()]) if len(x) > 1 and between.max() > 0 else float(x[0])


def largest_gap(scores):
    """The score above the largest gap between neighbours in sorted order; of all equal or single scores, the lowest."""
    x = sorted(scores)
    gaps = [b - a for a, b in itertools.pairwise(x)]
    return x[gaps.index(max(gaps)) + 1] if gaps and max(gaps) > 0 else x[0]


def threshold_rule(name, all_scores):
    """Function: scores of one caption -> its tau. all_scores: a function that returns those of the whole data set."""
    if name == "mean":
        return lambda scores: sum(scores) / len(scores)
    if name == "gap":
        return largest_gap
    try:
        tau = (otsu(all_scores()) if name == "otsu" else
               float(np.quantile(all_scores(), float(name.partition(":")[2]))) if name.startswith("quantile:") else float(name))
    except ValueError:
        fail(f"--threshold {name}: not otsu, mean, gap, quantile:Q with Q in [0, 1], or a number")
    return lambda scores: tau


# ------------------------------------------------------------------- which sentences, which words


def best_span(scores):
    """(first, last) word of the run whose sum of (score - mean score) is largest; the longest such run.

    [0.1, 0.2, 0.8, 0.7, 0.2] has mean 0.4, hence -0.3 -0.2 +0.4 +0.3 -0.2 and the run (2, 3).
    """
    sums = np.concatenate([[0], np.cumsum(np.asarray(scores) - np.mean(scores))]).round(9)
    lowest = np.minimum.accumulate(sums[:-1])                   # run (i, j) has the sum sums[j + 1] - sums[i]
    gains = sums[1:] - lowest
    last = len(gains) - 1 - int(gains[::-1].argmax())
    return int((sums[:last + 1] == lowest[last]).argmax()), last


def mask_caption(record, tau_of, granularity, select, max_masks, rng):
    """The mask records of one scored caption; select "random" hides as many, as long, elsewhere: the control."""
    caption, sentences = record["caption"], record["sentences"]
    if MASK in caption:
        raise BadRecord(f"the caption contains {MASK} itself")
    if not sentences:
        raise BadRecord("no sentences")
    tau = tau_of([s["score"] for s in sentences])
    chosen = sorted((s for s in sentences if s["score"] >= tau), key=lambda s: -s["score"])[:max_masks]
    if select == "random":
        chosen = rng.sample(sentences, len(chosen))
    masks = []
    for s in sorted(chosen, key=lambda s: s["start"]):
        start, end = s["start"], s["end"]
        if granularity == "span":
            first, last = best_span([w["score"] for w in s["words"]])
            if select == "random":
                first, last = (lambda at: (at, at + last - first))(rng.randrange(len(s["words"]) - (last - first)))
            start, end = s["words"][first]["start"], s["words"][last]["end"]
        masks.append({"id": record["id"], "image": record["image"], "masked_caption": caption[:start] + MASK + caption[end:],
                      "answer": caption[start:end], "sentence": caption[s["start"]:start] + MASK + caption[end:s["end"]],
                      "start": start, "end": end, "score": s["score"], "threshold": round(tau, 6)})
    return masks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scores", default="runs/toy/scores_train.jsonl", help="(%(default)s)")
    add("--out", default="runs/toy/masks_train.jsonl", help="(%(default)s)")
    add("--threshold", default="otsu", help="otsu, mean, gap, quantile:Q or a number (%(default)s: best in the toy world)")
    add("--granularity", default="span", choices=("sentence", "span"), help="what is hidden (%(default)s)")
    add("--select", default="dependency", choices=("dependency", "random"), help="random is the control (%(default)s)")
    add("--max-masks", type=int, default=4, help="masks a caption, those of highest score first (%(default)s)")
    add("--seed", type=int, default=0, help="of --select random (%(default)s)")
    args = parser.parse_args()

    rank, _, _ = distributed()
    def all_scores():
        found = [s["score"] for _, row in read_jsonl(args.scores, ("sentences",)) if not isinstance(row, BadRecord)
                 for s in row["sentences"]]
        return found or fail(f"{args.scores}: no scored sentence in it; it should be the output of score_dependency.py")
    tau_of = threshold_rule(args.threshold, all_scores)
    settings = {"stage": "build_masks", **{k: v for k, v in vars(args).items() if k != "out"}, "scores": fingerprint(args.scores)}

    def process(rows):
        return [mask_caption(row, tau_of, args.granularity, args.select, args.max_masks,
                             random.Random(f"{args.seed} {row['id']}")) for row in rows]

    counts = map_jsonl(read_jsonl(args.scores, ("id", "image", "caption", "sentences")), process, args.out, settings,
                       args.scores, batch_size=64)
    if rank == 0:
        scores, masks = all_scores(), [row for _, row in read_jsonl(args.out, ())]
        if not masks:
            fail(f"{args.out}: nothing was masked; lower --threshold")
        hidden = np.mean([len(m["answer"]) / (len(m["masked_caption"]) - len(MASK) + len(m["answer"])) for m in masks])
        print(f"threshold {args.threshold}: {masks[0]['threshold']} in the first caption; {len(masks)} of {len(scores)} "
              f"sentences masked, {len(scores) - len(masks)} dropped (below the threshold, or beyond --max-masks)")
        for m in masks[:5]:
            print(f"  {m['score']:.3f}  {m['sentence'][:60]}  <-  {m['answer'][:40]}")
        print(f"{args.out}: {counts['written']} masks of {counts['rows'] - counts['skipped']} captions, {counts['skipped']} "
              f"skipped, {hidden:.0%} of a caption hidden by each. Next: grpo_train.py --data {args.out}")


if __name__ == "__main__":
    cli(main)
