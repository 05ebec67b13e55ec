"""Sentences, words and tokens as character spans of a text."""

import collections
import re

MASK = "[MASK]"
# the tags of a completion's form (reward.py); no caption and no answer may contain one
ANSWER_TAG = re.compile(r"</?(?:think|answer)>")

TITLES = (
    "mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|cf|fig|no|approx|ca|inc|co|mt|ave|dept|est|vol|pp"
    r"|(?:[a-z]\.)*[a-z]"
)
OPENING = r"\"'“‘„‚«‹»›「『（(¿¡"
ABBREVIATION = re.compile(rf"^\s*\d+\.$|(?:^|[\s{OPENING}])(?:{TITLES})\.$", re.IGNORECASE)
# “ and ‘ open in English and close in German, « and ‹ open in French and close in Danish: what
# follows, if anything, decides
CLOSING = r"\"'”’“‘»«›‹」』〉》】）)\]"
SENTENCE_END = re.compile(
    # full stops that need no space after them, with the quotes and brackets that close with them
    rf"[。！？।؟۔]+[”’」』〉》】）»]*(?:[{CLOSING}]+(?=\s|$))?"
    # others, with those and French ones, which stand apart
    rf"|[.!?…]+[{CLOSING}]*(?:[ \u00a0\u202f][»›])*(?=\s|$)"
    r"|\n+"
)

CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
PUNCTUATION = (
    r"\s!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf"
    r"\u060c\u061b\u061f\u06d4\u0964\u2010-\u205e\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20"
)
LETTERS = f"[^{CJK}{PUNCTUATION}]+"
# a CJK character is a word; 3.5, don't and well-lit are one word each
WORD = re.compile(f"[{CJK}]|{LETTERS}(?:[.,:'’/&_-]{LETTERS})*")


def split_words(text, start=0, end=None):
    """Character spans of the words in text[start:end], without the punctuation around them.

    'A well-lit room.' gives (0, 1), (2, 10), (11, 15). Each CJK character is a word.
    """
    if end is None:
        end = len(text)
    return [match.span() for match in WORD.finditer(text, start, end)]


def split_sentences(text):
    """Character spans of the sentences of `text`: in order, disjoint, trimmed, with a word each.

    A sentence ends after . ! ? … and the quotes that close with it, in any language, after CJK full
    stops, and at the end of a line. It does not end after an abbreviation or an initial, inside a
    decimal number, or where the next word is lower-case.
    """
    boundaries = [(match.end(), match[0]) for match in SENTENCE_END.finditer(text)]
    boundaries.append((len(text), "\n"))

    spans = []
    start = 0
    for end, mark in boundaries:
        if mark[0] in ".!?…" and _goes_on(text, start, end):
            continue
        sentence = text[start:end]
        if split_words(text, start, end):
            first = start + len(sentence) - len(sentence.lstrip())
            spans.append((first, first + len(sentence.strip())))
        start = end
    return spans


def _goes_on(text, start, end):
    """Whether the full stop at the end of text[start:end] does not end a sentence."""
    following = text[end:].lstrip()[:1]
    if not following:
        return False
    return following.islower() or ABBREVIATION.search(text[start:end]) is not None


def phrase_counts(phrases, texts):
    """For each phrase, the number of texts that contain it, as whole words in any case.

    'red circle' occurs in 'A Red circle.' and not in 'A red, a blue circle' or 'A red circlet'.
    """
    # a phrase without a word occurs nowhere
    wanted = {tuple(words_of(phrase)) for phrase in phrases} - {()}
    lengths = {len(phrase) for phrase in wanted}
    counts = collections.Counter()
    for text in texts:
        words = words_of(text)
        found = set()
        for n in lengths:
            found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} & wanted
        counts.update(found)
    return [counts[tuple(words_of(phrase))] for phrase in phrases]


def words_of(text):
    """The words of a text, casefolded: ['a', 'well-lit', 'room'] of 'A well-lit room.'"""
    return [text[start:end].casefold() for start, end in split_words(text)]


def tokens_in_span(span, offsets):
    """Indices of the tokens whose characters overlap `span`; offsets: (start, end) per token."""
    return [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
