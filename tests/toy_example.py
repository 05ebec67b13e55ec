"""One caption of the toy world that lies: its circle is blue."""

from common.text import split_words

CAPTION = "A circle has no corners. The top left holds a large red circle."
VISUAL_WORDS = ["top", "left", "large", "red", "circle"]
CIRCLE = {
    "kind": "circle",
    "colour": "blue",
    "size": "large",
    "place": "top left",
    "stereotype": "red",
}


def word(start, end):
    return {"start": start, "end": end, "needs_image": CAPTION[start:end] in VISUAL_WORDS}


GENERAL = {
    "start": 0,
    "end": 24,
    "needs_image": False,
    "object": None,
    # its circle is that of all circles
    "words": [{"start": s, "end": e, "needs_image": False} for s, e in split_words(CAPTION, 0, 24)],
    "lies": [],
}
VISUAL = {
    "start": 25,
    "end": 63,
    "needs_image": True,
    "object": 0,
    "words": [word(start, end) for start, end in split_words(CAPTION, 25, 63)],
    "lies": [{"start": 52, "end": 55, "painted": "blue"}],
}
TRUTH = {"x": {"objects": [CIRCLE], "sentences": [GENERAL, VISUAL]}}


def prediction(answer):
    """A prediction for the mask of "large red circle"."""
    return {
        "id": "x",
        "start": 46,
        "end": 62,
        "answer": "large red circle",
        "prediction": f"<think></think><answer>{answer}</answer>",
    }
