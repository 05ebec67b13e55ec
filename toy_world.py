"""The toy world: the whole method where the truth is known.

    python toy_world.py                                   # world, models, all five stages, the table
    python toy_world.py --bias 0.8 --out runs/bias08      # captions that lie more often
    python toy_world.py --small --out runs/small          # a minute or two: does everything run?
    python toy_world.py --study                           # what makes the difference? Two hours on two cores, resumable

A picture holds two or three shapes; its caption mixes sentences that need the picture with general facts and filler:

    "A circle has no corners. The top left holds a large red circle. In the bottom right we see a small white square."

**Descriptive bias.** Every kind of shape has a stereotype colour (circles: red). Colours are painted evenly, but with
probability `--bias` a caption gives an object the stereotype colour of its kind, as people write what such things
usually look like. Imitating captions teaches the bias: nothing in the data says better. The truth is kept in
truth.jsonl, and used for *evaluation only*: both models learn from the same biased captions as everything else.

base   a small Idefics3 with its real processor, trained from scratch to caption and to fill in hidden words, which
       stands in for the instruction tuning that a real model has had
clip   a small open_clip model. Contrastive training ends at log p(text | image) / p(text): the captions' prior is
       divided out, so CLIP prefers the painted colour although every other caption does not (reward.py builds on it)

out:  OUT/images/, train.jsonl and val.jsonl {id, image, caption}, base/, clip/, what the stages write, results.json, and
      truth.jsonl {id, objects: [{kind, colour, size, place, stereotype}], sentences: [{start, end, needs_image, object,
      words: [{start, end, needs_image}], lies: [{start, end, painted}]}]}
      start and end count characters of the caption; object is an index or null; a lie is a colour word that is not true

What results.json holds (masks and predictions: those of the validation captions):

    dependency_auroc         P(a sentence that needs the picture scores above one that does not), ties half; _less_place:
                             of the scores less what their place usually scores (build_masks.py), for words too
    dependency_vs_ablation_rank_correlation                of D_vis and log p(text | image) - log p(text | grey image)
    mask_precision, _recall  share of masks in a sentence that needs the picture; share of such sentences with a mask
    exact_match_truth        share of predictions equal to the hidden text with its lies put right
    exact_match_caption      share of predictions equal to the hidden text as the caption has it, lies included
    stereotype_rate          masks that hide the colour of an object not painted in its stereotype colour: share of the
                             predictions that name the stereotype colour all the same

What study.json holds, every figure as {values (one a seed), mean, std}:

    arms, bias          by arm (ARMS), and by bias and arm: the metrics above, and reliance_*: less those of a shuffled picture;
                        clip is no policy but the teacher: its choice of colour for objects not painted in their stereotype
    masks               the same by what a policy was trained on, and by the kind of masks that it is judged on
    dependency, rules   what the default scores find, and what the masks of each threshold rule hit
    probe               by model: layers (D_vis of each alone) and patches (metrics with 1, 2 or 4 of 16 patches painted over:
                        those that the sentence of the mask attends to most or least, any, or any of other objects)
    robustness          by order of training, corruption and strength; text: without and with a false sentence in place of one
                        about another object, which names the stereotype colour of the hidden object, and else tells the truth
    jobs, failed        command and seconds of every job; what failed, and why
"""
import argparse
import base64
import collections
import contextlib
import ctypes
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor,
                          PreTrainedTokenizerFast)

from build_masks import MASK, annotate, mask_caption, threshold_rule, usual_by_place
from evaluate import (BENCHMARKS, chart, curves, examples, generate, mask_index, predictions_of, question_text, table,
                      write_results_page)
from grpo_train import Policy
from reward import FILL_PROMPT, ClipScorer, exact_match, parse_completion, target_completion
from score_dependency import (CAPTION_PROMPT, Scorer, append_responses, chat_prompt, cli, encode_prompt, encode_prompts,
                              encode_responses, fail, load_image, load_vlm, ranks, read_jsonl, same_run, score_record,
                              spearman, split_sentences, token_logps, tokens_of, write_atomically, writing)

# ------------------------------------------------------------------- the world

SIDE = 64                                                      # pixels: 4 x 4 patches of 16, so 16 visual tokens
STEREOTYPE = {"circle": "red", "square": "blue", "triangle": "green"}
COLOURS = {"red": (230, 20, 20), "blue": (20, 40, 230), "green": (20, 190, 40), "white": (250, 250, 250), "black": (5, 5, 5)}
RADII = {"small": (8, 9), "large": (13, 14)}                   # pixels, both ends included
PLACES = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}
SEEN = ("The {place} holds a {size} {colour} {kind}.", "In the {place} we see a {size} {colour} {kind}.",
        "At the {place} there is a {size} {colour} {kind}.", "The {place} is taken by a {size} {colour} {kind}.")
KNOWN = ("A circle has no corners.", "A square has four equal sides.", "A triangle has three corners.",
         "Every side of a square is straight.", "Circles roll and squares do not.", "Two triangles can form a square.",  # facts
         "This is a simple picture.", "The background is plain.", "Shapes like these are easy to draw.",
         "Nobody signed the picture.", "The drawing was made by a computer.")                                          # filler


def draw_shape(draw, kind, colour, x, y, r):
    """A filled shape of radius r, in pixels, around (x, y)."""
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif kind == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    else:
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)


def sample_pair(rng, bias):
    """A picture, its caption, and the truth about both: (PIL image, str, {objects, sentences})."""
    image = Image.new("RGB", (SIDE, SIDE), (rng.randint(110, 145),) * 3)
    draw, objects, parts = ImageDraw.Draw(image), [], []                         # parts: (sentence, object, colour it says)
    for place in rng.sample(sorted(PLACES), rng.choice((2, 3))):
        kind, size, colour = (rng.choice(sorted(choices)) for choices in (STEREOTYPE, RADII, COLOURS))
        r = rng.randint(*RADII[size])
        room = (15 - r) // 2
        x, y = (centre + rng.randint(-room, room) for centre in PLACES[place])
        draw_shape(draw, kind, COLOURS[colour], x, y, r)
        said = STEREOTYPE[kind] if rng.random() < bias else colour               # the descriptive bias
        text = rng.choice(SEEN).format(place=place, size=size, colour=said, kind=kind)
        parts.append((text, len(objects), said))
        objects.append({"kind": kind, "colour": colour, "size": size, "place": place, "stereotype": STEREOTYPE[kind]})
    parts += [(text, None, None) for text in rng.sample(KNOWN, rng.choice((1, 2)))]
    rng.shuffle(parts)
    sentences, start = [], 0
    for text, index, said in parts:
        o = {} if index is None else objects[index]
        visual = {said, o.get("kind"), o.get("size"), *o.get("place", "").split()}
        words = [{"start": start + m.start(), "end": start + m.end(), "needs_image": m[0] in visual}
                 for m in re.finditer(r"\w+", text)]
        lies = [{"start": start + m.start(), "end": start + m.end(), "painted": o["colour"]}
                for m in re.finditer(rf"\b{said}\b", text) if said != o.get("colour")]
        sentences.append({"start": start, "end": start + len(text), "needs_image": index is not None, "object": index,
                          "words": words, "lies": lies})
        start += len(text) + 1
    return image, " ".join(text for text, _, _ in parts), {"objects": objects, "sentences": sentences}


