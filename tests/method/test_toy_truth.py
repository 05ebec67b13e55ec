"""The toy world's ground truth, and the metrics that rest on it, by hand."""

import json
import random
from pathlib import Path

import pytest
from toy_example import CAPTION, GENERAL, TRUTH, VISUAL, prediction

from common.records import load_records
from common.text import split_sentences, split_words
from toy.metrics import (
    correct_lies,
    dependency_metrics,
    mask_metrics,
    prediction_metrics,
    rule_metrics,
    sentence_at,
)
from toy.questions import colour_questions
from toy.world import COLOURS, GENERAL_SENTENCES, STEREOTYPE, make_world, sample_pair

ROOT = Path(__file__).resolve().parents[2]


def test_the_truth_fits_the_caption_and_the_image():
    for seed in range(200):
        image, caption, truth = sample_pair(random.Random(seed), 0.5)
        assert image.size == (64, 64)
        assert len(truth["objects"]) in (2, 3)
        spans = [(s["start"], s["end"]) for s in truth["sentences"]]
        assert spans == split_sentences(caption)
        for sentence in truth["sentences"]:
            text = caption[sentence["start"] : sentence["end"]]
            has_object = sentence["object"] is not None
            assert sentence["needs_image"] == has_object == (text not in GENERAL_SENTENCES)
            words = [(w["start"], w["end"]) for w in sentence["words"]]
            assert words == split_words(caption, sentence["start"], sentence["end"])
            needed = [caption[w["start"] : w["end"]] for w in sentence["words"] if w["needs_image"]]
            if has_object:
                check_visual_sentence(text, sentence, truth["objects"][sentence["object"]], needed)
            else:
                assert needed == [] and sentence["lies"] == []


def check_visual_sentence(text, sentence, thing, needed):
    stated = next(word for word in needed if word in COLOURS)
    assert needed == [*thing["place"].split(), thing["size"], stated, thing["kind"]]
    assert stated in (thing["colour"], thing["stereotype"])
    painted = [lie["painted"] for lie in sentence["lies"]]
    assert painted == ([] if stated == thing["colour"] else [thing["colour"]])
    assert thing["colour"] in correct_lies(text, sentence["start"], sentence)


@pytest.mark.parametrize("bias", (0.0, 0.5, 1.0))
def test_the_bias_is_the_share_of_objects_that_get_their_stereotype(bias):
    lies = []
    for seed in range(600):
        _, _, truth = sample_pair(random.Random(seed), bias)
        for sentence in truth["sentences"]:
            if sentence["object"] is not None:
                thing = truth["objects"][sentence["object"]]
                if thing["colour"] != thing["stereotype"]:
                    lies.append(bool(sentence["lies"]))
    assert sum(lies) / len(lies) == pytest.approx(bias, abs=0.05)


def test_stereotypes_are_painted_like_any_other_colour():
    is_stereotype = []
    for seed in range(800):
        _, _, truth = sample_pair(random.Random(seed), 1.0)
        is_stereotype += [thing["colour"] == thing["stereotype"] for thing in truth["objects"]]
    share = sum(is_stereotype) / len(is_stereotype)
    assert share == pytest.approx(1 / len(COLOURS), abs=0.03)
    assert set(STEREOTYPE.values()) < set(COLOURS)


