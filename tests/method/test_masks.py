"""What is hidden: thresholds by hand, the span against all spans, and masks that can be undone."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import build_masks
from build_masks import (
    largest_gap,
    mask_caption,
    maximum_sum_span,
    otsu,
    threshold_rule,
)
from common.masks import load_masks, read_masks
from common.records import BadRecord
from common.text import MASK, split_sentences, split_words
from reward import fill, target_completion

# the largest gap ends at 12; Otsu's cut, 3 x 3 (25/3 - 1)^2 = 484, is at 6; the mean is 14/3
SCORES = [7, 0, 12, 1, 6, 2]


def scored(caption, value_of):
    """A record as score_dependency.py writes it; value_of(k, word): D_vis of the k-th word.

    The position baseline is 0 everywhere, and the density ratio is ten times D_vis.
    """

    def scores(d_vis):
        return {"score": d_vis, "d_vis": d_vis, "position_baseline": 0.0, "density": 10 * d_vis}

    count = itertools.count()
    sentences = []
    for start, end in split_sentences(caption):
        words = []
        for word_start, word_end in split_words(caption, start, end):
            value = scores(value_of(next(count), caption[word_start:word_end]))
            words.append({"start": word_start, "end": word_end, **value, "producing": dict(value)})
        mean = sum(word["d_vis"] for word in words) / len(words)
        sentence = {"text": caption[start:end], "start": start, "end": end, **scores(mean)}
        sentences.append({**sentence, "words": words})
    return {"id": "1", "image": "a.png", "caption": caption, "sentences": sentences}


def mask(record, tau=0.0, granularity="span", select="dependency", max_masks=9, seed=0):
    """mask_caption() with one fixed tau."""
    rule = str(tau)
    tau_of = threshold_rule(rule, record["sentences"])
    return mask_caption(record, rule, tau_of, granularity, select, max_masks, seed)


def tau(rule, sentences, everything=SCORES):
    """tau of a caption of `sentences` if the file is `everything`.

    Both are lists of D_vis, or of (D_vis, position baseline, density).
    """

    def as_dicts(values):
        quantities = [v if isinstance(v, tuple) else (v, 0, -v) for v in values]
        names = ("d_vis", "position_baseline", "density")
        return [dict(zip(names, quantity)) for quantity in quantities]

    return threshold_rule(rule, as_dicts(everything))(as_dicts(sentences))


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    "rule, value",
    [
        ("otsu", 6),
        ("gap", 12),
        ("mean", 14 / 3),
        ("quantile:0.5", 4),
        ("quantile:0.9", 9.5),
        ("0.62", 0.62),
        ("position", 6),
        ("density", -2),
    ],
)
def test_each_rule_gives_the_threshold_worked_out_by_hand(rule, value):
    assert tau(rule, SCORES) == pytest.approx(value)


def test_a_rule_looks_at_the_caption_or_at_the_file_as_it_says():
    found = {rule: tau(rule, [1, 2]) for rule in ("otsu", "quantile:0.5", "gap", "mean")}
    assert found == {"otsu": 6, "quantile:0.5": 4, "gap": 2, "mean": 1.5}


def test_the_corrected_rules_cut_the_excess_over_the_baseline_and_the_density():
    # excess 0.1, 0.3, 0, 0.1: Otsu's cut, 3 x 1 (0.3 - 0.2/3)^2, is at 0.3
    # density 4, 1, 5, 2: Otsu's cut, 2 x 2 (4.5 - 1.5)^2, is at 4
    everything = [(0.9, 0.8, 4), (0.5, 0.2, 1), (0.8, 0.8, 5), (0.3, 0.2, 2)]
    assert tau("position", everything, everything) == pytest.approx(0.3)
    assert tau("density", everything, everything) == 4
    assert tau("otsu", everything, everything) == 0.8


@pytest.mark.parametrize("rule", [otsu, largest_gap])
def test_equal_scores_and_a_single_score_are_all_chosen(rule):
    assert rule([0.5]) == rule([0.5, 0.5, 0.5]) == 0.5


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(lambda x: len(set(x)) > 1),
)
def test_no_other_cut_separates_better_than_otsu(scores):
    def between(cut):
        low = [x for x in scores if x < cut]
        high = [x for x in scores if x >= cut]
        return len(low) * len(high) * (sum(high) / len(high) - sum(low) / len(low)) ** 2

    others = {*scores} - {min(scores)}
    assert otsu(scores) in scores and between(otsu(scores)) >= max(map(between, others)) - 1e-6


# ---------------------------------------------------------------- spans and masks


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
@example([7, 7, 0, 9, 2])  # two runs of the same sum: 7 7 and 9, mean 5
def test_the_span_is_the_longest_run_of_the_largest_sum_above_the_mean(scores):
    """Against all runs, in integers: n times the sum of a run less its length times the total."""
    n = len(scores)
    runs = {}
    for first in range(n):
        for last in range(first, n):
            length = last - first + 1
            excess = n * sum(scores[first : last + 1]) - length * sum(scores)
            runs[first, last] = (excess, length)
    assert runs[maximum_sum_span([s / 7 for s in scores])] == max(runs.values())


PIECES = [
    "A red",
    "3.5 stars",
    "the big 圆",
    "🙂 cat",
    "Dr. Who",
    "「你好",
    ".",
    ". ",
    "! ",
    "\n",
    "。",
]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.sampled_from(["span", "sentence"]),
    st.sampled_from(["dependency", "random"]),
)
def test_filling_the_answer_in_restores_caption_and_sentence(caption, values, granularity, select):
    record = scored(caption, lambda k, word: values[k % len(values)])
    if not record["sentences"]:
        return
    masks = mask(record, 0.5, granularity, select)
    sentences = {s["text"] for s in record["sentences"]}
    for m in masks:
        assert m["masked_caption"].count(MASK) == 1
        assert m["masked_caption"].replace(MASK, m["answer"]) == caption
        assert m["sentence"].count(MASK) == 1
        assert m["sentence"].replace(MASK, m["answer"]) in sentences
        assert m["answer"] == caption[m["start"] : m["end"]] == m["answer"].strip() != ""
        assert m["threshold"] == 0.5
        assert granularity == "span" or m["sentence"] == MASK
        assert select == "random" or m["score"] >= 0.5
    assert len(masks) == sum(s["d_vis"] >= 0.5 for s in record["sentences"])
    # never the same words twice
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(masks))


# five words per sentence
FOUR = "We go to an (inn). It is by my car. He is in my bed. An ox on no (map)."


def peak(k, word):
    if k in (6, 7, 8):
        return 0.9
    return {"map": 0.5, "inn": 0.2}.get(word, 0.1)


PEAKS = scored(FOUR, peak)


def test_words_of_highest_dependency_are_hidden_and_max_masks_keeps_the_most_visual_sentences():
    scores = [s["d_vis"] for s in PEAKS["sentences"]]
    assert scores == pytest.approx([0.12, 0.58, 0.1, 0.18])
    # tau itself is enough
    assert [m["answer"] for m in mask(PEAKS, scores[0])] == ["inn", "is by my", "map"]
    assert [m["answer"] for m in mask(PEAKS, 0.11, max_masks=2)] == ["is by my", "map"]
    assert [m["answer"] for m in mask(PEAKS, 0.11, max_masks=1)] == ["is by my"]
    assert mask(PEAKS, 0.15)[1]["sentence"] == f"An ox on no ({MASK})."


def test_the_span_is_chosen_by_the_producing_rows_in_the_quantity_of_the_rule():
    """Five words; own rows, corrected producing rows and producing densities peak elsewhere."""
    record = scored("One two three four five.", lambda k, word: 0.9 if k == 0 else 0.1)
    baselines = [0.0, 0.2, 0.8, 0.0, 0.0]
    d_vis = [0.1, 0.9, 0.9, 0.1, 0.1]
    density = [0, 0, 0, 0, 5]
    for word, *values in zip(record["sentences"][0]["words"], baselines, d_vis, density):
        word["producing"] = dict(zip(("position_baseline", "d_vis", "density"), values))

    answers = {}
    for rule in ("position", "density", "otsu", "mean"):
        (m,) = mask_caption(record, rule, threshold_rule(rule, record["sentences"]))
        answers[rule] = m["answer"]
    assert answers == {"position": "two", "density": "five", "otsu": "two", "mean": "two"}


def test_score_and_threshold_of_a_mask_are_in_the_quantity_of_its_rule():
    record = json.loads(json.dumps(PEAKS))
    for sentence in record["sentences"]:
        sentence["position_baseline"] = 0.1
    found = {}
    for rule in ("position", "density", "otsu"):
        tau_of = threshold_rule(rule, record["sentences"])
        found[rule] = [(m["score"], m["threshold"]) for m in mask_caption(record, rule, tau_of)]
    # Otsu's cut is at the second sentence alone: D_vis 0.58, of which 0.1 is baseline
    assert found == {"position": [(0.48, 0.48)], "density": [(5.8, 5.8)], "otsu": [(0.58, 0.58)]}


def lengths(masks):
    return sorted(len(m["answer"].split()) for m in masks)


@pytest.mark.parametrize("granularity", ["span", "sentence"])
def test_random_masks_are_as_many_and_as_long_as_the_chosen_but_elsewhere(granularity):
    chosen = mask(PEAKS, 0.11, granularity, max_masks=2)
    controls = []
    for seed in range(30):
        controls.append(mask(PEAKS, 0.11, granularity, "random", max_masks=2, seed=seed))
    assert all(lengths(c) == lengths(chosen) for c in controls)
    masks = list(itertools.chain(*controls))
    if granularity == "span":
        assert len({m["sentence"][-4:] for m in masks}) >= 4  # all sentences
        assert len({m["start"] for m in masks}) > 10
    else:
        assert len({m["answer"] for m in masks}) >= 4


def test_random_masks_find_room_where_few_sentences_have_it():
    text = "Red. It is by my car. Blue. So."
    record = scored(text, lambda k, word: 0.9 if k in (1, 2, 3, 6) else 0.1)
    assert [m["answer"] for m in mask(record, 0.2)] == ["It is by", "Blue"]
    controls = [mask(record, 0.2, select="random", seed=seed) for seed in range(30)]
    assert {tuple(lengths(c)) for c in controls} == {(1, 3)}
    assert len({m["start"] for c in controls for m in c}) == 6


@pytest.mark.parametrize("mark", [MASK, "<think>", "</answer>"])
def test_a_caption_that_already_contains_the_mask_or_a_tag_is_refused(mark):
    with pytest.raises(BadRecord, match="contains"):
        mask(scored(f"A {mark} circle.", lambda k, word: 0.5))


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("select", ["random", "dependency"])
def test_masks_depend_on_the_seed_and_not_on_the_order_of_the_records(stage, tmp_path, select):
    records = [{**PEAKS, "id": str(i)} for i in range(8)]

    def masks(name, records, seed):
        scores = tmp_path / f"{name}.in"
        scores.write_text("".join(json.dumps(r) + "\n" for r in records))
        flags = ("--threshold", "0.11", "--select", select, "--seed", seed)
        error, _ = stage(build_masks, "--scores", scores, "--out", tmp_path / name, *flags)
        assert error is None
        return sorted((tmp_path / name).read_text().splitlines())

    first = masks("first", records, 0)
    assert masks("again", records, 0) == first == masks("reversed", records[::-1], 0)
    assert (masks("other seed", records, 1) != first) == (select == "random")
    if select == "random":
        # not one draw for all records
        assert len({json.loads(m)["start"] for m in first}) > 3


def run_on(stage, tmp_path, records, *flags):
    """(error, printed, masks) of build_masks.py on these records."""
    scores = tmp_path / "scores"
    scores.write_text("".join(json.dumps(r) + "\n" for r in records))
    error, printed = stage(build_masks, "--scores", scores, "--out", tmp_path / "out", *flags)
    masks = []
    if error is None:
        masks = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    return error, printed, masks


def test_the_summary_counts_sentences_and_says_what_tau_is_of(stage, tmp_path):
    records = [{**PEAKS, "id": str(i)} for i in range(3)]
    error, printed, masks = run_on(stage, tmp_path, records, "--threshold", "density")
    assert error is None and len(masks) == 3
    assert "3 of 12 sentences masked: rule density, tau 5.800" in printed


@pytest.mark.parametrize("rule", ["quantile:2", "quantile:", "most", "quantil:0.5", "nan"])
def test_a_threshold_that_is_none_ends_in_one_line(stage, tmp_path, rule):
    error, _, _ = run_on(stage, tmp_path, [PEAKS], "--threshold", rule)
    assert rule in error and "otsu" in error and "\n" not in error


def test_a_file_of_plain_captions_is_refused_with_what_it_should_be(stage, tmp_path):
    captions = [{"id": 1, "image": "a.png", "caption": "A circle."}]
    error, _, _ = run_on(stage, tmp_path, captions)
    assert "scores" in error and "score_dependency.py" in error and "\n" not in error


@pytest.mark.parametrize(
    "broken",
    [
        {"sentences": [{}]},
        {"sentences": [{**PEAKS["sentences"][0], "d_vis": None}]},
        {"sentences": [{**PEAKS["sentences"][0], "density": float("nan")}]},
        {"caption": "Edited after it was scored."},
    ],
)
def test_a_broken_record_among_the_scores_costs_only_itself(stage, tmp_path, broken):
    records = [PEAKS, {**PEAKS, "id": "broken", **broken}, {**PEAKS, "id": "2"}]
    error, printed, masks = run_on(stage, tmp_path, records, "--threshold", "0.11")
    assert error is None and f"skipped {tmp_path}/scores:2: " in printed
    assert {m["id"] for m in masks} == {"1", "2"}


def test_a_question_is_a_caption_whose_mask_follows_it(tmp_path):
    question = {"id": "q", "image": "a.png", "question": "What is round?", "answer": "the red ball"}
    broken = [
        {key: value for key, value in question.items() if key != "answer"},
        question | {"question": f"What is {MASK}?"},
        question | {"answer": "</answer>"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [question, *broken]))
    (_, good), *others = read_masks(path)
    assert good["sentence"] == good["masked_caption"] == f"What is round? {MASK}"
    assert fill(good, "a ball") == "What is round? a ball"
    assert target_completion(good) == ("<think>What is round?</think><answer>the red ball</answer>")
    assert all(isinstance(record, BadRecord) for _, record in others)
    assert "lacks answer" in str(others[0][1])
    assert load_masks(path) == [good]
