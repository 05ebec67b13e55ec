"""Prompts to draw: lines of GenEval's evaluation_metadata.jsonl, or any JSON with a prompt."""

from tqdm import tqdm

from common.records import BadRecord, fail, read_jsonl
from common.text import split_sentences, split_words, words_of

RELATIONS = ("left of", "right of", "above", "below")


def read_prompts(path):
    """Yields (line number, {id, prompt, tag?, include?, exclude?, ...} or BadRecord).

    The id of a record without one, as in GenEval's file, is the index of its line: "0" at first.
    """
    for number, record in read_jsonl(path, ("prompt",)):
        if isinstance(record, dict):
            record = {"id": number - 1, **record}
            record = _checked(record)
        yield number, record


def _checked(record):
    """The record, or a BadRecord if it cannot be drawn, or judged by GenEval's rules."""
    if type(record["id"]) is int:
        record["id"] = str(record["id"])
    texts = (record["prompt"], record["id"], record.get("tag", ""))
    if not all(isinstance(text, str) for text in texts) or not record["prompt"].strip():
        return BadRecord("prompt, id and tag must be text, and the prompt not empty")
    for field in ("include", "exclude"):
        wanted = record.get(field, [])
        is_sound = isinstance(wanted, list)
        is_sound = is_sound and all(_is_requirement(*pair) for pair in enumerate(wanted))
        if not is_sound:
            form = 'class, count from 1, color?, position? ["left of", index of an earlier one]'
            return BadRecord(f"{field} must be a list of objects with {form}")
    return record


def _is_requirement(i, wanted):
    """Whether number i of a list is {class, count, color?, position?}."""
    if not isinstance(wanted, dict) or not isinstance(wanted.get("class"), str):
        return False
    count = wanted.get("count")
    if type(count) is not int or count < 1 or not isinstance(wanted.get("color", ""), str):
        return False
    if "position" not in wanted:
        return True
    position = wanted["position"]
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        return False
    return type(position[1]) is int and 0 <= position[1] < i


def load_prompts(path):
    """The usable records of a file of prompts; unusable ones are named on the screen."""
    records = []
    for number, record in read_prompts(path):
        if isinstance(record, dict):
            records.append(record)
        else:
            tqdm.write(f"skipped {path}:{number}: {record}")
    if not records:
        fail(f"{path}: no prompt that can be used; each line should be an object with a prompt")
    return records


def check_prompts(records, weights):
    """Ends the program at a prompt that the weighted components of a drawing cannot judge."""
    for record in records:
        name = f"prompt {record['id']}"
        if not split_words(record["prompt"]):
            fail(f"{name} has no words: delete it")
        if weights.get("ins") and not (record.get("include") or record.get("exclude")):
            fail(
                f"{name} has no objects to look for: give it GenEval's include or exclude, or "
                "leave ins out of --draw-reward"
            )


def sentences_of(record):
    """The sentences of the prompt, each short enough for CLIP's context."""
    prompt = record["prompt"]
    return [prompt[start:end] for start, end in split_sentences(prompt)]


def keywords_of(record):
    """What to look for: "red circle" of an included class, or the prompt's words of 4 letters."""
    included = record.get("include", ())
    keywords = [f"{wanted.get('color', '')} {wanted['class']}".strip() for wanted in included]
    if not keywords:
        keywords = [word for word in words_of(record["prompt"]) if len(word) >= 4]
    return list(dict.fromkeys(keywords)) or [record["prompt"]]
