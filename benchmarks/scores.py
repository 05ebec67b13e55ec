"""What each benchmark reports, computed from predictions.

A function score_*(records) returns {name: (scale, [ratio, ...], records)}: a score is a sum of
ratios of sums over records, so that common/stats.py can resample accuracy, F1 and a sum of two
accuracies alike. share() makes one ratio. Predictions that depend on each other (the copies of a
question, two questions about one image) share a `unit`, which is what the bootstrap draws.
"""

import collections

from common.stats import share


def percent(records, numerator="right", denominator=None):
    """One ratio in percent: numerator and denominator are those of share()."""
    return (100, [share(records, numerator, denominator)], records)


# ---------------------------------------------------------------- groups of records


def group_by(records, column):
    """{value: records} of a column, sorted; records without a value are left out."""
    groups = collections.defaultdict(list)
    for record in records:
        value = str(record.get(column) or "").strip()
        if value:
            groups[value].append(record)
    return dict(sorted(groups.items()))


def group_by_listed(records, column):
    """As group_by(), for a column that lists values with commas: a record counts in each."""
    groups = collections.defaultdict(list)
    for record in records:
        for value in str(record.get(column) or "").split(","):
            if value.strip():
                groups[value.strip()].append(record)
    return dict(sorted(groups.items()))


def all_right(records, key, size=None):
    """A record for each value of `key` but None, right if all records with that value are.

    size: the number of records that a group must have, or None if any number will do.
    """
    return [
        _merged(group)
        for value, group in _groups(records, key).items()
        if value is not None and size in (None, len(group))
    ]


def _groups(records, key):
    """{value: records} in the order of the records."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record[key]].append(record)
    return groups


def _merged(group):
    """The first record of a group, right if all are, unparsed if one is."""
    right = all(record["right"] for record in group)
    unparsed = any(record["unparsed"] for record in group)
    return {**group[0], "right": right, "unparsed": unparsed}


# ---------------------------------------------------------------- accuracy


def accuracy(records, columns=("category", "l2-category", "split"), name="accuracy"):
    """Right / all: of all records, for each value of the columns, and the mean over categories.

    The mean weighs every value of the first column alike. With x right 2 of 3 times and y 0 of 1:
    accuracy 50, its mean over x and y 33.3.
    """
    scores = {name: percent(records)}
    for column in columns:
        parts = group_by(records, column) if column in records[0] else {}
        if column == columns[0] and len(parts) > 1:
            ratios = [share(part) for part in parts.values()]
            scores[f"{name}, mean of {column}"] = (100 / len(parts), ratios, records)
        for value, part in parts.items():
            scores[f"{name}, {column} {value}"] = percent(part)
    return scores


def score_chartqa(records):
    """Accuracy by split (human, augmented), and overall."""
    return accuracy(records, ("split",))


def score_math(records):
    """Accuracy by MathVista's types of question and answer, and by task."""
    return accuracy(records, ("question_type", "answer_type", "task"))


# ---------------------------------------------------------------- multiple choice


def score_options(records):
    """Vanilla accuracy of the records as they are, and CircularEval's if there are copies.

    Circular: a question is right if it is right in each of its k rotations. A question that lacks a
    rotation, because its record could not be used, is left out (see n).
    """
    originals = [record for record in records if not record["copy"]]
    scores = {}
    if originals:
        scores = accuracy(originals)

    has_copies = len(originals) < len(records)
    questions = _whole_questions(records)
    if has_copies and questions:
        scores |= accuracy(questions, name="circular")
    return scores


def _whole_questions(records):
    """A record for each question of which every rotation is present, right if all of them are."""
    groups = _groups(records, "group").values()
    return [_merged(group) for group in groups if len(group) >= len(group[0]["options"])]


# ---------------------------------------------------------------- yes or no


def score_pope(records):
    """POPE, with yes as positive: accuracy, precision, recall, F1, and the yes ratio.

    The yes ratio is that of the *predictions*; what could not be read counts as a yes. Scores are
    of each split by itself and pooled, where a record that is listed in three splits counts in
    each, as in the three official files.
    """
    splits = group_by_listed(records, "category")
    pooled = [record for part in splits.values() for record in part]

    scores = _pope_scores(pooled or records, "")
    for split, part in splits.items():
        scores |= _pope_scores(part, f", category {split}")
    return scores


def _pope_scores(records, suffix):
    return {
        f"accuracy{suffix}": percent(records),
        f"precision{suffix}": percent(records, _true_positive, _answered_yes),
        f"recall{suffix}": percent(records, _true_positive, _is_yes),
        f"F1{suffix}": percent(records, _twice_true_positive, _answered_plus_is_yes),
        f"yes ratio{suffix}": percent(records, _answered_yes),
    }


