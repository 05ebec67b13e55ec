"""Benchmarks, as definitions: every rule and every score by a number worked out by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.extraction import (
    extract_math,
    extract_mme,
    extract_option,
    extract_pope,
    extract_wemath,
    extract_yes_no,
    final_answer,
)
from benchmarks.gold import (
    any_relaxed,
    any_same,
    gold_hallusion,
    gold_math,
    gold_texts,
    relaxed,
    same,
)
from benchmarks.registry import BENCHMARKS
from benchmarks.run import judge
from benchmarks.scores import (
    accuracy,
    score_hallusion,
    score_mme,
    score_options,
    score_pope,
    score_wemath,
)
from benchmarks.tsv import parse_list, rotations
from common.stats import bootstrap_ratios, paired_difference, with_intervals

COLOURS = {"A": "red", "B": "blue", "C": "dog", "D": "forest green"}


def prediction(index, right=True, **fields):
    index = str(index)
    return {"index": index, "unit": index, "right": right, "unparsed": False, **fields}


def values(scores):
    return {name: round(value, 3) for name, (value, _) in bootstrap_ratios(scores, 2).items()}


# ---------------------------------------------------------------- what an answer says


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("(b).", "B"),
        ("**C**", "C"),
        ("The answer is C", "C"),
        ("The answer is c.", "C"),
        ("Answer: D", "D"),
        ("The correct answer is option (C).", "C"),
        ("The answer is C because it stands at the top left of it", "C"),
        ("The answer is B, not A.", "B"),
        ("The answer is A not B", "A"),
        ("The answer is b because it stands at the top left of it", "B"),
        ("The answer is A. No, the answer is C.", None),
        ("The answer is E, not B.", "B"),
        ("Answer: C, since it stands at the top left of it", "C"),
        ("B, since it is large and round, so B", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A. red", "A"),
        ("A\nred one", "A"),
        ("A\nround one", "A"),
        ("A dog, not B", "C"),
        ("A rather than B", None),
        ("A is right", "A"),
        ("(A) red", "A"),
        ("Option A seems right", "A"),
        ("I would go with A given the shape", "A"),
        ("The answer is A with high confidence", "A"),
        ("A would be correct", "A"),
        ("A matches the picture", "A"),
        ("It is the second. A dog", "C"),
        ("A dog", "C"),
        ("A dog stands there", "C"),
        ("A cat", None),
        ("The answer is a dog", "C"),
        ("The answer is A dog", "C"),
        ("The answer is A small dog", "C"),
        ("The answer is a cat", None),
        ("The answer is because of it", None),
        ("blue", "B"),
        ("It is BLUE!", "B"),
        ("red or blue", None),
        ("forest green", "D"),
        ("A or B", None),
        ("E", None),
        ("", None),
        ("I cannot tell", None),
        ("B is what I would say if I had to choose one of them", None),
        ("blue " + "and so on " * 9, None),
        ("reddish", "A"),
    ],
)
def test_an_option_is_read_from_its_letter_the_phrase_or_its_text(text, letter):
    """The options have 22 letters, so an answer of up to 44 may be searched for a text."""
    assert extract_option({"options": COLOURS}, text) == letter


def test_an_option_may_begin_with_an_article_or_hold_another():
    dogs = {
        "A": "A man riding a horse",
        "B": "A dog in the park",
        "C": "Two cats",
        "D": "An empty street",
    }
    texts = ("A dog in the park", "a dog in the park.", "two cats")
    assert [extract_option({"options": dogs}, text) for text in texts] == ["B", "B", "C"]

    counts = {"A": "1", "B": "10", "C": "12", "D": "2"}
    texts = ("10", "2.", "10 or 12", "3")
    letters = [extract_option({"options": counts}, text) for text in texts]
    assert letters == ["B", "D", None, None]


def test_every_letter_is_read_alike_whatever_follows_the_answer():
    """Under CircularEval a habit that is read for B, C and D alone costs nearly every question."""
    endings = (
        "due to its colour",
        "not B, C or D",
        "judging by the shadow",
        "considering the shape of the object",
        "which shows the tall building",
        "after looking at the sign",
        "like the sign says",
        "clearly",
        "the only plausible one",
        "obviously the best choice",
        "corresponding to the first row",
        "per the legend",
    )
    for ending in endings:
        for letter in COLOURS:
            for text in (f"The answer is {letter} {ending}", f"Answer: option {letter} {ending}."):
                assert extract_option({"options": COLOURS}, text) == letter, text


@pytest.mark.parametrize(
    "text, letter",
    [
        ("sample A", "B"),
        ("Sample B.", "C"),
        ("The answer is sample A.", "B"),
        ("The answer is sample A, given what is seen at the bottom of the image", "B"),
        ("B. sample A", "B"),
        ("A", "A"),
        ("neither sample A nor sample B", None),
    ],
)
def test_an_option_that_is_spelled_out_wins_over_a_letter_within_it(text, letter):
    options = {"A": "neither", "B": "sample A", "C": "sample B"}
    assert extract_option({"options": options}, text) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("<Thought process>: <<A + C = 12, so D is wrong.>> <Answer>: <<B>>", "B"),
        ("<Thought process>: <<It is A>>\n<Answer>: C", "C"),
        ("<Answer>: <<D. 12 cm>>", "D"),
        ("<Answer>: <<forest green>>", "D"),
        ("<Thought process>: <<It is A>> <Answer>: <<>>", None),
        ("The answer is C", "C"),
        ("<<B>>", "B"),
        ("Because it is round", None),
    ],
)
def test_wemath_is_read_in_its_own_form_and_in_plain_words(text, letter):
    assert extract_wemath({"options": COLOURS}, text) == letter
    assert BENCHMARKS["wemath"].extract is extract_wemath


ANSWER_PARTS = ("A", "B", "E", "a", "answer is", "Answer:", "red", "a dog", "not", "\n", ".", "<")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(ANSWER_PARTS) | st.text(max_size=4), max_size=9).map(" ".join))
def test_any_answer_is_an_option_or_unparsed(text):
    record = {"options": COLOURS}
    assert extract_option(record, text) in (*COLOURS, None)
    assert extract_wemath(record, text) in (*COLOURS, None)
    for extract in (extract_pope, extract_mme, extract_yes_no):
        assert extract(record, text) in ("yes", "no", None)


@pytest.mark.parametrize(
    "text, pope, mme, words",
    [
        ("Yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("No, there is none.", "no", "no", "no"),
        ("Yes, it is.", "yes", "yes", "yes"),
        ("There is not.", "no", None, None),
        ("No\nThere is none.", "no", "no", "no"),
        ("**Yes**", "yes", None, "yes"),
        ("Not sure. Yes.", "yes", "no", "yes"),
        ("NO", None, "no", "no"),
        ("Yes. No doubt.", "yes", "yes", None),
        ("The answer is yes", "yes", None, "yes"),
        ("a dog", None, None, None),
        ("", None, None, None),
        ("north", None, "no", None),
    ],
)
def test_yes_and_no_by_the_rule_of_each_benchmark(text, pope, mme, words):
    assert extract_pope({}, text) == pope
    assert extract_mme({}, text) == mme
    assert extract_yes_no({}, text) == words


def test_what_cannot_be_read_is_wrong_but_a_yes_in_pope():
    record = {"index": "0", "truth": "yes"}
    for kind, right in (("pope", True), ("mme", False), ("yesno", False)):
        judged = judge(record, "a dog", "real", 1, BENCHMARKS[kind])
        assert judged["right"] is right
        assert judged["extracted"] is None and judged["unparsed"]
    assert not judge({**record, "truth": "no"}, "a dog", "real", 1, BENCHMARKS["pope"])["right"]


def test_a_thought_is_not_part_of_what_is_judged():
    record = {"index": "0", "truth": "B", "options": COLOURS}
    completion = "<think>It may be A.</think><answer>B</answer>"
    judged = judge(record, completion, "real", 1, BENCHMARKS["mcq"])
    assert judged["right"] and judged["extracted"] == "B" and judged["prediction"] == completion


@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("100", "105", True),
        ("100", "105.1", False),
        ("100", "95", True),
        ("-20", "-19", True),
        ("-20", "20", False),
        ("5", "5%", False),
        ("5%", "5", False),
        ("5%", "5%", True),
        ("5%", "0.05", True),
        ("0.05", "5.2%", True),
        ("0", "0", True),
        ("0", "0.0", False),
        ("0", "0.0001", False),
        ("0%", "0%", True),
        ("Yes", "yes", True),
        ("Yes", "Yes.", False),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("14", "", False),
        ("nan", "NaN", True),
        ("inf", "5", False),
        ("14", "14.", True),
    ],
)
def test_chartqa_tolerates_a_twentieth_of_a_number_and_nothing_else(gold, answer, right):
    assert relaxed(gold, answer) is right


def integer(answer, **fields):
    return {"answer_type": "integer", "answer": answer, **fields}


def decimal(answer, **fields):
    return {"answer_type": "float", "answer": answer, **fields}


def years(answer):
    return {"answer_type": "list", "answer": answer}


def choice(choices, answer, **fields):
    return {"question_type": "multi_choice", "choices": choices, "answer": answer, **fields}


FRACTIONS = "['3/11', '8/11']"


@pytest.mark.parametrize(
    "fields, text, right",
    [
        (integer("14"), "The missing number is 14.", True),
        (integer("1200"), "1,200", True),
        (integer("3"), "2 + 1 = 3.7", True),
        (integer("-4"), "x = -4", True),
        (integer("-4"), "x = \u22124", True),
        (integer("4"), "10-4", True),
        (integer("4"), "none", None),
        (decimal("1.5", precision="1.0"), "about 1.46", True),
        (decimal("1.5", precision="1"), "1.44 m", False),
        (decimal("0.60", precision="2"), "0.6", True),
        (decimal("0.25"), "$.25", True),
        (decimal("2500000.0", precision="1"), "2.5e6", True),
        (years("[2007, 2008]"), "Between [2007, 2008].", True),
        (years("[2007, 2008]"), "[2008, 2007]", False),
        (years("[2007, 2008]"), "2007 to 2008", None),
        (years("[1, 2]"), "[1, 2, ...]", None),
        (years("[1, 2]"), "so [{{1}}]", None),
        (years("[1, 2]"), "[{1, 2}] or [1j]", None),
        (choice("['x', 'y']", "y", answer_option="(b)"), "B", True),
        (choice(FRACTIONS, "8/11", answer_type="text"), "(B) 8/11", True),
        (choice(FRACTIONS, "8/11", answer_type="text", answer_option="B"), "3/11", False),
        ({"answer_type": "text", "answer": "Blue"}, "blue.", True),
        ({"answer_type": "text", "answer": "blue"}, "", None),
    ],
)
def test_mathvista_by_its_types(fields, text, right):
    """None: nothing could be extracted."""
    record = {"options": {}, **fields}
    gold = gold_math(record)
    extracted = extract_math(record, text)
    if right is None:
        assert extracted is None
    else:
        assert extracted is not None and same(gold, extracted) is right


def test_a_gold_answer_may_be_a_list_of_texts():
    assert gold_texts({"answer": "['14', '15']"}) == ["14", "15"]
    assert gold_texts({"answer": "14"}) == ["14"]
    assert gold_texts({"answer": "[x"}) == ["[x"]
    assert parse_list("(1, 2)") is None

    assert any_relaxed(["14", "20"], "19.5") and any_same(["a cat", "cat"], " Cat. ")
    assert BENCHMARKS["chartqa"].equal is any_relaxed and BENCHMARKS["exact"].equal is any_same


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<think>A or B</think><answer>B</answer>", "B"),
        ("<think>A or B</think> B ", "B"),
        ("B\n", "B"),
        ("<answer> B\n</answer>", "B"),
        ("<think>x</think> so <answer>A</answer> or <answer>B</answer>!", "B"),
        ("<think><answer>A</answer></think>B", "B"),
        ("<answer>B", "<answer>B"),
        ("<think>It may be B", ""),
    ],
)
def test_a_completion_may_think_first(completion, answer):
    assert final_answer(completion) == answer


# ---------------------------------------------------------------- scores by hand


def test_accuracy_of_all_of_each_category_and_the_mean_of_categories():
    rights = [(1, "x"), (1, "x"), (0, "x"), (0, "y")]
    records = [prediction(i, right, category=c) for i, (right, c) in enumerate(rights)]
    assert values(accuracy(records)) == {
        "accuracy": 50,
        "accuracy, mean of category": 33.333,
        "accuracy, category x": 66.667,
        "accuracy, category y": 0,
    }


def option_records(questions):
    """Predictions of {group: what each copy got} with two options; None is unparsed."""
    records = []
    for group, copies in questions.items():
        for j, right in enumerate(copies):
            if right == "lost":
                continue
            record = prediction(int(group) + 10**6 * j, bool(right), group=group, copy=j)
            record["options"] = {"A": "", "B": ""}
            record["unit"] = group
            record["unparsed"] = right is None
            records.append(record)
    return records


def test_circular_counts_a_question_once_if_all_its_rotations_are_right():
    """Vanilla: the first copies, 3 of 4 right. Circular: 1, 2 and 5 are whole, and 1 is right.

    3 lacks a copy and 4 its first: they are left out.
    """
    records = option_records(
        {"1": [1, 1], "2": [1, None], "3": [1, "lost"], "4": ["lost", 1], "5": [0, 0]}
    )
    scores = with_intervals(score_options(records))
    assert scores["accuracy"]["value"] == 75 and scores["accuracy"]["n"] == 4
    circular = scores["circular"]
    assert (circular["value"], circular["n"], circular["unparsed"]) == (33.33, 3, 1)
    assert "circular" not in score_options(option_records({"1": [1], "2": [0]}))


def test_rotations_ask_every_option_at_every_letter():
    options = {"A": "x", "B": "y", "C": "z"}
    record = {"index": "7", "number": 7, "group": "7", "copy": 0, "options": options, "truth": "B"}
    rotated = list(rotations(record))
    assert [r["index"] for r in rotated] == ["7", "1000007", "2000007"]
    assert [r["copy"] for r in rotated] == [0, 1, 2]
    assert [r["truth"] for r in rotated] == ["B", "A", "C"]
    assert all(r["options"][r["truth"]] == "y" for r in rotated)
    assert ["".join(r["options"].values()) for r in rotated] == ["xyz", "yzx", "zxy"]

    named = rotations({**record, "index": "q7", "number": None})
    assert [r["index"] for r in named] == ["q7", "q7+1", "q7+2"]


def test_pope_by_hand_with_splits_listed_together():
    """Record 0 counts in both splits.

    random: gold yes yes no, answered yes (unparsed counts as yes) no yes: TP 1, FN 1, FP 1.
    popular: gold yes no, answered yes no. Pooled: TP 2, FP 1, FN 1, TN 1 of 5.
    """
    answers = [
        ("yes", None, "random,popular"),
        ("yes", "no", "random"),
        ("no", "yes", "random"),
        ("no", "no", "popular"),
    ]
    records = []
    for i, (truth, answer, category) in enumerate(answers):
        right = truth == (answer or "yes")
        fields = {"truth": truth, "extracted": answer, "category": category}
        records.append(prediction(i, right, **fields))

    scores = values(score_pope(records))
    metrics = ("accuracy", "precision", "recall", "F1", "yes ratio")
    assert [scores[m] for m in metrics] == [60, 66.667, 66.667, 66.667, 60]
    in_random = [scores[f"{m}, category random"] for m in metrics]
    assert in_random == [33.333, 50, 50, 50, 66.667]
    assert with_intervals(score_pope(records))["accuracy"]["n"] == 4


def test_pope_of_a_model_that_never_says_yes_has_no_precision():
    records = [
        prediction(i, truth == "no", truth=truth, extracted="no", category="x")
        for i, truth in enumerate(["yes", "no"])
    ]
    scores = with_intervals(score_pope(records))
    undefined = {"value": None, "low": None, "high": None, "n": 2, "unparsed": 0}
    assert scores["precision"] == scores["precision, category x"] == undefined
    assert scores["F1"]["value"] == 0

    other = [{**record, "extracted": "yes"} for record in records]
    gains = paired_difference(score_pope, records, other)
    assert "F1" in gains and "precision" not in gains


def test_mme_by_hand_with_images_that_have_not_two_questions():
    """count: images a (both right), b (one), c (a single question, right), f (three, all right):
    accuracy 7/8, accuracy+ 1/2, score 137.5. OCR: d (both): 100 + 100. code_reasoning: e: 0."""
    rights = {
        ("count", "a"): [1, 1],
        ("count", "b"): [1, 0],
        ("count", "c"): [1],
        ("count", "f"): [1, 1, 1],
        ("OCR", "d"): [1, 1],
        ("code_reasoning", "e"): [0, 0],
    }
    records = []
    for (category, image), answers in rights.items():
        for i, right in enumerate(answers):
            record = prediction(f"{image}{i}", right, category=category)
            records.append({**record, "unit": f"{category} {image}"})

    scores = values(score_mme(records))
    assert scores["accuracy, category count"] == 87.5
    assert scores["accuracy+, category count"] == 50
    assert scores["score, category count"] == 137.5
    assert (scores["perception"], scores["cognition"]) == (337.5, 0)
    assert with_intervals(score_mme(records))["accuracy+, category count"]["n"] == 2


def test_hallusionbench_by_hand():
    """Set 0 of a VS chart: figure 0 shows nothing (no fAcc), figure 1 has questions 0 right, 1
    wrong; set 0 of a VD chart is another set.

    aAcc 4/5; fAcc: VS figure 1 wrong, VD figure 0 right: 1/2; qAcc: VS question 0 right, 1 wrong,
    VD right: 2/3.
    """
    rights = {
        "VS_chart_0_0_0_0": 1,
        "VS_chart_1_0_1_0": 1,
        "VS_chart_0_0_0_1": 1,
        "VS_chart_1_0_1_1": 0,
        "VD_chart_1_0_0_0": 1,
    }
    records = []
    for index, right in rights.items():
        record = {"index": index, "answer": "Yes"}
        assert gold_hallusion(record) == "yes"
        records.append({**prediction(index, right), **record})
    assert values(score_hallusion(records)) == {
        "aAcc": 80,
        "fAcc": 50,
        "qAcc": 66.667,
        "mean": round((80 + 50 + 200 / 3) / 3, 3),
    }


def wemath_record(unit, key, right):
    return prediction(f"{unit} {key}", right == "1", key=key) | {"unit": unit}


def test_wemath_by_hand():
    """Two steps and the whole, R right and w wrong: R R R mastered, R R w inadequate
    generalisation, R w R rote (strict) or mastered (loose), w w R rote both ways, R w w
    insufficient knowledge; a three-step problem, all right; one without its whole is left out."""
    problems = {"1": "111", "2": "110", "3": "101", "4": "001", "5": "100"}
    records = []
    for i, rights in problems.items():
        for step, right in zip(("1", "2", "multi"), rights):
            records.append(wemath_record(f"2 {i}", f"2steps_{step}", right))
    for step in ("1", "2", "3", "multi"):
        records.append(wemath_record("3 1", f"3steps_{step}", "1"))
    records.append(wemath_record("2 9", "2steps_1", "1"))

    scores = with_intervals(score_wemath(records))
    assert {name: round(score["value"], 2) for name, score in scores.items()} == {
        "accuracy": 70,
        "one step": 71.43,
        "two steps": 60,
        "three steps": 100,
        "IK": 16.67,
        "IG": 16.67,
        "score strict": 41.67,
        "CM strict": 33.33,
        "RM strict": 50,
        "score loose": 58.33,
        "CM loose": 50,
        "RM loose": 25,
    }


# ---------------------------------------------------------------- intervals


def test_intervals_cover_as_often_as_they_say():
    rng = random.Random(0)
    covered = 0
    for _ in range(60):
        records = [prediction(i, rng.random() < 0.3) for i in range(200)]
        score = with_intervals(accuracy(records))["accuracy"]
        covered += score["low"] <= 30 <= score["high"]
    # 57 expected
    assert covered >= 52


def test_four_copies_of_a_question_are_one_question_to_an_interval():
    separate = [prediction(f"{i}-{copy}", i % 2) for i in range(100) for copy in range(4)]
    tied = [{**record, "unit": record["index"].partition("-")[0]} for record in separate]

    def width(records):
        score = with_intervals(accuracy(records))["accuracy"]
        return score["high"] - score["low"]

    assert width(tied) == pytest.approx(2 * width(separate), rel=0.2)


def test_a_gain_of_a_point_is_noise_and_a_paired_one_is_not():
    rng = random.Random(1)
    base = [prediction(i, rng.random() < 0.5) for i in range(400)]
    other = [prediction(i, rng.random() < 0.51) for i in range(400)]
    better = [{**r, "right": r["right"] or i % 25 == 0} for i, r in enumerate(base)]
    assert paired_difference(accuracy, other, base)["accuracy"]["verdict"] == "noise"

    gain = paired_difference(accuracy, better, base)["accuracy"]
    assert gain["verdict"] == "gain" and gain["value"] < 4.1 and gain["n"] == 400
    assert paired_difference(accuracy, base, better)["accuracy"]["verdict"] == "loss"
    assert paired_difference(accuracy, base, base[:7])["accuracy"]["n"] == 7
    assert paired_difference(accuracy, base, [prediction("elsewhere")]) == {}


def test_records_that_give_no_score_give_no_difference():
    """Only copies: their originals could not be used."""
    copies = option_records({str(i): ["lost", 1] for i in range(12)})
    assert score_options(copies) == {} and with_intervals({}) == {}
    assert paired_difference(score_options, copies, copies) == {}


@pytest.mark.parametrize("units, verdict", [(9, "noise"), (10, "gain")])
def test_nine_units_agree_by_chance_too_easily(units, verdict):
    right = [prediction(i) for i in range(units)]
    wrong = [prediction(i, False) for i in range(units)]
    gain = paired_difference(accuracy, right, wrong)["accuracy"]
    assert (gain["low"], gain["verdict"]) == (100, verdict)
