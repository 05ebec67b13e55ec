"""What stage 1 shows: the ranked listing, the map of a sentence, and the page OUT.html."""

import heapq
import itertools
import math
import re

from common.captions import load_image
from common.corrections import CORRECTIONS
from common.records import BadRecord, read_jsonl
from common.text import tokens_in_span
from report.pages import image_uri, page

# Ten steps of equal CIE lightness, pale to dark: they keep their order in grey and for
# colour-blind readers
SCALE = [
    "f8f4da",
    "d5e1b2",
    "a4d098",
    "68be8f",
    "13a992",
    "0a8f92",
    "0b768b",
    "135d81",
    "2b4465",
    "2b2f43",
]
NO_MAP = "No map: it is not known which part of the image a token of this model family shows."


def print_listing(path, correction, count=5):
    """Prints the sentences of a scores file that need the image most and least."""

    def sentences():
        for _, record in read_jsonl(path, ("sentences",)):
            for sentence in record["sentences"]:
                yield sentence["score"], sentence["d_vis"], record["id"], sentence["text"]

    rankings = {
        "most": heapq.nlargest(count, sentences()),
        "least": list(reversed(heapq.nsmallest(count, sentences()))),
    }
    print(f"\nscore: {CORRECTIONS[correction]}; D_vis: eq. (1) as published")
    for title, ranking in rankings.items():
        print(f"   score  D_vis  {'id':12s}  sentences that need the image {title}")
        for score, d_vis, name, text in ranking:
            print(f"  {score:+6.3f}  {d_vis:5.3f}  {name:12.12s}  {text[:68]}")


# ---------------------------------------------------------------- where in the image


