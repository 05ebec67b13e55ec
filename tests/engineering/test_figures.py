"""Figures and training curves: what is drawn is what was measured."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from report.curves import panels, read_metrics, training_figures, write_curves
from report.figures import (
    as_svg,
    interval_plot,
    interval_text,
    line_chart,
    line_table,
    running_mean,
    save_png,
)

ROOT = Path(__file__).resolve().parents[2]


def drawn_lines(figure):
    """{label: [(x, y), ...]} of the lines of the first axes that have a label."""
    lines = {}
    for line in figure.axes[0].get_lines():
        if not line.get_label().startswith("_"):
            lines[line.get_label()] = [tuple(point) for point in line.get_xydata().tolist()]
    return lines


# ---------------------------------------------------------------- line charts


def test_a_line_lies_where_its_numbers_say_with_whiskers_and_words():
    lines = {"one": [(0, 0.0, -0.5, 0.5), (4, 1.0, 0.5, 1.5)], "two": [(4, 0.25)]}
    figure = line_chart("title", lines, "share of objects", "exact match")
    axes = figure.axes[0]
    assert drawn_lines(figure) == {"one": [(0, 0), (4, 1)], "two": [(4, 0.25)]}
    assert axes.get_title(loc="left") == "title"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share of objects", "exact match")
    whiskers = [path.vertices.tolist() for path in axes.collections[0].get_paths()]
    assert whiskers == [[[0, -0.5], [0, 0.5]], [[4, 0.5], [4, 1.5]]]
    low, high = axes.get_ylim()
    assert low <= -0.5 and high >= 1.5, "whiskers count for the limits"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]


def test_lines_differ_in_colour_dashes_and_marker():
    lines = {f"line {i}": [(0, i), (1, i)] for i in range(6)}
    drawn = line_chart("t", lines, "x", "y").axes[0].get_lines()
    assert len({line.get_color() for line in drawn}) == 6
    assert len({line.get_marker() for line in drawn}) == 6
    assert len({str(line._dash_pattern) for line in drawn}) == 6


def test_a_smoothed_line_is_the_mean_over_the_last_points_beside_what_was_measured():
    assert running_mean([0, 4, 8, 0], 2) == [0, 2, 6, 4]
    measured = [(0, 0.0), (1, 4.0), (2, 8.0), (3, 0.0)]
    raw, mean = line_chart("t", {"m": measured}, "x", "y", 2).axes[0].get_lines()
    assert [tuple(point) for point in raw.get_xydata()] == measured
    assert mean.get_ydata().tolist() == [0, 2, 6, 4]
    assert raw.get_alpha() < 0.5 and raw.get_linewidth() < mean.get_linewidth()


def test_what_is_not_there_is_not_drawn():
    nothing = {"m": [(0, math.nan), (1, None)], "n": [], "o": [(0, math.inf)]}
    assert line_chart("t", nothing, "x", "y") is None
    assert line_chart("t", {}, "x", "y") is None
    assert interval_plot([]) is None and interval_plot([("a", "", None, 0, 1)]) is None
    assert as_svg(None) == ""
    holes = {"m": [(0, 1.0), (1, math.nan), (2, 2.0)], "n": [(0, 1.0, None, 2.0)]}
    assert drawn_lines(line_chart("t", holes, "x", "y")) == {"m": [(0, 1), (2, 2)]}


@pytest.mark.parametrize("points", [[(1, 5.0)], [(1, 5.0), (2, 5.0)], [(0, 0.0)] * 3, [(1, 1e9)]])
def test_constant_and_single_values_can_be_drawn(points, tmp_path):
    for smooth in (1, 3):
        save_png(line_chart("t", {"m": points}, "x", "y", smooth), tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").width > 400


# ---------------------------------------------------------------- intervals


def test_an_interval_plot_has_a_line_per_label_and_a_colour_per_series():
    rows = [
        ("exact", "real", 40, 30, 50),
        ("exact", "blank", 10, 5, 15),
        ("rouge", "real", 60, 55, 65),
    ]
    axes = interval_plot(rows, xlabel="percent").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["exact", "rouge"]
    assert drawn_lines(axes.figure)["real"] == [(40, -0.2), (60, 0.8)]
    assert drawn_lines(axes.figure)["blank"] == [(10, pytest.approx(0.2))]
    ends = [path.vertices[:, 0].tolist() for path in axes.collections[0].get_paths()]
    assert ends == [[30, 50], [55, 65]]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first label is on top"


def test_numbers_as_text_by_hand():
    assert interval_text(50, 45.123, 55) == "50.00 [45.12, 55.00]"
    columns, rows = line_table({"a": [(0, 0.5), (0.5, 1, 0.8, 1.2)], "b": [(0.5, 2.0)], "c": []})
    assert columns == ["", "0", "0.5"]
    assert rows == [["a", "0.500", "1.000 [0.800, 1.200]"], ["b", "", "2.000"]]


# ---------------------------------------------------------------- output


def example(name="a <b> $x_1$"):
    return line_chart(name, {name: [(0, 1.0), (1, 2.0)], "other": [(0, 2.0)]}, "x", "y")


def test_an_svg_stands_alone_as_text_that_is_the_same_every_time():
    svg = as_svg(example())
    assert svg == as_svg(example())
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("aria-label") == "a <b> $x_1$"
    # title and legend: text stays text, and no formula
    assert "".join(root.itertext()).count("a <b> $x_1$") == 2
    assert "<style" not in svg and "<?xml" not in svg and "http" not in svg
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', svg):
        assert f'id="{reference}"' in svg
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert not ids & set(re.findall(r' id="([^"]+)"', as_svg(example("another"))))
    assert "var(--ink)" in svg and "var(--line)" in svg


def test_drawing_leaves_no_global_state():
    code = (
        "import sys\n"
        "from matplotlib import rcParams\n"
        # reading the backend would choose one
        "def settings(): return {k: rcParams[k] for k in rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from report.figures import as_svg, line_chart\n"
        "as_svg(line_chart('t', {'m': [(0, 1.0)]}, 'x', 'y'))\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- training curves


def write_metrics(folder, steps=40, **more):
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        metrics = {"step": step, "reward": 0.5, "reward_semantic": step / steps, "format_ok": 1.0}
        metrics |= {"reward_seconds": 9.0, "loss": math.nan, "entropy": 1 / step, "kl": 0.0, **more}
        lines.append(json.dumps(metrics) + "\n")
    # cut by a kill
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "entr')
    return folder


def test_new_reward_components_and_media_appear_in_their_panels_by_themselves(tmp_path):
    run = write_metrics(tmp_path / "run", **{"reward_form/drawing": 0.1, "entropy/drawing": 0.2})
    chosen = {title: lines for title, lines, *_ in panels(read_metrics(run / "metrics.jsonl"))}
    assert list(chosen["Reward components"]) == ["semantic", "format ok", "form, drawing"]
    assert list(chosen["Entropy"]) == ["entropy", "entropy, drawing"]
    assert len(chosen["Entropy"]["entropy"]) == 40, "the broken line is left out"
    titles = [
        figure.get_label() for figure in training_figures(read_metrics(run / "metrics.jsonl"))
    ]
    assert titles == ["Reward components", "Entropy", "KL to the reference"], "what can be drawn"


def test_curves_are_written_as_a_png_of_readable_size(tmp_path):
    run = write_metrics(tmp_path / "run")
    path = write_curves(run)
    assert path == run / "curves.png"
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "metrics.jsonl"]
    image = Image.open(path)
    image.load()
    assert image.format == "PNG" and 900 < image.width < 2000 and 600 < image.height < 3000
    assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 50, "it is not blank"
    assert path.stat().st_size < 10**6


def test_curves_start_without_torch_and_transformers(tmp_path):
    run = write_metrics(tmp_path / "run")
    code = (
        "import runpy, sys; sys.argv = ['curves', sys.argv[1]]\n"
        "runpy.run_module('report.curves', run_name='__main__')\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "curves.png" in done.stdout and (run / "curves.png").exists()


@pytest.mark.parametrize("content", [None, "", '{"step": 1}\n', '{"ste'])
def test_a_run_without_curves_ends_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        write_curves(tmp_path)
    assert str(end.value).startswith("error: ") and "metrics.jsonl" in str(end.value)
    assert "\n" not in str(end.value) and not (tmp_path / "curves.png").exists()
