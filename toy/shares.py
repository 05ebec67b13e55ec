"""Which component decides? The share of a summed reward's variance that comes from r_ins.

    python -m toy.shares runs/lvrpo

The base of a finished drawing world draws eight images for each of 256 prompts. Within every group,
r_ins and r_sem are added raw, or normalised one by one as equation (2) does, and the share of r_ins
in the variance of the sum is cov(r_ins, sum) / var(sum).
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common.drawing_prompts import load_prompts, sentences_of
from common.drawings import drawings_of_codes, encode_drawing
from common.policy import Policy
from common.training import uniforms_of
from common.vlm import join_prompts, load_vlm
from lvrpo.reward import DrawingReward, draw_rivals
from reward import ClipScorer, advantages
from toy.drawing import detect

PROMPTS = 256
BATCH = 32
G = 8


@torch.no_grad()
def draw_groups(world, prompts):
    """PIL images, G for each prompt, by the base of the world."""
    model, processor = load_vlm(str(world / "base"), torch.device("cpu"))
    policy = Policy(model, processor)
    groups = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="drawing", leave=False):
        part = prompts[start : start + BATCH]
        encoded = [encode_drawing(model, processor, prompt["prompt"]) for prompt in part]
        places = range(start, start + len(part))
        uniforms = uniforms_of(1, places, G, policy.media["image"].length, seed=0)
        codes, _, _, _ = policy(join_prompts(model, encoded), G, uniforms, medium="image")
        images = drawings_of_codes(model, processor, codes)
        groups += [images[i : i + G] for i in range(0, len(images), G)]
    return groups


def share_of(part, other):
    """The share of `part` in the variance of part + other within groups, both (B, G)."""
    part = part - part.mean(1, keepdim=True)
    total = part + other - other.mean(1, keepdim=True)
    return ((part * total).sum() / (total * total).sum()).item()


def main(world):
    world = Path(world)
    prompts = load_prompts(world / "prompts_train.jsonl")
    rivals = draw_rivals(text for prompt in prompts for text in sentences_of(prompt))
    clip = ClipScorer(str(world / "clip"))
    prompts = prompts[:PROMPTS]
    groups = draw_groups(world, prompts)

    sems = {}
    for relative, texts in (("prompts", rivals), ("none", None)):
        scorer = DrawingReward({"sem": 1}, clip=clip, rivals=texts)
        sems[relative] = scorer(prompts, groups)["sem"]
    print(f"{'r_ins':10s}{'r_sem':10s}{'added raw':>12s}{'one by one':>12s}")
    for verdict in ("graded", "binary"):
        ins = DrawingReward({"ins": 1}, detector=detect, verdict=verdict)(prompts, groups)["ins"]
        for relative, sem in sems.items():
            raw = share_of(ins, sem)
            each = [advantages({"r": reward}, {"r": 1.0}) for reward in (ins, sem)]
            print(f"{verdict:10s}{relative:10s}{raw:12.2f}{share_of(*each):12.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
