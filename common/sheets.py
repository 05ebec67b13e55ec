"""A sheet of small images to look at."""

from PIL import Image, ImageDraw, ImageFont


def sheet(images, captions, columns):
    """A page of drawings of one size, each of at least 96 pixels, with a line of text below it."""
    font = ImageFont.load_default()
    scale = -(-96 // min(96, *images[0].size))
    width, height = (scale * side for side in images[0].size)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + 8), rows * (height + 20)), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        x = i % columns * (width + 8) + 4
        y = i // columns * (height + 20) + 4
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        text = " ".join(caption.split())[: width // 2]
        while font.getlength(text) > width:
            text = text[:-1]
        ImageDraw.Draw(page).text((x, y + height), text, "black", font)
    return page
