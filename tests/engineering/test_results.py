"""The page of evaluate.py: what it shows is what was measured, and a browser opens it."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from tiny import random_image

import evaluate
import grpo_train
from common.records import load_records
from common.results import is_overall, print_scores, read_predictions, remark, sections
from common.stats import with_intervals
from evaluate import score_masks
from report.results import choose_examples, example_sections, score_table, write_results_page

FAMILY = "qwen2_5_vl"


class Page(HTMLParser):
    """The text of a page, its tags, and the attributes of every tag of a kind."""

    def __init__(self, source):
        super().__init__()
        self.text = []
        self.tags = []
        self.attributes = {}
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data):
        self.text.append(data.strip())


def needs_no_other_file(source):
    """Whether a page loads nothing: neither a link, a script nor an image from outside it."""
    page = Page(source)
    sources = [attributes["src"] for attributes in page.attributes.get("img", [])]
    outside = re.search(r'(?:src|href)="(?!data:|#)|url\((?!#)|@import|<link|<script', source)
    return outside is None and all(uri.startswith("data:image/") for uri in sources)


# ---------------------------------------------------------------- examples


def answer(index, right, prediction=None):
    prediction = prediction or f"<p>{index} {right}"
    fields = {"index": index, "condition": "real", "right": right, "truth": f"t{index}"}
    return {**fields, "prediction": prediction}


# 0 to 3 were right before
BEFORE = {"real": [answer(i, i < 4) for i in range(16)]}
# gained: 6 7 10 11 14 15, lost: 0 1, as before: the others; 16 and 17 are not compared
AFTER = {
    "real": [answer(i, i % 4 in (2, 3)) for i in range(18)],
    "shuffled": [answer(i, False, "of another") for i in range(16)],
}


def test_the_page_opens_with_three_answers_that_changed_and_no_example_is_shown_twice():
    chosen = choose_examples(AFTER, BEFORE)
    titles = [title for title, _ in chosen]
    assert titles == ["Before and after", "Gained most", "Lost most", "Random"]
    indices = [[record["index"] for record in records] for records in chosen.values()]
    opening, gained, lost, random_ones = indices
    changed = {0, 1, 6, 7, 10, 11, 14, 15}
    assert len(opening) == 3 and set(opening) <= changed
    assert set(gained) <= {6, 7, 10, 11, 14, 15} and set(lost) <= {0, 1}
    assert set(opening) | set(gained) | set(lost) | set(random_ones) <= set(range(16))
    shown = opening + gained + lost + random_ones
    assert len(shown) == len(set(shown)) and len(random_ones) == 4
    assert chosen == choose_examples(AFTER, BEFORE), "the same in every run"


def test_without_another_model_the_best_the_worst_and_others_are_shown():
    chosen = choose_examples(AFTER, {})
    assert [title for title, _ in chosen] == ["Three answers", "Best", "Worst", "Random"]
    _, best, worst, _ = chosen.values()
    assert all(record["right"] for record in best) and not any(r["right"] for r in worst)
    assert [len(records) for records in chosen.values()] == [3, 4, 4, 4]
    few = choose_examples({"real": AFTER["real"][:2]}, {})
    assert [(title, len(records)) for (title, _), records in few.items()] == [("Three answers", 2)]
    nothing = choose_examples({"real": []}, {})
    assert list(nothing.values()) == [[]]


def test_a_card_shows_the_truth_and_every_answer_with_its_mark():
    opening, *_ = example_sections(AFTER, BEFORE, lambda index: ([random_image(0)], f"q <{index}>"))
    card = opening["cards"][0]
    index = int(card["text"].strip("q <>"))
    after = AFTER["real"][index]["right"]
    marks = {True: "✓", False: "✗"}
    assert card["answers"] == [
        ("truth", "", f"t{index}"),
        ("before", marks[index < 4], f"<p>{index} {index < 4}"),
        ("after", marks[after], f"<p>{index} {after}"),
        ("another image", "✗", "of another"),
    ]
    assert card["images"][0]["uri"].startswith("data:image/")


# ---------------------------------------------------------------- predictions


def test_masks_of_one_caption_are_one_unit_and_a_broken_line_is_left_out(tmp_path):
    lines = []
    for start, format_ok in ((8, 1.0), (20, 0.0)):
        record = {"id": "m1", "start": start, "sentence": "A [MASK].", "condition": "real"}
        lines.append(json.dumps({**record, "format_ok": format_ok}) + "\n")
    (tmp_path / "predictions.jsonl").write_text("".join(lines) + '{"id": "m1", "condi')
    (tmp_path / "predictions.jsonl.run.json").write_text('{"settings": {"kind": "masks"}}')

    predictions, settings = read_predictions(tmp_path)
    assert settings == {"kind": "masks"} and list(predictions) == ["real"]
    first, second = predictions["real"]
    assert first["unit"] == second["unit"] == "m1" and first["index"] != second["index"]
    assert (first["unparsed"], second["unparsed"]) == (False, True)


# ---------------------------------------------------------------- scores


def test_a_table_has_the_numbers_as_text_one_plot_and_folded_categories():
    entry = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 8, "unparsed": 2}
    gain = {"value": 5.0, "low": -1.0, "high": 9.0, "n": 8, "verdict": "noise"}
    headings = {
        "real": {"accuracy": entry, "accuracy, category a": entry},
        "gain_over_blank": {"accuracy": gain},
    }
    table = score_table("Scores", headings, "mcq")
    assert table["columns"] == ["", "real", "gain over blank", "records"]
    overall, by_category = table["parts"]
    cells = ["accuracy", "50.00 [40.00, 60.00] 2 unparsed", "5.00 [-1.00, 9.00] noise", "8"]
    assert overall["rows"] == [cells] and len(overall["plots"]) == 1
    assert by_category["name"] == "by category"
    assert by_category["rows"][0][2] == "", "no gain was measured for the category"


def test_mmes_points_have_an_axis_of_their_own():
    entry = {"value": 900.0, "low": 800.0, "high": 990.0, "n": 8, "unparsed": 2}
    percent = {**entry, "value": 50.0, "low": 40.0, "high": 60.0}
    headings = {"real": {"perception": entry, "accuracy": percent}}
    assert len(score_table("Scores", headings, "mme")["parts"][0]["plots"]) == 2
    assert len(score_table("Scores", headings, "mcq")["parts"][0]["plots"]) == 1


def test_printed_scores_leave_out_categories_and_name_the_other_model(capsys):
    entry = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 8, "unparsed": 2}
    gain = {"value": 5.0, "low": -1.0, "high": 9.0, "n": 8, "verdict": "noise"}
    results = {"kind": "mcq", "records": 9, "skipped": 1, "compared_with": "runs/base"}
    results |= {"real": {"accuracy": entry, "accuracy, category a": entry}}
    results |= {"shuffled": {"accuracy": {**entry, "value": 21.0}}}
    results |= {"compared": {"real": {"accuracy": gain}}}
    assert list(sections(results)) == ["real", "shuffled", "real - base"]
    print_scores(results)
    header, line, end = capsys.readouterr().out.splitlines()
    assert header.split() == ["percent", "real", "shuffled", "over", "base"]
    printed = "accuracy 50.0 [40.0, 60.0] 21.0 +5.0 [-1.0, 9.0] noise"
    assert " ".join(line.split()) == printed and len(line) <= 100
    assert end.startswith("mcq: 9 records, 1 skipped; ") and "2 answers are unparsed" in end
    assert not is_overall("accuracy, category a") and is_overall("accuracy, mean of category")
    assert remark(gain) == "noise" and remark(entry) == "2 unparsed"


# ---------------------------------------------------------------- the real scripts


def write_masks(folder, count):
    words = ["dog", "cat", "sun", "sea", "owl", "box"]
    lines = []
    for i in range(count):
        random_image(i).save(folder / f"{i}.png")
        sentence = "It is a [MASK]."
        record = {"id": f"m{i}", "image": f"{i}.png", "masked_caption": sentence}
        record |= {"sentence": sentence, "start": 8, "end": 11, "answer": words[i]}
        lines.append(json.dumps(record) + "\n")
    (folder / "masks.jsonl").write_text("".join(lines))


@pytest.fixture
def trained(stage, checkpoint, tmp_path):
    """(folder, run): masks.jsonl, a run/checkpoint-3 trained on it, and eval_base.

    run(model, out, *flags) -> (error, printed) evaluates.
    """
    write_masks(tmp_path, 6)
    data = ["--data", tmp_path / "masks.jsonl", "--max-new-tokens", 4]
    train = ["--model", checkpoint(FAMILY), *data, "--reward", "semantic=1", "--steps", 3]
    train += ["--prompts-per-step", 2, "--group-size", 2, "--out", tmp_path / "run"]
    error, _ = stage(grpo_train, *train)
    assert error is None

    def run(model, out, *flags):
        return stage(evaluate, "--model", model, *data, "--out", tmp_path / out, *flags)

    error, _ = run(checkpoint(FAMILY), "eval_base")
    assert error is None
    return tmp_path, run


def test_masks_are_reported_against_another_model_with_curves_and_examples(trained):
    folder, run = trained
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "entr')  # cut by a kill
    model = folder / "run" / "checkpoint-3"
    error, printed = run(model, "eval", "--compare", folder / "eval_base")
    assert error is None and "results.html" in printed

    results = json.loads((folder / "eval" / "results.json").read_text())
    n = results["real"]["exact_match"]["n"]
    assert n == results["compared"]["real"]["exact_match"]["n"] == results["written"] // 3 == 6
    fields = {"value", "low", "high", "n", "verdict"}
    assert results["gain_over_blank"]["rouge_l"].keys() == fields
    assert "image_pmi" not in results["real"]

    predictions = read_predictions(folder / "eval")[0]["real"]
    mean = 100 * sum(p["rouge_l"] for p in predictions) / len(predictions)
    assert with_intervals(score_masks(predictions))["rouge_l"] == results["real"]["rouge_l"]
    assert results["real"]["rouge_l"]["value"] == round(mean, 2)

    source = (folder / "eval" / "results.html").read_text()
    page = Page(source)
    for text in ("Before and after", "Training", "Scores", "Gains, paired", "real", "blank"):
        assert text in page.text, text
    for text in ("gain over shuffled", "real - eval_base", "Entropy", "nats per token"):
        assert text in page.text, text
    assert page.text.index("Before and after") < page.text.index("Training")
    assert page.text.index("Training") < page.text.index("Scores")
    assert page.tags.count("img") == n and needs_no_other_file(source)

    base = Page((folder / "eval_base" / "results.html").read_text())
    assert "Training" not in base.text and "Three answers" in base.text


def test_with_clip_the_filled_sentence_is_measured_against_other_images(trained, clip_folder):
    folder, run = trained
    model = folder / "run" / "checkpoint-3"
    error, _ = run(model, "eval", "--clip", clip_folder)
    assert error is None
    predictions = load_records(folder / "eval" / "predictions.jsonl")
    assert len(predictions) == 18
    assert all(0 <= prediction["image_pmi"] <= 1 for prediction in predictions)
    assert "image_pmi" in json.loads((folder / "eval" / "results.json").read_text())["real"]
    error, _ = run(model, "elsewhere", "--clip", clip_folder, "--clip-others", 1)
    assert "--clip-others" in error and "\n" not in error


def test_two_models_are_compared_on_the_same_masks_only(trained):
    folder, run = trained
    (folder / "other").mkdir()
    write_masks(folder / "other", 4)
    base = folder / "run" / "checkpoint-3"
    other_data = ["--data", folder / "other" / "masks.jsonl", "--image-root", folder]
    error, _ = run(base, "elsewhere", *other_data)
    assert error is None
    error, _ = run(base, "eval", "--compare", folder / "elsewhere")
    assert "another data" in error and "\n" not in error
    assert not (folder / "eval" / "predictions.jsonl").exists(), "it ends before the predictions"
    error, _ = run(base, "eval", "--compare", folder / "run")
    assert "holds no finished predictions" in error


def hostile_evaluation(folder, evil):
    """--out folders and arguments of a page whose every text is `evil`."""
    (folder / "run").mkdir()
    metrics = [{"step": i, "entropy": 1 / i, "loss": float("nan")} for i in range(1, 200)]
    lines = [json.dumps(line) + "\n" for line in metrics]
    (folder / "run" / "metrics.jsonl").write_text("".join(lines))
    record = {"index": "1", "unit": "1", "condition": "real", "unparsed": False}
    record |= {"right": True, "truth": evil, "prediction": evil * 9}
    (folder / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "predictions.jsonl.run.json").write_text('{"settings": {}}')
    entry = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 8, "unparsed": 2}
    results = {"kind": "exact", "records": 1, "skipped": 0, "extraction": evil}
    results["real"] = {f"{evil} {i}": entry for i in range(3)} | {f"a, b {evil}": entry}
    model = folder / "run" / "checkpoint-3"
    args = SimpleNamespace(out=str(folder), model=str(model), data=f"{evil}.tsv", compare=None)
    return args, results


def test_before_is_what_the_model_of_compare_answered(tmp_path):
    args, results = hostile_evaluation(tmp_path, "now")
    base = tmp_path / "base"
    base.mkdir()
    hostile_evaluation(base, "then")
    args.compare = str(base)
    write_results_page(args, results, lambda index: ([random_image(0)], "question"))
    text = Page((tmp_path / "results.html").read_text()).text
    assert text[text.index("before") + 1] == "✓ " + "then" * 9
    assert text[text.index("after") + 1] == "✓ " + "now" * 9


@pytest.mark.parametrize("width", (1200, 390))
def test_a_browser_shows_hostile_results_as_text_within_the_window(browser, tmp_path, width):
    evil = "<script>document.title='owned'</script>"
    args, results = hostile_evaluation(tmp_path, evil)
    write_results_page(args, results, lambda index: ([random_image(0)], evil))
    path = tmp_path / "results.html"
    assert needs_no_other_file(path.read_text())

    # a script of the test itself: the page's own policy would not run it
    source = path.read_text()
    policy = re.search(r"<meta http-equiv.*?>", source, re.DOTALL)[0]
    probe = """<script>addEventListener("load", () => {
      const data = document.body.dataset
      data.wide = document.documentElement.scrollWidth <= innerWidth
      data.drawn = document.querySelectorAll("svg.chart path").length
    })</script>"""
    path.write_text(source.replace(policy, "") + probe)
    dom = browser(path, "--dump-dom", f"--window-size={width},900", until="data-drawn")
    assert (
        dom.count("<script>") == 1 and "<title>" in dom and "owned" not in dom.split("<title>")[0]
    )
    assert 'data-wide="true"' in dom
    assert int(re.search(r'data-drawn="(\d+)"', dom)[1]) > 10
