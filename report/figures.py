"""matplotlib figures for pages and files: readable in print, in grey and by colour-blind readers.

The figures are built without pyplot, so that nothing global is set or kept. Text is laid out in
DejaVu Sans; in a page, ink and grid take the colours of the page, light or dark.
"""

import hashlib
import io
import math
import os
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

# Okabe and Ito's palette without yellow and black, in an order that also alternates in lightness;
# each series has its own dashes and marker besides
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1.4)))
MARKERS = ("o", "s", "^", "D", "v", "P")

INK = "#1c2128"
DIM = "#59636e"
GRID = "#d8dee4"
PAGE_COLOURS = {INK: "var(--ink)", DIM: "var(--dim)", GRID: "var(--line)"}

PANEL = (4.4, 3.0)  # inches
FONT_SIZE = 9  # points


# ---------------------------------------------------------------- line charts


def line_chart(title, lines, xlabel, ylabel, smooth=1):
    """A figure of lines {name: [(x, y) or (x, y, low, high), ...]}; None if there is no point.

    Whiskers reach from low to high. smooth > 1 draws every value faintly and, in bold, the mean
    over the last `smooth` values. Points that are None, nan or infinite are left out, and so is a
    line without points.
    """
    lines = finite_lines(lines)
    if not lines:
        return None
    figure = Figure(figsize=PANEL, layout="constrained")
    figure.set_label(title)
    draw_lines(figure.add_subplot(), title, lines, xlabel, ylabel, smooth)
    return figure


def panel_grid(title, panels, columns=2):
    """One figure of several charts; panels: [(title, lines, xlabel, ylabel, smooth)].

    Panels without a point are left out. None if none is left.
    """
    panels = [(panel, finite_lines(panel[1])) for panel in panels]
    panels = [(panel, lines) for panel, lines in panels if lines]
    if not panels:
        return None
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), layout="constrained")
    figure.set_label(title)
    figure.suptitle(title, fontsize=FONT_SIZE + 1, color=DIM)
    for i, ((name, _, xlabel, ylabel, smooth), lines) in enumerate(panels, 1):
        draw_lines(figure.add_subplot(rows, columns, i), name, lines, xlabel, ylabel, smooth)
    return figure


def finite_lines(lines):
    """`lines` without points that cannot be drawn, and without lines that have no other."""
    finite = {}
    for name, points in lines.items():
        points = [point for point in points if all(map(_is_finite, point))]
        if points:
            finite[name] = points
    return finite


