"""The gold answer of a record, and when an extracted answer equals it.

A function gold_*(record) returns the gold answer, or raises BadRecord. It may add to the record the
fields that its benchmark's score needs (`unit`, `figure`, `pair`) or its extraction (`digits`).
"""

import math
import re
import string

from benchmarks.tsv import parse_list
from common.answers import exact_match
from common.records import BadRecord

# ---------------------------------------------------------------- gold answers


def gold_option(record):
    """The letter of the right option."""
    letter = record["answer"].strip().upper()
    if len(record["options"]) < 2 or letter not in record["options"]:
        letters = "".join(record["options"])
        raise BadRecord(f"the answer {letter or '(none)'} is none of the options {letters}")
    return letter


def gold_yes_no(record):
    """yes or no."""
    answer = record["answer"].strip().lower()
    if answer not in ("yes", "no"):
        raise BadRecord(f"the answer {record['answer'] or '(none)'} is neither yes nor no")
    return answer


def gold_texts(record):
    """All texts that count as right: one, or those of a list in brackets."""
    if not record["answer"].strip():
        raise BadRecord("the answer is missing")
    return [str(answer) for answer in parse_list(record["answer"]) or [record["answer"]]]


def gold_text(record):
    """The answer as it is, for a grader elsewhere."""
    return record["answer"]


def gold_hallusion(record):
    """yes or no; the index is category_subcategory_input_set_figure_question.

    Questions of one set are a unit; those about one of its figures share `figure`, and those that
    ask the same of its figures share `pair`. As in the official script, figure 0 of category VS,
    which stands for no image, has no figure accuracy.
    """
    parts = record["index"].split("_")
    if len(parts) != 6:
        raise BadRecord("the index is not of the form VS_chart_1_set_figure_question")

    category, subcategory, _, set_number, figure, question = parts
    record["unit"] = f"{category}_{subcategory}_{set_number}"
    record["pair"] = f"{record['unit']}_{question}"
    record["figure"] = f"{record['unit']}_{figure}"
    if category == "VS" and figure == "0":
        record["figure"] = None
    return gold_yes_no(record)


def gold_wemath(record):
    """The letter of the right option; a problem (its ID) is the unit.

    A problem of two or three steps is asked once for each step and once as a whole (multi).
    """
    key = record.get("key", "")
    if not re.fullmatch(r"2steps_([12]|multi)|3steps_([123]|multi)", key) or not record.get("ID"):
        raise BadRecord(
            f"the key {record.get('key')} is not of the form 2steps_1 or 3steps_multi, or the ID "
            "is missing"
        )
    record["unit"] = f"{key[0]} {record['ID']}"
    return gold_option(record)


def gold_math(record):
    """MathVista: a letter, an int, a float rounded to `precision`, a list, or a text."""
    answer = gold_texts({"answer": record["answer"] or record.get("answer_option", "")})[0]
    answer_type = record.get("answer_type")
    question_type = record.get("question_type")
    try:
        if question_type == "multi_choice":
            return _gold_choice(record)
        return _gold_value(record, answer, answer_type)
    except (ValueError, OverflowError):
        raise BadRecord(
            f"the answer {record['answer']!r} is no {answer_type or question_type}"
        ) from None


def _gold_choice(record):
    """The letter given in answer_option, else that of the choice that the answer spells out."""
    choices = parse_list(record.get("choices", "")) or record["options"].values()
    record["options"] = dict(zip(string.ascii_uppercase, map(str, choices)))

    given = record.get("answer_option", "").strip(" ().").upper()
    for letter, option in record["options"].items():
        if letter == given:
            return letter
        if not given and option == record["answer"]:
            return letter
    raise ValueError


def _gold_value(record, answer, answer_type):
    """The value of a free-form answer."""
    _, _, decimals = record["answer"].partition(".")
    record["digits"] = int(float(record.get("precision") or 0)) or len(decimals)

    if answer_type == "integer":
        return int(float(answer))
    if answer_type == "float":
        return round(float(answer), record["digits"])
    if answer_type == "list":
        values = parse_list(record["answer"])
        if values is None:
            raise ValueError
        return values
    return record["answer"]


# ---------------------------------------------------------------- equality


def same(gold, answer):
    """Equal; texts after normalisation, as the reward's exact match."""
    if gold == answer:
        return True
    if isinstance(gold, str) and isinstance(answer, str):
        return exact_match(answer, gold) > 0
    return False


def relaxed(gold, answer):
    """ChartQA's relaxed equality of two texts: numbers may differ by a twentieth.

        |answer - gold| / |gold| <= 0.05

    A trailing % divides by 100, so "5%" against "5" is wrong. A gold answer that is zero or no
    number must be equal but for case.
    """
    gold_number = _number(gold)
    number = _number(answer)
    if number is None or not gold_number:
        return answer.lower() == gold.lower()
    return abs(number - gold_number) / abs(gold_number) <= 0.05


def _number(text):
    """The finite number that a text is, or None."""
    try:
        if text.endswith("%"):
            value = float(text.rstrip("%")) / 100
        else:
            value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def any_same(golds, answer):
    """The answer is the same as one of the gold texts."""
    return any(same(gold, answer) for gold in golds)


def any_relaxed(golds, answer):
    """The answer equals one of the gold texts by ChartQA's rule."""
    return any(relaxed(gold, answer) for gold in golds)


def not_graded(gold, answer):
    """Nothing is right: the benchmark's own grader decides."""
    return False
