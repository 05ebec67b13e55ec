"""Benchmarks: every definition by a figure worked out by hand, and the real script on a tiny checkpoint and small TSVs."""
import base64
import csv
import io
import json
import os
import random
import subprocess
import sys

import pytest

import evaluate
from evaluate import (BENCHMARKS, accuracy, find_math, find_mme, find_option, find_pope, find_yes_no, gains, kind_of, literal, questions,
                      read_tsv, relaxed, resample, rotations, said, same, score_hallusion, score_mme, score_options, score_pope,
                      true_math, true_texts, with_intervals)
from test_data import FAMILY, read
from tiny import picture

COLOURS = {"A": "red", "B": "blue", "C": "dog", "D": "forest green"}


def png(seed):
    file = io.BytesIO()
    picture(seed, (40, 40)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def tsv(path, rows):
    """As pandas.to_csv(sep="\\t", index=False) writes it."""
    header = list(dict.fromkeys(k for row in rows for k in row))
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, header, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def answer(index, right=True, **more):
    return {"index": str(index), "unit": str(index), "right": right, "unparsed": False, **more}


def values(scores):
    return {name: round(value, 3) for name, (value, _) in resample(scores, 2).items()}


# ------------------------------------------------------------------- what an answer says


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("b", "B"), ("(b).", "B"), ("**C**", "C"), ("The answer is C", "C"), ("The answer is c.", "C"),
    ("Answer: D", "D"), ("The correct answer is option (C).", "C"), ("The answer is C because it stands at the top left of it", "C"),
    ("The answer is B, not A.", "B"), ("A", "A"), ("A.", "A"), ("A. red", "A"), ("A is right", "A"), ("(A) red", "A"),
    ("Option A seems right", "A"), ("I would go with A given the shape", "A"), ("The answer is A with high confidence", "A"),
    ("A would be correct", "A"), ("A matches the picture", "A"), ("It is the second. A dog", "C"), ("A dog", "C"), ("A dog stands there", "C"), ("A cat", None), ("The answer is a dog", "C"), ("The answer is A dog", "C"),
    ("blue", "B"), ("It is BLUE!", "B"), ("red or blue", None), ("forest green", "D"), ("A or B", None), ("E", None), ("", None), ("I cannot tell", None),
    ("B is what I would say if I had to choose one of them", None), ("blue " + "and so on " * 9, None), ("reddish", "A")])
def test_an_option_is_read_from_its_letter_the_phrase_or_its_text(text, letter):
    """Options: A red, B blue, C dog, D forest green; together 22 letters, so an answer of up to 44 may be searched for a text."""
    assert find_option({"options": COLOURS}, text) == letter


def test_an_option_may_begin_with_an_article_or_hold_another():
    dogs = {"A": "A man riding a horse", "B": "A dog in the park", "C": "Two cats", "D": "An empty street"}
    assert [find_option({"options": dogs}, t) for t in ("A dog in the park", "a dog in the park.", "two cats")] == ["B", "B", "C"]
    counts = {"A": "1", "B": "10", "C": "12", "D": "2"}
    assert [find_option({"options": counts}, t) for t in ("10", "2.", "10 or 12", "3")] == ["B", "D", None, None]


@pytest.mark.parametrize("text, pope, mme, words", [
    ("Yes", "yes", "yes", "yes"), ("no", "no", "no", "no"), ("No, there is none.", "no", "no", "no"), ("Yes, it is.", "yes", "yes", "yes"),
    ("There is not.", "no", None, None), ("Not sure. Yes.", "yes", "no", "yes"), ("NO", None, "no", "no"), ("Yes. No doubt.", "yes", "yes", None),
    ("The answer is yes", "yes", None, "yes"), ("a dog", None, None, None), ("", None, None, None), ("north", None, "no", None)])
def test_yes_and_no_by_the_rule_of_each_benchmark(text, pope, mme, words):
    assert (find_pope({}, text), find_mme({}, text), find_yes_no({}, text)) == (pope, mme, words)


@pytest.mark.parametrize("target, given, right", [
    ("100", "105", True), ("100", "105.1", False), ("100", "95", True), ("-20", "-19", True), ("-20", "20", False), ("5", "5%", False),
    ("5%", "5", False), ("5%", "5%", True), ("5%", "0.05", True), ("0.05", "5.2%", True), ("0", "0", True), ("0", "0.0", False), ("0", "0.0001", False),
    ("0%", "0%", True), ("Yes", "yes", True), ("Yes", "Yes.", False), ("1,000", "1000", False), ("1,000", "1,000", True), ("14", "", False),
    ("nan", "NaN", True), ("inf", "5", False), ("14", "14.", True)])
