"""From attention rows to sentences and words, the two corrections, and the stage that ranks."""

import itertools
import json

import numpy as np
import pytest
from tiny import random_image

import score_dependency
from common.corrections import correct_scores, position_baseline
from common.records import load_records
from score_dependency import score_record

CAPTIONS = ["A large red circle is in the middle. A circle has no corners.", "Two dogs run."]

# ---------------------------------------------------------------- sentences and words


def test_sentences_and_words_average_their_own_rows_and_producing_those_before():
    record = {"id": "1", "image": "a.png", "caption": "Red cat. Dog."}
    # "Red", " c", "at", ".", " Dog", "."
    offsets = [(0, 3), (3, 5), (5, 7), (7, 8), (8, 12), (12, 13)]
    rows = {
        "d_vis": [1, 0.9, 0.6, 0.4, 0.1, 0.2, 0.3],
        "density": [3, 3, 2, 1, -2, 4, 0],
    }
    red_cat, dog = score_record(record, rows, [1.0] * 6, offsets)["sentences"]
    assert [red_cat["text"], dog["text"]] == ["Red cat.", "Dog."]
    assert red_cat["d_vis"] == pytest.approx((0.9 + 0.6 + 0.4 + 0.1) / 4)
    assert red_cat["density"] == (3 + 2 + 1 - 2) / 4
    assert (dog["d_vis"], dog["density"]) == (0.25, 2)
    red, cat = red_cat["words"]
    assert (red["d_vis"], cat["d_vis"]) == (0.9, 0.5)
    assert (red["producing"]["d_vis"], cat["producing"]["d_vis"]) == (1, 0.75)
    assert cat["producing"]["density"] == 2.5
    assert red_cat["ablation"] == 1.0


def test_a_sentence_without_punctuation_is_the_mean_of_the_words_shown_below_it():
    """One token per word, so that word means are token means; the same for every quantity."""
    record = {"id": "1", "image": "a.png", "caption": "Two dogs run"}
    rows = {"d_vis": [1, 0.75, 0.5, 0.25], "density": [1, 1, -0.5, 0.25]}
    scored = score_record(record, rows, None, [(0, 3), (3, 8), (8, 12)])
    for correction in ("position", "density"):
        (corrected,) = correct_scores(lambda: [json.loads(json.dumps(scored))], correction)
        (sentence,) = corrected["sentences"]
        for name in ("score", "d_vis", "position_baseline", "density"):
            assert sentence[name] == pytest.approx(np.mean([w[name] for w in sentence["words"]]))


# ---------------------------------------------------------------- the corrections


def test_the_baseline_of_a_place_is_the_mean_over_captions_and_neighbours():
    captions = [[(1, 1), (3, 3), (5, 5)], [(3, 1), (5, 5)]]
    # means 2, 4, 5; edges repeated
    assert position_baseline(captions)["own"] == pytest.approx([8 / 3, 11 / 3, 14 / 3])
    # one caption reaches the third place
    limited = position_baseline(captions, least=2)["own"]
    assert limited == pytest.approx([8 / 3, 10 / 3, 10 / 3])


def words_record(*scores):
    """A record of two sentences, the first of two words; scores: (producing, own) D_vis."""
    words = []
    for i, (producing, own) in enumerate(scores):
        word = {"start": 2 * i, "end": 2 * i + 1, "d_vis": own, "density": 10 * own}
        words.append({**word, "producing": {"d_vis": producing, "density": 10 * producing}})
    sentences = []
    for part in (words[:2], words[2:]):
        d_vis = sum(w["d_vis"] for w in part) / max(len(part), 1)
        sentences.append({"d_vis": d_vis, "density": 10 * d_vis, "words": part})
    return {"sentences": [s for s in sentences if s["words"]]}


def test_words_and_their_producing_rows_have_baselines_of_their_own():
    """A first word is produced without any text before it: its share of 1 must not spill over."""
    records = [
        words_record((1, 0.6), (0.6, 0.4), (0.4, 0.2)),
        words_record((1, 0.8), (0.8, 0.6), (0.6, 0.4)),
    ]
    producing = [1, (0.7 + 0.7 + 0.5) / 3, (0.7 + 0.5 + 0.5) / 3]
    own = [(0.7 + 0.7 + 0.5) / 3, (0.7 + 0.5 + 0.3) / 3, (0.5 + 0.3 + 0.3) / 3]
    corrected = list(correct_scores(lambda: records, "position"))
    first, second = corrected[0]["sentences"]
    words = first["words"] + second["words"]
    assert [w["position_baseline"] for w in words] == pytest.approx(own, abs=1e-6)
    found = [w["producing"]["position_baseline"] for w in words]
    assert found == pytest.approx(producing, abs=1e-6)
    assert first["position_baseline"] == pytest.approx((own[0] + own[1]) / 2, abs=1e-6)
    assert second["position_baseline"] == pytest.approx(own[2], abs=1e-6)
    assert words[0]["producing"]["score"] == 0
    assert first["score"] == pytest.approx(0.5 - (own[0] + own[1]) / 2, abs=2e-6)


