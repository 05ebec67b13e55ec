"""A sheet of small images to look at, each with its caption."""

import os
import textwrap

from PIL import Image, ImageDraw, ImageFont

SMALLEST = 160  # pixels of a side
MOST_LINES = 4
LINE_HEIGHT = 14  # pixels


def sheet(images, captions, columns):
    """One image of `images` of one size in rows of `columns`, with captions below them.

    Small images are enlarged; captions are wrapped, and what follows their fourth line is left out.
    """
    font = ImageFont.load_default(11)
    scale = -(-SMALLEST // min(SMALLEST, *images[0].size))
    width, height = (scale * side for side in images[0].size)
    wrapped = [textwrap.wrap(caption, width // 6)[:MOST_LINES] for caption in captions]
    text_height = LINE_HEIGHT * max(len(lines) for lines in wrapped) + 6
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + 8), rows * (height + text_height + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        x = i % columns * (width + 8) + 4
        y = i // columns * (height + text_height + 4) + 4
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(lines):
            draw.text((x, y + height + LINE_HEIGHT * number), line, "black", font)
    return page


def save_image(image, path):
    """Writes a PNG, and the folders above it: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(f"{path}.tmp", format="PNG")
    os.replace(f"{path}.tmp", path)