def test_chartqa_tolerates_a_twentieth_of_a_number_and_nothing_else(target, given, right):
    assert relaxed(target, given) is right


@pytest.mark.parametrize("fields, text, right", [
    ({"answer_type": "integer", "answer": "14"}, "The missing number is 14.", True), ({"answer_type": "integer", "answer": "1200"}, "1,200", True),
    ({"answer_type": "integer", "answer": "3"}, "2 + 1 = 3.7", True), ({"answer_type": "integer", "answer": "-4"}, "x = -4", True),
    ({"answer_type": "integer", "answer": "4"}, "10-4", True), ({"answer_type": "integer", "answer": "4"}, "none", None),
    ({"answer_type": "float", "answer": "1.5", "precision": "1.0"}, "about 1.46", True),
    ({"answer_type": "float", "answer": "1.5", "precision": "1"}, "1.44 m", False),
    ({"answer_type": "float", "answer": "0.60", "precision": "2"}, "0.6", True), ({"answer_type": "float", "answer": "0.25"}, "$.25", True),
    ({"answer_type": "list", "answer": "[2007, 2008]"}, "Between [2007, 2008].", True),
    ({"answer_type": "list", "answer": "[2007, 2008]"}, "[2008, 2007]", False), ({"answer_type": "list", "answer": "[2007, 2008]"}, "2007 to 2008", None),
    ({"answer_type": "list", "answer": "[1, 2]"}, "[1, 2, ...]", None), ({"answer_type": "list", "answer": "[1, 2]"}, "so [{{1}}]", None),
    ({"answer_type": "list", "answer": "[1, 2]"}, "[{1, 2}] or [1j]", None), ({"answer_type": "integer", "answer": "-4"}, "x = \u22124", True),
    ({"answer_type": "float", "answer": "2500000.0", "precision": "1"}, "2.5e6", True),
    ({"question_type": "multi_choice", "choices": "['x', 'y']", "answer": "y", "answer_option": "(b)"}, "B", True),
    ({"answer_type": "text", "answer": "Blue"}, "blue.", True), ({"answer_type": "text", "answer": "blue"}, "", None),
    ({"question_type": "multi_choice", "answer_type": "text", "choices": "['3/11', '8/11']", "answer": "8/11"}, "(B) 8/11", True),
    ({"question_type": "multi_choice", "answer_type": "text", "choices": "['3/11', '8/11']", "answer": "8/11", "answer_option": "B"}, "3/11", False)])
def test_mathvista_by_its_types(fields, text, right):
    row = {"options": {}, **fields}
    truth = true_math(row)
    found = find_math(row, text)
    assert (None if found is None else same(truth, found)) is right


def test_an_answer_may_be_a_list_and_a_completion_may_think_first():
    assert true_texts({"answer": "['14', '15']"}) == ["14", "15"] and true_texts({"answer": "14"}) == ["14"] and true_texts({"answer": "[x"}) == ["[x"]
    assert BENCHMARKS["chartqa"].equal(["14", "20"], "19.5") and BENCHMARKS["exact"].equal(["a cat", "cat"], " Cat. ") and literal("(1, 2)") is None
    assert said("<think>A or B</think><answer>B</answer>") == said("<think>A or B</think> B ") == said("B\n") == "B"
    assert said("<answer> B\n</answer>") == said("<think>x</think> so <answer>A</answer> or <answer>B</answer>!") == "B"
    assert said("<think><answer>A</answer></think>B") == "B" and said("<answer>B") == "<answer>B" and said("<think>It may be B") == ""


# ------------------------------------------------------------------- scores by hand


def test_accuracy_of_all_of_each_category_and_the_mean_of_categories():
    rows = [answer(i, r, category=c) for i, (r, c) in enumerate([(1, "x"), (1, "x"), (0, "x"), (0, "y")])]
    assert values(accuracy(rows)) == {"accuracy": 50, "accuracy, mean of category": 33.333, "accuracy, category x": 66.667, "accuracy, category y": 0}


def option_rows(groups):
    """{group: what each copy got}, of questions with two options."""
    return [answer(int(g) + 10**6 * j, r, group=g, copy=j, options={"A": "", "B": ""}) | {"unit": g, "unparsed": r is None, "right": bool(r)}
            for g, copies in groups.items() for j, r in enumerate(copies) if r != "lost"]


