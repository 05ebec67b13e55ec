"""Hostile input to the real scripts: handled as a user expects, or refused in one line that says
what to do, and nothing that was written is lost. test_data.py has what score_dependency.py meets.
"""

import json
import resource
import struct
import zlib

import pytest
from inputs import FAMILY, assert_one_line, completion, read, scored, skipped, text_only, write
from PIL import Image
from tiny import random_image
from transformers import AutoProcessor

import build_masks
import evaluate
import grpo_train
import score_dependency
from common import captions
from common.records import BadRecord
from reward import Reward

RECORDS = [
    {"id": "r0", "image": "0.png", "caption": "A red circle. A blue star."},
    {"id": "r1", "image": "1.png", "caption": "Two cats."},
]
TEXT = "There is a [MASK]."
MASKS = [
    {
        "id": f"m{i}",
        "image": f"{i}.png",
        "masked_caption": TEXT,
        "sentence": TEXT,
        "answer": "thing",
    }
    for i in range(2)
]


def bomb(path):
    """A PNG of 100 bytes whose header claims 30,000 x 30,000 pixels: 2.7 GB."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


@pytest.fixture
def world(tmp_path):
    """Two images, and the input of every stage: captions.jsonl, scores.jsonl, masks.jsonl."""
    for i in range(2):
        random_image(i, (40 + 8 * i, 40)).save(tmp_path / f"{i}.png")
    write(tmp_path / "captions.jsonl", RECORDS)
    write(tmp_path / "masks.jsonl", MASKS)
    write(tmp_path / "scores.jsonl", [scored("Two cats.")])
    return tmp_path


SMALL = ["--steps", 1, "--prompts-per-step", 2, "--group-size", 2, "--max-new-tokens", 3]
# name of a stage: module, input in the world, its flag, more flags
STAGES = {
    "score": (score_dependency, "captions.jsonl", "--data", ["--batch-size", 2]),
    "masks": (build_masks, "scores.jsonl", "--scores", []),
    "train": (grpo_train, "masks.jsonl", "--data", [*SMALL, "--reward", "semantic=1"]),
    "evaluate": (evaluate, "masks.jsonl", "--data", ["--max-new-tokens", 3]),
}


@pytest.fixture
def run(stage, checkpoint, world):
    """run(name, data, *flags) -> (error, printed) of a stage whose output is world/out."""

    def go(name, data=None, *flags):
        module, source, given, more = STAGES[name]
        model = [] if name == "masks" else ["--model", checkpoint(FAMILY)]
        paths = [given, data or world / source, "--out", world / "out"]
        return stage(module, *model, *paths, *more, *flags)

    return go


# ------------------------------------------------------------------- images


# pytest resets the filter of the script
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_kind_of_image_is_scored_and_every_broken_one_costs_a_line(world, run):
    mosaic = random_image(3, (64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    mosaic.convert("CMYK").save(world / "cmyk.jpg")
    mosaic.quantize(16).save(world / "palette.png")
    mosaic.save(world / "moves.gif", save_all=True, append_images=[random_image(4, (64, 48))])
    mosaic.save(world / "turned.jpg", exif=exif)
    # 95 megapixels, above Pillow's warning
    Image.new("RGB", (10000, 9500), "red").save(world / "honest.jpg")

    whole = (world / "0.png").read_bytes()
    (world / "cut.png").write_bytes(whole[: len(whole) // 2])
    (world / "empty.png").write_bytes(b"")
    (world / "page.jpg").write_bytes(b"<html>404</html>")
    bomb(world / "bomb.png")
    (world / "folder.png").mkdir()

    good = ["0.png", "cmyk.jpg", "palette.png", "moves.gif", "turned.jpg", "honest.jpg"]
    bad = ["missing.png", "cut.png", "empty.png", "page.jpg", "bomb.png", "folder.png"]
    bad += ["../0.png", "sub/../../0.png", "/0.png", "a\nb.png"]
    records = [{"id": name, "image": name, "caption": "A cat."} for name in good + bad]
    data = write(world / "data.jsonl", records)
    error, printed = run("score", data)
    assert error is None and [r["id"] for r in read(world / "out")] == good
    lines = skipped(printed)
    assert len(lines) == len(bad), printed
    for number, (name, line) in enumerate(zip(bad, lines), len(good) + 1):
        assert line.startswith(f"skipped {data}:{number}: image "), line
        assert name.replace("\n", " ") in line, line


def test_a_decompression_bomb_is_refused_by_its_header_and_takes_no_memory(world):
    bomb(world / "bomb.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, of the session so far
    with pytest.raises(BadRecord, match="bomb.png cannot be read"):
        captions.load_image(world, "bomb.png", 10**6)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack"),
        KeyError("tag"),
        AttributeError("stkoffset"),
        EOFError(),
        MemoryError(),
        SyntaxError("broken PNG\nof two lines"),
        OverflowError(),
    ],
)
def test_whatever_a_decoder_raises_costs_the_record_in_one_line(world, monkeypatch, error):
    def raises(image):
        raise error

    monkeypatch.setattr(captions.ImageOps, "exif_transpose", raises)
    with pytest.raises(BadRecord, match="0.png cannot be read") as e:
        captions.load_image(world, "0.png", 10**6)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_later_stages_name_a_broken_image_and_go_on(world, run, name):
    bomb(world / "bomb.png")
    images = ("bomb.png", "../0.png", "missing.png", "a\0.png", "0.png")
    data = write(world / "data.jsonl", [{**MASKS[0], "id": i, "image": i} for i in images])
    flags = ["--prompts-per-step", 5] if name == "train" else []
    error, printed = run(name, data, *flags)
    assert error is None, error
    lines = skipped(printed)
    assert len(lines) == 4, lines
    for text in ("bomb.png", "../0.png", "missing.png", "null byte"):
        assert any(text in line for line in lines), lines


# ------------------------------------------------------------------- records


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_records_as_people_have_them_are_scored_and_broken_ones_are_named(world, run, suffix):
    good = [
        {**RECORDS[0], "id": 7},
        {**RECORDS[0], "id": None},
        {**RECORDS[1], "id": "nul", "caption": "A \0 cat. Red."},
        {**RECORDS[1], "id": "one", "caption": "Cat"},
    ]
    no_object = "not a JSON object" if suffix == "jsonl" else "not a caption record"
    bad = [
        ({**RECORDS[0], "id": "7"}, "occurs twice"),
        ({**RECORDS[0], "caption": 5}, "strings"),
        ({"id": "x", "image": "0.png"}, "caption"),
        (7, no_object),
        ({**RECORDS[0], "id": "e", "caption": ""}, "no words"),
        ({**RECORDS[0], "id": "long", "caption": "word " * 10_000}, "exceeds"),
        ({**RECORDS[0], "id": "t", "caption": "<|image_pad|> cat"}, "image token"),
        ({**RECORDS[0], "id": "s", "caption": "half \ud83d an emoji"}, "surrogates"),
    ]
    records = good + [record for record, _ in bad]
    text = json.dumps(records)
    if suffix == "jsonl":
        text = "".join(json.dumps(record) + "\r\n" for record in records)  # as Windows ends lines
    data = world / f"data.{suffix}"
    data.write_bytes(text.encode())

    error, printed = run("score", data)
    assert error is None
    assert [r["id"] for r in read(world / "out")] == ["7", "None", "nul", "one"]
    lines = skipped(printed)
    assert len(lines) == len(bad)
    for number, (_, reason) in enumerate(bad, len(good) + 1):
        start = f"skipped {data}:{number}: "
        assert any(line.startswith(start) and reason in line for line in lines), (reason, lines)


def test_text_of_any_script_comes_back_whole_from_scores_masks_and_rewards(world, run, stage):
    texts = [
        "A 👩‍👧 smiles! 🎉 Then rain.",
        "红色的圆。它很小！",
        "שלום עולם. זה עיגול אדום.",
        "e\u0301t\u00e9 à la\u202eplage. Ｗｉｄｅ.",
        "Cat",
    ]
    records = [{"id": str(i), "image": "0.png", "caption": text} for i, text in enumerate(texts)]
    data = write(world / "data.jsonl", records)
    assert run("score", data)[0] is None
    assert [r["caption"] for r in read(world / "out")] == texts
    for record in read(world / "out"):
        for sentence in record["sentences"]:
            for part in (sentence, *sentence["words"]):
                text = record["caption"][part["start"] : part["end"]]
                assert text == text.strip() == part.get("text", text) != ""

    for granularity in ("span", "sentence"):
        flags = ["--threshold", "-1", "--granularity", granularity]
        out = world / granularity
        error, _ = stage(build_masks, "--scores", world / "out", "--out", out, *flags)
        masks = read(out)
        assert error is None and {m["id"] for m in masks} == set("01234")
        for mask in masks:
            restored = mask["masked_caption"].replace("[MASK]", mask["answer"])
            assert restored == texts[int(mask["id"])]

        right = [[completion(mask["answer"])] for mask in masks]
        semantic = Reward({"semantic": 1}, "rouge_l")(masks, None, right)["semantic"]
        assert semantic.tolist() == [[1]] * len(masks)


@pytest.mark.parametrize("tag", ["[MASK]", "<think>", "</think>", "<answer>", "</answer>"])
def test_a_caption_that_holds_the_mask_or_an_answer_tag_is_refused_by_name(world, run, tag):
    """Its masks could not be undone, or no completion could pass the gate with them."""
    captions = ["Two cats.", f"A sign reads {tag} in red. A cat.", "No dog."]
    data = write(world / "scores.jsonl", [scored(caption) for caption in captions])
    error, printed = run("masks")
    assert error is None
    assert f"skipped {data}:2: the caption contains [MASK] or an answer tag" in printed
    assert "2 masks, 1 of 3 captions skipped" in printed
    assert len(read(world / "out")) == 2


NUMBERS = {"score": 0.5, "d_vis": 0.5, "position_baseline": 0.0, "density": 0.5}
WORD = {"start": 0, "end": 3, **NUMBERS, "producing": NUMBERS}


@pytest.mark.parametrize(
    "broken",
    [
        {"words": [{**NUMBERS, "producing": NUMBERS}]},
        {"words": [{**WORD, "end": 999}]},
        {"words": [{**WORD, "start": "a", "end": None}]},
        {"words": [{**WORD, "start": 4, "end": 2}]},
        {"words": [{"start": 0, "end": 3, **NUMBERS}]},
        {"words": [{**WORD, "producing": {**NUMBERS, "d_vis": float("nan")}}]},
        {"words": []},
        {"d_vis": float("nan")},
        {"density": float("inf")},
        {"position_baseline": None},
        {"ablation": "x"},
        {"start": -9, "end": None},
        {"text": "Ten cats."},
    ],
    ids=lambda change: str(change)[:60],
)
def test_scores_that_do_not_fit_their_caption_cost_only_their_record(world, run, broken):
    records = [scored("Two cats."), scored("Two cats.", **broken), scored("No dog.")]
    data = write(world / "scores.jsonl", records)
    error, printed = run("masks")
    assert error is None and skipped(printed)[0].startswith(f"skipped {data}:2: ")
    assert len(read(world / "out")) == 2


def test_the_same_scores_unbroken_cost_no_record(world, run):
    write(world / "scores.jsonl", [scored("Two cats.", words=[WORD])])
    error, printed = run("masks")
    assert error is None and not skipped(printed)


@pytest.mark.parametrize(
    "change",
    [
        {"answer": 5},
        {"answer": "..."},
        {"answer": " "},
        {"answer": "a</answer>"},
        {"sentence": "<think> [MASK]"},
        {"sentence": "No mask."},
        {"masked_caption": "[MASK] and [MASK]"},
        {"masked_caption": "<|image_pad|> [MASK]"},
        {"masked_caption": "[MASK]" + " word" * 10_000},
        {"answer": "\ud83d"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_mask_that_cannot_be_answered_is_named_by_the_evaluation(world, run, change):
    lines = [json.dumps(record) for record in ({**MASKS[0], **change}, MASKS[1])]
    (world / "masks.jsonl").write_text("\n".join(lines) + '\n{"id": "half a l')
    error, printed = run("evaluate")
    assert error is None
    numbers = [line.split(": ")[0] for line in skipped(printed)]
    assert numbers == [f"skipped {world}/masks.jsonl:{n}" for n in (1, 3)]
    assert {r["id"] for r in read(world / "out" / "predictions.jsonl")} == {"m1"}


ANSWERS = [
    "<answer>red</answer>",
    "</think>",
    "a</answer><answer>b",
    "[MASK]",
    "<|image_pad|>",
    "red " * 10_000,
    "🙂红",
]


@pytest.mark.parametrize("credit", ["exact", "rouge_l", "prefix"])
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer[:20])
def test_an_answer_may_hold_anything_and_earns_no_more_than_1(checkpoint, answer, credit):
    tokenizer = AutoProcessor.from_pretrained(checkpoint(FAMILY)).tokenizer
    reward = Reward({"semantic": 1}, credit, tokenizer=tokenizer)
    components = reward(MASKS[:1], None, [[completion(answer), completion("thing")]])
    wrong, right = components["semantic"][0].tolist()
    assert 0 <= wrong < right == 1
    has_tag = any(tag in answer for tag in ("think>", "answer>"))
    assert components["format"][0].tolist() == [float(not has_tag), 1]


@pytest.mark.parametrize(
    "name, wrong",
    [("score", "masks"), ("masks", "masks"), ("train", "captions"), ("evaluate", "captions")],
)
def test_a_file_of_another_stage_or_of_none_and_a_folder_are_refused(world, run, name, wrong):
    (world / "empty").write_text("")
    bomb(world / "binary")
    paths = [world / file for file in (f"{wrong}.jsonl", "empty", "binary", "missing.jsonl")]
    for data in [*paths, world]:
        error, _ = run(name, data)
        assert_one_line(error, data)
        assert not (world / "out").is_file() and not list(world.glob("out/predictions*"))


# ------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["score", "train", "evaluate"])
def test_a_model_that_is_none_is_refused_and_leaves_no_output(world, run, checkpoint, name):
    text_only(world / "text", checkpoint(FAMILY))
    (world / "nothing").mkdir()
    for model in (world / "text", world / "nothing", world / "0.png", "no/such-model"):
        error, _ = run(name, None, "--model", model)
        assert_one_line(error, model)
        assert name != "train" or not list((world / "out").glob("*"))
        for path in (world / "out.run.json", world / "out.part"):
            path.unlink(missing_ok=True)
        for path in (world / "out").glob("*"):
            path.unlink()


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_clip_that_is_none_is_refused_in_one_line(world, run, checkpoint, name):
    visual = ["--reward", "visual=1"] if name == "train" else []
    for clip in ("no-such-clip", world / "0.png", checkpoint(FAMILY)):
        error, _ = run(name, None, *visual, "--clip", clip)
        assert_one_line(error, "--clip", clip)
        for path in (world / "out").glob("predictions*"):
            path.unlink()


def test_after_a_refusal_the_right_command_works_in_the_same_folder(world, run):
    """A run that stopped before its first step binds no settings."""
    error, _ = run("train", None, "--reward", "visual=1", "--clip", "no-such-clip")
    assert_one_line(error)
    error, printed = run("train")
    assert error is None and "checkpoint-1: done" in printed


# ------------------------------------------------------------------- flags, folders, foreign files

POSITIVE = {
    "score": ["--max-pixels", "--batch-size", "--limit"],
    "masks": ["--max-masks"],
    "evaluate": ["--batch-size", "--max-new-tokens", "--max-pixels", "--limit", "--clip-others"],
    "train": [
        *("--steps", "--prompts-per-step", "--group-size", "--max-new-tokens", "--updates"),
        *("--tokens-per-forward", "--max-pixels", "--save-every", "--log-every", "--sample-every"),
        *("--keep", "--temperature", "--clip-others"),
    ],
}
NOT_NEGATIVE = {"train": ["--lr", "--beta", "--clip-eps", "--max-grad-norm"]}


@pytest.mark.parametrize("name", POSITIVE)
def test_a_number_out_of_its_range_is_refused_with_the_name_of_its_flag(world, run, name):
    cases = [(flag, value) for flag in POSITIVE[name] for value in ("0", "-1", "x")]
    for flag in NOT_NEGATIVE.get(name, ()):
        cases += [(flag, value) for value in ("-1", "nan", "inf")]
    for flag, value in cases:
        error, printed = run(name, None, flag, value)
        assert error and flag in error + printed, (flag, value, error)
        assert "Traceback" not in printed, (flag, value, error)
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    "weights",
    [
        ["semantic=0", "visual=0"],
        ["semantic=-1"],
        ["semantic=nan"],
        ["visual=inf"],
        ["semantic=x"],
        ["semantic"],
        ["beauty=1"],
        [],
    ],
    ids=str,
)
def test_weights_that_reward_nothing_or_make_no_sense_are_refused(world, run, weights):
    error, printed = run("train", None, "--reward", *weights)
    assert error and "--reward" in error + printed and "Traceback" not in printed
    assert "\n" not in error and not (world / "out").exists()


@pytest.mark.parametrize("name", ["score", "train", "evaluate"])
def test_an_image_root_that_is_no_folder_is_said_once(world, run, name):
    for root in (world / "nowhere", world / "0.png"):
        error, printed = run(name, None, "--image-root", root)
        assert_one_line(error, "--image-root", root)
        assert not skipped(printed) and not (world / "out").exists()


@pytest.mark.parametrize("name", ["score", "evaluate", "masks"])
def test_a_run_that_wrote_nothing_can_be_tried_again_with_the_same_command(world, run, name):
    """Images unpacked after the first try, or a lower threshold: an output without records stands
    in nobody's way."""
    flags = ["--threshold", "0.9"] if name == "masks" else []
    for i in range(2):
        (world / f"{i}.png").rename(world / f"{i}.later")
    assert_one_line(run(name, None, *flags)[0])
    for i in range(2):
        (world / f"{i}.later").rename(world / f"{i}.png")
    assert run(name)[0] is None


