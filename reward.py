"""Stage 3: the semantic-visual reward.

A completion <think>...</think><answer>a</answer> fills [MASK] in the sentence s of image I; y is
the text that the caption has there. A completion of another form, or with an empty answer, earns 0
in everything (`format` is that gate, not a component). The components, from 0 to 1 per completion:

    semantic    1 if a = y after normalisation, else --credit: nothing (exact), 1 for a strict
                prefix of y (prefix), or the ROUGE-L F1 of the words (rouge_l)
    visual      how well s, filled with a, fits the image, compared (--relative) with the group's
                other answers (answers), with those, y, and texts that other records hide (pool),
                with other images (images), or with nothing (none: CLIP's cosine); times a brevity
                penalty, exp(1 - longer / shorter) of the lengths of a and y

Within the G completions of a prompt every component k is normalised, and only then weighted and
added. A is the advantage:

    A = sum_k w_k (r_k - mean r_k) / (std r_k + eps)                                           (2)

Adding first and normalising after would let the component with the larger spread decide. A
component that is equal for the whole group drops out; one whose spread is far below eps hardly
counts.

Why the visual component is a contest. S(I, t), CLIP's logit, is scale times cosine. Contrastive
training ends at S(I, t) = log[p(t | I) / p(t)] + c(I): the captions' prior p(t) is divided out, so
an answer earns nothing by being what captions usually say. The unknown c(I) cancels when answers
to one image are compared. Their softmax is, by Bayes' rule, the probability of each answer given
the image if all were equally likely a priori. The cosine has the same order, but its gaps are
small beside eps. Rivals from outside the group (pool) matter when every answer is wrong: if one of
them fits the image better, all answers earn next to nothing, and the least bad one is not praised.

To change the reward, write a function with a worked example and add one line to COMPONENTS.

    python reward.py        # prints the worked example of docs/rl_in_five_minutes.md

What is published: the name, and (in summaries) exact match and strict prefix. Ours: the gate, the
ROUGE-L credit, the visual component, the brevity penalty, and normalising before adding.
"""

from common.script import run_script  # first: the other imports take seconds

import collections
import random
import re

import torch

from common.answers import brevity_penalty, exact_match, normalise, prefix_credit, rouge_l
from common.clip import Clip, add_clip_flags, load_other_images
from common.stage import weight_type
from common.text import ANSWER_TAG, MASK, split_words

FILL_PROMPT = (
    "{masked_caption}\n\nFrom the image, write what " + MASK + " hides: "
    "<think>reasoning</think><answer>hidden text</answer>"
)


# ---------------------------------------------------------------- equation (2)


def advantages(components, weights, scale=True, eps=0.1):
    """Equation (2): {name: (B, G)} -> (B, G).

    scale=False leaves out the division by std (Dr. GRPO, 2503.20783). Rewards (1, 0, 0, 1) have
    mean 1/2 and (unbiased) std 0.577, hence advantages +-0.5 / 0.677. GRPO's eps is 1e-4. Here it
    is 0.1, so that a tiny difference in CLIP's score between two right answers is not blown up to
    the size of right against wrong.
    """
    total = 0
    for name, weight in weights.items():
        # in fp32 the mean of equal values is off by an ulp: zero_std_fraction should see a 0
        reward = components[name].double()
        centred = reward - reward.mean(-1, keepdim=True)
        if scale:
            centred = centred / (reward.std(-1, keepdim=True) + eps)
        total = total + weight * centred
    return total.float()


