"""Text, bytes and answers at random: offsets recover the text, masks restore the caption, the
reward stays in its range, and each record of a file is either used or refused in one line."""

import io
import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import completion, scored
from texts import PIECES, TEXTS
from tiny import random_image
from transformers import AutoProcessor

from build_masks import mask_caption, maximum_sum_span, read_scores
from common.captions import load_image, read_captions
from common.masks import read_masks
from common.records import BadRecord, read_jsonl
from common.text import ANSWER_TAG, MASK
from reward import (
    advantages,
    brevity_penalty,
    parse_completion,
    semantic_credit,
    target_completion,
)
from score_dependency import correct_scores, score_record

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TRAPS = [*TAGS, MASK, "<think", "answer>", "<|image_pad|>", " ", ". ", "Red cat", "\0", *PIECES]
HOSTILE = TEXTS | st.lists(st.sampled_from(TRAPS), max_size=12).map("".join)
TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = Path(TEMPORARY.name)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint("qwen2_5_vl")).tokenizer


# ------------------------------------------------------------------- captions -> scores -> masks


@settings(max_examples=150, deadline=None)
@given(HOSTILE, st.integers(0, 2**32), st.sampled_from(["position", "density"]))
def test_the_offsets_of_a_scored_record_recover_its_text_and_its_scores_are_means(
    tokenizer, caption, seed, correction
):
    encoded = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
    rng = random.Random(seed)
    rows = {"d_vis": [], "density": []}
    for _ in range(len(encoded.offset_mapping) + 1):
        rows["d_vis"].append(rng.random())
        rows["density"].append(rng.gauss(0, 1))

    record = {"id": "1", "image": "a.png", "caption": caption}
    record = score_record(record, rows, None, encoded.offset_mapping)
    for sentence in record["sentences"]:
        start, end = sentence["start"], sentence["end"]
        assert caption[start:end] == sentence["text"] and sentence["words"]
        for part in (sentence, *sentence["words"]):
            assert start <= part["start"] < part["end"] <= end
        for scores in (sentence, *sentence["words"], *(w["producing"] for w in sentence["words"])):
            for name, values in rows.items():
                assert min(values) - 1e-6 <= scores[name] <= max(values) + 1e-6

    # what one stage writes, the next one reads
    if not record["sentences"]:
        return
    (corrected,) = correct_scores(lambda: [json.loads(json.dumps(record))], correction)
    assert without_corrections(corrected) == without_corrections(record)
    for written in (record, corrected):
        (FOLDER / "scores").write_text(json.dumps(written))
        assert [read for _, read in read_scores(FOLDER / "scores")] == [written]


def without_corrections(value):
    """A record without the fields that depend on the other captions of the file."""
    if isinstance(value, list):
        return [without_corrections(item) for item in value]
    if not isinstance(value, dict):
        return value
    corrected = ("score", "position_baseline")
    return {k: without_corrections(v) for k, v in value.items() if k not in corrected}


@settings(max_examples=150, deadline=None)
@given(
    HOSTILE,
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.sampled_from(["position", "density", "otsu"]),
    st.sampled_from(["span", "sentence"]),
    st.sampled_from(["dependency", "random"]),
    st.floats(0, 1),
)
def test_masks_restore_the_caption_and_the_right_answer_passes_the_gate(
    caption, values, rule, granularity, select, tau
):
    record = scored(caption, values)

    def masks_of(record):
        return mask_caption(record, rule, lambda sentences: tau, granularity, select, 9)

    if not record["sentences"] or MASK in caption or ANSWER_TAG.search(caption):
        with pytest.raises(BadRecord):
            masks_of(record)
        return
    masks = masks_of(record)
    for mask in masks:
        assert mask["masked_caption"].replace(MASK, mask["answer"]) == caption
        assert mask["masked_caption"].count(MASK) == 1
        # nothing but punctuation is no answer
        is_answer = semantic_credit(mask["answer"], mask["answer"], "exact") > 0
        assert parse_completion(target_completion(mask)) == mask["answer"] or not is_answer
    (FOLDER / "masks").write_text("".join(json.dumps(mask) + "\n" for mask in masks))
    assert [mask for _, mask in read_masks(FOLDER / "masks")] == masks


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(0.5), min_size=1, max_size=40))
def test_a_span_is_never_empty_and_never_below_the_mean(scores):
    first, last = maximum_sum_span(scores)
    assert 0 <= first <= last < len(scores)
    span = scores[first : last + 1]
    assert sum(span) / len(span) >= sum(scores) / len(scores) - 1e-6


# ------------------------------------------------------------------- answers


def parse_slowly(text):
    """The same grammar by hand: the four tags in this order, only spaces around and between."""
    tags = []
    outside = ""
    start = 0
    while True:
        places = [(text.find(tag, start), tag) for tag in TAGS if tag in text[start:]]
        if not places:
            break
        place, tag = min(places)
        before = text[start:place]
        tags.append((tag, before))
        if tag in ("<think>", "<answer>"):
            outside += before
        start = place + len(tag)
    outside += text[start:]
    if [tag for tag, _ in tags] != TAGS or outside.strip():
        return None
    return tags[3][1].strip()


