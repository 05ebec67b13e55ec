"""The real training script for a few steps: ranks, micro-batches, resume, logs, objectives."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import picture

ROOT = Path(__file__).resolve().parents[1]
ARGS = ["--prompts-per-step", "3", "--group-size", "6", "--max-new-tokens", "32", "--lr", "1e-4", "--w-visual", "0", "--temperature", "1.5",
        "--log-every", "1", "--sample-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(7):
        picture(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "masked_caption": f"There {'really ' * i}is a [MASK] here.",
                     "sentence": "There is a [MASK] here.", "answer": f"thing {i}"})
    (folder / "masks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def train(model, data, out, *extra, ranks=1, ok=True):
    launcher = [sys.executable] + (["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else [])
    run = subprocess.run([*launcher, str(ROOT / "grpo_train.py"), "--model", str(model), "--data", str(data / "masks.jsonl"),
                          "--out", str(out), *ARGS, *extra], capture_output=True, text=True, timeout=300)
    assert (run.returncode == 0) == ok, run.stderr[-3000:]
    return run


def weights(out, step):
    return load_file(Path(out) / f"checkpoint-{step}" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def warm(checkpoint, data, tmp_path_factory):
    """warm(family) -> a checkpoint that imitation has taught the format, as a random one never earns a reward."""
    made = {}

    def get(family):
        if family not in made:
            out = tmp_path_factory.mktemp("warm") / family
            train(checkpoint(family), data, out, "--objective", "sft", "--steps", "40", "--lr", "3e-3")
            made[family] = out / "checkpoint-40"
        return made[family]

    return get


@pytest.fixture(scope="module")
def straight(warm, data, tmp_path_factory):
    """Four steps in one go, on one rank: what every other way of running must reproduce."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(warm("idefics3"), data, out, "--steps", "4", "--save-every", "2")
    return out


def test_a_step_changes_the_weights_and_logs_every_metric(warm, straight):
    start = load_file(warm("idefics3") / "model.safetensors")
    assert largest_difference(start, weights(straight, 4)) > 1e-5
    row = metrics(straight)[-1]
    assert set(row) == {"step", "loss", "reward", "reward_semantic", "format_ok", "advantage_abs", "zero_std_fraction", "entropy",
                        "kl", "clip_fraction", "grad_norm", "lr", "completion_tokens", "truncated_fraction", "visual_tokens",
                        "skipped_update", "rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second"}
    assert [r["step"] for r in metrics(straight)] == [1, 2, 3, 4] and row["visual_tokens"] == 4
    assert (straight / "samples.txt").read_text().count("=== step") == 4


def test_the_checkpoint_loads_like_any_other(straight):
    model = AutoModelForImageTextToText.from_pretrained(straight / "checkpoint-4")
    AutoProcessor.from_pretrained(straight / "checkpoint-4")
    state = torch.load(straight / "checkpoint-4" / "trainer.pt", weights_only=True)
    assert state["step"] == 4 and model.dtype == torch.float32


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(warm, data, straight, tmp_path):
    out = tmp_path / "run"
    train(warm("idefics3"), data, out, "--steps", "2", "--save-every", "2")
    with open(out / "metrics.jsonl", "a") as f:                                  # a kill in step 4, behind the checkpoint
        f.write(json.dumps(metrics(out)[-1] | {"step": 3}) + '\n{"step": 4, "lo')
    with open(out / "samples.txt", "a") as f:
        f.write("=== step 3  lost\n")
    (out / "checkpoint.tmp").mkdir()
    run = train(warm("idefics3"), data, out, "--steps", "4", "--save-every", "2")
    assert "resumed from" in run.stdout
    assert largest_difference(weights(out, 4), weights(straight, 4)) == 0
    timed = ("rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second")
    assert [{k: v for k, v in r.items() if k not in timed} for r in metrics(out)] == \
           [{k: v for k, v in r.items() if k not in timed} for r in metrics(straight)]
    assert (out / "samples.txt").read_text() == (straight / "samples.txt").read_text()


