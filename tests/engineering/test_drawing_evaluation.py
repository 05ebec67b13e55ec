"""lvrpo/evaluate.py: what is drawn depends on seed, prompt and sample alone, and is judged right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.drawing_prompts import load_prompts, read_prompts
from common.drawings import drawings_of_codes, encode_drawing
from common.policy import Policy
from common.records import BadRecord, load_records
from common.sheets import sheet
from common.vlm import load_vlm
from lvrpo import evaluate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RED = {"class": "circle", "count": 1, "color": "red"}
BESIDE = {"class": "square", "count": 1, "position": ["left of", 0]}
PROMPTS = [
    {"tag": "colors", "include": [RED], "prompt": "A red circle."},
    {"tag": "position", "include": [RED, BESIDE], "prompt": "A square left of a red circle."},
    {"tag": "colors", "include": [{**RED, "color": "blue"}], "prompt": "A blue circle, é?"},
]
# finds a red circle in whatever is drawn, and a square left of it if the middle is reddish
DETECTOR = """
from common.judges import Detection

def detect(images, records):
    found = []
    for image, record in zip(images, records):
        assert image.size == (32, 32) and record["prompt"]
        objects = {"circle": [Detection((20, 10, 28, 18), 0.95, "red")]}
        red, green, _ = image.getpixel((16, 16))
        if red > green:
            objects["square"] = [Detection((2, 10, 8, 18), 0.95, None)]
        found.append(objects)
    return found
"""


def write_prompts(path, prompts):
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def run(stage, checkpoint, tmp_path, monkeypatch):
    """run(out, *flags) -> (error, printed) draws PROMPTS with a tiny Janus into tmp_path/out."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / "eyes.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(out, *flags):
        given = ("--model", checkpoint("janus"), "--prompts", prompts, "--out", tmp_path / out)
        return stage(evaluate, *given, *flags)

    return run


