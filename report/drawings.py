"""Drawings of the same prompts by several models, side by side."""

import textwrap

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

RIGHT = "#1b7837"
WRONG = "#b2182b"


def drawings_figure(prompts, models):
    """A row per prompt, a block of drawings per model, each framed by whether it is right.

    prompts: records with id and prompt. models: {name: {id: [(PIL image, is right), ...]}}.
    """
    samples = max(len(models[name][p["id"]]) for name in models for p in prompts)
    width = len(models) * (samples + 0.4) + 3.2
    height = len(prompts) * 1.15 + 0.6
    figure = Figure(figsize=(width * 0.75, height * 0.75), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(len(prompts) * 1.15 + 0.1, -0.5)
    axes.axis("off")
    for column, name in enumerate(models):
        left = 3.2 + column * (samples + 0.4)
        axes.text(left + samples / 2, -0.2, name, ha="center", fontsize=11, weight="bold")
        for row, prompt in enumerate(prompts):
            for i, (image, is_right) in enumerate(models[name][prompt["id"]]):
                draw_image(axes, image, left + i, row * 1.15, RIGHT if is_right else WRONG)
    for row, prompt in enumerate(prompts):
        text = textwrap.fill(prompt["prompt"], 36)
        axes.text(0.1, row * 1.15 + 0.45, text, va="center", fontsize=8)
    return figure


def draw_image(axes, image, x, y, colour):
    """An image of one unit, with a frame."""
    axes.imshow(image, extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06), interpolation="nearest")
    frame = Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor=colour, linewidth=2.5)
    axes.add_patch(frame)
    axes.set_aspect("auto")