def test_circular_counts_a_question_once_if_all_its_rotations_are_right():
    """Vanilla: the first copies, 3 of 4 right. Circular: 1 and 2 are whole, 1 is right; 3 lacks a copy, 4 its first: left out."""
    rows = option_rows({"1": [1, 1], "2": [1, None], "3": [1, "lost"], "4": ["lost", 1], "5": [0, 0]})
    found = with_intervals(score_options(rows))
    assert found["accuracy"]["value"] == 75 and found["accuracy"]["n"] == 4
    assert (found["circular"]["value"], found["circular"]["n"], found["circular"]["unparsed"]) == (33.33, 3, 1)
    assert "circular" not in score_options(option_rows({"1": [1], "2": [0]}))


def test_rotations_ask_every_option_at_every_letter():
    row = {"index": "7", "number": 7, "group": "7", "copy": 0, "options": {"A": "x", "B": "y", "C": "z"}, "truth": "B"}
    turned = list(rotations(row))
    assert [r["index"] for r in turned] == ["7", "1000007", "2000007"] and [r["truth"] for r in turned] == ["B", "A", "C"]
    assert all(r["options"][r["truth"]] == "y" for r in turned) and ["".join(r["options"].values()) for r in turned] == ["xyz", "yzx", "zxy"]


def test_pope_by_hand_with_splits_listed_together():
    """Row 0 counts in both splits. random: truth yes yes no, said yes (unparsed counts as yes) no yes: TP 1, FN 1, FP 1.
    popular: truth yes no, said yes no. Pooled: TP 2, FP 1, FN 1, TN 1 of 5."""
    rows = [answer(i, truth == (said or "yes"), truth=truth, extracted=said, category=c) for i, (truth, said, c) in enumerate(
        [("yes", None, "random,popular"), ("yes", "no", "random"), ("no", "yes", "random"), ("no", "no", "popular")])]
    got = values(score_pope(rows))
    assert [got[k] for k in ("accuracy", "precision", "recall", "F1", "yes ratio")] == [60, 66.667, 66.667, 66.667, 60]
    assert [got[f"{k}, category random"] for k in ("accuracy", "precision", "recall", "F1", "yes ratio")] == [33.333, 50, 50, 50, 66.667]
    assert with_intervals(score_pope(rows))["accuracy"]["n"] == 4
    never = [answer(i, t == "no", truth=t, extracted="no", category="x") for i, t in enumerate(["yes", "no"])]
    assert values(score_pope(never))["precision"] == values(score_pope(never))["F1"] == 0


def test_mme_by_hand_with_a_picture_that_lacks_a_question():
    """count: pictures a (both right), b (one), c (a single question, right): accuracy 4/5, accuracy+ 1/2, score 130.
    OCR: d (both): 100 + 100. code_reasoning: e (none): 0."""
    rights = {("count", "a"): [1, 1], ("count", "b"): [1, 0], ("count", "c"): [1], ("OCR", "d"): [1, 1], ("code_reasoning", "e"): [0, 0]}
    rows = [answer(f"{p}{i}", r, category=c) | {"unit": f"{c} {p}"} for (c, p), group in rights.items() for i, r in enumerate(group)]
    got = values(score_mme(rows))
    assert (got["accuracy, category count"], got["accuracy+, category count"], got["score, category count"]) == (80, 50, 130)
    assert (got["perception"], got["cognition"]) == (330, 0) and with_intervals(score_mme(rows))["accuracy+, category count"]["n"] == 2


def test_hallusionbench_by_hand():
    """Set 0 of a VS chart: figure 0 shows nothing (no fAcc), figure 1 has questions 0 right, 1 wrong; set 0 of a VD chart is
    another set. aAcc 4/5; fAcc: VS figure 1 wrong, VD figure 0 right: 1/2; qAcc: VS question 0 right, 1 wrong, VD right: 2/3."""
    rows = []
    for index, r in (("VS_chart_0_0_0_0", 1), ("VS_chart_1_0_1_0", 1), ("VS_chart_0_0_0_1", 1), ("VS_chart_1_0_1_1", 0), ("VD_chart_1_0_0_0", 1)):
        row = {"index": index, "answer": "Yes"}
        assert evaluate.true_hallusion(row) == "yes"
        rows.append({**answer(index, r), **row})
    assert values(score_hallusion(rows)) == {"aAcc": 80, "fAcc": 50, "qAcc": 66.667, "mean": round((80 + 50 + 200 / 3) / 3, 3)}


