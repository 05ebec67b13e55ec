"""Whole steps of LVRPO against a plain computation: two tasks, one gradient, a metric for each.

The script runs for one step in this process, and what it sampled, judged and updated is written
down. The same is then computed with none of its shortcuts: one completion at a time, no cache, no
shared prefix, no padding, and each task's gradient alone.
"""

from common.script import run_script

import contextlib
import io
import json
import math
import sys
import types

import pytest
import torch
from PIL import Image
from test_shared_prefix import assert_same_gradients
from test_two_media import plain_logits
from tiny import random_image
from transformers import AutoModelForImageTextToText, AutoProcessor

import common.run
import grpo_train
import reward
from common.drawings import codes_of_drawings, drawings_of_codes
from common.judges import Detection
from common.vlm import load_vlm
from lvrpo import train as lvrpo_train
from lvrpo.reward import READING_COMPONENTS

CPU = torch.device("cpu")
G = 3  # completions per prompt
N = 16  # codes of an image
S = 6  # most tokens of a text
TEMPERATURE = 0.8
TARGETS = ["red thing", "large blue thing", "green one"]
QUESTION = (
    "{}\n\nFrom the image, write what [MASK] hides: <think>reasoning</think>"
    "<answer>hidden text</answer>"
)
QUARTERS = {"dog": (8, 8), "cat": (24, 8), "cup": (8, 24), "bus": (24, 24)}
PROMPTS = ["A dog.", "A cat and a dog, please.", "What? A bus."]
SECONDS = {"rollout_seconds", "reward_seconds", "update_seconds", "completions_per_second"}
STANDARD = [
    *("--prompts-per-step", 3, "--draw-share", 0.6, "--group-size", G, "--max-new-tokens", S),
    *("--temperature", TEMPERATURE, "--draw-reward", "ins=1", "--read-reward", "ins=1"),
    *("--detector", "test_lvrpo_steps:find_reddish", "--lr", 1e-3, "--steps", 1),
    *("--max-grad-norm", 1e6, "--log-every", 1, "--sample-every", 1),
]


# ---------------------------------------------------------------- judges


def reddish(image):
    """The classes whose quarter of a drawing is more red than green in the middle."""
    quarters = {}
    for name, middle in QUARTERS.items():
        red, green, _ = image.getpixel(middle)
        if red > green:
            quarters[name] = [Detection((0, 0, 8, 8), 0.95)]
    return quarters


def find_reddish(images, records):
    """A detector that finds a class in a drawing if its quarter is reddish."""
    return [reddish(image) for image in images]


def find_otherwise(images, records):
    """The same, but for one prompt a class is there if its quarter is *not* reddish."""
    found = find_reddish(images, records)
    for i, record in enumerate(records):
        if record["prompt"] == PROMPTS[1]:
            absent = QUARTERS.keys() - found[i].keys()
            found[i] = {name: [Detection((0, 0, 8, 8), 0.95)] for name in absent}
    return found


def share_of_letters(judge, record, answer):
    """A judge of texts that even random ones please to different degrees."""
    return sum(character.isascii() and character.isalpha() for character in answer) / len(answer)


