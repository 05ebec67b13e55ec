"""Judges of drawings: a VLM that is asked for yes or no, and detectors that name objects.

A detector is a function detect(images, records) -> [{class: [Detection, ...]}, ...]: for each PIL
image a dict with the classes that its record, a prompt with GenEval's requirements, asks for.
"""

import importlib
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torchvision.ops import batched_nms
from tqdm import tqdm
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from common.records import BadRecord, fail
from common.text import words_of
from common.vlm import chat_prompt, encode_prompt, join_prompts, load_vlm, reason_of, require_finite

QUESTION = 'Does this figure show "{text}"? Please answer yes or no.'
# prompts per pass of the VLM
BATCH = 32
# GenEval's
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
# boxes below are dropped; GenEval's own, higher thresholds are applied by its rules
BOX_THRESHOLD = 0.1
# words of a prompt below do not name a box
TEXT_THRESHOLD = 0.3
# of two boxes of a class that overlap by more, the less sure is dropped
OVERLAP = 0.5


class Detection(NamedTuple):
    """An object of a drawing: (x0, y0, x1, y1) in pixels, y downwards; its colour may be None."""

    box: tuple
    score: float
    colour: str | None = None


class Knowledge:
    """A VLM that is asked whether an image shows a text.

    As in VQAScore (arXiv 2404.01291) the score is P(yes) over the vocabulary, at the first token of
    the answer; it is not divided by P(yes) + P(no). All spellings of yes count.
    """

    def __init__(self, name, device):
        self.model, self.processor = load_vlm(name, device)
        tokenizer = self.processor.tokenizer
        # what a completion writes may not become a placeholder, nor end the question
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self.special_tokens = sorted({*special, self.processor.image_token}, key=len, reverse=True)
        firsts = set()
        for spelling in ("Yes", "yes", " Yes", " yes"):
            firsts.add(tokenizer(spelling, add_special_tokens=False).input_ids[0])
        # some tokenizers split off the space, with which any word may begin
        self.yes_ids = sorted(token for token in firsts if tokenizer.decode([token]).strip())

    def question(self, text):
        """The chat prompt that asks whether the image shows `text`."""
        for token in self.special_tokens:
            text = text.replace(token, " ")
        return chat_prompt(self.processor, QUESTION.format(text=text))

    @torch.no_grad()
    def p_yes(self, images, texts):
        """(N,): the probability that the model says yes to texts[n] of images[n].

        What it cannot be asked, such as an image that its processor refuses, gets 0 and is named.
        """
        prompts = {}
        for n, (image, text) in enumerate(zip(images, texts)):
            try:
                question = self.question(text)
                prompts[n] = encode_prompt(self.model, self.processor, question, [image])
            except BadRecord as error:
                tqdm.write(f"the judge of knowledge cannot be asked, which counts as no: {error}")
        p = torch.zeros(len(texts))
        asked = list(prompts)
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            batch = join_prompts(self.model, [prompts[n] for n in part])
            # padding is on the left: the last position is that of the answer
            logits = self.model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
            p[part] = logits.float().softmax(-1)[:, self.yes_ids].sum(-1).cpu()
        return p


def load_detector(name, clip, device):
    """The detector of --detector: module:function, or a model that `clip` names colours for.

    One that raises, or does not return a dict per image, ends the program in one line.
    """
    if ":" not in name:
        return OpenVocabularyDetector(name, clip, device)
    module, _, function = name.partition(":")
    try:
        detector = getattr(importlib.import_module(module), function)
    except Exception as error:
        # whatever the module raises when it is imported
        fail(f"--detector {name} cannot be imported: {type(error).__name__}: {error}")
    if not callable(detector):
        fail(f"--detector {name} is no function")

    def detect(images, records):
        try:
            found = detector(images, records)
        except Exception as error:
            fail(f"--detector {name} failed: {type(error).__name__}: {error}")
        if not isinstance(found, list) or [type(objects) for objects in found] != [dict] * len(
            images
        ):
            fail(f"--detector {name} must return a list with a dict for each image")
        return found

    return detect


