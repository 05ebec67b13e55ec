"""What the study does to images and captions: noise, hidden patches, and a false sentence."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from toy.metrics import hides_unusual_colour, masked_object, sentence_at
from toy.world import PLACES, SIDE, VISUAL_SENTENCES

GREY = (127, 127, 127)
# pixels
PATCH = 16
# strengths 1 to 5
CORRUPTIONS = {
    # standard deviation, of 255
    "noise": (12, 24, 40, 64, 96),
    # radius in pixels
    "blur": (0.7, 1.4, 2.2, 3.2, 4.5),
    # share of grey blended in
    "contrast": (0.3, 0.5, 0.7, 0.8, 0.9),
    # JPEG quality
    "jpeg": (40, 20, 10, 5, 1),
    # side of a grey square in pixels
    "occlusion": (12, 18, 24, 30, 36),
}


def corrupt(image, kind, strength, name):
    """`image` at `strength` 1 to 5 of a kind of CORRUPTIONS.

    `name` alone seeds the noise and the place, so that all models and strengths get the same.
    """
    value = CORRUPTIONS[kind][strength - 1]
    rng = np.random.default_rng(list(f"{kind} {name}".encode()))
    if kind == "noise":
        noisy = np.asarray(image) + value * rng.standard_normal((image.height, image.width, 3))
        return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(value))
    if kind == "contrast":
        return Image.blend(image, Image.new("RGB", image.size, GREY), value)
    if kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=value)
        return Image.open(file, formats=["JPEG"]).convert("RGB")

    # occlusion
    x, y = rng.integers(SIDE // 4, 3 * SIDE // 4, size=2).tolist()
    return paint_squares(image, [(x - value // 2, y - value // 2)], value, GREY)


def paint_squares(image, corners, side, colour):
    """A copy of `image` with squares of `side` pixels at these upper left corners."""
    image = image.copy()
    for x, y in corners:
        ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill=colour)
    return image


def hide_patches(image, patches):
    """`image` with these patches in the grey of its background, which is that of a corner pixel.

    Patches are numbered row by row, as visual tokens are.
    """
    per_row = image.width // PATCH
    corners = [(patch % per_row * PATCH, patch // per_row * PATCH) for patch in patches]
    return paint_squares(image, corners, PATCH, image.getpixel((0, 0)))


def patches_of(objects):
    """The patches, numbered as in hide_patches(), of the quarters with these objects."""
    per_row = SIDE // PATCH
    centres = [PLACES[thing["place"]] for thing in objects]
    patches = []
    for patch in range(per_row * per_row):
        x = patch % per_row * PATCH + PATCH // 2
        y = patch // per_row * PATCH + PATCH // 2
        if any(abs(x - cx) < SIDE // 4 and abs(y - cy) < SIDE // 4 for cx, cy in centres):
            patches.append(patch)
    return patches


def mislead(mask, truth, caption):
    """The masked caption with a false sentence, or None where none fits.

    The false sentence gives the mask's object its stereotype colour. It replaces a sentence about
    another object: one object more than the image shows would be a riddle of its own. None if the
    sentence would be true, if no colour is hidden, or if there is no other object.
    """
    thing = masked_object(mask, truth)
    if not hides_unusual_colour(mask, thing):
        return None
    own_object = sentence_at(truth, mask["start"], mask["end"])["object"]
    others = [s for s in truth["sentences"] if s["object"] not in (None, own_object)]
    if not others:
        return None
    replaced = caption[others[0]["start"] : others[0]["end"]]
    false = VISUAL_SENTENCES[0].format(**{**thing, "colour": thing["stereotype"]})
    return mask["masked_caption"].replace(replaced, false)
