"""Dependency scores of a whole file: the position baseline, and the corrected score."""

import numpy as np

# what `score` is
CORRECTIONS = {
    "position": "D_vis minus its position baseline",
    "density": "log of attention per visual token over that per text token",
}


def position_baseline(captions, least=20):
    """{"own", "producing"}: (K,) mean D_vis of the k-th word, averaged with its two neighbours.

    captions: for each, the (own, producing) D_vis of its words. A place that fewer than `least`
    captions reach takes the value of the last place that enough captions reach. The row that
    produces the first word of a caption sees no text, so its D_vis is 1; it is not averaged with
    that of the second word.
    """
    total = np.zeros((0, 2))
    count = np.zeros(0)
    for words in captions:
        longer = max(0, len(words) - len(count))
        total = np.pad(total, ((0, longer), (0, 0)))
        count = np.pad(count, (0, longer))
        total[: len(words)] += words
        count[: len(words)] += 1
    mean = total / count[:, None]

    def smooth(means, counts):
        reached = len(means)
        if count[0] >= least:
            reached = max(1, int((counts >= least).sum()))
        padded = np.pad(means[:reached], 1, mode="edge")
        smoothed = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
        return np.pad(smoothed, (0, len(means) - reached), mode="edge")

    producing = mean[:, 1]
    if len(mean) > 1:
        producing = np.append(producing[0], smooth(producing[1:], count[1:]))
    return {"own": smooth(mean[:, 0], count), "producing": producing}


def correct_scores(read, correction):
    """Yields the records that read() iterates over, with position_baseline and score filled in.

    read() is called twice: once for the baseline of the whole file, once for the records.
    """

    def word_shares(record):
        words = [word for sentence in record["sentences"] for word in sentence["words"]]
        return [(word["d_vis"], word["producing"]["d_vis"]) for word in words]

    def correct(scores, baseline):
        scores["position_baseline"] = round(float(baseline), 6)
        difference = round(scores["d_vis"] - scores["position_baseline"], 6)
        scores["score"] = difference if correction == "position" else scores["density"]

    baseline = position_baseline(map(word_shares, read()))
    for record in read():
        place = 0
        for sentence in record["sentences"]:
            first = place
            for word in sentence["words"]:
                correct(word, baseline["own"][place])
                correct(word["producing"], baseline["producing"][place])
                place += 1
            correct(sentence, baseline["own"][first:place].mean())
        yield record
