"""How fast and how large: the training loop against two others, the scoring against full attention
maps. This is not a test.

    python tests/engineering/bench_speed.py                       # both tables, on two CPU cores
    python tests/engineering/bench_speed.py --only scoring --repetitions 5

GRPO. One step is 4 prompts x 8 completions x 24 tokens, one update per rollout, fp32, a Qwen2.5-VL
of 0.4M parameters with 64, 256 or 1,024 visual tokens and 80 text tokens. The contestants, in turn,
each time in a process of its own:

    ours      grpo_train.main()
    repeated  the same loop, but every prompt, image and all, is in the batch once for each of its
              completions
    trl       GRPOTrainer with plain generation, if TRL is installed, set to the same work: grpo
              loss, no KL, temperature 1 without top-k and top-p, AdamW, clipping at 1, no gradient
              checkpointing, no logging. 32 completions are generated at once and trained on in
              micro-batches of 32 (trl 32) or 8 (trl 8). Which is faster depends on the size and the
              machine, so both run, and the ratios of speed and memory are to the faster one

The reward is the length of the text. The end token is suppressed for everyone and the tokens are
counted, so nobody does less. A step is everything between two updates: reading images, processor,
rollout, reward, update. The first two steps are not counted. The number is the median over
repetitions of the median step. Memory is the peak of the resident set (VmHWM) from the loaded model
to the last step, minus what was resident at the start.

Beside it is the ceiling: the tokens of G (P + S) over those of P + G S, which is all that sharing
the prompt can save in a pass over a model that costs the same for every token. Images, attention
and passes that are left out come on top.

Scoring. Scorer against eager attention whose maps are all kept (output_attentions=True) and then
reduced by equation (1): 8 layers, 1,024 visual tokens, captions of at least 250 tokens, batches of
two. Time and memory exclude loading, and the first batch is not timed. A second line with twice the
pairs must take twice the seconds and no more memory.
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

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}

# the lines above only work before torch is imported
import tiny  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor  # noqa: E402

import grpo_train  # noqa: E402
from common import policies  # noqa: E402
from common.vlm import (  # noqa: E402
    append_responses,
    chat_prompt,
    encode_prompts,
    encode_responses,
    load_vlm,
)
from reward import FILL_PROMPT  # noqa: E402
from score_dependency import CAPTION_PROMPT, Scorer  # noqa: E402

PROMPTS = 4  # per step
G = 8  # completions per prompt
S = 24  # tokens per completion
TEXT = 80  # text tokens of a prompt
SIDES = (8, 16, 32)  # visual tokens along a side of the image
WARM_UP = 2  # steps
TOKEN_PIXELS = 8  # side of the pixels that make one visual token
LEARNING_RATE = 2e-4
# the tokenizer learns the prompt too: few tokens, as in real ones
tiny.SENTENCES += (FILL_PROMPT, FILL_PROMPT)


# ---------------------------------------------------------------- checkpoint and data


def build(folder, layers, hidden):
    """(model, processor) of a random Qwen2.5-VL like those of the tests, but with room for 1,024
    visual tokens."""
    tokenizer = tiny.tokenizer_of("qwen2_5_vl")
    config = tiny.config_of("qwen2_5_vl", tokenizer)
    processor = tiny.processor_of("qwen2_5_vl", tokenizer)

    text = config.text_config
    text.hidden_size = hidden
    text.num_hidden_layers = layers
    text.num_attention_heads = hidden // 16
    text.max_position_embeddings = 2048
    text.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = hidden
    config.vision_config.window_size = 4 * TOKEN_PIXELS  # 4 x 4 visual tokens, as released

    pixels = (TOKEN_PIXELS * max(SIDES)) ** 2
    processor.image_processor = Qwen2VLImageProcessor(
        size={"shortest_edge": 256, "longest_edge": pixels}, patch_size=tiny.QWEN_PATCH
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def write_masks(folder, processor, side):
    """masks.jsonl of one step's prompts, each of side^2 visual and TEXT other tokens; images."""
    caption = "[MASK]."
    while True:
        prompt = chat_prompt(processor, FILL_PROMPT.format(masked_caption=caption))
        length = len(processor.tokenizer(prompt).input_ids) - 1  # without the image's one token
        if length >= TEXT:
            break
        caption += "!" if length + 1 == TEXT else " a"
    assert length == TEXT, f"{length} text tokens"
    with open(folder / "masks.jsonl", "w") as file:
        for i in range(PROMPTS):
            tiny.random_image(i, (TOKEN_PIXELS * side,) * 2).save(folder / f"{i}.png")
            record = {
                "id": str(i),
                "image": f"{i}.png",
                "masked_caption": caption,
                "sentence": "[MASK].",
                "answer": "circle",
            }
            file.write(json.dumps(record) + "\n")


