"""The toy world's ground truth, and the metrics that rest on it, by hand."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import toy_world
from score_dependency import split_sentences, split_words
from toy_world import COLOURS, KNOWN, STEREOTYPE, auroc, make_world, mask_metrics, prediction_metrics, put_right, sample_pair


def test_the_truth_fits_the_caption_and_the_picture():
    for seed in range(200):
        image, caption, truth = sample_pair(random.Random(seed), 0.5)
        assert image.size == (64, 64) and len(truth["objects"]) in (2, 3)
        assert [(s["start"], s["end"]) for s in truth["sentences"]] == split_sentences(caption)
        for s in truth["sentences"]:
            text = caption[s["start"]:s["end"]]
            assert s["needs_image"] == (text not in KNOWN) == (s["object"] is not None)
            assert [(w["start"], w["end"]) for w in s["words"]] == split_words(caption, s["start"], s["end"])
            if s["object"] is not None:
                o = truth["objects"][s["object"]]
                needed = [caption[w["start"]:w["end"]] for w in s["words"] if w["needs_image"]]
                said = next(w for w in needed if w in COLOURS)
                assert needed == [*o["place"].split(), o["size"], said, o["kind"]]
                assert [l["painted"] for l in s["lies"]] == ([] if said == o["colour"] else [o["colour"]])
                assert said in (o["colour"], o["stereotype"])
                assert o["colour"] in put_right(text, s["start"], s)


@pytest.mark.parametrize("bias", (0.0, 0.5, 1.0))
def test_the_bias_is_the_share_of_objects_that_get_their_stereotype(bias):
    lies = told = 0
    for seed in range(600):
        _, _, truth = sample_pair(random.Random(seed), bias)
        for s in truth["sentences"]:
            o = truth["objects"][s["object"]] if s["object"] is not None else None
            if o and o["colour"] != o["stereotype"]:
                told += 1
                lies += bool(s["lies"])
    assert lies / told == pytest.approx(bias, abs=0.05)


def test_the_same_seed_paints_the_same_world_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_world(tmp_path / name, 5, 2, 0.5, seed)
    read = lambda name, file: (tmp_path / name / file).read_bytes()
    for file in ("train.jsonl", "val.jsonl", "truth.jsonl", "images/train-00003.png"):
        assert read("a", file) == read("b", file)
    assert read("a", "train.jsonl") != read("c", "train.jsonl")


def test_no_stage_but_the_toy_world_knows_the_truth():
    root = Path(toy_world.__file__).parent
    for stage in ("score_dependency", "build_masks", "reward", "grpo_train", "evaluate"):
        assert "truth.jsonl" not in (root / f"{stage}.py").read_text()


def test_auroc_by_hand():
    assert auroc([0.9, 0.8, 0.3, 0.1], [True, True, False, False]) == 1
    assert auroc([0.9, 0.2, 0.5, 0.1], [True, True, False, False]) == 0.75                 # 3 of 4 pairs
    assert auroc([0.5, 0.5], [True, False]) == 0.5


CAPTION = "A circle has no corners. The top left holds a large red circle."
TRUTH = {"x": {"objects": [{"kind": "circle", "colour": "blue", "size": "large", "place": "top left", "stereotype": "red"}],
               "sentences": [{"start": 0, "end": 24, "needs_image": False, "object": None, "words": [], "lies": []},
                             {"start": 25, "end": 63, "needs_image": True, "object": 0,
                              "words": [{"start": s, "end": e, "needs_image": CAPTION[s:e] in "top left large red circle".split()}
                                        for s, e in split_words(CAPTION, 25, 63)],
                              "lies": [{"start": 52, "end": 55, "painted": "blue"}]}]}}


def prediction(answer):
    return {"id": "x", "start": 46, "end": 62, "answer": "large red circle", "prediction": f"<think></think><answer>{answer}</answer>"}


def test_prediction_metrics_by_hand():
    assert CAPTION[46:62] == "large red circle"
    metrics = prediction_metrics([prediction("large blue circle"), prediction("Large red circle."), prediction("small red star"),
                                  {**prediction(""), "prediction": "no tags"}], TRUTH)
    assert metrics == {"exact_match_truth": 0.25, "stereotype_rate": 0.5, "exact_match_caption": 0.25}


def test_mask_metrics_by_hand():
    masks = [{"id": "x", "start": 46, "end": 62}, {"id": "x", "start": 2, "end": 8}]
    metrics = mask_metrics(masks, [{"id": "x"}], TRUTH)
    assert metrics == {"mask_precision": 0.5, "mask_recall": 1.0, "word_precision": 1.0, "word_recall": pytest.approx(3 / 5)}


def test_stereotypes_are_painted_like_any_other_colour():
    seen = [o["colour"] == o["stereotype"] for seed in range(800) for o in sample_pair(random.Random(seed), 1.0)[2]["objects"]]
    assert sum(seen) / len(seen) == pytest.approx(1 / len(COLOURS), abs=0.03) and set(STEREOTYPE.values()) < set(COLOURS)


def test_a_world_with_other_settings_is_refused_in_one_line(tmp_path):
    (tmp_path / "world.json").write_text(json.dumps({"settings": {"bias": 0.9, "seed": 0, "small": True}}))
    run = subprocess.run([sys.executable, toy_world.__file__, "--small", "--out", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and "belongs to another run (bias was 0.9, is 0.5)" in run.stderr and "Traceback" not in run.stderr


def test_questions_are_answered_by_the_caption_or_by_the_truth(tmp_path):
    make_world(tmp_path, 6, 6, 1.0, 0)                                           # every caption names the stereotype colour
    truth = {t["id"]: t["objects"] for t in toy_world.records_of(tmp_path / "truth.jsonl")}
    for split, said, key in (("train", True, "stereotype"), ("val", False, "colour")):
        asked = list(toy_world.questions(tmp_path, split, said))
        objects = [(name, o) for name in truth if name.startswith(split) for o in truth[name]]
        assert [(name, answer) for name, _, _, _, answer in asked] == [(name, o[key]) for name, o in objects]
        assert all("[MASK]" in s and o["place"] in s and o["colour"] not in s for (_, _, s, _, _), (_, o) in zip(asked, objects))