def test_intervals_cover_as_often_as_they_say_and_respect_units():
    rng, covered, lone, tied = random.Random(0), 0, [], []
    for _ in range(60):
        rows = [answer(i, rng.random() < 0.3) for i in range(200)]
        s = with_intervals(accuracy(rows))["accuracy"]
        covered += s["low"] <= 30 <= s["high"]
    assert covered >= 52                                                       # 57 expected
    for i in range(100):
        for copy in range(4):
            lone.append(answer(f"{i}-{copy}", i % 2))
            tied.append({**lone[-1], "unit": str(i)})
    width = lambda rows: (s := with_intervals(accuracy(rows))["accuracy"])["high"] - s["low"]
    assert width(tied) == pytest.approx(2 * width(lone), rel=0.2)              # four copies of a question are one question


def test_a_gain_of_a_point_is_noise_and_a_paired_one_on_every_row_is_not():
    rng = random.Random(1)
    base = [answer(i, rng.random() < 0.5) for i in range(400)]
    other = [answer(i, rng.random() < 0.51) for i in range(400)]
    better = [{**r, "right": r["right"] or i % 25 == 0} for i, r in enumerate(base)]
    assert gains(accuracy, other, base)["accuracy"]["verdict"] == "noise"
    few = [gains(accuracy, [answer(i) for i in range(n)], [answer(i, False) for i in range(n)])["accuracy"] for n in (9, 10)]
    assert [(g["low"], g["verdict"]) for g in few] == [(100, "noise"), (100, "gain")]       # nine agree by chance too easily
    found = gains(accuracy, better, base)["accuracy"]
    assert found["verdict"] == "gain" and found["value"] < 4.1 and found["n"] == 400
    assert gains(accuracy, base, better)["accuracy"]["verdict"] == "loss" and gains(accuracy, base, base[:7])["accuracy"]["n"] == 7
    assert gains(accuracy, base, [answer("elsewhere")]) == {}


# ------------------------------------------------------------------- reading


@pytest.mark.parametrize("name, rows, kind", [
    ("MMBench_DEV_EN", {"A": "x"}, "mmbench"), ("MMStar", {"A": "x"}, "mcq"), ("BLINK", {}, "mcq"), ("POPE", {}, "pope"), ("MME", {}, "mme"),
    ("MME-RealWorld", {"A": "x", "B": "y"}, "mcq"), ("MMMU_DEV_VAL", {"A": "x", "B": "y"}, "mcq"), ("HallusionBench", {}, "hallusion"),
    ("ChartQA_TEST", {}, "chartqa"), ("MathVista_MINI", {}, "mathvista"), ("MMVet", {}, "mmvet"), ("mm-vet", {}, "mmvet"), ("mine", {"answer": "Yes"}, "yesno"),
    ("mine", {"answer": "14"}, "exact"), ("mine", {"A": "x", "B": "y"}, "mcq"), ("mine", {"question_type": "free_form", "answer_type": "text"}, "mathvista")])
def test_the_kind_is_told_by_the_name_or_the_columns(tmp_path, name, rows, kind):
    path = tsv(tmp_path / f"{name}.tsv", [{"index": 0, "question": "q", "answer": "A", **rows}])
    header, found, _ = read_tsv(path)
    assert kind_of(path, header, found) == kind


def test_fields_with_line_ends_quotes_and_na_come_back_and_line_numbers_are_those_of_an_editor(tmp_path):
    rows = [{"index": 5, "question": 'a "b"\nc\td', "A": "None", "B": "NA", "C": "", "answer": "B", "l2_category": "x"},
            {"index": 1000005, "question": "q", "A": "nan", "B": "é", "C": "null", "answer": "A", "l2_category": "y"}]
    header, found, _ = read_tsv(tsv(tmp_path / "x.tsv", rows))
    assert [line for line, _ in found] == [2, 4] and found[0][1]["question"] == 'a "b"\nc\td' and "l2-category" in header
    assert [r["options"] for _, r in found] == [{"A": "None", "B": "NA"}, {"A": "nan", "B": "é", "C": "null"}]


