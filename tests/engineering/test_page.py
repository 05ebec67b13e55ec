"""The page of stage 1: text is shown as text, numbers are right, and a browser draws the maps."""

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import random_image

import score_dependency
from common.records import fail
from common.text import split_sentences, split_words
from report.dependency import SCALE, write_dependency_page
from score_dependency import Scorer

CAPTIONS = ["A large red circle is in the middle. A circle has no corners.", "Two dogs run."]
HOSTILE = [
    "<script>document.title='owned'</script> A red <b>cat</b>.",
    'He said "it\'s" & left. </p></article><img src=x onerror=alert(1)>',
    "הכלב האדום רץ. חתול קטן יושב.",
    "一只红色的猫。它在跑。",
    "A 🐈‍⬛ and a 👩🏽‍🚀 \x01 wave! Second line\nthird one {{ title }} {% raw %} {# x",
]


# ---------------------------------------------------------------- the page


class Captions(HTMLParser):
    """What a browser shows of the captions, without the numbers; the numbers; and all tags."""

    def __init__(self, source):
        super().__init__()
        self.captions = []
        self.numbers = []
        self.tags = []
        self.open = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "p" and ("class", "t") in attrs:
            self.captions.append("")
            self.open = ["p"]
        elif self.open and tag in ("b", "small", "sub"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if self.open == ["p"]:
            self.captions[-1] += data
        elif self.open and re.search(r"\d", data):
            self.numbers.append(data.strip())


def scored(i, caption, side=4):
    """A record of the scores file with made-up scores for each sentence and word, and a map."""

    def scores(d_vis):
        return {
            "score": round(d_vis - 0.4, 6),
            "d_vis": d_vis,
            "position_baseline": 0.4,
            "density": -1.5,
        }

    sentences = []
    maps = []
    for k, (start, end) in enumerate(split_sentences(caption)):
        words = []
        for n, (first, last) in enumerate(split_words(caption, start, end)):
            word = {"start": first, "end": last, **scores(0.9)}
            words.append({**word, "producing": scores(0.2 + 0.05 * (n % 12))})
        sentence = {"text": caption[start:end], "start": start, "end": end, "words": words}
        sentences.append({**sentence, **scores(0.3 + 0.1 * (k % 5))})
        maps.append([round(sentences[-1]["d_vis"] / side**2, 5)] * side**2)
    return {
        "id": f"r{i}",
        "image": f"{i % 5}.png",
        "caption": caption,
        "sentences": sentences,
        "attention": {"rows": side, "columns": side, "sentences": maps},
    }


@pytest.fixture
def page(tmp_path):
    """page(records, image size) -> the page of these, as text; its path is tmp_path/page.html."""

    def write(records, size=(64, 48), correction="position"):
        for i in range(5):
            random_image(i, size).save(tmp_path / f"{i}.png")
        scores = tmp_path / "scores.jsonl"
        scores.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        title = "a model <b> on data"
        write_dependency_page(scores, tmp_path, tmp_path / "page.html", title, correction)
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def test_every_caption_stands_in_the_page_as_written_whatever_is_in_it(page):
    shown = Captions(page([scored(i, caption) for i, caption in enumerate(HOSTILE)]))
    assert shown.captions == HOSTILE
    assert shown.tags.count("script") == 1
    assert shown.tags.count("img") == shown.tags.count("article") == len(HOSTILE)


def test_the_corrected_score_is_shown_with_the_published_one_beside_it(page):
    source = page([scored(0, "Two cats. A dog runs.")])
    expected = ["-0.100", "0.300", "-.20", "-.15", "0.000", "0.400", "-.20", "-.15", "-.10"]
    assert Captions(source).numbers == expected
    # in full in the tooltip; words by the rows that predict them, with their own rows beside
    assert "sentence 1: D_vis 0.300, density -1.50, position baseline 0.400" in source
    assert "D_vis 0.250, density -1.50; own rows: D_vis 0.900, density -1.50" in source
    assert "a sentence is not the\nmean of its words" in source
    assert "-0.00<" not in source


def test_the_header_says_what_the_score_is(page):
    record = scored(0, "Two cats.")
    by_position, by_density = (page([record], correction=c) for c in ("position", "density"))
    assert "at the same place in all captions" in " ".join(by_position.split())
    assert "log of the attention per visual token" in " ".join(by_density.split())


def test_no_address_outside_the_page_is_named(page):
    source = page([scored(0, "Two cats. A dog runs.")])
    assert not re.search(r"https?:|//[a-z]|url\(|@import", source)
    assert "default-src 'none'" in source


def test_a_record_without_map_or_image_is_in_the_page_and_those_after_the_first_n_are_not(page):
    records = [scored(0, "Two cats."), scored(1, "A dog."), scored(2, "No bird.")]
    records[0]["attention"] = None
    records[1]["image"] = "<gone>.png"
    del records[2]["attention"]
    source = page(records)
    assert source.count("<article") == 2
    assert "No map: " in source and "&lt;gone&gt;.png does not exist" in source


def test_the_page_of_500_examples_stays_below_20_megabytes(page, tmp_path):
    """Photographs of 384 pixels that hardly compress, eight sentences each, maps of 32 x 32."""
    sentence = "Sentence number {} of a caption tells what is to be seen there."
    caption = " ".join(sentence.format(k) for k in range(8))
    noise = np.random.default_rng(0).integers(0, 40, (480, 640, 3))
    smooth = np.linspace(0, 200, 640)[None, :, None] + np.zeros((480, 1, 3))
    page([scored(0, caption)])
    for i in range(5):
        Image.fromarray((noise + smooth).astype("uint8")).save(tmp_path / f"{i}.png")
    lines = (json.dumps(scored(i, caption, 32)) + "\n" for i in range(500))
    (tmp_path / "scores.jsonl").write_text("".join(lines))
    path = tmp_path / "page.html"
    write_dependency_page(tmp_path / "scores.jsonl", tmp_path, path, "t", "position")
    assert 500 * 8 * 1024 < path.stat().st_size < 20e6


def test_a_resumed_run_gives_the_bytes_of_a_straight_one(checkpoint, stage, tmp_path, monkeypatch):
    """The scores, which have a second pass over the file, and the page; maps on the first ones."""
    lines = []
    for i in range(7):
        random_image(i).save(tmp_path / f"{i}.png")
        image = f"{i}.png" if i != 1 else "gone.png"
        lines.append(json.dumps({"id": str(i), "image": image, "caption": CAPTIONS[i % 2]}))
    data = tmp_path / "captions.jsonl"
    data.write_text("\n".join(lines))

    def run(out, *more):
        arguments = ("--model", checkpoint("qwen3_vl"), "--data", data, "--out", tmp_path / out)
        return stage(score_dependency, *arguments, "--batch-size", 2, *more)[0]

    assert run("straight", "--page", 5) is None
    score_batch = Scorer.__call__
    calls = itertools.count()

    def killed_in_the_third_batch(*args, **kwargs):
        if next(calls) == 2:
            fail("killed")
        return score_batch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", killed_in_the_third_batch)
        assert run("resumed", "--page", 5) == "error: killed"
    assert not (tmp_path / "resumed.html").exists()
    assert run("resumed", "--page", 5) is None
    assert run("none", "--page", 0) is None

    for suffix in ("", ".html"):
        resumed = (tmp_path / f"resumed{suffix}").read_bytes()
        assert resumed == (tmp_path / f"straight{suffix}").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "straight").read_text().splitlines()]
    # the first five but the one skipped
    assert [r["id"] for r in records if "attention" in r] == ["0", "2", "3", "4"]
    for sentence, cells in zip(records[0]["sentences"], records[0]["attention"]["sentences"]):
        assert sum(cells) == pytest.approx(sentence["d_vis"], abs=1e-4)
        assert sentence["position_baseline"] > 0
    plain = [json.loads(line) for line in (tmp_path / "none").read_text().splitlines()]
    for record in records:
        record.pop("attention", None)
    assert plain == records
    assert not (tmp_path / "none.html").exists()