def files_of(folder):
    """{path in a folder: bytes}, without the seconds of run.json."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "drawings.jsonl.run.json":
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def images_of(folder):
    return {name: data for name, data in files_of(folder).items() if name.startswith("0")}


# ---------------------------------------------------------------- what is drawn


def test_the_layout_is_that_of_geneval_and_every_sample_differs(run, tmp_path):
    error, printed = run("out", "--samples", 3)
    assert error is None and "diversity" in printed
    names = set(images_of(tmp_path / "out"))
    expected = {f"{i:05d}/samples/{s:04d}.png" for i in range(3) for s in range(3)}
    assert names == expected | {f"{i:05d}/metadata.jsonl" for i in range(3)}
    lines = (tmp_path / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    for i, line in enumerate(lines):
        assert (tmp_path / f"out/{i:05d}/metadata.jsonl").read_bytes() == line

    drawings = load_records(tmp_path / "out/drawings.jsonl")
    assert [(d["id"], d["number"], d["sample"]) for d in drawings] == [
        (str(i), i, s) for i in range(3) for s in range(3)
    ]
    pixels = set()
    for drawing in drawings:
        with Image.open(tmp_path / "out" / drawing["image"]) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
            pixels.add(image.tobytes())
    assert len(pixels) == 9
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["written"] == 9 and results["records"] == 3 and results["skipped"] == 0
    everything = {"value": 100.0, "low": 100.0, "high": 100.0, "n": 9}
    assert results["drawing"] == {"diversity": everything}
    with Image.open(tmp_path / "out/drawings.png") as page:
        assert page.width > 3 * 96 and page.height > 3 * 96


def test_batch_and_number_of_samples_change_no_drawing_and_the_seed_does(run, tmp_path):
    judged = ("--detector", "eyes:detect")
    run("all", "--samples", 3, *judged)
    run("each", "--samples", 3, "--batch-size", 1, *judged)
    assert files_of(tmp_path / "all").keys() == files_of(tmp_path / "each").keys()
    assert images_of(tmp_path / "all") == images_of(tmp_path / "each")
    drawings = [(tmp_path / out / "drawings.jsonl").read_bytes() for out in ("all", "each")]
    assert drawings[0] == drawings[1]

    run("fewer", "--samples", 1, "--limit", 2)
    fewer = images_of(tmp_path / "fewer")
    assert len(fewer) == 4 and fewer.items() <= images_of(tmp_path / "all").items()
    run("other", "--samples", 1, "--limit", 2, "--seed", 1)
    other = images_of(tmp_path / "other")
    assert all(fewer[name] != other[name] for name in fewer if name.endswith(".png"))


def test_a_killed_run_gives_the_files_of_a_straight_one(run, tmp_path, monkeypatch):
    flags = ("--samples", 2, "--batch-size", 1, "--detector", "eyes:detect")
    run("straight", *flags)
    real = evaluate.save_image
    calls = []

    def interrupted(image, path):
        calls.append(path)
        if len(calls) == 6:  # the last image
            raise KeyboardInterrupt
        real(image, path)

    with monkeypatch.context() as m:
        m.setattr(evaluate, "save_image", interrupted)
        error, _ = run("resumed", *flags)
    assert error == "130" and not (tmp_path / "resumed/results.json").exists()
    part = tmp_path / "resumed/drawings.jsonl.part"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    part.write_bytes(lines[0] + lines[1][:40])  # killed in the middle of a line

    error, printed = run("resumed", *flags)
    assert error is None and "after record 1" in printed
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "straight")
    error, printed = run("resumed", *flags)
    assert error is None and "reused" in printed


@pytest.mark.parametrize("guidance", (1.0, 5.0))
def test_greedy_drawings_are_the_most_likely_codes(run, tmp_path, checkpoint, guidance):
    error, _ = run("out", "--temperature", 0, "--samples", 1, "--guidance", guidance)
    assert error is None
    policy = Policy(*load_vlm(checkpoint("janus"), CPU), temperature=0, guidance=guidance)
    for i, record in enumerate(PROMPTS):
        prompt = encode_drawing(policy.model, policy.processor, record["prompt"])
        prompt["position_ids"] = torch.arange(prompt["input_ids"].shape[1])[None]
        with torch.no_grad():
            codes, *_ = policy(prompt, 1, torch.zeros(1, 16), medium="image")
        (expected,) = drawings_of_codes(policy.model, policy.processor, codes)
        with Image.open(tmp_path / f"out/{i:05d}/samples/0000.png") as image:
            assert image.tobytes() == expected.tobytes()


def test_wise_wants_one_file_per_id(run, tmp_path, stage, checkpoint):
    names = ["a", "7", "../up", "a", "drawings", "b.c"]
    prompts = [{"id": name, "prompt": f"Draw {name}."} for name in names]
    path = write_prompts(tmp_path / "wise.jsonl", prompts)
    error, printed = run("out", "--prompts", path, "--layout", "wise", "--samples", 1)
    assert error is None
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        *("a.png", "7.png", "b.c.png", "drawings.png")
    }
    for line in (3, 4, 5):
        assert f"wise.jsonl:{line}: its id is taken, or cannot name a file" in printed
    assert not (tmp_path / "up.png").exists()


def test_as_a_module_it_draws_and_is_refused_in_one_line(tmp_path, checkpoint):
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    command = [sys.executable, "-m", "lvrpo.evaluate", "--model", checkpoint("qwen2_5_vl")]
    command += ["--prompts", prompts, "--out", tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "cannot draw" in lines[-1]
    assert lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out/drawings.jsonl.run.json").exists()


# ---------------------------------------------------------------- what is measured


def test_verdicts_are_those_of_geneval_with_intervals_over_prompts(run, tmp_path):
    error, printed = run("out", "--samples", 4, "--detector", "eyes:detect")
    assert error is None and "right, colors" in printed
    drawings = load_records(tmp_path / "out/drawings.jsonl")
    for drawing in drawings:
        with Image.open(tmp_path / "out" / drawing["image"]) as image:
            red, green, _ = image.getpixel((16, 16))
        held = {
            0: [True, True],
            1: [True, True, red > green, red > green],
            2: [True, False],
        }[drawing["number"]]
        assert [holds for _, holds in drawing["clauses"]] == held
        assert drawing["right"] == int(all(held))
        assert drawing["graded"] == sum(held) / len(held)
    assert drawings[0]["clauses"][1][0] == "red circle"
    both = np.mean([d["right"] for d in drawings if d["number"] == 1])
    assert 0 < both < 1, "both kinds of drawings are needed here"

    results = json.loads((tmp_path / "out/results.json").read_text())["drawing"]
    assert results["right, colors"]["value"] == 50.0 and results["right, colors"]["n"] == 8
    assert results["right, position"]["value"] == 100 * both
    assert results["overall"]["value"] == (50 + 100 * both) / 2
    assert results["right"]["value"] == round((4 + 4 * both) / 12 * 100, 2)
    graded = (4 + 2 + 4 * (1 + both) / 2) / 12 * 100
    assert results["graded"]["value"] == round(graded, 2)
    # the unit is the prompt: all samples of one are right, and all of the other wrong
    assert (results["right, colors"]["low"], results["right, colors"]["high"]) == (0.0, 100.0)
    # the only prompt of its tag: no resampling changes it
    assert results["right, position"]["low"] == results["right, position"]["high"]
    for entry in results.values():
        assert entry.keys() == {"value", "low", "high", "n"}


def test_clip_and_another_model_judge_drawings_as_lvrpo_rewards_them(
    run, tmp_path, clip_folder, checkpoint
):
    judges = ("--clip", clip_folder, "--knowledge", checkpoint("qwen2_5_vl"))
    error, _ = run("out", "--samples", 2, "--batch-size", 2, *judges)
    assert error is None
    drawings = load_records(tmp_path / "out/drawings.jsonl")
    for name in ("sem", "kn"):
        values = [drawing[name] for drawing in drawings]
        assert all(0 <= value <= 1 for value in values) and len(set(values)) > 3
        entry = json.loads((tmp_path / "out/results.json").read_text())["drawing"][name]
        assert entry["value"] == pytest.approx(100 * np.mean(values), abs=0.006)
    assert "right" not in drawings[0]


def test_gains_are_paired_and_other_settings_are_refused(run, tmp_path):
    judged = ("--samples", 2, "--detector", "eyes:detect")
    assert run("base", *judged)[0] is None
    error, printed = run("same", *judged, "--compare", tmp_path / "base")
    assert error is None and "noise\n" in printed
    results = json.loads((tmp_path / "same/results.json").read_text())
    gain = results["compared"]["drawing"]["overall"]
    assert gain == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 6, "verdict": "noise"}
    assert results["compared_with"] == str(tmp_path / "base")

    changes = {"samples": 3, "guidance": 2, "temperature": 0.5, "seed": 1, "limit": 2}
    for name, value in changes.items():
        flags = (*judged, f"--{name}", value)
        error, _ = run("new", *flags, "--compare", tmp_path / "base")
        assert f"made with another {name};" in error and "\n" not in error
    error, _ = run("new", *judged, "--compare", tmp_path)
    assert "holds no finished drawings" in error and "\n" not in error
    assert not (tmp_path / "new").exists(), "it ends before anything is drawn"


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--temperature", 0), "--samples 1"),
        (("--layout", "wise"), "--samples 1"),
        (("--detector", "eyes:nothing"), "cannot be imported"),
        (("--detector", "owl"), "--clip"),
        (("--prompts", "bare.jsonl", "--detector", "eyes:detect"), "no prompt of bare.jsonl"),
        (("--prompts", "broken.jsonl"), "none of its prompts"),
        (("--prompts", "broken.jsonl", "--detector", "eyes:detect"), "none of its prompts"),
        (("--prompts", "absent.jsonl"), "no such file"),
    ],
)
def test_what_cannot_work_ends_in_one_line(run, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"prompt": "A dog."}\n')
    Path("broken.jsonl").write_text('{"prompt": ""}\n')
    error, _ = run("out", *flags)
    assert error.startswith("error: ") and says in error and "\n" not in error
    assert not Path("out/drawings.jsonl").exists()


# ---------------------------------------------------------------- prompts


def test_broken_lines_are_named_counted_and_leave_their_number_free(run, tmp_path):
    lines = [json.dumps(PROMPTS[0]), "not JSON", '{"prompt": "  "}', json.dumps(PROMPTS[1])]
    lines.append(json.dumps({"prompt": "An <image_placeholder>."}))
    lines.append(json.dumps({"prompt": "A <begin_of_image>."}))
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    error, printed = run("out", "--prompts", tmp_path / "some.jsonl", "--samples", 1)
    assert error is None and "4 prompts skipped" in printed
    for number, why in ((2, "not JSON"), (3, "prompt, id and tag"), (5, "image token")):
        assert f"some.jsonl:{number}: " in printed and why in printed
    assert "some.jsonl:6: the text contains the token <begin_of_image>" in printed
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"00000", "00003"}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["records"], results["written"], results["skipped"]) == (6, 2, 4)


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, None),
        ({"id": 7}, None),
        ({"include": [RED, BESIDE], "exclude": [{"class": "dog", "count": 2}]}, None),
        ({"include": []}, None),
        ({"prompt": 3}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"id": []}, "id"),
        ({"id": True}, "id"),
        ({"tag": None}, "tag"),
        ({"include": {}}, "include"),
        ({"include": ["dog"]}, "include"),
        ({"include": [{"class": "dog"}]}, "include"),
        ({"include": [{"class": ["dog"], "count": 1}]}, "include"),
        ({"include": [{"class": "dog", "count": 0}]}, "include"),
        ({"include": [{"class": "dog", "count": 1.0}]}, "include"),
        ({"include": [{**RED, "color": 1}]}, "include"),
        ({"include": [BESIDE]}, "include"),
        ({"include": [RED, {**BESIDE, "position": ["left of", -1]}]}, "include"),
        ({"include": [RED, {**BESIDE, "position": ["near", 0]}]}, "include"),
        ({"include": [RED, {**BESIDE, "position": ["left of"]}]}, "include"),
        ({"include": [RED, {**BESIDE, "position": None}]}, "include"),
        ({"exclude": [{"class": "dog"}]}, "exclude"),
        ({"exclude": "dog"}, "exclude"),
    ],
)
def test_a_prompt_is_usable_only_if_geneval_can_judge_it(tmp_path, change, says):
    path = write_prompts(tmp_path / "prompts.jsonl", [PROMPTS[0], PROMPTS[0] | change])
    _, (number, record) = read_prompts(path)
    assert number == 2
    if says is None:
        assert record["id"] == str(change.get("id", 1))
        assert isinstance(evaluate.clauses({"circle": []}, record), list)
    else:
        assert isinstance(record, BadRecord) and says in str(record).split(" must ")[0]


def test_a_file_without_a_usable_prompt_ends_in_one_line(tmp_path, capsys):
    path = write_prompts(tmp_path / "prompts.jsonl", [{"prompt": ""}, PROMPTS[0]])
    assert [record["id"] for record in load_prompts(path)] == ["1"]
    assert "prompts.jsonl:1: prompt" in capsys.readouterr().out
    write_prompts(path, [{"prompt": ""}])
    with pytest.raises(SystemExit, match="no prompt that can be used"):
        load_prompts(path)


# ---------------------------------------------------------------- images


def test_colours_are_those_that_the_image_processor_normalised(checkpoint, monkeypatch):
    model, processor = load_vlm(checkpoint("janus"), CPU)
    x = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    normalised = processor.image_processor(Image.fromarray(x), return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(model, "decode_image_tokens", lambda codes: normalised.permute(0, 2, 3, 1))
    (image,) = drawings_of_codes(model, processor, torch.zeros(1, 16, dtype=torch.long))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), x)


def test_a_decoded_image_is_that_of_transformers_up_to_rounding(checkpoint):
    model, processor = load_vlm(checkpoint("janus"), CPU)
    codes = torch.randint(0, 48, (40, 16), generator=torch.Generator().manual_seed(0))
    images = drawings_of_codes(model, processor, codes)
    assert len(images) == 40, "of more than one chunk"
    with torch.no_grad():
        decoded = model.decode_image_tokens(codes)
    pixels = processor.image_processor.postprocess(decoded, return_tensors="pt")["pixel_values"]
    for image, expected in zip(images, pixels.permute(0, 2, 3, 1).numpy()):
        difference = np.asarray(image).astype(int) - expected
        assert difference.min() >= 0 and difference.max() <= 1


def test_a_sheet_enlarges_tiny_drawings_and_cuts_long_captions():
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    page = sheet(images, ["short", "two\nlines", "long " * 50], 2)
    # five times as large; four lines of text, of which the longest caption fills all
    assert page.size == (2 * 168, 2 * (160 + 62 + 4))
    assert page.getpixel((80, 80)) == (255, 0, 0) and page.getpixel((250, 80)) == (0, 255, 0)
    assert page.getpixel((80, 300)) == (0, 0, 255) and page.getpixel((250, 300)) == (255,) * 3
    large = sheet([Image.new("RGB", (384, 384))], ["x"], 1)
    assert large.size == (392, 384 + 20 + 4)
