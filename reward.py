"""Stage 3: the semantic-visual reward.

A completion <think>...</think><answer>a</answer> fills [MASK] in the sentence s of picture I, whose caption says y.
[review]: known from a published summary of the paper only; [ours]: nothing is published.

    gate        1 if the completion has that form and a is not empty; otherwise every part below is 0          [ours]
    semantic    1 if a = y after normalisation, else the credit of the chosen kind                             [review]
                    exact    nothing
                    prefix   1 if a is a prefix of y that ends on a token boundary of y (RPT 2506.08007, eq. 3)
                    graded   the same, times the matched share of y's length
                    words    order-aware F1 of the words: 2 LCS(a, y) / (|a| + |y|)                             [ours]
    visual      does the sentence, filled with a, fit the picture better than ... ?                            [ours]
                    images   other pictures:           sigma( S(I, s[a]) - log mean_J exp S(J, s[a]) )
                    answers  the group's answers: exp S(I, s[a]) / sum over its distinct b of exp S(I, s[b])
                    none     S itself, the cosine

Why the visual part is relative. S is CLIP's logit. Contrastive training ends at S(I, t) = log p(t | I) / p(t) up to a
constant of the picture, so what captions usually say, p(t), is divided out: a caption prior cannot earn it. Estimating
p(t) as the mean over other pictures also takes away what CLIP itself likes in a text, so generic or wordy text, which
fits every picture, gets sigma(0) = 1/2 and no more. Against the group's answers, as p(t | I) / p(t) = p(I | t) / p(I), it is
Bayes' rule with all answers equally likely beforehand, a contest that only one can win; it was the better teacher in the toy
world, and is the default in training.

Why the parts are normalised before they are added. Within the G completions of a prompt, each part k becomes

    A = sum_k w_k (r_k - mean r_k) / (std r_k + eps)                                                           (2)

Adding first and normalising after lets the part with the larger spread decide. Here semantic anchors what CLIP knows
badly, visual undoes what captions prefer, and the weights mean what they say. A part that is equal for the whole
group drops out.

Guards: saying less is never wrong about a picture, and an idle word costs nothing, so the visual part is multiplied by a
length factor (without it the toy policy learned to leave out what it was unsure of; with BLEU's one-sided penalty, to
write "a" before everything). CLIP reads the sentence, not the caption, and texts longer than its context are counted.

    python reward.py                                          # scores the toy world's predictions
    python reward.py --predictions eval/predictions.jsonl --clip ViT-B-32 --clip-weights laion2b_s34b_b79k

in:   JSONL {image, sentence, answer, prediction} (evaluate.py writes it); prediction is the whole completion
out:  the same records with their parts: {..., format, semantic, visual}
"""
import argparse
import math
import re
import unicodedata
from pathlib import Path

import open_clip
import torch

from build_masks import MASK, TAG
from score_dependency import (BadRecord, amount, cli, distributed, fail, fail_if_empty, fingerprint, image_root, load_image,
                              map_jsonl, positive, read_jsonl, split_words)

FILL_PROMPT = ("{masked_caption}\n\nThis caption of the image hides a part behind " + MASK + ". Look at the image and "
               "write the part as <think>reasoning</think><answer>hidden text</answer>.")
COMPLETION = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


# ------------------------------------------------------------------- format: the gate


def target_completion(record):
    """What imitation (SFT) learns to write for a mask record. Captions hold no reasoning, so the thought is only the
    sentence read up to the mask: 'In the middle is a [MASK].' gives <think>In the middle is a</think><answer>..."""
    return f"<think>{record['sentence'].partition(MASK)[0].strip()}</think><answer>{record['answer']}</answer>"


def parse_completion(text):
    """The answer in <think>...</think><answer>...</answer>, stripped; None if the form is broken or it is empty.

    '<think>a disc</think><answer> red circle </answer>' gives 'red circle'; a tag too many, or text outside, None.
    """
    match = COMPLETION.fullmatch(text)
    if not match or any(TAG.search(part) for part in match.groups()):
        return None
    return match[2].strip() if normalise(match[2]) else None


# ------------------------------------------------------------------- semantic: answer against caption


