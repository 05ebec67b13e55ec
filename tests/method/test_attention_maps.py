"""Where in the image attention went: maps are those of eq. (1), and lie where they say."""

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, SIDE, random_image
from transformers import Idefics3ImageProcessor

from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompt,
    encode_prompts,
    encode_responses,
    join_prompts,
    load_vlm,
)
from report.dependency import attention_record, visual_grid
from score_dependency import CAPTION_PROMPT, Scorer, attention_mass, score_record, visual_share

CPU = torch.device("cpu")
CAPTIONS = ["A large red circle is in the middle. A circle has no corners.", "Two dogs run."]


def slow_maps(model, processor, image, caption, layers):
    """Per caption token, each visual token's part in its share, from full eager maps: (S, V)."""
    ids, mask, _ = encode_responses(processor, [caption], CPU)
    prompts = encode_prompts(model, processor, [chat_prompt(processor, CAPTION_PROMPT)], [[image]])
    batch = append_responses(prompts, ids, mask)
    attentions = model(**batch, output_attentions=True, use_cache=False).attentions
    visual = batch["input_ids"][0] == model.config.image_token_id
    S = ids.shape[1]
    cells = 0
    for layer in layers:
        rows = attentions[layer][0].mean(0)[-S:]  # (S, N), heads averaged
        total = rows[:, visual].sum(-1) + rows[:, -S:].sum(-1)
        cells = cells + rows[:, visual] / total[:, None] / len(layers)
    return cells


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_equal_full_attention_and_add_up_to_the_scores_in_a_padded_batch(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    images = [random_image(0), random_image(1, (48, 80))]
    scorer = Scorer(model, processor, [1, 2])
    prepared = [scorer.prepare(*pair) for pair in zip(images, CAPTIONS)]
    plain = scorer(prepared)
    mapped = scorer(prepared, maps=True)
    slow, _ = load_vlm(checkpoint(family), CPU)
    slow.set_attn_implementation("eager")
    for i, caption in enumerate(CAPTIONS):
        # asking for maps changes no score
        assert mapped[i][:3] == plain[i]
        expected = slow_maps(slow, processor, images[i], caption, [1, 2])
        maps = mapped[i][3]
        assert maps.shape == expected.shape and torch.allclose(maps, expected, atol=1e-5)
        assert maps.sum(-1).tolist() == pytest.approx(plain[i][0]["d_vis"][1:], abs=1e-5)


def test_rows_in_chunks_give_the_same_maps():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 20, 8)
    key = torch.randn(2, 2, 20, 8)
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 2:9] = True
    text = torch.ones(2, 7, dtype=torch.bool)
    text[1, 5:] = False
    cells = {}
    for chunk in (3, 256):
        cells[chunk] = torch.zeros(2, 8, 20)
        mass = attention_mass(query, key, None, 0.3, visual, text, chunk, cells[chunk])
        assert torch.allclose(cells[chunk].sum(-1), visual_share(*mass), atol=1e-6)
        assert not cells[chunk][:, :, 9:].any()
    assert torch.allclose(cells[3], cells[256], atol=1e-6)


def visual_features(model, processor, image):
    """(encoded prompt, features of the visual tokens at the decoder's input: (V, d)).

    Vision attention is switched off, so that what a token holds is what its patch shows.
    """
    for name, parameter in model.named_parameters():
        is_output = re.search(r"\.(out_proj|projection_layer|proj)\.", name)
        if (
            re.search(r"vision|visual", name)
            and is_output
            and "attn" in name.replace("attention", "attn")
        ):
            parameter.zero_()
    prompt = encode_prompt(model, processor, chat_prompt(processor, CAPTION_PROMPT), [image])
    seen = []

    def look(module, _, inputs):
        seen.append(inputs["inputs_embeds"])

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    model.model(**join_prompts(model, [prompt]), use_cache=False)
    handle.remove()
    return prompt, seen[0][prompt["input_ids"] == model.config.image_token_id]


