"""The curves of a training run.

    python -m report.curves RUN

reads RUN/metrics.jsonl, a line per step of grpo_train.py, and writes RUN/curves.png. It needs no
model and no GPU, and imports neither torch nor transformers, so that a run can start it at every
checkpoint. A line that a kill has cut is left out.
"""

import argparse
import re
from pathlib import Path

from common.records import fail, load_records
from report.figures import line_chart, panel_grid, save_png

# title, label of the vertical axis, and the metrics, as a pattern: its group names the line.
# A metric of one medium, such as reward_form/drawing, joins the panel of its kind.
PANELS = (
    ("Reward components", "mean reward", r"reward_(?!seconds)(.+)|(format_ok)(?:/.+)?"),
    ("Entropy", "nats per token", r"(entropy)(?:/.+)?"),
    ("Completion length", "tokens", r"(completion_tokens)(?:/.+)?"),
    ("Groups without a signal", "share of groups", r"(zero_std_fraction)(?:/.+)?"),
    ("Mean |advantage|", "mean |advantage|", r"(advantage_abs)(?:/.+)?"),
    ("Loss", "loss", r"(loss)(?:/.+)?"),
    ("KL to the reference", "nats per token", r"(kl)(?:/.+)?"),
    ("Gradient norm", "norm before clipping", r"(grad_norm)(?:/.+)?"),
)


def read_metrics(path):
    """The metrics of all whole lines of a metrics.jsonl: [{step, loss, ...}, ...]."""
    return [record for record in load_records(path) if isinstance(record.get("step"), int)]


def panels(metrics):
    """What the curves show: [(title, lines, xlabel, ylabel, smooth), ...]."""
    smooth = max(2, len(metrics) // 15)
    names = list(dict.fromkeys(name for record in metrics for name in record))
    result = []
    for title, ylabel, pattern in PANELS:
        lines = {}
        for name in names:
            if re.fullmatch(pattern, name):
                label = line_name(name)
                lines[label] = [(r["step"], r[name]) for r in metrics if name in r]
        result.append((title, lines, "step", ylabel, smooth))
    return result


def line_name(metric):
    """A metric in words.

    >>> line_name("reward_semantic"), line_name("format_ok"), line_name("entropy/drawing")
    ('semantic', 'format ok', 'entropy, drawing')
    """
    return metric.removeprefix("reward_").replace("_", " ").replace("/", ", ")


def training_figures(metrics):
    """A figure per panel, for pages; metrics: those of read_metrics()."""
    figures = [line_chart(*panel) for panel in panels(metrics)]
    return [figure for figure in figures if figure is not None]


def write_curves(run):
    """Writes RUN/curves.png, atomically, and returns its path."""
    run = Path(run)
    title = f"{run.resolve().name} (faint: every step; bold: running mean)"
    figure = panel_grid(title, panels(read_metrics(run / "metrics.jsonl")))
    if figure is None:
        fail(f"{run}/metrics.jsonl has no step that can be drawn")
    save_png(figure, run / "curves.png")
    return run / "curves.png"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the --out of grpo_train.py")
    path = write_curves(parser.parse_args().run)
    print(f"{path}: training curves")


if __name__ == "__main__":
    main()
