"""The figure of the README, made from a finished toy world.

    python -m toy.pipeline runs/toy assets/pipeline.png

It shows the first validation caption that lies about a hidden colour where the base model repeats
the lie, some of its eight sampled answers tell the truth, and the trained model does so, too: an
example of what training is for, not of how often it works.
"""

import sys
from pathlib import Path

import torch

from common.policy import Policy, decode, generate
from common.records import fail, load_records
from common.training import uniforms_of
from common.vlm import chat_prompt, encode_prompt, join_prompts, load_vlm
from report.figures import save_png
from report.pipeline import pipeline_figure
from reward import FILL_PROMPT, ClipScorer, Reward, advantages, parse_completion
from toy.metrics import correct_lies, sentence_at
from toy.world import load_truth, load_world_image

WEIGHTS = {"semantic": 1.0, "visual": 1.5}
GROUP = 8
LENGTH = 20


class Model:
    """A checkpoint that answers one mask: greedily, or with a sampled group."""

    def __init__(self, folder):
        self.model, self.processor = load_vlm(str(folder), torch.device("cpu"))

    def encode(self, mask, image):
        text = FILL_PROMPT.format(masked_caption=mask["masked_caption"])
        return encode_prompt(
            self.model, self.processor, chat_prompt(self.processor, text), [image], LENGTH
        )

    def greedy(self, mask, image):
        policy = Policy(self.model, self.processor, temperature=0)
        prompt = self.encode(mask, image)
        return parse_completion(generate(policy, self.processor, [prompt], LENGTH)[0])

    @torch.no_grad()
    def group(self, mask, image, place):
        policy = Policy(self.model, self.processor)
        batch = join_prompts(self.model, [self.encode(mask, image)])
        uniforms = uniforms_of(1, [place], GROUP, LENGTH, seed=0)
        ids, token_mask, _, _ = policy(batch, GROUP, uniforms)
        return decode(self.processor, ids, token_mask)


def find_example(world, base, trained):
    """(image, mask, completions, greedy answers of both) of the first mask that is an example."""
    truth = load_truth(world)
    for place, mask in enumerate(load_records(world / "masks_val.jsonl")):
        sentence = sentence_at(truth[mask["id"]], mask["start"], mask["end"])
        target = correct_lies(mask["answer"], mask["start"], sentence)
        if target == mask["answer"]:
            continue
        image = load_world_image(world, mask["image"])
        before = base.greedy(mask, image)
        after = trained.greedy(mask, image)
        if before != mask["answer"] or after != target:
            continue
        completions = base.group(mask, image, place)
        answers = [parse_completion(text) for text in completions]
        if target in answers and len(set(answers)) >= 4:
            return image, mask, completions, before, after
    return fail(f"{world}: no mask whose lie the trained model corrects")


def main(world, path):
    world = Path(world)
    newest = max(world.glob("mmrpt/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    base = Model(world / "base")
    image, mask, completions, before, after = find_example(world, base, Model(newest))

    hidden = [record["answer"] for record in load_records(world / "masks_train.jsonl")]
    reward = Reward(WEIGHTS, clip=ClipScorer(str(world / "clip")), hidden=hidden)
    components = reward([mask], [image], [completions])
    A = advantages(components, WEIGHTS)[0].tolist()
    semantic = components["semantic"][0].tolist()
    visual = components["visual"][0].tolist()
    answers = [parse_completion(text) or "(broken form)" for text in completions]
    group = sorted(zip(answers, semantic, visual, A), key=lambda answer: -answer[-1])

    records = {record["id"]: record for record in load_records(world / "scores_val.jsonl")}
    figure = pipeline_figure(image, records[mask["id"]], mask, group, before, after)
    save_png(figure, path)
    print(f"{path}: {mask['sentence']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
