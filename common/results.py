"""Predictions under several conditions, and the scores made from them.

evaluate.py (masked captions) and benchmarks/ (TSVs of VLMEvalKit) share this: both map records to
OUT/predictions.jsonl, and OUT/results.json summarises that file.
"""

import collections
import contextlib
import json
from pathlib import Path

from common.records import BadRecord, fail, read_jsonl, require_files, write_json
from common.stage import map_records, require_output
from common.stats import paired_difference, with_intervals

# what the model is shown: its image; a grey one (masked captions) or none (benchmarks); another's
CONDITIONS = ("real", "blank", "without", "shuffled")
# settings that must be equal for two models to be compared
COMPARABLE = (
    "stage",
    "kind",
    "data",
    "prompt",
    "clip",
    "clip_weights",
    "clip_others",
    "max_pixels",
    "max_new_tokens",
)


def other_image(names, i, load):
    """load(name) of an image that differs from names[i]; None if there is none.

    The search begins half the list away and takes the first readable one.
    """
    for j in range(len(names)):
        name = names[(i + len(names) // 2 + j) % len(names)]
        if name != names[i]:
            with contextlib.suppress(BadRecord):
                return load(name)
    return None


def mask_index(record):
    """What identifies a mask record: a caption may have several."""
    return record["id"], record.get("start"), record["sentence"]


# ---------------------------------------------------------------- predictions


def read_predictions(folder):
    """({condition: prediction records}, settings) of the --out of an evaluation.

    Every record has an index, the unit that the bootstrap draws (its image or caption), and
    unparsed: whether no answer could be read from it.
    """
    path = Path(folder, "predictions.jsonl")
    require_files(folder)
    try:
        settings = json.loads(Path(f"{path}.run.json").read_text())["settings"]
    except (OSError, ValueError, LookupError):
        fail(f"{folder} holds no finished predictions of evaluate.py")

    predictions = collections.defaultdict(list)
    for number, record in read_jsonl(path, ("condition",)):
        if isinstance(record, BadRecord):
            continue
        if not _has_sound_fields(record):
            fail(f"{path}:{number} is not what evaluate.py writes: evaluate to another --out")
        if "format_ok" in record:
            record["index"] = mask_index(record)
            record["unit"] = record["id"]
            record["unparsed"] = not record["format_ok"]
        predictions[record["condition"]].append(record)
    return predictions, settings


def _has_sound_fields(record):
    """Whether the fields of a prediction have the types that are written: it may be edited."""
    if not isinstance(record["condition"], str):
        return False
    if "format_ok" not in record:
        return "unit" in record
    texts = ("image", "sentence", "answer", "condition", "prediction")
    numbers = [value for name, value in record.items() if name not in ("id", *texts)]
    # no metric, character or count comes near the limit
    are_finite = all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers)
    are_texts = all(isinstance(record.get(name, ""), str) for name in texts)
    has_index = isinstance(record.get("id"), str | int) and "sentence" in record
    return are_finite and are_texts and has_index


def evaluate_records(args, rank, records, start, settings, kind, score):
    """Maps records to OUT/predictions.jsonl, and those to OUT/results.json.

    args: .out, .model, .data, .batch_size, .compare (an --out of another model, or None) and
    .backbone_accuracy. start(): as for map_records(). kind: "masks" or the name of a benchmark.
    score: a function from records to scores (see common/stats.py), or None for a benchmark that has
    a grader of its own. Returns the contents of results.json on rank 0, and None elsewhere.
    """
    others = {}
    if args.compare:
        others = _comparable_predictions(args.compare, settings)

    out = Path(args.out, "predictions.jsonl")
    counts = map_records(records, start, out, settings, args.data, args.batch_size)
    total = counts["records"]
    require_output(
        out, counts, f"{args.data}: none of its {total} records could be used; see above"
    )
    if rank != 0:
        return None

    predictions, _ = read_predictions(args.out)
    results = {"model": args.model, "data": args.data, "kind": kind, **counts}
    if args.compare:
        results["compared_with"] = args.compare
    if score is None:
        results["extraction"] = "none: mmvet.json is for MM-Vet's own grader"
    else:
        results |= _notes(kind, predictions["real"])
        results |= _summarise(score, predictions, others)
        if args.backbone_accuracy is not None and "without" in results:
            results["leakage"] = _leakage(results["without"]["accuracy"], args.backbone_accuracy)
    write_json(Path(args.out, "results.json"), results)
    return results


def _comparable_predictions(folder, settings):
    """The predictions in `folder`, if they come from the same data."""
    predictions, other_settings = read_predictions(folder)
    # a tuple comes back from JSON as a list
    settings = json.loads(json.dumps(settings))
    different = [k for k in COMPARABLE if other_settings.get(k) != settings.get(k)]
    if different:
        names = " and ".join(different)
        fail(f"--compare {folder}: made with another {names}; both must have the same")
    return predictions


# ---------------------------------------------------------------- results


def _summarise(score, predictions, others):
    """{condition: scores, gain_over_*: paired differences, compared: {condition: ...}}."""
    present = [c for c in CONDITIONS if predictions[c]]
    results = {c: with_intervals(score(predictions[c])) for c in present}

    for condition in present:
        if condition != "real" and "real" in present:
            gain = paired_difference(score, predictions["real"], predictions[condition])
            results[f"gain_over_{condition}"] = gain

    results["compared"] = {}
    for condition in present:
        if others.get(condition):
            gain = paired_difference(score, predictions[condition], others[condition])
            results["compared"][condition] = gain
    return results


def _notes(kind, real):
    """What one must know about a benchmark's scores."""
    if kind == "masks":
        return {}
    extraction = "by rules, no judge"
    if kind == "mathvista":
        extraction += "; the official script asks an LLM"
    return {"without_image": sum(not r["images"] for r in real), "extraction": extraction}


def _leakage(without, backbone_accuracy):
    """MMStar's multi-modal leakage: the accuracy without image above that of the text backbone."""
    leakage = {}
    for name in ("value", "low", "high"):
        leakage[name] = round(max(0.0, without[name] - backbone_accuracy), 2)
    return leakage


# ---------------------------------------------------------------- as text


def sections(results):
    """{heading: {score: {value, low, high, n, ...}}}: conditions, gains, and gains over another."""
    headings = {}
    for name, scores in results.items():
        if name in CONDITIONS or name.startswith("gain_over_"):
            headings[name] = scores
    for condition, scores in results.get("compared", {}).items():
        headings[f"{condition} - {Path(results['compared_with']).name}"] = scores
    return headings


def is_overall(score):
    """Whether a score is about all records, and not those of one category."""
    return "," not in score or ", mean of" in score


def remark(entry):
    """The verdict of a gain, or the number of predictions without a readable answer."""
    if "verdict" in entry:
        return entry["verdict"]
    return f"{entry['unparsed']} unparsed"


def print_scores(results):
    """One line per score about all records: with an interval, other conditions, gain on --compare.

    exact_match   38.4 [34.8, 42.0]   0.0   21.2   +13.5 [10.1, 16.9] gain
    """
    others = [c for c in CONDITIONS[1:] if c in results]
    compared = results.get("compared", {}).get("real", {})
    header = f"{'percent':28s}{'real':22s}" + "".join(f"{c:10s}" for c in others)
    if compared:
        header += f"over {Path(results['compared_with']).name}"
    print(header.rstrip())
    for name, entry in results.get("real", {}).items():
        if not is_overall(name):
            continue
        line = f"{name:28s}{interval(entry):22s}"
        for condition in others:
            value = results[condition].get(name, {}).get("value")
            line += f"{value:<10.1f}" if value is not None else " " * 10
        if name in compared:
            line += f"{interval(compared[name], '+')} {compared[name]['verdict']}"
        print(line.rstrip())
    unparsed = max((entry["unparsed"] for entry in results.get("real", {}).values()), default=0)
    print(
        f"{results['kind']}: {results['records']} records, {results['skipped']} skipped; "
        f"with the real image, {unparsed} answers are unparsed"
    )


def interval(entry, sign="", digits=1):
    """'38.4 [34.8, 42.0]' of a score or a gain; 'undefined' if it is 0 / 0."""
    if entry["value"] is None:
        return "undefined"
    value = f"{entry['value']:{sign}.{digits}f}"
    if entry["low"] is None:
        return value
    return f"{value} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
