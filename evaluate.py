"""Stage 5: what was gained, and does it come from the picture?

**On masked captions** that were not trained on, the model fills each mask (greedily) three times: with the real picture,
with a grey one of the same size, and with the picture of another record. What the real picture adds
(gain_over_blank, gain_over_shuffled) is the model's reliance on it.

    exact_match       the answer is the hidden text, after normalisation                     (reward.py: exact_match)
    prefix_credit     or a strict prefix of it, ending on a token                            (reward.py: prefix_credit)
    word_credit       order-aware F1 of the words                                            (reward.py: word_credit)
    visual_agreement  CLIP: does the filled sentence fit the *real* picture?                 (reward.py: ClipScorer)
    format_ok         the share that is <think>...</think><answer>...</answer> at all

A caption can be wrong, and then so is exact_match; toy_world.py knows the truth and measures against it too.

**On a benchmark**, a TSV of VLMEvalKit, every row is asked with its pictures, without any, and with those of another row.
BENCHMARKS below has a line for each kind. No judge is called: rules extract the answers, and what they cannot read is
unparsed, counted, and wrong (POPE's own rule makes it a yes).

All figures are percentages with a 95% bootstrap interval over pictures (of masks: captions), since questions about one are
not independent; gains between conditions and against --compare are paired. The page shows them, with the curves of the
training that the model comes from, and examples.

    python evaluate.py                                                               # the toy world's base model
    python evaluate.py --model run/checkpoint-500 --data masks_val.jsonl --out eval --compare eval_base
    python evaluate.py --model run/checkpoint-500 --data MMBench_DEV_EN.tsv --out mmb --compare mmb_base
    torchrun --nproc_per_node 8 evaluate.py --model ... --data ... --out ...

in:   JSONL of build_masks.py, or a .tsv
out:  OUT/predictions.jsonl of masks {id, image, sentence, start, end, answer, condition, prediction, and the metrics above};
      a record without another readable picture has no shuffled prediction
      of a .tsv {index, condition, prediction, extracted, right, unparsed, truth, ...}
      OUT/results.json {model, data, kind, rows, written, skipped, real: {score: {value, low, high, n, unparsed}}, blank or
      without, shuffled, gain_over_*, compared: {condition: {score: {value, low, high, n, verdict}}}}, OUT/results.html
      of MM-Vet only OUT/mmvet.json, for its grader
"""
import argparse
import ast
import base64
import collections
import contextlib
import copy
import csv
import hashlib
import html
import io
import itertools
import json
import math
import random
import re
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from build_masks import read_masks
from grpo_train import Policy, decode
from reward import FILL_PROMPT, add_arguments, exact_match, load_reward, parse_completion, semantic_credit
from score_dependency import (HEAD, BadRecord, chat_prompt, cli, distributed, encode_prompt, fail, fail_if_empty, fingerprint,
                              image_root, join_prompts, load_image, load_vlm, map_jsonl, open_image, picture_uri, positive,
                              read_jsonl, write_atomically)

# ------------------------------------------------------------------- masked captions

CONDITIONS = ("real", "blank", "without", "shuffled")                            # blank: of masks; without: of benchmarks
METRICS = ("exact_match", "prefix_credit", "word_credit", "visual_agreement", "format_ok")


@torch.no_grad()
def generate(policy, processor, prompts, max_new_tokens):
    """Greedy completions of B prompts of encode_prompt(). Special tokens are left out."""
    batch = join_prompts(policy.model, prompts)
    ids, mask = policy.sample(batch, *policy.prefill(batch), torch.zeros(len(prompts), max_new_tokens))
    return decode(processor, ids, mask)


