"""Whole steps of the real script against a plain computation, and every flag seen to matter.

Tests of functions do not see the wiring of a script: a sign, a divisor or a flag that is ignored.
So the script runs for two steps, and PlainGrpo below does the same with none of our code: one
prompt at a time, no cache, no shared prefix, loops over completions and tokens.
"""

import functools
import json
import math
import random
import re
import types

import open_clip
import pytest
import torch
from PIL import Image
from tiny import random_image
from transformers import AutoModelForImageTextToText, AutoProcessor

import common.run
import grpo_train

G = 4
S = 30
TARGETS = ["red thing", "large blue thing", "green one", "thing", "small red thing"]
QUESTION = (
    "{}\n\nFrom the image, write what [MASK] hides: <think>reasoning</think>"
    "<answer>hidden text</answer>"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five masked captions of different lengths, over images of different sizes."""
    folder = tmp_path_factory.mktemp("steps")
    lines = []
    for i, target in enumerate(TARGETS):
        random_image(i, (48 + 8 * (i % 3), 48)).save(folder / f"{i}.png")
        record = {
            "id": str(i),
            "image": f"{i}.png",
            "masked_caption": f"There {'really ' * i}is a [MASK] here.",
            "sentence": "There is a [MASK] here.",
            "answer": target,
        }
        lines.append(json.dumps(record) + "\n")
    (folder / "masks.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def train(stage, data, clip_folder, monkeypatch, tmp_path):
    """train(model, *flags, name="run") -> (metrics, folder) of the real script, in this process."""
    monkeypatch.setattr(common.run, "draw_curves", lambda out: None)

    def run(model, *flags, name="run"):
        out = tmp_path / name
        standard = ["--model", model, "--data", data / "masks.jsonl", "--out", out]
        standard += ["--prompts-per-step", 3, "--group-size", G, "--max-new-tokens", S]
        standard += ["--clip", clip_folder, "--clip-others", 3, "--lr", 1e-3, "--steps", 1]
        standard += ["--temperature", 1, "--log-every", 1, "--sample-every", 1]
        error, printed = stage(grpo_train, *standard, *flags)
        assert error is None, error + printed[-2000:]
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], out

    return run


@pytest.fixture(scope="module")
def warm(checkpoint, data, tmp_path_factory):
    """A checkpoint that imitation has taught the format and to guess any of the answers.

    A random one never earns a reward, and one that knows the answers always earns the same.
    """
    out = tmp_path_factory.mktemp("warm")
    model, processor = plain_load(checkpoint("idefics3"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    records = [json.loads(line) for line in (data / "masks.jsonl").open()]
    rng = random.Random(0)
    for step in range(200):
        record = {**records[step % len(records)], "answer": rng.choice(TARGETS)}
        prompt = plain_prompt(processor, record, data)
        ids = plain_target(processor, record)
        loss = -plain_logps(model, prompt, ids[None], 1.0, []).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


# ---------------------------------------------------------------- the plain computation


def plain_load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), AutoProcessor.from_pretrained(folder)


def plain_prompt(processor, record, folder):
    """The processor's tensors of one prompt, as a user of transformers would make them."""
    text = QUESTION.format(record["masked_caption"])
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.open(folder / record["image"]).convert("RGB")
    return dict(processor(text=[chat], images=[[image]], return_tensors="pt"))


def plain_target(processor, record):
    thought = record["sentence"].split("[MASK]")[0].strip()
    text = f"<think>{thought}</think><answer>{record['answer']}</answer>"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([*ids, min(plain_eos(processor))])


def plain_eos(processor):
    """tiny.py's idefics3 ends on two ids, as its generation_config says."""
    names = ["<end_of_utterance>", "<|end_of_text|>"]
    return set(processor.tokenizer.convert_tokens_to_ids(names))


def plain_logits(model, prompt, ids, temperature, suppressed):
    """Logits (N, S, vocabulary) of ids (N, S) after N copies of the prompt: one ordinary pass."""
    inputs = {k: v.repeat(len(ids), *[1] * (v.ndim - 1)) for k, v in prompt.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs, use_cache=False).logits[:, -ids.shape[1] - 1 :].float() / temperature
    if suppressed:
        logits = logits.index_fill(-1, torch.tensor(suppressed), -math.inf)
    return logits


def plain_logps(model, prompt, ids, temperature, suppressed):
    logits = plain_logits(model, prompt, ids, temperature, suppressed)[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def plain_entropy(model, prompt, ids, temperature, suppressed):
    logits = plain_logits(model, prompt, ids, temperature, suppressed)[:, :-1]
    return torch.distributions.Categorical(logits=logits).entropy()


@functools.cache
def common_words(a, b):
    """Length of the longest common subsequence of two tuples."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return common_words(a[:-1], b[:-1]) + 1
    return max(common_words(a[:-1], b), common_words(a, b[:-1]))


class PlainGrpo:
    """Two steps of GRPO or SFT, written a second time and as plainly as possible."""

    def __init__(self, folder, data, clip_folder, args):
        self.model, self.processor = plain_load(folder)
        self.reference, _ = plain_load(folder)
        self.data = data
        self.args = args
        self.records = [json.loads(line) for line in (data / "masks.jsonl").open()]
        clip = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
        self.clip, _, self.preprocess = clip
        self.clip.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
        # AdamW as the script sets it: what is not trained by the script has no gradient here either
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.suppressed = [self.model.config.image_token_id]
        self.eos = plain_eos(self.processor)

    def prompts_of_step(self, step):
        order = []
        for epoch in range(4):
            indices = range(len(self.records))
            order += random.Random(f"{self.args.seed} {epoch}").sample(indices, len(indices))
        return [self.records[i] for i in order[3 * (step - 1) : 3 * step]]

    @torch.no_grad()
    def sample(self, prompt, step, place):
        """G completions, each a list of ids that ends with eos, by inverting the CDF per token."""
        seed = hash((self.args.seed, step, place)) % 2**63
        uniforms = torch.rand(G, S, generator=torch.Generator().manual_seed(seed))
        completions = []
        for g in range(G):
            ids = []
            for s in range(S):
                so_far = torch.tensor([ids], dtype=torch.long).reshape(1, -1)
                logits = plain_logits(
                    self.model, prompt, so_far, self.args.temperature, self.suppressed
                )
                cdf = logits[0, -1].softmax(-1).cumsum(-1)
                ids.append(int((cdf <= uniforms[g, s] * cdf[-1]).sum()))
                if ids[-1] in self.eos:
                    break
            completions.append(ids)
        return completions

    # ------------------------------------------------------------ reward

    def rewards(self, record, completions):
        """[(format, semantic, visual), ...] of a group."""
        texts = [self.processor.decode(ids, skip_special_tokens=True) for ids in completions]
        form = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
        matches = [re.fullmatch(form, text, re.DOTALL) for text in texts]
        answers = []
        for match in matches:
            inner = "" if match is None else "".join(match.groups())
            is_answer = match and not re.search("</?(think|answer)>", inner)
            answers.append(match[2].strip() if is_answer else None)
        visual = self.visual(record, answers)
        target = tuple(record["answer"].split())
        result = []
        for answer, agreement in zip(answers, visual):
            if not answer:
                result.append((0.0, 0.0, 0.0))
                continue
            words = tuple(answer.lower().strip(" .,;:!?").split())
            f1 = 2 * common_words(words, target) / (len(words) + len(target))
            semantic = 1.0 if words == target else min(f1, 0.99)
            result.append((1.0, semantic, agreement * self.brevity(answer, target)))
        return result

    def brevity(self, answer, target):
        # U+FFFD stands for bytes that are no character
        n = len(re.findall(r"[\w\ufffd]+(?:[.,:'’/&_-][\w\ufffd]+)*", answer))
        if not 0 < n <= 2 * len(target) + 2:
            return 0.0
        return math.exp(1 - max(n, len(target)) / min(n, len(target)))

    @torch.no_grad()
    def visual(self, record, answers):
        image = Image.open(self.data / record["image"]).convert("RGB")
        filled = [a and record["sentence"].replace("[MASK]", a) for a in answers]
        scores = {text: self.clip_logit(image, text) for text in filled if text}
        if self.args.relative == "pool":
            # there are fewer than seven others, so all of the same length take part
            length = len(record["answer"].split())
            for other in self.records:
                if len(other["answer"].split()) == length:
                    text = record["sentence"].replace("[MASK]", other["answer"])
                    scores[text] = self.clip_logit(image, text)
        if self.args.relative in ("answers", "pool"):
            total = sum(math.exp(score) for score in scores.values())
            return [text and math.exp(scores[text]) / total for text in filled]
        others = [Image.open(self.data / f"{i}.png").convert("RGB") for i in range(3)]
        names = [f"{i}.png" for i in range(3)]
        result = []
        for text in filled:
            if not text:
                result.append(None)
                continue
            prior = [
                math.exp(self.clip_logit(other, text))
                for name, other in zip(names, others)
                if name != record["image"]
            ]
            odds = math.exp(scores[text]) / (sum(prior) / len(prior))
            result.append(odds / (1 + odds))
        return result

    def clip_logit(self, image, text):
        image = self.clip.encode_image(self.preprocess(image)[None])[0]
        text = self.clip.encode_text(self.tokenizer([text]))[0]
        cosine = image @ text / image.norm() / text.norm()
        return (self.clip.logit_scale.exp() * cosine).item()

    def group_advantages(self, rewards):
        total = [0.0] * G
        for component, weight in ((1, self.args.semantic), (2, self.args.visual)):
            values = [reward[component] for reward in rewards]
            mean = sum(values) / G
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (G - 1))
            scale = 1 if self.args.loss == "dr_grpo" else 1 / (std + 0.1)
            total = [t + weight * (v - mean) * scale for t, v in zip(total, values)]
        return total

    # ------------------------------------------------------------ steps

    def logps(self, model, prompt, ids):
        ids = torch.tensor(ids)[None]
        return plain_logps(model, prompt, ids, self.args.temperature, self.suppressed)[0]

    def step(self, step):
        """One rollout and its updates; returns the metrics of the last."""
        groups = []
        for place, record in enumerate(self.prompts_of_step(step)):
            prompt = plain_prompt(self.processor, record, self.data)
            completions = self.sample(prompt, step, place)
            rewards = self.rewards(record, completions)
            for ids, A in zip(completions, self.group_advantages(rewards)):
                with torch.no_grad():
                    old = self.logps(self.model, prompt, ids)
                    ref = self.logps(self.reference, prompt, ids)
                groups.append((prompt, ids, A, old, ref))
        for _ in range(self.args.updates):
            metrics = self.update(groups)
        return metrics

    def update(self, groups):
        tokens = sum(len(ids) for _, ids, *_ in groups)
        N = {"grpo": len(groups), "dr_grpo": len(groups) * S, "dapo": tokens}[self.args.loss]
        low, high = self.args.clip_eps
        sums = {"loss": 0.0, "kl": 0.0, "clipped": 0}
        self.optimizer.zero_grad()
        for prompt, ids, A, old, ref in groups:
            logps = self.logps(self.model, prompt, ids)
            loss = 0
            for t in range(len(ids)):
                rho = (logps[t] - old[t]).exp()
                clipped = min(max(rho.item(), 1 - low), 1 + high)
                surrogate = rho * A
                if clipped * A < rho.item() * A:
                    surrogate = torch.tensor(clipped * A)
                    sums["clipped"] += 1
                kl = (ref[t] - logps[t]).exp() - (ref[t] - logps[t]) - 1
                weight = 1 / len(ids) if self.args.loss == "grpo" else 1
                loss = loss - weight * (surrogate - self.args.beta * kl) / N
                sums["kl"] += kl.item() / tokens
            loss.backward()
            sums["loss"] += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {
            "loss": sums["loss"],
            "grad_norm": norm.item(),
            "kl": sums["kl"] if self.args.beta else 0.0,
            "clip_fraction": sums["clipped"] / tokens,
            "completion_tokens": tokens / len(groups),
        }

    def sft_step(self, step):
        records = self.prompts_of_step(step)
        targets = [plain_target(self.processor, record) for record in records]
        tokens = sum(map(len, targets))
        total = 0.0
        self.optimizer.zero_grad()
        for record, ids in zip(records, targets):
            prompt = plain_prompt(self.processor, record, self.data)
            loss = -plain_logps(self.model, prompt, ids[None], 1.0, self.suppressed).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": total, "grad_norm": norm.item(), "completion_tokens": tokens / 3}


DEFAULTS = {
    "loss": "grpo",
    "lr": 2e-4,
    "beta": 0.0,
    "clip_eps": (0.2, 0.2),
    "temperature": 1.0,
    "updates": 1,
    "seed": 0,
    "relative": "answers",
    "semantic": 1.0,
    "visual": 1.0,
}
CASES = {
    "grpo": {"beta": 0.5, "updates": 2, "visual": 0.5},
    "dr_grpo": {"loss": "dr_grpo", "beta": 0.5, "updates": 2, "temperature": 1.3},
    "dapo": {"loss": "dapo", "clip_eps": (0.01, 0.03), "updates": 3, "relative": "images"},
    "another seed": {"seed": 7, "semantic": 3.0, "beta": 0.3, "updates": 2, "relative": "pool"},
    "sft": {"temperature": 1.0},
}


@torch.no_grad()
def follow_weights(model, start, checkpoint):
    """Compares the plain update with that of the script, and then goes on from the script's.

    Adam divides by tiny second moments, so rounding alone moves single weights: norms are compared,
    and the next step starts from the same weights, or a sample of it could flip.
    """
    script = dict(AutoModelForImageTextToText.from_pretrained(checkpoint).named_parameters())
    moved = 0
    apart = 0
    for name, parameter in model.named_parameters():
        moved += (parameter - start[name]).square().sum()
        apart += (parameter - script[name]).square().sum()
        parameter.copy_(script[name])
    assert moved > 0 and apart.sqrt() < 0.2 * moved.sqrt()


@pytest.mark.parametrize("case", CASES)
def test_two_steps_of_the_script_equal_a_plain_computation(case, warm, train, data, clip_folder):
    args = types.SimpleNamespace(**{**DEFAULTS, **CASES[case]})
    flags = ["--steps", 2, "--loss", args.loss, "--beta", args.beta, "--updates", args.updates]
    flags += ["--clip-eps", *args.clip_eps, "--seed", args.seed, "--relative", args.relative]
    flags += ["--reward", f"semantic={args.semantic}", f"visual={args.visual}"]
    flags += ["--temperature", args.temperature, "--tokens-per-forward", 500, "--lr", args.lr]
    flags += ["--save-every", 1]
    if case == "sft":
        flags += ["--objective", "sft"]
    logged, out = train(warm, *flags)

    plain = PlainGrpo(warm, data, clip_folder, args)
    for step, line in enumerate(logged, 1):
        start = {n: p.detach().clone() for n, p in plain.model.named_parameters()}
        expected = plain.sft_step(step) if case == "sft" else plain.step(step)
        for name, value in expected.items():
            # the loss is what is left of advantages that cancel
            precision = 1e-3 if name == "loss" else 1e-4
            assert line[name] == pytest.approx(value, rel=2e-2, abs=precision), (step, name)
        follow_weights(plain.model, start, out / f"checkpoint-{step}")
    if case != "sft":
        assert all(line["advantage_abs"] > 0.05 for line in logged)
    if args.beta:
        assert args.beta * logged[-1]["kl"] > 1e-4
    if case == "dapo":
        assert logged[-1]["clip_fraction"] > 0.005


# ---------------------------------------------------------------- every flag


def weights(out):
    model = AutoModelForImageTextToText.from_pretrained(next(out.glob("checkpoint-*")))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# flag: (its other value, metrics of the first step that change, metrics that must not)
METRIC_FLAGS = {
    "--temperature 0.5": ("entropy", ""),
    "--seed 3": ("completion_tokens", ""),
    "--relative answers": ("reward_visual reward", "reward_semantic entropy"),
    "--relative images": ("reward_visual reward", "reward_semantic entropy"),
    "--relative none": ("reward_visual reward", "reward_semantic entropy"),
    "--credit exact": ("reward_semantic reward", "reward_visual entropy"),
    "--reward semantic=1 visual=4": ("reward advantage_abs", "reward_semantic reward_visual"),
    "--reward semantic=5 visual=1": ("reward advantage_abs", "reward_semantic reward_visual"),
    "--group-size 2": ("advantage_abs", ""),
    "--max-new-tokens 8": ("completion_tokens truncated_fraction", "visual_tokens"),
    "--prompts-per-step 2": ("reward", ""),
    "--loss dapo": ("grad_norm", "advantage_abs reward"),
    "--loss dr_grpo": ("advantage_abs grad_norm", "reward entropy"),
    "--objective sft": ("loss completion_tokens", ""),
    "--lr 1e-2": ("lr", "grad_norm reward entropy"),
    "--updates 2": ("grad_norm", "reward reward_visual"),
}


@pytest.fixture(scope="module")
def first_metrics():
    return {}


def baseline(train, warm, first_metrics):
    """The metrics of one step with the standard flags, computed once per module."""
    if not first_metrics:
        metrics, out = train(warm, name="baseline")
        first_metrics.update(metrics=metrics[0], weights=weights(out))
    return first_metrics["metrics"]


@pytest.mark.parametrize("flag", METRIC_FLAGS)
def test_a_flag_changes_what_it_should_and_nothing_else(flag, warm, train, first_metrics):
    standard = baseline(train, warm, first_metrics)
    metrics, _ = train(warm, *flag.split(), name="other")
    changes, stays = METRIC_FLAGS[flag]
    for name in changes.split():
        assert metrics[0][name] != pytest.approx(standard[name], rel=1e-4, abs=1e-6), name
    for name in stays.split():
        assert metrics[0][name] == pytest.approx(standard[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("flag", ["--lr 1e-2", "--max-grad-norm 0.01"])
def test_a_flag_of_the_optimizer_changes_the_weights(flag, warm, train, first_metrics):
    standard = baseline(train, warm, first_metrics)
    metrics, out = train(warm, *flag.split(), name="other")
    assert metrics[0]["grad_norm"] == pytest.approx(standard["grad_norm"], rel=1e-4)
    if "norm" in flag:
        assert standard["grad_norm"] > 0.01
    # Adam's first step does not depend on the scale of the gradient, only its small entries do
    assert not torch.allclose(weights(out), first_metrics["weights"], atol=1e-7)


def test_beta_pulls_towards_the_reference_and_not_away_from_it(warm, train):
    """With many updates per rollout the policy drifts; a KL of weight 5 must hold it near."""
    flags = ["--updates", 6, "--lr", 3e-3, "--clip-eps", 10, "--steps", 2]
    kl = {}
    for beta in (0.001, 5):
        metrics, _ = train(warm, *flags, "--beta", beta, name=f"beta{beta}")
        kl[beta] = metrics[-1]["kl"]
    assert 0 < kl[5] < 0.5 * kl[0.001]


def test_both_clip_bounds_are_used(warm, train):
    flags = ["--updates", 4, "--lr", 3e-3]
    fractions = {}
    for name, bounds in {"none": (9, 99), "low": (0.001, 99), "high": (9, 0.001)}.items():
        metrics, _ = train(warm, *flags, "--clip-eps", *bounds, name=name)
        fractions[name] = metrics[0]["clip_fraction"]
    # low 9 never binds: rho is above 1 - 9
    assert fractions["none"] == 0 and fractions["low"] > 0 and fractions["high"] > 0


def test_images_are_shrunk_to_max_pixels(checkpoint, train):
    tokens = []
    for pixels in (300, 10**6):
        flags = ["--max-pixels", pixels, "--objective", "sft"]
        metrics, _ = train(checkpoint("qwen2_5_vl"), *flags, name=str(pixels))
        tokens.append(metrics[0]["visual_tokens"])
    assert tokens[0] < tokens[1]


def test_logs_and_checkpoints_come_as_often_as_asked(warm, train):
    flags = ["--steps", 4, "--save-every", 1, "--keep", 2, "--sample-every", 3]
    metrics, out = train(warm, *flags)
    assert len(metrics) == 4
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert re.findall(r"^=== step (\d+)", (out / "samples.txt").read_text(), re.M) == ["1", "4"]