def _answered_yes(record):
    return record["extracted"] != "no"


def _is_yes(record):
    return record["truth"] == "yes"


def _true_positive(record):
    return _answered_yes(record) and _is_yes(record)


# F1 = 2 TP / (answered yes + is yes), the harmonic mean of precision and recall
def _twice_true_positive(record):
    return 2 * _true_positive(record)


def _answered_plus_is_yes(record):
    return _answered_yes(record) + _is_yes(record)


MME_SUMS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": ("commonsense_reasoning numerical_calculation text_translation code_reasoning"),
}


def score_mme(records):
    """MME: accuracy, and accuracy+, the share of images with both of their questions right.

    The score of a category is the sum of both, at most 200; perception (10 categories) and
    cognition (4) are sums of scores. An image with another number of questions, which MME's own
    tool refuses, has no accuracy+ (see n).
    """
    scores = accuracy(records, ("category",))
    sums = {}
    for category, part in group_by(records, "category").items():
        both = all_right(part, "unit", size=2)
        ratios = [share(part), share(both)]
        scores[f"accuracy+, category {category}"] = percent(both)
        scores[f"score, category {category}"] = (100, ratios, part)

        for name, members in MME_SUMS.items():
            if category in members.split():
                _, sum_ratios, sum_records = sums.get(name, (100, [], []))
                sums[name] = (100, sum_ratios + ratios, sum_records + part)
    return {**sums, **scores}


def score_hallusion(records):
    """HallusionBench: aAcc, fAcc, qAcc, and their mean.

    aAcc: questions. fAcc: figures with all questions right. qAcc: questions that are right on all
    of their figures. What a skipped record, or one without the condition's image, leaves of a
    figure counts as the figure.
    """
    parts = {
        "aAcc": records,
        "fAcc": all_right(records, "figure"),
        "qAcc": all_right(records, "pair"),
    }
    scores = {name: percent(part) for name, part in parts.items()}
    scores["mean"] = (100 / 3, [share(part) for part in parts.values()], records)
    return scores


# ---------------------------------------------------------------- WeMath


def score_wemath(records):
    """We-Math: accuracy by number of steps, and the official classes of problems.

    A problem is asked as a whole and step by step. Its class, by the whole:

        CM  complete mastery: right, and so are its steps
        RM  rote memorisation: right, but a step is wrong; a share of the wholes that are right
        IK  insufficient knowledge: wrong, and a step is wrong
        IG  inadequate generalisation: wrong, although its steps are right

    These are the strict classes; in the loose ones a single right step makes a right whole
    mastery. score = CM + IG / 2. A problem of which a question is missing is left out (see n).
    """
    steps = [record for record in records if not _is_whole(record)]
    wholes = [record for record in records if _is_whole(record)]
    parts = {
        "accuracy": records,
        "one step": steps,
        "two steps": [record for record in wholes if record["key"].startswith("2")],
        "three steps": [record for record in wholes if record["key"].startswith("3")],
    }
    scores = {name: percent(part) for name, part in parts.items() if part}

    problems = _problems(records)
    scores["IK"] = percent(problems, "insufficient")
    scores["IG"] = percent(problems, "inadequate")
    for kind in ("strict", "loose"):
        scores[f"score {kind}"] = percent(problems, f"score {kind}")
        scores[f"CM {kind}"] = percent(problems, f"mastered {kind}")
        scores[f"RM {kind}"] = percent(problems, f"rote {kind}", "right")
    return scores


def _is_whole(record):
    return record["key"].endswith("multi")


def _problems(records):
    """A record for each problem that has its whole and all steps; `right` is that of the whole."""
    problems = []
    for questions in _groups(records, "unit").values():
        steps = [record["right"] for record in questions if not _is_whole(record)]
        wholes = [record["right"] for record in questions if _is_whole(record)]
        expected_steps = int(questions[0]["key"][0])
        if len(wholes) == 1 and len(steps) == expected_steps:
            classes = _classes(wholes[0], all(steps), any(steps))
            problems.append({**_merged(questions), "right": wholes[0], **classes})
    return problems


def _classes(right, all_steps, any_step):
    """The classes of a problem of which the whole, all steps and any step are right or not."""
    inadequate = not right and all_steps
    classes = {"insufficient": not right and not all_steps, "inadequate": inadequate}
    for kind, enough_steps in (("strict", all_steps), ("loose", any_step)):
        mastered = right and enough_steps
        classes[f"mastered {kind}"] = mastered
        classes[f"rote {kind}"] = right and not enough_steps
        classes[f"score {kind}"] = mastered + inadequate / 2
    return classes
