"""The page of score_dependency.py: maps are those of equation (1), lie where they say, and a browser shows what was written."""
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3ImageProcessor

import score_dependency as sd
from score_dependency import (BadRecord, CAPTION_PROMPT, Scorer, append_responses, attention_record, chat_prompt, encode_prompt,
                              encode_prompts, encode_responses, load_vlm, score_record, visual_grid, write_page)
from tiny import FAMILIES, SIDE, picture
from test_scoring import CAPTIONS, CPU

HOSTILE = ["<script>document.title='owned'</script> A red <b>cat</b>.",
           "He said \"it's\" & left. </p></article><img src=x onerror=alert(1)>",
           "הכלב האדום רץ. חתול קטן יושב.", "一只红色的猫。它在跑。", "A 🐈‍⬛ and a 👩🏽‍🚀 \x01 wave! Second line\nthird one $title $legend"]


def slow_maps(model, processor, image, caption, layers):
    """Per caption token, the part of each visual token in its share, from the full maps of an eager model: (S, V)."""
    ids, mask, _ = encode_responses(processor, [caption], CPU)
    batch = append_responses(encode_prompts(model, processor, [chat_prompt(processor, CAPTION_PROMPT)], [[image]]), ids, mask)
    maps = model(**batch, output_attentions=True, use_cache=False).attentions
    visual, S, cells = batch["input_ids"][0] == model.config.image_token_id, ids.shape[1], 0
    for layer in layers:
        A = maps[layer][0].mean(0)[-S:]                                         # heads averaged, rows of the caption: (S, N)
        cells = cells + A[:, visual] / (A[:, visual].sum(-1) + A[:, -S:].sum(-1))[:, None] / len(layers)
    return cells


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_equal_those_of_full_attention_and_add_up_to_the_scores_in_a_padded_batch(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    images = [picture(0), picture(1, (48, 80))]
    scorer = Scorer(model, processor, [1, 2])
    prepared = [scorer.prepare(*pair) for pair in zip(images, CAPTIONS)]
    plain, mapped = scorer(prepared), scorer(prepared, maps=True)
    slow, _ = load_vlm(checkpoint(family), CPU)
    slow.set_attn_implementation("eager")
    for i, caption in enumerate(CAPTIONS):
        assert mapped[i][:3] == plain[i]                                        # asking for maps changes no score
        expected = slow_maps(slow, processor, images[i], caption, [1, 2])
        assert mapped[i][3].shape == expected.shape and torch.allclose(mapped[i][3], expected, atol=1e-5)
        assert mapped[i][3].sum(-1).tolist() == pytest.approx(plain[i][0][1:len(expected) + 1], abs=1e-5)


def test_rows_in_pieces_give_the_same_maps():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    visual, text = torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    visual[:, 2:9], text[1, 5:] = True, False
    found = {}
    for rows in (3, 256):
        found[rows] = torch.zeros(2, 8, 20)
        share = sd.visual_share(query, key, None, 0.3, visual, text, rows, cells=found[rows])
        assert torch.allclose(found[rows].sum(-1), share, atol=1e-6) and not found[rows][:, :, 9:].any()
    assert torch.allclose(found[3], found[256], atol=1e-6)


def visual_features(model, processor, image):
    """(encoded prompt, what stands at its visual tokens when the decoder starts (V, d)), with vision attention switched off, so
    that what a token holds is what its patch shows."""
    for name, parameter in model.named_parameters():
        if re.search(r"vision|visual", name) and re.search(r"\.(out_proj|projection_layer|proj)\.", name) and "attn" in name + \
                "attn" * ("attention" in name):
            parameter.zero_()
    row, seen = encode_prompt(model, processor, chat_prompt(processor, CAPTION_PROMPT), [image]), []
    handle = model.get_decoder().register_forward_pre_hook(lambda module, _, inputs: seen.append(inputs["inputs_embeds"]),
                                                           with_kwargs=True)
    model.model(**sd.join_prompts(model, [row]), use_cache=False)
    handle.remove()
    return row, seen[0][row["input_ids"] == model.config.image_token_id]


def assert_cells_lie_where_they_say(model, processor, size):
    row, before = visual_features(model, processor, picture(0, size))
    rows, columns, first = visual_grid(model, row)
    for r, c in itertools.product(range(rows), range(columns)):
        pixels = np.array(picture(0, size))
        top, bottom, left, right = (round(x) for x in (r * size[1] / rows, (r + 1) * size[1] / rows,
                                                       c * size[0] / columns, (c + 1) * size[0] / columns))
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
        _, after = visual_features(model, processor, Image.fromarray(pixels))
        changed = (after - before)[first:first + rows * columns].norm(dim=-1)
        assert changed.argmax() == r * columns + c
    return rows, columns, first, len(before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_changes_in_a_cell_of_the_picture_changes_the_token_of_that_cell(checkpoint, family):
    """Through the real processor and vision tower, for every cell of a picture that is not square."""
    model, processor = load_vlm(checkpoint(family), CPU)
    rows, columns, first, visual = assert_cells_lie_where_they_say(model, processor, (64, 48) if "qwen" not in family else (24, 16))
    assert first == 0
    if "qwen" in family:
        assert columns > rows > 1 and rows * columns == visual                  # as wide as the picture
    else:
        assert rows == columns > 1 and (rows * columns == visual) == (family != "llava_onevision")


@pytest.mark.parametrize("family", ("idefics3", "internvl"))
@torch.no_grad()
def test_of_a_picture_in_tiles_the_overview_is_taken(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    if family == "idefics3":
        tiles = [f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)]
        processor.tokenizer.add_special_tokens({"additional_special_tokens": tiles})
        model.resize_token_embeddings(len(processor.tokenizer))
        processor.image_processor = Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    else:
        processor.image_processor.max_patches = 6
    rows, columns, first, visual = assert_cells_lie_where_they_say(model, processor, (64, 48))
    assert rows == columns == 2 and first == visual - 4 >= 8


def test_a_family_whose_tokens_have_no_known_places_gets_no_map(checkpoint):
    model, processor = load_vlm(checkpoint("internvl"), CPU)
    row = encode_prompt(model, processor, chat_prompt(processor, CAPTION_PROMPT), [picture(0)])
    assert visual_grid(model, row) == (2, 2, 0)
    model.config.model_type = "someone_elses"
    assert visual_grid(model, row) is None and attention_record({"sentences": []}, None, [], None) is None


def test_attention_on_one_token_lights_one_cell_and_sentences_average_their_own_tokens():
    record = {"id": "1", "image": "a.png", "caption": "Red cat. Dog."}
    offsets = [(0, 3), (3, 7), (7, 8), (8, 12), (12, 13)]                       # "Red", " cat", ".", " Dog", "."
    cells = torch.zeros(5, 8)                                                   # two visual tokens before a 2 x 3 overview
    cells[:3, 2 + 5], cells[3:, 2 + 1], cells[:, 0] = torch.tensor([0.3, 0.6, 0.9]), 0.25, 0.05
    record = score_record(record, [1, *cells.sum(-1).tolist()], None, offsets)
    out = attention_record(record, (2, 3, 2), offsets, cells)
    assert out == {"rows": 2, "columns": 3, "sentences": [[0, 0, 0, 0, 0, 0.6], [0, 0.25, 0, 0, 0, 0]]}


# ------------------------------------------------------------------- the page


class Text(HTMLParser):
    """What a browser would show of the captions: text inside p.t, without the small numbers; and every tag met."""

    def __init__(self, page):
        super().__init__()
        self.captions, self.tags, self.numbers, self.depth = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "p" and ("class", "t") in attrs:
            self.captions.append("")
            self.depth = ["p"]
        elif self.depth and tag in ("b", "small"):
            self.depth.append(tag)

    def handle_endtag(self, tag):
        if self.depth and tag == self.depth[-1]:
            self.depth.pop()

    def handle_data(self, data):
        if self.depth == ["p"]:
            self.captions[-1] += data
        elif self.depth:
            self.numbers.append(data)


def scored(i, caption, side=4):
    """A record of the scores file with a made-up score for each sentence and word, and a map."""
    sentences = [{"text": caption[a:b], "start": a, "end": b, "score": 0.3 + 0.1 * (k % 5), "words": [
        {"start": s, "end": e, "score": 0.2 + 0.05 * (n % 12), "own": 0.5} for n, (s, e) in enumerate(sd.split_words(caption, a, b))]}
        for k, (a, b) in enumerate(sd.split_sentences(caption))]
    maps = [[round(s["score"] / side ** 2, 5)] * side ** 2 for s in sentences]
    return {"id": f"r{i}", "image": f"{i % 5}.png", "caption": caption, "sentences": sentences,
            "attention": {"rows": side, "columns": side, "sentences": maps}}


@pytest.fixture
def page(tmp_path):
    """page(records, image size) -> the page of these, as text; it lies at tmp_path / page.html."""
    def make(records, size=(64, 48)):
        for i in range(5):
            picture(i, size).save(tmp_path / f"{i}.png")
        (tmp_path / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        write_page(tmp_path / "scores.jsonl", tmp_path, tmp_path / "page.html", "a model <b> on data")
        return (tmp_path / "page.html").read_text(encoding="utf-8")
    return make


def test_every_caption_stands_in_the_page_as_written_whatever_is_in_it(page):
    made = Text(page([scored(i, c) for i, c in enumerate(HOSTILE)]))
    assert made.captions == HOSTILE
    assert made.tags.count("script") == 1 and made.tags.count("img") == len(HOSTILE) and made.tags.count("article") == len(HOSTILE)


def test_scores_are_text_and_no_address_outside_the_page_is_named(page):
    source = page([scored(0, "Two cats. A dog runs.")])
    assert Text(source).numbers == ["0.300", ".20", ".25", "0.400", ".20", ".25", ".30"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", source) and "default-src 'none'" in source


def test_a_record_without_map_or_picture_still_stands_in_the_page_and_those_behind_the_first_n_do_not(page):
    records = [scored(0, "Two cats."), scored(1, "A dog."), scored(2, "No bird.")]
    records[0]["attention"], records[1]["image"] = None, "<gone>.png"
    del records[2]["attention"]
    source = page(records)
    assert source.count("<article") == 2 and "no known places" in source and "&lt;gone&gt;.png does not exist" in source


def test_the_page_of_500_examples_stays_below_20_megabytes(page, tmp_path):
    """Photographs of 384 pixels that hardly compress, eight sentences each, maps of 32 x 32."""
    caption = " ".join(f"Sentence number {k} of a caption tells what is to be seen there." for k in range(8))
    noise = np.random.default_rng(0).integers(0, 40, (480, 640, 3))
    smooth = np.linspace(0, 200, 640)[None, :, None] + np.zeros((480, 1, 3))
    page([scored(0, caption)])
    for i in range(5):
        Image.fromarray((noise + smooth).astype("uint8")).save(tmp_path / f"{i}.png")
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(scored(i, caption, 32)) + "\n" for i in range(500)))
    write_page(tmp_path / "scores.jsonl", tmp_path, tmp_path / "page.html", "t")
    assert 500 * 8 * 1024 < (tmp_path / "page.html").stat().st_size < 20e6


def test_a_resumed_run_gives_the_page_of_a_straight_one_and_only_the_first_records_carry_maps(checkpoint, stage, tmp_path, monkeypatch):
    for i in range(7):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"id": str(i), "image": f"{i}.png" if i != 1 else "gone.png", "caption": CAPTIONS[i % 2]} for i in range(7)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(out, *more):
        return stage(sd, "--model", checkpoint("qwen3_vl"), "--data", tmp_path / "captions.jsonl", "--out", tmp_path / out,
                     "--batch-size", 2, *more)
    assert run("straight", "--page", 5)[0] is None
    write, calls = Scorer.__call__, itertools.count()
    monkeypatch.setattr(Scorer, "__call__", lambda *a, **k: sd.fail("killed") if next(calls) == 2 else write(*a, **k))
    assert run("resumed", "--page", 5)[0] == "error: killed" and not (tmp_path / "resumed.html").exists()
    monkeypatch.undo()
    assert run("resumed", "--page", 5)[0] is None
    assert run("none", "--page", 0)[0] is None
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "straight").read_bytes()
    assert (tmp_path / "resumed.html").read_bytes() == (tmp_path / "straight.html").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "straight").read_text().splitlines()]
    assert [row["id"] for row in lines if "attention" in row] == ["0", "2", "3", "4"]      # the first five but the one skipped
    for s, cells in zip(lines[0]["sentences"], lines[0]["attention"]["sentences"]):
        assert sum(cells) == pytest.approx(s["score"], abs=1e-4)
    plain = [json.loads(line) for line in (tmp_path / "none").read_text().splitlines()]
    assert plain == [{k: v for k, v in row.items() if k != "attention"} for row in lines]
    assert not (tmp_path / "none.html").exists()


