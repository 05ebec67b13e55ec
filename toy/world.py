"""The toy world: images of a few shapes, and captions of which the truth is known.

An image holds two or three shapes. Its caption mixes one sentence per shape with one or two
sentences that do not depend on the image:

    "A circle has no corners. The top left holds a large red circle. At the bottom right there is a
    small white square."

**Descriptive bias.** Every kind of shape has a stereotype colour (circles: red). All colours are
painted equally often, but with probability `bias` a caption gives a shape the stereotype colour of
its kind, as people write what such things usually look like.
"""

import contextlib
import json
import random
import re
import shutil
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors import SafetensorError
from tqdm import tqdm

from common.captions import load_image
from common.records import fail, load_records, write_atomically

# pixels: 4 x 4 patches of 16, so 16 visual tokens
SIDE = 64
STEREOTYPE = {"circle": "red", "square": "blue", "triangle": "green"}
COLOURS = {
    "red": (230, 20, 20),
    "blue": (20, 40, 230),
    "green": (20, 190, 40),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
# pixels, both ends included
RADII = {"small": (8, 9), "large": (13, 14)}
# centres, in pixels
PLACES = {
    "top left": (16, 16),
    "top right": (48, 16),
    "bottom left": (16, 48),
    "bottom right": (48, 48),
}
VISUAL_SENTENCES = (
    "The {place} holds a {size} {colour} {kind}.",
    "In the {place} we see a {size} {colour} {kind}.",
    "At the {place} there is a {size} {colour} {kind}.",
    "The {place} is taken by a {size} {colour} {kind}.",
)
GENERAL_SENTENCES = (
    # facts
    "A circle has no corners.",
    "A square has four equal sides.",
    "A triangle has three corners.",
    "Every side of a square is straight.",
    "Circles roll and squares do not.",
    "Two triangles can form a square.",
    # filler
    "This is a simple picture.",
    "The background is plain.",
    "Shapes like these are easy to draw.",
    "Nobody signed the picture.",
    "The drawing was made by a computer.",
)


def sample_pair(rng, bias):
    """An image, its caption, and the truth about both: (PIL image, str, {objects, sentences}).

    The truth has the format of truth.jsonl (toy_world.py), without the id.
    """
    grey = rng.randint(110, 145)
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    draw = ImageDraw.Draw(image)

    objects = []
    # (text of a sentence, index of its object, the colour that the text states)
    drafts = []
    for place in rng.sample(sorted(PLACES), rng.choice((2, 3))):
        thing = sample_object(rng, draw, place)
        drafts.append(sample_sentence(rng, thing, len(objects), bias))
        objects.append(thing)
    for text in rng.sample(GENERAL_SENTENCES, rng.choice((1, 2))):
        drafts.append((text, None, None))
    caption, sentences = join_sentences(rng, drafts, objects)
    return image, caption, {"objects": objects, "sentences": sentences}


def sample_sentence(rng, thing, index, bias):
    """(a sentence about an object, its index, the colour that the sentence states)."""
    stated = thing["colour"]
    # the descriptive bias
    if rng.random() < bias:
        stated = thing["stereotype"]
    text = rng.choice(VISUAL_SENTENCES).format(**{**thing, "colour": stated})
    return text, index, stated


def join_sentences(rng, drafts, objects):
    """A caption of sentences in random order, and the truth about each of them."""
    rng.shuffle(drafts)
    sentences = []
    start = 0
    for text, index, stated in drafts:
        sentences.append(sentence_truth(text, start, index, objects, stated))
        start += len(text) + 1
    caption = " ".join(text for text, _, _ in drafts)
    return caption, sentences


def sample_object(rng, draw, place):
    """Draws a random shape in one quarter of the image; {kind, colour, size, place, stereotype}."""
    kind = rng.choice(sorted(STEREOTYPE))
    size = rng.choice(sorted(RADII))
    colour = rng.choice(sorted(COLOURS))
    radius = rng.randint(*RADII[size])
    # pixels by which the centre may move without leaving the quarter
    room = (15 - radius) // 2
    x = PLACES[place][0] + rng.randint(-room, room)
    y = PLACES[place][1] + rng.randint(-room, room)

    draw_shape(draw, kind, COLOURS[colour], x, y, radius)
    return {
        "kind": kind,
        "colour": colour,
        "size": size,
        "place": place,
        "stereotype": STEREOTYPE[kind],
    }


def draw_shape(draw, kind, colour, x, y, radius):
    """A filled shape of this radius, in pixels, around (x, y)."""
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "square":
        half = 0.85 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    else:
        base = y + 0.8 * radius
        draw.polygon([(x, y - radius), (x + radius, base), (x - radius, base)], fill=colour)


def sentence_truth(text, start, index, objects, stated):
    """One sentence of truth.jsonl: which words need the image, and which of them are lies.

    index: of the object that the sentence is about, or None; stated: the colour that it states.
    """
    thing = {}
    if index is not None:
        thing = objects[index]
    visual = {stated, thing.get("kind"), thing.get("size"), *thing.get("place", "").split()}

    words = []
    lies = []
    for match in re.finditer(r"\w+", text):
        span = {"start": start + match.start(), "end": start + match.end()}
        words.append({**span, "needs_image": match[0] in visual})
        if match[0] == stated != thing["colour"]:
            lies.append({**span, "painted": thing["colour"]})
    return {
        "start": start,
        "end": start + len(text),
        "needs_image": index is not None,
        "object": index,
        "words": words,
        "lies": lies,
    }


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def building(path):
    """A temporary path that becomes `path` when the block ends, or never if it is killed.

    A full disk ends the program in one line.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch each raise their own
        shutil.rmtree(partial, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{path} cannot be written ({reason}); the same command tries it again")


def make_world(folder, n_train, n_val, bias, seed, sample=sample_pair):
    """Writes images/, train.jsonl, val.jsonl, truth.jsonl: the same arguments, the same bytes.

    sample: draws a pair, as sample_pair() does.
    """
    folder = Path(folder)
    rng = random.Random(seed)
    files = {"train": [], "val": [], "truth": []}
    # of a world that was not finished
    shutil.rmtree(folder / "images", ignore_errors=True)

    with building(folder / "images") as images:
        images.mkdir(parents=True)
        for i in tqdm(range(n_train + n_val), desc="drawing", unit="image", leave=False):
            split = "train" if i < n_train else "val"
            name = f"{split}-{i:05d}"
            image, caption, truth = sample(rng, bias)
            image.save(images / f"{name}.png")
            record = {"id": name, "image": f"images/{name}.png", "caption": caption}
            files[split].append(record)
            files["truth"].append({"id": name, **truth})

    for name, records in files.items():
        lines = (json.dumps(record) + "\n" for record in records)
        write_atomically(folder / f"{name}.jsonl", lines)


def load_truth(folder):
    """{id: {id, objects, sentences}} of the world in `folder`."""
    return {record["id"]: record for record in load_records(folder / "truth.jsonl")}


def load_world_image(folder, name):
    """The PIL image that records of the world in `folder` name."""
    return load_image(folder, name, SIDE * SIDE)