def lightness(colour, matrix):
    """CIE L* of a hex colour, as seen through `matrix` on linear RGB."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    return 116 * (seen @ [0.2126, 0.7152, 0.0722]) ** (1 / 3) - 16


# of severity 1: Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113)
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]


@pytest.mark.parametrize("matrix, slack", ((np.eye(3), 0.5), (PROTANOPIA, 4), (DEUTERANOPIA, 4)))
def test_the_shades_are_even_steps_of_lightness_for_colour_blind_readers_too(matrix, slack):
    steps = -np.diff([lightness(colour, np.array(matrix)) for colour in SCALE])
    assert len(steps) == 9 and abs(steps - steps.mean()).max() < slack and steps.min() > 4


# ---------------------------------------------------------------- in a browser


def test_a_browser_shows_hostile_captions_as_text_and_draws_a_map(page, browser, tmp_path):
    source = page([scored(i, caption) for i, caption in enumerate(HOSTILE)])
    dom = browser(tmp_path / "page.html", "--dump-dom", until="<canvas")
    assert "<title>a model &lt;b&gt; on data</title>" in dom and dom.count("<script>") == 1
    assert Captions(dom).captions == HOSTILE
    assert '<canvas width="4" height="4">' in dom and 'aria-pressed="true"' in dom
    assert "Sentence 1, D_vis 0.300: 0.0187 to 0.0187 per cell" in dom
    # the script drew it
    assert "<canvas" not in source


PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const context = document.querySelector("canvas").getContext("2d")
  const green = (i) => context.getImageData(i % 4, i >> 2, 1, 1).data[1]
  document.body.dataset.probe = [0, 9].map(green)
  document.body.dataset.fits = document.documentElement.scrollWidth <= innerWidth
}, 300))
</script>"""


@pytest.mark.parametrize("width", (1200, 390))
def test_a_map_brightens_its_cell_and_nothing_exceeds_the_window(page, browser, tmp_path, width):
    record = scored(0, "Two cats.")
    record["attention"]["sentences"] = [[0] * 9 + [0.3] + [0] * 6]
    path = tmp_path / "page.html"
    path.write_text(page([record]) + PROBE, encoding="utf-8")
    dom = browser(path, "--dump-dom", f"--window-size={width},900", until='data-probe="')
    dark, bright = map(int, re.search(r'data-probe="(\d+),(\d+)"', dom).groups())
    assert dark < 60 and bright > 230 and 'data-fits="true"' in dom


def test_the_page_prints_and_every_example_has_its_map_on_paper(page, browser, tmp_path):
    page([scored(i, "Two cats. A dog runs.") for i in range(40)])
    pdf = tmp_path / "page.pdf"
    browser(tmp_path / "page.html", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    images = re.findall(rb"/Subtype /Image\s+/Width (\d+)\s+/Height (\d+)", pdf.read_bytes())
    # the canvases, of 4 x 4 cells
    assert images.count((b"4", b"4")) >= 40
