"""OUT/results.html of evaluate.py: examples, training curves, and scores with their intervals."""

import random
from pathlib import Path

from common.records import BadRecord
from common.results import interval, is_overall, read_predictions, remark, sections
from report.curves import read_metrics, training_figures
from report.figures import as_svg, interval_plot
from report.pages import image_uri, page

# characters of a prediction that are shown
SHOWN = 400
# MME's own scores are sums, and no percentages
MME_POINTS = ("perception", "cognition", "score")


def write_results_page(args, results, load_example):
    """Writes OUT/results.html, one file that needs no other.

    args: .out, .model, .data and .compare. results: those of evaluate_records().
    load_example(index) -> ([PIL image, ...], text) of a prediction.
    """
    predictions, _ = read_predictions(args.out)
    before = {}
    if args.compare:
        before, _ = read_predictions(args.compare)
    opening, *examples = example_sections(predictions, before, load_example)

    headings = sections(results)
    scores = {name: s for name, s in headings.items() if name in predictions}
    gains = {name: s for name, s in headings.items() if name not in predictions}
    tables = []
    for title, columns in (("Scores", scores), ("Gains, paired", gains)):
        if columns:
            tables.append(score_table(title, columns, results["kind"]))

    path = Path(args.out, "results.html")
    page(
        "results.html",
        path,
        title=f"{'/'.join(Path(args.model).parts[-2:])} on {Path(args.data).name}",
        summary=summary(results),
        opening=opening,
        examples=examples,
        curves=training_curves(args.model),
        tables=tables,
    )
    print(f"{path} shows scores and examples.\nEvery answer is in {args.out}/predictions.jsonl.")


def summary(results):
    """One sentence on how much was evaluated and what it is compared with."""
    facts = [f"{results['records']} records", f"{results['skipped']} skipped"]
    if results.get("compared_with"):
        facts.append(f"compared with {results['compared_with']}")
    if results.get("extraction"):
        facts.append(f"answers extracted {results['extraction']}")
    return "; ".join(facts) + "."


def training_curves(model):
    """[<svg>, ...] of the run that a checkpoint comes from; [] for other models."""
    model = Path(model)
    metrics = model.parent / "metrics.jsonl"
    if not model.name.startswith("checkpoint-") or not metrics.exists():
        return []
    return [as_svg(figure) for figure in training_figures(read_metrics(metrics))]


# ---------------------------------------------------------------- scores


def score_table(title, headings, kind):
    """What the page needs of one table: {title, columns, parts: [{name, rows, plots}, ...]}.

    headings: {column: {score: {value, low, high, n, ...}}}. The first part holds the scores of all
    records, the second, which the page folds away, those by category.
    """
    names = dict.fromkeys(name for scores in headings.values() for name in scores)
    overall = [name for name in names if is_overall(name)]
    by_category = [name for name in names if not is_overall(name)]

    parts = []
    for part, members in (("", overall), ("by category", by_category)):
        if members:
            rows = [_score_row(name, headings) for name in members]
            parts.append({"name": part, "rows": rows, "plots": _plots(members, headings, kind)})
    return {"title": title, "columns": ["", *map(in_words, headings), "records"], "parts": parts}


def in_words(heading):
    """'gain over blank' for gain_over_blank; other headings stay as they are."""
    if heading.startswith("gain_over_"):
        return heading.replace("_", " ")
    return heading


def _score_row(name, headings):
    """[name, an interval per column, number of records] as texts."""
    row = [name]
    numbers = []
    for scores in headings.values():
        entry = scores.get(name)
        if entry is None:
            row.append("")
        else:
            row.append(f"{interval(entry, digits=2)} {remark(entry)}")
            numbers.append(entry["n"])
    return [*row, str(max(numbers))]


def _plots(names, headings, kind):
    """[<svg>, ...]: the intervals of these scores, on an axis for each of their units."""
    rows = {"percent": [], "points": []}
    for name in names:
        unit = "points" if kind == "mme" and name.startswith(MME_POINTS) else "percent"
        for heading, scores in headings.items():
            if name in scores:
                entry = scores[name]
                interval = (entry["value"], entry["low"], entry["high"])
                rows[unit].append((name, in_words(heading), *interval))

    figures = []
    for unit, unit_rows in rows.items():
        figures.append(interval_plot(unit_rows, xlabel=f"{unit}, with 95% intervals"))
    return [as_svg(figure) for figure in figures if figure is not None]


