"""Inputs, flags and checkpoints that once hung, ate memory, or ended in a traceback: each costs one
line that says what to do, and a bad record costs itself. They go through the real scripts."""

import json
import os
import re
import shutil
import socket

import pytest
import torch
from inputs import FAMILY, assert_one_line, read, scored, skipped, write
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import random_image

import build_masks
import evaluate
import grpo_train
import score_dependency
import toy_world
from common import vlm
from common.captions import load_image
from common.records import BadRecord, fail

TEXT = "There is a [MASK]."
MASK = {"id": "m", "image": "0.png", "masked_caption": TEXT, "sentence": TEXT, "answer": "thing"}
TRAIN = ("--steps", 1, "--prompts-per-step", 2, "--group-size", 2, "--max-new-tokens", 3)
STAGES = {
    "score": (score_dependency, "--data", ()),
    "masks": (build_masks, "--scores", ()),
    "train": (grpo_train, "--data", (*TRAIN, "--reward", "semantic=1")),
    "evaluate": (evaluate, "--data", ("--max-new-tokens", 3)),
}


@pytest.fixture
def world(tmp_path):
    """Two images, captions.jsonl, scores.jsonl and masks.jsonl."""
    for i in range(2):
        random_image(i).save(tmp_path / f"{i}.png")
    captions = [{"id": i, "image": f"{i}.png", "caption": "A cat. A dog."} for i in range(2)]
    write(tmp_path / "captions.jsonl", captions)
    write(tmp_path / "scores.jsonl", [scored("Two cats."), scored("No dog.")])
    masks = [MASK | {"id": f"m{i}", "image": f"{i}.png"} for i in range(2)]
    write(tmp_path / "masks.jsonl", masks)
    return tmp_path


@pytest.fixture
def run(stage, checkpoint, world):
    """run(name, data, *flags) -> (error, printed) of a stage whose output is world/out."""

    def go(name, data, *flags):
        module, given, more = STAGES[name]
        model = () if name == "masks" else ("--model", checkpoint(FAMILY))
        result = stage(module, *model, given, data, "--out", world / "out", *more, *flags)
        error = result[0]
        assert error is None or len(error) <= 200 and "\n" not in error
        return result

    return go


# ---------------------------------------------------------------- messages


def test_a_message_is_one_line_of_200_characters_that_keeps_its_end():
    with pytest.raises(SystemExit) as refusal:
        fail("/a/long/path" * 50 + "\nof two lines: lower --lr")
    message = str(refusal.value)
    assert len(message) == 200 and message.startswith("error: /a/long")
    assert message.endswith(" of two lines: lower --lr")
    assert len(str(BadRecord("image " + "x" * 5000 + " does not exist"))) == 200


# ---------------------------------------------------------------- files that are none


def special_files(folder, suffix=""):
    """The paths of a pipe, a socket, an endless device, and a link to itself."""
    pipe, plug, zero, loop = (folder / f"{n}{suffix}" for n in ("pipe", "plug", "zero", "loop"))
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plug))
    zero.symlink_to("/dev/zero")
    loop.symlink_to(loop)
    return pipe, plug, zero, loop


@pytest.mark.parametrize(
    "name, suffix",
    [
        *(("score", ".jsonl"), ("score", ".json"), ("masks", ".jsonl"), ("train", ".jsonl")),
        *(("evaluate", ".jsonl"), ("evaluate", ".tsv")),
    ],
)
def test_data_that_is_a_pipe_or_a_device_is_refused_and_not_waited_for(world, run, name, suffix):
    for path in special_files(world, suffix):
        error, _ = run(name, path)
        assert_one_line(error, path.name)
        assert not (world / "out").is_file()


def test_an_image_that_is_a_pipe_or_a_device_costs_its_record(world, run):
    names = [path.name for path in special_files(world)]
    write(world / "data", [MASK | {"id": name, "image": name} for name in (*names, "0.png")])
    error, printed = run("train", world / "data", "--prompts-per-step", 5)
    assert error is None
    lines = skipped(printed)
    assert [line.split()[2].rstrip(":") for line in sorted(lines)] == sorted(names)


def test_a_pipe_in_a_checkpoint_is_refused(world, run, checkpoint):
    shutil.copytree(checkpoint(FAMILY), world / "model")
    os.mkfifo(world / "model" / "pipe")
    error, _ = run("score", world / "captions.jsonl", "--model", world / "model")
    assert_one_line(error, "pipe is no regular file")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"


def test_no_image_format_is_read_that_starts_another_program(world, monkeypatch):
    (world / "eps.png").write_bytes(EPS)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: 1 / 0)
    # the file is one that Pillow would hand over
    with Image.open(world / "eps.png") as image, pytest.raises(ZeroDivisionError):
        image.load()
    with pytest.raises(BadRecord, match="eps.png cannot be read .*none of PNG, JPEG"):
        load_image(world, "eps.png", 100)
    for kind in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        random_image(0).save(world / "file", kind)
        assert load_image(world, "file", 100).mode == "RGB"