def test_a_row_is_a_copy_if_the_file_repeats_options_a_million_further_on_and_else_its_number_is_just_large(tmp_path):
    row = lambda index, *options, **more: {"index": index, "question": "q", **dict(zip("AB", options)), "answer": "A", **more}
    found = lambda name, *rows: [(r["index"], r["group"], r["copy"]) for _, r in read_tsv(tsv(tmp_path / name, rows))[1]]
    assert found("x.tsv", row(5, "x", "y"), row(1000005, "y", "x")) == [("5", "5", 0), ("1000005", "5", 1)]
    assert found("x.tsv", row("5.0", "x", "y"), row("1000005.0", "y", "x")) == [("5", "5", 0), ("1000005", "5", 1)]        # by pandas
    assert found("x.tsv", row(5, "x", "y"), row(1000005, "y", "z")) == [("5", "5", 0), ("1000005", "1000005", 0)]
    assert found("x.tsv", row(1, answer="yes"), row(1000001, answer="yes")) == [("1", "1", 0), ("1000001", "1000001", 0)]   # no options


def test_a_lone_carriage_return_is_one_line_with_the_file_and_a_choices_column_hides_no_options(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"index\tquestion\tanswer\n1\ta\rb\tyes\n")
    with pytest.raises(SystemExit, match=r"x\.tsv: line 2: .*new-line"):
        read_tsv(tmp_path / "x.tsv")
    row = {"question": "Which?", "options": {"A": "x", "B": "y"}, "choices": "mine"}
    assert "A. x\nB. y\n" in evaluate.question_text(row, "") and "A. x" not in evaluate.question_text({**row, "question_type": "free_form"}, "")


def test_questions_about_one_picture_are_one_unit_of_the_bootstrap(tmp_path):
    picture = lambda i: base64.b64encode(bytes([i]) * 60).decode()
    rows = [{"index": 0, "image": picture(0), "category": "a, b"}, {"index": 1, "image": "0", "category": "a, b"},
            {"index": 2, "image": picture(1), "category": "c"}, {"index": 3, "image": "", "category": "c"}]
    asked = questions(read_tsv(tsv(tmp_path / "x.tsv", [{"question": "q", "answer": "yes", **r} for r in rows]))[1], "yesno", None)
    units = [r["unit"] for _, r in asked]
    assert units[0] == units[1] and len(set(units)) == 3
    scored = accuracy([{**r, "right": True, "unparsed": False} for _, r in asked])
    assert [n for n in scored if "category" in n] == ["accuracy, mean of category", "accuracy, category a, b", "accuracy, category c"]


def test_a_limit_counts_questions_and_takes_their_copies(tmp_path):
    rows = [{"index": i + 10**6 * j, "question": "q", "A": "x", "B": "y", "answer": "A"} for j in range(2) for i in range(3)]
    asked = questions(read_tsv(tsv(tmp_path / "x.tsv", rows))[1], "mcq", 2)
    assert [r["index"] for _, r in asked] == ["0", "1", "1000000", "1000001"]


def test_wemath_by_hand():
    """Two steps and the whole: R R R mastered, R R w inadequate generalisation, R w R rote (strict) or mastered (loose),
    w w R rote both ways, R w w insufficient knowledge; a three-step problem, all right; one without its whole is left out."""
    problems = {"1": "111", "2": "110", "3": "101", "4": "001", "5": "100"}
    answer = lambda unit, key, right: {"index": f"{unit} {key}", "unit": unit, "key": key, "right": right == "1", "unparsed": False}
    rows = [answer(f"2 {i}", f"2steps_{k}", x) for i, line in problems.items() for k, x in zip(("1", "2", "multi"), line)]
    rows += [answer("3 1", f"3steps_{k}", "1") for k in ("1", "2", "3", "multi")] + [answer("2 9", "2steps_1", "1")]
    found = {name: round(s["value"], 2) for name, s in evaluate.with_intervals(evaluate.score_wemath(rows)).items()}
    assert found == {"accuracy": 70, "one step": 71.43, "two steps": 60, "three steps": 100, "IK": 16.67, "IG": 16.67,
                     "score strict": 41.67, "CM strict": 33.33, "RM strict": 50, "score loose": 58.33, "CM loose": 50, "RM loose": 25}