def normalise(text):
    """Unicode-compatible form, lower case, single spaces, no punctuation at either end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?…。，！？\"'“”‘’()[]")


def exact_match(answer, target):
    return float(normalise(answer) == normalise(target) != "")


def prefix_credit(answer, target, boundaries, graded=False):
    """1 (graded: |answer| / |target|) if `answer` is a prefix of `target` that ends on one of its token boundaries.

    boundaries: the character offsets at which tokens of `target` end. Case does not count; an empty answer, a prefix of
    everything, earns 0. 'large red' of 'large red circle' with boundaries (5, 9, 16) gives 1, graded 9/16; 'large r' 0.
    """
    if not answer or len(answer) not in boundaries or target[:len(answer)].casefold() != answer.casefold():
        return 0.0
    return len(answer) / len(target) if graded else 1.0


def word_credit(answer, target):
    """Order-aware F1 of words: 2 LCS / (|answer| + |target|). 'large blue circle' for 'large red circle' gives 2/3."""
    a, t = normalise(answer).split(), normalise(target).split()
    row = [0] * (len(t) + 1)                                      # longest common subsequence, one row of its table
    for word in a[:4 * len(t) + 8]:                               # a longer answer has no F1 to speak of
        previous = 0
        for j, other in enumerate(t, 1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(t)) if a and t else 0.0


def semantic_credit(answer, target, kind, tokenizer=None):
    """The semantic part in [0, 1]: 1 for an exact match, else the credit of `kind`; tokenizer: for prefix and graded."""
    if exact_match(answer, target):
        return 1.0
    if kind == "words":
        return min(word_credit(answer, target), 0.99)             # the same words are still not the same answer
    if kind in ("prefix", "graded"):
        offsets = tokenizer(target, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return prefix_credit(answer, target, {end for _, end in offsets}, kind == "graded")
    return 0.0


def length_factor(answer, target):
    """What the length of an answer leaves of its visual credit: BLEU's brevity penalty, both ways; 0 far beyond the target.

    Saying less is never wrong about a picture, and an idle word costs nothing, so a words for y keep exp(1 - max / min):
    'large red' for 'large red circle' exp(-1/2) = 0.61, 'a large red circle' exp(-1/3) = 0.72; more than 2 y + 2 nothing.
    Words are those of score_dependency.py, which counts CJK characters, as they have no spaces.
    """
    a, y = len(split_words(answer)), len(split_words(target))
    return math.exp(1 - max(a, y) / min(a, y)) if 0 < a <= 2 * y + 2 and y else 0.0


# ------------------------------------------------------------------- visual: filled sentence against picture


def against_images(own, others):
    """sigma(own - log mean exp others): own (...), others (..., J) in nats; 1/2 for text that fits any picture.

    -inf in others: the picture itself, which does not take part.
    """
    count = (others > float("-inf")).sum(-1)
    return torch.sigmoid(own - (others.logsumexp(-1) - count.log()))


def against_answers(scores, texts):
    """softmax of `scores` (G,), in nats, over the distinct `texts` (G), each counted once: for an ideal CLIP
    p(image | text) / sum of p(image | other), the probability of each text if all of them were equally likely beforehand.

    A text of None does not take part and gets 0.
    """
    first = {t: i for i, t in enumerate(texts) if t is not None}
    if not first:
        return torch.zeros_like(scores)
    taking_part = torch.tensor([t is not None for t in texts], device=scores.device)
    return (scores - scores[list(first.values())].logsumexp(0)).exp() * taking_part


class ClipScorer:
    """open_clip's S(I, t): logit scale times cosine, in nats. `name`: a model open_clip knows, or a folder with
    open_clip_config.json and weights. `others`: PIL images to compare with, the J of against_images."""

    def __init__(self, name, weights=None, others=(), device="cpu"):
        name = f"local-dir:{name}" if Path(name).is_dir() else name
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(name, weights, device=device,
                                                                                          require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as e:            # open_clip raises RuntimeError, KeyError, OSError and plain Exception for this
            fail(f"--clip {name} {weights or ''} cannot be loaded: {str(e).strip().splitlines()[0].partition(' Available:')[0]}")
        self.model, self.device, self.cut = model.eval(), device, 0
        self.pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0   # SimpleTokenizer pads with 0
        self.others = self.image_features(others) if len(others) else None

    @torch.no_grad()
    def image_features(self, images):
        pixels = torch.stack([self.preprocess(i) for i in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True).float()                                     # (N, D)

    @torch.no_grad()
    def text_features(self, texts):
        tokens = self.tokenizer(texts).to(self.device)
        self.cut += int((tokens != self.pad).all(-1).sum())                # no padding left: the end was cut, or just fits
        return self.model.encode_text(tokens, normalize=True).float()                                      # (N, D)

    @torch.no_grad()                     # else the advantage would carry a graph into CLIP's logit scale
    def __call__(self, images, texts, relative):
        """The visual part (B, G) of texts[b][g] for images[b], in [0, 1]; relative: images, answers or none. None earns 0."""
        index = {t: i for i, t in enumerate(dict.fromkeys(t for group in texts for t in group if t is not None))}
        if not index:
            return torch.zeros(len(texts), len(texts[0]))
        rows = torch.tensor([[index.get(t, 0) for t in group] for group in texts], device=self.device)
        text = self.text_features(list(index))[rows]                                                       # (B, G, D)
        own = self.image_features(images)                                                                  # (B, D)
        cosine = torch.einsum("bd,bgd->bg", own, text)
        scale = self.model.logit_scale.exp()
        if relative == "answers":
            return torch.stack([against_answers(s, t) for s, t in zip(scale * cosine, texts)]).cpu()
        if relative == "none":
            visual = cosine.clamp(0, 1)
        else:                            # a picture is not compared with itself, whatever name its copies have
            itself = (own @ self.others.T > 1 - 1e-5)[:, None]                                             # (B, 1, J)
            visual = against_images(scale * cosine, (scale * text @ self.others.T).masked_fill(itself, float("-inf")))
        return visual.cpu() * torch.tensor([[t is not None for t in group] for group in texts])


# ------------------------------------------------------------------- the reward


class Reward:
    """The parts of the reward. A part of weight 0 loads nothing. tokenizer: the policy's, for token boundaries."""

    def __init__(self, weights, credit="words", relative="images", tokenizer=None, clip=None):
        self.weights = {k: w for k, w in weights.items() if w}
        self.names = ("format", *self.weights)
        self.credit, self.relative, self.tokenizer, self.clip = credit, relative, tokenizer, clip

    def __call__(self, records, images, completions):
        """Parts of completions[b][g] for records[b] {sentence, answer} and PIL images[b]: {name: (B, G) in [0, 1]}."""
        answers = [[parse_completion(c) for c in group] for group in completions]
        parts = {"format": torch.tensor([[float(a is not None) for a in group] for group in answers])}
        if "semantic" in self.weights:
            parts["semantic"] = torch.tensor([[semantic_credit(a, r["answer"], self.credit, self.tokenizer) if a else 0.0
                                               for a in group] for r, group in zip(records, answers)])
        if "visual" in self.weights:
            factor = torch.tensor([[length_factor(a or "", r["answer"]) for a in group] for r, group in zip(records, answers)])
            texts = [[r["sentence"].replace(MASK, a) if a else None for a in group] for r, group in zip(records, answers)]
            parts["visual"] = self.clip(images, texts, self.relative) * factor
        return parts


