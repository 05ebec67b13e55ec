"""Users' files as they are: formats, odd and broken images, half-written lines, killed runs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import FAMILY, assert_one_line, read, text_only, write
from PIL import Image, features
from tiny import random_image

import score_dependency
from common.captions import load_image, read_captions
from common.records import BadRecord
from common.stage import prefetch

ROOT = Path(score_dependency.__file__).parent
CAPTIONS = [
    "A red circle. A blue star.",
    "The sky is clear today, and there is a small kite.",
    "Two cats sleep.",
    "一只猫。它很小。",
    "It is 3.5 m tall.",
]
RECORDS = [
    {"id": f"r{i}", "image": f"{i % 3}.png", "caption": caption}
    for i, caption in enumerate(CAPTIONS)
]


@pytest.fixture
def world(tmp_path):
    """A folder with images 0.png to 2.png and captions.jsonl."""
    for i in range(3):
        random_image(i, (40 + 8 * i, 40)).save(tmp_path / f"{i}.png")
    write(tmp_path / "captions.jsonl", RECORDS)
    return tmp_path


@pytest.fixture
def score(stage, checkpoint):
    """score(data, out, *flags) -> (error, printed) of score_dependency.py, two captions a batch."""

    def run(data, out, *flags):
        model = ["--model", checkpoint(FAMILY), "--batch-size", 2]
        return stage(score_dependency, *model, "--data", data, "--out", out, *flags)

    return run


# ------------------------------------------------------------------- formats


def test_jsonl_llava_and_coco_give_the_same_records(tmp_path):
    one = "A red circle. A blue star."
    two = "Two cats sleep."
    images = [(1, "x/1.jpg", one), (2, "2.jpg", two)]

    jsonl = [{"id": i, "image": image, "caption": text} for i, image, text in images]
    write(tmp_path / "a.jsonl", [jsonl[0], "", jsonl[1]])

    llava = []
    for i, image, text in images:
        turns = [("human", "<image>\nDescribe."), ("gpt", text), ("human", "Sure?"), ("gpt", "Yes")]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        llava.append({"id": i, "image": image, "conversations": conversations})
    (tmp_path / "llava.json").write_text(json.dumps(llava))

    coco = {
        "images": [{"id": 1, "file_name": "x/1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "A red circle\n"},
            {"image_id": 2, "caption": two},
            {"image_id": 1, "caption": "A blue star."},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))

    expected = [{"id": str(i), "image": image, "caption": text} for i, image, text in images]
    for name in ("a.jsonl", "llava.json", "coco.json"):
        assert [record for _, record in read_captions(tmp_path / name)] == expected, name


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_byte_order_mark_as_windows_writes_it_costs_no_record(tmp_path, suffix):
    text = json.dumps(RECORDS[0] if suffix == "jsonl" else RECORDS[:1])
    (tmp_path / f"a.{suffix}").write_text(text, encoding="utf-8-sig")
    assert [record for _, record in read_captions(tmp_path / f"a.{suffix}")] == RECORDS[:1]


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": 1, "ima',
        "5",
        '"captions"',
        "{}",
        json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[1]),
    ],
)
def test_json_of_no_known_format_ends_in_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit, match="a.json") as e:
        list(read_captions(tmp_path / "a.json"))
    assert "\n" not in str(e.value)


def test_a_broken_annotation_of_coco_costs_only_itself(tmp_path):
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)] + [{"id": 9}],
        "annotations": [
            {"image_id": 0, "caption": None},
            {"image_id": 1, "caption": "A cat."},
            {"image_id": 2},
            {"caption": "Lost."},
            {"image_id": 77, "caption": "Elsewhere."},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    records = [record for _, record in read_captions(tmp_path / "coco.json")]
    good = [r["id"] for r in records if not isinstance(r, BadRecord) and r["caption"]]
    assert good == ["1"]


# ------------------------------------------------------------------- images


def pixels(tmp_path, name, max_pixels=10**9):
    return np.asarray(load_image(tmp_path, name, max_pixels)).astype(int)


def test_every_kind_of_image_arrives_upright_opaque_and_in_rgb(tmp_path):
    mosaic = random_image(1, (64, 48))
    original = np.asarray(mosaic).astype(int)
    red = Image.new("RGB", (32, 32), (200, 30, 40))

    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(pixels(tmp_path, "cmyk.jpg") - (200, 30, 40)).max() < 10

    # 48 colours: nothing is lost
    palette = mosaic.quantize(64)
    palette.save(tmp_path / "palette.png")
    assert (pixels(tmp_path, "palette.png") == original).all()

    for mode in ("L", "1"):
        mosaic.convert(mode).save(tmp_path / "grey.png")
        grey = np.asarray(mosaic.convert(mode).convert("L"))[..., None]
        assert (pixels(tmp_path, "grey.png") == grey).all()

    # the first frame
    blue = Image.new("RGB", (32, 32), "blue")
    red.save(tmp_path / "moves.gif", save_all=True, append_images=[blue] * 3)
    assert np.abs(pixels(tmp_path, "moves.gif") - (200, 30, 40)).max() < 10

    # to be turned right by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    mosaic.save(tmp_path / "turned.png", exif=exif)
    assert (pixels(tmp_path, "turned.png") == np.rot90(original, -1)).all()

    glass = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    glass.paste((255, 0, 0, 128), (0, 0, 16, 32))
    glass.save(tmp_path / "glass.png")
    corners = pixels(tmp_path, "glass.png")[0, [0, 31]]
    assert corners.tolist() == [[255, 127, 127], [255, 255, 255]]

    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "grey glass.png")
    assert (pixels(tmp_path, "grey glass.png") == 255).all()

    palette.save(tmp_path / "palette glass.png", transparency=palette.getpixel((0, 0)))
    assert pixels(tmp_path, "palette glass.png")[0, 0].tolist() == [255, 255, 255]


def test_a_grey_image_of_16_bits_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    assert np.abs(pixels(tmp_path, "depth.png") - (ramp // 257)[..., None]).max() <= 1


def test_a_large_image_is_shrunk_to_the_limit_and_keeps_its_shape(tmp_path):
    sizes = {"photo": (400, 200), "line": (2000, 1), "dot": (1, 1)}
    images = {}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        images[name] = load_image(tmp_path, f"{name}.png", 1000)
    photo = images["photo"]
    assert photo.width * photo.height <= 1000
    assert photo.width / photo.height == pytest.approx(2, rel=0.05)
    assert images["line"].height == images["dot"].height == images["dot"].width == 1
    assert images["line"].width < 2000


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff", "avif"])
def test_a_damaged_image_is_a_bad_record_and_never_a_crash(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    random_image(1).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    damaged = {
        "empty": b"",
        "header only": whole[:20],
        "cut short": whole[: len(whole) // 2],
        "text": b"<html>404 not found</html>",
    }
    for name, data in damaged.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
        with pytest.raises(BadRecord, match=f"a.{suffix}"):
            load_image(tmp_path, f"a.{suffix}", 10**6), name

    # overwritten: may still decode to something
    for start in range(8, len(whole), max(1, len(whole) // 40)):
        noise = b"\xff\x00\xfe\x7f" * 3
        (tmp_path / f"a.{suffix}").write_bytes(whole[:start] + noise + whole[start + 12 :])
        with contextlib.suppress(BadRecord):
            load_image(tmp_path, f"a.{suffix}", 10**6)


def test_a_path_may_not_leave_the_image_root_but_a_link_inside_may_point_anywhere(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    random_image(1).save(tmp_path / "disk" / "a.png")
    (root / "images").symlink_to(tmp_path / "disk")
    straight = load_image(root, "images/a.png", 10**6)
    assert straight.size == load_image(root, "sub/../images/a.png", 10**6).size

    absolute = str(tmp_path / "disk" / "a.png")
    relative = ["../disk/a.png", "images/../../disk/a.png", "sub/../../disk/a.png"]
    for name in [*relative, absolute]:
        with pytest.raises(BadRecord, match="outside"):
            load_image(root, name, 10**6)


# ------------------------------------------------------------------- broken records, by the script


def test_broken_records_are_named_and_counted_and_the_rest_is_scored(world, checkpoint):
    whole = (world / "0.png").read_bytes()
    (world / "cut.png").write_bytes(whole[: len(whole) // 2])
    (world / "empty.png").write_bytes(b"")
    (world / "text.jpg").write_bytes(b"<html>404</html>")
    random_image(1).convert("CMYK").save(world / "cmyk.jpg")

    good = {"id": "first", "image": "0.png", "caption": "A red circle."}
    broken = [
        ({"image": "missing.png"}, "missing.png does not exist"),
        ({"image": "cut.png"}, "cut.png cannot be read"),
        ({"image": "empty.png"}, "empty.png cannot be read"),
        ({"image": "text.jpg"}, "text.jpg cannot be read"),
        ({"image": "../secret.png"}, "../secret.png lies outside"),
        ({"caption": ["A cat."]}, "strings"),
        ({"id": "first"}, "'first' occurs twice"),
        ({"caption": " "}, "no words"),
        ({"caption": "..."}, "no words"),
        ({"caption": "See <|image_pad|>."}, "image token <|image_pad|>"),
    ]
    bad = []
    for i, (change, reason) in enumerate(broken):
        bad.append(({**good, "id": f"bad{i}", **change}, reason))
    bad.append(('{"id": "bad", "image" "0.png"}', "not JSON"))
    bad.append(("[1, 2]", "not a JSON object"))
    bad.append(({"id": "bad", "image": "0.png"}, "caption"))
    records = [good, *(record for record, _ in bad), "", {**RECORDS[1], "image": "cmyk.jpg"}]
    data = write(world / "broken.jsonl", records)
    with open(data, "a") as f:
        f.write('{"id": "half", "image": "0.pn')  # its writer was killed

    command = [sys.executable, ROOT / "score_dependency.py", "--model", checkpoint(FAMILY)]
    command += ["--data", data, "--out", world / "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr

    reasons = list(enumerate((reason for _, reason in bad), 2))
    reasons.append((len(records) + 1, "not JSON"))
    for number, reason in reasons:
        lines = [line for line in run.stderr.splitlines() if f"skipped {data}:{number}: " in line]
        assert len(lines) == 1 and reason in lines[0], (number, reason, run.stderr)
    assert [r["id"] for r in read(world / "out")] == ["first", "r1"]
    assert f"2 captions scored, {len(bad) + 1} skipped" in run.stdout


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"image": "a\0.png"}, id="NUL in the path"),
        pytest.param({"image": "x" * 5000}, id="long path"),
        pytest.param({"image": "."}, id="a folder"),
        pytest.param({"image": "line.png"}, id="1 x 1000 pixels"),
        pytest.param({"caption": "A \ud83d cat."}, id="half an emoji"),
        pytest.param({"id": "a\ud83d"}, id="half an emoji in the id"),
        pytest.param({"caption": "red " * 600}, id="more tokens than positions"),
    ],
)
def test_what_a_library_cannot_digest_costs_only_its_own_record(world, score, broken):
    # Qwen's image processor raises beyond 200 : 1
    Image.new("RGB", (1000, 1)).save(world / "line.png")
    records = [RECORDS[0], {**RECORDS[1], **broken}, RECORDS[2]]
    (world / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    error, printed = score(world / "data.jsonl", world / "out")
    assert error is None
    assert [r["id"] for r in read(world / "out")] == ["r0", "r2"]
    assert f"skipped {world}/data.jsonl:2: " in printed


@pytest.mark.parametrize("flags", [["--ablation"], []])
def test_a_run_in_which_nothing_can_be_scored_says_so_and_fails(world, score, flags):
    bad = [{"id": 1, "image": "missing.png", "caption": "A cat."}]
    error, _ = score(write(world / "bad.jsonl", bad), world / "out", *flags)
    assert_one_line(error, "bad.jsonl")


@pytest.mark.parametrize(
    "flags",
    [
        ("--layers", "abc"),
        ("--layers", "4"),
        ("--layers", "3-1"),
        ("--limit", "-1"),
        ("--batch-size", "0"),
        ("--correction", "none"),
    ],
)
def test_an_argument_that_makes_no_sense_ends_in_one_line(world, score, flags):
    error, printed = score(world / "captions.jsonl", world / "out", *flags)
    assert_one_line(error)
    assert flags[0] in error or flags[0] in printed


@pytest.mark.parametrize("flag", ["--model", "--data", "--out"])
def test_a_flag_without_which_there_is_nothing_to_do_is_asked_for_by_name(world, stage, flag):
    given = {"--model": "model", "--data": world / "captions.jsonl", "--out": world / "out"}
    del given[flag]
    flags = [part for pair in given.items() for part in pair]
    error, printed = stage(score_dependency, *flags)
    assert error == "2" and f"required: {flag}" in printed
    assert not (world / "out").exists()


# ------------------------------------------------------------------- limit, reuse, kill, ranks


def test_limit_takes_the_first_records_and_a_second_run_reuses_the_file(world, score):
    error, _ = score(world / "captions.jsonl", world / "out", "--limit", 3)
    assert error is None
    assert [r["id"] for r in read(world / "out")] == ["r0", "r1", "r2"]
    before = (world / "out").stat()
    error, printed = score(world / "captions.jsonl", world / "out", "--limit", 3)
    assert error is None and "reused" in printed
    assert (world / "out").stat() == before


@pytest.mark.parametrize("change", ["a flag", "the data", "no record of the run"])
def test_the_output_of_another_run_is_refused_and_left_alone(world, score, change):
    score(world / "captions.jsonl", world / "out")
    before = (world / "out").read_bytes()
    flags = []
    if change == "the data":
        write(world / "captions.jsonl", RECORDS[::-1])
    if change == "no record of the run":
        (world / "out.run.json").unlink()
    if change == "a flag":
        flags = ["--max-pixels", "500"]
    error, _ = score(world / "captions.jsonl", world / "out", *flags)
    assert_one_line(error, world / "out", "choose another --out")
    if change == "a flag":
        assert "max_pixels was 1003520, is 500" in error
    assert (world / "out").read_bytes() == before


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bytes(world, score, monkeypatch):
    # 7 records, in batches of 2 2 2 1
    missing = {**RECORDS[0], "id": "x", "image": "missing.png"}
    data = write(world / "data.jsonl", [missing, *RECORDS, {"id": "y"}])
    score(data, world / "whole")
    calls = []
    real = score_dependency.Scorer.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(score_dependency.Scorer, "__call__", interrupted)
        error, printed = score(data, world / "out")
    assert error == "130" and "error: interrupted; the same command continues" in printed
    assert not (world / "out").exists()
    part = world / "out.part"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4

    part.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # killed in the middle of a line
    error, printed = score(data, world / "out")
    assert error is None and f"resuming {world / 'out'} after record 2" in printed
    assert not part.exists()
    assert (world / "out").read_bytes() == (world / "whole").read_bytes()
    for name in ("out", "whole"):
        counts = json.loads((world / f"{name}.run.json").read_text())["counts"]
        assert counts == {"records": 7, "written": 5, "skipped": 2}


def without_numbers(record, numbers):
    """The record without its scores, which are appended to `numbers`."""
    if isinstance(record, dict):
        return {key: without_numbers(value, numbers) for key, value in record.items()}
    if isinstance(record, list):
        return [without_numbers(value, numbers) for value in record]
    if isinstance(record, float):
        numbers.append(record)
        return "a number"
    return record


def test_two_ranks_write_the_file_of_one(world, score, checkpoint):
    missing = {"id": "x", "image": "missing.png", "caption": "A cat."}
    data = write(world / "data.jsonl", [*RECORDS[:3], missing, *RECORDS[3:]])
    score(data, world / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", ROOT / "score_dependency.py", "--model"]
    command += [checkpoint(FAMILY), "--data", data, "--out", world / "two", "--batch-size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(f"skipped {data}:4: ") == 1
    assert run.stdout.count("5 captions scored, 1 skipped") == 1

    # everything but the numbers must be equal, and they nearly
    one = []
    two = []
    assert without_numbers(read(world / "one"), one) == without_numbers(read(world / "two"), two)
    assert one == pytest.approx(two, abs=1e-5) and len(set(one)) > 10
    assert [r["id"] for r in read(world / "two")] == [r["id"] for r in RECORDS]


def test_prefetching_keeps_the_order_is_one_item_ahead_and_hands_on_errors():
    done = []
    seen = []

    def square(i):
        done.append(i)
        return i * i

    def refuse(i):
        raise BadRecord("x")

    for x in prefetch(square, range(5)):
        seen.append((x, len(done)))
    assert [x for x, _ in seen] == [0, 1, 4, 9, 16]
    assert all(n <= i + 2 for i, (_, n) in enumerate(seen))
    with pytest.raises(BadRecord):
        list(prefetch(refuse, [1]))
    assert list(prefetch(str, [])) == []


# ------------------------------------------------------------------- recipes


def test_a_recipe_gives_flags_with_comments_and_the_command_line_overrides_them(world, score):
    recipe = world / "recipe.txt"
    recipe.write_text("# three records\n--limit 3 --max-pixels 500  # small\n\n--layers 1-2\n")
    error, printed = score(world / "captions.jsonl", world / "out", "--limit", 2, f"@{recipe}")
    assert error is None and "layers [1, 2]" in printed
    settings = json.loads((world / "out.run.json").read_text())["settings"]
    assert (settings["limit"], settings["max_pixels"], settings["layers"]) == (2, 500, [1, 2])
    error, printed = score(world / "captions.jsonl", world / "out", "@no such recipe.txt")
    assert error and "no such recipe.txt" in error + printed and "Traceback" not in printed


# ------------------------------------------------------------------- checkpoints that do not fit


@pytest.mark.parametrize(
    "kind",
    [
        "text only",
        "no chat template",
        "a template without the image",
        "a template that is no Jinja",
        "weights cut short",
        "config cut short",
        "no checkpoint",
    ],
)
def test_an_unfit_checkpoint_is_refused_in_one_line(world, stage, checkpoint, kind):
    folder = world / "model"
    if kind == "text only":
        text_only(folder, checkpoint(FAMILY))
    elif kind != "no checkpoint":
        shutil.copytree(checkpoint(FAMILY), folder)

    template = folder / "chat_template.jinja"
    if kind == "no chat template":
        template.unlink()
    if kind == "a template without the image":
        template.write_text("{{ messages[0].role }}")
    if kind == "a template that is no Jinja":
        template.write_text("{% if")
    if kind == "weights cut short":
        cut_short(folder / "model.safetensors")
    if kind == "config cut short":
        cut_short(folder / "config.json")

    flags = ["--data", world / "captions.jsonl", "--out", world / "out"]
    error, _ = stage(score_dependency, "--model", folder, *flags)
    assert_one_line(error, folder)
    assert not (world / "out").exists()
    assert ("chat template" in error) == ("template" in kind)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:600])
