"""Rank statistics, and bootstrap intervals of scores whose records depend on each other.

A *score* here is a scaled sum of ratios of sums over records, so that accuracy, F1 and a sum of
two accuracies are all resampled in the same way:

    {name: (scale, [[(unit, numerator, denominator), ...], ...], records)}

The inner list is one ratio, with an entry per record. Records that depend on each other, such as
two questions about one image, share a *unit*, and the bootstrap draws units.
"""

import statistics

import numpy as np

# ---------------------------------------------------------------- ranks


def ranks(values):
    """Ranks of a sequence, from 1, with ties at their mean rank: (N,) float64.

    >>> ranks([10, 30, 20, 30]).tolist()
    [1.0, 3.5, 2.0, 3.5]
    """
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True, equal_nan=False)
    mean_ranks = counts.cumsum() - (counts - 1) / 2
    return mean_ranks[inverse]


def spearman(x, y):
    """Spearman's rank correlation of two sequences of the same length; nan if one is constant.

    >>> round(spearman([1, 2, 2, 3], [4, 3, 2, 1]), 4)
    -0.9487
    """
    if len(x) < 2:
        return float("nan")
    # a constant sequence has no deviation to divide by
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def auroc(scores, labels):
    """P(a positive scores above a negative), where a tie counts half; nan without both labels.

    With R the sum of the ranks of the P positives among all scores, the Mann-Whitney formula is
    (R - P (P + 1) / 2) / (P N).

    >>> auroc([0.9, 0.2, 0.5, 0.1], [True, True, False, False])  # 3 of 4 pairs
    0.75
    """
    labels = np.asarray(labels, dtype=bool)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")

    rank_sum = ranks(scores)[labels].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def mean_std(values):
    """{values, mean, std} of one number per seed, None where a seed has none.

    std is that of a sample, and None below two values.

    >>> mean_std([1.0, 2.0, 3.0, None])
    {'values': [1.0, 2.0, 3.0, None], 'mean': 2.0, 'std': 1.0}
    """
    # nan is the only value that differs from itself
    values = [None if v is None or v != v else v for v in values]
    present = [v for v in values if v is not None]

    mean = None
    std = None
    if present:
        mean = statistics.mean(present)
    if len(present) > 1:
        std = statistics.stdev(present)
    return {"values": values, "mean": mean, "std": std}


# ---------------------------------------------------------------- scores with intervals

# prefixes of the names of scores that should fall
LOWER_IS_BETTER = ("IK", "RM", "prior_reliance")


def share(records, numerator="right", denominator=None):
    """One ratio of a score: [(unit, numerator, denominator), ...], an entry per record.

    numerator and denominator are the name of a field, or a function of a record; a denominator of
    None counts records.

    >>> share([{"unit": "a", "right": True}, {"unit": "b", "right": False}])
    [('a', 1.0, 1.0), ('b', 0.0, 1.0)]
    """
    return [(r["unit"], _value(r, numerator), _value(r, denominator)) for r in records]


def _value(record, field):
    if field is None:
        return 1.0
    if callable(field):
        return float(field(record))
    return float(record[field])


def bootstrap_ratios(scores, draws=1000):
    """{name: (value, (draws,) bootstrap values)} of scores as described at the top of this file.

    All scores are computed on the same resampled units, so that they can be subtracted pairwise. A
    ratio of 0 / 0 is nan, of all records or of a draw that leaves it without any.

    >>> ratio = [("a", 1, 1), ("a", 0, 1), ("b", 1, 1)]
    >>> value, drawn = bootstrap_ratios({"accuracy": (100, [ratio], [])})["accuracy"]
    >>> round(float(value), 2), drawn.shape
    (66.67, (1000,))
    """
    if not scores:
        return {}
    ratios = [ratio for _, parts, _ in scores.values() for ratio in parts]
    resampled = _resampled_ratios(ratios, draws)

    results = {}
    first = 0
    for name, (scale, parts, _) in scores.items():
        values = scale * resampled[:, first : first + len(parts)].sum(1)
        results[name] = (values[0], values[1:])
        first += len(parts)
    return results


