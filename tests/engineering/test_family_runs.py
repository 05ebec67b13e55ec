"""The real scripts on families that no prompt may be shared in, or that D_vis has to choose for."""

import math

import pytest
import torch
from inputs import assert_one_line, read, skipped, write
from safetensors.torch import load_file
from test_benchmark_runs import png, write_tsv
from tiny import random_image
from tiny_more import changed

import evaluate
import grpo_train
import score_dependency
from reward import COMPONENTS

CAPTIONS = ["A large red circle is in the middle. It has no corners.", "Two dogs run."]
TINY_RUN = (
    "--prompts-per-step 2 --group-size 3 --max-new-tokens 6 --steps 2 --lr 1e-3 --temperature 1.5 "
    "--reward long=1 --beta 0.1 --log-every 1 --sample-every 1 --save-every 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of captions and masks with their images, which some families cut into crops."""
    folder = tmp_path_factory.mktemp("data")
    captions = []
    masks = []
    for i in range(3):
        random_image(i, ((64, 48), (48, 80), (64, 48))[i]).save(folder / f"{i}.png")
        record = {"id": str(i), "image": f"{i}.png"}
        captions.append(record | {"caption": CAPTIONS[i % 2]})
        text = f"There {'really ' * i}is a [MASK] here."
        masks.append(record | {"masked_caption": text, "sentence": text, "answer": f"thing {i}"})
    write(folder / "captions.jsonl", captions)
    write(folder / "masks.jsonl", masks)
    return folder


def numbers_in(value):
    """All numbers in a record, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, float) else []


# ---------------------------------------------------------------- training and evaluation


@pytest.fixture
def long_answers_earn(monkeypatch):
    """The reward `long` of any completion: a random model never meets the form of an answer."""

    def longer(reward, records, images, answers):
        return torch.tensor([[len(answer) / 100 for answer in group] for group in answers])

    monkeypatch.setattr("reward.parse_completion", lambda text: text)
    monkeypatch.setitem(COMPONENTS, "long", longer)


def test_a_run_of_plain_passes_trains_and_is_evaluated(
    stage, checkpoint, data, tmp_path, long_answers_earn
):
    paths = ["--data", data / "masks.jsonl", "--out", tmp_path / "run"]
    error, printed = stage(grpo_train, "--model", checkpoint("mllama"), *paths, *TINY_RUN.split())
    assert error is None and "mllama: sharing prompts would be wrong" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("mllama")]
    assert "times the tokens, and decoding one prompt at a time" in line
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(value) for value in numbers_in(metrics))
    # the reference computes plainly too: the KL starts at 0
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"] < 1
    assert metrics[0]["grad_norm"] > 0

    before = load_file(checkpoint("mllama") / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("vision" in name for name in moved)

    model = ["--model", tmp_path / "run" / "checkpoint-2", "--data", data / "masks.jsonl"]
    flags = ["--max-new-tokens", 5, "--out", tmp_path / "eval", "--limit", 2]
    error, printed = stage(evaluate, *model, *flags)
    assert error is None and "sharing prompts would be wrong" in printed
    assert len(read(tmp_path / "eval" / "predictions.jsonl")) == 6


def test_a_step_of_plain_passes_is_the_step_of_shared_ones(
    stage, checkpoint, data, tmp_path, monkeypatch, long_answers_earn
):
    """Metrics and weights, on a family that needs no plain passes."""
    results = []
    for limit in (math.inf, 0):
        out = tmp_path / f"run {limit}"
        with monkeypatch.context() as patch:
            if limit == 0:
                patch.setattr("common.exactness.difference", wrong_if_shared)
            paths = ["--data", data / "masks.jsonl", "--out", out]
            model = ["--model", checkpoint("qwen2_5_vl")]
            error, printed = stage(grpo_train, *model, *paths, *TINY_RUN.split())
        assert error is None and ("Plain passes" in printed) == (limit == 0)
        weights = load_file(out / "checkpoint-2" / "model.safetensors")
        results.append((weights, read(out / "metrics.jsonl")))
    (shared, shared_metrics), (plain, plain_metrics) = results
    for ours, theirs in zip(shared_metrics, plain_metrics):
        for name in ("loss", "reward", "entropy", "completion_tokens", "kl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    largest = max((shared[name] - plain[name]).abs().max().item() for name in shared)
    # of steps of 1e-3, in which Adam amplifies rounding
    assert largest < 1e-4


def wrong_if_shared(policy, prompts, trains, precisions, sample, score):
    return "so this test says" if sample.__name__ == "shared_sample" else None


def test_a_benchmark_is_asked_with_and_without_images(stage, checkpoint, tmp_path):
    record = {"index": 0, "image": png(0), "question": "Which?", "A": "red", "B": "blue"}
    tsv = write_tsv(tmp_path / "MMStar.tsv", [record | {"answer": "A"}])
    paths = ["--data", tsv, "--out", tmp_path / "eval", "--max-new-tokens", 4]
    error, printed = stage(evaluate, "--model", checkpoint("lfm2_vl"), *paths)
    assert error is None and "lfm2_vl: sharing prompts would be wrong" in printed
    predictions = read(tmp_path / "eval" / "predictions.jsonl")
    assert [prediction["images"] for prediction in predictions] == [1, 0]


def test_a_family_that_is_neither_exact_nor_plain_is_refused_before_anything_is_written(
    stage, checkpoint, data, tmp_path, monkeypatch, long_answers_earn
):
    monkeypatch.setattr("common.exactness.difference", lambda *args: "it fails: no cache")
    paths = ["--model", checkpoint("internvl"), "--data", data / "masks.jsonl"]
    error, _ = stage(grpo_train, *paths, "--out", tmp_path / "run", *TINY_RUN.split())
    assert_one_line(error, "internvl cannot be used", "it fails: no cache")
    error, _ = stage(evaluate, *paths, "--out", tmp_path / "eval")
    assert_one_line(error, "internvl cannot be used")
    assert not list(tmp_path.glob("*/*.jsonl"))


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("family", ("lfm2_vl", "aya_vision"))
def test_captions_are_scored_by_the_layers_that_see_all_and_the_page_shows_numbers(
    stage, checkpoint, data, tmp_path, family
):
    out = tmp_path / "scores.jsonl"
    paths = ["--data", data / "captions.jsonl", "--out", out]
    error, printed = stage(score_dependency, "--model", checkpoint(family), *paths)
    assert (
        error is None and "layers [1], of those that attend to all of image and captio" in printed
    )
    records = read(out)
    assert len(records) == 3
    shares = [
        word["d_vis"] for record in records for s in record["sentences"] for word in s["words"]
    ]
    assert all(0 < share < 1 for share in shares) and len(set(shares)) > 5
    assert all(math.isfinite(number) for number in numbers_in(records))
    assert "NaN" not in (tmp_path / "scores.jsonl.html").read_text()


@pytest.mark.parametrize(
    "family, flags, parts",
    [
        ("mllama", [], ["mllama reads images by cross-attention"]),
        ("qwen3_5", ["--layers", "0-1"], ["--layers", "image and caption: 1"]),
        ("aya_vision", ["--layers", "0"], ["--layers", "image and caption: 1"]),
    ],
)
def test_what_has_no_d_vis_is_refused_in_one_line(
    stage, checkpoint, data, tmp_path, family, flags, parts
):
    paths = ["--data", data / "captions.jsonl", "--out", tmp_path / "scores.jsonl"]
    error, _ = stage(score_dependency, "--model", checkpoint(family), *paths, *flags)
    assert_one_line(error, *parts)
    assert len(error) <= 200 and not list(tmp_path.iterdir())


def test_a_caption_that_no_layer_sees_with_its_image_is_skipped(stage, checkpoint, data, tmp_path):
    """All layers of this one see 60 tokens: the second caption fits, the others do not."""
    model = changed(tmp_path / "model", checkpoint("mistral3"), sliding_window=60)
    paths = ["--data", data / "captions.jsonl", "--out", tmp_path / "scores.jsonl"]
    error, printed = stage(score_dependency, "--model", model, *paths)
    assert error is None and len(read(tmp_path / "scores.jsonl")) == 1
    assert len(skipped(printed)) == 2 and "exceed the 60" in skipped(printed)[0]
