"""Metrics that need the truth: of scores, of masks, and of predictions.

truth: {id: record of truth.jsonl}; spans are characters of the caption.
"""

import re

from build_masks import mask_caption, quantity, threshold_rule
from common.stats import auroc, spearman
from reward import exact_match, parse_completion
from toy.world import COLOURS

RULES = ("position", "density", "otsu", "mean", "gap", "quantile:0.5")


def sentence_at(truth, start, end):
    """The true sentence that shares the most characters with [start, end)."""
    return max(truth["sentences"], key=lambda s: min(s["end"], end) - max(s["start"], start))


def words_in(sentence, start, end):
    """The words of a true sentence that lie in [start, end)."""
    return [w for w in sentence["words"] if start <= w["start"] and w["end"] <= end]


def mean(values):
    """nan if there are none."""
    if not values:
        return float("nan")
    return sum(values) / len(values)


# ---------------------------------------------------------------- stage 1


# name of a correction: the rule of build_masks.py that cuts its quantity
CORRECTIONS = {"published": "otsu", "position": "position", "density": "density"}


def dependency_metrics(records, truth):
    """How scored captions agree with the truth, and with the image ablation if they have it."""
    sentences = []
    needs_image = []
    for record in records:
        for sentence in record["sentences"]:
            true = sentence_at(truth[record["id"]], sentence["start"], sentence["end"])
            sentences.append(sentence)
            needs_image.append(true["needs_image"])
    words, word_needs_image = labelled_words(records, truth)

    d_vis = [s["d_vis"] for s in sentences]
    corrected = [s["score"] for s in sentences]
    producing = [w["producing"]["score"] for w in words]
    metrics = {
        "dependency_auroc": auroc(d_vis, needs_image),
        "dependency_auroc_corrected": auroc(corrected, needs_image),
        "word_auroc_corrected": auroc(producing, word_needs_image),
    }
    ablation = [s["ablation"] for s in sentences if "ablation" in s]
    has_ablation = len(ablation) == len(sentences)
    if has_ablation:
        metrics["ablation_auroc"] = auroc(ablation, needs_image)
        metrics["dependency_vs_ablation_rank_correlation"] = spearman(d_vis, ablation)
        metrics["dependency_corrected_vs_ablation_rank_correlation"] = spearman(corrected, ablation)

    metrics["corrections"] = {}
    for name, rule in CORRECTIONS.items():
        values = [quantity(rule, s) for s in sentences]
        of_word = [quantity(rule, w) for w in words]
        of_production = [quantity(rule, w["producing"]) for w in words]
        comparison = {
            "sentence_auroc": auroc(values, needs_image),
            "word_auroc": auroc(of_production, word_needs_image),
            "word_auroc_own_rows": auroc(of_word, word_needs_image),
        }
        if has_ablation:
            comparison["ablation_rank_correlation"] = spearman(values, ablation)
        metrics["corrections"][name] = comparison
    return metrics


def labelled_words(records, truth):
    """(scored words, whether each needs the image), without words that the truth does not have."""
    words = []
    needs_image = []
    for record in records:
        for sentence in record["sentences"]:
            true = sentence_at(truth[record["id"]], sentence["start"], sentence["end"])
            for word in sentence["words"]:
                for true_word in words_in(true, word["start"], word["end"]):
                    words.append(word)
                    needs_image.append(true_word["needs_image"])
    return words, needs_image


# ---------------------------------------------------------------- stage 2


def mask_metrics(masks, records, truth):
    """Precision and recall of masks, by sentence and by word.

    records: the captions that could have been masked.
    """
    visual_sentences = []
    for record in records:
        visual_sentences += [s for s in truth[record["id"]]["sentences"] if s["needs_image"]]
    visual_words = sum(w["needs_image"] for s in visual_sentences for w in s["words"])

    masked_sentences = []
    masked_words = []
    hit = set()
    for mask in masks:
        sentence = sentence_at(truth[mask["id"]], mask["start"], mask["end"])
        masked_sentences.append(sentence["needs_image"])
        words = words_in(sentence, mask["start"], mask["end"])
        masked_words += [word["needs_image"] for word in words]
        if sentence["needs_image"]:
            hit.add((mask["id"], sentence["start"]))
    return {
        "mask_precision": sum(masked_sentences) / max(len(masks), 1),
        "mask_recall": len(hit) / max(len(visual_sentences), 1),
        "word_precision": sum(masked_words) / max(len(masked_words), 1),
        "word_recall": sum(masked_words) / max(visual_words, 1),
    }


def rule_metrics(records, truth):
    """{rule: mask_metrics() and f1} of the masks that each rule makes of the same scores."""
    sentences = []
    for record in records:
        sentences += record["sentences"]

    results = {}
    for rule in RULES:
        tau_of = threshold_rule(rule, sentences)
        masks = []
        for record in records:
            masks += mask_caption(record, rule, tau_of)
        metrics = mask_metrics(masks, records, truth)
        precision = metrics["mask_precision"]
        recall = metrics["mask_recall"]
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        results[rule] = {**metrics, "f1": f1}
    return results


# ---------------------------------------------------------------- stage 5


def correct_lies(answer, start, sentence):
    """The hidden text with the painted colours in place of its lies.

    start: where the text begins in the caption; sentence: the true one around it.
    """
    for lie in reversed(sentence["lies"]):
        if start <= lie["start"] and lie["end"] <= start + len(answer):
            before = answer[: lie["start"] - start]
            after = answer[lie["end"] - start :]
            answer = before + lie["painted"] + after
    return answer


def masked_object(mask, truth):
    """The object that a mask's sentence is about, or None; truth: that of the mask's caption."""
    sentence = sentence_at(truth, mask["start"], mask["end"])
    if sentence["object"] is None:
        return None
    return truth["objects"][sentence["object"]]


def hides_unusual_colour(mask, thing):
    """Whether a mask hides the colour of an object not painted in its stereotype colour."""
    if thing is None or thing["colour"] == thing["stereotype"]:
        return False
    return bool(set(re.findall(r"\w+", mask["answer"])) & set(COLOURS))


def prior_reliance(predictions):
    """The share of answers that are the same with another image (evaluate.py); needs no truth."""
    return mean([p["prior_reliance"] for p in predictions if "prior_reliance" in p])


def prediction_metrics(predictions, truth):
    """Means over predictions {id, start, end, answer, prediction}; see toy_world.py."""
    matches_truth = []
    matches_caption = []
    stereotype = []
    for prediction in predictions:
        true = truth[prediction["id"]]
        sentence = sentence_at(true, prediction["start"], prediction["end"])
        answer = parse_completion(prediction["prediction"]) or ""
        target = correct_lies(prediction["answer"], prediction["start"], sentence)
        matches_truth.append(exact_match(answer, target))
        matches_caption.append(exact_match(answer, prediction["answer"]))
        thing = masked_object(prediction, true)
        if hides_unusual_colour(prediction, thing):
            stereotype.append(thing["stereotype"] in re.findall(r"\w+", answer.lower()))
    return {
        "exact_match_truth": mean(matches_truth),
        "stereotype_rate": mean(stereotype),
        "exact_match_caption": mean(matches_caption),
    }