# ---------------------------------------------------------------- the script, watched


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three masked captions and three prompts of different lengths, and images for both."""
    folder = tmp_path_factory.mktemp("lvrpo")
    masks = []
    prompts = []
    for i, target in enumerate(TARGETS):
        random_image(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
        sentence = f"There {'really ' * i}is a [MASK] here."
        mask = {"id": str(i), "image": f"{i}.png", "masked_caption": sentence}
        masks.append({**mask, "sentence": sentence, "answer": target})
        # of different numbers of classes: the groups of two prompts differ in their mean
        include = [{"class": name, "count": 1} for name in list(QUARTERS)[i:]]
        prompts.append({"prompt": PROMPTS[i], "image": f"{2 - i}.png", "include": include})
    for name, records in (("masks", masks), ("prompts", prompts)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def write_down(patch):
    """Patches the loop so that it writes down what happens.

    Returns .passes, a list per update of (task, examples, rollout, log-probs) of each micro-batch;
    .weights before each update, and .gradients after it, of {name: tensor}.
    """
    log = types.SimpleNamespace(passes=[[]], weights=[], gradients=[], policy=None)
    optimizer_of = grpo_train.make_optimizer
    run_policy = grpo_train.run_policy
    update = grpo_train.update

    def make_optimizer(policy, *args, **kwargs):
        log.policy = policy
        return optimizer_of(policy, *args, **kwargs)

    def watched_policy(net, batch, rollout, task, examples, step):
        result = run_policy(net, batch, rollout, task, examples, step)
        log.passes[-1].append((task, examples, result[0], result[1].detach()))
        return result

    def watched_update(*args):
        named = dict(log.policy.model.named_parameters())
        log.weights.append({name: p.detach().clone() for name, p in named.items()})
        result = update(*args)
        trained = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        log.gradients.append(trained)
        log.passes.append([])
        return result

    patch.setattr(grpo_train, "make_optimizer", make_optimizer)
    patch.setattr(grpo_train, "run_policy", watched_policy)
    patch.setattr(grpo_train, "update", watched_update)
    return log


@pytest.fixture(scope="module")
def steps(data, checkpoint, tmp_path_factory):
    """steps(*flags) -> what write_down() returns of one step, and .metrics and .out of it.

    Every text counts as an answer, as those of a random model are never of the form that is asked
    for.
    """
    known = {}

    def run(*flags):
        if flags in known:
            return known[flags]
        out = tmp_path_factory.mktemp("runs") / "run"
        paths = ["--model", checkpoint("janus"), "--data", data / "masks.jsonl", "--out", out]
        paths += ["--prompts", data / "prompts.jsonl"]
        command = ["lvrpo.train", *map(str, [*paths, *STANDARD, *flags])]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(common.run, "draw_curves", lambda out: None)
            patch.setattr(reward, "parse_completion", lambda text: text.strip() or None)
            judge = reward.for_each_answer(share_of_letters)
            patch.setitem(READING_COMPONENTS, "ins", judge)
            patch.setattr(sys, "argv", command)
            log = write_down(patch)
            run_script(lvrpo_train.main)
        (line,) = (out / "metrics.jsonl").read_text().splitlines()
        log.metrics = json.loads(line)
        log.out = out
        known[flags] = log
        return log

    return run


def rollouts_of(log, name):
    """[(example, ids (G, S), mask (G, S), rollout, b), ...] of the prompts of one task."""
    groups = []
    for task, examples, rollout, _ in log.passes[0]:
        if task.name != name:
            continue
        ids = rollout.ids.view(len(examples), -1, rollout.ids.shape[1])
        mask = rollout.mask.view_as(ids).bool()
        for b, example in enumerate(examples):
            groups.append((example, ids[b], mask[b], rollout, b))
    return groups


# ---------------------------------------------------------------- the plain computation


class Plain:
    """The model of a checkpoint and its log-probs, as a user of transformers would compute them."""

    def __init__(self, folder, guidance=1.0, temperature=TEMPERATURE):
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="eager"
        )
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.guidance = guidance
        self.temperature = temperature

    @torch.no_grad()
    def load(self, weights):
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def chat(self, content):
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def text_logps(self, example, ids):
        """Log-probs (S,) of a text without padding, after its prompt and image."""
        question = QUESTION.format(example.record["masked_caption"])
        chat = self.chat([{"type": "image"}, {"type": "text", "text": question}])
        inputs = dict(self.processor(text=[chat], images=[[example.image]], return_tensors="pt"))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs, use_cache=False).logits[0, -len(ids) - 1 : -1]
        image_token = torch.tensor([self.model.config.image_token_id])
        logits = (logits / self.temperature).index_fill(-1, image_token, -math.inf)
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def code_logps(self, example, ids):
        """Log-probs (16, codebook) of what an image's codes could be; with guidance of two passes.

        Each code is that of the image up to there.
        """
        tokenizer = self.processor.tokenizer
        text = self.chat([{"type": "text", "text": example.record["prompt"]}]) + "<begin_of_image>"
        prompt = self.processor(text=[text], return_tensors="pt")["input_ids"][0]
        logits = plain_logits(self.model, prompt, ids)
        if self.guidance != 1:
            kept = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<begin_of_image>")]
            empty = [int(i) if i in kept else tokenizer.pad_token_id for i in prompt]
            unconditional = plain_logits(self.model, torch.tensor(empty), ids)
            logits = unconditional + self.guidance * (logits - unconditional)
        return (logits / self.temperature).log_softmax(-1)

    def logps(self, task, example, ids):
        if task == "reading":
            return self.text_logps(example, ids)
        return self.code_logps(example, ids).gather(1, ids[:, None])[:, 0]


def plain_rewards(task, example, rollout, b):
    """The rewards of a group, judged once more, one completion at a time."""
    rewards = []
    for completion in rollout.completions[b]:
        if task == "reading":
            text = completion.strip()
            rewards.append(share_of_letters(None, None, text) if text else 0.0)
        else:
            asked = [wanted["class"] for wanted in example.record["include"]]
            rewards.append(len(reddish(completion).keys() & asked) / len(asked))
    return rewards


def plain_advantages(rewards, is_scaled=True):
    """Equation (2) of one group and one component."""
    mean = sum(rewards) / G
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (G - 1))
    return [(r - mean) / (std + 0.1 if is_scaled else 1) for r in rewards]


def objective_of(logps, old, ref, A, beta):
    """Equations (3) and (4) of one completion, token by token, with eps 0.2."""
    total = []
    for logp, logp_old, logp_ref in zip(logps, old, ref):
        rho = (logp - logp_old).exp()
        clipped = rho.clamp(0.8, 1.2)
        kl = (logp_ref - logp).exp() - (logp_ref - logp) - 1
        total.append(torch.minimum(rho * A, clipped * A) - beta * kl)
    return torch.stack(total)


def mean_gradients(plain, start, log, task, loss, beta):
    """Gradients of a task's mean loss per completion, and how many completions there are.

    plain: a Plain of the weights before the update. start: of those before the step.
    """
    total = {}
    count = 0
    for example, ids, mask, rollout, b in rollouts_of(log, task):
        if loss != "sft":
            A = plain_advantages(plain_rewards(task, example, rollout, b), loss != "dr_grpo")
        for g in range(len(ids)):
            tokens = ids[g][mask[g]]
            if loss == "sft":
                objective = plain.logps(task, example, tokens)
            else:
                # the reference is what the run started from, as is what sampled
                with torch.no_grad():
                    old = start.logps(task, example, tokens)
                logps = plain.logps(task, example, tokens)
                objective = objective_of(logps, old, old, A[g], beta)
            length = len(tokens)
            if loss == "dr_grpo":
                length = S if task == "reading" else N
            plain.model.zero_grad()
            (-objective.sum() / length).backward()
            count += 1
            for name, parameter in plain.model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad
    return {name: gradient / count for name, gradient in total.items()}, count


def weighted_sum(gradients, weights):
    """{name: tensor}; a task without a gradient for a parameter adds nothing to it."""
    total = {}
    for of_task, weight in zip(gradients, weights):
        for name, gradient in of_task.items():
            total[name] = total.get(name, 0) + weight * gradient
    return total


# ---------------------------------------------------------------- one gradient


CASES = {
    "grpo": (),
    "dr_grpo, one group per pass": ("--loss", "dr_grpo", "--tokens-per-forward", 1),
    "guidance, a KL and a second update": ("--guidance", 2, "--beta", 0.5, "--updates", 2),
    "sft": ("--objective", "sft"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_mixed_step_is_the_weighted_sum_of_those_of_its_tasks(
    case, steps, checkpoint
):
    """Each task weighs as many completions as it has: 3 texts and 6 images, or 1 and 2 of SFT."""
    flags = CASES[case]
    log = steps(*flags)
    loss = "sft" if "sft" in flags else log.passes[0][0][0].args.loss
    guidance = 2.0 if "--guidance" in flags else 1.0
    beta = 0.5 if "--beta" in flags else 0.0
    temperature = 1.0 if loss == "sft" else TEMPERATURE
    start = Plain(checkpoint("janus"), guidance, temperature)
    plain = Plain(checkpoint("janus"), guidance, temperature)

    for weights, actual in zip(log.weights, log.gradients):
        plain.load(weights)
        read, n_read = mean_gradients(plain, start, log, "reading", loss, beta)
        drawn, n_drawn = mean_gradients(plain, start, log, "drawing", loss, beta)
        assert (n_read, n_drawn) == ((1, 2) if loss == "sft" else (3, 6))
        # one head each, and a Llama that both train
        assert any("lm_head" in name or "vision_model" in name for name in read.keys() - drawn)
        assert any("generation_head" in name for name in drawn.keys() - read)
        assert any("language_model.layers" in name for name in read.keys() & drawn)

        n = n_read + n_drawn
        expected = weighted_sum([read, drawn], [n_read / n, n_drawn / n])
        assert_same_gradients(actual, expected)
    assert len(log.gradients) == (2 if "--updates" in flags else 1)


def test_drawing_alone_trains_what_draws_and_freezes_what_only_reads(steps, checkpoint):
    log = steps("--draw-share", 1)
    plain = Plain(checkpoint("janus"))
    expected, count = mean_gradients(plain, plain, log, "drawing", "grpo", 0.0)
    assert count == 9
    assert not any("vision_model" in name or "vqmodel" in name for name in expected)
    assert_same_gradients(log.gradients[0], expected)


def test_imitation_is_given_what_the_records_hold(steps, checkpoint):
    """Texts of the form that is asked for, and the codes of the images, of which all count."""
    log = steps("--objective", "sft")
    plain = Plain(checkpoint("janus"))
    for example, ids, mask, _, _ in rollouts_of(log, "reading"):
        thought = example.record["sentence"].split("[MASK]")[0].strip()
        text = f"<think>{thought}</think><answer>{example.record['answer']}</answer>"
        assert plain.processor.decode(ids[0][mask[0]]) == f"{text}<|end_of_sentence|>"
    drawn = rollouts_of(log, "drawing")
    assert len(drawn) == 2
    for example, ids, mask, _, _ in drawn:
        assert ids.shape == (1, N) and mask.all()
        assert ids.tolist() == plain_codes(plain, [example.image]).tolist()


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize("case", ("grpo", "dr_grpo, one group per pass"))
@pytest.mark.parametrize("task", ("reading", "drawing"))
def test_advantages_are_equation_2_of_each_group_alone(task, case, steps):
    groups = rollouts_of(steps(*CASES[case]), task)
    assert len(groups) == {"reading": 1, "drawing": 2}[task]
    largest = 0
    for example, _, _, rollout, b in groups:
        rewards = plain_rewards(task, example, rollout, b)
        assert rollout.components["ins"][b].tolist() == pytest.approx(rewards)
        expected = plain_advantages(rewards, is_scaled=case == "grpo")
        assert rollout.advantage[b].tolist() == pytest.approx(expected, abs=1e-6)
        largest = max(largest, *map(abs, expected))
    assert largest > 0.05, "or there would be nothing to learn from"


def test_a_verdict_on_one_prompt_changes_no_advantage_of_another_or_of_a_text(steps):
    one = steps()
    other = steps("--detector", "test_lvrpo_steps:find_otherwise")
    changed = []
    for task in ("reading", "drawing"):
        for a, b in zip(rollouts_of(one, task), rollouts_of(other, task)):
            assert torch.equal(a[1], b[1])
            is_same = torch.equal(a[3].advantage[a[4]], b[3].advantage[b[4]])
            changed += [] if is_same else [a[0].record.get("prompt")]
    assert changed == [PROMPTS[1]]


# ---------------------------------------------------------------- guidance


def test_with_guidance_rollout_and_reference_have_the_guided_log_probs(steps, checkpoint):
    log = steps("--guidance", 2, "--beta", 0.5, "--updates", 2)
    plain = Plain(checkpoint("janus"), guidance=2.0)
    unguided = Plain(checkpoint("janus"))
    for example, ids, _, rollout, b in rollouts_of(log, "drawing"):
        for g in range(G):
            row = b * G + g
            with torch.no_grad():
                expected = plain.logps("drawing", example, ids[g])
                without = unguided.logps("drawing", example, ids[g])
            torch.testing.assert_close(rollout.old_logps[row], expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(rollout.ref_logps[row], expected, atol=2e-5, rtol=0)
            assert (expected - without).abs().max() > 0.01
    # after an update of the weights it is no longer the reference
    assert log.metrics["kl/drawing"] > 1e-5 and log.metrics["kl/reading"] > 1e-5


@pytest.mark.parametrize("guidance", (1.0, 2.0))
def test_codes_are_sampled_from_the_distribution_that_scores_them(guidance, steps, checkpoint):
    """Each inverts the CDF at a number of its own, which seed, step and place decide."""
    flags = CASES["guidance, a KL and a second update"] if guidance == 2 else ()
    plain = Plain(checkpoint("janus"), guidance)
    for example, ids, *_ in rollouts_of(steps(*flags), "drawing"):
        generator = torch.Generator().manual_seed(hash((0, 1, example.place)) % 2**63)
        uniforms = torch.rand(G, N, generator=generator)
        for g in range(G):
            with torch.no_grad():
                cdf = plain.code_logps(example, ids[g]).exp().cumsum(-1)
            for s, code in enumerate(ids[g].tolist()):
                below = cdf[s, code - 1] if code else 0
                assert below - 1e-5 < uniforms[g, s] < cdf[s, code] + 1e-5


def test_with_guidance_the_first_ratio_is_1_and_the_first_kl_0(steps):
    """A second update of learning rate 0 scores the same codes again, under the same weights."""
    log = steps("--guidance", 2, "--beta", 0.5, "--updates", 2, "--lr", 0)
    sampled, scored = log.passes[:2]
    assert {task.name for task, *_ in scored} == {"reading", "drawing"}
    for (_, _, rollout, first), (_, _, again, second) in zip(sampled, scored):
        assert again is rollout
        mask = rollout.mask.bool()
        torch.testing.assert_close(second[mask], first[mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.ref_logps[mask], first[mask], atol=1e-5, rtol=0)
    for task in ("reading", "drawing"):
        assert log.metrics[f"kl/{task}"] == 0
        assert log.metrics[f"clip_fraction/{task}"] == 0


# ---------------------------------------------------------------- what is logged

COMMON = {"step", "loss", "grad_norm", "lr", "skipped_update", *SECONDS}
OF_DRAWING = {
    *("reward", "reward_ins", "advantage_abs", "zero_std_fraction", "entropy", "kl"),
    *("clip_fraction", "completion_tokens", "truncated_fraction", "visual_tokens"),
}
OF_READING = {*OF_DRAWING, "format_ok"}


def test_metrics_are_those_of_each_task(steps):
    log = steps()
    of_reading = {f"{name}/reading" for name in OF_READING}
    of_drawing = {f"{name}/drawing" for name in OF_DRAWING}
    assert set(log.metrics) == COMMON | of_reading | of_drawing

    for task in ("reading", "drawing"):
        groups = rollouts_of(log, task)
        rewards = [plain_rewards(task, *group[:1], *group[3:]) for group in groups]
        mean = sum(map(sum, rewards)) / G / len(groups)
        assert log.metrics[f"reward_ins/{task}"] == pytest.approx(mean, abs=2e-6)
        assert log.metrics[f"reward/{task}"] == pytest.approx(mean, abs=2e-6)
        absolute = [abs(A) for group in rewards for A in plain_advantages(group)]
        mean = sum(absolute) / len(absolute)
        assert log.metrics[f"advantage_abs/{task}"] == pytest.approx(mean, abs=2e-6)
    # random weights: nearly all of ln 48, or of ln of some 400 tokens
    assert log.metrics["entropy/drawing"] < math.log(48) < log.metrics["entropy/reading"]


@pytest.mark.parametrize("length", (S, N))
def test_an_image_has_all_its_codes_and_never_counts_as_truncated(length, steps):
    """Also where texts may be as long as an image, which always ends without an eos token."""
    log = steps() if length == S else steps("--max-new-tokens", length)
    assert log.metrics["completion_tokens/drawing"] == N
    assert log.metrics["truncated_fraction/drawing"] == 0
    assert log.metrics["visual_tokens/drawing"] == 0
    assert log.metrics["visual_tokens/reading"] == 16

    masks = [row for _, _, mask, _, _ in rollouts_of(log, "reading") for row in mask]
    assert log.metrics["completion_tokens/reading"] == sum(map(sum, masks)) / len(masks)
    assert log.metrics["truncated_fraction/reading"] > 0.5


def test_a_single_task_has_metrics_of_plain_names(steps):
    assert set(steps("--draw-share", 1).metrics) == COMMON | OF_DRAWING
    assert set(steps("--draw-share", 0).metrics) == COMMON | OF_READING


def test_a_group_of_each_task_is_shown_with_its_prompt(steps):
    log = steps()
    text = (log.out / "samples.txt").read_text()
    blocks = [block.splitlines() for block in text.split("\n\n") if block]
    assert [block[0][:10] for block in blocks] == ["=== step 1"] * 2

    # the first place of each task: 0 of those that are read, 1 of those that are drawn
    (read,) = [group for group in rollouts_of(log, "reading") if group[0].place == 0]
    (drawn,) = [group for group in rollouts_of(log, "drawing") if group[0].place == 1]
    record = read[0].record
    assert blocks[0][0] == f"=== step 1  {record['image']}"
    assert blocks[0][1] == f"{record['sentence']}   <-   {record['answer']}"
    assert blocks[1][0] == f"=== step 1  {drawn[0].record['prompt']}"
    for block, (*_, rollout, b) in zip((blocks[0][2:], blocks[1][1:]), (read, drawn)):
        assert len(block) == G
        for g, line in enumerate(block):
            assert f"A {rollout.advantage[b, g]:+.2f}" in line
            assert f"ins {rollout.components['ins'][b, g]:.2f}" in line
    assert all(
        repr(text) in line for text, line in zip(read[3].completions[read[4]], blocks[0][2:])
    )


def test_the_sheet_of_a_step_shows_the_drawings_of_a_group(steps):
    log = steps()
    (group,) = [group for group in rollouts_of(log, "drawing") if group[0].place == 1]
    drawings = group[3].completions[group[4]]
    assert len(drawings) == G
    with Image.open(log.out / "samples" / "step-1.png") as page:
        for g, drawing in enumerate(drawings):
            # five times as large, in a row, with margins of 4
            x = 4 + 168 * g
            shown = page.crop((x, 4, x + 160, 164)).resize((32, 32), Image.Resampling.NEAREST)
            assert shown.tobytes() == drawing.tobytes()
    assert len({drawing.tobytes() for drawing in drawings}) == G


# ---------------------------------------------------------------- codes and images


def plain_codes(plain, images):
    """The nearest unit row of the codebook for every unit vector of an image, by loops."""
    vq = plain.model.model.vqmodel
    rows = [row / row.norm() for row in vq.quantize.embedding.weight]
    result = []
    for image in images:
        pixels = plain.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            vectors = vq.quant_conv(vq.encoder(pixels))[0]  # (8, 4, 4)
        codes = []
        for y in range(4):
            for x in range(4):
                vector = vectors[:, y, x] / vectors[:, y, x].norm()
                distances = torch.stack([(vector - row).norm() for row in rows])
                codes.append(int(distances.argmin()))
        result.append(codes)
    return torch.tensor(result)


def test_codes_are_the_nearest_unit_rows_of_the_codebook(checkpoint):
    model, processor = load_vlm(checkpoint("janus"), CPU)
    images = [random_image(i, (40, 32)) for i in range(3)]
    codes = codes_of_drawings(model, processor, images)
    assert codes.shape == (3, N)
    assert len(set(codes.flatten().tolist())) > 3
    assert codes.tolist() == plain_codes(Plain(checkpoint("janus")), images).tolist()


def test_a_code_that_is_decoded_and_found_again_is_the_one_whose_vector_was_decoded(checkpoint):
    """The decoder is given the unit row that codes_of_drawings() names."""
    model, processor = load_vlm(checkpoint("janus"), CPU)
    codes = codes_of_drawings(model, processor, [random_image(0, (32, 32))])
    decoded = []
    model.model.vqmodel.decoder.register_forward_pre_hook(lambda _, given: decoded.append(given[0]))
    conv = model.model.vqmodel.post_quant_conv
    given = []
    conv.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    (image,) = drawings_of_codes(model, processor, codes)
    assert image.size == (32, 32) and len(decoded) == 1
    rows = model.model.vqmodel.quantize.embedding.weight[codes[0]]
    unit = (rows / rows.norm(dim=1, keepdim=True)).T.view(1, -1, 4, 4)
    torch.testing.assert_close(given[0], unit)


# ---------------------------------------------------------------- what cannot work

REFUSALS = {
    "dapo weighs tokens of both media alike": (
        ("--loss", "dapo"),
        "--loss dapo weighs tokens alike, so images would outweigh texts: use grpo or dr_grpo",
    ),
    "more than all prompts": (("--draw-share", 1.5), "--draw-share must lie between 0 "),
    "fewer than no prompts": (("--draw-share", -0.1), "--draw-share must lie between 0 "),
    "no share at all": (("--draw-share", "nan"), "--draw-share must lie between 0 "),
    "guidance away from the prompt": (("--guidance", 0.5), "--guidance must be at least 1"),
    "nothing to draw": (("--prompts", None), "drawing needs --prompts; --draw-share 0 only reads"),
    "nothing to read": (("--data", None), "reading needs --data; --draw-share 1 only draws"),
    "a model that only reads": (("--model", "qwen2_5_vl"), "cannot draw: choose a checkpoint"),
    "no weight for drawings": (("--draw-reward", "ins=0"), "--draw-reward: all weights are 0"),
    "no weight for texts": (("--read-reward", "sem=0"), "--read-reward: all weights are 0"),
    "no detector": (("--detector", None), "--draw-reward ins needs a --detector"),
    "no images to imitate": (
        ("--objective", "sft", "--prompts", "bare.jsonl"),
        "no record of --prompts can be used",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_ends_in_one_line_that_says_what_to_do(
    case, stage, data, checkpoint, tmp_path
):
    flags, says = REFUSALS[case]
    (tmp_path / "bare.jsonl").write_text('{"prompt": "A dog."}\n{"prompt": "A cat."}\n')
    given = {"--model": checkpoint("janus"), "--out": tmp_path / "out"}
    given |= {"--data": data / "masks.jsonl", "--prompts": data / "prompts.jsonl"}
    given |= dict(zip(STANDARD[::2], STANDARD[1::2]))
    given |= dict(zip(flags[::2], flags[1::2]))
    if given["--model"] == "qwen2_5_vl":
        given["--model"] = checkpoint("qwen2_5_vl")
    if given["--prompts"] == "bare.jsonl":
        given["--prompts"] = tmp_path / "bare.jsonl"
    command = [part for pair in given.items() if pair[1] is not None for part in pair]
    error, _ = stage(lvrpo_train, *command)
    assert error.startswith("error: ") and "\n" not in error
    assert says in error
    assert not (tmp_path / "out" / "run.json").exists(), "another command may use the folder"


def test_a_share_of_0_reads_with_a_model_that_cannot_draw(stage, data, checkpoint, tmp_path):
    model = checkpoint("qwen2_5_vl")
    command = ["--model", model, "--data", data / "masks.jsonl", "--out", tmp_path / "out"]
    error, printed = stage(lvrpo_train, *command, *STANDARD, "--draw-share", 0)
    assert error is None, error
    assert "checkpoint-1: done" in printed
