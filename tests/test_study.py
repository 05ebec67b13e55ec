"""The study of toy_world.py: its figures by hand, its corruptions, its commands, and a job runner that survives a kill."""
import argparse
import importlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import toy_world
from score_dependency import CAPTION_PROMPT, Scorer, append_responses, chat_prompt, encode_prompts, encode_responses, load_vlm
from test_toy import CAPTION, TRUTH, prediction
from tiny import picture
from toy_world import (ARMS, CORRUPTIONS, aggregate, corrupt, hide_patches, misleading, run_jobs, sample_pair,
                       spread, study_jobs, world_results)


def test_figures_by_hand():
    assert spread([1.0, 2.0, 3.0]) == {"values": [1.0, 2.0, 3.0], "mean": 2.0, "std": 1.0}
    assert spread([1.0, None, float("nan")]) == {"values": [1.0, None, None], "mean": 1.0, "std": None}
    assert spread([None]) == {"values": [None], "mean": None, "std": None}


def test_a_part_that_one_seed_lacks_leaves_a_hole_and_not_a_shift():
    found = aggregate([{"a": {"x": 1.0}}, None, {"a": {"x": 4.0}, "b": 2.0}])
    assert found["a"]["x"]["values"] == [1.0, None, 4.0] and found["a"]["x"]["mean"] == 2.5
    assert found["b"]["values"] == [None, None, 2.0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_strength_and_keep_size_and_original(kind):
    assert len(CORRUPTIONS[kind]) == 5
    for seed in range(5):
        image, _, _ = sample_pair(random.Random(seed), 0.5)
        before, plain = image.tobytes(), np.asarray(image, dtype=float)
        some = [corrupt(image, kind, strength, f"{seed}.png") for strength in range(1, 6)]
        change = [np.abs(np.asarray(c, dtype=float) - plain).mean() for c in some]
        assert change == sorted(change) and change[-1] > change[0]
        assert all(c.size == image.size and c.mode == "RGB" for c in some) and image.tobytes() == before
        assert corrupt(image, kind, 3, f"{seed}.png").tobytes() == some[2].tobytes()       # the same for every model


def test_occlusion_stays_where_it_is_as_it_grows():
    white = Image.new("RGB", (64, 64), "white")
    covered = [np.asarray(corrupt(white, "occlusion", s, "a.png")).min(-1) < 255 for s in range(1, 6)]
    assert all((larger | smaller == larger).all() for smaller, larger in zip(covered, covered[1:]))


def test_hidden_patches_are_the_right_pixels():
    image = Image.new("RGB", (64, 64), (120, 120, 120))
    image.paste((255, 0, 0), (10, 10, 64, 64))
    hidden = np.asarray(hide_patches(image, [1, 6]))                     # row 0, column 1; row 1, column 2
    expected = np.asarray(image).copy()
    expected[0:16, 16:32] = expected[16:32, 32:48] = 120
    assert (hidden == expected).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_the_shares_that_patches_are_ordered_by_are_those_of_eager_maps(checkpoint, family):
    """Equation (1) by visual token, as Probe.patches() takes it, against the plain maps of all tokens."""
    model, processor = load_vlm(checkpoint(family), torch.device("cpu"))
    scorer = Scorer(*load_vlm(checkpoint(family), torch.device("cpu")), [1])
    *_, cells = scorer([scorer.prepare(picture(0), CAPTION)], maps=True)[0]
    model.set_attn_implementation({"text_config": "eager"})
    ids, mask, _ = encode_responses(processor, [CAPTION], model.device)
    batch = append_responses(encode_prompts(model, processor, [chat_prompt(processor, CAPTION_PROMPT)], [[picture(0)]]), ids, mask)
    maps = model.model(**batch, use_cache=False, output_attentions=True).attentions[1][0].mean(0)[-ids.shape[1]:]     # (S, N)
    visual = maps[:, batch["input_ids"][0] == model.config.image_token_id]
    shares = visual / (visual.sum(-1, keepdim=True) + maps[:, -ids.shape[1]:].sum(-1, keepdim=True))
    torch.testing.assert_close(cells, shares, atol=1e-5, rtol=0)


def test_attended_patches_are_those_with_the_largest_shares_of_the_masks_sentence(monkeypatch):
    """A sentence that looks at patch 9, then 4, and least at 3; the other sentence looks elsewhere. The other object: bottom right."""
    cells = torch.full((4, 16), 0.1)
    cells[:2, 3], cells[2:, 9], cells[2:, 4], cells[2:, 3] = 5.0, 3.0, 2.0, 0.0                   # tokens of "A a." and of "B b."
    offsets = [(0, 1), (2, 4), (5, 6), (7, 9)]
    monkeypatch.setattr(toy_world, "load_vlm", lambda *_: (None, None))
    monkeypatch.setattr(toy_world, "Scorer", lambda *_: type("Fake", (), {
        "prepare": lambda self, image, caption: None, "__call__": lambda self, rows, maps: [(None, None, offsets, cells)]})())
    sentences = [{"start": 0, "end": 4, "object": 0}, {"start": 5, "end": 9, "object": 1}]
    probe = toy_world.Probe.__new__(toy_world.Probe)
    probe.checkpoint, probe.device, probe.captions = "", None, [{"id": "x", "caption": "A a. B b."}]
    probe.truth = {"x": {"sentences": sentences, "objects": [{"place": "bottom right"}, {"place": "top left"}]}}
    probe.masks, probe.images = [{"id": "x", "start": 5, "end": 6}], [picture(0).resize((64, 64))]
    probe.metrics = lambda masks, images: images[0].tobytes()
    found, image = probe.patches(0), probe.images[0]
    assert found["0"]["none"] == image.tobytes()
    assert found["1"]["attended"] == hide_patches(image, [9]).tobytes() and found["2"]["attended"] == hide_patches(image, [9, 4]).tobytes()
    assert found["1"]["least"] == hide_patches(image, [3]).tobytes()
    assert found["4"]["objects"] == hide_patches(image, [10, 11, 14, 15]).tobytes()


def test_misleading_text_names_the_stereotype_of_an_object_that_has_another_colour():
    said = "A circle has no corners. The top left holds a large red circle. The top right holds a small white square."
    two = {"objects": TRUTH["x"]["objects"] + [{**TRUTH["x"]["objects"][0], "colour": "white"}],
           "sentences": TRUTH["x"]["sentences"] + [{"start": 64, "end": len(said), "object": 1}]}
    mask = {"start": 46, "end": 62, "answer": "large red circle", "masked_caption": said.replace("large red circle", "[MASK]")}
    assert misleading(mask, two, said) == (
        "A circle has no corners. The top left holds a [MASK]. The top left holds a large red circle.")
    assert misleading(mask, TRUTH["x"], CAPTION) is None                                        # there is no other object
    assert misleading({**mask, "answer": "circle"}, two, said) is None                          # no colour is hidden
    assert misleading({"start": 2, "end": 8, "answer": "circle"}, two, said) is None            # no object
    painted = {**two, "objects": [{**o, "colour": "red"} for o in two["objects"]]}
    assert misleading(mask, painted, said) is None                                              # it would be true


def test_arms_are_judged_against_the_truth_and_by_what_a_shuffled_picture_leaves(tmp_path):
    (tmp_path / "eval_mmrpt").mkdir()
    (tmp_path / "truth.jsonl").write_text(json.dumps({"id": "x", **TRUTH["x"]}))
    rows = [("real", "large blue circle")] * 2 + [("shuffled", "large blue circle"), ("shuffled", "small red star")]
    (tmp_path / "eval_mmrpt" / "predictions.jsonl").write_text(
        "".join(json.dumps({**prediction(answer), "condition": condition}) + "\n" for condition, answer in rows))
    assert world_results(tmp_path) == {"arms": {"mmrpt": {
        "exact_match_truth": 1, "stereotype_rate": 0, "exact_match_caption": 0, "reliance_exact_match_truth": 0.5,
        "reliance_stereotype_rate": -0.5, "reliance_exact_match_caption": 0}}}

    (tmp_path / "teacher.json").write_text('{"exact_match_truth": 0.9}')
    assert list(world_results(tmp_path)["arms"]) == ["mmrpt", "clip"]
    (tmp_path / "eval_mmrpt").rename(tmp_path / "eval_base_val_random")             # the same, of the base on other masks
    masks = world_results(tmp_path)["masks"]
    assert list(masks) == ["base"] and masks["base"]["span"] == {} and masks["base"]["random"]["exact_match_truth"] == 1


def test_the_teacher_is_asked_for_the_colour_of_what_is_not_painted_in_its_stereotype(tmp_path, monkeypatch):
    """A CLIP that always prefers red: right for the red squares and triangles, the stereotype for circles of another colour."""
    toy_world.make_world(tmp_path, 1, 30, 0.5, 0)
    objects = [o for line in (tmp_path / "truth.jsonl").read_text().splitlines() if json.loads(line)["id"].startswith("val")
               for o in json.loads(line)["objects"] if o["colour"] != o["stereotype"]]
    monkeypatch.setattr(toy_world, "ClipScorer", lambda path: lambda images, texts, relative: torch.tensor(
        [[float(" red " in text) for text in group] for group in texts]))
    found = toy_world.clip_metrics(tmp_path)
    assert found["exact_match_truth"] == pytest.approx(sum(o["colour"] == "red" for o in objects) / len(objects)) and 0 < found["exact_match_truth"] < 1
    assert found["stereotype_rate"] == pytest.approx(sum(o["kind"] == "circle" for o in objects) / len(objects))


def test_a_kill_between_clip_and_what_it_knows_costs_no_second_clip(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(toy_world, "train_clip", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(toy_world, "clip_metrics", lambda out: {"exact_match_truth": 1.0})
    toy_world.run_piece(tmp_path, 0.5, 0, None, "clip", "700")
    assert json.loads((tmp_path / "teacher.json").read_text()) == {"exact_match_truth": 1.0}


JOBS = study_jobs("runs/study", (0, 1, 2), False)


def test_the_default_arm_is_what_the_readme_calls_the_defaults(monkeypatch):
    """No flag says so: place, spans, words, relative to answers, grpo."""
    class Parsed(Exception):
        pass

    def parse(self, *args, **kwargs):
        raise Parsed(vars(original(self, *args, **kwargs)))
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    found = {}
    for name in ("mask train", "train mmrpt"):
        command = next(job[3] for job in JOBS if job[0] == f"seed0 {name}")
        monkeypatch.setattr(sys, "argv", list(command))
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(Path(command[0]).stem).main()
        found |= parsed.value.args[0]
    assert [found[k] for k in ("threshold", "granularity", "select", "credit", "relative", "loss", "objective")] == [
        "place", "span", "dependency", "words", "answers", "grpo", "grpo"]


def test_every_command_of_the_study_is_one_that_its_script_accepts(monkeypatch):
    class Parsed(Exception):
        pass

    def parse(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for command in {tuple(job[3]) for job in JOBS if "seed0" in job[0]}:
        monkeypatch.setattr(sys, "argv", list(command))
        with pytest.raises(Parsed):
            importlib.import_module(Path(command[0]).stem).main()


def test_the_jobs_can_be_run_in_order_and_each_writes_a_path_of_its_own():
    before = set()
    for name, needs, written, _ in JOBS:
        assert before.issuperset(needs) and name not in before
        before.add(name)
    assert len({written for _, _, written, _ in JOBS}) == len(JOBS)
    assert not {"images", "base", "clip"} & set(ARMS)                           # an arm's folder is none of the world's


def test_all_arms_have_the_same_start_updates_seed_and_judge():
    value = lambda command, flag: command[command.index(flag) + 1]
    train, judge, other = ([job[3] for job in JOBS if job[0].startswith(f"seed1 {kind}") and not job[0].endswith("_sft")
                            and ("_val_" in job[0]) == (of == "other")]
                           for kind, of in (("train", ""), ("evaluate", ""), ("evaluate", "other")))
    assert len(train) == len(ARMS) and len(judge) == len(ARMS) + 1 and len(other) == 2 * 4
    assert {value(c, "--data") for c in other} == {f"runs/study/seed1/masks_val_{k}.jsonl" for k in ("random", "sentence")}
    assert {tuple(value(c, f) for f in ("--model", "--steps", "--prompts-per-step", "--seed", "--clip")) for c in train} == {
        ("runs/study/seed1/base", *map(str, toy_world.SIZES["full"][5:7]), "1", "runs/study/seed1/clip")}
    assert {value(c, "--data") for c in judge} == {"runs/study/seed1/masks_val.jsonl"}
    assert {value(c, "--data") for c in train} == {f"runs/study/seed1/masks_{k}.jsonl" for k in ("train", "random", "sentence")}


SCRIPT = """import pathlib, sys, time
name, seconds = sys.argv[1:]
with open(name + ".calls", "a") as f:
    f.write("x")
time.sleep(float(seconds))
if "bad" not in name or pathlib.Path(name + ".mend").exists():
    pathlib.Path(name).write_text("done")
else:
    sys.exit("no luck")
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """jobs({name: (needs, seconds)}) -> jobs of a script that notes each call of it."""
    monkeypatch.setattr(toy_world, "cost", lambda job: 1)
    (tmp_path / "script.py").write_text(SCRIPT)
    return lambda table: [(name, needs, str(tmp_path / name), [str(tmp_path / "script.py"), str(tmp_path / name), str(seconds)])
                          for name, (needs, seconds) in table.items()]


def test_a_failing_job_is_named_costs_only_what_needs_it_and_is_tried_again(tmp_path, jobs, capsys):
    some = jobs({"a": ([], 0), "bad": (["a"], 0), "c": (["bad"], 0), "d": (["c"], 0), "e": (["a"], 0)})
    failed = run_jobs(some, tmp_path)
    assert list(failed) == ["bad", "c", "d"] and "exit status 1" in failed["bad"]
    assert (failed["c"], failed["d"]) == ("needs bad", "needs c")
    assert "no luck" in (tmp_path / "logs" / "bad.txt").read_text() and "FAILED" in capsys.readouterr().out
    assert (tmp_path / "e").exists()
    (tmp_path / "bad.mend").touch()
    assert run_jobs(some, tmp_path) == {} and (tmp_path / "d").exists()
    assert {n: len((tmp_path / f"{n}.calls").read_text()) for n in ("a", "bad", "c", "e")} == {"a": 1, "bad": 2, "c": 1, "e": 1}
    assert set(json.loads((tmp_path / "jobs.json").read_text())) == {"a", "bad", "c", "d", "e"}


def test_a_job_whose_command_or_result_is_another_is_run_again(tmp_path, jobs):
    assert run_jobs(jobs({"a": ([], 0), "b": ([], 0)}), tmp_path) == {}
    (tmp_path / "b").unlink()
    assert run_jobs(jobs({"a": ([], 0.01), "b": ([], 0)}), tmp_path) == {}
    assert [(tmp_path / f"{n}.calls").read_text() for n in "ab"] == ["xx", "xx"]


@pytest.mark.skipif(sys.platform != "linux", reason="a child that dies with its parent is Linux's prctl")
def test_a_killed_study_leaves_no_job_behind_and_goes_on(tmp_path, jobs):
    some = jobs({"a": ([], 0), "slow": (["a"], 600)})
    code = (f"import sys, json; sys.path.insert(0, {str(Path(toy_world.__file__).parent)!r}); import toy_world, pathlib\n"
            f"toy_world.cost = lambda job: 1\n"
            f"toy_world.run_jobs(json.loads({json.dumps(some)!r}), pathlib.Path({str(tmp_path)!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not (tmp_path / "slow.calls").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def alive():
        return [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "slow").encode() in read(p)]

    def read(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""
    deadline = time.time() + 10
    while alive():
        assert time.time() < deadline
        time.sleep(0.05)
    assert set(json.loads((tmp_path / "jobs.json").read_text())) == {"a"}
    some[1][3][2] = "0"
    assert run_jobs(some, tmp_path) == {}
    assert [(tmp_path / f"{n}.calls").read_text() for n in ("a", "slow")] == ["x", "xx"]


def test_study_json_is_written_and_names_what_failed(tmp_path, jobs, monkeypatch, capsys):
    some = jobs({"a": ([], 0), "bad": (["a"], 0)})
    monkeypatch.setattr(toy_world, "study_jobs", lambda *_: some)
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "probe_base.json").write_text('{"patches": {"1": {"random": {"exact_match_truth": 0.25}}}}')
    with pytest.raises(SystemExit, match="1 jobs of the study failed"):
        toy_world.study(tmp_path, [0, 1], False)
    written, printed = json.loads((tmp_path / "study.json").read_text()), capsys.readouterr().out
    assert list(written["failed"]) == ["bad"] and "FAILED bad: exit" in printed
    assert written["jobs"]["a"]["command"] == some[0][3]
    figure = written["probe"]["base"]["patches"]["1"]["random"]["exact_match_truth"]
    assert figure == {"values": [0.25, None], "mean": 0.25, "std": None}
    assert "probe base patches 1 random" in printed and "exact_match_truth 0.250" in printed
    with pytest.raises(SystemExit, match="belongs to another run"):
        toy_world.study(tmp_path, [0, 1, 2], False)


def test_patches_of_objects_are_the_quarters_in_which_they_lie():
    at = {place: toy_world.patches_of([{"place": place}]) for place in toy_world.PLACES}
    assert at["top left"] == [0, 1, 4, 5] and at["bottom right"] == [10, 11, 14, 15]
    assert sorted(sum(at.values(), [])) == list(range(16))
    assert toy_world.patches_of([{"place": "top right"}, {"place": "bottom left"}]) == [2, 3, 6, 7, 8, 9, 12, 13]