class OpenVocabularyDetector:
    """Owlv2 or GroundingDINO of transformers, a hub id or a folder. clip: a Clip, for colours.

    GenEval set its thresholds for Mask2Former. The confidence of these models is another one: few
    boxes may pass the 0.9 that a prompt about numbers asks for.
    """

    def __init__(self, name, clip, device):
        self.clip = clip
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            load = AutoModelForZeroShotObjectDetection.from_pretrained
            self.model = load(name, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:
            # transformers, tokenizers, safetensors and torch each raise their own
            fail(f"--detector {name} cannot be loaded: {reason_of(error)}")
        self.model.to(device).eval()
        require_finite(f"--detector {name}", self.model)
        self.thresholds = {"threshold": BOX_THRESHOLD}
        if "GroundingDino" in type(self.processor).__name__:
            # which of the prompt's words name a box
            self.thresholds["text_threshold"] = TEXT_THRESHOLD

    @torch.no_grad()
    def __call__(self, images, records):
        """[{class: [Detection, ...]}, ...], in pixels, the surest first."""
        found = []
        for record, pairs in groupby(zip(images, records), itemgetter(1)):
            found += self.detect([image for image, _ in pairs], record)
        return found

    def detect(self, images, record):
        """The objects in drawings of one prompt, which share their labels."""
        wanted = [*record.get("include", ()), *record.get("exclude", ())]
        names = list(dict.fromkeys(entry["class"] for entry in wanted))
        asked = {}
        for entry in record.get("include", ()):
            if "color" in entry:
                asked.setdefault(entry["class"], []).append(entry["color"])
        labels = [names] * len(images)
        inputs = self.processor(images=images, text=labels, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device))
        results = self.processor.post_process_grounded_object_detection(
            outputs,
            # without sizes, boxes are from 0 to 1
            target_sizes=[(image.height, image.width) for image in images],
            text_labels=labels,
            **self.thresholds,
        )

        found = []
        for image, result in zip(images, results):
            objects = {name: [] for name in names}
            classes = [class_of(label, names) for label in result["text_labels"]]
            numbers = torch.tensor([names.index(c) if c else -1 for c in classes], dtype=torch.long)
            boxes = result["boxes"].cpu()
            # the surest first
            for i in batched_nms(boxes, result["scores"].cpu(), numbers, OVERLAP).tolist():
                name = classes[i]
                if name is not None:
                    box = tuple(boxes[i].tolist())
                    objects[name].append(Detection(box, result["scores"][i].item()))
            for name, colours in asked.items():
                # GenEval's, and any other that the prompt says: it could not be obeyed otherwise
                choices = list(dict.fromkeys([*COLOURS, *colours]))
                objects[name] = self.with_colours(image, name, objects[name], choices)
            found.append(objects)
        return found

    def with_colours(self, image, name, detections, choices):
        """The same detections, each with the colour of `choices` that fits its crop best: CLIP's."""
        if not detections:
            return []
        crops = [crop_of(image, detection.box) for detection in detections]
        texts = [f"a photo of a {colour} {name}" for colour in choices]
        fit = self.clip.image_features(crops) @ self.clip.text_features(texts).T
        colours = [choices[i] for i in fit.argmax(-1).tolist()]
        return [d._replace(colour=colour) for d, colour in zip(detections, colours)]


def asks_colour(record):
    """Whether a prompt asks for an object of some colour."""
    return any("color" in wanted for wanted in record.get("include", ()))


def class_of(phrase, names):
    """The name that shares the largest part of its words with a phrase; None if none or two do.

    Owlv2 labels a box with a name. GroundingDINO labels it with the words that fit: "hot" or "hot
    dog" is the class "hot dog" and not "dog"; "dog" is "dog".
    """
    words = set(words_of(phrase))
    best = None
    most = 0.0
    for name in names:
        known = set(words_of(name))
        share = len(words & known) / max(len(words | known), 1)
        if share == most:
            best = None
        if share > most:
            best = name
            most = share
    return best


def crop_of(image, box):
    """The part of an image in a box, of at least one pixel."""
    left = min(max(int(box[0]), 0), image.width - 1)
    top = min(max(int(box[1]), 0), image.height - 1)
    right = max(min(int(box[2]) + 1, image.width), left + 1)
    bottom = max(min(int(box[3]) + 1, image.height), top + 1)
    return image.crop((left, top, right, bottom))


def crops_of(image):
    """The whole image, and a 3 x 3 grid of crops of half its width and height."""
    width, height = image.size
    crops = [image]
    for y in (0, height // 4, height // 2):
        for x in (0, width // 4, width // 2):
            crops.append(image.crop((x, y, x + max(width // 2, 1), y + max(height // 2, 1))))
    return crops