def test_captions_of_one_word_have_a_baseline():
    baseline = position_baseline([[(0.5, 1)]])
    assert (list(baseline["own"]), list(baseline["producing"])) == ([0.5], [1])


def test_the_baseline_is_that_of_all_captions_in_memory():
    """The sums of a stream, against arrays of everything."""
    rng = np.random.default_rng(0)
    captions = [rng.random((rng.integers(1, 40), 2)).tolist() for _ in range(60)]
    columns = list(itertools.zip_longest(*captions))
    mean = np.array([np.mean([w for w in column if w], axis=0) for column in columns])
    reached = sum(sum(w is not None for w in column) >= 20 for column in columns)
    padded = np.pad(mean[:reached, 0], 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    baseline = position_baseline(iter(captions))["own"]
    assert baseline[:reached] == pytest.approx(smooth)
    assert set(baseline[reached:]) == {baseline[reached - 1]} and reached < len(columns)


@pytest.mark.parametrize("correction", ("position", "density"))
def test_the_score_is_the_quantity_that_the_correction_names(correction):
    records = [words_record((1, 0.6), (0.6, 0.4), (0.4, 0.2)), words_record((1, 0.9))]
    for record in correct_scores(lambda: records, correction):
        for sentence in record["sentences"]:
            for part in (sentence, *sentence["words"]):
                excess = part["d_vis"] - part["position_baseline"]
                expected = {"position": excess, "density": part["density"]}[correction]
                assert part["score"] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- the stage


@pytest.fixture
def score(checkpoint, stage, tmp_path):
    """score(captions, *flags) -> (error, printed, records) of a run on tiny Qwen3-VL."""
    runs = itertools.count()

    def run(captions, *flags):
        lines = []
        for i, caption in enumerate(captions):
            random_image(i).save(tmp_path / f"{i}.png")
            lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "caption": caption}))
        data = tmp_path / "captions.jsonl"
        data.write_text("\n".join(lines))
        out = tmp_path / f"scores{next(runs)}.jsonl"
        arguments = ("--model", checkpoint("qwen3_vl"), "--data", data, "--out", out)
        error, printed = stage(score_dependency, *arguments, *flags)
        return error, printed, load_records(out) if out.exists() else []

    return run


def test_the_stage_writes_both_corrections_and_ranks_by_the_chosen_one(score):
    captions = [f"{CAPTIONS[0]} Object {i} is red." for i in range(24)]
    results = {}
    for correction in ("position", "density"):
        error, printed, records = score(captions, "--correction", correction, "--page", 0)
        assert error is None and "weak" not in printed
        sentences = [s for record in records for s in record["sentences"]]
        ranked = sorted(sentences, key=lambda s: s["score"], reverse=True)
        lines = printed.splitlines()
        first = next(i for i, line in enumerate(lines) if line.endswith("most")) + 1
        for line, sentence in zip(lines[first : first + 5], ranked):
            shown = line.split()
            assert float(shown[0]) == pytest.approx(sentence["score"], abs=6e-4)
            assert float(shown[1]) == pytest.approx(sentence["d_vis"], abs=6e-4)
        last = lines[first + 6 : first + 11]
        assert float(last[-1].split()[0]) == pytest.approx(ranked[-1]["score"], abs=6e-4)
        assert max(map(len, lines[first - 2 : first + 11])) <= 100
        results[correction] = records

    for by_position, by_density in zip(results["position"], results["density"]):
        for a, b in zip(by_position["sentences"], by_density["sentences"]):
            names = ("d_vis", "position_baseline", "density")
            assert [a[name] for name in names] == [b[name] for name in names]
            assert a["score"] == pytest.approx(a["d_vis"] - a["position_baseline"], abs=1e-6)
            assert b["score"] == b["density"]


def test_density_needs_a_single_caption_and_a_weak_baseline_is_named(score):
    error, printed, (single,) = score(CAPTIONS[:1], "--correction", "density")
    assert error is None and "weak" not in printed
    _, printed, (among_others, *_) = score(CAPTIONS, "--correction", "density", "--batch-size", 1)
    scores = [s["score"] for s in single["sentences"]]
    assert scores == [s["score"] for s in among_others["sentences"]] and len(set(scores)) == 2
    _, printed, _ = score(CAPTIONS)
    assert "weak" in printed and "--correction density" in printed


def test_a_caption_without_words_is_skipped_and_named(score):
    error, printed, records = score([CAPTIONS[0], "...", "42"])
    assert error is None and "has no words" in printed and len(records) == 2