def _resampled_ratios(ratios, draws):
    """(1 + draws, number of ratios): the ratios of all units, then of `draws` resamples of them."""
    units = {}
    for ratio in ratios:
        for unit, _, _ in ratio:
            units.setdefault(unit, len(units))

    # (units, 2, ratios): numerators and denominators, summed within a unit
    sums = np.zeros((len(units), 2, len(ratios)))
    for j, ratio in enumerate(ratios):
        for unit, numerator, denominator in ratio:
            sums[units[unit], :, j] += numerator, denominator

    flat = sums.reshape(len(units), -1)
    rng = np.random.default_rng(0)
    drawn = [flat.sum(0)]
    for _ in range(draws):
        choice = rng.integers(len(units), size=len(units))
        times = np.bincount(choice, minlength=len(units))
        drawn.append(times @ flat)

    drawn = np.stack(drawn).reshape(-1, 2, len(ratios))
    with np.errstate(invalid="ignore", divide="ignore"):
        return drawn[:, 0] / drawn[:, 1]


def confidence_interval(value, draws):
    """{value, low, high}, rounded: the 2.5% and 97.5% quantiles of the bootstrap values `draws`.

    None stands for what is undefined: a value of 0 / 0, and an interval without a single draw.

    >>> confidence_interval(50, np.arange(101))
    {'value': 50.0, 'low': 2.5, 'high': 97.5}
    """
    numbers = {"value": value, "low": None, "high": None}
    if not np.isnan(draws).all():
        numbers["low"], numbers["high"] = np.nanpercentile(draws, (2.5, 97.5))
    return {name: _rounded(number) for name, number in numbers.items()}


def _rounded(number):
    if number is None or np.isnan(number):
        return None
    return round(float(number), 2)


def with_intervals(scores):
    """{name: {value, low, high, n, unparsed}} of scores: 95% intervals and numbers of records."""
    if not scores:
        return {}

    results = {}
    for name, (value, draws) in bootstrap_ratios(scores).items():
        records = scores[name][2]
        results[name] = {
            **confidence_interval(value, draws),
            "n": len({r["index"] for r in records}),
            "unparsed": len({r["index"] for r in records if r["unparsed"]}),
        }
    return results


def paired_difference(score, mine, other):
    """{name: {value, low, high, n, verdict}}: scores of the records `mine` minus those of `other`.

    score: a function from records to scores as described at the top of this file. Only records
    whose index is in both take part, and both sides are resampled together. The verdict is "gain"
    or "loss", the other way round for a score that should fall. It is "noise" if the interval
    contains 0, or if there are fewer than ten units, for which resampling says nothing. A score
    that is 0 / 0 on either side has no difference and is left out.
    """
    shared = {r["index"] for r in mine} & {r["index"] for r in other}
    if not shared:
        return {}

    my_scores = score([r for r in mine if r["index"] in shared])
    other_scores = score([r for r in other if r["index"] in shared])
    both = {("mine", name): entry for name, entry in my_scores.items()}
    both |= {("other", name): entry for name, entry in other_scores.items()}
    drawn = bootstrap_ratios(both)

    results = {}
    for name, (_, _, records) in my_scores.items():
        if name not in other_scores:
            continue
        my_value, my_draws = drawn["mine", name]
        other_value, other_draws = drawn["other", name]
        value = my_value - other_value
        if np.isnan(value):
            continue

        draws = my_draws - other_draws
        gain = confidence_interval(value, draws)
        gain["n"] = len({r["index"] for r in records})
        units = len({r["unit"] for r in records})
        gain["verdict"] = _verdict(value, draws, units, name.startswith(LOWER_IS_BETTER))
        results[name] = gain
    return results


def _verdict(value, draws, units, lower_is_better):
    if units < 10 or np.isnan(draws).all():
        return "noise"
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    if low <= 0 <= high:
        return "noise"
    return "gain" if (value > 0) != lower_is_better else "loss"
