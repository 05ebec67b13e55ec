"""The drawing world: every prompt has one right drawing, and the detector makes no mistake."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.geneval import clauses, verdict
from toy.drawing import (
    CORNERS,
    compose,
    detect,
    make_drawing_world,
    nearest,
    prompt_record,
    sample_drawing,
    tiles,
)
from toy.janus import N_CODES, k_means, make_janus, make_janus_processor, random_drawings
from toy.judge import change_a_word
from toy.lvrpo_stages import FULL, MODELS, RUNS, SAMPLINGS, stages
from toy.lvrpo_world import diversity, drawing_metrics
from toy.world import COLOURS, STEREOTYPE, load_truth


def samples(n, bias, seed=0):
    rng = random.Random(seed)
    return [sample_drawing(rng, bias) for _ in range(n)]


def test_there_are_31_tiles_and_no_two_are_alike():
    pixels = {tile.tobytes() for tile in tiles().values()}
    assert len(tiles()) == 31 and len(pixels) == 31


def test_the_detector_finds_what_was_drawn_in_spite_of_noise():
    noise = np.random.default_rng(0)
    for image, _, truth in samples(50, 0.5):
        blurred = np.asarray(image) + noise.normal(0, 20, (32, 32, 3))
        found = nearest(Image.fromarray(blurred.clip(0, 255).astype(np.uint8)))
        drawn = {o["place"]: (o["kind"], o["colour"], o["size"]) for o in truth["objects"]}
        assert {place: name for place, name in found.items() if name} == drawn


@pytest.mark.parametrize("bias", (0.0, 1.0))
def test_a_drawing_is_right_exactly_if_the_prompt_does_not_lie(bias):
    lies = 0
    for image, caption, truth in samples(60, bias):
        record = {"id": "1", "image": "1.png", "caption": caption}
        said = prompt_record(record, truth, say_truth=False)
        true = prompt_record(record, truth, say_truth=True)
        (objects,) = detect([image], [said])
        assert verdict(objects, true)
        lied = any(sentence["lies"] for sentence in truth["sentences"])
        assert verdict(objects, said) == (not lied)
        lies += lied
    assert lies == 0 if bias == 0 else lies > 30


def test_every_clause_of_a_prompt_can_fail():
    """The drawing of "a large red circle at the top left", with one thing wrong at a time."""
    record = {"id": "1", "image": "1.png", "caption": "The top left holds a large red circle."}
    thing = {"kind": "circle", "colour": "red", "size": "large", "place": "top left"}
    sentence = {"start": 0, "end": len(record["caption"]), "object": 0}
    truth = {"objects": [thing], "sentences": [sentence]}
    prompt = prompt_record(record, truth, say_truth=False)
    assert prompt["prompt"] == record["caption"] and prompt["tag"] == "1 shape"
    wrong = {
        "red shape at the top left": {"top left": ("circle", "blue", "large")},
        "1 circle at the top left": {"top left": ("square", "red", "large")},
        "1 large shape at the top left": {"top left": ("circle", "red", "small")},
        "fewer than 1 shape at the bottom left": {
            "top left": ("circle", "red", "large"),
            "bottom left": ("square", "red", "small"),
        },
    }
    for clause, objects in wrong.items():
        (found,) = detect([compose(objects)], [prompt])
        assert [name for name, holds in clauses(found, prompt) if not holds] == [clause]
    (nothing,) = detect([compose({})], [prompt])
    assert not any(holds for name, holds in clauses(nothing, prompt) if "fewer" not in name)


def test_held_out_prompts_tell_the_truth_and_those_of_training_what_captions_say(tmp_path):
    make_drawing_world(tmp_path, 60, 30, 0.8, seed=1)
    truth = load_truth(tmp_path)
    said = {}
    for split in ("train", "val"):
        lines = (tmp_path / f"prompts_{split}.jsonl").read_text().splitlines()
        said[split] = [json.loads(line) for line in lines]
    assert len(said["train"]) == 60 and len(said["val"]) == 30
    for split, prompts in said.items():
        agree = 0
        for prompt in prompts:
            painted = {o["place"]: o["colour"] for o in truth[prompt["id"]]["objects"]}
            asked = {w["class"][len("shape at the ") :]: w["color"] for w in prompt["include"][::3]}
            assert set(asked) == set(painted)
            assert all(f" {colour} " in prompt["prompt"] for colour in asked.values())
            agree += asked == painted
        assert agree == 30 if split == "val" else agree < 40


def test_a_changed_word_makes_a_sentence_false():
    rng = random.Random(0)
    for _, caption, truth in samples(40, 0.0):
        record = {"id": "1", "image": "1.png", "caption": caption}
        prompt = prompt_record(record, truth, say_truth=True)["prompt"]
        changed = change_a_word(rng, prompt)
        assert changed != prompt
        assert len(changed.split()) == len(prompt.split())


def test_drawings_of_the_vq_vae_are_those_of_the_world():
    images, weights = random_drawings(np.random.default_rng(0), 4)
    assert images.shape == (4, 3, 32, 32) and weights.shape == (4, 32, 32)
    assert images.min() >= -1 and images.max() <= 1
    # edges count more, and there are some
    assert set(weights.unique().tolist()) == {1.0, 9.0}
    pixels = ((images[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    found = nearest(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(compose({p: n for p, n in found.items() if n})), pixels)


def test_k_means_finds_separate_directions():
    torch.manual_seed(0)
    directions = torch.eye(4)
    vectors = directions.repeat(20, 1) + 0.05 * torch.randn(80, 4)
    centres = k_means(torch.nn.functional.normalize(vectors, dim=1), 4)
    assert (centres @ directions.T).amax(1).min() > 0.99
    assert len(set((centres @ directions.T).argmax(1).tolist())) == 4


def test_the_tiny_janus_has_as_many_codes_as_the_processor_gives_visual_tokens():
    processor = make_janus_processor(["The top left holds a large red circle."])
    model = make_janus(processor.tokenizer)
    vision = model.config.vision_config
    assert vision.num_image_tokens == N_CODES == processor.num_image_tokens == 16
    pixels = processor.image_processor([compose({})], return_tensors="pt")["pixel_values"]
    # as the VQ-VAE has them: grey is 0, and nothing is resized
    assert pixels.shape == (1, 3, 32, 32) and pixels.abs().max() < 0.01
    assert model.model.vqmodel.encoder(pixels).shape[-2:] == (4, 4)


def test_every_model_is_trained_and_judged_by_commands_that_name_its_files():
    by_name = {s.name: s for step in stages("out", 7, FULL) for lane in step for s in lane}
    assert {f"train {name}" for name in RUNS} <= set(by_name)
    assert len([name for name in by_name if name.startswith("draw ")]) == 15
    assert len(MODELS) * len(SAMPLINGS) == 15
    alone = by_name["train drawing"].command
    assert alone[alone.index("--draw-share") + 1] == "1" and "--seed" in alone
    assert "--objective" in by_name["train sft"].command
    evaluated = by_name["draw both, greedy"].command
    assert evaluated[evaluated.index("--model") + 1] == "out/both/checkpoint-150"
    assert evaluated[evaluated.index("--temperature") + 1] == "0"


def test_obedience_is_counted_by_whether_the_colour_is_the_stereotype():
    """A red circle was asked for and drawn blue; a red square was asked for and drawn."""
    objects = {"top left": ("circle", "blue", "small"), "top right": ("square", "red", "small")}
    include = []
    for place, kind in (("top left", "circle"), ("top right", "square")):
        include.append({"class": f"shape at the {place}", "count": 1, "color": "red"})
        include.append({"class": f"{kind} at the {place}", "count": 1})
        include.append({"class": f"small shape at the {place}", "count": 1})
    prompt = {"id": "a", "include": include}
    assert STEREOTYPE["circle"] == "red" and set(CORNERS) > set(objects) and "red" in COLOURS
    (found,) = detect([compose(objects)], [prompt])
    held = clauses(found, prompt)
    drawing = {"id": "a", "clauses": held, "right": int(all(ok for _, ok in held))}
    metrics = drawing_metrics([drawing], {"a": prompt})
    assert metrics["stereotype_obeyed"] == 0 and metrics["other_obeyed"] == 1
    assert metrics["kind"] == metrics["place"] == metrics["size"] == 1 and metrics["right"] == 0


def test_drawings_of_one_prompt_are_different_if_they_show_something_else(tmp_path):
    """Noise makes no difference; of two prompts with two samples each, one repeats itself."""
    circle = {"top left": ("circle", "blue", "small")}
    square = {"top left": ("square", "blue", "small")}
    drawings = []
    for i, (name, objects) in enumerate(
        [("a", circle), ("a", circle), ("b", circle), ("b", square)]
    ):
        image = compose(objects)
        image.putpixel((31, 31), (120 + i, 120, 120))
        image.save(tmp_path / f"{i}.png")
        drawings.append({"id": name, "image": f"{i}.png"})
    assert diversity(tmp_path, drawings) == 3 / 4