@pytest.mark.parametrize("name", STAGES)
def test_an_out_that_is_a_file_of_somebody_else_is_refused_and_left_alone(world, run, name):
    (world / "file").write_text("precious")
    for out in (world / "file", world / "file" / "below", world / "file" / "far" / "below"):
        assert_one_line(run(name, None, "--out", out)[0], world / "file")
    assert (world / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "written, says",
    [
        ({"metrics.jsonl": "precious"}, "no run.json"),
        ({"checkpoint-1/weights": "precious"}, "no run.json"),
        ({"samples.txt": "precious"}, "no run.json"),
        ({"curves.png": "precious"}, "no run.json"),
        ({"run.json": "[]", "metrics.jsonl": "precious"}, "run.json"),
        ({"run.json": '{"settings": {"see', "checkpoint-9/x": "precious"}, "run.json"),
        (
            {"run.json": '{"settings": {"seed": 5}}', "metrics.jsonl": "precious"},
            "another run",
        ),
    ],
    ids=str,
)
def test_a_folder_of_another_program_is_neither_continued_nor_cut(world, run, written, says):
    out = world / "out"
    for name, text in written.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    tries = [[], ["--no-resume"]] if says == "no run.json" else [[]]
    for flags in tries:
        error, _ = run("train", None, *flags)
        assert_one_line(error, out, says, "choose another --out")
        files = [path for path in out.rglob("*") if path.is_file()]
        assert {str(path.relative_to(out)): path.read_text() for path in files} == written


@pytest.mark.parametrize(
    "name, file", [("score", "out"), ("masks", "out"), ("evaluate", "out/predictions.jsonl")]
)
def test_a_record_of_the_run_that_is_damaged_is_refused_and_the_output_kept(world, run, name, file):
    assert run(name)[0] is None
    before = (world / file).read_bytes()
    for text in ("", "[]", '{"settings": 5}', "\0"):
        (world / f"{file}.run.json").write_text(text)
        assert_one_line(run(name)[0], f"{file}.run.json", "choose another --out")
    assert (world / file).read_bytes() == before != b""