# ---------------------------------------------------------------- records

HUGE = 10**400


@pytest.mark.parametrize("value", [HUGE, 1e308, True, "1", [1]], ids=lambda value: str(value)[:9])
def test_a_score_that_is_none_costs_its_record(world, run, value):
    word = scored("Two cats.")["sentences"][0]["words"][0]
    broken = [{"d_vis": value}, {"ablation": value}, {"words": [word | {"density": value}]}]
    records = [scored("Two cats.", **change) for change in broken]
    write(world / "data", [*records, scored("No dog.")])
    error, printed = run("masks", world / "data")
    assert error is None and len(skipped(printed)) == 3
    assert len(read(world / "out")) == 1


@pytest.mark.parametrize("edge", [0.5, float("nan"), True])
def test_a_word_that_starts_at_no_character_costs_its_record(world, run, edge):
    word = scored("Two cats.")["sentences"][0]["words"][0]
    write(world / "data", [scored("Two cats.", words=[word | {"start": edge}]), scored("No dog.")])
    error, printed = run("masks", world / "data")
    assert error is None and len(skipped(printed)) == 1


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_mask_is_found_again_by_an_id_and_whole_numbers(world, run, name):
    values = ([], [1], {"a": 1}, None, True, float("nan"), 1.5)
    bad = [MASK | {"id": value} for value in values]
    bad += [MASK | {"start": value} for value in (*values, "4")]
    good = [MASK | {"id": 7, "start": 3}, MASK | {"id": "7", "image": "1.png"}]
    write(world / "data", [*bad, *good])
    error, printed = run(name, world / "data")
    assert error is None and len(skipped(printed)) == len(bad)


