"""The three conditions of evaluate.py and their metrics, by hand and against separate runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import random_image

import evaluate
from common.records import BadRecord, load_records
from common.stats import bootstrap_ratios, paired_difference
from evaluate import (
    count_hidden_texts,
    image_pmi,
    images_by_condition,
    same_answer,
    score_masks,
    text_metrics,
)
from reward import ClipScorer, Reward

FAMILY = "qwen2_5_vl"
RECORD = {"sentence": "There is a [MASK].", "answer": "large red circle"}


def completion(answer):
    return f"<think>so</think><answer>{answer}</answer>"


def word_tokenizer(text, **_):
    """A token per word, with the space before it."""
    ends = [i for i, c in enumerate(text) if c == " "] + [len(text)]
    return SimpleNamespace(offset_mapping=list(zip([0, *ends], ends)))


# ---------------------------------------------------------------- conditions


def test_the_three_conditions_are_the_image_a_grey_one_of_its_size_and_that_of_another_record():
    names = ["a", "b", "a", "c"]
    images = {name: random_image(i, (40 + i, 30)) for i, name in enumerate("abc")}
    shown = images_by_condition(names, 0, images.__getitem__)
    assert list(shown) == ["real", "blank", "shuffled"]
    assert shown["real"] is images["a"]
    assert shown["blank"].size == (40, 30)
    assert shown["blank"].getcolors() == [(40 * 30, (127, 127, 127))]
    # half the list away is the same image, so that the next one is taken
    assert shown["shuffled"] is images["c"]


def test_without_another_readable_image_there_is_no_shuffled_condition():
    def load(name):
        if name == "broken":
            raise BadRecord("cannot be read")
        return Image.new("RGB", (8, 8))

    assert list(images_by_condition(["a", "a"], 0, load)) == ["real", "blank"]
    assert list(images_by_condition(["a", "broken"], 0, load)) == ["real", "blank"]
    assert "shuffled" in images_by_condition(["a", "broken", "b"], 0, load)


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "answer, exact, prefix, rouge_l",
    [
        ("Large  red circle.", 1, 1, 1),
        ("large red", 0, 1, 4 / 5),
        ("large r", 0, 0, 2 / 5),
        ("large blue circle", 0, 0, 2 / 3),
        ("red", 0, 0, 1 / 2),
        ("square", 0, 0, 0),
    ],
)
def test_the_metrics_of_an_answer_by_hand(answer, exact, prefix, rouge_l):
    metrics = text_metrics(RECORD, completion(answer), word_tokenizer)
    expected = {"exact_match": exact, "prefix_credit": prefix, "rouge_l": rouge_l, "format_ok": 1}
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize("text", ["large red circle", "<answer>large red circle</answer>", ""])
def test_a_completion_without_the_form_scores_nothing_even_if_it_says_the_answer(text):
    assert set(text_metrics(RECORD, text, word_tokenizer).values()) == {0.0}


def test_image_pmi_is_the_agreement_of_the_filled_sentence_times_the_brevity_penalty():
    asked = []

    def clip(images, texts, relative):
        asked.append((images, texts, relative))
        return torch.tensor([[0.8], [0.6], [0.0]])

    texts = [completion("large blue circle"), completion("large red"), "no form"]
    values = image_pmi(clip, [RECORD] * 3, ["i", "j", "k"], texts)
    assert values == pytest.approx([0.8, 0.6 * math.exp(-1 / 2), 0])
    sentences = [["There is a large blue circle."], ["There is a large red."], [None]]
    assert asked == [(["i", "j", "k"], sentences, "images")]


def test_image_pmi_is_the_visual_component_of_the_reward_relative_to_images(clip_folder):
    clip = ClipScorer(str(clip_folder), others=[random_image(i) for i in range(5)])
    texts = [completion(answer) for answer in ("large red circle", "red", "a blue one")]
    images = [random_image(i) for i in range(3)]
    reward = Reward({"visual": 1.0}, relative="images", clip=clip)
    component = reward([RECORD] * 3, images, [[text] for text in texts])["visual"]
    assert image_pmi(clip, [RECORD] * 3, images, texts) == component[:, 0].tolist()
    assert len(set(component[:, 0].tolist())) == 3


def test_scores_are_means_over_the_predictions_in_percent_and_image_pmi_only_if_it_was_measured():
    predictions = []
    for i, exact in enumerate([1.0, 0.0, 0.0, 0.0]):
        metrics = {"exact_match": exact, "prefix_credit": 0.5, "rouge_l": i / 4, "format_ok": 1.0}
        predictions.append({"unit": i, **metrics})
    means = {name: value for name, (value, _) in bootstrap_ratios(score_masks(predictions)).items()}
    assert means == {"exact_match": 25, "prefix_credit": 50, "rouge_l": 37.5, "format_ok": 100}
    with_pmi = [{**prediction, "image_pmi": 0.25} for prediction in predictions]
    assert bootstrap_ratios(score_masks(with_pmi))["image_pmi"][0] == 25


def asked(answer, other, frequency, unit=None):
    """A prediction, with the answer to the same mask over another image."""
    prediction = {"unit": unit or answer, "index": unit or answer, "unparsed": False}
    same = same_answer(completion(answer), completion(other))
    return {**prediction, "prior_reliance": same, "frequency": frequency}


def test_prior_reliance_is_the_share_of_answers_that_another_image_does_not_change():
    predictions = [
        asked("red circle", "Red  circle.", 9),
        asked("a blue one", "a red one", 7),
        asked("dog", "dog", 2),
        asked("cat", "sun", 1, "u"),
        asked("sea", "owl", 1, "v"),
    ]
    values = {
        name: value for name, (value, _) in bootstrap_ratios(score_masks(predictions)).items()
    }
    # the median frequency is 2: two texts are frequent, three are not
    assert values == pytest.approx(
        {
            "prior_reliance": 40,
            "prior_reliance, frequent text": 50,
            "prior_reliance, rare text": 100 / 3,
        }
    )
    # without an answer there is nothing to compare
    assert same_answer("red", "red") is None
    assert same_answer(completion("red"), "red") is None
    assert score_masks([{"unit": "x", "frequency": 1}]) == {}


def test_to_rely_less_on_the_prior_is_a_gain():
    before = [asked(f"a{i}", f"a{i}", 1) for i in range(20)]
    after = [asked(f"a{i}", "another", 1) for i in range(20)]
    gain = paired_difference(score_masks, after, before)["prior_reliance"]
    assert (gain["value"], gain["verdict"]) == (-100, "gain")
    assert paired_difference(score_masks, before, after)["prior_reliance"]["verdict"] == "loss"


def test_the_frequency_of_a_hidden_text_counts_captions_once():
    """Two masks of one caption, and one of another that says the same."""
    masks = []
    for masked, answer in (("A [MASK]. A dog.", "red dog"), ("A red dog. A [MASK].", "dog")):
        masks.append({"id": "a", "masked_caption": masked, "answer": answer})
    masks.append({"id": "b", "masked_caption": "A [MASK] sat.", "answer": "big dog"})
    count_hidden_texts(masks)
    assert [mask["frequency"] for mask in masks] == [1, 2, 1]


# ---------------------------------------------------------------- the real script


def write_masks(folder, name, images):
    answers = ["dog", "cat", "sun", "sea", "owl", "box"]
    lines = []
    for i, (image, answer) in enumerate(zip(images, answers)):
        image.save(folder / f"{name}{i}.png")
        sentence = "It is a [MASK]."
        record = {"id": f"m{i}", "image": f"{name}{i}.png", "masked_caption": sentence}
        record |= {"sentence": sentence, "start": 8, "end": 11, "answer": answer}
        lines.append(json.dumps(record) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / f"{name}.jsonl"


def test_each_condition_answers_as_a_run_whose_real_images_are_those(stage, checkpoint, tmp_path):
    images = [random_image(i) for i in range(6)]
    grey = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
    # the shuffled image is that half the list away
    moved = images[3:] + images[:3]

    answers = {}
    for name, shown in (("images", images), ("grey", grey), ("moved", moved)):
        data = write_masks(tmp_path, name, shown)
        flags = ["--model", checkpoint(FAMILY), "--data", data, "--out", tmp_path / f"out_{name}"]
        error, _ = stage(evaluate, *flags, "--max-new-tokens", 4, "--batch-size", 4)
        assert error is None
        for prediction in load_records(tmp_path / f"out_{name}" / "predictions.jsonl"):
            texts = answers.setdefault((name, prediction["condition"]), [])
            texts.append(prediction["prediction"])

    assert answers["images", "blank"] == answers["grey", "real"]
    assert answers["images", "shuffled"] == answers["moved", "real"]
    distinct = {tuple(answers["images", c]) for c in evaluate.MASK_CONDITIONS}
    assert len(distinct) == 3

    predictions = load_records(tmp_path / "out_images" / "predictions.jsonl")
    by_condition = {}
    for prediction in predictions:
        by_condition.setdefault(prediction["condition"], []).append(prediction)
    for real, shuffled in zip(by_condition["real"], by_condition["shuffled"]):
        same = same_answer(real["prediction"], shuffled["prediction"])
        assert real.get("prior_reliance") == same and "prior_reliance" not in shuffled
        # "It is a dog." holds "dog", and no other caption does
        assert real["frequency"] == 1