@contextlib.contextmanager
def building(path):
    """A temporary path that becomes `path` when the block is complete: a kill leaves nothing half-built."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.replace(path)


def make_world(folder, n_train, n_val, bias, seed):
    """Writes images/, train.jsonl, val.jsonl, truth.jsonl into `folder`; the same arguments give the same bytes."""
    folder, rng = Path(folder), random.Random(seed)
    files = {"train": [], "val": [], "truth": []}
    shutil.rmtree(folder / "images", ignore_errors=True)                         # of a world that was not finished
    with building(folder / "images") as images:
        images.mkdir(parents=True)
        for i in tqdm(range(n_train + n_val), desc="painting", unit="picture"):
            split = "train" if i < n_train else "val"
            name = f"{split}-{i:05d}"
            image, caption, truth = sample_pair(rng, bias)
            image.save(images / f"{name}.png")
            files[split].append({"id": name, "image": f"images/{name}.png", "caption": caption})
            files["truth"].append({"id": name, **truth})
    for name, records in files.items():
        write_atomically(folder / f"{name}.jsonl", (json.dumps(r) + "\n" for r in records))


QUESTION = "Which colour is hidden? "


def questions(folder, split, said=False):
    """Yields (id, kind of shape, sentence with hidden colour, options, answer): the painted colour, or what the caption says."""
    captions, options = {r["id"]: r["caption"] for r in records_of(folder / f"{split}.jsonl")}, dict(zip("ABCDE", sorted(COLOURS)))
    for record in (r for r in records_of(folder / "truth.jsonl") if r["id"] in captions):
        for i, o in enumerate(record["objects"]):
            sentence = next(s for s in record["sentences"] if s["object"] == i)
            words = re.findall(r"\w+", captions[record["id"]][sentence["start"]:sentence["end"]])
            answer = next(w for w in words if w in COLOURS) if said else o["colour"]
            yield record["id"], o["kind"], SEEN[1].format(**{**o, "colour": MASK}), options, answer


def clip_metrics(folder):
    """What CLIP says of questions() about validation objects that are not painted in their stereotype colour: the shares of
    its first choices, among the five colours, that are the painted one and the stereotype."""
    clip, right, stereotype = ClipScorer(str(folder / "clip")), [], []
    for name, kind, sentence, options, painted in questions(folder, "val"):
        if painted != STEREOTYPE[kind]:
            image, colours = load_image(folder, f"images/{name}.png", SIDE * SIDE), list(options.values())
            first = colours[clip([image], [[sentence.replace(MASK, c) for c in colours]], "answers")[0].argmax()]
            right.append(first == painted)
            stereotype.append(first == STEREOTYPE[kind])
    return {"exact_match_truth": statistics.mean(map(float, right)), "stereotype_rate": statistics.mean(map(float, stereotype))}


def write_benchmark(folder):
    """Writes val.tsv, multiple choice as VLMEvalKit reads it, about the validation pictures. Every question stands there in all
    rotations of its options, as CircularEval asks it; the copies name the first row's index in place of the picture."""
    rows = list(questions(folder, "val"))

    def lines():
        yield "\t".join(["index", "image", "question", *"ABCDE", "answer", "category"]) + "\n"
        for turn in range(len(COLOURS)):
            for i, (name, kind, sentence, options, colour) in enumerate(rows):
                turned = (colours := list(options.values()))[turn:] + colours[:turn]
                picture = i if turn else base64.b64encode((folder / "images" / f"{name}.png").read_bytes()).decode()
                fields = [i + turn * 10**6, picture, QUESTION + sentence, *turned, "ABCDE"[turned.index(colour)], kind]
                yield "\t".join(map(str, fields)) + "\n"
    write_atomically(folder / "val.tsv", lines())


# ------------------------------------------------------------------- training of both models


def fit(model, loss_of, n, steps, batch_size, lr, seed, desc, muon_lr):
    """Minimises loss_of([index, ...]) over shuffled batches of n records, with warm-up and cosine decay.

    Muon takes the weight matrices, AdamW the rest: with AdamW alone the base needs twice the steps for the same loss.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    warmup = max(1, steps // 20)                               # and a cosine to 0 after it
    shape = lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    rng, order, mean = random.Random(seed), [], None
    model.train()
    with tqdm(range(steps), desc=desc, unit="step") as bar:
        for _ in bar:
            while len(order) < batch_size:
                order += rng.sample(range(n), n)
            loss = loss_of([order.pop() for _ in range(batch_size)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            bar.set_postfix(loss=f"{mean:.3f}")
    return model.eval()


def make_tokenizer(texts, special, **names):
    """A byte-level BPE of at most 1,000 tokens that knows every word of `texts` as one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)


# ------------------------------------------------------------------- the base model

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
            "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")


def make_processor(captions):
    """The real Idefics3Processor around a tokenizer made from captions and prompts; 16 visual tokens a picture."""
    words = [w for caption in captions for w in re.findall(r"\w+", caption)]     # an answer begins without a space
    tokenizer = make_tokenizer([*captions, *words, *[CAPTION_PROMPT, FILL_PROMPT, "User: Assistant:"] * 10],
                               ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
                                "<global-img>"], pad_token="<pad>", bos_token="<|im_start|>", eos_token="<end_of_utterance>")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False)         # not special: decoding must show them
                          for t in (MASK, "<think>", "</think>", "<answer>", "</answer>")])
    images = Idefics3ImageProcessor(do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
    return Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=TEMPLATE)


def make_base(tokenizer):
    """An untrained Idefics3 of 1.3 M parameters. Its vision encoder has absolute positions, so it learns places soon."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    init = {"initializer_range": 0.05}                         # about 1 / sqrt(width), rather than that of a wide model
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "vocab_size": len(tokenizer), **init, **ids}
    vision = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": SIDE, "patch_size": 16, **init}
    model = Idefics3ForConditionalGeneration(Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=1, tie_word_embeddings=True, **init, **ids,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>")))
    model.generation_config.update(**ids)
    return model


def fill_example(rng, caption):
    """{masked_caption, sentence, answer}: one to five words of a sentence are hidden, or a whole one (one in six)."""
    start, end = rng.choice(split_sentences(caption))
    sentence, before, after = caption[start:end], caption[:start], caption[end:]
    words = [m.span() for m in re.finditer(r"\w+", sentence)]
    first = rng.randrange(len(words))
    start, end = words[first][0], words[min(first + rng.randrange(5), len(words) - 1)][1]
    if rng.random() < 1 / 6:
        start, end = 0, len(sentence)
    masked = sentence[:start] + MASK + sentence[end:]
    return {"masked_caption": before + masked + after, "sentence": masked, "answer": sentence[start:end]}


def train_base(out, records, images, steps, batch_size, lr, seed, device):
    """Trains the base on captions and fill-in, loss on the responses only, and saves it as an ordinary checkpoint."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    processor = make_processor([r["caption"] for r in records])
    model = make_base(processor.tokenizer).to(device)

    done = itertools.count()

    def loss_of(rows):
        pairs = [(CAPTION_PROMPT, records[i]["caption"]) for i in rows]
        if next(done) > 0.35 * steps and rng.random() < 0.9:   # captions first: every token of them teaches to see
            hidden = [fill_example(rng, caption) for _, caption in pairs]
            pairs = [(FILL_PROMPT.format(masked_caption=h["masked_caption"]), target_completion(h)) for h in hidden]
        return response_loss(model, processor, pairs, [images[i] for i in rows])

    fit(model, loss_of, len(records), steps, batch_size, lr, seed, "base: captions, then fill-in", 3e-3)
    save(model, processor, out)


