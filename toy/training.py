"""How the toy's two models are trained: the base, CLIP, and a short tuning on questions.

Both models learn from the same biased captions as everything else; neither sees truth.jsonl.
"""

import collections
import itertools
import math
import random
import re

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from tqdm import tqdm

from benchmarks.registry import BENCHMARKS
from benchmarks.tsv import question_text
from common.records import load_records
from common.text import MASK, split_sentences
from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompts,
    encode_responses,
    load_vlm,
    token_logps,
)
from reward import FILL_PROMPT, target_completion
from score_dependency import CAPTION_PROMPT
from toy.models import CLIP_CONTEXT, make_base, make_clip, make_clip_tokenizer, make_processor
from toy.questions import colour_questions, question_record
from toy.world import building, load_world_image


def fit(model, loss_of, n, steps, batch_size, lr, seed, desc, muon_lr):
    """Minimises loss_of([index, ...]) over shuffled batches of n records; warm-up, then cosine."""
    optimizers = make_optimizers(model, lr, muon_lr)
    warmup = max(1, steps // 20)

    def share_of_rate(step):
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, share_of_rate) for o in optimizers]
    batches = shuffled_batches(n, batch_size, random.Random(seed))
    smooth = None
    model.train()
    with tqdm(range(steps), desc=desc, unit="step", leave=False) as bar:
        for _ in bar:
            loss = loss_of(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

            if smooth is None:
                smooth = loss.item()
            smooth = 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}")
    print(f"{desc}: {steps} steps, loss {smooth:.3f}")
    return model.eval()


def make_optimizers(model, lr, muon_lr):
    """Muon for the weight matrices, AdamW for the rest.

    With AdamW alone the base needs twice the steps to reach the same loss.
    """
    matrices = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(parameter)
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def shuffled_batches(n, batch_size, rng):
    """Yields lists of batch_size indices below n, every index once per epoch, for ever."""
    order = []
    while True:
        while len(order) < batch_size:
            order += rng.sample(range(n), n)
        yield [order.pop() for _ in range(batch_size)]


# ---------------------------------------------------------------- the base model