WITH_TAGS = st.lists(st.sampled_from([*TAGS, " ", "\n", "red", "<", "/think>"]), max_size=8)
AROUND = st.sampled_from(["", " ", "x"])
BETWEEN = st.sampled_from(["", "\n", ","])
COMPLETIONS = st.tuples(AROUND, HOSTILE, BETWEEN, HOSTILE).map(
    lambda t: f"{t[0]}<think>{t[1]}</think>{t[2]}<answer>{t[3]}</answer>{t[0]}"
)


@settings(max_examples=300, deadline=None)
@given(WITH_TAGS.map("".join) | COMPLETIONS)
def test_an_answer_is_read_if_and_only_if_the_form_is_right(text):
    answer = parse_completion(text)
    slow = parse_slowly(text)
    if answer is None and slow is not None:
        # nothing but punctuation
        assert not semantic_credit(slow, slow, "exact")
    else:
        assert answer == slow
    if answer:
        assert parse_completion(completion(answer)) == answer


@settings(max_examples=150, deadline=None)
@given(
    HOSTILE,
    HOSTILE | st.sampled_from(["large red circle", "红色的圆", "Straße İ ǰ ﬁ"]),
    st.integers(0, 40),
)
def test_every_credit_is_in_its_range_and_full_only_for_the_hidden_text(
    tokenizer, answer, target, cut
):
    for a in (answer, target, target[:cut], answer + target):
        exact = semantic_credit(a, target, "exact")
        for kind in ("rouge_l", "prefix"):
            credit = semantic_credit(a, target, kind, tokenizer)
            assert 0 <= credit <= 1 and credit >= exact, (kind, a, target)
            is_same = exact or a.casefold() == target.casefold()
            assert kind == "prefix" or credit < 1 or is_same, (kind, a, target)
        assert 0 <= brevity_penalty(a, target) <= 1
    assert semantic_credit(target, target, "rouge_l") in (0, 1)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3),
    st.floats(0, 5),
    st.booleans(),
)
def test_advantages_are_finite_and_sum_to_nothing(rewards, weight, scale):
    A = advantages({"x": torch.tensor(rewards)}, {"x": weight}, scale)
    assert A.isfinite().all()
    assert A.sum(1).abs().max() < 1e-5 * max(1, weight)
    assert A.abs().max() <= weight * 2


# ------------------------------------------------------------------- files

KEYS = (
    *("id", "image", "caption", "sentences", "conversations", "from", "value", "start", "words"),
    *("score", "d_vis", "producing", "sentence", "answer", "masked_caption", "images"),
    *("annotations", "image_id"),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def containers(inner):
    objects = st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    return st.lists(inner, max_size=3) | objects


JSON = st.recursive(SCALARS, containers, max_leaves=12)
NOISE = st.binary(max_size=30).map(lambda b: b.decode("latin-1").replace("\n", ""))


def read_images(path):
    return read_jsonl(path, ("id", "image"))


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON.map(json.dumps) | NOISE, max_size=5))
def test_any_lines_are_records_or_refused_in_one_line_each(lines):
    (FOLDER / "a.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    most = sum(len(line.splitlines() or [""]) for line in lines) + len(lines)
    for read in (read_images, read_captions, read_scores, read_masks):
        records = list(read(FOLDER / "a.jsonl"))
        numbers = [number for number, _ in records]
        assert numbers == sorted(set(numbers)) and len(records) <= most
        for _, record in records:
            if isinstance(record, BadRecord):
                assert "\n" not in str(record)
            else:
                assert isinstance(record, dict)
                assert json.dumps(record, ensure_ascii=False).encode()  # can be written


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_is_captions_or_refused_in_one_line(value):
    (FOLDER / "a.json").write_text(json.dumps(value))
    try:
        records = list(read_captions(FOLDER / "a.json"))
    except SystemExit as e:
        assert "a.json" in str(e) and "\n" not in str(e)
        return
    for _, record in records:
        assert isinstance(record, BadRecord) or set(record) == {"id", "image", "caption"}


def encoded(kind):
    out = io.BytesIO()
    random_image(1).save(out, kind)
    return out.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM")
IMAGES = {kind: encoded(kind) for kind in KINDS}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can repair
@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(sorted(IMAGES)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0, 1) | st.just(1),
)
def test_a_damaged_image_is_shown_or_refused_in_one_line(kind, changes, keep):
    data = bytearray(IMAGES[kind])
    for place, value in changes:
        data[int(place**3 * (len(data) - 1))] = value  # mostly in the header
    (FOLDER / "a").write_bytes(data[: int(keep * len(data))])
    try:
        image = load_image(FOLDER, "a", 1000)
        assert image.mode == "RGB" and image.width * image.height <= 1000
    except BadRecord as e:
        assert str(e).startswith(f"image {FOLDER}/a cannot be read") and "\n" not in str(e)
