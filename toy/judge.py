"""The toy's judge of knowledge: a small VLM that answers yes-or-no questions about drawings.

It begins as the base, which has learned to see, and is tuned on questions about biased captions. It
stays as it is while other copies of the base are trained, and draws nothing.
"""

import random

import torch
from tqdm import tqdm

from common.judges import QUESTION
from common.records import load_records
from common.text import split_sentences
from common.vlm import load_vlm
from toy.drawing import CORNERS, KINDS, RADII
from toy.training import fit, response_loss, save_checkpoint
from toy.world import COLOURS, load_world_image

# words that can take each other's place
ALTERNATIVES = (KINDS, sorted(COLOURS), sorted(RADII), sorted(CORNERS))


def train_judge(world, steps, seed):
    """Trains world/judge to say whether a drawing shows a sentence, or a whole prompt."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompts = load_records(world / "prompts_train.jsonl")
    bar = tqdm(prompts, desc="reading images", leave=False)
    images = [load_world_image(world, prompt["image"]) for prompt in bar]
    model, processor = load_vlm(str(world / "base"), torch.device("cpu"))

    def loss_of(indices):
        pairs = [yes_or_no(rng, prompts[i]["prompt"]) for i in indices]
        return response_loss(model, processor, pairs, [images[i] for i in indices])

    fit(model, loss_of, len(prompts), steps, 48, 1e-3, seed, "judge: yes or no", muon_lr=2e-3)
    save_checkpoint(model, processor, world / "judge")


def yes_or_no(rng, prompt):
    """(question, answer) about a prompt or a sentence of it; No if one of its words was changed."""
    if rng.random() < 0.5:
        start, end = rng.choice(split_sentences(prompt))
        prompt = prompt[start:end]
    if rng.random() < 0.5:
        return QUESTION.format(text=prompt), "Yes"
    return QUESTION.format(text=change_a_word(rng, prompt)), "No"


def change_a_word(rng, text):
    """The text with one kind, colour, size or place replaced by another of its sort."""
    start, end = rng.choice(split_sentences(text))
    sentence = text[start:end]
    words = rng.choice(ALTERNATIVES)
    said = next(word for word in words if f" {word}" in sentence)
    other = rng.choice([word for word in words if word != said])
    return text[:start] + sentence.replace(f" {said}", f" {other}", 1) + text[end:]
