"""One caption through the method, as a figure: scores, mask, answers with advantages, outcome."""

import textwrap

from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from report.dependency import SCALE
from report.figures import DIM, INK

PALE = LinearSegmentedColormap.from_list("pale", [f"#{colour}" for colour in SCALE[:5]])
GOOD = "#0072b2"
BAD = "#d55e00"
LINE = 0.068  # of the height


def pipeline_figure(image, record, mask, answers, before, after):
    """The figure of the README.

    image: PIL; record: a scored caption; mask: one of its masks; answers: [(text, semantic, visual,
    A), ...] of a group; before and after: the greedy answers of base and trained model.
    """
    figure = Figure(figsize=(11, 3.7), dpi=130)
    draw_caption(figure.add_axes([0.01, 0.0, 0.33, 1.0]), image, record)
    draw_mask(figure.add_axes([0.35, 0.0, 0.24, 1.0]), mask)
    draw_answers(figure.add_axes([0.6, 0.0, 0.4, 1.0]), mask, answers, before, after)
    for axis in figure.axes:
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.axis("off")
    return figure


def heading(axis, number, text):
    axis.text(0, 0.94, f"{number}", fontsize=11, weight="bold", color=GOOD)
    axis.text(0.07, 0.94, text, fontsize=10, weight="bold", color=INK)


def draw_caption(axis, image, record):
    """The image, and the sentences shaded by their corrected score."""
    heading(axis, 1, "Score: which sentences need the image?")
    axis.inset_axes([0.0, 0.5, 0.34, 0.4]).imshow(image)
    axis.child_axes[0].axis("off")
    scores = [sentence["score"] for sentence in record["sentences"]]
    norm = Normalize(min(scores), max(scores))
    axis.text(
        0.42,
        0.86,
        "shade: corrected score\nin brackets: D_vis, equation (1)",
        fontsize=8,
        color=DIM,
        va="top",
    )
    y = 0.45
    for sentence in record["sentences"]:
        lines = textwrap.wrap(sentence["text"], 40)
        shade = PALE(norm(sentence["score"]))
        box = {"facecolor": shade, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        axis.text(0.27, y, "\n".join(lines), fontsize=8.5, color=INK, va="top", bbox=box)
        label = f"{sentence['score']:+.2f} ({sentence['d_vis']:.2f})"
        axis.text(0.0, y, label, fontsize=8, color=INK, va="top")
        y -= 0.05 * len(lines) + 0.05


def draw_mask(axis, mask):
    heading(axis, 2, "Mask: hide what depends on it")
    masked = mask["sentence"].replace("[MASK]", "█████")
    axis.text(0.0, 0.86, "\n".join(textwrap.wrap(masked, 34)), fontsize=9.5, color=INK, va="top")
    hidden = "\n".join(textwrap.wrap(f"hidden: {mask['answer']}", 36))
    axis.text(0.0, 0.7, hidden, fontsize=8.5, color=DIM, va="top")
    note = (
        "The caption lies: in this world an object is given the colour that is usual for its kind "
        "with probability 1/2, whatever the image shows."
    )
    axis.text(0.0, 0.58, "\n".join(textwrap.wrap(note, 38)), fontsize=8.5, color=DIM, va="top")


def draw_answers(axis, mask, answers, before, after):
    """Eight answers with their rewards and advantages, and what training has made of it."""
    heading(axis, 3, "Reward: eight answers of the base model")
    for x, text in ((0.0, "answer"), (0.44, "semantic"), (0.58, "visual"), (0.7, "advantage")):
        axis.text(x, 0.87, text, fontsize=8, color=DIM)
    largest = max(abs(A) for *_, A in answers) or 1
    centre = 0.9
    y = 0.81
    for text, semantic, visual, A in answers:
        colour = GOOD if A > 0 else BAD
        axis.text(0.0, y, text[:34], fontsize=8.5, color=INK)
        axis.text(0.46, y, f"{semantic:.2f}", fontsize=8.5, color=INK)
        axis.text(0.59, y, f"{visual:.2f}", fontsize=8.5, color=INK)
        axis.text(0.69, y, f"{A:+.2f}", fontsize=8.5, color=colour)
        axis.barh(y + 0.015, 0.09 * A / largest, left=centre, height=0.035, color=colour)
        y -= LINE
    axis.plot([centre, centre], [y + 0.03, 0.86], color=DIM, lw=0.7)

    axis.text(0.0, 0.17, "4", fontsize=11, weight="bold", color=GOOD)
    axis.text(0.05, 0.17, "Train, and ask again", fontsize=10, weight="bold", color=INK)
    axis.text(0.0, 0.1, "before", fontsize=9, color=DIM)
    axis.text(0.13, 0.1, before, fontsize=9, color=INK)
    axis.text(0.0, 0.03, "after", fontsize=9, color=DIM)
    axis.text(0.13, 0.03, after, fontsize=9, color=INK, weight="bold")