def other_image(names, i, load):
    """load(name) of a picture that differs from names[i]: half the list away, or the next readable one; None if none."""
    for j in range(len(names)):
        name = names[(i + len(names) // 2 + j) % len(names)]
        if name != names[i]:
            with contextlib.suppress(BadRecord):
                return load(name)


def measure(record, prediction, tokenizer):
    """The metrics of one prediction that need no model."""
    answer, target = parse_completion(prediction), record["answer"]
    return {"exact_match": exact_match(answer or "", target),
            "prefix_credit": semantic_credit(answer, target, "prefix", tokenizer) if answer else 0.0,
            "word_credit": semantic_credit(answer, target, "words") if answer else 0.0,
            "format_ok": float(answer is not None)}


def score_masks(rows):
    """The mean of every metric that the predictions have."""
    return {m: (100, [share(rows, m)], rows) for m in METRICS if m in rows[0]}


def mask_index(record):
    return record["id"], record.get("start"), record["sentence"]


# ------------------------------------------------------------------- a benchmark: reading its rows

ASKED = ("real", "without", "shuffled")
KEPT = ("index", "truth", "group", "copy", "options", "unit", "category", "l2-category", "split", "task", "question_type",
        "answer_type", "figure", "pair", "key")                                         # columns that stay with a prediction
csv.field_size_limit(2**31 - 1)                                                  # a picture is a field


def tsv_fields(path, offset=0):
    """Yields (byte offset, line number, fields) of the records of a TSV as pandas writes it, from `offset` on."""
    at, line = offset, 0
    with open(path, "rb") as f:
        f.seek(offset)

        def lines():
            nonlocal at, line
            for raw in f:
                at, line = at + len(raw), line + 1
                yield raw.decode("utf-8" if offset or line > 1 else "utf-8-sig", errors="replace")
        begin = at, 1
        try:
            for fields in csv.reader(lines(), delimiter="\t"):
                yield *begin, fields
                begin = at, line + 1
        except csv.Error as e:
            fail(f"{path}: line {line}: {e}")


def literal(text):
    """The list that a field like "['a', 'b']" stands for; None if it is none, or holds what JSON does not know."""
    try:
        value = ast.literal_eval(text.strip()) if text.strip().startswith("[") else None
        json.dumps(value)                                                        # a model may write [1, ...] or [{1, 2}]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def read_tsv(path):
    """(columns, [(line, row or BadRecord)], {picture: offset}). row: the fields as text, options {letter: text}, group and
    copy of CircularEval (index modulo and by 1,000,000, if any row repeats the options of another so), and image, which names
    a picture. An empty field is absent; None, NA or nan are words like any other, which pandas would drop."""
    whole = lambda index: re.sub(r"^(\d+)\.0+$", r"\1", index.strip())             # as pandas writes a column that had gaps
    records = tsv_fields(path)
    header = [name.replace("l2_category", "l2-category") for name in next(records, (0, 0, []))[2]]
    if missing := {"index", "question", "answer"} - set(header):
        fail(f"{path}: no column {', '.join(sorted(missing))}; a benchmark is a TSV of VLMEvalKit with answers")
    rows, seen, place = [], set(), {}                                            # place: {index: (picture, offset)}
    for offset, line, fields in records:
        row = dict(zip(header, fields))
        index = whole(row.get("index", ""))
        if len(fields) != len(header):
            lines = ", over several lines: a quote that is not closed?" if any("\n" in f for f in fields) else ""
            row = BadRecord(f"row {index}: {len(fields)} columns instead of {len(header)}{lines}")
        elif not index or index in seen:
            row = BadRecord(f"row {index}: its index stands twice" if index else "the index is missing")
        else:
            seen.add(index)
            image = row.get("image", "")
            if len(image) > 64:
                place[index] = hashlib.sha256(image.encode()).hexdigest(), offset
            number = int(index) if index.isdecimal() else None
            row.update(index=index, image=whole(image) if len(image) <= 64 else index, number=number,
                       group=index if number is None else str(number % 10**6), copy=(number or 0) // 10**6,
                       options={c: row[c] for c in string.ascii_uppercase if row.get(c)})
        rows.append((line, row))
    good = {row["index"]: row for _, row in rows if isinstance(row, dict)}
    texts = lambda index: sorted(good[index]["options"].values()) if index in good else None
    if not any(row["copy"] and row["options"] and texts(row["index"]) == texts(row["group"]) for row in good.values()):
        for row in good.values():                                                # large numbers, and no copies
            row.update(group=row["index"], copy=0)
    for i, (line, row) in enumerate(rows):
        if isinstance(row, dict) and row["image"]:
            if row["image"] not in place:
                rows[i] = line, BadRecord(f"row {row['index']}: its image is that of row {row['image']}, which has none")
            else:
                row["image"] = place[row["image"]][0]
        elif isinstance(row, dict) and row.get("image_path") and "image" not in header:
            row["image"] = row["image_path"]
    return header, rows, dict(place.values())


def load_pictures(path, column, offset, max_pixels):
    """The PIL images of the row that begins at `offset`: base64, or a list of it in brackets."""
    text, images = next(tsv_fields(path, offset))[2][column], []
    for n, item in enumerate(literal(text) or [text], 1):
        try:
            data = base64.b64decode("".join(str(item).partition("base64,")[2].split() or str(item).split()), validate=True)
        except ValueError as e:
            raise BadRecord(f"image {n} is not base64 ({e})") from None
        images.append(open_image(io.BytesIO(data), n, max_pixels))
    return images


def rotations(row):
    """The k questions of CircularEval for a row without copies: in copy j, letter i holds option i + j."""
    letters, texts = list(row["options"]), list(row["options"].values())
    for j in range(len(letters)):
        turned = {c: texts[(i + j) % len(texts)] for i, c in enumerate(letters)}
        index = row["index"] if not j else f"{row['index']}+{j}" if row["number"] is None else str(row["number"] + j * 10**6)
        yield {**row, "index": index, "copy": j, "options": turned,
               "truth": letters[(letters.index(row["truth"]) - j) % len(letters)]}


def question_text(row, ending):
    """VLMEvalKit's prompt: hint, question, options, and the request of the benchmark."""
    if not row["options"] or {"choices", "question_type"} <= set(row):           # MathVista's questions have all in them
        return row["question"] + ("" if ending.strip().rstrip(".").lower()[-9:] in row["question"].lower() else ending)
    hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    return f"{hint}Question: {row['question']}\nOptions:\n" + "".join(f"{c}. {o}\n" for c, o in row["options"].items()) + ending


# ------------------------------------------------------------------- a benchmark: the true answer and the extracted one


def true_option(row):
    letter = row["answer"].strip().upper()
    if len(row["options"]) < 2 or letter not in row["options"]:
        raise BadRecord(f"the answer {letter or '(none)'} is none of the options {''.join(row['options'])}")
    return letter


def true_yes_no(row):
    if row["answer"].strip().lower() not in ("yes", "no"):
        raise BadRecord(f"the answer {row['answer'] or '(none)'} is neither yes nor no")
    return row["answer"].strip().lower()


def true_texts(row):
    """All answers that count: one, or a list in brackets."""
    if not row["answer"].strip():
        raise BadRecord("the answer is missing")
    return [str(a) for a in literal(row["answer"]) or [row["answer"]]]


def true_hallusion(row):
    """Index: category_subcategory_input_set_figure_question. Official: VS with figure 0, which shows none, has no fAcc."""
    parts = row["index"].split("_")
    if len(parts) != 6:
        raise BadRecord("the index is not of the form VS_chart_1_set_figure_question")
    row["unit"] = "_".join((parts[0], parts[1], parts[3]))
    row["figure"] = None if parts[0] == "VS" and parts[4] == "0" else f"{row['unit']}_{parts[4]}"
    row["pair"] = f"{row['unit']}_{parts[5]}"
    return true_yes_no(row)


def true_wemath(row):
    """A problem (ID) of two or three steps is a question for each step, and one for the whole (multi)."""
    if not re.fullmatch(r"2steps_([12]|multi)|3steps_([123]|multi)", row.get("key", "")) or not row.get("ID"):
        raise BadRecord(f"the key {row.get('key')} is not of the form 2steps_1 or 3steps_multi, or the ID is missing")
    row["unit"] = f"{row['key'][0]} {row['ID']}"
    return true_option(row)


def true_math(row):
    answer, kind = true_texts({"answer": row["answer"] or row.get("answer_option", "")})[0], row.get("answer_type")
    letter = row.get("answer_option", "").strip(" ().").upper()
    try:
        if row.get("question_type") == "multi_choice":
            choices = literal(row.get("choices", "")) or row["options"].values()
            row["options"] = dict(zip(string.ascii_uppercase, map(str, choices)))
            return next(c for c, o in row["options"].items() if (c == letter if letter else o == row["answer"]))
        row["digits"] = int(float(row.get("precision") or 0)) or len(row["answer"].partition(".")[2])
        if kind == "list" and literal(row["answer"]) is None:
            raise ValueError
        return (int(float(answer)) if kind == "integer" else round(float(answer), row["digits"]) if kind == "float" else
                literal(row["answer"]) if kind == "list" else row["answer"])
    except (ValueError, StopIteration, OverflowError):
        raise BadRecord(f"the answer {row['answer']!r} is no {kind or row.get('question_type')}") from None


def said(prediction):
    """What counts of a completion, without its thought: the last <answer>, or all of it; of an unfinished thought, nothing."""
    rest = re.sub(r"^\s*<think>.*", "", prediction.rpartition("</think>")[2], flags=re.DOTALL)
    return (re.findall(r"<answer>(.*?)</answer>", rest, re.DOTALL) or [rest])[-1].strip()


ARTICLE = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=\bis\s))A(?=\s+(?!(?:is|was|because|since|as|or|and|if|with|given|for|in|on|at|by|"
                     r"here|based|would|could|should|must|seems?|looks?|has|shows?|matches|fits|describes)\b)[a-z])")
ANSWER_IS = re.compile(r"""(?i:answer\s*(?:is|:)\s*:?\s*(?:option\s+)?)["'(\[*]*([A-Z]\b|[a-z](?=\W*$))""")


def find_option(row, text):
    """The letter that `text` names, or None: VLMEvalKit's can_infer. Punctuation becomes spaces; exactly one option letter
    among the words, and one of the last four; else "answer is X"; else exactly one option's text inside an answer of at
    most twice the length of all options. Ours: the A of "A dog" is an article (theirs counts it), a lone letter may be
    lower-case, an answer that is one option's text is that option (10 of 1 and 10), and what cannot be read is wrong (with a
    judge, theirs ends in a random guess)."""
    options, whole, text = row["options"], text, ARTICLE.sub(" ", text)
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    if len(words) == 1 and words[0].upper() in options:
        return words[0].upper()
    letters, named = set(words) & set(options), {c.upper() for c in ANSWER_IS.findall(text)}
    if len(letters) == 1 and letters & set(words[-4:]):
        return letters.pop()
    if len(named) == 1 and named <= set(options):
        return named.pop()
    inside = [c for c, o in options.items() if exact_match(whole, o)] or [
        c for c, o in options.items() if o.lower() in whole.lower()]
    return inside[0] if len(inside) == 1 and len(whole) <= 2 * sum(map(len, options.values())) else None


def find_pope(row, text):
    """POPE's rule: up to the first full stop, without commas; no, not or No among the words is a no, all else a yes. None,
    which counts as that yes, says that there was no word of either kind."""
    words = set(text.split(".")[0].replace(",", "").split())
    return "no" if words & {"no", "not", "No"} else "yes" if re.search(r"\byes\b", text, re.I) else None


def find_mme(row, text):
    """MME's rule: yes, else no, within the first four characters."""
    return next((a for a in ("yes", "no") if a in text.lower()[:4]), None)


def find_yes_no(row, text):
    """VLMEvalKit's rule: one of the words yes and no, and not the other."""
    found = {"yes", "no"} & set(re.findall(r"[a-z']+", text.lower()))
    return found.pop() if len(found) == 1 else None


def find_math(row, text):
    """By rule, where the official script asks an LLM: the option, the last number or list, or the text."""
    kind = row.get("answer_type")
    if row.get("question_type") == "multi_choice":
        return find_option(row, text)
    if kind == "list":
        return next((v for t in reversed(re.findall(r"\[[^\[\]]*\]", text)) if (v := literal(t)) is not None), None)
    if kind not in ("integer", "float"):
        return text or None
    numbers = re.findall(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?", text.replace("\u2212", "-"))
    value = float(numbers[-1].replace(",", "")) if numbers else math.inf
    return None if math.isinf(value) else int(value) if kind == "integer" else round(value, row["digits"])


def same(truth, answer):
    return truth == answer or isinstance(truth, str) and isinstance(answer, str) and exact_match(answer, truth) > 0


def relaxed(target, answer):
    """ChartQA: |p - t| / |t| <= 0.05 for numbers, where a trailing % divides by 100; a target that is zero or no number must
    be equal but for case. So "5%" against "5" is wrong."""
    def number(text):
        try:
            value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
        return value if math.isfinite(value) else None
    p, t = number(answer), number(target)
    return abs(p - t) / abs(t) <= 0.05 if p is not None and t else answer.lower() == target.lower()


# ------------------------------------------------------------------- a benchmark: scores
#
#     A score is a sum of ratios of sums over rows: {name: (scale, [[(unit, numerator, denominator), ...], ...], rows)}.
#     Rows that depend on each other (copies of a question, two questions about one picture) share a unit of the bootstrap.


def share(rows, top="right", bottom=None):
    """One ratio: top and bottom are fields, or functions of a row; bottom None counts rows."""
    value = lambda r, f: 1.0 if f is None else float(f(r) if callable(f) else r[f])
    return [(r["unit"], value(r, top), value(r, bottom)) for r in rows]


def by(rows, column, several=False):
    """{value: rows} of a column; several: it may list more than one, with commas, and a row counts in each."""
    groups = collections.defaultdict(list)
    for row in rows:
        value = str(row.get(column) or "")
        for value in filter(None, (v.strip() for v in (value.split(",") if several else [value]))):
            groups[value].append(row)
    return dict(sorted(groups.items()))


def accuracy(rows, columns=("category", "l2-category", "split"), name="accuracy"):
    """Right / rows: of all, of every value of the columns, and the mean over the first column's values."""
    scores = {name: (100, [share(rows)], rows)}
    for column in columns:
        parts = by(rows, column) if column in rows[0] else {}
        if column == columns[0] and len(parts) > 1:
            scores[f"{name}, mean of {column}"] = 100 / len(parts), [share(part) for part in parts.values()], rows
        scores |= {f"{name}, {column} {value}": (100, [share(part)], part) for value, part in parts.items()}
    return scores


def together(rows, key, size=lambda row: 1):
    """A row for each value of `key`, right if all its rows are; groups of fewer rows than size(row) are left out."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return [{**g[0], "right": all(r["right"] for r in g), "unparsed": any(r["unparsed"] for r in g)}
            for value, g in groups.items() if value is not None and len(g) >= size(g[0])]


def score_options(rows):
    """Vanilla: the rows as they are, copies apart. CircularEval, if there are copies: a question is right if it is in each of
    its k rotations; one that lacks a copy, because its row was unusable, is left out (see n)."""
    first, whole = [r for r in rows if not r["copy"]], together(rows, "group", lambda row: len(row["options"]))
    scores = accuracy(first) if first else {}
    return {**scores, **accuracy(whole, name="circular")} if whole and any(r["copy"] for r in rows) else scores


def score_pope(rows):
    """With yes as positive: accuracy, precision, recall, F1, and the share of yes among the *predictions*. Each split by
    itself, and pooled, where a row listed in three splits counts in each, as in the three official files."""
    splits = by(rows, "category", several=True)
    pooled, scores = list(itertools.chain(*splits.values())) or rows, {}
    yes, true = lambda r: r["extracted"] != "no", lambda r: r["truth"] == "yes"
    for name, part in [("", pooled), *((f", category {s}", part) for s, part in splits.items())]:
        hit, either = lambda r: yes(r) and true(r), lambda r: yes(r) + true(r)
        for metric, ratio in (("accuracy", share(part)), ("precision", share(part, hit, yes)), ("recall", share(part, hit, true)),
                              ("F1", share(part, lambda r: 2 * hit(r), either)), ("yes ratio", share(part, yes))):
            scores[metric + name] = 100, [ratio], part
    return scores


MME = {"perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
       "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")}


def score_mme(rows):
    """accuracy; accuracy+ = pictures with both questions right, of those with two; MME's score of a category is their sum,
    at most 200, and perception and cognition are sums of it. A picture that lacks a question has no accuracy+ (see n)."""
    scores, sums = accuracy(rows, ("category",)), {}
    for category, part in by(rows, "category").items():
        both = together(part, "unit", lambda row: 2)
        scores[f"accuracy+, category {category}"] = 100, [share(both)], both
        scores[f"score, category {category}"] = 100, [share(part), share(both)], part
        for name in (n for n, members in MME.items() if category in members):
            ratios, used = sums.get(name, ([], []))
            sums[name] = ratios + [share(part), share(both)], used + part
    return {**{name: (100, ratios, used) for name, (ratios, used) in sums.items()}, **scores}


def score_hallusion(rows):
    """aAcc: questions; fAcc: figures with all questions right; qAcc: questions right on all their figures; and their mean.
    What a skipped row, or one without the condition's picture, leaves of a figure counts as the figure."""
    parts = {"aAcc": rows, "fAcc": together(rows, "figure"), "qAcc": together(rows, "pair")}
    return {**{name: (100, [share(part)], part) for name, part in parts.items()},
            "mean": (100 / 3, [share(part) for part in parts.values()], rows)}


def score_wemath(rows):
    """Official: a problem is mastered (CM) if the whole and its steps are right; its whole is wrong for a step that is wrong too,
    insufficient knowledge (IK), or in spite of them, inadequate generalisation (IG); right in spite of a step that is wrong,
    rote memorisation (RM, of the wholes that are right). Loose: one right step makes it mastery. score = CM + IG / 2."""
    problems, found = collections.defaultdict(list), []
    whole = lambda r: r["key"].endswith("multi")
    for row in rows:
        problems[row["unit"]].append(row)
    for problem in problems.values():
        steps, right = [r["right"] for r in problem if not whole(r)], [r["right"] for r in problem if whole(r)]
        if len(right) == 1 and len(steps) == int(problem[0]["key"][0]):            # one that lacks a question is left out (see n)
            found.append({**problem[0], "right": right[0], "all": all(steps), "any": any(steps),
                          "unparsed": any(r["unparsed"] for r in problem)})
    parts = {"one step": [r for r in rows if not whole(r)], **{
        f"{n} steps": [r for r in rows if whole(r) and r["key"][0] == digit] for n, digit in (("two", "2"), ("three", "3"))}}
    scores = {"accuracy": rows, **parts}
    scores = {name: (100, [share(part)], part) for name, part in scores.items() if part}
    scores |= {name: (100, [share(found, f)], found) for name, f in (
        ("IK", lambda r: not r["right"] and not r["all"]), ("IG", lambda r: not r["right"] and r["all"]))}
    for kind, enough in (("strict", "all"), ("loose", "any")):
        mastered = lambda r, e=enough: r["right"] and r[e]
        scores |= {f"score {kind}": (100, [share(found, lambda r, m=mastered: m(r) or (r["all"] and not r["right"]) / 2)], found),
                   f"CM {kind}": (100, [share(found, mastered)], found),
                   f"RM {kind}": (100, [share(found, lambda r, e=enough: r["right"] and not r[e], "right")], found)}
    return scores


def score_math(rows):
    return accuracy(rows, ("question_type", "answer_type", "task"))


def resample(scores, draws=1000):
    """{name: (value, (draws,) bootstrap values)}: all scores on the same resampled units, so that they can be subtracted. A
    ratio 0 / 0 is 0; draws that leave a ratio without rows are left out."""
    ratios = [ratio for _, parts, _ in scores.values() for ratio in parts]
    units = {u: i for i, u in enumerate(dict.fromkeys(u for ratio in ratios for u, _, _ in ratio))}
    sums, rng = np.zeros((len(units), 2, len(ratios))), np.random.default_rng(0)
    for j, ratio in enumerate(ratios):
        for unit, top, bottom in ratio:
            sums[units[unit], :, j] += top, bottom
    flat = sums.reshape(len(units), -1)
    drawn = np.stack([flat.sum(0), *(np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units)) @ flat
                                     for _ in range(draws))]).reshape(-1, 2, len(ratios))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = drawn[:, 0] / drawn[:, 1]
    shares[0] = np.nan_to_num(shares[0])
    ends = np.cumsum([0, *(len(parts) for _, parts, _ in scores.values())])
    return {name: ((v := scale * shares[:, a:b].sum(1))[0], v[1:])
            for (name, (scale, _, _)), a, b in zip(scores.items(), ends, ends[1:])}


def interval(value, drawn):
    """{value, low, high}: 2.5% and 97.5% of the bootstrap."""
    low, high = np.nanpercentile(drawn, (2.5, 97.5)) if not np.isnan(drawn).all() else (value, value)
    return {"value": round(float(value), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def with_intervals(scores):
    return {name: {**interval(*both), "n": len({r["index"] for r in scores[name][2]}),
                   "unparsed": len({r["index"] for r in scores[name][2] if r["unparsed"]})}
            for name, both in (resample(scores) if scores else {}).items()}


def gains(score, mine, other):
    """Scores of `mine` less those of `other` on the rows that both have; the verdict is noise if the interval holds 0, or there
    are fewer than ten units, whose resampling says nothing."""
    common = {r["index"] for r in mine} & {r["index"] for r in other}
    a, b = ({} if not common else score([r for r in rows if r["index"] in common]) for rows in (mine, other))
    drawn = resample({(i, n): s for i, scores in enumerate((a, b)) for n, s in scores.items()}) if common else {}
    found = {n: {**interval(drawn[0, n][0] - drawn[1, n][0], drawn[0, n][1] - drawn[1, n][1]),
                 "n": len({r["index"] for r in a[n][2]})} for n in a if n in b}
    few = {n for n in found if len({r["unit"] for r in a[n][2]}) < 10}
    return {n: {**g, "verdict": "noise" if n in few or g["low"] <= 0 <= g["high"] else "gain" if g["value"] > 0 else "loss"}
            for n, g in found.items()}


# ------------------------------------------------------------------- the benchmarks: a line each

LETTER, SHORT = "Please select the correct answer from the options above.", "\nAnswer the question using a single word or phrase."
YES_NO = " Please answer yes or no."
any_of = lambda equal: lambda truths, answer: any(equal(t, answer) for t in truths)
text_of = lambda row, text: text or None
Kind = collections.namedtuple("Kind", "file ending truth find equal score")
BENCHMARKS = {  # name of the file   request   true answer     extraction   equality          scores
    "mmbench":   Kind(r"mmbench|ccbench", LETTER, true_option, find_option, same, score_options),  # makes the rotations, if need be
    "mcq":       Kind(r"mmstar|blink", LETTER, true_option, find_option, same, score_options),
    "wemath":    Kind(r"we-?math", LETTER, true_wemath, find_option, same, score_wemath),
    "pope":      Kind(r"pope", YES_NO, true_yes_no, find_pope, lambda t, a: t == (a or "yes"), score_pope),
    "mme":       Kind(r"(?<![a-z])mme(?![a-z-])", YES_NO, true_yes_no, find_mme, same, score_mme),
    "hallusion": Kind(r"hallusion", YES_NO, true_hallusion, find_yes_no, same, score_hallusion),
    "yesno":     Kind(None, YES_NO, true_yes_no, find_yes_no, same, accuracy),
    "chartqa":   Kind(r"chartqa", SHORT, true_texts, text_of, any_of(relaxed), lambda rows: accuracy(rows, ("split",))),
    "mathvista": Kind(r"mathvista", "", true_math, find_math, same, score_math),
    "mmvet":     Kind(r"mm-?vet", "", lambda row: row["answer"], text_of, lambda t, a: False, None),
    "exact":     Kind(None, SHORT, true_texts, text_of, any_of(same), accuracy)}


def kind_of(path, header, rows):
    """By the name of the file, else by its columns and answers."""
    for name, kind in BENCHMARKS.items():
        if kind.file and re.search(kind.file, Path(path).stem.lower()):
            return name
    answers = {r["answer"].strip().lower() for _, r in rows if isinstance(r, dict)} - {""}
    return ("mcq" if {"A", "B"} <= set(header) else "mathvista" if {"question_type", "answer_type"} <= set(header) else
            "yesno" if answers and answers <= {"yes", "no"} else "exact")


def questions(rows, name, limit):
    """The rows to ask, with their truth, in the order of the file: those of the first `limit` questions, copies with them."""
    kind, asked, groups, units = BENCHMARKS[name], [], set(), {}
    copies = any(r["copy"] for _, r in rows if isinstance(r, dict))
    for line, row in rows:
        if isinstance(row, dict):
            groups |= {row["group"]} if limit is None or len(groups) < limit else set()
            if row["group"] not in groups:
                continue
            picture = row.get("image_path") or row["image"] or row["index"]
            row["unit"] = units.setdefault(row["group"], f"{row.get('category')} {picture}" if name == "mme" else picture)
            try:
                row["truth"] = kind.truth(row)
            except BadRecord as e:
                row = BadRecord(f"row {row['index']}: {e}")
        make = rotations(row) if name == "mmbench" and not copies and isinstance(row, dict) else [row]
        asked += [(line, r) for r in make]
    return asked


def ask(policy, processor, prompts, max_new_tokens):
    """generate() of prompts with any number of pictures: those with as many run together."""
    alike, texts = collections.defaultdict(list), [None] * len(prompts)
    for i, (images, prompt) in enumerate(prompts):
        alike[images, *prompt].append(i)
    for places in alike.values():
        for i, text in zip(places, generate(policy, processor, [prompts[i][1] for i in places], max_new_tokens)):
            texts[i] = text
    return texts


def benchmark(args, root, rank, device):
    """Asks every row under every condition, keeps the predictions, and writes the scores."""
    if not Path(args.data).is_file():
        fail(f"{args.data}: no such file")
    header, rows, offsets = read_tsv(args.data)
    name = args.kind or kind_of(args.data, header, rows)
    kind, rows = BENCHMARKS[name], questions(rows, name, args.limit)
    names = [r["image"] for _, r in rows if isinstance(r, dict) and r["image"]]
    places = itertools.count()
    for _, row in rows:
        if isinstance(row, dict):
            row["place"] = next(places) if row["image"] else None
    conditions = [c for c in ASKED if c in args.conditions and (kind.score or c == "real")]
    if args.backbone_accuracy is not None and name != "mcq":
        fail(f"--backbone-accuracy is for the leakage of MMStar, and such multiple choice; {args.data} is read as {name}")

    def load(image):
        if image in offsets:
            return load_pictures(args.data, header.index("image"), offsets[image], args.max_pixels)
        return [load_image(root, path, args.max_pixels) for path in literal(image) or [image]]

    def start():
        model, processor = load_vlm(args.model, device, args.trust_remote_code)
        policy, of_thread = Policy(model, processor, temperature=0), copy.deepcopy(processor)

        def prepare(row):
            try:
                shown = {"real": load(row["image"]) if row["image"] else [], "without": []}
                if row["image"] and "shuffled" in conditions:
                    shown["shuffled"] = other_image(names, row["place"], load)
                text = question_text(row, kind.ending)
                encode = lambda images: encode_prompt(model, of_thread, chat_prompt(of_thread, text, len(images)), images,
                                                      args.max_new_tokens)
                return row, {c: (len(shown[c]), encode(shown[c])) for c in conditions if shown.get(c) is not None}
            except BadRecord as e:
                raise BadRecord(f"row {row['index']}: {e}") from None

        def process(prepared):
            made = [[] for _ in prepared]
            for condition in conditions:
                here = [b for b, (_, prompts) in enumerate(prepared) if condition in prompts]
                texts = ask(policy, processor, [prepared[b][1][condition] for b in here], args.max_new_tokens)
                for b, text in zip(here, texts):
                    row, images = prepared[b][0], prepared[b][1][condition][0]
                    answer = kind.find(row, said(text))
                    right = (answer is not None or name == "pope") and bool(kind.equal(row["truth"], answer))
                    made[b].append({**{k: row[k] for k in KEPT if k in row}, "condition": condition, "images": images,
                                    "prediction": text, "extracted": answer, "unparsed": answer is None, "right": right})
            return made
        return prepare, process

    settings = {"stage": "evaluate", "kind": name, "conditions": conditions, "model": fingerprint(args.model),
                "data": fingerprint(args.data), "limit": args.limit, "max_pixels": args.max_pixels,
                "max_new_tokens": args.max_new_tokens}
    known = {r["index"]: r for _, r in rows if isinstance(r, dict)}
    look = lambda index: (load(known[index]["image"]) if known[index]["image"] else [], question_text(known[index], ""))
    finish(args, rank, rows, start, settings, name, kind.score, look)


# ------------------------------------------------------------------- the page


INKS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()                 # Okabe and Ito: told apart by everybody
DASHES = "none", "8 3", "2 3", "8 3 2 3", "12 4", "4 2"                         # and in print
PAGE = HEAD + """h2{font-size:1.15rem;margin:2rem 0 .5rem;border-top:1px solid var(--line);padding-top:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:1rem 1.5rem}
figure{margin:0;break-inside:avoid}figcaption{font-size:.8rem}figcaption b{color:var(--ink);display:block}
figcaption span{white-space:nowrap}
figcaption svg{vertical-align:middle;margin:0 .3em 0 .6em}.chart{width:100%;height:auto;display:block;font:10px system-ui}
text{fill:var(--dim)}.g{stroke:var(--line);fill:none}.i{stroke:var(--ink);stroke-width:2}.v{fill:var(--ink)}
summary{color:var(--dim);font-size:.8rem;cursor:pointer}
article{display:flex;gap:1rem;margin:.8rem 0;break-inside:avoid}article>div{min-width:0}
article p{margin:0 0 .3rem;white-space:pre-wrap;overflow-wrap:anywhere}.pictures{flex:0 0 8rem}.pictures img{width:100%;height:auto}
.tiny{image-rendering:pixelated}
dl{margin:0;font-size:.85rem;display:grid;grid-template-columns:auto 1fr;gap:0 .8rem}dt{color:var(--dim)}dd{margin:0;
 overflow-wrap:anywhere}
</style><header><h1>$title</h1></header><main>
"""


def ticks(low, high, n=4):
    """About n round numbers from at most `low` to at least `high`."""
    width = high - low if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else 0
    rough = (width or (abs(high) if abs(high) > 1e-9 else 1)) / n
    step = next(s for m in (1, 2, 5, 10) if (s := m * 10.0**math.floor(math.log10(rough))) >= rough * 0.999)
    first = math.floor(low / step)
    return [float(f"{k * step:.12g}") for k in range(first, max(math.ceil(high / step), first + 1) + 1)]


def chart(title, lines, smooth=1):
    """A figure of lines {name: [(x, y) or (x, y, low, high), ...]}, whiskers from low to high, and the numbers as a table.
    smooth > 1: every value faint, the mean over the last so many bold, and no table."""
    lines = {name: [p for p in line if all(v is not None and math.isfinite(v) for v in p)] for name, line in lines.items()}
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    xs, values, body, keys = sorted({p[0] for p in points}), [v for _, *ys in points for v in ys], [], []
    across, up = (xs if 1 < len(xs) <= 7 else ticks(xs[0], xs[-1])), ticks(min(values), max(values))
    X = lambda x: 40 + 290 * (x - across[0]) / (across[-1] - across[0])
    Y = lambda y: 150 - 140 * (y - up[0]) / (up[-1] - up[0])
    trace = lambda line: "M" + "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y, *_ in line)
    body += [f'<path class=g d="M40 {Y(y):.1f}H330"/><text x=36 y={Y(y) + 3:.1f} text-anchor=end>{y:g}</text>' for y in up]
    body += [f'<text x={X(x):.1f} y=164 text-anchor=middle>{x:g}</text>' for x in across]
    for k, (name, line) in enumerate((n, line) for n, line in lines.items() if line):
        style = f'stroke="{INKS[k % 6]}" stroke-dasharray="{DASHES[k % 6]}" stroke-width=2 fill=none'
        keys.append(f'<span><svg width=28 height=8><path {style} d="M0 4H28"/></svg>{html.escape(name)}</span> ')
        if smooth > 1:
            body.append(f'<path stroke="{INKS[k % 6]}" stroke-width=1 opacity=.3 fill=none d="{trace(line)}"/>')
            means = [sum(y for _, y in line[max(0, i + 1 - smooth):i + 1]) / min(i + 1, smooth) for i in range(len(line))]
            line = [(x, mean) for (x, _), mean in zip(line, means)]
        body.append(f'<path {style} d="{trace(line)}"/>')
        for x, y, *ends in line if smooth == 1 else ():
            aside = f"{X(x) + 2 * (k - len(lines) / 2):.1f}"                     # whiskers beside each other
            body.append(f'<path stroke="{INKS[k % 6]}" d="M{aside} {Y(ends[0]):.1f}V{Y(ends[1]):.1f}"/>' if ends else "")
            body.append(f'<circle cx={X(x):.1f} cy={Y(y):.1f} r=3 fill="{INKS[k % 6]}"/>')
    cell = lambda line, x: next((f"{y:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
                                 for at, y, *ends in line if at == x), "")
    numbers = "" if smooth > 1 else "<details><summary>numbers</summary>" + table(
        ["", *(f"{x:g}" for x in xs)], [[name, *(cell(line, x) for x in xs)] for name, line in lines.items()]) + "</details>"
    return (f'<figure><figcaption><b>{html.escape(title)}</b>{"".join(keys)}</figcaption><svg class=chart viewBox="0 0 340 170" '
            f'role=img aria-label="{html.escape(title)}">{"".join(body)}</svg>{numbers}</figure>')


def table(columns, rows, digits=2):
    """A table of texts; a cell (low, value, high, note) is drawn as well, on the one axis of its column."""
    axes = [[v for row in rows if isinstance(row[c], tuple) for v in row[c][:3]] + [0] for c in range(len(columns))]

    def cell(content, axis):
        if not isinstance(content, tuple):
            return html.escape(str(content))
        x = lambda v: 5 + 130 * (v - min(axis)) / (max(axis) - min(axis) or 1)
        low, value, high, *note = content
        return (f'{value:.{digits}f} <small>[{low:.{digits}f}, {high:.{digits}f}] {html.escape(" ".join(note))}</small><br>'
                f'<svg width=140 height=12><path class=g d="M{x(0):.1f} 0V12"/><path class=i d="M{x(low):.1f} 6H{x(high):.1f}"/>'
                f'<circle class=v cx={x(value):.1f} cy=6 r=4 /></svg>')
    head = "".join(f"<th>{html.escape(c)}" for c in columns)
    return (f"<div class=wide><table><tr>{head}" + "".join("<tr>" + "".join(
        f"<td>{cell(content, axis)}" for content, axis in zip(row, axes)) for row in rows) + "</table></div>")


def overall(score):
    """Whether a score is about all rows, and not those of one category."""
    return "," not in score or ", mean of" in score


def score_table(heading, sections):
    """Conditions, or gains, side by side: {name: {score: {value, low, high, n, ...}}}; categories are folded away."""
    rows = {True: [], False: []}
    for m in dict.fromkeys(m for scores in sections.values() for m in scores):
        found = [scores.get(m) for scores in sections.values()]
        cells = ((s["low"], s["value"], s["high"], s.get("verdict") or f"{s['unparsed']} unparsed") if s else "" for s in found)
        rows[overall(m)].append([m, *cells, max(s["n"] for s in found if s)])
    columns = ["%", *sections, "rows"]
    return f"<h2>{html.escape(heading)}</h2>{table(columns, rows[True])}" + (
        f"<details><summary>by category</summary>{table(columns, rows[False])}</details>" if rows[False] else "")


PANELS = {"reward by part": ("reward_semantic", "reward_visual", "format_ok"), "entropy, nats a token": ("entropy",),
          "completion, tokens": ("completion_tokens",), "share of groups without a signal": ("zero_std_fraction",),
          "mean |advantage|": ("advantage_abs",), "loss": ("loss",), "KL to the reference, nats a token": ("kl",),
          "gradient norm": ("grad_norm",)}


def curves(metrics):
    """Charts of a metrics.jsonl of grpo_train.py."""
    rows = [row for _, row in read_jsonl(metrics, ("step",)) if isinstance(row, dict)]
    return "".join(chart(title, {m: [(r["step"], r[m]) for r in rows if m in r] for m in names}, max(2, len(rows) // 15))
                   for title, names in PANELS.items())


def examples(mine, theirs, look, k=4):
    """Cards of the k predictions from the real picture that gained most over `theirs` (without: that are best), of the k that
    lost most, and of k others at random."""
    value = lambda r: 0 if r is None else float(r["right"]) if "right" in r else r["exact_match"] + r["word_credit"]
    before, shuffled = ({r["index"]: r for r in rows} for rows in (theirs.get("real", ()), mine["shuffled"]))
    rows = [r for r in mine["real"] if not before or r["index"] in before]
    rows = random.Random(0).sample(rows, len(rows))                              # or ties would stand in the order of the file
    rows.sort(key=lambda r: value(before.get(r["index"])) - value(r))
    rest = rows[k:-k]

    def card(row):
        images, text = look(row["index"])
        pictures = "".join(f'<img class={"tiny" if max(size) < 160 else "photo"} src="{uri}" alt="the picture">'
                           for uri, *size in (picture_uri(image, 256) for image in images))
        right = "truth" if "truth" in row else "hidden text"
        said = {right: {"prediction": str(row.get("truth", row.get("answer")))}, "before": before.get(row["index"]),
                "after" if before else "answer": row, "another picture": shuffled.get(row["index"])}
        mark = lambda r: "" if "condition" not in r else "✓ " if r.get("right", r.get("exact_match")) else "✗ "
        return f"<article><div class=pictures>{pictures}</div><div><p>{html.escape(text)}</p><dl>" + "".join(
            f"<dt>{name}<dd>{mark(r)}{html.escape(r['prediction'][:400])}" for name, r in said.items() if r) + (
            "</dl></div></article>")
    chosen = {"Gained most" if before else "Best": rows[:k], "Lost most" if before else "Worst": rows[k:][-k:][::-1],
              "Random": random.Random(1).sample(rest, min(k, len(rest)))}
    return "".join(f"<h2>{title}</h2>{''.join(map(card, part))}" for title, part in chosen.items() if part)


def write_results_page(path, title, parts):
    """One file without any outside it."""
    write_atomically(path, [PAGE.replace("$title", html.escape(title)), *parts, "</main>\n"])


# ------------------------------------------------------------------- the report


def finish(args, rank, rows, start, settings, kind, score, look):
    """Predicts what is missing, and writes the report. look(index): the ([picture, ...], text) of a prediction."""
    out = Path(args.out, "predictions.jsonl")
    counts = map_jsonl(rows, start, out, settings, args.data, args.batch_size)
    fail_if_empty(out, counts, f"{args.data}: none of its {counts['rows']} rows could be asked; see above")
    if rank == 0:
        report(args, {"model": args.model, "data": args.data, "kind": kind, **counts}, settings, score, look)


def predictions_of(folder):
    """{condition: records with index, unit of the bootstrap, and unparsed}, and the settings, of an --out."""
    path, found = Path(folder, "predictions.jsonl"), collections.defaultdict(list)
    try:
        settings = json.loads(Path(f"{path}.run.json").read_text())["settings"]
    except (OSError, ValueError, LookupError):
        fail(f"{folder} holds no finished predictions of this script")
    for _, row in read_jsonl(path, ("condition",)):
        if "format_ok" in row:
            row |= {"index": mask_index(row), "unit": row["id"], "unparsed": not row["format_ok"]}
        found[row["condition"]].append(row)
    return found, settings


def report(args, results, settings, score, look):
    """Writes OUT/results.json and OUT/results.html, and prints them without what goes by category."""
    (found, _), others, sections = predictions_of(args.out), {}, {}
    if args.compare:
        others, theirs = predictions_of(args.compare)
        if differs := [k for k in ("stage", "kind", "data", "clip") if theirs.get(k) != settings.get(k)]:
            fail(f"--compare {args.compare}: another {' and '.join(differs)}; both must come from the same data")
        results["compared_with"] = args.compare
    if score is None:
        layout = {r["index"] if r["index"].startswith("v1_") else f"v1_{r['index']}": r["prediction"] for r in found["real"]}
        write_atomically(Path(args.out, "mmvet.json"), [json.dumps(layout, indent=1)])
        results["extraction"] = "none: mmvet.json is for MM-Vet's own grader"
    else:
        if results["kind"] != "masks":
            results["without_image"] = sum(not r["images"] for r in found["real"])
            results["extraction"] = "by rules, no judge" + "; the official script asks an LLM" * (results["kind"] == "mathvista")
        results |= {c: with_intervals(score(found[c])) for c in CONDITIONS if found[c]}
        results |= {f"gain_over_{c}": gains(score, found["real"], found[c]) for c in CONDITIONS[1:] if found["real"] and found[c]}
        if args.backbone_accuracy is not None and results.get("without"):        # MMStar: what was learned from its own questions
            blind = results["without"]["accuracy"]
            results["leakage"] = {k: round(max(0.0, blind[k] - args.backbone_accuracy), 2) for k in ("value", "low", "high")}
        sections = {k: v for k, v in results.items() if k in CONDITIONS or k.startswith("gain_over_")}
        results["compared"] = {c: gains(score, found[c], others[c]) for c in CONDITIONS if others and found[c] and others[c]}
        sections |= {f"{c} - {args.compare}": scores for c, scores in results["compared"].items()}
    write_atomically(Path(args.out, "results.json"), [json.dumps(results, indent=1)])
    history = Path(args.model).parent / "metrics.jsonl"
    drawn = curves(history) if Path(args.model).name.startswith("checkpoint-") and history.exists() else ""
    write_results_page(Path(args.out, "results.html"), f"{'/'.join(Path(args.model).parts[-2:])} on {Path(args.data).name}", [
        *(score_table(heading, some) for heading, some in (
            ("Scores", {k: v for k, v in sections.items() if k in CONDITIONS}),
            ("Gains, with paired intervals", {k: v for k, v in sections.items() if k not in CONDITIONS})) if some),
        drawn and f"<h2>Training</h2><div class=charts>{drawn}</div>", examples(found, others, look) if found["real"] else ""])
    line = lambda s: f"{s['value']:7.2f} [{s['low']:6.2f}, {s['high']:6.2f}]  n {s['n']}" + (
        f", {s['unparsed']} unparsed" if "unparsed" in s else f", {s['verdict']}")
    for section, scores in sections.items():
        print(section)
        for metric in filter(overall, scores):
            print(f"  {metric:32s}{line(scores[metric])}")
    print(f"{args.out}/results.json: {results['kind']}, {results['rows']} rows, {results['skipped']} skipped; look at "
          f"{args.out}/results.html; every answer is in predictions.jsonl")


# ------------------------------------------------------------------- both uses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="runs/toy/base", help="hub id or folder (%(default)s)")
    add("--data", default="runs/toy/masks_val.jsonl", help="masks of captions not trained on, or a benchmark's .tsv (%(default)s)")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", default="runs/toy/eval_base", help="folder (%(default)s)")
    add("--batch-size", type=positive, default=32, help="masks a forward pass and rank; changes speed only (%(default)s)")
    add("--max-new-tokens", type=positive, default=24, help="cap of a completion (%(default)s fits the toy; 256 a real model)")
    add("--max-pixels", type=positive, default=1003520, help="larger images are shrunk: 1,280 tokens of 28 x 28 (%(default)s)")
    add("--limit", type=positive, help="only the first so many masks")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add("--compare", help="--out of another model on the same data: what is gained over it")
    group = parser.add_argument_group("benchmarks (a .tsv)")
    group.add_argument("--kind", choices=BENCHMARKS, help="(by the name of the file, or its columns)")
    group.add_argument("--conditions", nargs="+", choices=ASKED, default=ASKED, help="(%(default)s)")
    group.add_argument("--backbone-accuracy", type=float, help="of the text-only backbone, in percent: for MMStar's leakage")
    add_arguments(parser, relative="images")                                     # there is one answer a mask
    args = parser.parse_args()

    rank, _, device = distributed()
    root = image_root(args.image_root, args.data)
    if args.data.endswith(".tsv"):
        return benchmark(args, root, rank, device)
    rows = list(read_masks(args.data))[:args.limit]
    good = [r for _, r in rows if not isinstance(r, BadRecord)]
    if not good:
        fail(f"{args.data}: none of its records is a mask that can be used; it should be the output of build_masks.py")
    if args.relative == "answers":
        fail("--relative answers compares the completions of one group: use images or none here")
    names, load = [r["image"] for r in good], lambda name: load_image(root, name, args.max_pixels)
    for i, record in enumerate(good):
        record["place"] = i

    def start():
        model, processor = load_vlm(args.model, device, args.trust_remote_code)
        policy, of_thread = Policy(model, processor, temperature=0), copy.deepcopy(processor)     # tokenizers are not shared
        reward = load_reward(args, good, root, args.max_pixels, device, processor.tokenizer)

        def prepare(record):
            real, other = load(record["image"]), other_image(names, record["place"], load)
            shown = {"real": real, "blank": Image.new("RGB", real.size, (127, 127, 127)), **({"shuffled": other} if other else {})}
            text = chat_prompt(of_thread, FILL_PROMPT.format(masked_caption=record["masked_caption"]))
            return record, real, {c: encode_prompt(model, of_thread, text, [i], args.max_new_tokens) for c, i in shown.items()}

        def process(prepared):
            records, real, prompts = zip(*prepared)
            made = [[] for _ in records]
            for condition in ("real", "blank", "shuffled"):
                here = [b for b, p in enumerate(prompts) if condition in p]
                if not here:
                    continue
                predictions = generate(policy, processor, [prompts[b][condition] for b in here], args.max_new_tokens)
                some = [records[b] for b in here]
                visual = reward(some, [real[b] for b in here], [[p] for p in predictions]).get("visual")
                for j, (b, record) in enumerate(zip(here, some)):
                    kept = {k: record[k] for k in ("id", "image", "sentence", "start", "end", "answer") if k in record}
                    made[b].append({**kept, "condition": condition, "prediction": predictions[j],
                                    **measure(record, predictions[j], processor.tokenizer),
                                    **({} if visual is None else {"visual_agreement": round(visual[j, 0].item(), 6)})})
            return made
        return prepare, process

    settings = {"stage": "evaluate", "kind": "masks", **{k: v for k, v in vars(args).items() if k not in (
        "out", "batch_size", "image_root", "kind", "compare", "conditions", "backbone_accuracy")},
        "model": fingerprint(args.model), "data": fingerprint(args.data), "clip": fingerprint(args.clip)}
    known = {mask_index(r): r for r in good}
    look = lambda index: ([load(known[index]["image"])], known[index]["sentence"])
    finish(args, rank, rows, start, settings, "masks", score_masks, look)


if __name__ == "__main__":
    cli(main)