def train_base(out, records, images, steps, batch_size, lr, muon_lr, seed, device):
    """Trains the base to caption and to fill in, and saves it as an ordinary checkpoint.

    Filling in stands for the instruction tuning of a real model. The model learns to see mostly
    from the caption's words, which follow the image in every fill-in prompt. The loss therefore
    includes the text of the prompt, with twice the weight of the response. Without it, the same
    number of steps gives a quarter of the exact matches.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    processor = make_processor([record["caption"] for record in records])
    model = make_base(processor.tokenizer).to(device)

    def loss_of(indices):
        chosen = [images[i] for i in indices]
        captions = [records[i]["caption"] for i in indices]
        if rng.random() < 0.15:
            pairs = [(CAPTION_PROMPT, caption) for caption in captions]
            return response_loss(model, processor, pairs, chosen)
        pairs = [fill_pair(fill_example(rng, caption)) for caption in captions]
        return response_loss(model, processor, pairs, chosen, prompt_weight=2)

    desc = "base: captions and fill-in"
    fit(model, loss_of, len(records), steps, batch_size, lr, seed, desc, muon_lr)
    save_checkpoint(model, processor, out)


def fill_example(rng, caption):
    """{masked_caption, sentence, answer}: one to five words of a sentence are hidden.

    One time in six the whole sentence is hidden.
    """
    start, end = rng.choice(split_sentences(caption))
    sentence = caption[start:end]
    before = caption[:start]
    after = caption[end:]

    words = [match.span() for match in re.finditer(r"\w+", sentence)]
    first = rng.randrange(len(words))
    last = min(first + rng.randrange(5), len(words) - 1)
    start = words[first][0]
    end = words[last][1]
    if rng.random() < 1 / 6:
        start = 0
        end = len(sentence)

    masked = sentence[:start] + MASK + sentence[end:]
    return {
        "masked_caption": before + masked + after,
        "sentence": masked,
        "answer": sentence[start:end],
    }


def fill_pair(record):
    """(prompt, response) of a mask record."""
    prompt = FILL_PROMPT.format(masked_caption=record["masked_caption"])
    return prompt, target_completion(record)


def response_loss(model, processor, pairs, images, prompt_weight=0):
    """Cross-entropy, in nats per token, of the responses of (prompt, response) pairs.

    prompt_weight: how much the mean loss of the prompt's text after the image (caption,
    instruction and template) counts beside that of the responses.
    """
    prompts = [chat_prompt(processor, prompt) for prompt, _ in pairs]
    batch = encode_prompts(model, processor, prompts, [[image] for image in images])
    responses = [response for _, response in pairs]
    eos = processor.tokenizer.eos_token_id
    ids, mask, _ = encode_responses(processor, responses, model.device, eos)  # (B, S)
    is_image = batch["input_ids"] == model.config.image_token_id
    is_text = (is_image.cumsum(1) == is_image.sum(1, keepdim=True)) & ~is_image  # (B, P)
    weights = [prompt_weight * is_text / is_text.sum(), mask / mask.sum()]
    weights = torch.cat(weights, 1)  # (B, P + S)

    batch = append_responses(batch, ids, mask)
    logits = model(**batch, use_cache=False).logits
    logps = token_logps(logits[:, :-1], batch["input_ids"][:, 1:])
    return -(logps * weights[:, 1:]).sum()


def save_checkpoint(model, processor, out):
    """Saves an ordinary checkpoint of transformers, whole or not at all."""
    with building(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def teach_questions(out, checkpoint, steps, batch_size, lr, seed, device):
    """Tunes a checkpoint of the world out.parent on multiple choice, and saves it as `out`.

    The toy's base has never seen a question, and could not answer one. The answers are what the
    captions say, lies included: the tuning must not give away the truth.
    """
    torch.manual_seed(seed)
    model, processor = load_vlm(checkpoint, device)
    world = out.parent
    questions = list(colour_questions(world, "train", as_captioned=True))

    def loss_of(indices):
        pairs = []
        images = []
        for question in (questions[i] for i in indices):
            prompt = question_text(question_record(question), BENCHMARKS["mcq"].ending)
            target = {"sentence": question.sentence, "answer": question.answer}
            pairs.append((prompt, target_completion(target)))
            images.append(load_world_image(world, f"images/{question.id}.png"))
        return response_loss(model, processor, pairs, images)

    fit(model, loss_of, len(questions), steps, batch_size, lr, seed, "questions", lr)
    save_checkpoint(model, processor, out)


# ---------------------------------------------------------------- the CLIP model


def train_clip(out, records, images, steps, batch_size, lr, seed, device):
    """Trains a small CLIP on images and single sentences; saved for open_clip's "local-dir:"."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    captions = [record["caption"] for record in records]
    tokenizer = make_clip_tokenizer(captions)
    model, config, transform = make_clip(tokenizer, images[0].width)
    model = model.to(device)
    pixels = torch.stack([transform(image) for image in images])  # (N, 3, H, W)
    tokens = []
    for sentences in tqdm(rare_sentences(captions), desc="sentences to tokens", leave=False):
        encoded = tokenizer(
            sentences,
            padding="max_length",
            max_length=CLIP_CONTEXT,
            truncation=True,
            return_tensors="pt",
        )
        tokens.append(encoded.input_ids)
    contrast = open_clip.ClipLoss()

    def loss_of(indices):
        features = model.encode_image(pixels[indices].to(device), normalize=True)
        choices = [rng.sample(range(len(tokens[i])), min(2, len(tokens[i]))) for i in indices]
        loss = 0
        # two sentences of each caption, or its only one twice
        for position in (0, -1):
            texts = [tokens[i][choice[position]] for i, choice in zip(indices, choices)]
            text_features = model.encode_text(torch.stack(texts).to(device), normalize=True)
            loss = loss + contrast(features, text_features, model.logit_scale.exp())
        return loss / 2

    fit(model, loss_of, len(records), steps, batch_size, lr, seed, "clip: contrast", 7e-3)
    with building(out) as folder:
        save_for_hf(model, tokenizer, config, folder, safe_serialization=True)


def rare_sentences(captions):
    """The sentences of each caption, without those that 3% of the captions share.

    A shared sentence is about no image in particular. A caption that has no other keeps them.
    """
    sentences = []
    for caption in captions:
        sentences.append([caption[start:end] for start, end in split_sentences(caption)])
    counts = collections.Counter(itertools.chain.from_iterable(sentences))

    rare = []
    for texts in sentences:
        kept = [text for text in texts if counts[text] < 0.03 * len(captions)]
        rare.append(kept or texts)
    return rare


# ---------------------------------------------------------------- from the files of a world


def accelerator():
    """The GPU, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_on_world(world, name, steps, seed, device):
    """Trains world/base or world/clip on the captions of world/train.jsonl."""
    records = load_records(world / "train.jsonl")
    bar = tqdm(records, desc="reading images", leave=False)
    images = [load_world_image(world, record["image"]) for record in bar]
    if name == "base":
        train_base(world / name, records, images, steps, 16, 3e-3, 4e-3, seed, device)
    else:
        train_clip(world / name, records, images, steps, 128, 2e-3, seed, device)