def visual_grid(model, prompt):
    """(rows, columns, first) of one image encoded by encode_prompt(), or None if not known.

    Its visual tokens first ... first + rows * columns - 1 show the whole image, row by row from the
    top left. Of an image cut into tiles, they are those of the overview.
    """
    kind = model.config.model_type
    visual = int((prompt["input_ids"] == model.config.image_token_id).sum())
    first = 0
    if "image_grid_thw" in prompt:
        # Qwen-VL: patches are merged to squares
        merged = model.config.vision_config.spatial_merge_size
        _, rows, columns = (n // merged for n in prompt["image_grid_thw"][0].tolist())
    elif kind == "llava_onevision":
        # pack_image_features(): the overview comes first
        vision = model.config.vision_config
        rows = columns = vision.image_size // vision.patch_size
    elif kind in ("idefics3", "smolvlm", "internvl"):
        # tiles of equal size, and then the overview, if any
        size = visual // math.prod(prompt["pixel_values"].shape[:-3])
        rows = columns = math.isqrt(size)
        first = visual - size
        if rows * columns != size:
            return None
    else:
        return None
    return (rows, columns, first) if 0 < rows * columns <= visual - first else None


def attention_record(record, grid, offsets, maps):
    """{rows, columns, sentences: [[share per cell], ...]} for an output record of score_record().

    grid: of visual_grid(); maps: (S, V) of Scorer, averaged over the tokens of each sentence.
    """
    if grid is None:
        return None
    rows, columns, first = grid
    cells = maps[:, first : first + rows * columns]
    sentences = []
    for sentence in record["sentences"]:
        tokens = tokens_in_span((sentence["start"], sentence["end"]), offsets)
        sentences.append([round(share, 5) for share in cells[tokens].mean(0).tolist()])
    return {"rows": rows, "columns": columns, "sentences": sentences}


# ---------------------------------------------------------------- the page


def write_dependency_page(scores, root, path, title, correction):
    """The page of those records of the file `scores` that have `attention`; none, no page."""

    def records():
        every = (record for _, record in read_jsonl(scores, ("sentences",)))
        return itertools.takewhile(lambda record: "attention" in record, every)

    values = []
    for record in records():
        for sentence in record["sentences"]:
            values += [word["producing"]["score"] for word in sentence["words"]]
    if not values:
        return

    # a few extremes would use up all shades
    values.sort()
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    if high <= low:
        low, high = low - 0.05, high + 0.05

    def shade(score):
        return min(9, max(0, int(10 * (score - low) / (high - low))))

    page(
        "dependency.html",
        path,
        title=title,
        correction=correction,
        scale=SCALE,
        edges=[signed(low + (high - low) * k / 10, 2) for k in range(10)],
        records=(record_view(record, root, shade) for record in records()),
    )


def record_view(record, root, shade):
    """What the template shows of one record; shade(score) is one of ten shades, 0 to 9."""
    view = {
        "id": record["id"],
        "grid": record["attention"],
        "note": "" if record["attention"] else NO_MAP,
        "tail": record["caption"][record["sentences"][-1]["end"] :],
        "uri": None,
    }
    try:
        image = load_image(root, record["image"], 2**20)
        view["uri"], view["width"], view["height"] = image_uri(image)
        view["is_tiny"] = max(view["width"], view["height"]) < 160
    except BadRecord as error:
        view["error"] = str(error)

    sentences = []
    end = 0
    for number, sentence in enumerate(record["sentences"], 1):
        shown = sentence_view(record["caption"], sentence, number, shade)
        shown["before"] = record["caption"][end : sentence["start"]]
        if record["attention"]:
            cells = record["attention"]["sentences"][number - 1]
            shown |= map_view(cells, record["attention"]["columns"], sentence["d_vis"], number)
        sentences.append(shown)
        end = sentence["end"]
    return {**view, "sentences": sentences}


def sentence_view(caption, sentence, number, shade):
    """Chip, tooltip and words of one sentence, with all characters between them.

    A word has the score of the rows that produce it, by which stage 2 chooses what to hide; they
    find words that need the image better than the word's own rows.
    """
    tooltip = f"sentence {number}: {describe(sentence)}"
    tooltip += f", position baseline {sentence['position_baseline']:.3f}"
    if "ablation" in sentence:
        tooltip += f", image ablation {sentence['ablation']:+.3f} nats per token"

    words = []
    end = sentence["start"]
    following = [word["start"] for word in sentence["words"][1:]] + [sentence["end"]]
    for word, next_start in zip(sentence["words"], following):
        # punctuation stays on the line of its word
        mark = re.compile(r"\S*").match(caption, word["end"], next_start)
        words.append(
            {
                "before": caption[end : word["start"]],
                "text": caption[word["start"] : word["end"]],
                "mark": mark[0],
                "score": signed(word["producing"]["score"], 2).replace("0.", ".", 1),
                "shade": shade(word["producing"]["score"]),
                "tooltip": f"{describe(word['producing'])}; own rows: {describe(word)}",
            }
        )
        end = mark.end()
    return {
        "score": signed(sentence["score"], 3),
        "d_vis": f"{sentence['d_vis']:.3f}",
        "shade": shade(sentence["score"]),
        "tooltip": tooltip,
        "words": words,
        "after": caption[end : sentence["end"]],
    }


def describe(scores):
    """D_vis and density ratio of a sentence or word, as text."""
    return f"D_vis {scores['d_vis']:.3f}, density {signed(scores['density'], 2)}"


def signed(value, digits):
    """+0.12, -0.12 or 0.00, never -0.00."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def map_view(cells, columns, d_vis, number):
    """The map of one sentence: a caption, and one character per cell, of 64 steps from ?."""
    low = min(cells)
    peak = max(cells)
    total = sum(cells)
    row, column = divmod(cells.index(peak), columns)
    note = (
        f"Sentence {number}, D_vis {d_vis:.3f}: {low:.4f} to {peak:.4f} per cell, "
        f"most in row {row + 1}, column {column + 1}"
    )
    if total < 0.98 * d_vis:
        note += f"; {total / d_vis:.0%} of it in this overview, the rest in close-ups"
    steps = [round(63 * (cell - low) / (peak - low or 1)) for cell in cells]
    return {"map": "".join(chr(63 + step) for step in steps), "note": note}
