"""How fast and how large: the training loop against two others, the scoring against full attention maps. Not a test.

    python tests/bench_speed.py                       # both tables, on two CPU cores
    python tests/bench_speed.py --only scoring --repetitions 5

GRPO. One step is 4 prompts x 8 completions x 24 tokens, one update a rollout, fp32, a Qwen2.5-VL of 0.4M parameters with
64, 256 or 1,024 visual tokens and 80 of text. The contestants, in turn, each time in a process of its own:

    ours      grpo_train.main()
    repeated  the same loop, but every prompt, picture and all, stands in the batch once for each of its completions
    trl       GRPOTrainer with plain generation, if TRL is installed, set to the same work: grpo loss, no KL, temperature 1
              without top-k and top-p, AdamW, clipping at 1, no gradient checkpointing, no logging. 32 completions are
              generated at once and trained on in micro-batches of 32 (trl 32) or 8 (trl 8): which is faster depends on the
              size and the machine, so both run, and the ratio of speed and memory is to the faster one

The reward is the length of the text. The end token is banned for everyone and the tokens are counted, so no one does less.
A step is all between two updates: reading pictures, processor, rollout, reward, update; the first two steps are not
counted. The number is the median over repetitions of the median step. Memory is the peak of the resident set (VmHWM) from
the loaded model to the last step, minus what was resident at the start.

Beside it the ceiling: the tokens of G (P + S) over those of P + G S, which is all that sharing the prompt can save in a pass
over a model that costs the same for every token. Pictures, attention and passes that are left out come on top.

Scoring. Scorer against eager attention whose maps are all kept (output_attentions=True) and then reduced by equation (1):
8 layers, 1,024 visual tokens, captions of 250 tokens and more, batches of two. Time and memory exclude loading, and the
first batch is not timed. A second row with twice the pairs must take twice the seconds and no more memory.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}

import torch  # noqa: E402 (the lines above only work before torch is imported)
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor  # noqa: E402

import grpo_train  # noqa: E402
import tiny  # noqa: E402
from reward import FILL_PROMPT  # noqa: E402
from score_dependency import (CAPTION_PROMPT, Scorer, append_responses, chat_prompt, encode_prompts,  # noqa: E402
                              encode_responses, load_vlm)

PROMPTS, G, S = 4, 8, 24                        # prompts a step, completions a prompt, tokens a completion
TEXT, SIDES = 80, (8, 16, 32)                   # text tokens of a prompt; visual tokens a side of the picture
WARM_UP, TOKEN_PIXELS = 2, 8                    # steps; side of the pixels that make one visual token
tiny.SENTENCES += (FILL_PROMPT, FILL_PROMPT)     # the tokenizer learns the prompt too: few tokens, as in real ones


# ------------------------------------------------------------------- checkpoint and data


def build(folder, layers, hidden):
    """A random Qwen2.5-VL like those of the tests, but with room for 1,024 visual tokens; its (model, processor)."""
    tokenizer = tiny.tokenizer_of("qwen2_5_vl")
    config, processor = tiny.config_of("qwen2_5_vl", tokenizer), tiny.processor_of("qwen2_5_vl", tokenizer)
    text = config.text_config
    text.hidden_size = config.vision_config.out_hidden_size = hidden
    text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings = layers, hidden // 16, 2048
    config.vision_config.window_size = 4 * TOKEN_PIXELS                               # 4 x 4 visual tokens, as released
    text.layer_types = ["full_attention"] * layers
    pixels = (TOKEN_PIXELS * max(SIDES)) ** 2
    processor.image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": pixels},
                                                      patch_size=tiny.QWEN_PATCH)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def write_masks(folder, processor, side):
    """masks.jsonl of one step's prompts, each of side^2 visual and TEXT other tokens, and its pictures."""
    caption = "[MASK]."
    while True:
        prompt = chat_prompt(processor, FILL_PROMPT.format(masked_caption=caption))
        length = len(processor.tokenizer(prompt).input_ids) - 1                                  # the picture's one token
        if length >= TEXT:
            break
        caption += "!" if length + 1 == TEXT else " a"
    assert length == TEXT, f"{length} text tokens"
    with open(folder / "masks.jsonl", "w") as f:
        for i in range(PROMPTS):
            tiny.picture(i, (TOKEN_PIXELS * side,) * 2).save(folder / f"{i}.png")
            f.write(json.dumps({"id": str(i), "image": f"{i}.png", "masked_caption": caption, "sentence": "[MASK].",
                                "answer": "circle"}) + "\n")


# ------------------------------------------------------------------- memory


