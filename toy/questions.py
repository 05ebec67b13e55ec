"""Multiple choice about painted colours: a benchmark of the toy, and what CLIP would answer."""

import base64
import re
import statistics
from typing import NamedTuple

from common.records import load_records, write_atomically
from common.text import MASK
from reward import ClipScorer
from toy.world import COLOURS, STEREOTYPE, VISUAL_SENTENCES, load_world_image

INSTRUCTION = "Which colour is hidden? "
LETTERS = "ABCDE"
OPTIONS = dict(zip(LETTERS, sorted(COLOURS)))
# VLMEvalKit's offset of the index of each rotated copy of a question
COPY = 10**6


class Question(NamedTuple):
    """One object of one image. sentence: about it, with its colour hidden; answer: a colour."""

    id: str
    kind: str
    sentence: str
    answer: str


def colour_questions(folder, split, as_captioned=False):
    """Yields a Question per object of a split ("train" or "val") of the world in `folder`.

    The answer is the painted colour or, with as_captioned, the colour that the caption states.
    """
    captions = {
        record["id"]: record["caption"] for record in load_records(folder / f"{split}.jsonl")
    }
    for record in load_records(folder / "truth.jsonl"):
        if record["id"] not in captions:
            continue
        for index, thing in enumerate(record["objects"]):
            answer = thing["colour"]
            if as_captioned:
                answer = stated_colour(captions[record["id"]], record["sentences"], index)
            sentence = VISUAL_SENTENCES[1].format(**{**thing, "colour": MASK})
            yield Question(record["id"], thing["kind"], sentence, answer)


def stated_colour(caption, sentences, index):
    """The colour that a caption gives the object `index`."""
    sentence = next(s for s in sentences if s["object"] == index)
    words = re.findall(r"\w+", caption[sentence["start"] : sentence["end"]])
    return next(word for word in words if word in COLOURS)


def question_record(question):
    """The {question, options} that benchmarks/ turns into a prompt."""
    return {"question": INSTRUCTION + question.sentence, "options": OPTIONS}


def write_benchmark(folder):
    """Writes val.tsv: multiple choice about the validation images, as VLMEvalKit reads it.

    Every question is there with all rotations of its options, as CircularEval asks it. The copies
    name the index of the first one instead of repeating its image.
    """
    write_atomically(folder / "val.tsv", benchmark_lines(folder))


def benchmark_lines(folder):
    """The lines of val.tsv."""
    questions = list(colour_questions(folder, "val"))
    colours = list(OPTIONS.values())
    yield tsv_line(["index", "image", "question", *LETTERS, "answer", "category"])
    for rotation in range(len(colours)):
        rotated = colours[rotation:] + colours[:rotation]
        for index, question in enumerate(questions):
            image = index
            if rotation == 0:
                png = (folder / "images" / f"{question.id}.png").read_bytes()
                image = base64.b64encode(png).decode()
            letter = LETTERS[rotated.index(question.answer)]
            text = INSTRUCTION + question.sentence
            number = index + rotation * COPY
            yield tsv_line([number, image, text, *rotated, letter, question.kind])


def tsv_line(fields):
    return "\t".join(map(str, fields)) + "\n"


def clip_metrics(folder):
    """What CLIP answers about validation objects that are not painted in their stereotype colour.

    exact_match_truth and stereotype_rate are the shares of its first choices, among the five
    colours, that are the painted colour and the stereotype colour.
    """
    clip = ClipScorer(str(folder / "clip"))
    colours = list(OPTIONS.values())
    right = []
    stereotype = []
    for question in colour_questions(folder, "val"):
        if question.answer == STEREOTYPE[question.kind]:
            continue
        image = load_world_image(folder, f"images/{question.id}.png")
        fillings = [question.sentence.replace(MASK, colour) for colour in colours]
        choice = colours[clip([image], [fillings], "answers")[0].argmax()]
        right.append(float(choice == question.answer))
        stereotype.append(float(choice == STEREOTYPE[question.kind]))
    return {
        "exact_match_truth": statistics.mean(right),
        "stereotype_rate": statistics.mean(stereotype),
    }
