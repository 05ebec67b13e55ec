"""The statistics of common/stats.py, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.results import interval
from common.stats import (
    auroc,
    bootstrap_ratios,
    confidence_interval,
    mean_std,
    paired_difference,
    ranks,
    share,
    spearman,
    with_intervals,
)


def answer(index, right=True, unit=None):
    unit = index if unit is None else unit
    return {"index": index, "unit": unit, "right": right, "unparsed": not right}


def accuracy(records):
    return {"accuracy": (100, [share(records)], records)}


# ---------------------------------------------------------------- ranks


def test_ties_take_their_mean_rank():
    assert ranks([10, 30, 20, 30]).tolist() == [1, 3.5, 2, 3.5]
    assert ranks([5, 5, 5]).tolist() == [2, 2, 2]
    assert ranks([]).tolist() == []


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1
    assert spearman([1, 2, 2, 3], [4, 3, 2, 1]) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))


def test_spearman_of_a_constant_or_a_single_value_is_nan():
    assert math.isnan(spearman([1, 2, 3], [4, 4, 4]))
    assert math.isnan(spearman([1], [2]))


def test_auroc_by_hand():
    assert auroc([0.9, 0.8, 0.3, 0.1], [True, True, False, False]) == 1
    assert auroc([0.9, 0.2, 0.5, 0.1], [True, True, False, False]) == 0.75  # 3 of 4 pairs
    assert auroc([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(auroc([0.5, 0.7], [True, True]))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_that_are_in_order(pairs):
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    won = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    value = auroc(*zip(*pairs))
    assert math.isnan(value) if not won else value == pytest.approx(sum(won) / len(won))


def test_mean_and_standard_deviation_leave_out_seeds_without_a_value():
    assert mean_std([1.0, 2.0, 3.0]) == {"values": [1.0, 2.0, 3.0], "mean": 2.0, "std": 1.0}
    missing = mean_std([1.0, None, math.nan])
    assert missing == {"values": [1.0, None, None], "mean": 1.0, "std": None}
    assert mean_std([None]) == {"values": [None], "mean": None, "std": None}


# ---------------------------------------------------------------- the bootstrap


def test_a_score_is_a_scaled_sum_of_ratios_of_sums():
    first = [("a", 1, 1), ("a", 0, 1), ("b", 1, 1)]
    second = [("a", 3, 4), ("b", 0, 2)]
    value, draws = bootstrap_ratios({"both": (10, [first, second], [])}, 7)["both"]
    assert value == pytest.approx(10 * (2 / 3 + 3 / 6))
    # two units: a twice, b twice, or both
    possible = [10 * (1 / 2 + 3 / 4), 10 * (1 + 0), 10 * (2 / 3 + 3 / 6)]
    assert len(draws) == 7
    assert all(min(abs(draw - p) for p in possible) < 1e-9 for draw in draws)


def test_all_scores_are_drawn_on_the_same_units():
    records = [answer(i, i % 3 == 0) for i in range(20)]
    wrong = [("w", [(r["unit"], 1 - r["right"], 1) for r in records])]
    scores = {**accuracy(records), **{name: (100, [ratio], records) for name, ratio in wrong}}
    drawn = bootstrap_ratios(scores, 50)
    assert drawn["accuracy"][1] + drawn["w"][1] == pytest.approx(np.full(50, 100))


def test_a_ratio_of_nothing_is_undefined_and_a_draw_of_nothing_takes_no_part():
    empty, draws = bootstrap_ratios({"precision": (100, [[("a", 0, 0)]], [])}, 5)["precision"]
    undefined = confidence_interval(empty, draws)
    assert undefined == {"value": None, "low": None, "high": None}
    assert interval(undefined) == "undefined"
    ratio = [("a", 1, 1), ("b", 0, 0)]
    value, draws = bootstrap_ratios({"precision": (100, [ratio], [])}, 50)["precision"]
    assert value == 100 and np.isnan(draws).any()
    defined = confidence_interval(value, draws)
    assert defined == {"value": 100, "low": 100, "high": 100}


def test_an_interval_is_the_middle_95_percent_of_the_draws_rounded():
    middle = confidence_interval(50.126, np.arange(101))
    assert middle == {"value": 50.13, "low": 2.5, "high": 97.5}
    nothing = confidence_interval(3, np.full(4, math.nan))
    assert nothing == {"value": 3, "low": None, "high": None}
    assert interval(nothing, sign="+") == "+3.0"


def test_scores_carry_their_numbers_of_records_and_of_unparsed_ones():
    scores = with_intervals(accuracy([answer(i, i < 3) for i in range(4)]))
    assert scores["accuracy"]["value"] == 75
    assert (scores["accuracy"]["n"], scores["accuracy"]["unparsed"]) == (4, 1)
    assert scores["accuracy"]["low"] < 75 < scores["accuracy"]["high"]
    assert with_intervals({}) == {}


def test_ten_units_that_all_gain_are_a_gain_and_nine_are_noise():
    for units, verdict in ((9, "noise"), (10, "gain")):
        mine = [answer(i) for i in range(units)]
        other = [answer(i, False) for i in range(units)]
        gain = paired_difference(accuracy, mine, other)["accuracy"]
        assert gain == {"value": 100, "low": 100, "high": 100, "n": units, "verdict": verdict}
    assert paired_difference(accuracy, other, mine)["accuracy"]["verdict"] == "loss"


def test_a_pair_is_compared_where_both_answered_and_its_spread_is_that_of_the_difference():
    mine = [answer(i, i % 2 == 0) for i in range(40)]
    # the same answers but one: unpaired, the interval would be as wide as that of each
    other = [{**record, "right": False} if record["index"] == 0 else record for record in mine]
    gain = paired_difference(accuracy, mine, [*other, answer("elsewhere")])["accuracy"]
    assert (gain["value"], gain["n"], gain["verdict"]) == (2.5, 40, "noise")
    assert gain["high"] - gain["low"] < 11
    assert paired_difference(accuracy, mine, [answer("elsewhere")]) == {}