def advantages(parts, weights, scale=True, eps=0.1):
    """Equation (2): {part: (B, G)} -> (B, G); scale=False leaves out the division by std (Dr. GRPO, 2503.20783).

    Rewards (1, 0, 0, 1) have mean 1/2 and (unbiased) std 0.577, hence advantages +-0.5 / 0.677. GRPO's eps is 1e-4; here it
    is 0.1, so that CLIP's tiny difference between two right answers is not blown up to the size of right and wrong.
    """
    total = 0
    for name, weight in weights.items():
        part = parts[name].double()                         # in fp32 the mean of equal values is off by an ulp, 1e-3 of eps
        centred = part - part.mean(-1, keepdim=True)
        total = total + weight * (centred / (part.std(-1, keepdim=True) + eps) if scale else centred)
    return total.float()


def add_arguments(parser, w_semantic=1.0, w_visual=1.0, relative="answers"):
    """The reward's flags, the same for every script that uses it."""
    group = parser.add_argument_group("reward")
    group.add_argument("--w-semantic", type=amount, default=w_semantic, help="weight of the semantic part (%(default)s)")
    group.add_argument("--w-visual", type=amount, default=w_visual, help="weight of the visual part; 0: no CLIP (%(default)s)")
    group.add_argument("--credit", default="words", choices=("exact", "prefix", "graded", "words"),
                       help="semantic credit of an answer that is not exact (%(default)s: exact is rare, "
                       "prefix makes answers short)")
    group.add_argument("--relative", default=relative, choices=("images", "answers", "none"), help="what the visual part is "
                       "relative to (%(default)s; answers was best in the toy world, and needs a group)")
    group.add_argument("--clip", default="runs/toy/clip", help="open_clip model name, or folder (%(default)s)")
    group.add_argument("--clip-weights", help="open_clip pretrained tag or file; not for a folder")
    group.add_argument("--clip-others", type=int, default=64, help="pictures that --relative images compares with (%(default)s)")