def _is_finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def draw_lines(axes, title, lines, xlabel, ylabel, smooth=1):
    """Draws what line_chart() describes on matplotlib axes."""
    _set_style(axes, title, xlabel, ylabel)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for k, (name, points) in enumerate(lines.items()):
        style = {"color": COLOURS[k % 6], "linestyle": DASHES[k % 6], "linewidth": 2, "label": name}
        xs = [point[0] for point in points]
        ys = [point[1] for point in points]
        if smooth > 1:
            axes.plot(xs, ys, color=COLOURS[k % 6], linewidth=0.8, alpha=0.3)
            axes.plot(xs, running_mean(ys, smooth), **style)
        else:
            axes.plot(xs, ys, marker=MARKERS[k % 6], markersize=5, **style)
            # beside each other where lines share an x, in points
            aside = 2.5 * (k - (len(lines) - 1) / 2)
            _draw_whiskers(axes, points, COLOURS[k % 6], aside)

    all_x = sorted({point[0] for points in lines.values() for point in points})
    if len(all_x) <= 7 and smooth == 1:
        axes.set_xticks(all_x, [f"{x:g}" for x in all_x])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(x == int(x) for x in all_x)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False)
    if len(lines) > 1:
        # below the axis and its label, where it hides nothing
        _style_legend(axes.legend, len(lines), loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _draw_whiskers(axes, points, colour, aside):
    whiskers = [point for point in points if len(point) == 4]
    xs = [x for x, _, _, _ in whiskers]
    lows = [low for _, _, low, _ in whiskers]
    highs = [high for _, _, _, high in whiskers]
    place = offset_copy(axes.transData, axes.figure, x=aside, units="points")
    axes.vlines(xs, lows, highs, color=colour, linewidth=1.2, transform=place)
    # shifted lines do not count for the limits of the axes by themselves
    axes.update_datalim([*zip(xs, lows), *zip(xs, highs)])
    axes.autoscale_view()


def running_mean(values, width):
    """The mean of each value and up to width - 1 before it.

    >>> running_mean([0, 4, 8, 0], 2)
    [0.0, 2.0, 6.0, 4.0]
    """
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


# ---------------------------------------------------------------- intervals


def interval_plot(rows, title="", xlabel=""):
    """A forest plot of rows [(label, series, value, low, high), ...]; None without rows.

    Rows of one label share a line, from top to bottom in their order; each series has a colour and
    a marker of its own. A thin line marks 0 where it is in sight.
    """
    rows = [row for row in rows if all(map(_is_finite, row[2:]))]
    if not rows:
        return None
    labels = list(dict.fromkeys(label for label, *_ in rows))
    series = list(dict.fromkeys(name for _, name, *_ in rows))

    figure = Figure(figsize=_forest_size(len(labels), len(series)), layout="constrained")
    figure.set_label(title or "intervals")
    axes = figure.add_subplot()
    _set_style(axes, title, xlabel, "")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for k, name in enumerate(series):
        entries = [row for row in rows if row[1] == name]
        # series of one label lie beside each other
        shift = (k - (len(series) - 1) / 2) * 0.8 / len(series)
        heights = [labels.index(label) + shift for label, *_ in entries]
        values = [row[2] for row in entries]
        lows = [row[3] for row in entries]
        highs = [row[4] for row in entries]
        colour = COLOURS[k % 6]
        axes.hlines(heights, lows, highs, color=colour, linewidth=1.6)
        style = {"color": colour, "marker": MARKERS[k % 6], "markersize": 5.5, "label": name}
        axes.plot(values, heights, linestyle="none", **style)

    low, high = axes.get_xlim()
    if low < 0 < high:
        axes.axvline(0, color=DIM, linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if len(series) > 1:
        _style_legend(figure.legend, len(series), loc="outside lower center")
    return figure


def _forest_size(labels, series):
    """(width, height) in inches: a label is as high as its series need."""
    per_label = max(0.32, 0.17 * series + 0.08)
    return 6.4, 0.9 + labels * per_label + 0.2 * math.ceil(series / 3)


# ---------------------------------------------------------------- style


def _set_style(axes, title, xlabel, ylabel):
    # names of files and answers are text: matplotlib would read $...$ as formulas
    axes.set_title(title, fontsize=FONT_SIZE + 1, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE, color=DIM, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE, color=DIM, parse_math=False)
    axes.tick_params(labelsize=FONT_SIZE, labelcolor=DIM, color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def _style_legend(make_legend, entries, **place):
    legend = make_legend(
        ncols=min(entries, 3),
        fontsize=FONT_SIZE,
        labelcolor=DIM,
        frameon=False,
        handlelength=3.2,
        columnspacing=1.2,
        **place,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


# ---------------------------------------------------------------- output


def as_svg(figure):
    """The figure as an <svg> element for a page: Markup without a file beside it.

    The same figure gives the same text; its ids are unique on a page of different figures. None
    gives an empty Markup.
    """
    if figure is None:
        return Markup("")
    file = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "mmrpt", "font.family": "DejaVu Sans"}
    # only while saving: these settings are global
    with matplotlib.rc_context(settings):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)

    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    # it holds a rule for everything on the page, which the opening tag below has instead
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    prefix = "f" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    svg = svg.replace(' id="', f' id="{prefix}-')
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = svg.replace('xlink:href="#', f'href="#{prefix}-')
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)

    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    width = figure.get_figwidth()
    label = escape(figure.get_label())
    opening = (
        f'<svg class="chart" {view_box} role="img" aria-label="{label}" '
        f'style="width:{width:.1f}in;max-width:100%;height:auto;stroke-linejoin:round">'
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1))


def save_png(figure, path, dpi=130):
    """Writes the figure as a PNG; the file is there whole or not at all."""
    part = f"{path}.tmp"
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(part, format="png", dpi=dpi, facecolor="white")
    os.replace(part, path)


# ---------------------------------------------------------------- the same numbers as text


def interval_text(value, low, high, digits=2):
    """A cell of a table.

    >>> interval_text(50, 45.123, 55)
    '50.00 [45.12, 55.00]'
    """
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def line_table(lines, digits=3):
    """(columns, rows) of a table with the numbers of line_chart(): a row per line, a column per x.

    >>> line_table({"sft": [(0, 0.5), (1, 0.25, 0.2, 0.3)]})
    (['', '0', '1'], [['sft', '0.500', '0.250 [0.200, 0.300]']])
    """
    lines = finite_lines(lines)
    all_x = sorted({point[0] for points in lines.values() for point in points})
    rows = []
    for name, points in lines.items():
        texts = {}
        for x, value, *interval in points:
            texts[x] = f"{value:.{digits}f}"
            if interval:
                texts[x] = interval_text(value, *interval, digits=digits)
        rows.append([name, *(texts.get(x, "") for x in all_x)])
    return ["", *(f"{x:g}" for x in all_x)], rows
