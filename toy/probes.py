"""Probes of a trained model: is it robust, which layers find what needs the image, and is the
attention causal?"""

import random
import statistics

from common.policy import Policy, generate
from common.records import load_records
from common.text import tokens_in_span
from common.vlm import chat_prompt, encode_prompt, load_vlm
from reward import FILL_PROMPT
from score_dependency import Scorer, correct_scores, score_record
from toy.corruptions import CORRUPTIONS, corrupt, hide_patches, mislead, patches_of
from toy.metrics import dependency_metrics, prediction_metrics, sentence_at
from toy.world import load_truth, load_world_image

MAX_NEW_TOKENS = 20


class Probe:
    """A checkpoint, and the first `limit` held-out masks of a world with their images and truth."""

    def __init__(self, world, checkpoint, limit, device):
        self.world = world
        self.model, self.processor = load_vlm(str(world / checkpoint), device)
        self.policy = Policy(self.model, self.processor, temperature=0)
        self.truth = load_truth(world)
        self.records = load_records(world / "val.jsonl")
        self.masks = load_records(world / "masks_val.jsonl")[:limit]
        self.images = [load_world_image(world, mask["image"]) for mask in self.masks]

    def metrics(self, masks, images, batch_size=64):
        """prediction_metrics() of the greedy completions of masks over PIL images."""
        predictions = []
        for first in range(0, len(masks), batch_size):
            batch = masks[first : first + batch_size]
            prompts = []
            for mask, image in zip(batch, images[first:]):
                text = FILL_PROMPT.format(masked_caption=mask["masked_caption"])
                prompt = chat_prompt(self.processor, text)
                prompts.append(
                    encode_prompt(self.model, self.processor, prompt, [image], MAX_NEW_TOKENS)
                )
            texts = generate(self.policy, self.processor, prompts, MAX_NEW_TOKENS)
            predictions += [{**m, "prediction": text} for m, text in zip(batch, texts)]
        return prediction_metrics(predictions, self.truth)

    # ---------------------------------------------------------------- robustness

    def robustness(self):
        """{corruption: {strength, or "mean": metrics}}, and what a false sentence does ("text").

        text: {"0": without the false sentence, "1": with it}, over the masks that one fits.
        """
        untouched = self.metrics(self.masks, self.images)
        results = {"none": {"0": untouched}}
        for kind in CORRUPTIONS:
            results[kind] = {}
            for strength in range(1, 6):
                images = []
                for mask, image in zip(self.masks, self.images):
                    images.append(corrupt(image, kind, strength, mask["image"]))
                results[kind][str(strength)] = self.metrics(self.masks, images)
            by_strength = list(results[kind].values())
            results[kind]["mean"] = {
                metric: statistics.mean(m[metric] for m in by_strength) for metric in untouched
            }
        results["text"] = self.false_sentence()
        return results

    def false_sentence(self):
        """{"0": metrics without, "1": with a sentence that states the stereotype colour}."""
        captions = {record["id"]: record["caption"] for record in self.records}
        masks = []
        misled = []
        images = []
        for mask, image in zip(self.masks, self.images):
            text = mislead(mask, self.truth[mask["id"]], captions[mask["id"]])
            if text is not None:
                masks.append(mask)
                misled.append({**mask, "masked_caption": text})
                images.append(image)
        return {"0": self.metrics(masks, images), "1": self.metrics(misled, images)}

    # ---------------------------------------------------------------- attention

    def layers(self, batch_size=16):
        """{decoder layer: how well D_vis of that layer alone finds what needs the image}."""
        results = {}
        for layer in range(len(self.model.get_decoder().layers)):
            scorer = Scorer(self.model, self.processor, [layer])
            scores = []
            for first in range(0, len(self.records), batch_size):
                records = self.records[first : first + batch_size]
                prepared = []
                for record in records:
                    image = load_world_image(self.world, record["image"])
                    prepared.append(scorer.prepare(image, record["caption"]))
                for record, values in zip(records, scorer(prepared)):
                    scores.append(score_record(record, *values))
            corrected = correct_scores(scores.__iter__, "position")
            results[str(layer)] = dependency_metrics(list(corrected), self.truth)
        return results

    def patches(self, seed):
        """{patches hidden: {which: metrics}}, for 1, 2 and 4 of 16, and {"0": {"none": metrics}}.

        attended, least: those that the mask's sentence attends to most, or least. random: any.
        objects: any of the quarters with other objects, the fair control, since random patches
        often hide nothing but background.
        """
        rng = random.Random(seed)
        orders = self.patches_by_attention()
        others = []
        for mask in self.masks:
            truth = self.truth[mask["id"]]
            own_object = sentence_at(truth, mask["start"], mask["end"])["object"]
            objects = [thing for i, thing in enumerate(truth["objects"]) if i != own_object]
            others.append(patches_of(objects))

        results = {"0": {"none": self.metrics(self.masks, self.images)}}
        for count in (1, 2, 4):
            choices = {
                "attended": [order[:count] for order in orders],
                "random": [rng.sample(order, count) for order in orders],
                "least": [order[-count:] for order in orders],
                "objects": [rng.sample(patches, count) for patches in others],
            }
            results[str(count)] = {}
            for which, chosen in choices.items():
                images = [hide_patches(i, patches) for i, patches in zip(self.images, chosen)]
                results[str(count)][which] = self.metrics(self.masks, images)
        return results

    def patches_by_attention(self):
        """For each mask, the patches by the share of attention that its sentence pays to them."""
        scorer = Scorer(self.model, self.processor)
        captions = {record["id"]: record["caption"] for record in self.records}
        orders = []
        for mask, image in zip(self.masks, self.images):
            sentence = sentence_at(self.truth[mask["id"]], mask["start"], mask["end"])
            prepared = scorer.prepare(image, captions[mask["id"]])
            _, _, offsets, cells = scorer([prepared], maps=True)[0]  # cells: (S, V)
            tokens = tokens_in_span((sentence["start"], sentence["end"]), offsets)
            shares = cells[tokens].mean(0)  # (V,)
            orders.append(shares.argsort(descending=True).tolist())
        return orders