def lightness(colour, matrix=np.eye(3)):
    """CIE L* of a hex colour, as seen through `matrix` on linear RGB."""
    rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.clip(matrix @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    return 116 * (linear @ [0.2126, 0.7152, 0.0722]) ** (1 / 3) - 16


@pytest.mark.parametrize("matrix, slack", ((np.eye(3), 0.5),
                                           ([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]], 4),
                                           ([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]], 4)))
def test_the_shades_are_even_steps_of_lightness_for_colour_blind_readers_too(matrix, slack):
    """Matrices: protanopia and deuteranopia of severity 1, Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113)."""
    steps = -np.diff([lightness(c, np.array(matrix)) for c in sd.SCALE])
    assert len(steps) == 9 and abs(steps - steps.mean()).max() < slack and steps.min() > 4


# ------------------------------------------------------------------- in a browser


def test_a_browser_shows_hostile_captions_as_text_and_draws_a_map(page, browser, tmp_path):
    source = page([scored(i, c) for i, c in enumerate(HOSTILE)])
    dom = browser(tmp_path / "page.html", "--dump-dom", until="<canvas")
    assert "<title>a model &lt;b&gt; on data</title>" in dom and dom.count("<script>") == 1
    assert Text(dom).captions == HOSTILE
    assert '<canvas width="4" height="4">' in dom and 'aria-pressed="true"' in dom and "Sentence 1, 0.300: 0.0187 to 0.0187 a cell" in dom
    assert "<canvas" not in source                                               # the script drew it