def read_lines(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- memory


class PeakMemory:
    """MiB that the process held at most since this object was created, above what it held then."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        self.before = self.read("VmRSS")

    def __call__(self):
        return self.read("VmHWM") - self.before

    def read(self, field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ---------------------------------------------------------------- GRPO: three contestants


class NeverEnds(policies.Policy):
    """A policy that cannot sample an eos token."""

    def __init__(self, *args):
        super().__init__(*args)
        self.suppressed_ids = self.suppressed_ids + self.eos_ids


class Repeated(NeverEnds):
    """Every prompt once per completion: what a loop without a shared prefix computes."""

    def forward(self, batch, group, *args, **kwargs):
        patches = batch["image_grid_thw"].prod(-1).tolist()  # per image
        images = batch["pixel_values"].split(patches)
        repeated = {
            "pixel_values": torch.cat([image for image in images for _ in range(group)]),
            "position_ids": batch["position_ids"].repeat_interleave(group, 1),
        }
        for name in ("input_ids", "attention_mask", "image_grid_thw"):
            repeated[name] = batch[name].repeat_interleave(group, 0)
        assert repeated.keys() == batch.keys()
        return super().forward(repeated, 1, *args, **kwargs)


class LengthReward:
    """Rewards the number of characters."""

    weights = {"length": 1.0}
    clip = None

    def __call__(self, records, images, completions):
        lengths = [[float(len(text)) for text in group] for group in completions]
        lengths = torch.tensor(lengths)
        return {"format": torch.ones_like(lengths), "length": lengths}


def run_loop(policy, folder, side, steps):
    """grpo_train.main() with this policy: (completions per second of every step, peak MiB)."""
    memory = []
    prepare_policy = grpo_train.prepare_policy

    def when_model_is_loaded(*args):
        memory.append(PeakMemory())
        return prepare_policy(*args)

    policies.Policy = policy
    grpo_train.load_reward = lambda *_: LengthReward()
    grpo_train.prepare_policy = when_model_is_loaded
    out = folder / f"run_{os.getpid()}"
    flags = (
        f"--model {folder}/model --data {folder}/masks.jsonl --out {out} --steps {steps} "
        f"--prompts-per-step {PROMPTS} --group-size {G} --max-new-tokens {S} "
        f"--temperature 1 --lr {LEARNING_RATE} --reward semantic=1"
    )
    sys.argv = ["grpo_train.py", *flags.split()]
    grpo_train.main()
    metrics = read_lines(out / "metrics.jsonl")
    for record in metrics:
        assert record["completion_tokens"] == S
        assert record["visual_tokens"] == side**2
    return [record["completions_per_second"] for record in metrics], memory[0]()


def trl_config(folder, steps, batch, suppressed_ids):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=f"{folder}/trl_{os.getpid()}",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=PROMPTS * G // batch,
        num_generations=G,
        max_completion_length=S,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        num_iterations=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        generation_kwargs={"suppress_tokens": suppressed_ids},
    )


def trl_data(folder):
    import datasets

    records = read_lines(folder / "masks.jsonl")
    texts = [FILL_PROMPT.format(masked_caption=record["masked_caption"]) for record in records]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    images = [f"{folder}/{record['image']}" for record in records]
    data = datasets.Dataset.from_dict({"prompt": prompts, "image": images})
    return data.cast_column("image", datasets.Image())


def run_trl(folder, side, steps, batch):
    """The same work by TRL: (completions per second of every step, peak MiB)."""
    from transformers import AutoProcessor, TrainerCallback, logging
    from trl import GRPOTrainer

    logging.set_verbosity_error()
    # loaded as fp32, like ours; a checkpoint's name would leave the dtype to TRL's default
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    suppressed_ids = NeverEnds(model, processor).suppressed_ids
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.time())

        def on_step_end(self, *args, **kwargs):
            times.append(time.time())

    def length(completions, completion_ids, **kwargs):
        assert all(len(ids) == S for ids in completion_ids)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=length,
        train_dataset=trl_data(folder),
        callbacks=[Clock()],
        args=trl_config(folder, steps, batch, suppressed_ids),
    )
    memory = PeakMemory()
    trainer.train()
    tokens = PROMPTS * G * (side**2 + TEXT + S) * steps
    n_seen = trainer.state.num_input_tokens_seen
    assert n_seen == tokens, f"{n_seen} tokens instead of {tokens}"
    return [PROMPTS * G / (b - a) for a, b in zip(times, times[1:])], memory()


# ---------------------------------------------------------------- scoring: two contestants


def eager_scorer(model, processor, layers):
    """Equation (1) the usual way: a function of images and captions that returns what ours does."""
    model.set_attn_implementation({"text_config": "eager"})

    @torch.no_grad()
    def score(images, captions):
        ids, mask, offsets = encode_responses(processor, captions, model.device)
        prompts = [chat_prompt(processor, CAPTION_PROMPT)] * len(captions)
        images = [[image] for image in images]
        prompts = encode_prompts(model, processor, prompts, images, ids.shape[1])
        batch = append_responses(prompts, ids, mask)
        outputs = model(**batch, use_cache=False, logits_to_keep=1, output_attentions=True)

        # layers x (B, H, N, N)
        maps = outputs.attentions
        attention = [maps[layer].mean(1)[:, -ids.shape[1] - 1 :] for layer in layers]
        attention = torch.stack(attention)  # (L, B, S + 1, N)
        is_visual = batch["input_ids"] == model.config.image_token_id
        visual = (attention * is_visual[:, None]).sum(-1)
        text = (attention[..., -ids.shape[1] :] * mask[:, None]).sum(-1)
        shares = (visual / (visual + text)).mean(0)
        return [({"d_vis": s}, None, spans) for s, spans in zip(shares.tolist(), offsets)]

    return score


def scorer_of(contestant, model, processor):
    scorer = Scorer(model, processor)
    if contestant == "eager":
        return eager_scorer(model, processor, list(scorer.layers))

    def score(images, captions):
        return scorer([scorer.prepare(*pair) for pair in zip(images, captions)])

    return score


def run_scoring(contestant, folder, pairs):
    """(pairs per second, peak MiB, shares of every caption)."""
    model, processor = load_vlm(f"{folder}/model", torch.device("cpu"), dtype=torch.float32)
    score = scorer_of(contestant, model, processor)
    words = " ".join(tiny.SENTENCES[:-2]).replace("<", "").split()
    captions = []
    for n in range(pairs):
        captions.append(" ".join(words[i % len(words)] for i in range(n, n + 160)))
    images = [tiny.random_image(n, (TOKEN_PIXELS * max(SIDES),) * 2) for n in range(pairs)]
    assert min(len(processor.tokenizer(caption).input_ids) for caption in captions) >= 250

    memory = PeakMemory()
    score(images[:2], captions[:2])
    began = time.time()
    scored = []
    for i in range(0, pairs, 2):
        for rows, _, offsets in score(images[i : i + 2], captions[i : i + 2]):
            scored.append(rows["d_vis"][: len(offsets) + 1])
    return pairs / (time.time() - began), memory(), scored


# ---------------------------------------------------------------- the tables


def in_new_process(what, *args):
    """What the worker `what` returns, from a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([what, *map(str, args)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def work(what, folder, *numbers):
    torch.set_num_threads(2)
    folder = Path(folder)
    numbers = [int(n) for n in numbers]
    if what.startswith("score"):
        return run_scoring(what.split()[1], folder, *numbers)
    if what.startswith("trl"):
        return run_trl(folder, *numbers, int(what.split()[1]))
    return run_loop({"ours": NeverEnds, "repeated": Repeated}[what], folder, *numbers)


def grpo_table(root, args):
    contestants = ["ours", "repeated"]
    if importlib.util.find_spec("trl"):
        contestants += ["trl 32", "trl 8"]
    print(
        f"\nGRPO, {PROMPTS * G} completions per step: completions per second (median, least to "
        "most), and MiB at the peak"
    )
    header = "".join(f"{contestant:>30}" for contestant in contestants)
    print(f"{'prompt':>7} {'ceiling':>8} {header}   ours / repeated, trl: speed, memory")
    for side in SIDES:
        folder = root / f"grpo_{side}"
        _, processor = build(folder / "model", layers=4, hidden=96)
        write_masks(folder, processor, side)
        speeds = {contestant: [] for contestant in contestants}
        peaks = {contestant: [] for contestant in contestants}
        for _ in range(args.repetitions):
            for contestant in contestants:
                steps, mib = in_new_process(contestant, folder, side, WARM_UP + args.steps)
                speeds[contestant].append(statistics.median(steps[WARM_UP:]))
                peaks[contestant].append(mib)
        print(grpo_line(side**2 + TEXT, speeds, peaks), flush=True)


def grpo_line(P, speeds, peaks):
    """A line of the table, for prompts of P tokens."""
    speed = {contestant: statistics.median(values) for contestant, values in speeds.items()}
    peak = {contestant: statistics.median(values) for contestant, values in peaks.items()}
    cells = []
    for contestant, values in speeds.items():
        spread = f"({min(values):.1f}-{max(values):.1f})"
        cells.append(f"{speed[contestant]:.1f} {spread}  {peak[contestant]:,.0f} MiB")

    others = ["repeated"]
    trl = [contestant for contestant in speeds if contestant.startswith("trl")]
    if trl:
        others.append(max(trl, key=speed.get))
    ratios = []
    for other in others:
        faster = speed["ours"] / speed[other]
        ratios.append(f"{faster:.1f}x {peak['ours'] / peak[other]:.2f}")

    ceiling = G * (P + S) / (P + G * S)
    columns = "".join(f"{cell:>30}" for cell in cells)
    return f"{P:7,} {ceiling:6.1f}   {columns}   {', '.join(ratios)}"


def scoring_table(root, args):
    folder = root / "scoring"
    n = 2 * args.steps
    build(folder / "model", layers=8, hidden=128)
    print(f"\nScoring, 1,024 visual tokens: {n} pairs, and {2 * n} by ours")
    print(f"{'':>12} {'pairs/s':>8} {'peak MiB':>9}")
    jobs = {
        "ours": ("score ours", n),
        "eager": ("score eager", n),
        "ours, twice": ("score ours", 2 * n),
    }
    runs = {name: [] for name in jobs}
    for _ in range(args.repetitions):
        for name, (what, pairs) in jobs.items():
            runs[name].append(in_new_process(what, folder, pairs))

    speed = {name: statistics.median(run[0] for run in r) for name, r in runs.items()}
    peak = {name: statistics.median(run[1] for run in r) for name, r in runs.items()}
    for name in runs:
        print(f"{name:>12} {speed[name]:8.2f} {peak[name]:9,.0f}")
    difference = 0.0
    for ours, eager in zip(runs["ours"][0][2], runs["eager"][0][2], strict=True):
        for a, b in zip(ours, eager, strict=True):
            difference = max(difference, abs(a - b))
    print(
        f"ours / eager: {speed['ours'] / speed['eager']:.1f}x the pairs per second, "
        f"{peak['ours'] / peak['eager']:.2f} of the memory, scores differ by at most "
        f"{difference:.1e}\n"
        f"twice the pairs: {2 * speed['ours'] / speed['ours, twice']:.2f}x the seconds, "
        f"{peak['ours, twice'] / peak['ours']:.2f} of the memory"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=("grpo", "scoring"))
    add("--repetitions", type=int, default=3, help="processes per line and size (%(default)s)")
    add("--steps", type=int, default=5, help="timed steps, or twice as many pairs (%(default)s)")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker)))
        return
    tables = {"grpo": grpo_table, "scoring": scoring_table}
    with tempfile.TemporaryDirectory() as root:
        for name, table in tables.items():
            if args.only in (None, name):
                table(Path(root), args)


if __name__ == "__main__":
    main()