def test_a_finished_run_is_reused_and_another_run_is_refused(warm, data, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    assert "reused" in train(warm("idefics3"), data, straight, "--steps", "4", "--save-every", "2").stdout
    refused = train(warm("idefics3"), data, straight, "--steps", "4", "--seed", "5", ok=False)
    assert "belongs to another run (seed was 0, is 5)" in refused.stderr and "Traceback" not in refused.stderr
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("family, ranks, flags", [
    ("idefics3", 2, ["--tokens-per-forward", "1"]), ("qwen2_5_vl", 2, ["--zero", "--loss", "dapo", "--beta", "0.05"]),
    ("qwen2_5_vl", 4, ["--static-cache"])],
    ids=["2 ranks, one group a pass", "2 ranks, shared optimizer", "4 ranks, one of them idle"])
def test_ranks_and_smaller_passes_give_the_parameters_of_one(warm, data, tmp_path, family, ranks, flags):
    """Three prompts on two ranks make two passes and one; on four, one rank has none."""
    more = ["--steps", "3", "--lr", "1e-6", "--updates", "2"]
    more += [f for f in flags if f not in ("--tokens-per-forward", "1", "--zero", "--static-cache")]            # the method's
    train(warm(family), data, tmp_path / "one", *more)
    train(warm(family), data, tmp_path / "two", *more, *flags, ranks=ranks)
    if "--loss" not in flags:
        assert any(r["loss"] < -1e-6 for r in metrics(tmp_path / "one"))            # so that a sum that drops signs shows
    start, one, two = load_file(warm(family) / "model.safetensors"), weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    assert largest_difference(one, two) < 1e-6
    moved, apart = (sum((a[k] - b[k]).square().sum() for k in a).sqrt() for a, b in ((start, one), (one, two)))
    assert 0 < apart < 0.01 * moved or apart == 0 < moved
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-6) and a["visual_tokens"] == b["visual_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_shared_optimizer_is_saved_whole_and_resumes_on_another_number_of_ranks(warm, data, straight, tmp_path):
    train(warm("idefics3"), data, tmp_path / "run", "--steps", "2", "--save-every", "2", "--zero", ranks=2)
    states = [torch.load(p / "checkpoint-2" / "trainer.pt", weights_only=True)["optimizer"] for p in (tmp_path / "run", straight)]
    assert states[0]["state"].keys() == states[1]["state"].keys() and states[0]["param_groups"] == states[1]["param_groups"]
    train(warm("idefics3"), data, tmp_path / "run", "--steps", "4", "--save-every", "2")
    start = load_file(warm("idefics3") / "model.safetensors")
    moved, apart = (sum((a[k] - b[k]).square().sum() for k in a).sqrt() for a, b in (
        (start, weights(straight, 4)), (weights(tmp_path / "run", 4), weights(straight, 4))))
    assert apart < 0.01 * moved


def test_the_kl_starts_at_zero_and_a_resumed_run_keeps_the_first_reference(warm, data, tmp_path):
    more = ["--save-every", "1", "--beta", "0.1", "--lr", "1e-3"]
    train(warm("idefics3"), data, tmp_path / "straight", "--steps", "3", *more)
    train(warm("idefics3"), data, tmp_path / "resumed", "--steps", "2", *more)
    train(warm("idefics3"), data, tmp_path / "resumed", "--steps", "3", *more)
    rows = metrics(tmp_path / "straight")
    assert rows[0]["kl"] == 0 < rows[2]["kl"] == metrics(tmp_path / "resumed")[2]["kl"]
    assert largest_difference(weights(tmp_path / "straight", 3), weights(tmp_path / "resumed", 3)) == 0


def test_the_memory_a_step_will_take_is_estimated_before_it_and_measured_after(warm, data, tmp_path):
    run = train(warm("idefics3"), data, tmp_path / "run", "--steps", "1")
    printed = run.stdout + run.stderr
    assert 0 < printed.index("estimated memory a rank: fp32 master weights 1, gradients 1, optimizer 2") < printed.index("measured peak: ")


def test_ranks_work_on_different_samples(warm, data, tmp_path):
    """The same prompts on every rank would halve the data: with two ranks the step has three prompts, not two twice."""
    train(warm("idefics3"), data, tmp_path / "two", "--steps", "1", ranks=2)
    train(warm("idefics3"), data, tmp_path / "one", "--steps", "1")
    assert metrics(tmp_path / "two")[0]["completion_tokens"] == metrics(tmp_path / "one")[0]["completion_tokens"]


def test_sft_learns_to_write_the_hidden_text(warm):
    losses = [r["loss"] for r in metrics(warm("idefics3").parent)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("loss", ("dr_grpo", "dapo"))
def test_several_updates_a_rollout_move_the_ratio_and_the_kl(warm, data, tmp_path, loss):
    train(warm("idefics3"), data, tmp_path / "run", "--steps", "3", "--updates", "3", "--beta", "0.1", "--loss", loss,
          "--lr", "1e-3", "--clip-eps", "0.01", "0.02")
    rows = metrics(tmp_path / "run")
    assert max(r["clip_fraction"] for r in rows) > 0 and max(r["kl"] for r in rows) > 0


def test_the_visual_part_is_rewarded_and_logged_beside_the_visual_tokens(warm, data, clip_folder, tmp_path):
    train(warm("idefics3"), data, tmp_path / "run", "--steps", "1", "--updates", "2", "--w-visual", "0.5", "--clip",
          str(clip_folder), "--clip-others", "3")
    row = metrics(tmp_path / "run")[0]
    assert 0 < row["reward_visual"] < 1 and row["visual_tokens"] == 4 and 0 < row["reward_seconds"]
    assert row["reward"] == pytest.approx((row["reward_semantic"] + 0.5 * row["reward_visual"]) / 1.5, abs=1e-5)


def test_a_record_without_its_image_gives_way_to_the_next_and_is_named(warm, data, tmp_path):
    rows = (data / "masks.jsonl").read_text().splitlines()
    rows[0] = json.dumps(json.loads(rows[0]) | {"image": "gone.png"})
    for p in data.glob("*.png"):
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / "masks.jsonl").write_text("\n".join([*rows, '{"half a li']))
    run = train(warm("idefics3"), tmp_path, tmp_path / "run", "--steps", "3")
    assert "gone.png does not exist" in run.stdout + run.stderr and "masks.jsonl:8" in run.stdout + run.stderr
    assert "1 records could not be used" in run.stdout