def test_fields_of_a_benchmark_that_are_too_long_or_no_paths_cost_their_record_at_most(world, run):
    long = "9" * 5000
    rows = [
        (long, "0.png"),
        ("1", "['0.png', 1]"),
        ("2", "[None]"),
        ("3", "['0.png', ['1.png']]"),
        ("4", "['0.png', '1.png']"),
    ]
    lines = ["index\timage_path\tquestion\tanswer"]
    lines += [f"{index}\t{path}\tIs it?\tyes" for index, path in rows]
    (world / "pope.tsv").write_text("\n".join(lines) + "\n")
    error, printed = run("evaluate", world / "pope.tsv", "--conditions", "real")
    assert error is None
    assert [line.split(": ")[1] for line in skipped(printed)] == [
        "record 1",
        "record 2",
        "record 3",
    ]
    assert [r["index"] for r in read(world / "out" / "predictions.jsonl")] == [long, "4"]


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "name, flags",
    [
        ("score", ["--layers", "0-3000000000"]),
        ("score", ["--layers", "0-1," * 2000]),
        ("score", ["--limit", "9" * 30]),
        ("score", ["--max-pixels", "9" * 400]),
        ("evaluate", ["--batch-size", "9" * 5000]),
        ("evaluate", ["--backbone-accuracy", "nan"]),
        ("evaluate", ["--backbone-accuracy", "101"]),
        ("train", ["--steps", "9" * 400]),
        ("train", ["--clip-eps", "1e308"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_number_that_nobody_can_mean_is_refused_with_its_flag(world, run, name, flags):
    error, printed = run(name, world / "masks.jsonl", *flags)
    *_, message = printed.strip().splitlines()
    assert error == "2" and flags[0] in message and len(message) < 250


@pytest.mark.parametrize("flag", ["--bias", "--seed", "--seeds"])
@pytest.mark.parametrize("value", ["nan", "inf", "7", "-0.1", "9" * 40])
def test_the_toy_takes_a_probability_and_seeds(stage, tmp_path, flag, value):
    if flag != "--bias" and value == "7":
        value = "-7"
    error, printed = stage(toy_world, f"{flag}={value}", "--out", tmp_path / "toy")
    assert error == "2" and f"argument {flag}" in printed
    assert not (tmp_path / "toy").exists()


def test_a_step_of_more_prompts_than_there_are_is_refused(world, run):
    error, _ = run("train", world / "masks.jsonl", "--prompts-per-step", 100_000)
    assert_one_line(error, "--prompts-per-step asks for 100000 of --data, which holds 2: lower it")
    assert not (world / "out" / "run.json").exists()
    assert run("train", world / "masks.jsonl")[0] is None


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a checkpoint, to be broken."""
    return shutil.copytree(checkpoint(FAMILY), tmp_path / "model")


LOOP = "{% for i in range(99999) %}"
ENDLESS = [
    LOOP * 3 + "{% endfor %}" * 3,
    "{% macro m(n) %}" + LOOP + "{{ m(n + 1) }}{% endfor %}{% endmacro %}{{ m(0) }}",
    "{% if 9 ** 9 ** 9 > 1 %}{% endif %}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_chat_template_that_does_not_end_is_given_up(world, run, broken, monkeypatch, template):
    monkeypatch.setattr(vlm, "TEMPLATE_SECONDS", 0.3)
    (broken / "chat_template.jinja").write_text(template)
    error, _ = run("score", world / "captions.jsonl", "--model", broken)
    assert_one_line(error, broken, "chat template")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_stage(world, run, broken, number):
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][0, 0] = number
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for stage_name, data in (("score", "captions"), ("train", "masks"), ("evaluate", "masks")):
        error, _ = run(stage_name, world / f"{data}.jsonl", "--model", broken)
        assert_one_line(error, broken, "its weight lm_head.weight holds NaN or infinity")
        assert not (world / "out").is_file() and not list(world.glob("out*/predictions*"))


def test_a_clip_whose_weights_are_not_finite_judges_nothing(world, run, clip_folder):
    clip = shutil.copytree(clip_folder, world / "clip")
    weights = torch.load(clip / "open_clip_pytorch_model.bin")
    weights["text_projection"][0, 0] = float("nan")
    torch.save(weights, clip / "open_clip_pytorch_model.bin")
    error, _ = run("evaluate", world / "masks.jsonl", "--clip", clip)
    assert_one_line(error, "--clip", clip, "its weight text_projection holds NaN or infinity")


def test_a_score_that_is_not_finite_is_never_written(world, run, monkeypatch):
    """An overflow, say; the other records are scored."""
    original = score_dependency.score_record

    def overflow(record, *values):
        output = original(record, *values)
        if record["id"] == "0":
            output["sentences"][0]["d_vis"] = float("inf")
        return output

    monkeypatch.setattr(score_dependency, "score_record", overflow)
    error, printed = run("score", world / "captions.jsonl")
    assert error is None and "1 captions scored, 1 skipped" in printed
    assert skipped(printed) == [
        f"skipped {world}/captions.jsonl:1: what the model makes of it is not finite"
    ]
    assert [record["id"] for record in read(world / "out")] == ["1"]


@pytest.mark.parametrize("eos", [None, 10**6, "</s>", [[1]]], ids=str)
def test_a_checkpoint_without_a_token_that_ends_a_text_is_refused(world, run, broken, eos):
    generation = broken / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = broken / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"eos_token": None}))
    config = json.loads((broken / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (broken / "config.json").write_text(json.dumps(config))
    for flags in (["--objective", "sft"], []):
        error, _ = run("train", world / "masks.jsonl", "--model", broken, *flags)
        assert_one_line(error, broken)


# ---------------------------------------------------------------- what a run has written


def test_steps_that_are_missing_from_the_metrics_are_said_when_a_run_resumes(
    world, run, monkeypatch
):
    monkeypatch.setattr("common.run.draw_curves", lambda out: None)
    assert run("train", world / "masks.jsonl", "--steps", 4)[0] is None
    path = world / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"step": 1', '"step": "one"')
    lines[1] = lines[1].replace('"skipped_update": 0', '"skipped_update": "none"')
    path.write_text("\n".join([lines[0], lines[1], lines[3]]) + "\n")
    error, printed = run("train", world / "masks.jsonl", "--steps", 5)
    assert error is None
    assert re.search(r"metrics.jsonl lacks 2 of 4 steps, the first of them 1: .*", printed)
    assert [record["step"] for record in read(path)] == [2, 4, 5]


def test_a_damaged_part_of_an_output_is_named(world, run, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    score = ("score", world / "captions.jsonl", "--batch-size", 1)
    with monkeypatch.context() as patch:
        patch.setattr("common.stage._MapFiles.complete", die)
        run(*score)
    with open(world / "out.part", "r+b") as file:
        file.write(b"\0" * 8)
    assert_one_line(run(*score)[0], "out.part:1 is damaged")
    (world / "out.part").unlink()
    assert run(*score)[0] is None


def test_predictions_that_were_edited_are_refused_with_their_line(world, run):
    assert run("evaluate", world / "masks.jsonl")[0] is None
    path = world / "out" / "predictions.jsonl"
    records = read(path)
    for change in ({"rouge_l": "1"}, {"exact_match": HUGE}, {"condition": []}, {"id": [1]}):
        write(path, [records[0], records[1] | change, *records[2:]])
        error, _ = run("evaluate", world / "masks.jsonl")
        assert_one_line(error, "predictions.jsonl:2 is not what evaluate.py writes")
    # of no mask in the data, and of an image that is gone: the page says so
    write(path, [records[0] | {"id": "x"}, *records[1:]])
    (world / "1.png").unlink()
    assert run("evaluate", world / "masks.jsonl")[0] is None
    assert "no longer in the data" in (world / "out" / "results.html").read_text()
    info = world / "out" / "predictions.jsonl.run.json"
    settings = json.loads(info.read_text())["settings"]
    info.write_text(json.dumps({"settings": settings, "counts": {"records": 2}}))
    assert_one_line(run("evaluate", world / "masks.jsonl")[0], "lacks the counts")
