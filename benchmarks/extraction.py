"""What a completion answers: the final answer, and what a benchmark's rule reads from it.

A function extract_*(record, text) gets the final answer as text and returns the extracted answer,
or None if its rule finds none. There is one function per official rule, and registry.py names the
one of each benchmark: a benchmark whose script reads answers in its own way gets its own function.
No judge is called, so where an official script asks an LLM, the docstring says so.
"""

import math
import re

from benchmarks.tsv import parse_list
from common.answers import exact_match


def final_answer(completion):
    """The part of a completion that is its answer, without the thought before it.

    That is the last <answer>...</answer> after the thought, or all of it if there is none; an
    unfinished thought gives "". '<think>A or B</think><answer>B</answer>' gives 'B'.
    """
    _, _, rest = completion.rpartition("</think>")
    rest = re.sub(r"^\s*<think>.*", "", rest, flags=re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", rest, re.DOTALL)
    if answers:
        return answers[-1].strip()
    return rest.strip()


def extract_text(record, text):
    """All of it."""
    return text or None


# ---------------------------------------------------------------- multiple choice

# words that no noun phrase begins with: the A before one is the letter, as in "A is right"
NO_NOUN = (
    "is|was|because|since|as|so|or|and|but|not|if|when|where|while|although|with|without|given|due"
    "|rather|instead|according|for|from|to|in|on|at|by|which|that|the|it|here|based|would|could"
    "|should|must|seems?|looks?|has|shows?|appears?|matches|fits|describes"
)
# what follows an article, on its line: a word of a noun phrase
BEFORE_NOUN = rf"(?=[^\S\n]+(?!(?:{NO_NOUN})\b)[a-z])"
ARTICLE = re.compile(rf"\bA{BEFORE_NOUN}")
FIRST_ARTICLE = re.compile(rf"(?:^|(?<=[.!?]\s))A{BEFORE_NOUN}")
PUNCTUATION = re.compile(r"[.()\[\],:;!*#{}]")
# the lower-case letter a counts unless it is an article
ANSWER_IS = re.compile(
    r"""(?i:answer\s*(?:is|:)\s*:?\s*(?:option\s+)?)["'(\[*]*"""
    rf"([A-Zb-z]\b|a\b(?!{BEFORE_NOUN}))"
)


def extract_option(record, text):
    """The letter of the option that `text` names, by the first rule that finds exactly one.

    1. An option's letter and nothing else, in either case.
    2. The letter X in "answer is X".
    3. The only option letter among the words, which must be among the last four.
    4. The option that `text` equals, or else contains, if it has at most twice the length of all
       options.

    2 to 4 are VLMEvalKit's can_infer; docs/benchmarks.md lists the differences: an article is no
    letter, and an answer that cannot be read is wrong.
    """
    options = record["options"]
    with_letters = _with_letters(options, text)
    without_articles = _without_articles(options, with_letters)
    words = _words(without_articles)
    if len(words) == 1 and words[0].upper() in options:
        return words[0].upper()

    named = {letter.upper() for letter in ANSWER_IS.findall(without_articles)} & set(options)
    if len(named) == 1:
        return named.pop()

    letters = set(_words(with_letters)) & set(options)
    if len(letters) == 1 and letters & set(words[-4:]):
        return letters.pop()
    return _option_by_text(options, text)


def _with_letters(options, text):
    """`text` with an option's letter for its text, if that holds a letter itself.

    With the options A neither, B sample A, C sample B, "It is sample A" becomes "It is B".
    """
    spelled = {}
    for letter, option in options.items():
        if len(option.split()) > 1 and set(_words(option)) & set(options):
            spelled[option] = letter
    for option in sorted(spelled, key=len, reverse=True):
        text = _whole(option).sub(spelled[option], text)
    return text


def _without_articles(options, text):
    """`text` without the A of "A cat", at the beginning of a sentence.

    Anywhere, if the text of an option is there too: "The answer is A brown dog".
    """
    if any(_whole(option).search(text) for option in options.values()):
        return ARTICLE.sub(" ", text)
    return FIRST_ARTICLE.sub(" ", text)


def _whole(option):
    """A pattern that finds an option's text as whole words, in either case."""
    return re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)


def _words(text):
    return PUNCTUATION.sub(" ", text).split()


def _option_by_text(options, text):
    """The letter of the one option whose text is the answer, or else is contained in it."""
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    matches = [letter for letter, option in options.items() if exact_match(text, option)]
    if not matches:
        lower = text.lower()
        matches = [letter for letter, option in options.items() if option.lower() in lower]
    return matches[0] if len(matches) == 1 else None


def extract_wemath(record, text):
    """As extract_option(), of what follows the last <Answer> if the form of We-Math is kept.

    '<Thought process>: <<A + C = 12>> <Answer>: <<B>>' gives 'B'.
    """
    _, _, answer = text.rpartition("<Answer>")
    return extract_option(record, re.sub("[<>]", " ", answer).strip(" :"))


# ---------------------------------------------------------------- yes or no


def extract_pope(record, text):
    """POPE's rule: "no" if no, not or No is among the words up to the first full stop.

    Commas are dropped before. All else counts as yes there; None says that there was no word of
    either kind, and counts as that yes (registry.py).
    """
    sentence, _, _ = text.partition(".")
    words = set(sentence.replace(",", "").split())
    if words & {"no", "not", "No"}:
        return "no"
    if re.search(r"\byes\b", text, re.IGNORECASE):
        return "yes"
    return None


def extract_mme(record, text):
    """MME's rule: yes, else no, within the first four characters."""
    beginning = text.lower()[:4]
    if "yes" in beginning:
        return "yes"
    if "no" in beginning:
        return "no"
    return None


def extract_yes_no(record, text):
    """VLMEvalKit's rule: one of the words yes and no, and not the other."""
    answers = {"yes", "no"} & set(re.findall(r"[a-z']+", text.lower()))
    return answers.pop() if len(answers) == 1 else None


# ---------------------------------------------------------------- MathVista

NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")


def extract_math(record, text):
    """By rule, where the official script asks an LLM: the option, last number or list, or text."""
    answer_type = record.get("answer_type")
    if record.get("question_type") == "multi_choice":
        return extract_option(record, text)
    if answer_type == "list":
        return _last_list(text)
    if answer_type not in ("integer", "float"):
        return text or None

    value = _last_number(text)
    if value is None:
        return None
    if answer_type == "integer":
        return int(value)
    return round(value, record["digits"])


def _last_list(text):
    """The last thing in brackets that is a list, or None."""
    for candidate in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        values = parse_list(candidate)
        if values is not None:
            return values
    return None


def _last_number(text):
    """The last number of a text as a finite float, or None; 1,200 is one number."""
    # U+2212 is the minus sign of typeset mathematics
    numbers = NUMBER.findall(text.replace("\u2212", "-"))
    if not numbers:
        return None
    value = float(numbers[-1].replace(",", ""))
    return None if math.isinf(value) else value
