"""What the study does to images and captions, and which patches it hides."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from toy_example import CAPTION, CIRCLE, TRUTH

from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompts,
    encode_responses,
    load_vlm,
)
from score_dependency import CAPTION_PROMPT, Scorer
from toy import probes
from toy.corruptions import CORRUPTIONS, corrupt, hide_patches, mislead, patches_of
from toy.world import PLACES, sample_pair


def some_image():
    return sample_pair(random.Random(0), 0.5)[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_strength_and_keep_size_and_original(kind):
    assert len(CORRUPTIONS[kind]) == 5
    for seed in range(5):
        image, _, _ = sample_pair(random.Random(seed), 0.5)
        before = image.tobytes()
        plain = np.asarray(image, dtype=float)
        corrupted = [corrupt(image, kind, strength, f"{seed}.png") for strength in range(1, 6)]
        change = [np.abs(np.asarray(c, dtype=float) - plain).mean() for c in corrupted]
        assert change == sorted(change) and change[-1] > change[0]
        assert all(c.size == image.size and c.mode == "RGB" for c in corrupted)
        assert image.tobytes() == before
        # the same for every model
        assert corrupt(image, kind, 3, f"{seed}.png").tobytes() == corrupted[2].tobytes()


def test_occlusion_stays_where_it_is_as_it_grows():
    white = Image.new("RGB", (64, 64), "white")
    covered = []
    for strength in range(1, 6):
        covered.append(np.asarray(corrupt(white, "occlusion", strength, "a.png")).min(-1) < 255)
    for smaller, larger in zip(covered, covered[1:]):
        assert (larger | smaller == larger).all()


def test_hidden_patches_are_the_right_pixels():
    image = Image.new("RGB", (64, 64), (120, 120, 120))
    image.paste((255, 0, 0), (10, 10, 64, 64))
    # row 0, column 1; row 1, column 2
    hidden = np.asarray(hide_patches(image, [1, 6]))
    expected = np.asarray(image).copy()
    expected[0:16, 16:32] = 120
    expected[16:32, 32:48] = 120
    assert (hidden == expected).all()


def test_patches_of_objects_are_the_quarters_in_which_they_lie():
    at = {place: patches_of([{"place": place}]) for place in PLACES}
    assert at["top left"] == [0, 1, 4, 5]
    assert at["bottom right"] == [10, 11, 14, 15]
    assert sorted(sum(at.values(), [])) == list(range(16))
    both = patches_of([{"place": "top right"}, {"place": "bottom left"}])
    assert both == [2, 3, 6, 7, 8, 9, 12, 13]


@torch.no_grad()
@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_the_shares_that_patches_are_ordered_by_are_those_of_eager_maps(checkpoint, family):
    """Equation (1) by visual token, as Probe.patches() takes it, against the plain maps."""
    image = some_image()
    model, processor = load_vlm(checkpoint(family), torch.device("cpu"))
    scorer = Scorer(model, processor, [1])
    *_, cells = scorer([scorer.prepare(image, CAPTION)], maps=True)[0]

    model.set_attn_implementation({"text_config": "eager"})
    ids, mask, _ = encode_responses(processor, [CAPTION], model.device)
    prompt = chat_prompt(processor, CAPTION_PROMPT)
    batch = append_responses(encode_prompts(model, processor, [prompt], [[image]]), ids, mask)
    output = model.model(**batch, use_cache=False, output_attentions=True)
    rows = output.attentions[1][0].mean(0)[-ids.shape[1] :]  # (S, N)
    to_visual = rows[:, batch["input_ids"][0] == model.config.image_token_id]
    to_text = rows[:, -ids.shape[1] :]
    shares = to_visual / (to_visual.sum(-1, keepdim=True) + to_text.sum(-1, keepdim=True))
    torch.testing.assert_close(cells, shares, atol=1e-5, rtol=0)


class FakeScorer:
    """A sentence "A a." that looks at patch 3, and "B b.", which looks at 9, then 4, least at 3."""

    def __init__(self, model, processor):
        self.offsets = [(0, 1), (2, 4), (5, 6), (7, 9)]
        self.cells = torch.full((4, 16), 0.1)
        self.cells[:2, 3] = 5.0
        self.cells[2:, 9] = 3.0
        self.cells[2:, 4] = 2.0
        self.cells[2:, 3] = 0.0

    def prepare(self, image, caption):
        assert caption == "A a. B b."

    def __call__(self, prepared, maps):
        return [(None, None, self.offsets, self.cells)]


def test_attended_patches_are_those_with_the_largest_shares_of_the_masks_sentence(monkeypatch):
    """The other object is at the bottom right."""
    monkeypatch.setattr(probes, "Scorer", FakeScorer)
    image = some_image()
    probe = probes.Probe.__new__(probes.Probe)
    probe.model = probe.processor = None
    probe.records = [{"id": "x", "caption": "A a. B b."}]
    objects = [{"place": "bottom right"}, {"place": "top left"}]
    sentences = [{"start": 0, "end": 4, "object": 0}, {"start": 5, "end": 9, "object": 1}]
    probe.truth = {"x": {"sentences": sentences, "objects": objects}}
    probe.masks = [{"id": "x", "start": 5, "end": 6}]
    probe.images = [image]
    probe.metrics = lambda masks, images: images[0].tobytes()

    results = probe.patches(0)
    assert results["0"]["none"] == image.tobytes()
    assert results["1"]["attended"] == hide_patches(image, [9]).tobytes()
    assert results["2"]["attended"] == hide_patches(image, [9, 4]).tobytes()
    assert results["1"]["least"] == hide_patches(image, [3]).tobytes()
    assert results["4"]["objects"] == hide_patches(image, [10, 11, 14, 15]).tobytes()


def test_misleading_text_names_the_stereotype_of_an_object_that_has_another_colour():
    caption = f"{CAPTION} The top right holds a small white square."
    two = {
        "objects": [*TRUTH["x"]["objects"], {**CIRCLE, "colour": "white"}],
        "sentences": [
            *TRUTH["x"]["sentences"],
            {"start": 64, "end": len(caption), "object": 1},
        ],
    }
    masked = caption.replace("large red circle", "[MASK]")
    mask = {"start": 46, "end": 62, "answer": "large red circle", "masked_caption": masked}
    assert mislead(mask, two, caption) == (
        "A circle has no corners. The top left holds a [MASK]. The top left holds a large red circle."
    )
    # there is no other object
    assert mislead(mask, TRUTH["x"], CAPTION) is None
    # no colour is hidden
    assert mislead({**mask, "answer": "circle"}, two, caption) is None
    # the sentence is about no object
    assert mislead({"start": 2, "end": 8, "answer": "circle"}, two, caption) is None
    # it would be true
    red = {**two, "objects": [{**thing, "colour": "red"} for thing in two["objects"]]}
    assert mislead(mask, red, caption) is None