def warn_of_cut(reward):
    """Says how many texts filled CLIP's context, so that their ends may be lost."""
    if reward and reward.clip and reward.clip.cut:
        print(f"{reward.clip.cut} filled sentences fill CLIP's context: their ends may be cut")


def load_reward(args, records, root, max_pixels, device, tokenizer=None):
    """Reward of the parsed flags; the pictures to compare with are the first readable distinct ones of `records`."""
    weights, clip = {"semantic": args.w_semantic, "visual": args.w_visual}, None
    if args.w_visual:
        others = []
        for name in dict.fromkeys(r["image"] for r in records if args.relative == "images"):
            try:
                others += [load_image(root, name, max_pixels)] if len(others) < args.clip_others else []
            except BadRecord:
                continue
        if len(others) < 2 and args.relative == "images":
            fail("--relative images needs --clip-others of at least 2 and as many readable pictures: there is nothing to "
                 "compare with")
        clip = ClipScorer(args.clip, args.clip_weights, others, device)
    return Reward(weights, args.credit, args.relative, tokenizer, clip)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--predictions", default="runs/toy/eval_mmrpt/predictions.jsonl", help="(%(default)s)")
    add("--image-root", default="runs/toy", help="what image paths are relative to (%(default)s)")
    add("--out", help="(FILE.rewards.jsonl beside the predictions)")
    add("--max-pixels", type=positive, default=1003520, help="larger images are shrunk (%(default)s)")
    add("--batch-size", type=positive, default=64, help="(%(default)s)")
    add_arguments(parser, relative="images")                      # there are no groups here
    args = parser.parse_args()
    if args.credit in ("prefix", "graded") or args.relative == "answers":
        fail("--credit prefix and graded need the tokens of a policy, --relative answers a group: not for a predictions file")

    rank, _, device = distributed()
    root = image_root(args.image_root, args.predictions)
    out = args.out or f"{Path(args.predictions).with_suffix('')}.rewards.jsonl"
    fields = ("image", "sentence", "answer", "prediction")
    records = [r for _, r in read_jsonl(args.predictions, fields) if not isinstance(r, BadRecord)]
    if not records:
        fail(f"{args.predictions}: no record with {', '.join(fields)}; it should be the output of evaluate.py")
    reward = None

    def start():
        nonlocal reward
        reward = load_reward(args, records, root, args.max_pixels, device)

        def process(prepared):
            rows, images = zip(*prepared)
            parts = reward(rows, images, [[r["prediction"]] for r in rows])
            return [[{**row, **{k: round(v[i].item(), 6) for k, v in parts.items()}}] for i, row in enumerate(rows)]
        return lambda row: (row, load_image(root, row["image"], args.max_pixels)), process

    settings = {"stage": "reward", **{k: v for k, v in vars(args).items() if k not in ("out", "batch_size")},
                "predictions": fingerprint(args.predictions), "clip": fingerprint(args.clip)}
    counts = map_jsonl(read_jsonl(args.predictions, fields), start, out, settings, args.predictions, args.batch_size)
    fail_if_empty(out, counts, f"{args.predictions}: none of its {counts['rows']} predictions could be scored; see above")
    if rank == 0:
        rows = [row for _, row in read_jsonl(out, ())]
        for part in [k for k in ("format", "semantic", "visual") if k in rows[0]]:
            print(f"{part:9s} mean {sum(r[part] for r in rows) / len(rows):.3f}")
        warn_of_cut(reward)
        print(f"{out}: {counts['written']} predictions scored, {counts['skipped']} skipped")


if __name__ == "__main__":
    cli(main)
