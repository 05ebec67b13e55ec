"""LVRPO's preference rewards: of a drawing for its prompt, of an answer for its masked caption.

A drawing I of a prompt x with sentences t and keywords w earns, each from 0 to 1:

    r_sem   = mean_t sigmoid(S(I, t) - log mean_j exp S(I, t_j))                              (L1)
    r_ins   = share of GenEval's clauses that the detected objects of I satisfy               (L2)
    r_kn    = P(yes | I, 'Does this figure show "x"? Please answer yes or no.')               (L3)
    r_dense = mean_w mean_k sigmoid(S(k, w) - log mean_j exp S(k, w_j))                       (L4)

S is CLIP's logit, scale times cosine; t_j and w_j are sentences and keywords of other prompts; k
are the two best of ten overlapping crops. Contrastive training ends at S(I, t) =
log[p(t | I) / p(t)] + b(I): the unknown b(I), and SigLIP's bias, cancel when texts are compared for
one image, which leaves a pointwise mutual information (PMI).

For reading, sem is the visual component of reward.py (a fixed text would earn all answers the same),
ins its semantic component, and kn is (L3) of the sentence with the answer filled in.

The paper's (arXiv 2603.27693): r_sem is the cosine of SigLIP 2 and r_ins is 0 or 1 (--draw-relative
none, --verdict binary), r_kn the agreement with a VQA model, r_dense the mean over keywords of the
best patch. Ours: PMI, graded r_ins, VQAScore's formula (arXiv 2404.01291), and the top k of crops.
"""

import random
from pathlib import Path

import torch

from common.answers import normalise
from common.clip import add_clip_flags
from common.drawing_prompts import check_prompts, keywords_of, sentences_of
from common.geneval import graded, verdict
from common.judges import Knowledge, crops_of, load_detector
from common.records import fail
from common.stage import weight_type
from reward import (
    ClipScorer,
    Reward,
    fill,
    for_each_answer,
    pmi_over_images,
    semantic_component,
    visual_component,
)

# images per pass of CLIP
BATCH = 64
# texts of other prompts that a PMI compares with
MOST_RIVALS = 256


# ---------------------------------------------------------------- drawing: (L1) to (L4)


def sentence_component(reward, records, drawings):
    """(L1). S = 2, and 0 and log 3 of two rivals, give sigmoid(2 - log 2) = 0.79.

    If the other sentence of the prompt gets 0.5, r_sem is 0.64.
    """
    scores = []
    for record, group in zip(records, drawings):
        scores.append(reward.agreement(group, sentences_of(record), reward.rivals).mean(-1))
    return torch.stack(scores)


def object_component(reward, records, drawings):
    """(L2). A red circle and a green square for "a red circle and a blue square" give 3/4.

    Each class and each colour is a clause. With verdict="binary" they give 0.
    """
    judge = {"graded": graded, "binary": verdict}[reward.verdict]
    images, asked = pair_up(drawings, records)
    found = reward.detector(images, asked)
    scores = [float(judge(objects, record)) for objects, record in zip(found, asked)]
    return torch.tensor(scores).view(len(drawings), -1)


def knowledge_component(reward, records, drawings):
    """(L3). "yes" with probability 0.5 and "Yes" with 0.2 give 0.7, whatever "no" gets."""
    images, asked = pair_up(drawings, records)
    p_yes = reward.knowledge.p_yes(images, [record["prompt"] for record in asked])
    return p_yes.view(len(drawings), -1)


def dense_component(reward, records, drawings, k=2):
    """(L4). Best crops of 0.9 and 0.7 for one keyword, 0.3 and 0.1 for another, give 0.5."""
    scores = []
    for record, group in zip(records, drawings):
        crops = [crop for drawing in group for crop in crops_of(drawing)]
        agreement = reward.agreement(crops, keywords_of(record), reward.rival_keywords)
        by_drawing = agreement.view(len(group), -1, agreement.shape[-1])  # (G, crops, keywords)
        scores.append(by_drawing.topk(k, 1).values.mean((1, 2)))
    return torch.stack(scores)


DRAWING_COMPONENTS = {
    "sem": sentence_component,
    "ins": object_component,
    "kn": knowledge_component,
    "dense": dense_component,
}