class PeakMemory:
    """MiB that the process held at most since it was made, above what it held then."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")                             # sets VmHWM back to VmRSS
        self.before = self.read("VmRSS")

    def __call__(self):
        return self.read("VmHWM") - self.before

    def read(self, field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ------------------------------------------------------------------- GRPO: three contestants


class NeverStops(grpo_train.Policy):
    def __init__(self, *args):
        super().__init__(*args)
        self.banned = self.banned + self.stop


class Repeated(NeverStops):
    """Every prompt once for each completion: what a loop without a shared prefix computes."""

    def forward(self, batch, group, *args, **kwargs):
        rows = (batch["image_grid_thw"].prod(-1)).tolist()                                       # patches a picture
        tiled = {"pixel_values": torch.cat([p for p in batch["pixel_values"].split(rows) for _ in range(group)]),
                 "position_ids": batch["position_ids"].repeat_interleave(group, 1),
                 **{k: batch[k].repeat_interleave(group, 0) for k in ("input_ids", "attention_mask", "image_grid_thw")}}
        assert tiled.keys() == batch.keys()
        return super().forward(tiled, 1, *args, **kwargs)


class LengthReward:
    weights, clip = {"length": 1.0}, None

    def __call__(self, records, images, completions):
        length = torch.tensor([[float(len(c)) for c in group] for group in completions])
        return {"format": torch.ones_like(length), "length": length}


def run_loop(policy, folder, side, steps):
    """grpo_train.main() with this policy class: (completions a second of every step, peak MiB)."""
    memory, freeze = [], grpo_train.freeze_unused

    def model_is_loaded(*args):
        memory.append(PeakMemory())
        return freeze(*args)
    grpo_train.Policy, grpo_train.load_reward, grpo_train.freeze_unused = policy, lambda *_: LengthReward(), model_is_loaded
    out = folder / f"run_{os.getpid()}"
    sys.argv = ["grpo_train.py", "--model", f"{folder}/model", "--data", f"{folder}/masks.jsonl", "--out", f"{out}",
                "--w-visual", "0", "--prompts-per-step", f"{PROMPTS}", "--group-size", f"{G}", "--max-new-tokens", f"{S}", "--steps", f"{steps}"]
    grpo_train.main()
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert all(r["completion_tokens"] == S and r["visual_tokens"] == side ** 2 for r in rows)
    return [r["completions_per_second"] for r in rows], memory[0]()


def run_trl(folder, side, steps, batch):
    """The same work by TRL: (completions a second of every step, peak MiB)."""
    import datasets
    from transformers import AutoProcessor, TrainerCallback, logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    rows = [json.loads(line) for line in open(folder / "masks.jsonl")]
    data = datasets.Dataset.from_dict({
        "prompt": [[{"role": "user", "content": FILL_PROMPT.format(masked_caption=r["masked_caption"])}] for r in rows],
        "image": [f"{folder}/{r['image']}" for r in rows]}).cast_column("image", datasets.Image())
    # loaded as fp32, like ours; a checkpoint's name would do, but then the dtype is left to TRL's default
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    banned = NeverStops(model, processor).banned
    clock = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.append(time.time())

        def on_step_end(self, *args, **kwargs):
            clock.append(time.time())

    def length(completions, completion_ids, **kwargs):
        assert all(len(c) == S for c in completion_ids)
        return [float(len(c[0]["content"])) for c in completions]

    trainer = GRPOTrainer(model=model, processing_class=processor, reward_funcs=length, train_dataset=data,
                          callbacks=[Clock()], args=GRPOConfig(
        output_dir=f"{folder}/trl_{os.getpid()}", use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=steps,
        per_device_train_batch_size=batch, gradient_accumulation_steps=PROMPTS * G // batch, num_generations=G,
        max_completion_length=S, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="grpo", num_iterations=1,
        learning_rate=2e-4, lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, generation_kwargs={"suppress_tokens": banned}))
    memory = PeakMemory()
    trainer.train()
    tokens = PROMPTS * G * (side ** 2 + TEXT + S) * steps
    assert trainer.state.num_input_tokens_seen == tokens, f"{trainer.state.num_input_tokens_seen} tokens instead of {tokens}"
    return [PROMPTS * G / (b - a) for a, b in zip(clock, clock[1:])], memory()


# ------------------------------------------------------------------- scoring: two contestants


def eager_scores(model, processor, layers):
    """Equation (1) the usual way: a function of images and captions like Scorer."""
    model.set_attn_implementation({"text_config": "eager"})

    @torch.no_grad()
    def score(images, captions):
        ids, mask, offsets = encode_responses(processor, captions, model.device)
        prompts = [chat_prompt(processor, CAPTION_PROMPT)] * len(captions)
        batch = append_responses(encode_prompts(model, processor, prompts, [[i] for i in images], ids.shape[1]), ids, mask)
        maps = model(**batch, use_cache=False, logits_to_keep=1, output_attentions=True).attentions     # layers x (B, H, N, N)
        rows = torch.stack([maps[layer].mean(1)[:, -ids.shape[1] - 1:] for layer in layers])            # (L, B, S + 1, N)
        visual = (rows * (batch["input_ids"] == model.config.image_token_id)[:, None]).sum(-1)
        text = (rows[..., -ids.shape[1]:] * mask[:, None]).sum(-1)
        shares = (visual / (visual + text)).mean(0)
        return list(zip(shares.tolist(), [None] * len(captions), offsets))
    return score


def run_scoring(contestant, folder, pairs):
    """(pairs a second, peak MiB, shares of every caption)."""
    model, processor = load_vlm(f"{folder}/model", torch.device("cpu"), dtype=torch.float32)
    layers = list(Scorer(model, processor, ablation=True).layers)
    scorer = Scorer(model, processor) if contestant == "ours" else None
    score = ((lambda images, captions: scorer([scorer.prepare(*pair) for pair in zip(images, captions)])) if scorer else
             eager_scores(model, processor, layers))
    words = " ".join(tiny.SENTENCES[:-2]).replace("<", "").split()
    captions = [" ".join(words[i % len(words)] for i in range(n, n + 160)) for n in range(pairs)]
    images = [tiny.picture(n, (TOKEN_PIXELS * max(SIDES),) * 2) for n in range(pairs)]
    assert min(len(processor.tokenizer(c).input_ids) for c in captions) >= 250
    memory = PeakMemory()
    score(images[:2], captions[:2])
    began, scored = time.time(), []
    for i in range(0, pairs, 2):
        scored += [shares[:len(offsets) + 1] for shares, _, offsets in score(images[i:i + 2], captions[i:i + 2])]
    return pairs / (time.time() - began), memory(), scored


# ------------------------------------------------------------------- the tables


def fresh(what, *args):
    """What the worker `what` returns, from a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([what, *map(str, args)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def worker(what, folder, *numbers):
    torch.set_num_threads(2)
    folder, numbers = Path(folder), [int(n) for n in numbers]
    if what.startswith("score"):
        return run_scoring(what.split()[1], folder, *numbers)
    if what.startswith("trl"):
        return run_trl(folder, *numbers, int(what.split()[1]))
    return run_loop({"ours": NeverStops, "repeated": Repeated}[what], folder, *numbers)


def grpo_table(root, args):
    contestants = ["ours", "repeated"] + ["trl 32", "trl 8"] * bool(importlib.util.find_spec("trl"))
    print("\nGRPO, 32 completions a step: completions a second, and MiB at the peak (median, least to most)")
    print(f"{'prompt':>7} {'ceiling':>8} " + "".join(f"{c:>30}" for c in contestants)
          + "   ours / repeated, the faster trl: speed, memory")
    for side in SIDES:
        folder = root / f"grpo_{side}"
        model, processor = build(folder / "model", layers=4, hidden=96)
        write_masks(folder, processor, side)
        speed, peak = ({c: [] for c in contestants} for _ in range(2))
        for _ in range(args.repetitions):
            for c in contestants:
                steps, mib = fresh(c, folder, side, WARM_UP + args.steps)
                speed[c].append(statistics.median(steps[WARM_UP:]))
                peak[c].append(mib)
        s, m = ({c: statistics.median(v[c]) for c in contestants} for v in (speed, peak))
        P, others = side ** 2 + TEXT, ["repeated", *sorted(contestants[2:], key=s.get)[-1:]]
        print(f"{P:7,} {G * (P + S) / (P + G * S):6.1f}   " + "".join(
            f"{f'{s[c]:.1f} ({min(speed[c]):.1f}-{max(speed[c]):.1f})  {m[c]:,.0f} MiB':>30}" for c in contestants)
            + "   " + ", ".join(f"{s['ours'] / s[c]:.1f}x {m['ours'] / m[c]:.2f}" for c in others), flush=True)


def scoring_table(root, args):
    folder, n = root / "scoring", 2 * args.steps
    build(folder / "model", layers=8, hidden=128)
    print(f"\nScoring, 1,024 visual tokens: {n} pairs, and {2 * n} by ours\n{'':>12} {'pairs/s':>8} {'peak MiB':>9}")
    runs = {}
    for _ in range(args.repetitions):
        for name, what, pairs in (("ours", "score ours", n), ("eager", "score eager", n), ("ours, twice", "score ours", 2 * n)):
            runs.setdefault(name, []).append(fresh(what, folder, pairs))
    speed, peak = ({name: statistics.median(run[i] for run in r) for name, r in runs.items()} for i in range(2))
    for name in runs:
        print(f"{name:>12} {speed[name]:8.2f} {peak[name]:9,.0f}")
    difference = max(abs(a - b) for x, y in zip(runs["ours"][0][2], runs["eager"][0][2], strict=True)
                     for a, b in zip(x, y, strict=True))
    print(f"ours / eager: {speed['ours'] / speed['eager']:.1f}x the pairs a second, {peak['ours'] / peak['eager']:.2f} of the "
          f"memory, scores differ by at most {difference:.1e}\ntwice the pairs: {2 * speed['ours'] / speed['ours, twice']:.2f}x "
          f"the seconds, {peak['ours, twice'] / peak['ours']:.2f} of the memory")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("grpo", "scoring"))
    parser.add_argument("--repetitions", type=int, default=3, help="processes a contestant and size (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process; scoring has two pairs for each (%(default)s)")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*args.worker)))
        return
    with tempfile.TemporaryDirectory() as root:
        for name, table in (("grpo", grpo_table), ("scoring", scoring_table)):
            if args.only in (None, name):
                table(Path(root), args)


if __name__ == "__main__":
    main()
