"""The real training script for a few steps: ranks, micro-batches, resume, logs, objectives."""

from common.script import run_script

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import test_survival
import torch
from inputs import assert_one_line
from safetensors.torch import load_file
from tiny import random_image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import common.run
import grpo_train
from common import policies
from reward import COMPONENTS, for_each_answer

# processes forked off a server that has imported torch, the same for several files
launch = test_survival.launch
TINY_RUN = (
    "--prompts-per-step 3 --group-size 6 --max-new-tokens 32 --lr 1e-4 --temperature 1.5 "
    "--reward semantic=1 --log-every 1 --sample-every 1"
)
SECONDS = ("rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of seven masks with their images."""
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "masks.jsonl", "w") as file:
        for i in range(7):
            random_image(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
            record = {
                "id": str(i),
                "image": f"{i}.png",
                "masked_caption": f"There {'really ' * i}is a [MASK] here.",
                "sentence": "There is a [MASK] here.",
                "answer": f"thing {i}",
            }
            file.write(json.dumps(record) + "\n")
    return folder


def flags_of(model, data, out, *flags):
    """The flags of a run; each of `flags` may be several, separated by spaces."""
    paths = [f"--model {model} --data {data / 'masks.jsonl'} --out {out}", TINY_RUN]
    return [flag for text in [*paths, *map(str, flags)] for flag in text.split()]


@pytest.fixture
def run_ranks(launch):
    """run_ranks(number, model, data, out, *flags, trap) -> the exit codes of the script's ranks.

    trap: called in every rank before the script.
    """

    def run(number, *paths_and_flags, trap=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
        ranks = []
        for rank in map(str, range(number)):
            env |= {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(launch("grpo_train", flags_of(*paths_and_flags), trap, **env))
        # one that failed has the others wait for it until they notice
        return [test_survival.ended(*rank, within=240)[0] for rank in ranks]

    return run


def draw_no_curves():
    common.run.draw_curves = lambda out: None


def use_sgd():
    """Plain gradient descent: Adam divides by the root of a tiny number, which magnifies rounding.

    Every completion is rewarded for something, and rewards that differ make gradients.
    """
    draw_no_curves()
    grpo_train.make_optimizer = sgd
    grpo_train.FillMask.reward = reward_lengths


def sgd(policy, lr):
    return torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=lr)


def reward_lengths(task, examples, completions):
    rewards = [[len(text) * 7 % 13 / 13 for text in group] for group in completions]
    return {"semantic": torch.tensor(rewards), "format": torch.tensor(rewards)}


def die_in_step_3():
    """A kill of rank 0, one step after a checkpoint."""
    draw_no_curves()
    if os.environ["RANK"] == "0":
        test_survival.die("open", "metrics.jsonl", 3)


def train(model, data, out, *flags):
    """Runs main() of the script in this process, on one rank, and returns what it printed."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", ["grpo_train.py", *flags_of(model, data, out, *flags)])
        run_script(grpo_train.main)
    return printed.getvalue()


def weights(out, step):
    return load_file(Path(out) / f"checkpoint-{step}" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def untimed(metrics):
    return [{k: v for k, v in record.items() if k not in SECONDS} for record in metrics]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def distance(a, b):
    return sum((a[name] - b[name]).square().sum() for name in a).sqrt()


@pytest.fixture(scope="module")
def warm(checkpoint, data, tmp_path_factory):
    """warm(family) -> a checkpoint that imitation has taught the form of a completion.

    A random one never earns a reward.
    """
    trained = {}

    def get(family):
        if family not in trained:
            out = tmp_path_factory.mktemp("warm") / family
            flags = "--objective sft --steps 40 --lr 3e-3"
            train(checkpoint(family), data, out, flags)
            trained[family] = out / "checkpoint-40"
        return trained[family]

    return get


@pytest.fixture(scope="module")
def straight(warm, data, tmp_path_factory):
    """Four steps in one go, on one rank: what every other way of running must reproduce."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(warm("idefics3"), data, out, "--steps 4 --save-every 2")
    return out


# ---------------------------------------------------------------- what a run leaves behind


def test_a_step_changes_the_weights_and_logs_every_metric(warm, straight):
    start = load_file(warm("idefics3") / "model.safetensors")
    assert largest_difference(start, weights(straight, 4)) > 1e-5

    records = metrics(straight)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["visual_tokens"] == 4
    assert set(records[-1]) == {
        "step",
        "loss",
        "reward",
        "reward_semantic",
        "format_ok",
        "advantage_abs",
        "zero_std_fraction",
        "entropy",
        "kl",
        "clip_fraction",
        "grad_norm",
        "lr",
        "completion_tokens",
        "truncated_fraction",
        "visual_tokens",
        "skipped_update",
        *SECONDS,
    }
    assert (straight / "samples.txt").read_text().count("=== step") == 4
    assert (straight / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_loads_like_any_other(straight):
    model = AutoModelForImageTextToText.from_pretrained(straight / "checkpoint-4")
    AutoProcessor.from_pretrained(straight / "checkpoint-4")
    state = torch.load(straight / "checkpoint-4" / "trainer.pt", weights_only=True)
    assert state["step"] == 4
    assert model.dtype == torch.float32


def test_run_json_keeps_the_resolved_flags(warm, data, tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# a known run\n--steps 9 --clip-eps 0.2 0.28  # DAPO's\n--sample-every 7\n")
    train(warm("idefics3"), data, tmp_path / "run", f"@{recipe}", "--steps 1")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    flags = run["flags"]
    assert flags["steps"] == 1  # the command line overrides the recipe
    assert flags["clip_eps"] == [0.2, 0.28]
    assert flags["max_pixels"] == 1003520  # a default
    assert flags["reward"] == {"semantic": 1}
    assert flags["data"] == str(data / "masks.jsonl")
    assert flags["sample_every"] == 1  # TINY_RUN gives it too
    # what an update depends on is compared when a run is resumed; paths are not
    assert set(flags) - set(run["settings"]) >= {"out", "steps", "sample_every"}
    assert run["settings"]["seed"] == 0


# ---------------------------------------------------------------- resume


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(warm, data, straight, tmp_path):
    out = tmp_path / "run"
    train(warm("idefics3"), data, out, "--steps 2 --save-every 2")
    # a kill in step 4, after the checkpoint
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics(out)[-1] | {"step": 3}) + '\n{"step": 4, "lo')
    with open(out / "samples.txt", "a") as file:
        file.write("=== step 3  lost\n")
    (out / "checkpoint.tmp").mkdir()

    printed = train(warm("idefics3"), data, out, "--steps 4 --save-every 2")
    assert "resumed from" in printed
    assert largest_difference(weights(out, 4), weights(straight, 4)) == 0
    assert untimed(metrics(out)) == untimed(metrics(straight))
    assert (out / "samples.txt").read_text() == (straight / "samples.txt").read_text()


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def spoil_trainer(path, kind, mark):
    """Damages a trainer.pt in one of the ways in which it can be damaged."""
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if kind == "missing":
        path.unlink()
    elif kind in ("empty", "truncated", "text"):
        spoiled = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"no zip"}
        path.write_bytes(spoiled[kind])
    else:
        if kind == "code":
            state["optimizer"] = Malicious(mark)
        elif kind == "no optimizer":
            del state["optimizer"]
        elif kind == "list":
            state = [state]
        elif kind == "another step":
            state["step"] += 1
        elif kind == "learning rate":
            state["optimizer"]["param_groups"][0]["lr"] = float("nan")
        else:
            moments = list(state["optimizer"]["state"].values())
            moments[3]["exp_avg"].view(-1)[-1] = float(kind)
        torch.save(state, path)


DAMAGE = {
    "missing": "cannot be read",
    "empty": "cannot be read",
    "truncated": "cannot be read",
    "text": "cannot be read",
    "code": "cannot be read",
    "no optimizer": "no optimizer",
    "list": "not that of step",
    "another step": "not that of step",
    "learning rate": "not finite",
    "nan": "not finite",
    "inf": "not finite",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_without_a_usable_checkpoint_is_refused_and_nothing_is_lost(
    kind, stage, warm, data, straight, tmp_path
):
    out = shutil.copytree(straight, tmp_path / "run")
    for step in (2, 4):
        spoil_trainer(out / f"checkpoint-{step}" / "trainer.pt", kind, tmp_path / "mark")
    before = sorted(out.rglob("*"))
    error, _ = stage(grpo_train, *flags_of(warm("idefics3"), data, out, "--steps 6"))
    assert_one_line(error, f"{out}/checkpoint-4", DAMAGE[kind], "--no-resume starts over")
    assert sorted(out.rglob("*")) == before and not (tmp_path / "mark").exists()
    # what is done needs no trainer.pt
    error, printed = stage(grpo_train, *flags_of(warm("idefics3"), data, out, "--steps 4"))
    assert error is None and "reused" in printed


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(warm, data, straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    spoil_trainer(out / "checkpoint-4" / "trainer.pt", "nan", None)
    printed = train(warm("idefics3"), data, out, "--steps 5 --save-every 1 --keep 9")
    assert "checkpoint-4 is damaged (trainer.pt is not finite" in printed
    assert f"resumed from {out}/checkpoint-2" in printed
    assert (out / "checkpoint-4.damaged" / "model.safetensors").exists()
    assert largest_difference(weights(out, 4), weights(straight, 4)) == 0
    assert untimed(metrics(out))[:4] == untimed(metrics(straight))


@pytest.mark.parametrize("kind", ["shape", "fewer", "more", "numbers"])
def test_a_checkpoint_with_the_moments_of_other_parameters_is_refused_in_one_line(
    kind, stage, warm, data, straight, tmp_path
):
    out = shutil.copytree(straight, tmp_path / "run")
    path = out / "checkpoint-4" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"]
    names = state["optimizer"]["param_groups"][0]["params"]
    if kind == "shape":
        moments[names[0]]["exp_avg"] = torch.zeros(3)
    elif kind == "fewer":
        del moments[names.pop()]
    elif kind == "more":
        moments["another"] = moments[names[0]]
        names.append("another")
    else:
        # earlier versions had numbers
        state["optimizer"]["param_groups"][0]["params"] = list(range(len(names)))
    torch.save(state, path)
    error, _ = stage(grpo_train, *flags_of(warm("idefics3"), data, out, "--steps 6"))
    assert_one_line(error, f"{path} is of other parameters or an earlier version")


def test_a_finished_run_is_reused_and_another_run_is_refused(warm, data, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    assert "reused" in train(warm("idefics3"), data, straight, "--steps 4 --save-every 2")
    with pytest.raises(SystemExit, match="belongs to another run .seed was 0, is 5.") as error:
        train(warm("idefics3"), data, straight, "--steps 4 --seed 5")
    assert "\n" not in str(error.value)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_the_kl_starts_at_0_and_a_resumed_run_keeps_the_first_reference(warm, data, tmp_path):
    flags = "--save-every 1 --beta 0.1 --lr 1e-3"
    train(warm("idefics3"), data, tmp_path / "straight", "--steps 3", flags)
    train(warm("idefics3"), data, tmp_path / "resumed", "--steps 2", flags)
    train(warm("idefics3"), data, tmp_path / "resumed", "--steps 3", flags)
    kl = [record["kl"] for record in metrics(tmp_path / "straight")]
    assert kl[0] == 0 < kl[2] == metrics(tmp_path / "resumed")[2]["kl"]
    resumed = weights(tmp_path / "resumed", 3)
    assert largest_difference(weights(tmp_path / "straight", 3), resumed) == 0


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    "family, ranks, method",
    [("qwen2_5_vl", 2, "--updates 2 --beta 0.05"), ("internvl", 4, "--updates 2")],
    ids=["2 ranks of unequal numbers of passes", "4 ranks, one of them idle"],
)
def test_ranks_and_smaller_micro_batches_give_the_parameters_of_one(
    run_ranks, checkpoint, data, tmp_path, family, ranks, method
):
    """Three prompts on two ranks make two passes and one; on four, one rank has none."""
    model = checkpoint(family)
    flags = f"--steps 3 --lr 1e-2 {method}"
    assert run_ranks(1, model, data, tmp_path / "one", flags, trap=use_sgd) == [0]
    start = load_file(model / "model.safetensors")
    one = weights(tmp_path / "one", 3)
    assert largest_difference(start, one) > 1e-4
    of_one = metrics(tmp_path / "one")
    # so that a sum that drops signs shows
    assert any(record["loss"] < -1e-6 for record in of_one)

    for shard in ("", "--shard"):
        out = tmp_path / f"several{shard}"
        codes = run_ranks(
            ranks, model, data, out, flags, shard, "--tokens-per-forward 1", trap=use_sgd
        )
        assert codes == [0] * ranks
        assert largest_difference(one, weights(out, 3)) < 1e-6
        for a, b in zip(of_one, metrics(out), strict=True):
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)
            assert a["visual_tokens"] == b["visual_tokens"]
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_sharded_run_that_is_killed_resumes_on_any_number_of_ranks(
    run_ranks, warm, data, straight, tmp_path
):
    """From two ranks on three, and on one that holds the model whole; and from one on two."""
    killed = tmp_path / "killed"
    first = (warm("idefics3"), data, killed, "--steps 4 --save-every 2 --shard")
    codes = run_ranks(2, *first, trap=die_in_step_3)
    assert codes == [-signal.SIGKILL, 1]
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]

    on_one = tmp_path / "on-one"
    shutil.copytree(killed, on_one)
    from_one = tmp_path / "from-one"
    shutil.copytree(straight, from_one)
    shutil.rmtree(from_one / "checkpoint-4")
    assert run_ranks(3, *first, trap=draw_no_curves) == [0, 0, 0]
    train(warm("idefics3"), data, on_one, "--steps 4 --save-every 2")
    second = (warm("idefics3"), data, from_one, "--steps 4 --save-every 2 --shard")
    assert run_ranks(2, *second, trap=draw_no_curves) == [0, 0]

    start = load_file(warm("idefics3") / "model.safetensors")
    expected = weights(straight, 4)
    steps, averages = moments(straight, 4)
    size = sum(average.square().sum() for average in averages.values()).sqrt()
    for out in (killed, on_one, from_one):
        assert distance(weights(out, 4), expected) < 0.01 * distance(start, expected)
        steps_there, averages_there = moments(out, 4)
        assert steps_there == steps == {name: 4 for name in averages}
        assert distance(averages_there, averages) < 0.01 * size


def trainer_state(out, step):
    path = out / f"checkpoint-{step}" / "trainer.pt"
    return torch.load(path, weights_only=True)["optimizer"]


def moments(out, step):
    """Of each parameter, the steps that Adam has taken and its mean gradient."""
    state = trainer_state(out, step)["state"]
    steps = {name: moments["step"].item() for name, moments in state.items()}
    return steps, {name: moments["exp_avg"] for name, moments in state.items()}


def test_sharded_ranks_of_a_family_that_is_computed_plainly_give_the_weights_of_one(
    run_ranks, checkpoint, data, tmp_path
):
    model = checkpoint("lfm2_vl")
    flags = "--objective sft --steps 2 --lr 1e-6"
    assert run_ranks(2, model, data, tmp_path / "two", f"{flags} --shard") == [0, 0]
    assert "lfm2_vl: sharing prompts would be wrong" in train(model, data, tmp_path / "one", flags)
    one = weights(tmp_path / "one", 2)
    assert largest_difference(one, load_file(model / "model.safetensors")) > 0
    assert largest_difference(one, weights(tmp_path / "two", 2)) < 1e-7


def test_ranks_work_on_different_samples(run_ranks, warm, data, tmp_path):
    """The same prompts on every rank would halve the data.

    With two ranks a step has three prompts, and not two of them twice.
    """
    assert run_ranks(2, warm("idefics3"), data, tmp_path / "two", "--steps 1") == [0, 0]
    train(warm("idefics3"), data, tmp_path / "one", "--steps 1")
    tokens = [metrics(tmp_path / name)[0]["completion_tokens"] for name in ("one", "two")]
    assert tokens[0] == tokens[1]


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "family, tower, projector",
    [
        ("qwen2_5_vl", "model.visual.", "model.visual.merger."),
        ("idefics3", "model.vision_model.", "model.connector."),
    ],
)
def test_a_frozen_vision_tower_stays_as_it_was_and_is_run_without_a_graph(
    checkpoint, data, tmp_path, monkeypatch, family, tower, projector
):
    """The merger of Qwen-VL is a part of its tower, the connector of Idefics3 is none."""
    outputs = []
    policy_of = policies.Policy

    def watched_policy(model, *more):
        encoder = model.get_encoder(modality="image")
        encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        return policy_of(model, *more)

    monkeypatch.setattr(policies, "Policy", watched_policy)
    flags = "--objective sft --steps 1 --lr 1e-3 --freeze vision"
    train(checkpoint(family), data, tmp_path / "run", flags)

    assert outputs and not any(output.last_hidden_state.requires_grad for output in outputs)
    paths = (checkpoint(family), tmp_path / "run" / "checkpoint-1")
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in paths)
    after = dict(after.named_parameters())
    moved = {name for name, p in before.named_parameters() if (p != after[name]).any()}
    names = set(trainer_state(tmp_path / "run", 1)["state"])
    assert moved and moved <= names
    assert not any(name.startswith(tower) for name in names)
    is_in_tower = projector.startswith(tower)
    assert any(name.startswith(projector) for name in moved) != is_in_tower