class DrawingReward:
    """The components of a drawing's reward. One of weight 0 is not computed and needs no judge.

    clip: a ClipScorer. detector: detect(images, records) -> [{class: [Detection, ...]}, ...], a
    dict per image, with the classes that its record asks for. knowledge: a Knowledge. rivals and
    rival_keywords: texts of other prompts, that a PMI compares with; None for the cosine.
    """

    def __init__(
        self,
        weights,
        clip=None,
        detector=None,
        knowledge=None,
        rivals=None,
        rival_keywords=None,
        verdict="graded",
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.clip = clip
        self.detector = detector
        self.knowledge = knowledge
        self.verdict = verdict
        self.rivals = self.encode_rivals(rivals, "sem")
        self.rival_keywords = self.encode_rivals(rival_keywords, "dense")

    @torch.no_grad()
    def __call__(self, records, drawings):
        """{component: (B, G) in [0, 1]} of drawings[b][g], PIL images, for records[b]."""
        return {name: DRAWING_COMPONENTS[name](self, records, drawings) for name in self.weights}

    def encode_rivals(self, texts, component):
        """(normalised texts, features (J, D)); two, as one may be the text to be judged."""
        if texts is None or component not in self.weights:
            return None
        distinct = {normalise(text): text for text in texts}
        if len(distinct) < 2:
            fail(
                "a PMI needs prompts of two texts or more: add some; to train, --draw-relative none"
            )
        return list(distinct), self.clip.text_features(list(distinct.values()))

    def agreement(self, images, texts, rivals):
        """How well each text fits each image, in [0, 1]: (N, T)."""
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        features = torch.cat([self.clip.image_features(batch) for batch in batches])  # (N, D)
        cosine = features @ self.clip.text_features(texts).T
        if rivals is None:
            return cosine.clamp(0, 1).cpu()
        rival_texts, rival_features = rivals
        scale = self.clip.logit_scale()
        # another part of the same prompt is no rival: it should be in the drawing too
        own = {normalise(text) for text in texts}
        is_own = torch.tensor([rival in own for rival in rival_texts], device=cosine.device)
        others = (scale * features @ rival_features.T).masked_fill(is_own, float("-inf"))  # (N, J)
        return pmi_over_images(scale * cosine, others[:, None]).cpu()


class RawSum:
    """A reward whose components are added before they are normalised: one component, `sum`.

    Whichever of them has the larger spread then decides.
    """

    def __init__(self, reward):
        self.reward = reward
        self.weights = {"sum": 1.0}

    def __call__(self, *args):
        components = self.reward(*args)
        weights = self.reward.weights
        total = sum(weight * components[name] for name, weight in weights.items())
        return components | {"sum": total}


def pair_up(drawings, records):
    """([image, ...], [its record, ...]) of B groups of drawings."""
    images = [drawing for group in drawings for drawing in group]
    return images, [record for record, group in zip(records, drawings) for _ in group]


# ---------------------------------------------------------------- reading


def filled_knowledge_component(reward, records, images, answers):
    """(L3) of "The top left holds a red circle." for the answer "red circle"; no answer gets 0."""
    scores = torch.zeros(len(answers), len(answers[0]))
    for b, group in enumerate(answers):
        filled = {g: fill(records[b], answer) for g, answer in enumerate(group) if answer}
        if filled:
            p_yes = reward.knowledge.p_yes([images[b]] * len(filled), list(filled.values()))
            scores[b, list(filled)] = p_yes
    return scores


READING_COMPONENTS = {
    "sem": visual_component,
    "ins": for_each_answer(semantic_component),
    "kn": filled_knowledge_component,
}


class ReadingReward(Reward):
    """The Reward of reward.py, gate included, with LVRPO's components."""

    table = READING_COMPONENTS

    def __init__(self, weights, *args, knowledge=None, **kwargs):
        super().__init__(weights, *args, **kwargs)
        self.knowledge = knowledge


# ---------------------------------------------------------------- flags and loading


def add_lvrpo_reward_flags(parser):
    """The flags of both rewards."""
    group = parser.add_argument_group("rewards")
    add = group.add_argument
    tables = {"--draw-reward": DRAWING_COMPONENTS, "--read-reward": READING_COMPONENTS}
    for flag, table in tables.items():
        form = {"nargs": "+", "metavar": "NAME=WEIGHT", "type": weight_type(table)}
        note = f"of {', '.join(table)}; one that is not named is off (sem=1 ins=1)"
        add(flag, **form, default=[("sem", 1.0), ("ins", 1.0)], help=note)
    note = "ins: the share of GenEval's clauses that hold, or whether all do (%(default)s)"
    add("--verdict", default="graded", choices=("graded", "binary"), help=note)
    note = "sem and dense: relative to other prompts, or the cosine (%(default)s)"
    add("--draw-relative", default="prompts", choices=("prompts", "none"), help=note)
    note = "add the components as they are, and normalise their sum (as the paper does)"
    add("--raw-sum", action="store_true", help=note)
    note = "ins: Owlv2 or GroundingDINO, a hub id or folder; or a function, module:function"
    add("--detector", help=note)
    add("--knowledge", help="kn: a VLM other than --model, a hub id or folder")
    add_clip_flags(group, "ViT-B-16-SigLIP2", "webli")


def check_judges(args, names):
    """Ends the program if a component of `names` has no judge."""
    if "ins" in names and not args.detector:
        fail("--draw-reward ins needs a --detector")
    if "kn" in names and not args.knowledge:
        fail("the component kn needs --knowledge, a vision-language model other than --model")
    if "kn" in names and Path(args.knowledge).resolve() == Path(args.model).resolve():
        fail(f"--knowledge {args.knowledge} is --model: a policy may not judge itself")


def load_judges(args, names, device):
    """(clip, detector, knowledge) that these components need; None for the others."""
    clip = None
    detector = None
    knowledge = None
    # a model that finds objects does not name their colours
    needs_colours = "ins" in names and ":" not in args.detector
    if args.clip and (needs_colours or names & {"sem", "dense"}):
        clip = ClipScorer(args.clip, args.clip_weights, device=device)
    if "ins" in names:
        detector = load_detector(args.detector, clip, device)
    if "kn" in names:
        knowledge = Knowledge(args.knowledge, device)
    return clip, detector, knowledge


def load_drawing_reward(args, records, clip, detector, knowledge):
    """The DrawingReward of the parsed flags and of load_judges(); checks all prompts."""
    check_prompts(records, args.draw_reward)
    rivals = None
    rival_keywords = None
    if args.draw_relative == "prompts":
        rivals = draw_rivals(text for record in records for text in sentences_of(record))
        rival_keywords = draw_rivals(text for record in records for text in keywords_of(record))
    judges = (clip, detector, knowledge)
    return DrawingReward(args.draw_reward, *judges, rivals, rival_keywords, args.verdict)


def draw_rivals(texts):
    """At most MOST_RIVALS of the distinct texts, always the same ones."""
    distinct = sorted(set(texts))
    return random.Random(0).sample(distinct, min(MOST_RIVALS, len(distinct)))