class Reward:
    """The components of the reward. One of weight 0 is not computed and loads nothing.

    tokenizer: the policy's, for --credit prefix. clip: a ClipScorer, for the visual component.
    hidden: the hidden texts of all records, from which relative="pool" draws rivals.
    """

    table = None  # of components, if not COMPONENTS

    def __init__(
        self, weights, credit="rouge_l", relative="pool", tokenizer=None, clip=None, hidden=()
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.credit = credit
        self.relative = relative
        self.tokenizer = tokenizer
        self.clip = clip
        self.hidden = collections.defaultdict(list)  # by number of words
        for text in sorted(set(hidden)):
            self.hidden[len(split_words(text))].append(text)

    def __call__(self, records, images, completions):
        """{component: (B, G) in [0, 1]} of completions[b][g] for records[b] and PIL images[b]."""
        answers = [[parse_completion(text) for text in group] for group in completions]
        format_ok = [[float(answer is not None) for answer in group] for group in answers]
        components = {"format": torch.tensor(format_ok)}
        table = self.table or COMPONENTS
        for name in self.weights:
            component = table[name](self, records, images, answers)
            components[name] = component * components["format"]
        return components


def for_each_answer(credit):
    """Makes a component of credit(reward, record, answer) -> float; an answer of None earns 0."""

    def component(reward, records, images, answers):
        credits = torch.zeros(len(answers), len(answers[0]))
        for b, group in enumerate(answers):
            for g, answer in enumerate(group):
                if answer:
                    credits[b, g] = credit(reward, records[b], answer)
        return credits

    return component


# ---------------------------------------------------------------- form: the gate

COMPLETION = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def parse_completion(text):
    """The answer in <think>...</think><answer>...</answer>, stripped; None if there is none.

    '<think>a disc</think><answer> red circle </answer>' gives 'red circle'. A tag too many, text
    outside the tags, or an answer that is empty or only punctuation, give None.
    """
    match = COMPLETION.fullmatch(text)
    if not match or any(ANSWER_TAG.search(part) for part in match.groups()):
        return None
    if not normalise(match[2]):
        return None
    return match[2].strip()


def target_completion(record):
    """What imitation (SFT) learns to write for a mask record.

    Captions hold no reasoning, so the thought is the sentence up to the mask:
    'In the middle is a [MASK].' gives <think>In the middle is a</think><answer>...
    """
    thought = record["sentence"].partition(MASK)[0].strip()
    return f"<think>{thought}</think><answer>{record['answer']}</answer>"


# ---------------------------------------------------------------- semantic: answer against caption


def semantic_component(reward, record, answer):
    return semantic_credit(answer, record["answer"], reward.credit, reward.tokenizer)


def semantic_credit(answer, target, credit, tokenizer=None):
    """1 for an exact match, else the credit of this kind, in [0, 1]; prefix needs a tokenizer."""
    if exact_match(answer, target):
        return 1.0
    if credit == "rouge_l":
        return min(rouge_l(answer, target), 0.99)  # the same words are still not the same answer
    if credit == "prefix":
        encoded = tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
        return prefix_credit(answer, target, {end for _, end in encoded.offset_mapping})
    return 0.0


# ---------------------------------------------------------------- visual: sentence against image


def visual_component(reward, records, images, answers):
    """The agreement of the filled sentence with the image, times the brevity penalty: (B, G)."""
    sentences = []
    penalties = []
    for record, group in zip(records, answers):
        rivals = rival_answers(record, reward.hidden) if reward.relative == "pool" else []
        sentences.append([fill(record, answer) for answer in [*group, *rivals]])
        penalties.append([brevity_penalty(answer or "", record["answer"]) for answer in group])
    agreement = reward.clip(images, sentences, reward.relative)
    return agreement[:, : len(answers[0])] * torch.tensor(penalties)


def rival_answers(record, hidden, count=7):
    """The texts that compete with a group in a pool: y, then `count` other hidden texts.

    hidden: {number of words: texts}. Rivals have as many words as y, so that most of them fit the
    gap. None fills up the list if there are too few. A record always gets the same rivals.
    """
    y = record["answer"]
    texts = hidden[len(split_words(y))]
    drawn = random.Random(record["masked_caption"]).sample(texts, min(count + 1, len(texts)))
    others = [text for text in drawn if not exact_match(text, y)][:count]
    return [y, *others, *[None] * (count - len(others))]


def fill(record, answer):
    """The masked sentence with the answer in it; None for no answer."""
    return record["sentence"].replace(MASK, answer) if answer else None


def contest(scores, texts):
    """softmax of `scores` (G,), in nats, over the distinct `texts` (G), each counted once.

    Case and outer punctuation make no difference between texts.
    For an ideal CLIP this is p(I | t) / sum over the distinct texts t' of p(I | t'): by Bayes'
    rule, the probability of t given I if all texts were equally likely a priori. A text of None
    does not take part and gets 0. Scores (0, log 3) of two texts give 1/4 and 3/4.
    """
    distinct = {normalise(text): i for i, text in enumerate(texts) if text is not None}
    if not distinct:
        return torch.zeros_like(scores)
    takes_part = torch.tensor([text is not None for text in texts], device=scores.device)
    log_total = scores[list(distinct.values())].logsumexp(0)
    return (scores - log_total).exp() * takes_part


def pmi_over_images(score, other_scores):
    """sigmoid of the pointwise mutual information: score (...) - log mean exp of others (..., J).

    Both are in nats. Text that fits every image gets sigmoid(0) = 1/2. -inf among the others marks
    the image itself, which does not take part; if no other is left, the result is 1/2.
    """
    count = (other_scores > float("-inf")).sum(-1)
    log_mean = other_scores.logsumexp(-1) - count.log()
    return torch.sigmoid(torch.where(count > 0, score - log_mean, 0.0))


class ClipScorer(Clip):
    """S(I, t), the logit of open_clip: scale times cosine, in nats, made relative.

    others: the PIL images that relative="images" compares with.
    """

    def __init__(self, name, weights=None, others=(), device="cpu"):
        super().__init__(name, weights, device)
        self.others = self.image_features(others) if len(others) else None

    @torch.no_grad()  # else the advantage would carry a graph into CLIP's logit scale
    def __call__(self, images, texts, relative):
        """Agreement (B, G) in [0, 1] of texts[b][g] with images[b]; a text of None gets 0.

        relative: pool or answers (a contest of the texts), images, or none (the cosine).
        """
        takes_part = torch.tensor([[text is not None for text in group] for group in texts])
        if not takes_part.any():
            return torch.zeros(takes_part.shape)
        text = self.grouped_text_features(texts)  # (B, G, D)
        image = self.image_features(images)  # (B, D)
        cosine = torch.einsum("bd,bgd->bg", image, text)
        scale = self.logit_scale()

        if relative in ("answers", "pool"):
            groups = zip(scale * cosine, texts)
            return torch.stack([contest(*group) for group in groups]).cpu()
        if relative == "images":
            # an image is not compared with itself, whatever the names of its copies
            is_itself = (image @ self.others.T > 1 - 1e-5)[:, None]  # (B, 1, J)
            others = (scale * text @ self.others.T).masked_fill(is_itself, float("-inf"))
            agreement = pmi_over_images(scale * cosine, others)
        else:
            agreement = cosine.clamp(0, 1)
        return agreement.cpu() * takes_part


# ---------------------------------------------------------------- the table of components

# name: component(reward, records, images, answers) -> (B, G); --reward NAME=WEIGHT switches it on
COMPONENTS = {
    "semantic": for_each_answer(semantic_component),
    "visual": visual_component,
}


# ---------------------------------------------------------------- flags and loading


def add_reward_flags(parser):
    """The reward's flags, the same for every script that trains with it."""
    group = parser.add_argument_group("reward")
    add = group.add_argument
    defaults = [("semantic", 1.0), ("visual", 1.0)]
    form = {"nargs": "+", "metavar": "NAME=WEIGHT", "type": weight_type(COMPONENTS)}
    note = "components and their weights; one that is not named is off (semantic=1 visual=1)"
    add("--reward", **form, default=defaults, help=note)
    note = "semantic credit of an answer that is not exact (%(default)s)"
    add("--credit", default="rouge_l", choices=("exact", "prefix", "rouge_l"), help=note)
    note = "what the visual component compares an answer with, see above (%(default)s)"
    choices = ("pool", "answers", "images", "none")
    add("--relative", default="pool", choices=choices, help=note)
    add_clip_flags(group)


def load_reward(args, records, root, policy):
    """The Reward of the parsed flags; CLIP is loaded only if the visual component has a weight."""
    clip = None
    if args.reward.get("visual"):
        others = ()
        if args.relative == "images":
            others = load_other_images(records, root, args.max_pixels, args.clip_others)
        clip = ClipScorer(args.clip, args.clip_weights, others, policy.model.device)
    hidden = [record["answer"] for record in records]
    tokenizer = policy.processor.tokenizer
    return Reward(args.reward, args.credit, args.relative, tokenizer, clip, hidden)


# ---------------------------------------------------------------- the worked example


def print_worked_example():
    """Five completions of one prompt. The caption says red; the image shows a blue circle.

    The visual credits are made up; everything else is computed by the functions above.
    """
    target = "large red circle"
    answers = ["large red circle", "large blue circle", "red circle", "a circle", None]
    semantic = [semantic_credit(a, target, "rouge_l") if a else 0.0 for a in answers]
    visual = [0.06, 0.80, 0.03, 0.05, 0.0]
    components = {"semantic": torch.tensor([semantic]), "visual": torch.tensor([visual])}
    alone = advantages(components, {"semantic": 1.0})[0]
    both = advantages(components, {"semantic": 1.0, "visual": 1.5})[0]

    print(f"hidden: {target}; the image shows a large blue circle\n")
    print(f"{'answer':20s}{'semantic':>10s}{'visual':>10s}{'A, semantic':>14s}{'A, both':>10s}")
    for i, answer in enumerate(answers):
        print(
            f"{answer or '(no <answer>)':20s}{semantic[i]:10.2f}{visual[i]:10.2f}"
            f"{alone[i]:+14.2f}{both[i]:+10.2f}"
        )
    print("\nweights: semantic=1 visual=1.5. To change the reward, see COMPONENTS in reward.py")


if __name__ == "__main__":
    run_script(print_worked_example)