def test_wemath_is_recognised_and_names_a_row_that_is_no_step(tmp_path):
    rows = [{"index": 1, "question": "q", "A": "x", "B": "y", "answer": "A", "ID": 7, "key": "2steps_1"},
            {"index": 2, "question": "q", "A": "x", "B": "y", "answer": "A", "ID": 7, "key": "4steps_1"}]
    header, found, _ = read_tsv(tsv(tmp_path / "WeMath.tsv", rows))
    assert kind_of(tmp_path / "WeMath.tsv", header, found) == "wemath"
    (_, good), (_, bad) = questions(found, "wemath", None)
    assert good["unit"] == "2 7" and "4steps_1" in str(bad)


# ------------------------------------------------------------------- the real script


@pytest.fixture
def run(stage, checkpoint, tmp_path):
    """run(data, *flags, out=, family=) -> (error, printed, results, predictions)"""
    def go(data, *flags, out="out", family=FAMILY):
        error, printed = stage(evaluate, "--data", data, "--model", checkpoint(family), "--out", tmp_path / out, "--max-new-tokens", 3,
                               "--batch-size", 3, *flags)
        folder = tmp_path / out
        load = lambda name, how: how(folder / name) if (folder / name).exists() else None
        return error, printed, load("results.json", lambda p: json.loads(p.read_text())), load("predictions.jsonl", read)
    return go


def mixed(path):
    """Good rows: one picture, by reference, two pictures, none; then every kind of bad one."""
    q = {"question": "Which?", "A": "red", "B": "blue", "answer": "A", "category": "c"}
    good = [{"index": 0, "image": png(0), **q}, {"index": 1, "image": "0", **q}, {"index": 2, "image": str([png(1), png(2)]), **q},
            {"index": 3, "image": "", **q, "hint": "It glows."}]
    bad = [{"index": 4, "image": base64.b64encode(b"no picture at all" * 9).decode(), **q}, {"index": 5, "image": "*" * 99, **q},
           {"index": 6, "image": "77", **q}, {"index": 7, "image": "0", **q, "answer": ""}, {"index": 8, "image": "0", **q, "answer": "C"},
           {"index": 0, "image": "0", **q}]
    return tsv(path, good + bad)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "internvl", "llava_onevision", "qwen3_vl"])
def test_every_shape_of_row_is_asked_and_every_bad_one_is_named(run, tmp_path, family):
    data = mixed(tmp_path / "mine.tsv")
    error, printed, results, predictions = run(data, family=family)
    assert error is None, error
    assert [(p["index"], p["condition"], p["images"]) for p in predictions] == [
        ("0", "real", 1), ("0", "without", 0), ("0", "shuffled", 2), ("1", "real", 1), ("1", "without", 0), ("1", "shuffled", 2),
        ("2", "real", 2), ("2", "without", 0), ("2", "shuffled", 1), ("3", "real", 0), ("3", "without", 0)]
    lines = sorted(x for x in printed.replace("\r", "\n").splitlines() if x.startswith("skipped"))
    wants = [("6", "row 4: image 1 cannot be read"), ("7", "row 5: image 1 is not base64"), ("8", "row 6: its image is that of row 77"),
             ("9", "row 7: the answer (none)"), ("10", "row 8: the answer C"), ("11", "row 0: its index stands twice")]
    assert len(lines) == 6 and all(any(x.startswith(f"skipped {data}:{n}: {w}") for x in lines) for n, w in wants), lines
    assert (results["rows"], results["skipped"], results["written"], results["without_image"]) == (10, 6, 11, 1)
    assert results["real"]["accuracy"]["n"] == 4 and results["gain_over_shuffled"]["accuracy"]["n"] == 3
    alone = {(p["index"], p["condition"]): p["prediction"] for p in predictions}
    again = run(data, "--batch-size", 1, out="one", family=family)[3]
    assert {(p["index"], p["condition"]): p["prediction"] for p in again} == alone


def test_a_killed_run_goes_on_and_a_finished_one_is_compared_without_asking_again(run, tmp_path, monkeypatch):
    data = mixed(tmp_path / "mine.tsv")
    whole = run(data, out="whole")[3]
    plain, calls = evaluate.generate, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(evaluate, "generate", dies)
    error = run(data)[0]
    assert "same command goes on" in error and not (tmp_path / "out/results.json").exists()
    monkeypatch.setattr(evaluate, "generate", plain)
    error, printed, _, predictions = run(data)
    assert error is None and "resuming" in printed and predictions == whole
    error, printed, results, _ = run(data, "--compare", tmp_path / "whole", "--backbone-accuracy", 10)
    assert error is None and "reused" in printed and results["compared"]["real"]["accuracy"]["verdict"] == "noise"
    assert results["leakage"]["value"] == max(0, results["without"]["accuracy"]["value"] - 10)
    error = run(data, "--compare", tmp_path / "nowhere")[0]
    assert "nowhere holds no finished predictions" in error
    other = tsv(tmp_path / "other.tsv", [{"index": 0, "image": png(0), "question": "q", "answer": "Yes"}])
    assert "another kind and data" in run(other, "--compare", tmp_path / "whole", out="other")[0]


