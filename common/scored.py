"""Scored captions: reading what stage 1 wrote, and checking that it fits."""

from common.records import BadRecord, read_jsonl

LARGEST = 1e9


def read_scores(path):
    """read_jsonl() of a scores file.

    A record whose sentences do not fit its caption, or lack scores, is a BadRecord.
    """
    for number, record in read_jsonl(path, ("id", "image", "caption", "sentences")):
        if not isinstance(record, BadRecord):
            try:
                for sentence in record["sentences"]:
                    _check_sentence(sentence, record["caption"])
            except (KeyError, TypeError, ValueError):
                reason = "its sentences do not fit its caption or lack scores: score it again"
                record = BadRecord(reason)
        yield number, record


def _check_sentence(sentence, caption):
    """Raises KeyError, TypeError or ValueError unless the sentence is one of `caption`, scored."""
    words = sentence["words"]
    edges = [0, sentence["start"]]
    for word in words:
        edges += [word["start"], word["end"]]
    edges.append(sentence["end"])
    if not all(type(edge) is int for edge in edges):
        raise TypeError
    text = caption[sentence["start"] : sentence["end"]]
    if text != sentence["text"] or not words or edges != sorted(edges):
        raise ValueError

    values = [sentence.get("ablation", 0)]
    for scores in (sentence, *words, *(word["producing"] for word in words)):
        values += [scores[name] for name in ("score", "d_vis", "position_baseline", "density")]
    # no share, log ratio or gain in nats comes near the limit, and squares must stay finite
    if not all(type(value) in (int, float) and abs(value) < LARGEST for value in values):
        raise ValueError