@pytest.mark.parametrize("width", (1200, 390))
def test_a_map_brightens_its_cell_and_nothing_is_wider_than_the_window(page, browser, tmp_path, width):
    record = scored(0, "Two cats.")
    record["attention"]["sentences"] = [[0] * 9 + [0.3] + [0] * 6]
    source = page([record])
    probe = """<script>addEventListener("load", () => setTimeout(() => { const c = document.querySelector("canvas")
      document.body.dataset.probe = [0, 9].map(i => c.getContext("2d").getImageData(i % 4, i >> 2, 1, 1).data[1])
      document.body.dataset.wide = document.documentElement.scrollWidth <= innerWidth }, 300))</script>"""
    (tmp_path / "page.html").write_text(source + probe, encoding="utf-8")
    dom = browser(tmp_path / "page.html", "--dump-dom", f"--window-size={width},900", until="data-probe=\"")
    dark, bright = map(int, re.search(r'data-probe="(\d+),(\d+)"', dom).groups())
    assert dark < 60 and bright > 230 and 'data-wide="true"' in dom


def test_the_page_prints_and_every_example_has_its_map_on_paper(page, browser, tmp_path):
    page([scored(i, "Two cats. A dog runs.") for i in range(40)])
    browser(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    images = re.findall(rb"/Subtype /Image\s+/Width (\d+)\s+/Height (\d+)", (tmp_path / "page.pdf").read_bytes())
    assert images.count((b"4", b"4")) >= 40                                      # the canvases, of 4 x 4 cells