def response_loss(model, processor, pairs, images):
    """Cross-entropy, nats a token, of the responses of (prompt, response) pairs about one picture each."""
    prompts, responses = zip(*pairs)
    batch = encode_prompts(model, processor, [chat_prompt(processor, p) for p in prompts], [[image] for image in images])
    ids, mask, _ = encode_responses(processor, responses, model.device, processor.tokenizer.eos_token_id)
    logits = model(**append_responses(batch, ids, mask), logits_to_keep=ids.shape[1] + 1, use_cache=False).logits
    return -(token_logps(logits[:, :-1], ids) * mask).sum() / mask.sum()


def save(model, processor, out):
    with building(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def teach_questions(out, checkpoint, steps, batch_size, lr, seed, device):
    """Short instruction tuning of a checkpoint of the world out.parent, on multiple choice that is answered as captions say,
    lies included: the toy's base knows no questions, and a benchmark of them is nothing to it."""
    torch.manual_seed(seed)
    model, processor = load_vlm(checkpoint, device)
    asked = list(questions(out.parent, "train", said=True))

    def loss_of(rows):
        names, _, *parts = zip(*(asked[i] for i in rows))
        pairs = [(question_text({"question": QUESTION + sentence, "options": options}, BENCHMARKS["mcq"].ending),
                  target_completion({"sentence": sentence, "answer": answer})) for sentence, options, answer in zip(*parts)]
        return response_loss(model, processor, pairs, [load_image(out.parent, f"images/{n}.png", SIDE * SIDE) for n in names])

    fit(model, loss_of, len(asked), steps, batch_size, lr, seed, "questions", lr)
    save(model, processor, out)


# ------------------------------------------------------------------- the CLIP model


def train_clip(out, records, images, steps, batch_size, lr, seed, device):
    """Trains a small CLIP on pictures and single sentences, and saves it for open_clip's "local-dir:"."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sentences = [[r["caption"][s:e] for s, e in split_sentences(r["caption"])] for r in records]
    count = collections.Counter(s for row in sentences for s in row)             # a sentence that many captions share
    sentences = [[s for s in row if count[s] < 0.03 * len(records)] or row for row in sentences]    # names no picture
    tokenizer = make_tokenizer([r["caption"] for r in records], ["<pad>", "<eos>"], pad_token="<pad>", eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    config = {"embed_dim": 128,
              "vision_cfg": {"image_size": SIDE, "patch_size": 16, "width": 128, "layers": 3, "head_width": 32, "mlp_ratio": 3.0},
              "text_cfg": {"context_length": 16, "vocab_size": len(tokenizer), "width": 96, "heads": 4, "layers": 2,
                           "mlp_ratio": 3.0, "pool_type": "eos", "eos_id": tokenizer.eos_token_id,
                           "hf_tokenizer_name": "in this folder"}}
    model = open_clip.CLIP(**config, init_logit_scale=math.log(20)).to(device)
    open_clip.model.set_model_preprocess_cfg(model, {"size": SIDE, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    preprocess = open_clip.transform.image_transform(SIDE, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = torch.stack([preprocess(image) for image in images])
    tokens = [tokenizer(row, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
              for row in tqdm(sentences, desc="sentences to tokens", leave=False)]
    contrast = open_clip.ClipLoss()

    def loss_of(rows):
        features = model.encode_image(pixels[rows].to(device), normalize=True)
        twice = [rng.sample(range(len(tokens[i])), min(2, len(tokens[i]))) for i in rows]
        texts = [torch.stack([tokens[i][two[k]] for i, two in zip(rows, twice)]).to(device) for k in (0, -1)]
        return sum(contrast(features, model.encode_text(t, normalize=True), model.logit_scale.exp()) for t in texts) / 2

    fit(model, loss_of, len(records), steps, batch_size, lr, seed, "clip: contrast", 7e-3)
    with building(out) as folder:
        save_for_hf(model, tokenizer, config, folder, safe_serialization=True)


# ------------------------------------------------------------------- evaluation against the truth


def auroc(scores, labels):
    """P(a positive scores above a negative), ties half: the rank-sum formula. nan without both."""
    positive = torch.tensor(labels, dtype=torch.bool)
    p, n = positive.sum().item(), (~positive).sum().item()
    return (ranks(scores)[positive].sum().item() - p * (p + 1) / 2) / (p * n) if p and n else float("nan")


def sentence_at(truth, start, end):
    """The true sentence in which the middle of [start, end) lies: a splitter may differ by a character."""
    return min(truth["sentences"], key=lambda s: abs(s["start"] + s["end"] - start - end))


def words_in(sentence, start, end):
    return [w for w in sentence["words"] if start <= w["start"] and w["end"] <= end]


def dependency_metrics(scores, truth):
    """How scored captions agree with the truth (sentences and words) and with the image ablation."""
    usual = usual_by_place(scores)
    sentences = [(s, sentence_at(truth[r["id"]], s["start"], s["end"])) for r in scores for s in annotate(r, usual)]
    words = [(w["score"] - w["usual"], t["needs_image"]) for s, true in sentences for w in s["words"]
             for t in words_in(true, w["start"], w["end"])]
    needs, values = [t["needs_image"] for _, t in sentences], [s["score"] for s, _ in sentences]
    metrics = {"dependency_auroc": auroc(values, needs),
               "dependency_auroc_less_place": auroc([s["score"] - s["usual"] for s, _ in sentences], needs),
               "word_auroc_less_place": auroc(*zip(*words))}
    if all("ablation" in s for s, _ in sentences):
        ablation = [s["ablation"] for s, _ in sentences]
        metrics |= {"ablation_auroc": auroc(ablation, needs),
                    "dependency_vs_ablation_rank_correlation": spearman(values, ablation),
                    "dependency_less_place_vs_ablation_rank_correlation":
                        spearman([s["score"] - s["usual"] for s, _ in sentences], ablation)}
    return metrics


def rule_metrics(scores, truth):
    """mask_metrics of every threshold rule of build_masks.py, spans, on the same scores."""
    usual = usual_by_place(scores)
    sentences, found = [s for r in scores for s in annotate(r, usual)], {}
    for rule in ("place", "otsu", "mean", "gap", "quantile:0.5"):
        tau_of = threshold_rule(rule, sentences)
        masks = [m for r in scores for m in mask_caption(r, usual, tau_of, "span", "dependency", 4, None)]
        metrics = mask_metrics(masks, scores, truth)
        p, r = metrics["mask_precision"], metrics["mask_recall"]
        found[rule] = {**metrics, "f1": 2 * p * r / max(p + r, 1e-9)}
    return found


def mask_metrics(masks, scores, truth):
    """Precision and recall of masks, by sentence and by word; `scores` says which captions could have been masked."""
    hidden = [(m, sentence_at(truth[m["id"]], m["start"], m["end"])) for m in masks]
    words = [w["needs_image"] for m, s in hidden for w in words_in(s, m["start"], m["end"])]
    every = [s for r in scores for s in truth[r["id"]]["sentences"] if s["needs_image"]]
    hit = {(m["id"], s["start"]) for m, s in hidden if s["needs_image"]}
    return {"mask_precision": sum(s["needs_image"] for _, s in hidden) / max(len(hidden), 1),
            "mask_recall": len(hit) / max(len(every), 1),
            "word_precision": sum(words) / max(len(words), 1),
            "word_recall": sum(words) / max(sum(w["needs_image"] for s in every for w in s["words"]), 1)}


def put_right(answer, start, sentence):
    """The hidden text with its lies replaced by the painted colours; start: where it begins in the caption."""
    for lie in reversed(sentence["lies"]):
        if start <= lie["start"] and lie["end"] <= start + len(answer):
            answer = answer[:lie["start"] - start] + lie["painted"] + answer[lie["end"] - start:]
    return answer


def prediction_metrics(predictions, truth):
    """Means of exact_match_truth, exact_match_caption and stereotype_rate over predictions {id, start, end, answer, ...}."""
    right, said, stereotype = [], [], []
    for p in predictions:
        sentence = sentence_at(truth[p["id"]], p["start"], p["end"])
        answer = parse_completion(p["prediction"]) or ""
        right.append(exact_match(answer, put_right(p["answer"], p["start"], sentence)))
        said.append(exact_match(answer, p["answer"]))
        o = None if sentence["object"] is None else truth[p["id"]]["objects"][sentence["object"]]
        if o and o["colour"] != o["stereotype"] and set(re.findall(r"\w+", p["answer"])) & set(COLOURS):
            stereotype.append(o["stereotype"] in re.findall(r"\w+", answer.lower()))
    mean = lambda values: sum(values) / len(values) if values else float("nan")
    return {"exact_match_truth": mean(right), "stereotype_rate": mean(stereotype), "exact_match_caption": mean(said)}


# ------------------------------------------------------------------- everything, in order


def stages(out, seed, small):
    """(name, what it writes, command) of every stage, in order; each command can be typed by hand."""
    score = ["score_dependency.py", "--model", f"{out}/base", "--limit", "100" if small else "1500"]
    mask = ["build_masks.py", "--seed", str(seed)]
    train = ["grpo_train.py", "--model", f"{out}/base", "--data", f"{out}/masks_train.jsonl", "--steps", "4" if small else "150",
             "--seed", str(seed), "--clip", f"{out}/clip", "--tokens-per-forward", "16384", "--log-every", "25",
             *REWARD]
    test = ["evaluate.py", "--batch-size", "64", "--data", f"{out}/masks_val.jsonl", "--clip", f"{out}/clip",
            *(["--limit", "40"] if small else [])]
    teach = ["toy_world.py", "--seed", str(seed), "--piece", "questions", "4" if small else "100"]
    ask = ["evaluate.py", "--batch-size", "64", "--data", f"{out}/val.tsv", "--limit", "8" if small else "150"]
    against = ["--compare", f"{out}/eval_base"]
    last = f"checkpoint-{4 if small else 150}"
    table = [
        ("score train", f"{out}/scores_train.jsonl", [*score, "--data", f"{out}/train.jsonl"]),
        ("score val", f"{out}/scores_val.jsonl", [*score, "--data", f"{out}/val.jsonl", "--ablation"]),
        ("mask train", f"{out}/masks_train.jsonl", [*mask, "--scores", f"{out}/scores_train.jsonl"]),
        ("mask val", f"{out}/masks_val.jsonl", [*mask, "--scores", f"{out}/scores_val.jsonl"]),
        ("train sft", f"{out}/sft", [*train, "--objective", "sft"]),
        ("train mmrpt", f"{out}/mmrpt", train),
        ("evaluate base", f"{out}/eval_base", [*test, "--model", f"{out}/base"]),
        ("evaluate sft", f"{out}/eval_sft", [*test, "--model", f"{out}/sft/{last}", *against]),
        ("evaluate mmrpt", f"{out}/eval_mmrpt", [*test, "--model", f"{out}/mmrpt/{last}", *against]),
        ("teach base", f"{out}/questions_base", [*teach, f"{out}/base"]),
        ("teach mmrpt", f"{out}/questions_mmrpt", [*teach, f"{out}/mmrpt/{last}"]),
        ("ask base", f"{out}/asked_base", [*ask, "--model", f"{out}/questions_base"]),
        ("ask mmrpt", f"{out}/asked_mmrpt", [*ask, "--model", f"{out}/questions_mmrpt", "--compare", f"{out}/asked_base"])]
    return [(name, written, [*command, "--out", written]) for name, written, command in table]


def records_of(path):
    return [row for _, row in read_jsonl(path, ())]


def measure(out):
    """The metrics of the docstring, from the files of the stages in `out`."""
    truth = {t["id"]: t for t in records_of(out / "truth.jsonl")}
    scores, masks = records_of(out / "scores_val.jsonl"), records_of(out / "masks_val.jsonl")
    results = {**dependency_metrics(scores, truth), **mask_metrics(masks, scores, truth), "rules": rule_metrics(scores, truth)}
    for name in ("base", "sft", "mmrpt"):
        rows = records_of(out / f"eval_{name}" / "predictions.jsonl")
        results[name] = {c: prediction_metrics([p for p in rows if p["condition"] == c], truth) for c in ("real", "blank")}
    for name in ("base", "mmrpt"):
        results[name]["questions"] = json.loads((out / f"asked_{name}" / "results.json").read_text())["real"]
    return results


# ------------------------------------------------------------------- the study: what makes the difference?
#
#     a world for every seed      all arms from one base, judged on one set of masks; masks of other kinds; probes of D_vis;
#                                 robustness after SFT
#     and for every other bias    base, SFT and the default

REWARD = ("--w-visual", "1.5", "--beta", "0.02")                # the KL keeps a tiny model from forgetting where to look
ARMS = {                       # name: (flags of build_masks.py, flags of grpo_train.py); the rest is that of mmrpt
    "sft": ((), ("--objective", "sft")),
    "mmrpt": ((), ()),                                          # span masks, semantic + visual relative to answers, grpo
    "random": (("--select", "random"), ()),
    "sentence": (("--granularity", "sentence"), ()),
    "exact": ((), ("--credit", "exact", "--w-visual", "0")),
    "prefix": ((), ("--credit", "prefix", "--w-visual", "0")),
    "words": ((), ("--w-visual", "0")),
    "visual": ((), ("--w-semantic", "0")),
    "relative_images": ((), ("--relative", "images")),
    "relative_none": ((), ("--relative", "none")),
    "dr_grpo": ((), ("--loss", "dr_grpo")),
    "dapo": ((), ("--loss", "dapo", "--clip-eps", "0.2", "0.28"))}
BIASES = (0.0, 0.8, 0.2)                                        # beside 0.5, that of the arms; the ends first, if time is short
KINDS = ("random", "sentence")                                  # of masks, beside the default spans
SIZES = {     # pictures to train on, held out; steps of base, CLIP; captions scored; updates, prompts of each; masks judged
    "full": (12000, 300, 850, 700, 1500, 50, 32, 400), "small": (120, 16, 6, 4, 16, 2, 2, 8)}
SECONDS = {"world": 11, "base": 343, "clip": 185, "score": 11, "mask": 6, "train": 100, "sft": 32, "evaluate": 18, "probe": 64,
           "robustness": 103}      # of one job, measured with two at a time, one core each: the first estimate of what remains
CORRUPTIONS = {                # strengths 1 to 5
    "noise": (12, 24, 40, 64, 96),                              # standard deviation, of 255
    "blur": (0.7, 1.4, 2.2, 3.2, 4.5),                          # radius in pixels
    "contrast": (0.3, 0.5, 0.7, 0.8, 0.9),                      # share of grey blended in
    "jpeg": (40, 20, 10, 5, 1),                                 # quality
    "occlusion": (12, 18, 24, 30, 36)}                          # side of a grey square in pixels


def corrupt(image, kind, strength, name):
    """`image` at `strength` 1 to 5 of `kind`; `name` decides noise and place, whatever the strength and the model."""
    value, rng = CORRUPTIONS[kind][strength - 1], np.random.default_rng(list(f"{kind} {name}".encode()))
    if kind == "noise":
        noisy = np.asarray(image) + value * rng.standard_normal((image.height, image.width, 3))
        return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(value))
    if kind == "contrast":
        return Image.blend(image, Image.new("RGB", image.size, (127, 127, 127)), value)
    if kind == "jpeg":
        image.save(file := io.BytesIO(), "JPEG", quality=value)
        return Image.open(file).convert("RGB")
    x, y = rng.integers(SIDE // 4, 3 * SIDE // 4, size=2).tolist()
    return paint_over(image, [(x - value // 2, y - value // 2)], value, (127, 127, 127))


def paint_over(image, corners, side, colour):
    """A copy of `image` with squares of `side` pixels, at these upper left corners, in one colour."""
    image = image.copy()
    for x, y in corners:
        ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill=colour)
    return image


def hide_patches(image, patches, side=16):
    """`image` with these patches, numbered by row as visual tokens are, in the grey of its background (a corner pixel)."""
    across = image.width // side
    return paint_over(image, [(p % across * side, p // across * side) for p in patches], side, image.getpixel((0, 0)))


def patches_of(objects, side=16):
    """The patches, numbered as in hide_patches(), of the quarters of the picture in which these objects lie."""
    across = SIDE // side
    return [p for p in range(across * across) if any(abs(p % across * side + side // 2 - x) < SIDE // 4 and
            abs(p // across * side + side // 2 - y) < SIDE // 4 for x, y in (PLACES[o["place"]] for o in objects))]


def misleading(mask, truth, caption):
    """The masked caption with a sentence that gives the mask's object its stereotype colour in place of one about another
    object (one more object than the picture shows would be a riddle of its own); None if that is true, or no colour is hidden."""
    here = sentence_at(truth, mask["start"], mask["end"])
    o = None if here["object"] is None else truth["objects"][here["object"]]
    others = [caption[s["start"]:s["end"]] for s in truth["sentences"] if s["object"] not in (None, here["object"])]
    if o and others and o["colour"] != o["stereotype"] and set(re.findall(r"\w+", mask["answer"])) & set(COLOURS):
        return mask["masked_caption"].replace(others[0], SEEN[0].format(**{**o, "colour": o["stereotype"]}))


class Probe:
    """A checkpoint, and the first `limit` held-out masks of a world with their pictures and truth."""

    def __init__(self, out, model, limit, device):
        self.out, self.device, self.checkpoint = out, device, str(out / model)
        self.model, self.processor = load_vlm(self.checkpoint, device)
        self.policy = Policy(self.model, self.processor, temperature=0)
        self.truth = {t["id"]: t for t in records_of(out / "truth.jsonl")}
        self.captions = records_of(out / "val.jsonl")
        self.masks = records_of(out / "masks_val.jsonl")[:limit]
        self.images = [load_image(out, m["image"], SIDE * SIDE) for m in self.masks]

    def metrics(self, masks, images, batch_size=64):
        """prediction_metrics() of the greedy completions of masks over PIL images."""
        made = []
        for i in range(0, len(masks), batch_size):
            rows = [encode_prompt(self.model, self.processor, chat_prompt(self.processor, FILL_PROMPT.format(
                masked_caption=m["masked_caption"])), [image], 24) for m, image in zip(masks[i:i + batch_size], images[i:])]
            made += generate(self.policy, self.processor, rows, 24)
        return prediction_metrics([{**m, "prediction": p} for m, p in zip(masks, made)], self.truth)

    def robustness(self):
        """{corruption: {strength, or mean: metrics}}; text: of the masks that a false sentence fits, without and with it."""
        found = {"none": {"0": self.metrics(self.masks, self.images)}}
        for kind in CORRUPTIONS:
            found[kind] = {str(s): self.metrics(self.masks, [corrupt(i, kind, s, m["image"]) for m, i in zip(
                self.masks, self.images)]) for s in range(1, 6)}
            found[kind]["mean"] = {k: statistics.mean(m[k] for m in found[kind].values()) for k in found["none"]["0"]}
        captions = {c["id"]: c["caption"] for c in self.captions}
        told = [(m, i, lie) for m, i in zip(self.masks, self.images)
                if (lie := misleading(m, self.truth[m["id"]], captions[m["id"]]))]
        found["text"] = {str(n): self.metrics(masks, [i for _, i, _ in told]) for n, masks in enumerate((
            [m for m, _, _ in told], [{**m, "masked_caption": lie} for m, _, lie in told]))}
        return found

    def layers(self):
        """{decoder layer: how well D_vis of that layer alone finds what needs the picture}."""
        found = {}
        for layer in range(len(self.model.get_decoder().layers)):
            scorer, scores = Scorer(*load_vlm(self.checkpoint, self.device), [layer]), []
            for i in range(0, len(self.captions), 16):
                rows = self.captions[i:i + 16]
                shares = scorer([scorer.prepare(load_image(self.out, r["image"], SIDE * SIDE), r["caption"]) for r in rows])
                scores += [score_record(r, *s) for r, s in zip(rows, shares)]
            found[str(layer)] = dependency_metrics(scores, self.truth)
        return found

    def patches(self, seed):
        """{patches hidden: {which: metrics}}: those that the mask's sentence attends to most or least, any, or any of the
        quarters with other objects (objects: random patches often hide only background)."""
        rng, scorer, orders, others = random.Random(seed), Scorer(*load_vlm(self.checkpoint, self.device)), [], []
        captions = {c["id"]: c["caption"] for c in self.captions}
        for m, image in zip(self.masks, self.images):
            sentence = sentence_at(self.truth[m["id"]], m["start"], m["end"])
            _, _, offsets, cells = scorer([scorer.prepare(image, captions[m["id"]])], maps=True)[0]
            shares = cells[tokens_of((sentence["start"], sentence["end"]), offsets)].mean(0)          # (V,)
            orders.append(shares.argsort(descending=True).tolist())
            objects = self.truth[m["id"]]["objects"]
            others.append(patches_of([o for i, o in enumerate(objects) if i != sentence["object"]]))
        found = {"0": {"none": self.metrics(self.masks, self.images)}}
        for k in (1, 2, 4):
            chosen = {"attended": [o[:k] for o in orders], "random": [rng.sample(o, k) for o in orders],
                      "least": [o[-k:] for o in orders], "objects": [rng.sample(o, k) for o in others]}
            found[str(k)] = {name: self.metrics(self.masks, [hide_patches(*pair) for pair in zip(self.images, patches)])
                             for name, patches in chosen.items()}
        return found


def run_piece(out, bias, seed, device, name, *rest):
    """A piece that no stage does: world TRAIN VAL (pictures), base STEPS, clip STEPS, probe or robustness FILE MODEL LIMIT."""
    if name == "questions":                                    # STEPS CHECKPOINT, OUT: the new checkpoint, beside the world's
        return print(f"reused {out}") if out.exists() else teach_questions(out, rest[1], int(rest[0]), 32, 1e-3, seed, device)
    out.mkdir(parents=True, exist_ok=True)
    if name == "world":
        return make_world(out, *map(int, rest), bias, seed)
    if name in ("base", "clip"):
        if not (out / name).exists():                           # of clip the kill may have come after it, see below
            train = records_of(out / "train.jsonl")
            images = [load_image(out, r["image"], SIDE * SIDE) for r in train]
            build, batch_size = (train_base, 32) if name == "base" else (train_clip, 128)
            build(out / name, train, images, int(rest[0]), batch_size, 2e-3, seed, device)
        return write_atomically(out / "teacher.json", [json.dumps(clip_metrics(out))]) if name == "clip" else None
    probe = Probe(out, rest[1], int(rest[2]), device)
    found = probe.robustness() if name == "robustness" else {"layers": probe.layers(), "patches": probe.patches(seed)}
    write_atomically(out / rest[0], [json.dumps(found)])


def world_jobs(w, seed, bias, size, arms, full):
    """(name, names it needs, path it writes, command) of every job in the world `w`, in an order in which they can be run."""
    n_train, n_val, base_steps, clip_steps, scored, updates, prompts, judged = SIZES[size]
    last, jobs, world = f"checkpoint-{updates}", {}, Path(w).name

    def job(name, needs, written, *command):
        jobs.setdefault(name, (f"{world} {name}", [f"{world} {n}" for n in needs], f"{w}/{written}", [str(c) for c in command]))

    def piece(name, needs, written, *arguments):
        job(name, needs, written, "toy_world.py", "--piece", *arguments, "--bias", bias, "--seed", seed, "--out", w)

    def mask(kind, split, *flags):
        job(f"mask {kind}", [f"score {split}"], f"masks_{kind}.jsonl", "build_masks.py", "--seed", seed, "--scores",
            f"{w}/scores_{split}.jsonl", *flags, "--out", f"{w}/masks_{kind}.jsonl")

    def train(name, model, kind, *needs, flags=()):
        job(f"train {name}", ["clip", f"mask {kind}", *needs], f"{name}/{last}", "grpo_train.py", "--model", f"{w}/{model}",
            "--data", f"{w}/masks_{kind}.jsonl", "--steps", updates, "--seed", seed, "--clip", f"{w}/clip",
            "--prompts-per-step", prompts, "--tokens-per-forward", 16384, "--keep", 1, *REWARD, *flags,
            "--out", f"{w}/{name}")

    def judge(name, model, *needs, on="val"):
        made = f"eval_{name}" + f"_{on}" * (on != "val")
        job(f"evaluate {made[5:]}", ["clip", f"mask {on}", *needs], f"{made}/results.json", "evaluate.py", "--model",
            f"{w}/{model}", "--data", f"{w}/masks_{on}.jsonl", "--clip", f"{w}/clip", "--batch-size", 64, "--limit", judged,
            "--out", f"{w}/{made}")

    piece("world", [], "truth.jsonl", "world", n_train, n_val)
    piece("base", ["world"], "base", "base", base_steps)
    piece("clip", ["world"], "teacher.json", "clip", clip_steps)                # clip/, and then what it knows
    for split, flags in (("val", ["--ablation"]), ("train", ["--limit", scored])):
        job(f"score {split}", ["base"], f"scores_{split}.jsonl", "score_dependency.py", "--model", f"{w}/base", "--data",
            f"{w}/{split}.jsonl", *flags, "--out", f"{w}/scores_{split}.jsonl")
    mask("val", "val")                                                          # the default masks: they judge every arm
    judge("base", "base")
    for arm in arms:
        kind = ARMS[arm][0][-1] if ARMS[arm][0] else "train"
        mask(kind, "train", *ARMS[arm][0])
        train(arm, "base", kind, flags=ARMS[arm][1])
        judge(arm, f"{arm}/{last}", f"train {arm}")
    for kind in KINDS if full else ():                                          # every policy on every kind of masks
        mask(f"val_{kind}", "val", *ARMS[kind][0])
        for name, model, needs in (("base", "base", "base"), *((n, f"{n}/{last}", f"train {n}") for n in ("mmrpt", *KINDS))):
            judge(name, model, needs, on=f"val_{kind}")
    for name, model, needs in (("base", "base", "base"), ("mmrpt", f"mmrpt/{last}", "train mmrpt")) if full else ():
        piece(f"probe {name}", ["mask val", needs], f"probe_{name}.json", "probe", f"probe_{name}.json", model, judged)
    for name in ("sft", "mmrpt") if full else ():                               # the same SFT on top; sft_sft: as many updates
        train(f"{name}_sft", f"{name}/{last}", "train", f"train {name}", flags=ARMS["sft"][1])
    for name in ("sft", "mmrpt_sft", "sft_sft") if full else ():
        piece(f"robustness {name}", ["mask val", f"train {name}"], f"robustness_{name}.json", "robustness",
              f"robustness_{name}.json", f"{name}/{last}", judged)
    return list(jobs.values())


def study_jobs(out, seeds, small):
    """world_jobs() of the whole study: every arm in the world of each seed, then the default with other biases."""
    size, biases = ("small", BIASES[:1]) if small else ("full", BIASES)
    worlds = [(f"{out}/seed{seed}", seed, 0.5, size, ARMS, True) for seed in seeds]
    worlds += [(f"{out}/bias{bias}-seed{seed}", seed, bias, size, ("sft", "mmrpt"), False) for bias in biases for seed in seeds]
    return [job for world in worlds for job in world_jobs(*world)]


def cost(job):
    """Roughly the seconds that one job of study_jobs() takes on one core."""
    _, kind, *rest = job[0].split()
    return SECONDS["sft" if kind == "train" and "sft" in rest[0] else kind]


def run_jobs(jobs, folder, workers=2):
    """Runs jobs (name, needs, written, command), `workers` at a time, each as soon as what it needs is there.

    folder/jobs.json remembers {name: {command, seconds}}: a job that it names, and whose result is there, is not run again.
    Returns {name: why} of the jobs that failed, or need one that did; all others are run.
    """
    here, log, failed, running = Path(__file__).parent, folder / "jobs.json", {}, {}
    known = json.loads(log.read_text()) if log.exists() else {}
    done = {name: known[name] for name, _, written, command in jobs
            if known.get(name, {}).get("command") == command and Path(written).exists()}
    waiting, began, spent = [j for j in jobs if j[0] not in done], time.time(), 0
    total = sum(map(cost, waiting))
    print(f"{len(done)} of {len(jobs)} jobs are done; the others take about {total / workers / 60:.0f} minutes", flush=True)
    (folder / "logs").mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def run(name, needs, written, command):
        start = time.time()
        with writing(folder / "logs" / f"{name.replace(' ', '-')}.txt") as said:
            code = subprocess.run([sys.executable, str(here / command[0]), *command[1:]], stdout=said, stderr=subprocess.STDOUT,
                                  env=environment, preexec_fn=die_with_parent).returncode
        if code or not Path(written).exists():
            raise RuntimeError(f"exit status {code}, see {said.name}")
        return {"command": command, "seconds": round(time.time() - start, 1)}

    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for job in list(waiting):
                missing = [n for n in job[1] if n in failed]
                if missing:
                    failed[job[0]] = f"needs {missing[0]}"
                elif len(running) < workers and all(n in done for n in job[1]):
                    running[pool.submit(run, *job)] = job
                else:
                    continue
                waiting.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                job = running.pop(future)
                spent += cost(job)
                try:
                    done[job[0]] = future.result()
                    write_atomically(log, [json.dumps(done, indent=1)])
                    said = f"{done[job[0]]['seconds']:7.1f} s"
                except (RuntimeError, OSError) as e:
                    failed[job[0]] = str(e)
                    said = f"FAILED: {e}"
                left = (time.time() - began) * (total - spent) / spent / 60
                print(f"[{len(done) + len(failed):3d}/{len(jobs)}] {job[0]:28s} {said}, {left:.0f} min remain", flush=True)
    return failed


def die_with_parent():
    """In a child: no job writes on when the study was killed; the next call starts it again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG


def spread(values):
    """{values, mean, std} of one figure: values by seed, None where there is none; std: of a sample, None below two."""
    values = [None if v is None or v != v else v for v in values]
    there = [v for v in values if v is not None]
    return {"values": values, "mean": statistics.mean(there) if there else None,
            "std": statistics.stdev(there) if len(there) > 1 else None}


def aggregate(results):
    """Nested dicts of figures, one a seed, to one of spread()s; a dict, or a part of one, is missing where a job failed."""
    results = [{} if r is None else r for r in results]
    keys = dict.fromkeys(k for r in results if isinstance(r, dict) for k in r)
    if not keys:
        return spread([None if r == {} else r for r in results])
    return {k: aggregate([r.get(k) for r in results]) for k in keys}


def world_results(w):
    """What the files of one world of the study say: {arms, masks, dependency, rules, probe, robustness}; no file, no figure."""
    found = collections.defaultdict(dict)
    truth = {t["id"]: t for t in records_of(w / "truth.jsonl")} if (w / "truth.jsonl").exists() else {}

    def judged(folder):
        """{name: metrics} of the file of predictions in a folder of `w`, or {}."""
        if not (w / folder / "predictions.jsonl").exists():
            return {}
        rows = records_of(w / folder / "predictions.jsonl")
        real, other = (prediction_metrics([p for p in rows if p["condition"] == c], truth) for c in ("real", "shuffled"))
        return {**real, **{f"reliance_{k}": real[k] - other[k] for k in real}}

    for name in ("base", *ARMS):
        if metrics := judged(f"eval_{name}"):
            found["arms"][name] = metrics
    if (w / "teacher.json").exists():
        found["arms"]["clip"] = json.loads((w / "teacher.json").read_text())
    for name in ("base", "mmrpt", *KINDS):
        if metrics := {kind: m for kind in KINDS if (m := judged(f"eval_{name}_val_{kind}"))}:
            found["masks"][name] = {"span": judged(f"eval_{name}"), **metrics}
    if (w / "masks_val.jsonl").exists():
        scores = records_of(w / "scores_val.jsonl")
        found["dependency"], found["rules"] = dependency_metrics(scores, truth), rule_metrics(scores, truth)
    for path in sorted([*w.glob("probe_*.json"), *w.glob("robustness_*.json")]):
        kind, _, name = path.stem.partition("_")
        found[kind][name] = json.loads(path.read_text())
    return dict(found)


def study(out, seeds, small):
    """Runs what is missing of the study, and writes OUT/study.json from what is there, whatever failed."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seeds": list(seeds), "small": small, "sizes": {k: list(v) for k, v in SIZES.items()}}
    if not same_run(out / "run.json", settings):
        write_atomically(out / "run.json", [json.dumps({"settings": settings})])
    failed = run_jobs(study_jobs(out, seeds, small), out)
    results = aggregate([world_results(out / f"seed{s}") for s in seeds])
    arms = {b: aggregate([world_results(out / f"bias{b}-seed{s}").get("arms") for s in seeds]) for b in BIASES}
    arms[0.5] = results.get("arms", {})
    results["bias"] = {str(b): {k: arms[b][k] for k in ("base", "sft", "mmrpt", "clip") if k in arms[b]} for b in sorted(arms)}
    jobs = json.loads((out / "jobs.json").read_text()) if (out / "jobs.json").exists() else {}
    write_atomically(out / "study.json", [json.dumps({
        "settings": settings, "flags": ARMS, **results, "failed": failed, "jobs": jobs}, indent=1)])
    write_results_page(out / "study.html", "The claims, tested in the toy world", study_page(out, results))
    print_figures(results)
    print("".join(f"FAILED {name}: {why}\n" for name, why in failed.items()))
    print(f"look at: {out}/study.html, {out}/study.json, {out}/logs/")
    if failed:
        fail(f"{len(failed)} jobs of the study failed, or need one that did; the same command tries them again")


def turned(part):
    """{a: {b: x}} as {b: {a: x}}."""
    return {b: {a: row[b] for a, row in part.items() if b in row} for b in dict.fromkeys(b for row in part.values() for b in row)}


def study_page(out, results):
    """Yields study.json as tables and charts, then curves and examples of the first seed."""
    def ends(figure):
        """(mean - std, mean, mean + std), or nothing"""
        there, std = figure and figure["mean"] is not None, figure and figure["std"] or 0
        return (figure["mean"] - std, figure["mean"], figure["mean"] + std) if there else ""

    def tabled(title, note, part, metrics, label=lambda name: name):
        rows = [[label(name), *(ends(row.get(m)) for m in metrics)] for name, row in part.items()]
        return f"<h2>{title}</h2><p>{note}</p>" + table(["", *(m.replace("_", " ") for m in metrics)], rows, 3)

    def drawn(title, lines, metric):
        """lines: {name: {x: {metric: figure}}}"""
        there = {name: {float(x): e for x, row in line.items() if (e := ends(row.get(metric)))} for name, line in lines.items()}
        return chart(title, {name: [(x, mean, low, high) for x, (low, mean, high) in line.items()] for name, line in there.items()})

    def charts(title, note, figures):
        return f"<h2>{title}</h2><p>{note}</p><div class=charts>{''.join(figures)}</div>"

    bracket, truth, lies = "In brackets, and as a line: one standard deviation over the seeds to both sides.", *SHOWN[:2]
    yield tabled("What makes the difference?", "Same base, updates, pictures and judge. mmrpt: the defaults (spans, both parts, "
                 f"--relative answers, grpo); every other arm changes what its flags say. {bracket}",
                 results.get("arms", {}), SHOWN[:3], lambda name: " ".join((name, *sum(ARMS.get(name, ()), ()))))
    kinds = {name: {f"{kind}: {m}": row.get(m) for kind, row in rows.items() for m in SHOWN[:2]}
             for name, rows in results.get("masks", {}).items()}
    yield tabled("Which masks?", "Policies trained on default spans (mmrpt), random spans and whole sentences, each judged on "
                 "all of them. A whole sentence can be put in four ways, so that exact matches are few.", kinds,
                 list(dict.fromkeys(m for row in kinds.values() for m in row)))
    yield charts("And the descriptive bias?", "By the share of objects that captions give the stereotype colour; clip: the "
                 "teacher's choice among the colours of objects that have another.",
                 [drawn(m.replace("_", " "), turned(results.get("bias", {})), m) for m in (truth, lies)])
    yield tabled("Does D<sub>vis</sub> find what needs the picture?", "AUROC over sentences; rank correlation with the ablation.",
                 {name.replace("_", " "): {"default layers": f} for name, f in results.get("dependency", {}).items()},
                 ["default layers"])
    probe = results.get("probe", {})
    yield charts("In which layers?", "D<sub>vis</sub> of one decoder layer alone, counted from 0.", [
        drawn(m.replace("_", " "), {name: p.get("layers", {}) for name, p in probe.items()}, m)
        for m in ("dependency_auroc", "dependency_auroc_less_place", "dependency_less_place_vs_ablation_rank_correlation")])
    yield tabled("Which threshold?", "What the masks of each rule of build_masks.py hit.", results.get("rules", {}),
                 ("mask_precision", "mask_recall", "f1", "word_precision", "word_recall"))
    every = lambda patches: {which: {"0": patches.get("0", {}).get("none", {}), **line} for which, line in turned(
        {k: v for k, v in patches.items() if k != "0"}).items()}
    yield charts("Is it causal?", "Exact match with the truth by the number of patches, of 16, that are painted over: those that "
                 "the sentence of the mask attends to most or least, any, or any of other objects.",
                 [drawn(name, every(p.get("patches", {})), truth) for name, p in probe.items()])
    tests = results.get("robustness", {})
    yield charts("More robust after supervised fine-tuning?", "Exact match with the truth by strength; sft and sft_sft: without "
                 "MMRPT, with as many updates of SFT, and of both stages; mmrpt_sft: MMRPT, then SFT. Text: without and with a "
                 "false sentence about the hidden object in place of one about another.",
                 [drawn(kind, {name: {**(t.get("none", {}) if kind != "text" else {}), **{
                     s: v for s, v in t.get(kind, {}).items() if s != "mean"}} for name, t in tests.items()}, truth)
                  for kind in (*CORRUPTIONS, "text")])
    first = next((w for w in sorted(out.glob("seed*")) if (w / "eval_mmrpt" / "results.json").exists()), None)
    if first:
        yield charts(f"Training: mmrpt, {first.name}", "Faint: every update; bold: the mean over the last few.",
                     [curves(first / "mmrpt" / "metrics.jsonl")])
        masks = {mask_index(m): m for m in records_of(first / "masks_val.jsonl")}
        yield examples(predictions_of(first / "eval_mmrpt")[0], predictions_of(first / "eval_base")[0], lambda i: (
            [load_image(first, masks[i]["image"], SIDE * SIDE)], masks[i]["sentence"]))


SHOWN = ("exact_match_truth", "stereotype_rate", "reliance_exact_match_truth", "dependency_auroc",
         "dependency_auroc_less_place", "ablation_auroc", "mask_precision", "mask_recall")


def print_figures(results, path=()):
    """A line for each dict of figures, mean and standard deviation; a heading where the first key changes."""
    figures = {k: v for k, v in results.items() if k in SHOWN and v["mean"] is not None}
    if figures and (path[-1] == "mean" or not set(path) & set(CORRUPTIONS)):               # study.json has every strength
        print(f"{' '.join(path):36s}" + "".join(f"  {k} {figures[k]['mean']:.3f} ±{figures[k]['std'] or 0:.3f}" for k in SHOWN
                                                if k in figures))
    for key, part in results.items():
        if isinstance(part, dict) and "values" not in part:
            print() if not path else None
            print_figures(part, (*path, key))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", help="folder of everything (runs/toy, where every stage looks; of --study: runs/study)")
    add("--bias", type=float, default=0.5, help="P(a caption gives the stereotype colour) (%(default)s: imitation cannot tell)")
    add("--seed", type=int, default=0, help="of world, models and training (%(default)s)")
    add("--small", action="store_true", help="everything at a reduced size: whether it runs, not how well")
    add("--study", action="store_true", help="every claim tested: two hours on two cores, goes on after a kill")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --study (%(default)s; with --small the first)")
    add("--piece", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out or ("runs/study" if args.study else "runs/toy")
    out, here, seconds = Path(args.out), Path(__file__).parent, {}
    if args.study:
        return study(out, args.seeds[:1] if args.small else args.seeds, args.small)
    n_train, n_val, base_steps, clip_steps = (300, 40, 60, 20) if args.small else (12000, 300, 850, 700)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.piece:
        return run_piece(out, args.bias, args.seed, device, *args.piece)

    settings = {"bias": args.bias, "seed": args.seed, "small": args.small}
    out.mkdir(parents=True, exist_ok=True)
    if not same_run(out / "world.json", settings):
        write_atomically(out / "world.json", [json.dumps({"settings": settings})])
    old = json.loads((out / "results.json").read_text())["seconds"] if (out / "results.json").exists() else {}

    def timed(name, written, build):
        """Runs build() unless `written` is there already; its seconds, or those of the run that built it, are kept."""
        if Path(written).exists() and name in old:
            seconds[name] = old[name]
        began = time.time()
        build()
        seconds.setdefault(name, round(time.time() - began, 1))

    def once(name, written, build):
        timed(name, written, lambda: print(f"reused {written}") if written.exists() else build())

    once("world", out / "truth.jsonl", lambda: make_world(out, n_train, n_val, args.bias, args.seed))
    once("benchmark", out / "val.tsv", lambda: write_benchmark(out))
    train = records_of(out / "train.jsonl")
    images = [] if (out / "base").exists() and (out / "clip").exists() else [
        load_image(out, r["image"], SIDE * SIDE) for r in tqdm(train, desc="reading pictures", leave=False)]
    once("base", out / "base", lambda: train_base(out / "base", train, images, base_steps, 32, 2e-3, args.seed, device))
    once("clip", out / "clip", lambda: train_clip(out / "clip", train, images, clip_steps, 128, 2e-3, args.seed, device))
    for name, written, command in stages(args.out, args.seed, args.small):
        print("\n$ python", *command, flush=True)
        command = [sys.executable, str(here / command[0]), *command[1:]]
        timed(name, written, lambda: subprocess.run(command, check=True))

    results = {**settings, **measure(out), "seconds": seconds}
    write_atomically(out / "results.json", [json.dumps(results, indent=1)])
    print("\n" + "\n".join(f"{k:42s}{v:8.3f}" for k, v in results.items() if isinstance(v, float) and k != "bias"))
    print(f"\n{'':26s}" + "".join(f"{name:>10s}" for name in ("base", "SFT", "MMRPT")))
    for condition in ("real", "blank"):
        for metric, better in (("exact_match_truth", "+"), ("stereotype_rate", "-"), ("exact_match_caption", " ")):
            values = [results[name][condition][metric] for name in ("base", "sft", "mmrpt")]
            print(f"{metric:20s} {condition:5s}" + "".join(f"{v:10.3f}" for v in values) + f"  {better}")
    for metric in ("accuracy", "circular"):
        values = [results[name]["questions"][metric]["value"] / 100 for name in ("base", "mmrpt")]
        print(f"val.tsv, {metric:17s}{values[0]:10.3f}{'':10s}{values[1]:10.3f}  +")
    print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    print(f"look at: {out}/results.json, {out}/mmrpt/samples.txt, {out}/mmrpt/metrics.jsonl, "
          f"{out}/scores_val.jsonl.html, {out}/eval_mmrpt/results.html, {out}/asked_mmrpt/results.html")


if __name__ == "__main__":
    cli(main)
