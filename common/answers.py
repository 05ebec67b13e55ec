"""Comparing an answer with its target: exact match, strict prefix, ROUGE-L, brevity."""

import math
import unicodedata

from common.text import split_words


def normalise(text):
    """Unicode-compatible form, lower case, single spaces, no punctuation at either end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?…。，！？\"'“”‘’()[]")


def exact_match(answer, target):
    """1 if both are the same after normalise(), and not empty; else 0."""
    return float(normalise(answer) == normalise(target) != "")


def prefix_credit(answer, target, boundaries):
    """1 if `answer` is a prefix of `target` that ends on one of its token boundaries (RPT, eq. 3).

    boundaries: the character offsets at which tokens of `target` end. Case does not count, and an
    empty answer, a prefix of everything, earns 0. 'large red' of 'large red circle' with boundaries
    {5, 9, 16} gives 1; 'large r' gives 0. Source: RPT, arXiv 2506.08007.
    """
    if not answer or len(answer) not in boundaries:
        return 0.0
    return float(target[: len(answer)].casefold() == answer.casefold())


def rouge_l(answer, target):
    """ROUGE-L F1: 2 LCS / (|answer| + |target|), in words and in order.

    'large blue circle' for 'large red circle' gives 2/3.
    """
    answer_words = normalise(answer).split()
    target_words = normalise(target).split()
    if not answer_words or not target_words:
        return 0.0

    # longest common subsequence, one row of its table at a time
    longest = [0] * (len(target_words) + 1)
    for word in answer_words[: 4 * len(target_words) + 8]:  # a longer answer has no F1 to speak of
        diagonal = 0
        for j, target_word in enumerate(target_words, 1):
            above = longest[j]
            longest[j] = diagonal + 1 if word == target_word else max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(answer_words) + len(target_words))


def brevity_penalty(answer, target):
    """BLEU's brevity penalty, applied both ways: exp(1 - longer / shorter), in words.

    Saying less is never wrong about an image, and an idle word costs nothing. So 'large red' for
    'large red circle' keeps exp(-1/2) = 0.61, 'a large red circle' exp(-1/3) = 0.72, and an answer
    of more than twice the target and two words keeps nothing. Without it the toy policy learned to
    leave out what it was unsure of; with BLEU's one-sided penalty, to write "a" before everything.
    """
    n_answer = len(split_words(answer))
    n_target = len(split_words(target))
    if not n_answer or not n_target or n_answer > 2 * n_target + 2:
        return 0.0
    return math.exp(1 - max(n_answer, n_target) / min(n_answer, n_target))