# ---------------------------------------------------------------- examples


def example_sections(predictions, before, load_example, k=4):
    """[{title, note, cards}, ...] of choose_examples(), ready for the page."""
    before_by_index = {record["index"]: record for record in before.get("real", ())}
    shuffled = {record["index"]: record for record in predictions.get("shuffled", ())}
    titles = choose_examples(predictions, before, k)

    result = []
    for (title, note), records in titles.items():
        cards = []
        for record in records:
            index = record["index"]
            others = {"before": before_by_index.get(index), "another image": shuffled.get(index)}
            cards.append(example_card(record, others, load_example))
        result.append({"title": title, "note": note, "cards": cards})
    return result


def choose_examples(predictions, before, k=4):
    """{(title, note): predictions from the real image}: three to open the page, then k of a kind.

    With another model's predictions `before`, the kinds are those that gained most over it, those
    that lost most, and others at random; without them the best, the worst and others at random.
    The choice is the same in every run, and none is chosen twice.
    """
    earlier = {record["index"]: record for record in before.get("real", ())}
    records = [r for r in predictions.get("real", ()) if not before or r["index"] in earlier]
    # or ties would stay in the order of the file
    records = random.Random(0).sample(records, len(records))

    def gain(record):
        if not before:
            return goodness(record)
        return goodness(record) - goodness(earlier[record["index"]])

    def is_same(record):
        return bool(before) and record["prediction"] == earlier[record["index"]]["prediction"]

    # a stable sort: those whose answer changed come first
    opening = sorted(records, key=is_same)[:3]
    rest = [record for record in records if record not in opening]
    rest.sort(key=gain, reverse=True)
    if before:
        best = [record for record in rest if gain(record) > 0][:k]
        worst = [record for record in reversed(rest) if gain(record) < 0][:k]
    else:
        best = rest[:k]
        worst = rest[k:][-k:][::-1]
    others = [record for record in rest if record not in best and record not in worst]
    others = random.Random(1).sample(others, min(k, len(others)))

    if before:
        opening_title = ("Before and after", "Drawn at random among the answers that changed.")
        titles = (("Gained most", ""), ("Lost most", ""), ("Random", ""))
    else:
        opening_title = ("Three answers", "Drawn at random.")
        titles = (("Best", ""), ("Worst", ""), ("Random", ""))
    chosen = {title: part for title, part in zip(titles, (best, worst, others)) if part}
    return {opening_title: opening, **chosen}


def goodness(record):
    """How good a prediction is: right or not, or, of a mask, exact match and ROUGE-L."""
    if "right" in record:
        return float(record["right"])
    return record["exact_match"] + record["rouge_l"]


def example_card(record, others, load_example):
    """What the page needs of one example: {images, text, answers}.

    others: {"before": the prediction of --compare, "another image": the shuffled one}, or None.
    """
    try:
        loaded, text = load_example(record["index"])
    except (BadRecord, LookupError):
        # the predictions are older than the page, and what they are of may have gone since
        loaded, text = [], "(no longer in the data, or without its image)"
    images = []
    for image in loaded:
        uri, width, height = image_uri(image, 256)
        images.append({"uri": uri, "kind": "tiny" if max(width, height) < 160 else "photo"})

    if "truth" in record:
        answers = [("truth", "", str(record["truth"]))]
    else:
        answers = [("hidden text", "", str(record["answer"]))]
    label = "after" if others["before"] else "answer"
    shown = {"before": others["before"], label: record, "another image": others["another image"]}
    for name, prediction in shown.items():
        if prediction:
            is_right = prediction.get("right", prediction.get("exact_match"))
            mark = "✓" if is_right else "✗"
            answers.append((name, mark, prediction["prediction"][:SHOWN]))
    return {"images": images, "text": text, "answers": answers}