def test_answers_are_scored_by_the_kind(run, tmp_path, monkeypatch):
    """Every question is answered B: of MMBench's rotations one in two is right, and no question in both."""
    monkeypatch.setattr(evaluate, "generate", lambda policy, processor, prompts, n: ["B"] * len(prompts))
    q = {"question": "Which?", "A": "red", "B": "blue"}
    data = tsv(tmp_path / "MMBench.tsv", [{"index": i, "image": png(i), **q, "answer": "AB"[i % 2]} for i in range(3)])
    error, printed, results, predictions = run(data)
    assert error is None and len(predictions) == 3 * 3 * 2 and results["real"]["accuracy"]["value"] == 33.33
    assert results["real"]["circular"]["value"] == 0 and results["real"]["circular"]["n"] == 3
    data = tsv(tmp_path / "MMVet.tsv", [{"index": i, "image": png(i), "question": "Why?", "answer": "so"} for i in range(2)])
    error, _, results, predictions = run(data, out="vet")
    assert error is None and json.loads((tmp_path / "vet/mmvet.json").read_text()) == {"v1_0": "B", "v1_1": "B"}
    assert "real" not in results and "own grader" in results["extraction"] and len(predictions) == 2
    data = tsv(tmp_path / "MathVista.tsv", [{"index": 0, "image": png(0), "question": "Q", "answer": "8", "question_type": "free_form", "answer_type": "integer"}])
    error, _, results, _ = run(data, out="math")
    assert error is None and "asks an LLM" in results["extraction"] and results["real"]["accuracy"]["unparsed"] == 1


@pytest.mark.parametrize("text, says", [("", "no column"), ("index\tquestion\n1\tx\n", "no column answer"), ("index\tquestion\tanswer\n", "none of its 0 rows"),
                                        ("index\tquestion\tanswer\n1\tx\n", "none of its 1 rows")])
def test_a_file_that_is_no_benchmark_is_refused_in_one_line(run, tmp_path, text, says):
    (tmp_path / "x.tsv").write_text(text)
    error = run(tmp_path / "x.tsv")[0]
    assert says in error and "\n" not in error and str(tmp_path / "x.tsv") in error
    assert "no such file" in run(tmp_path / "y.tsv")[0]


def test_the_toy_worlds_benchmark_asks_for_the_painted_truth_in_every_rotation(run, tmp_path):
    """Five options, five copies; a caption's lie is never the answer; the first two questions run through the script."""
    from toy_world import make_world, records_of, write_benchmark
    make_world(tmp_path, 2, 3, 1.0, 0)
    write_benchmark(tmp_path)
    objects = [o for t in records_of(tmp_path / "truth.jsonl") if t["id"].startswith("val") for o in t["objects"]]
    header, rows, _ = read_tsv(tmp_path / "val.tsv")
    assert len(rows) == 5 * len(objects) and kind_of(tmp_path / "val.tsv", header, rows) == "mcq"
    for i, (_, row) in enumerate(rows):
        o = objects[i % len(objects)]
        assert row["options"][row["answer"]] == o["colour"] and o["kind"] in row["question"] and o["place"] in row["question"]
    assert {r["answer"] for _, r in rows if r["group"] == "0"} == set("ABCDE") and all(r["image"] for _, r in rows)
    error, _, results, predictions = run(tmp_path / "val.tsv", "--limit", 2, "--conditions", "real", family="idefics3")
    assert error is None and len(predictions) == 10 and results["real"]["circular"]["n"] == 2 and results["real"]["accuracy"]["n"] == 2


def test_two_ranks_write_what_one_does(run, checkpoint, tmp_path):
    data = mixed(tmp_path / "mine.tsv")
    assert run(data)[0] is None
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", evaluate.__file__, "--data", str(data),
                    "--model", str(checkpoint(FAMILY)), "--out", str(tmp_path / "two"), "--max-new-tokens", "3", "--batch-size", "2"],
                   check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "out" / name).read_text()