def test_a_model_without_a_known_vision_tower_is_refused_in_one_line(
    stage, checkpoint, data, tmp_path, monkeypatch
):
    model = checkpoint("idefics3")
    monkeypatch.setattr(PreTrainedModel, "get_encoder", lambda self, modality=None: self)
    error, _ = stage(grpo_train, *flags_of(model, data, tmp_path / "run", "--freeze vision"))
    assert_one_line(error, model, "no vision tower", "leave --freeze vision out")
    assert not (tmp_path / "run" / "run.json").exists()


# ---------------------------------------------------------------- objectives and rewards


def test_sft_learns_to_write_the_hidden_text(warm):
    losses = [record["loss"] for record in metrics(warm("idefics3").parent)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("loss", ("dr_grpo", "dapo"))
def test_several_updates_per_rollout_move_the_ratio_and_the_kl(warm, data, tmp_path, loss):
    flags = "--steps 3 --updates 3 --beta 0.1 --lr 1e-3 --clip-eps 0.01 0.02"
    train(warm("idefics3"), data, tmp_path / "run", "--loss", loss, flags)
    records = metrics(tmp_path / "run")
    assert max(record["clip_fraction"] for record in records) > 0
    assert max(record["kl"] for record in records) > 0


def test_the_visual_component_is_rewarded_and_logged(warm, data, clip_folder, tmp_path):
    run = tmp_path / "run"
    flags = f"--reward semantic=1 visual=0.5 --clip {clip_folder} --clip-others 3"
    train(warm("idefics3"), data, run, "--steps 1 --updates 2", flags)
    (record,) = metrics(run)
    assert 0 < record["reward_visual"] < 1
    assert record["visual_tokens"] == 4
    assert record["reward_seconds"] > 0
    expected = (record["reward_semantic"] + 0.5 * record["reward_visual"]) / 1.5
    assert record["reward"] == pytest.approx(expected, abs=1e-5)


def test_a_new_component_is_one_entry_and_appears_in_the_metrics(warm, data, tmp_path, monkeypatch):
    def mentions_a_thing(reward, record, answer):
        return float("thing" in answer)

    monkeypatch.setitem(COMPONENTS, "thing", for_each_answer(mentions_a_thing))
    flags = "--steps 1 --reward semantic=1 thing=0.5"
    train(warm("idefics3"), data, tmp_path / "run", flags)
    (record,) = metrics(tmp_path / "run")
    assert 0 < record["reward_thing"] <= 1
    expected = (record["reward_semantic"] + 0.5 * record["reward_thing"]) / 1.5
    assert record["reward"] == pytest.approx(expected, abs=1e-5)
    assert f"thing {record['reward_thing']:.2f}"[:7] in (tmp_path / "run/samples.txt").read_text()


@pytest.mark.parametrize(
    "value, reason",
    [
        ("brevity=1", "brevity=1: no such component; there are semantic, visual"),
        ("semantic=much", "'semantic=much'"),
        ("semantic=-1", "'semantic=-1'"),
        ("semantic", "semantic: write NAME=WEIGHT, as semantic=1"),
    ],
)
def test_an_unknown_component_or_weight_is_refused_in_one_line(
    stage, data, tmp_path, value, reason
):
    error, printed = stage(grpo_train, *flags_of("none", data, tmp_path / "o", "--reward", value))
    assert error == "2"
    *_, message = printed.strip().splitlines()
    assert "error: argument --reward: " in message
    assert reason in message
    assert not (tmp_path / "o").exists()


def test_weights_that_are_all_0_are_refused_in_one_line(stage, data, tmp_path):
    flags = flags_of("none", data, tmp_path / "out", "--reward", "semantic=0", "visual=0")
    error, _ = stage(grpo_train, *flags)
    assert error == "error: --reward: all weights are 0, so nothing is rewarded"


def test_a_component_of_weight_0_loads_nothing_and_is_not_logged(warm, data, tmp_path):
    flags = "--steps 1 --reward semantic=1 visual=0 --clip no-such-model"
    train(warm("idefics3"), data, tmp_path / "run", flags)
    assert "reward_visual" not in metrics(tmp_path / "run")[0]


# ---------------------------------------------------------------- records


def test_a_record_without_its_image_gives_way_to_the_next_and_is_named(warm, data, tmp_path):
    lines = (data / "masks.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"image": "gone.png"})
    for image in data.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    (tmp_path / "masks.jsonl").write_text("\n".join([*lines, '{"half a li']))

    printed = train(warm("idefics3"), tmp_path, tmp_path / "run", "--steps 3")
    assert "gone.png does not exist" in printed
    assert "masks.jsonl:8" in printed
    assert "1 records could not be used" in printed
    peak, loaded = re.search(
        r"peak memory: (\d+) MiB \(the whole process; (\d+) before the first step\)", printed
    ).groups()
    assert 100 < int(loaded) <= int(peak)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_ends_in_one_line_that_says_what_to_lower(error):
    def main():
        raise error

    with pytest.raises(SystemExit, match="out of memory: lower --max-pixels"):
        run_script(main)