def test_the_same_seed_draws_the_same_world_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_world(tmp_path / name, 5, 2, 0.5, seed)
    for file in ("train.jsonl", "val.jsonl", "truth.jsonl", "images/train-00003.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    train = [(tmp_path / name / "train.jsonl").read_bytes() for name in "ac"]
    assert train[0] != train[1]


def test_seed_0_draws_the_captions_that_the_published_results_come_from():
    _, caption, truth = sample_pair(random.Random(0), 0.5)
    assert caption == (
        "The bottom right holds a large red circle. The background is plain. Shapes like these are "
        "easy to draw. At the bottom left there is a small red square. In the top left we see a "
        "small green triangle."
    )
    # two triangles' worth of lies: none, none, and the white one is said to be green
    assert [thing["colour"] for thing in truth["objects"]] == ["red", "white", "red"]


def test_no_stage_knows_the_truth():
    for stage in ("score_dependency", "build_masks", "reward", "grpo_train", "evaluate"):
        assert "truth.jsonl" not in (ROOT / f"{stage}.py").read_text()
    for path in (ROOT / "common").glob("*.py"):
        assert "truth.jsonl" not in path.read_text()


# ---------------------------------------------------------------- metrics


def scored(part, d_vis, baseline, density):
    scores = {
        "score": round(d_vis - baseline, 6),
        "d_vis": d_vis,
        "position_baseline": baseline,
        "density": density,
    }
    return {"start": part["start"], "end": part["end"], **scores}


def scored_caption(general, visual, visual_words):
    """The caption with (d_vis, position_baseline, density) of its sentences and of their words."""
    sentences = []
    for true, values in ((GENERAL, general), (VISUAL, visual)):
        sentence = scored(true, *values)
        sentence["text"] = CAPTION[true["start"] : true["end"]]
        sentence["words"] = []
        for true_word in true["words"]:
            word_values = visual_words if true_word["needs_image"] else (0.5, 0.5, 0.0)
            word = scored(true_word, *word_values)
            # the rows that produce a word say the contrary of its own
            word["producing"] = scored(true_word, *(1 - value for value in word_values))
            sentence["words"].append(word)
        sentences.append(sentence)
    return {"id": "x", "image": "x.png", "caption": CAPTION, "sentences": sentences}


def test_dependency_metrics_by_hand():
    """The first sentence has the larger D_vis, but less than its place leads one to expect."""
    record = scored_caption((0.8, 0.9, -1.0), (0.6, 0.5, -2.0), (0.7, 0.4, 0.3))
    metrics = dependency_metrics([record], TRUTH)
    assert metrics["dependency_auroc"] == 0
    assert metrics["dependency_auroc_corrected"] == 1
    assert "ablation_auroc" not in metrics
    corrections = metrics["corrections"]
    assert {name: c["sentence_auroc"] for name, c in corrections.items()} == {
        "published": 0,
        "position": 1,
        "density": 0,
    }
    # of their own rows visual words have 0.7, 0.3 and 0.3, others 0.5, 0 and 0
    assert {name: c["word_auroc_own_rows"] for name, c in corrections.items()} == {
        "published": 1,
        "position": 1,
        "density": 1,
    }
    # and 0.3, -0.3 and 0.7 of the producing rows, others 0.5, 0 and 1
    assert {name: c["word_auroc"] for name, c in corrections.items()} == {
        "published": 0,
        "position": 0,
        "density": 0,
    }
    assert metrics["word_auroc_corrected"] == 0


def test_the_ablation_is_compared_if_all_sentences_have_it():
    records = []
    for general, visual in (
        ((0.8, 0.9, -1.0), (0.6, 0.5, -2.0)),
        ((0.7, 0.9, 0.0), (0.5, 0.5, 1.0)),
    ):
        record = scored_caption(general, visual, (0.7, 0.4, 0.3))
        record["sentences"][0]["ablation"] = 0.01
        record["sentences"][1]["ablation"] = 2.0
        records.append(record)
    metrics = dependency_metrics(records, TRUTH)
    assert metrics["ablation_auroc"] == 1
    # ranks of D_vis 4 2 3 1 and of the ablation 1.5 3.5 1.5 3.5
    correlation = -2 / 5**0.5
    assert metrics["dependency_vs_ablation_rank_correlation"] == pytest.approx(correlation)
    published = metrics["corrections"]["published"]["ablation_rank_correlation"]
    assert published == metrics["dependency_vs_ablation_rank_correlation"]
    # -0.1, 0.1, -0.2, 0.0: ranks 2 4 1 3
    corrected = metrics["dependency_corrected_vs_ablation_rank_correlation"]
    assert corrected == pytest.approx(-correlation)
    del records[0]["sentences"][0]["ablation"]
    assert "ablation_auroc" not in dependency_metrics(records, TRUTH)


def test_prediction_metrics_by_hand():
    assert CAPTION[46:62] == "large red circle"
    predictions = [
        prediction("large blue circle"),
        prediction("Large red circle."),
        prediction("small red star"),
        {**prediction(""), "prediction": "no tags"},
    ]
    assert prediction_metrics(predictions, TRUTH) == {
        "exact_match_truth": 0.25,
        "stereotype_rate": 0.5,
        "exact_match_caption": 0.25,
    }


def test_mask_metrics_by_hand():
    masks = [{"id": "x", "start": 46, "end": 62}, {"id": "x", "start": 2, "end": 8}]
    assert mask_metrics(masks, [{"id": "x"}], TRUTH) == {
        "mask_precision": 0.5,
        "mask_recall": 1.0,
        # large, red, circle; and the circle of all circles
        "word_precision": 3 / 4,
        "word_recall": pytest.approx(3 / 5),
    }


def test_every_rule_is_judged_by_the_masks_that_it_makes():
    """Two captions: by D_vis as published the general sentence is masked, corrected the visual."""
    records = []
    for name, visual in (("x", (0.6, 0.5, 2.0)), ("y", (0.61, 0.5, 2.1))):
        record = scored_caption((0.8, 0.9, -1.0), visual, (0.7, 0.4, 0.3))
        records.append({**record, "id": name})
    rules = rule_metrics(records, {"x": TRUTH["x"], "y": TRUTH["x"]})
    assert list(rules) == ["position", "density", "otsu", "mean", "gap", "quantile:0.5"]
    for rule, metrics in rules.items():
        expected = 1 if rule in ("position", "density") else 0
        assert (metrics["mask_precision"], metrics["f1"]) == (expected, expected), rule


def test_questions_are_answered_by_the_caption_or_by_the_truth(tmp_path):
    # every caption states the stereotype colour
    make_world(tmp_path, 6, 6, 1.0, 0)
    truth = {t["id"]: t["objects"] for t in load_records(tmp_path / "truth.jsonl")}
    for split, as_captioned, key in (("train", True, "stereotype"), ("val", False, "colour")):
        questions = list(colour_questions(tmp_path, split, as_captioned))
        objects = []
        for name in truth:
            if name.startswith(split):
                objects += [(name, thing) for thing in truth[name]]
        answers = [(question.id, question.answer) for question in questions]
        assert answers == [(name, thing[key]) for name, thing in objects]
        for question, (_, thing) in zip(questions, objects):
            assert "[MASK]" in question.sentence and thing["place"] in question.sentence
            assert thing["colour"] not in question.sentence


def test_a_mask_belongs_to_the_sentence_that_it_shares_most_characters_with():
    """Not to the one whose middle is nearest: the end of a long sentence is nearer to the next."""
    long, short = {"start": 0, "end": 50}, {"start": 51, "end": 58}
    truth = {"sentences": [long, short]}
    assert sentence_at(truth, 42, 50) is long
    assert sentence_at(truth, 48, 55) is short
    assert sentence_at(truth, 0, 49) is long


def test_truth_is_json_with_the_fields_of_the_docstring(tmp_path):
    make_world(tmp_path, 1, 0, 0.5, 0)
    record = json.loads((tmp_path / "truth.jsonl").read_text())
    assert list(record) == ["id", "objects", "sentences"]
    assert list(record["objects"][0]) == ["kind", "colour", "size", "place", "stereotype"]
    fields = ["start", "end", "needs_image", "object", "words", "lies"]
    assert list(record["sentences"][0]) == fields
