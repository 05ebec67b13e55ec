"""Mask records: what build_masks.py writes, and what is trained and judged on."""

from tqdm import tqdm

from common.answers import normalise
from common.records import BadRecord, fail, read_jsonl, with_fields
from common.text import ANSWER_TAG, MASK

FIELDS = ("id", "image", "masked_caption", "sentence", "answer")


def read_masks(path):
    """read_jsonl() of a masks file.

    A record without exactly one [MASK], or that no completion could answer, becomes a BadRecord. A
    question (id, image, question, answer) is a caption whose mask follows it. start and end may be
    missing, as in a file that was written by hand.
    """
    for number, record in read_jsonl(path, ()):
        if not isinstance(record, BadRecord):
            if isinstance(record.get("question"), str):
                text = f"{record['question']} {MASK}"
                record = record | {"sentence": text, "masked_caption": text}
            record = with_fields(record, FIELDS)
        if not isinstance(record, BadRecord) and not _has_whole_edges(record):
            record = BadRecord("start and end, if given, must be whole numbers")
        if not isinstance(record, BadRecord) and not _is_answerable(record):
            record = BadRecord(
                f"sentence and masked_caption need one {MASK} each, and an answer; none of them "
                "may hold an answer tag"
            )
        yield number, record


def load_masks(path):
    """The usable records of a masks file; if there are none, the program ends.

    Unusable records are named on the screen.
    """
    records = []
    for number, record in read_masks(path):
        if isinstance(record, BadRecord):
            tqdm.write(f"skipped {path}:{number}: {record}")
        else:
            records.append(record)
    if not records:
        fail(f"{path}: no mask to learn from; it should be the output of build_masks.py")
    return records


def _has_whole_edges(record):
    edges = [record[name] for name in ("start", "end") if name in record]
    return all(type(edge) is int for edge in edges)


def _is_answerable(record):
    text = record["sentence"] + record["answer"]
    has_masks = record["sentence"].count(MASK) == 1 and record["masked_caption"].count(MASK) == 1
    return has_masks and normalise(record["answer"]) != "" and not ANSWER_TAG.search(text)
