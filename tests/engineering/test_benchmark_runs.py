"""Benchmarks, as files and runs: reading TSVs, and evaluate.py on a tiny checkpoint."""

import base64
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks.run
import evaluate
from benchmarks.registry import BENCHMARKS, kind_of
from benchmarks.run import records_to_ask
from benchmarks.scores import accuracy
from benchmarks.tsv import load_images, question_text, read_tsv
from common.records import BadRecord, load_records

FAMILY = "qwen2_5_vl"


def png(seed):
    """Base64 of an image of 40 x 40 pixels: a mosaic, which survives being shrunk."""
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(tiles).resize((40, 40), Image.Resampling.NEAREST).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path, records):
    """As pandas.to_csv(sep="\\t", index=False) writes it."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return path


def read_records(path):
    return [record for _, record in read_tsv(path).records]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "name, fields, kind",
    [
        ("MMBench_DEV_EN", {"A": "x"}, "mmbench"),
        ("MMStar", {"A": "x"}, "mcq"),
        ("BLINK", {}, "mcq"),
        ("POPE", {}, "pope"),
        ("MME", {}, "mme"),
        ("MME-RealWorld", {"A": "x", "B": "y"}, "mcq"),
        ("MMMU_DEV_VAL", {"A": "x", "B": "y"}, "mcq"),
        ("HallusionBench", {}, "hallusion"),
        ("ChartQA_TEST", {}, "chartqa"),
        ("MathVista_MINI", {}, "mathvista"),
        ("MMVet", {}, "mmvet"),
        ("mm-vet", {}, "mmvet"),
        ("WeMath", {"A": "x", "B": "y"}, "wemath"),
        ("mine", {"answer": "Yes"}, "yesno"),
        ("mine", {"answer": "14"}, "exact"),
        ("mine", {"A": "x", "B": "y"}, "mcq"),
        ("mine", {"question_type": "free_form", "answer_type": "text"}, "mathvista"),
    ],
)
def test_the_kind_is_told_by_the_name_or_the_columns(tmp_path, name, fields, kind):
    record = {"index": 0, "question": "q", "answer": "A", **fields}
    path = write_tsv(tmp_path / f"{name}.tsv", [record])
    assert kind_of(path, read_tsv(path)) == kind


def test_line_ends_quotes_and_na_come_back_with_the_line_numbers_of_an_editor(tmp_path):
    options = {"A": "None", "B": "NA"}
    more_options = {"A": "nan", "B": "é", "C": "null"}
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            {"index": 5, "question": 'a "b"\nc\td', **options, "C": "", "answer": "B"}
            | {"l2_category": "x"},
            {"index": 1000005, "question": "q", **more_options, "answer": "A"}
            | {"l2_category": "y"},
        ],
    )
    table = read_tsv(path)
    assert [line for line, _ in table.records] == [2, 4]
    assert table.records[0][1]["question"] == 'a "b"\nc\td'
    assert table.records[0][1]["l2-category"] == "x"
    assert [record["options"] for _, record in table.records] == [options, more_options]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"\xef\xbb\xbfindex\tquestion\tanswer\n1\tq\tyes\n")
    assert read_tsv(path).columns == ["index", "question", "answer"]


def groups_and_copies(path, *records):
    table = read_tsv(write_tsv(path, list(records)))
    return [(r["index"], r["group"], r["copy"]) for _, r in table.records]


def test_a_record_is_a_copy_if_one_repeats_options_a_million_further_on(tmp_path):
    """Else its index is just a large number."""
    path = tmp_path / "x.tsv"

    def record(index, options):
        fields = dict(zip("AB", options))
        return {"index": index, "question": "q", **fields, "answer": "A"}

    copies = [("5", "5", 0), ("1000005", "5", 1)]
    assert groups_and_copies(path, record(5, "xy"), record(1000005, "yx")) == copies
    # as pandas writes a column that had gaps
    assert groups_and_copies(path, record("5.0", "xy"), record("1000005.0", "yx")) == copies

    alone = [("5", "5", 0), ("1000005", "1000005", 0)]
    assert groups_and_copies(path, record(5, "xy"), record(1000005, "yz")) == alone
    assert groups_and_copies(path, record(5, ""), record(1000005, "")) == alone


def test_g_index_names_the_question_of_each_record(tmp_path):
    """Whatever the options: by their indices alone, 1 and 1000001 would be one question."""

    def record(index, g_index):
        return {"index": index, "g_index": g_index, "question": "q", "answer": "A"}

    records = [
        record(1, 1),
        record(10000001, "1.0"),
        record(1000001, 1000001),
        record(11000001, 1000001),
        record(7, ""),
    ]
    assert groups_and_copies(tmp_path / "x.tsv", *records) == [
        ("1", "1", 0),
        ("10000001", "1", 1),
        ("1000001", "1000001", 0),
        ("11000001", "1000001", 1),
        ("7", "7", 0),
    ]


def test_a_lone_carriage_return_is_one_line_with_the_file(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"index\tquestion\tanswer\n1\ta\rb\tyes\n")
    with pytest.raises(SystemExit, match=r"x\.tsv: line 2: .*new-line"):
        read_tsv(tmp_path / "x.tsv")


def test_a_choices_column_hides_options_in_mathvista_only():
    record = {"question": "Which?", "options": {"A": "x", "B": "y"}, "choices": "mine"}
    assert "A. x\nB. y\n" in question_text(record, "")
    assert "A. x" not in question_text({**record, "question_type": "free_form"}, "")


def test_the_request_is_left_out_where_the_question_has_it():
    ending = BENCHMARKS["pope"].ending
    record = {"question": "Is it red?", "options": {}}
    assert question_text(record, ending) == "Is it red? Please answer yes or no."
    record["question"] = "Is it red? Please answer yes or no."
    assert question_text(record, ending) == record["question"]


def test_images_are_found_again_in_the_file(tmp_path):
    records = [
        {"index": 0, "image": png(0), "question": "a\nb", "answer": "x"},
        {"index": 1, "image": f"data:image/png;base64,{png(1)}", "question": "q", "answer": "x"},
        {"index": 2, "image": str([png(0), png(1)]), "question": "q", "answer": "x"},
    ]
    path = write_tsv(tmp_path / "x.tsv", records)
    table = read_tsv(path)
    column = table.columns.index("image")
    images = []
    for _, record in table.records:
        offset = table.image_offsets[record["image"]]
        loaded = load_images(path, column, offset, 10**6)
        images.append([image.tobytes() for image in loaded])
    first, second, both = images
    assert first != second and both == first + second


def test_questions_about_one_image_are_one_unit_of_the_bootstrap(tmp_path):
    def image(i):
        return base64.b64encode(bytes([i]) * 60).decode()

    question = {"question": "q", "answer": "yes"}
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            {"index": 0, "image": image(0), "category": "a, b", **question},
            {"index": 1, "image": "0", "category": "a, b", **question},
            {"index": 2, "image": image(1), "category": "c", **question},
            {"index": 3, "image": "", "category": "c", **question},
        ],
    )
    asked = [record for _, record in records_to_ask(read_tsv(path).records, BENCHMARKS["yesno"])]
    units = [record["unit"] for record in asked]
    assert units[0] == units[1] and len(set(units)) == 3

    scores = accuracy([{**record, "right": True, "unparsed": False} for record in asked])
    by_category = [name for name in scores if "category" in name]
    assert by_category == [
        "accuracy, mean of category",
        "accuracy, category a, b",
        "accuracy, category c",
    ]


def test_an_image_in_two_categories_is_two_units_in_mme_only():
    def units(kind):
        records = []
        for i, category in enumerate(("count", "count", "color")):
            record = {"index": str(i), "group": str(i), "copy": 0, "answer": "yes"}
            records.append((i, {**record, "image": "hash", "category": category}))
        return [record["unit"] for _, record in records_to_ask(records, BENCHMARKS[kind])]

    assert len(set(units("mme"))) == 2 and len(set(units("pope"))) == 1


def test_a_limit_counts_questions_and_takes_their_copies(tmp_path):
    question = {"question": "q", "A": "x", "B": "y", "answer": "A"}
    records = [{"index": i + 10**6 * j, **question} for j in range(2) for i in range(3)]
    path = write_tsv(tmp_path / "x.tsv", records)
    asked = records_to_ask(read_tsv(path).records, BENCHMARKS["mcq"], 2)
    assert [record["index"] for _, record in asked] == ["0", "1", "1000000", "1000001"]


def test_a_wemath_record_that_is_no_step_is_named(tmp_path):
    question = {"question": "q", "A": "x", "B": "y", "answer": "A", "ID": 7}
    path = write_tsv(
        tmp_path / "WeMath.tsv",
        [{"index": 1, **question, "key": "2steps_1"}, {"index": 2, **question, "key": "4steps_1"}],
    )
    (_, good), (_, bad) = records_to_ask(read_tsv(path).records, BENCHMARKS["wemath"])
    assert good["unit"] == "2 7"
    assert isinstance(bad, BadRecord) and "4steps_1" in str(bad)


# ---------------------------------------------------------------- the real script


@pytest.fixture
def run(stage, checkpoint, tmp_path):
    """run(data, *flags, out=, family=) -> (error, printed, results, predictions)"""

    def evaluate_tsv(data, *flags, out="out", family=FAMILY):
        folder = tmp_path / out
        size = ("--max-new-tokens", 3, "--batch-size", 3)
        model = checkpoint(family)
        error, printed = stage(
            evaluate, "--data", data, "--model", model, "--out", folder, *size, *flags
        )
        results = None
        predictions = None
        if (folder / "results.json").exists():
            results = json.loads((folder / "results.json").read_text())
        if (folder / "predictions.jsonl").exists():
            predictions = load_records(folder / "predictions.jsonl")
        return error, printed, results, predictions

    return evaluate_tsv


def write_mixed(path):
    """Good records: an image, by reference, two images, none; then every kind of bad one."""
    question = {"question": "Which?", "A": "red", "B": "blue", "answer": "A", "category": "c"}
    no_image = base64.b64encode(b"no picture at all" * 9).decode()
    good = [
        {"index": 0, "image": png(0), **question},
        {"index": 1, "image": "0", **question},
        {"index": 2, "image": str([png(1), png(2)]), **question},
        {"index": 3, "image": "", **question, "hint": "It glows."},
    ]
    bad = [
        {"index": 4, "image": no_image, **question},
        {"index": 5, "image": "*" * 99, **question},
        {"index": 6, "image": "77", **question},
        {"index": 7, "image": "0", **question, "answer": ""},
        {"index": 8, "image": "0", **question, "answer": "C"},
        {"index": 0, "image": "0", **question},
    ]
    return write_tsv(path, good + bad)


ASKED_OF_MIXED = [
    ("0", "real", 1),
    ("0", "without", 0),
    ("0", "shuffled", 2),
    ("1", "real", 1),
    ("1", "without", 0),
    ("1", "shuffled", 2),
    ("2", "real", 2),
    ("2", "without", 0),
    ("2", "shuffled", 1),
    ("3", "real", 0),
    ("3", "without", 0),
]
SKIPPED_OF_MIXED = [
    (6, "record 4: image 1 cannot be read"),
    (7, "record 5: image 1 is not base64"),
    (8, "record 6: its image is that of record 77"),
    (9, "record 7: the answer (none)"),
    (10, "record 8: the answer C"),
    (11, "record 0: its index appears twice"),
]


def texts_of(predictions):
    return {(p["index"], p["condition"]): p["prediction"] for p in predictions}


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "idefics3", "internvl", "llava_onevision", "qwen3_vl"]
)
def test_every_shape_of_record_is_asked_and_every_bad_one_is_named(run, tmp_path, family):
    data = write_mixed(tmp_path / "mine.tsv")
    error, printed, results, predictions = run(data, family=family)
    assert error is None, error
    asked = [(p["index"], p["condition"], p["images"]) for p in predictions]
    assert asked == ASKED_OF_MIXED

    lines = printed.replace("\r", "\n").splitlines()
    skipped = [line for line in lines if line.startswith("skipped")]
    assert len(skipped) == len(SKIPPED_OF_MIXED), skipped
    for number, reason in SKIPPED_OF_MIXED:
        beginning = f"skipped {data}:{number}: {reason}"
        assert any(line.startswith(beginning) for line in skipped), (beginning, skipped)

    assert (results["records"], results["skipped"], results["written"]) == (10, 6, 11)
    assert results["without_image"] == 1
    assert results["real"]["accuracy"]["n"] == 4
    assert results["gain_over_shuffled"]["accuracy"]["n"] == 3

    _, _, _, one_by_one = run(data, "--batch-size", 1, out="one", family=family)
    assert texts_of(one_by_one) == texts_of(predictions)


def test_a_killed_run_continues_to_the_same_predictions(run, tmp_path, monkeypatch):
    data = write_mixed(tmp_path / "mine.tsv")
    _, _, _, uninterrupted = run(data, out="whole")
    generate = benchmarks.run.generate
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(benchmarks.run, "generate", interrupted)
    error, *_ = run(data)
    assert error == "130"
    assert not (tmp_path / "out/results.json").exists()

    monkeypatch.setattr(benchmarks.run, "generate", generate)
    error, printed, _, predictions = run(data)
    assert error is None and "resuming" in printed
    assert predictions == uninterrupted


def test_a_finished_run_is_compared_without_asking_again(run, tmp_path):
    data = write_mixed(tmp_path / "mine.tsv")
    run(data, out="other")
    run(data)
    error, printed, results, _ = run(
        data, "--compare", tmp_path / "other", "--backbone-accuracy", 10
    )
    assert error is None and "reused" in printed
    assert results["compared"]["real"]["accuracy"]["verdict"] == "noise"
    without = results["without"]["accuracy"]["value"]
    assert results["leakage"]["value"] == max(0, without - 10)

    error, *_ = run(data, "--compare", tmp_path / "nowhere")
    assert "nowhere holds no finished predictions" in error
    record = {"index": 0, "image": png(0), "question": "q", "answer": "Yes"}
    yes_no = write_tsv(tmp_path / "yes_no.tsv", [record])
    error, *_ = run(yes_no, "--compare", tmp_path / "other", out="yes_no")
    assert "another kind and data" in error
    error, *_ = run(yes_no, "--backbone-accuracy", 10, out="leakage")
    assert "--backbone-accuracy is for" in error and "read as yesno" in error


@pytest.fixture
def always(monkeypatch):
    """always(text): the model answers `text` to everything."""

    def set_answer(text):
        def generate(policy, processor, prompts, max_new_tokens):
            return [text] * len(prompts)

        monkeypatch.setattr(benchmarks.run, "generate", generate)

    return set_answer


@pytest.fixture
def always_b(always):
    always("B")


def test_the_prompt_holds_hint_options_and_request(run, tmp_path, monkeypatch):
    chat_prompt = benchmarks.run.chat_prompt
    texts = []

    def recorded(processor, text, images):
        texts.append((images, text))
        return chat_prompt(processor, text, images)

    monkeypatch.setattr(benchmarks.run, "chat_prompt", recorded)
    record = {"index": 0, "image": png(0), "question": "Which?", "A": "red", "B": "blue"}
    record |= {"answer": "A", "hint": "It glows."}
    error, *_ = run(write_tsv(tmp_path / "MMStar.tsv", [record]))
    assert error is None
    prompt = (
        "Hint: It glows.\nQuestion: Which?\nOptions:\nA. red\nB. blue\n"
        "Please select the correct answer from the options above."
    )
    # once more at load, to check the computation
    assert texts == [(1, prompt), (1, prompt), (0, prompt)]


def test_mmbench_is_asked_in_rotations(run, tmp_path, always_b):
    """One in two rotations is answered right, and no question in both."""
    records = []
    for i in range(3):
        question = {"question": "Which?", "A": "red", "B": "blue", "answer": "AB"[i % 2]}
        records.append({"index": i, "image": png(i), **question})
    error, _, results, predictions = run(write_tsv(tmp_path / "MMBench.tsv", records))
    assert error is None and len(predictions) == 3 * 3 * 2
    assert results["real"]["accuracy"]["value"] == 33.33
    assert results["real"]["circular"]["value"] == 0 and results["real"]["circular"]["n"] == 3


def test_a_circular_file_with_g_index_keeps_its_questions_apart(run, tmp_path, always_b):
    """Always B: of two questions in two rotations each, half is right, and none circularly."""
    records = []
    for i in (1, 1000001):
        question = {"question": "Which?", "g_index": i, "image": png(0)}
        records.append({"index": i, **question, "A": "x", "B": "y", "answer": "A"})
        records.append({"index": i + 10**7, **question, "A": "y", "B": "x", "answer": "B"})
    flags = ("--conditions", "real")
    error, _, results, _ = run(write_tsv(tmp_path / "LEGO_circular.tsv", records), *flags)
    assert error is None
    scores = results["real"]
    assert (scores["accuracy"]["value"], scores["accuracy"]["n"]) == (0, 2)
    assert (scores["circular"]["value"], scores["circular"]["n"]) == (0, 2)


def test_an_undefined_score_is_said_to_be_so_everywhere(run, tmp_path, always):
    """A model that never says yes has no precision."""
    always("No.")
    records = [
        {"index": i, "image": png(i), "question": "Red?", "answer": answer}
        for i, answer in enumerate(("yes", "no"))
    ]
    data = write_tsv(tmp_path / "POPE.tsv", records)
    error, printed, results, _ = run(data, "--conditions", "real", "without")
    assert error is None
    assert results["real"]["precision"]["value"] is None
    assert results["real"]["precision"]["low"] is None
    assert "precision" not in results["gain_over_without"]
    assert "NaN" not in (tmp_path / "out/results.json").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("precision")]
    assert line.split() == ["precision", "undefined"]
    assert "undefined" in (tmp_path / "out/results.html").read_text()


def write_wemath(path, problems):
    """Problems of two steps, each asked as two steps and as a whole; the answer is always A."""
    records = []
    for problem in range(problems):
        for step in ("1", "2", "multi"):
            question = {"question": step, "A": "3 cm", "B": "4 cm", "answer": "A", "ID": problem}
            record = {"index": len(records), **question, "key": f"2steps_{step}"}
            records.append({**record, "image": png(problem)})
    return write_tsv(path, records)


def test_a_rise_of_wemaths_ik_and_rm_is_a_loss_everywhere(run, tmp_path, monkeypatch):
    """In We-Math's own form. The base knows all of ten problems; the other model only every second
    whole, and no step: half of its problems are IK, and what it gets right is RM."""
    data = write_wemath(tmp_path / "WeMath.tsv", 10)
    asked = []

    def form(letter):
        return f"<Thought process>: <<A and B>> <Answer>: <<{letter}>>"

    def knows_all(policy, processor, prompts, max_new_tokens):
        return [form("A")] * len(prompts)

    def knows_little(policy, processor, prompts, max_new_tokens):
        letters = []
        for _ in prompts:
            asked.append(1)
            letters.append("A" if len(asked) % 6 == 0 else "B")
        return [form(letter) for letter in letters]

    flags = ("--conditions", "real")
    monkeypatch.setattr(benchmarks.run, "generate", knows_all)
    error, _, base, _ = run(data, *flags, out="base")
    assert error is None
    assert base["real"]["accuracy"]["value"] == base["real"]["CM strict"]["value"] == 100

    monkeypatch.setattr(benchmarks.run, "generate", knows_little)
    error, printed, results, _ = run(data, *flags, "--compare", tmp_path / "base")
    assert error is None
    gains = results["compared"]["real"]
    verdicts = {name: (gain["value"], gain["verdict"]) for name, gain in gains.items()}
    assert verdicts["IK"] == (50, "loss") and verdicts["RM strict"] == (100, "loss")
    assert verdicts["CM strict"] == (-100, "loss")
    (line,) = [line for line in printed.splitlines() if line.startswith("RM strict")]
    assert line.endswith("+100.0 [100.0, 100.0] loss")
    page = (tmp_path / "out/results.html").read_text()
    assert "100.00 [100.00, 100.00] loss" in page and "] gain" not in page


def test_mmvet_is_written_for_its_own_grader(run, tmp_path, always):
    """It needs every index, also of rows that cannot be asked, and no thoughts."""
    always("<think>It may be a cat.</think> A dog.")
    question = {"question": "Why?", "answer": "so"}
    records = [{"index": index, "image": png(0), **question} for index in ("0", "v1_1")]
    records.append({"index": "2", "image": "*" * 99, **question})
    records.append({"index": "v1_3", "image": "77", **question})
    data = write_tsv(tmp_path / "MMVet.tsv", records)
    with open(data, "a") as file:
        file.write("4\ttoo short\n")

    error, _, results, predictions = run(data)
    assert error is None and len(predictions) == 2 and results["skipped"] == 3
    layout = json.loads((tmp_path / "out/mmvet.json").read_text())
    assert layout == {"v1_0": "A dog.", "v1_1": "A dog.", "v1_2": "", "v1_3": "", "v1_4": ""}
    assert "real" not in results and "own grader" in results["extraction"]


def test_mathvista_says_that_the_official_script_asks_an_llm(run, tmp_path, always_b):
    record = {"index": 0, "image": png(0), "question": "Q", "answer": "8"}
    record |= {"question_type": "free_form", "answer_type": "integer"}
    error, _, results, _ = run(write_tsv(tmp_path / "MathVista.tsv", [record]))
    assert error is None and "asks an LLM" in results["extraction"]
    assert results["real"]["accuracy"]["unparsed"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no column"),
        ("index\tquestion\n1\tx\n", "no column answer"),
        ("index\tquestion\tanswer\n", "none of its 0 records"),
        ("index\tquestion\tanswer\n1\tx\n", "none of its 1 records"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_in_one_line(run, tmp_path, text, message):
    path = tmp_path / "x.tsv"
    path.write_text(text)
    error, *_ = run(path)
    assert message in error and "\n" not in error and str(path) in error


def test_a_file_that_does_not_exist_is_named(run, tmp_path):
    error, *_ = run(tmp_path / "y.tsv")
    assert "y.tsv: no such file" in error


def test_the_toy_benchmark_asks_for_the_painted_truth_in_every_rotation(run, tmp_path):
    """Five options, five copies; a caption's lie is never the answer; the first two questions run
    through the script."""
    from toy.questions import write_benchmark
    from toy.world import make_world

    make_world(tmp_path, 2, 3, 1.0, 0)
    write_benchmark(tmp_path)
    objects = []
    for truth in load_records(tmp_path / "truth.jsonl"):
        if truth["id"].startswith("val"):
            objects += truth["objects"]

    path = tmp_path / "val.tsv"
    table = read_tsv(path)
    records = [record for _, record in table.records]
    assert len(records) == 5 * len(objects) and kind_of(path, table) == "mcq"
    for i, record in enumerate(records):
        painted = objects[i % len(objects)]
        assert record["options"][record["answer"]] == painted["colour"]
        assert painted["kind"] in record["question"] and painted["place"] in record["question"]
        assert record["image"]
    assert {r["answer"] for r in records if r["group"] == "0"} == set("ABCDE")

    flags = ("--limit", 2, "--conditions", "real")
    error, _, results, predictions = run(path, *flags, family="idefics3")
    assert error is None and len(predictions) == 10
    assert results["real"]["circular"]["n"] == 2 and results["real"]["accuracy"]["n"] == 2


def test_two_ranks_write_what_one_does(run, checkpoint, tmp_path):
    data = write_mixed(tmp_path / "mine.tsv")
    error, *_ = run(data)
    assert error is None

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--data", data, "--model", checkpoint(FAMILY), "--out", tmp_path / "two"]
    flags += ["--max-new-tokens", 3, "--batch-size", 2]
    command = [*launcher, "--nproc_per_node", 2, evaluate.__file__, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment)
    for name in ("predictions.jsonl", "results.json"):
        assert Path(tmp_path, "two", name).read_text() == Path(tmp_path, "out", name).read_text()