def assert_cells_lie_where_they_say(model, processor, size):
    """Inverts the pixels of each cell in turn: its own token must change most."""
    prompt, before = visual_features(model, processor, random_image(0, size))
    rows, columns, first = visual_grid(model, prompt)
    for r, c in itertools.product(range(rows), range(columns)):
        top, bottom = (round(x * size[1] / rows) for x in (r, r + 1))
        left, right = (round(x * size[0] / columns) for x in (c, c + 1))
        pixels = np.array(random_image(0, size))
        pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
        _, after = visual_features(model, processor, Image.fromarray(pixels))
        changed = (after - before)[first : first + rows * columns].norm(dim=-1)
        assert changed.argmax() == r * columns + c
    return rows, columns, first, len(before)


# Janus pads an oblong image to a square, so its cells are not those of the image
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "janus"])
@torch.no_grad()
def test_what_changes_in_a_cell_of_the_image_changes_the_token_of_that_cell(checkpoint, family):
    """Through the real processor and vision tower, for every cell of an oblong image."""
    model, processor = load_vlm(checkpoint(family), CPU)
    size = (24, 16) if "qwen" in family else (64, 48)
    rows, columns, first, visual = assert_cells_lie_where_they_say(model, processor, size)
    assert first == 0
    if "qwen" in family:
        # as wide as the image
        assert columns > rows > 1 and rows * columns == visual
    else:
        is_whole = rows * columns == visual
        assert rows == columns > 1 and is_whole == (family != "llava_onevision")


def load_with_tiles(checkpoint, family):
    """A tiny checkpoint whose processor cuts an image into tiles, as the released ones do."""
    model, processor = load_vlm(checkpoint(family), CPU)
    if family == "idefics3":
        tiles = [f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)]
        processor.tokenizer.add_special_tokens({"additional_special_tokens": tiles})
        model.resize_token_embeddings(len(processor.tokenizer))
        processor.image_processor = Idefics3ImageProcessor(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
    else:
        processor.image_processor.max_patches = 6
    return model, processor


@pytest.mark.parametrize("family", ("idefics3", "internvl"))
@torch.no_grad()
def test_of_an_image_in_tiles_the_overview_is_taken(checkpoint, family):
    model, processor = load_with_tiles(checkpoint, family)
    rows, columns, first, visual = assert_cells_lie_where_they_say(model, processor, (64, 48))
    assert rows == columns == 2 and first == visual - 4 >= 8


def test_a_family_whose_tokens_have_no_known_places_gets_no_map(checkpoint):
    model, processor = load_vlm(checkpoint("internvl"), CPU)
    prompt = encode_prompt(
        model, processor, chat_prompt(processor, CAPTION_PROMPT), [random_image(0)]
    )
    assert visual_grid(model, prompt) == (2, 2, 0)
    model.config.model_type = "another"
    assert visual_grid(model, prompt) is None
    assert attention_record({"sentences": []}, None, [], None) is None


def test_attention_on_one_token_lights_one_cell_and_sentences_average_their_own_tokens():
    record = {"id": "1", "image": "a.png", "caption": "Red cat. Dog."}
    # "Red", " cat", ".", " Dog", "."
    offsets = [(0, 3), (3, 7), (7, 8), (8, 12), (12, 13)]
    # two visual tokens before an overview of 2 x 3
    maps = torch.zeros(5, 8)
    maps[:3, 2 + 5] = torch.tensor([0.3, 0.6, 0.9])
    maps[3:, 2 + 1] = 0.25
    maps[:, 0] = 0.05
    shares = [1, *maps.sum(-1).tolist()]
    record = score_record(record, {"d_vis": shares, "density": shares}, None, offsets)
    sentences = [[0, 0, 0, 0, 0, 0.6], [0, 0.25, 0, 0, 0, 0]]
    expected = {"rows": 2, "columns": 3, "sentences": sentences}
    assert attention_record(record, (2, 3, 2), offsets, maps) == expected
