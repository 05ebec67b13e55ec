"""The pages of evaluate.py and of the study: what is drawn is what was measured, and a browser shows it."""
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, strategies as st

import evaluate
import grpo_train
import toy_world
from evaluate import chart, curves, examples, predictions_of, score_masks, table, ticks, with_intervals, write_results_page
from tiny import picture

FAMILY = "qwen2_5_vl"


class Page(HTMLParser):
    """The text of a page, its tags, and the attributes of every tag of a kind."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.attributes = [], [], {}
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data):
        self.text.append(data)


# ------------------------------------------------------------------- charts and tables


@given(st.floats(-1e6, 1e6), st.just(0.0) | st.floats(1e-3, 1e6))
def test_ticks_enclose_what_is_drawn_in_a_few_even_round_steps(low, width):
    found = ticks(low, low + width)
    slack = 1e-6 * max(1, abs(low), width)
    assert found[0] <= low + slack and found[-1] >= low + width - slack and 2 <= len(found) <= 8
    steps = [b - a for a, b in zip(found, found[1:])]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3) and steps[0] > 0


def test_ticks_by_hand():
    assert ticks(0, 1) == [0, 0.5, 1] and ticks(0.31, 0.42) == [0.3, 0.35, 0.4, 0.45] and ticks(5, 5) == [4, 6]
    assert ticks(0, 0) == ticks(5e-324, 5e-324) == [0, 0.5] and ticks(-3, 150) == [-50, 0, 50, 100, 150]


def test_a_line_lies_where_its_numbers_say_with_whiskers_and_numbers_as_text():
    page = Page(chart("a <b>", {"one": [(0, 0.0, -0.5, 0.5), (4, 1.0, 0.5, 1.5)], "none": []}))
    labels = page.text[page.text.index("-0.5"):][:5]
    y = {label: float(a["y"]) - 3 for a, label in zip(page.attributes["text"], labels)}
    assert labels == ["-0.5", "0", "0.5", "1", "1.5"] and y["-0.5"] == 150 and y["0"] == 115 and y["1.5"] == 10
    assert [(float(c["cx"]), float(c["cy"])) for c in page.attributes["circle"]] == [(40, 115), (330, 45)]
    whiskers = [p["d"] for p in page.attributes["path"] if re.fullmatch(r"M[\d.]+ [\d.]+V[\d.]+", p["d"]) and "stroke" in p]
    assert [re.split("[ V]", w)[1:] for w in whiskers] == [["150.0", "80.0"], ["80.0", "10.0"]]
    assert "0.000 [-0.500, 0.500]" in page.text and "1.000 [0.500, 1.500]" in page.text and "a <b>" in page.text


def test_a_smoothed_line_is_the_mean_over_the_last_points_beside_what_was_measured():
    page = Page(chart("t", {"m": [(0, 0.0), (1, 4.0), (2, 8.0), (3, 0.0)]}, smooth=2))
    lines = [[float(v.split()[1]) for v in p["d"][1:].split("L")] for p in page.attributes["path"] if "L" in p["d"]]
    scale = lambda values: [150 - 140 * v / 8 for v in values]
    assert lines == [pytest.approx(scale([0, 4, 8, 0]), abs=0.06), pytest.approx(scale([0, 2, 6, 4]), abs=0.06)]
    assert "circle" not in page.tags and "table" not in page.tags


def test_what_is_not_there_is_not_drawn():
    assert chart("t", {}) == chart("t", {"m": []}) == chart("t", {"m": [(0, float("nan")), (1, None)]}) == ""
    page = Page(chart("t", {"m": [(0, 1.0), (1, float("nan")), (2, 2.0)]}))
    assert len(page.attributes["circle"]) == 2


def test_a_cell_with_an_interval_is_drawn_on_the_axis_of_its_column():
    page = Page(table(["", "x"], [["a <i>", (-1.0, 0.0, 1.0, "<n>")], ["b", (2.0, 3.0, 3.0)]], 1))
    assert [float(c["cx"]) for c in page.attributes["circle"]] == [37.5, 135] and "a <i>" in page.text    # from -1 to 3
    assert "0.0 " in page.text and "[-1.0, 1.0] <n>" in page.text and "[2.0, 3.0] " in page.text


# ------------------------------------------------------------------- examples


def test_best_worst_and_random_examples_by_hand_and_nothing_twice():
    row = lambda i, right: {"index": i, "condition": "real", "right": right, "truth": f"t{i}", "prediction": f"<p>{i}"}
    before = {"real": [row(i, i < 4) for i in range(12)]}                        # 0 to 3 were right
    mine = {"real": [row(i, i % 4 in (2, 3)) for i in range(14)],                # gained: 6 7 10 11, lost: 0 1; 12, 13: not compared
            "shuffled": [row(6, False) | {"prediction": "of another"}]}
    asked = []
    made = examples(mine, before, lambda i: asked.append(i) or ([picture(0)], f"question <{i}>"))
    assert set(asked[:4]) == {6, 7, 10, 11} and set(asked[4:6]) == {0, 1} and len(asked) == len(set(asked)) == 12
    page = Page(made)
    assert [t for t in page.text if t in ("Gained most", "Lost most", "Random")] == ["Gained most", "Lost most", "Random"]
    assert "question <6>" in page.text and "t6" in page.text and "✓ <p>6" in page.text and "✗ <p>6" in page.text
    assert "✗ of another" in page.text and page.tags.count("img") == 12
    assert "Best" in examples(mine, {}, lambda i: ([], "")) and examples({"real": [], "shuffled": []}, {}, None) == ""


# ------------------------------------------------------------------- the real scripts


def write_masks(folder, n):
    words = "dog cat sun sea owl box".split()
    rows = [{"id": f"m{i}", "image": f"{i}.png", "masked_caption": "It is a [MASK].", "sentence": "It is a [MASK].", "start": 8,
             "end": 11, "answer": words[i]} for i in range(n)]
    for i in range(n):
        picture(i).save(folder / f"{i}.png")
    (folder / "masks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def trained(stage, checkpoint, tmp_path):
    """Folder with masks.jsonl, run/checkpoint-3 of it, and eval_base; and evaluate(model, out, *flags) -> (error, printed)."""
    write_masks(tmp_path, 6)
    data = ["--data", tmp_path / "masks.jsonl", "--w-visual", 0, "--max-new-tokens", 4]
    assert stage(grpo_train, "--model", checkpoint(FAMILY), *data, "--steps", 3, "--prompts-per-step", 2, "--group-size", 2,
                 "--out", tmp_path / "run")[0] is None

    def run(model, out, *flags):
        return stage(evaluate, "--model", model, *data, "--out", tmp_path / out, *flags)
    assert run(checkpoint(FAMILY), "eval_base")[0] is None
    return tmp_path, run


def test_masks_are_reported_with_intervals_against_another_model_with_curves_and_examples(trained):
    folder, run = trained
    with (folder / "run" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "entr')                                             # cut by a kill
    error, printed = run(folder / "run" / "checkpoint-3", "eval", "--compare", folder / "eval_base")
    assert error is None and "results.html" in printed
    results = json.loads((folder / "eval" / "results.json").read_text())
    n = results["real"]["exact_match"]["n"]
    assert n == results["compared"]["real"]["exact_match"]["n"] == results["written"] // 3 > 3
    assert results["gain_over_blank"]["word_credit"].keys() == {"value", "low", "high", "n", "verdict"}
    rows = predictions_of(folder / "eval")[0]["real"]
    mean = 100 * sum(r["word_credit"] for r in rows) / len(rows)
    assert with_intervals(score_masks(rows))["word_credit"]["value"] == results["real"]["word_credit"]["value"] == round(mean, 2)
    page = Page((folder / "eval" / "results.html").read_text())
    for heading in ("Scores", "real", "blank", "shuffled", "gain_over_blank", "gain_over_shuffled", "Training", "Gained most",
                    "entropy, nats a token"):
        assert heading in page.text, heading
    assert page.tags.count("img") == min(12, n) and "script" not in page.tags
    first = Page((folder / "eval_base" / "results.html").read_text())
    assert "Training" not in first.text and "Best" in first.text


def test_two_models_are_compared_on_the_same_masks_only(trained):
    folder, run = trained
    (folder / "other").mkdir()
    write_masks(folder / "other", 4)
    base = folder / "run" / "checkpoint-3"
    assert run(base, "elsewhere", "--data", folder / "other" / "masks.jsonl", "--image-root", folder)[0] is None
    error, _ = run(base, "eval", "--compare", folder / "elsewhere")
    assert "another data" in error and "\n" not in error
    assert "holds no finished predictions" in run(base, "eval", "--compare", folder / "run")[0]


# ------------------------------------------------------------------- the study's page


def test_the_page_of_a_study_with_holes_shows_what_is_there(tmp_path):
    figure = lambda *values: toy_world.spread(list(values))
    both = {"exact_match_truth": figure(0.25, 0.75), "stereotype_rate": figure(None, None), "reliance_exact_match_truth": figure(0.5, None)}
    patches = {"0": {"none": both}, "1": {"attended": both, "objects": both}}
    results = {"arms": {"base": both, "dapo": both}, "bias": {"0.0": {"sft": both}, "0.8": {"sft": both, "mmrpt": {}}},
               "dependency": {"dependency_auroc": figure(0.9)}, "probe": {"base": {"layers": {"0": {}}, "patches": patches}},
               "robustness": {"sft": {"none": {"0": both}, "text": {"0": both, "1": both}, **{
                   k: {"1": both, "mean": both} for k in toy_world.CORRUPTIONS}}}}
    page = Page("".join(toy_world.study_page(tmp_path, results)))
    shown = " ".join(page.text)
    assert "dapo --loss dapo --clip-eps 0.2 0.28" in page.text and "[0.146, 0.854] " in page.text          # 0.5 and its deviation
    assert shown.count("0.500") >= 10 and "None" not in shown and "nan" not in shown
    assert all(kind in page.text for kind in (*toy_world.CORRUPTIONS, "text", "attended", "objects"))
    assert "".join(toy_world.study_page(tmp_path, {}))                            # nothing ran yet


@pytest.mark.parametrize("width", (1200, 390))
def test_a_browser_shows_hostile_results_as_text_and_nothing_is_wider_than_the_window(browser, tmp_path, width):
    evil = "<script>document.title='owned'</script>"
    row = {"index": 1, "condition": "real", "right": True, "truth": evil, "prediction": evil * 9}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "entropy": 1 / i, "loss": float("nan")}) + "\n"
                                                    for i in range(1, 200)))
    wide = table([f"column {i}" for i in range(30)], [[(0.0, 1.0, 2.0)] * 30])
    write_results_page(tmp_path / "page.html", evil, [wide, curves(tmp_path / "metrics.jsonl"), examples(
        {"real": [row], "shuffled": []}, {}, lambda i: ([picture(0)], evil))])
    probe = """<script>addEventListener("load", () => { document.body.dataset.drawn = document.querySelectorAll("svg.chart path").length
      document.body.dataset.wide = document.documentElement.scrollWidth <= innerWidth })</script>"""
    with (tmp_path / "page.html").open("a") as f:
        f.write(probe)
    dom = browser(tmp_path / "page.html", "--dump-dom", f"--window-size={width},900", until="data-drawn")
    assert "<title>&lt;script&gt;" in dom and dom.count("<script>") == 1 and 'data-wide="true"' in dom
    assert int(re.search(r'data-drawn="(\d+)"', dom)[1]) >= 2                    # faint and bold; the loss is no number
