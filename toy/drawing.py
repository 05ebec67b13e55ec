"""The drawing world: images so simple that every prompt has one right drawing.

Each quarter of an image is empty or holds one of three kinds of shapes, in one of five colours and
two sizes, always drawn alike: a quarter is one of 31 tiles. Captions are those of the toy world,
their bias included. So the drawing that a caption asks for is known to the pixel, and a detector
that takes the nearest of the 31 tiles makes no mistake on the images of the world.
"""

import collections
import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.judges import Detection
from common.records import load_records, write_atomically
from toy.world import (
    COLOURS,
    GENERAL_SENTENCES,
    STEREOTYPE,
    draw_shape,
    join_sentences,
    load_truth,
    make_world,
    sample_sentence,
)

# pixels
SIDE = 32
TILE = 16
GREY = (127, 127, 127)
RADII = {"small": 4, "large": 7}
# top left corners
CORNERS = {
    "top left": (0, 0),
    "top right": (TILE, 0),
    "bottom left": (0, TILE),
    "bottom right": (TILE, TILE),
}
KINDS = sorted(STEREOTYPE)


@cache
def tiles():
    """{(kind, colour, size): PIL image} of the 30 shapes, and of None, the empty tile."""
    result = {None: Image.new("RGB", (TILE, TILE), GREY)}
    for name in itertools.product(KINDS, sorted(COLOURS), sorted(RADII)):
        kind, colour, size = name
        tile = Image.new("RGB", (TILE, TILE), GREY)
        middle = (TILE - 1) / 2
        draw_shape(ImageDraw.Draw(tile), kind, COLOURS[colour], middle, middle, RADII[size])
        result[name] = tile
    return result


def compose(objects):
    """The image of {place: (kind, colour, size)}."""
    image = Image.new("RGB", (SIDE, SIDE), GREY)
    for place, name in objects.items():
        image.paste(tiles()[name], CORNERS[place])
    return image


@cache
def tile_pixels():
    """The names of the 31 tiles, and their pixels (31, 16, 16, 3)."""
    names = list(tiles())
    return names, np.stack([np.asarray(tiles()[name], dtype=np.float32) for name in names])


def nearest(image):
    """{place: (kind, colour, size) or None} of a PIL image: the nearest tile of each quarter."""
    names, known = tile_pixels()
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    found = {}
    for place, (x, y) in CORNERS.items():
        quarter = pixels[y : y + TILE, x : x + TILE]
        distances = ((known - quarter) ** 2).mean((1, 2, 3))
        found[place] = names[int(distances.argmin())]
    return found


# ---------------------------------------------------------------- captions and prompts


def sample_drawing(rng, bias):
    """An image of one to three shapes, its caption, and the truth, as toy.world.sample_pair()."""
    objects = []
    drafts = []
    for place in rng.sample(sorted(CORNERS), rng.choice((1, 2, 3))):
        kind, colour, size = rng.choice(list(tiles())[1:])
        thing = {"kind": kind, "colour": colour, "size": size, "place": place}
        thing["stereotype"] = STEREOTYPE[kind]
        drafts.append(sample_sentence(rng, thing, len(objects), bias))
        objects.append(thing)
    drafts.append((rng.choice(GENERAL_SENTENCES), None, None))
    caption, sentences = join_sentences(rng, drafts, objects)
    image = compose({o["place"]: (o["kind"], o["colour"], o["size"]) for o in objects})
    return image, caption, {"objects": objects, "sentences": sentences}


def prompt_record(record, truth, say_truth):
    """A line of prompts_*.jsonl: what the caption says of shapes, and what that asks for.

    say_truth: with its lies corrected, so that all colours are asked for equally often.
    """
    texts = []
    include = []
    for sentence in truth["sentences"]:
        if sentence["object"] is None:
            continue
        thing = truth["objects"][sentence["object"]]
        text = record["caption"][sentence["start"] : sentence["end"]]
        stated = stated_colour(text)
        if say_truth:
            text = text.replace(f" {stated} ", f" {thing['colour']} ")
            stated = thing["colour"]
        texts.append(text)
        include += requirements({**thing, "colour": stated})
    return {
        "id": record["id"],
        "prompt": " ".join(texts),
        "image": record["image"],
        "tag": f"{len(truth['objects'])} shapes".replace("1 shapes", "1 shape"),
        "include": include,
        "exclude": empty_places(truth["objects"]),
    }


def stated_colour(text):
    """The colour that a sentence about a shape states."""
    return next(word for word in text.rstrip(".").split() if word in COLOURS)


def requirements(thing):
    """What GenEval's rules should find of one shape: something of its colour, its kind, its size.

    A class says where: "circle at the top left". So each of the three is a clause of its own.
    """
    place = thing["place"]
    return [
        {"class": f"shape at the {place}", "count": 1, "color": thing["colour"]},
        {"class": f"{thing['kind']} at the {place}", "count": 1},
        {"class": f"{thing['size']} shape at the {place}", "count": 1},
    ]


def empty_places(objects):
    """ "exclude" of a drawing that has nothing but these objects."""
    taken = {thing["place"] for thing in objects}
    return [
        {"class": f"shape at the {place}", "count": 1} for place in CORNERS if place not in taken
    ]


def detect(images, records):
    """The exact detector: {class: [Detection, ...]} of each drawing (--detector toy.drawing:detect).

    A shape is found as "shape", "circle", "large shape", and as each of these at its place.
    """
    return [detections(nearest(image)) for image in images]


def detections(found):
    """{class: [Detection, ...]} of what nearest() returns."""
    objects = collections.defaultdict(list)
    for place, name in found.items():
        if name is None:
            continue
        kind, colour, size = name
        x, y = CORNERS[place]
        shape = Detection((x, y, x + TILE, y + TILE), 1.0, colour)
        for called in ("shape", kind, f"{size} shape"):
            objects[called].append(shape)
            objects[f"{called} at the {place}"].append(shape)
    return dict(objects)


def make_drawing_world(folder, n_train, n_val, bias, seed):
    """Writes what make_world() does, and prompts_train.jsonl and prompts_val.jsonl.

    The prompts of training say what the captions say, lies included; those held out say the truth.
    """
    folder = Path(folder)
    make_world(folder, n_train, n_val, bias, seed, sample_drawing)
    truth = load_truth(folder)
    for split in ("train", "val"):
        lines = []
        for record in load_records(folder / f"{split}.jsonl"):
            prompt = prompt_record(record, truth[record["id"]], say_truth=split == "val")
            lines.append(json.dumps(prompt) + "\n")
        write_atomically(folder / f"prompts_{split}.jsonl", lines)
