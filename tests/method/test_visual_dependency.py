"""Equation (1) and the density ratio, row by row, against plain slow computation."""

import argparse
import math

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, random_image

import score_dependency
from common.recording import layer_list
from common.records import BadRecord
from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompts,
    encode_responses,
    load_vlm,
)
from score_dependency import (
    CAPTION_PROMPT,
    Scorer,
    attention_mass,
    density_ratio,
    visual_share,
)

CPU = torch.device("cpu")
CAPTIONS = ["A large red circle is in the middle. A circle has no corners.", "Two dogs run."]


def full_attention_maps(model, processor, image, caption):
    """(maps of all layers, heads averaged: list of (N, N); which of N tokens are visual; S)."""
    ids, mask, _ = encode_responses(processor, [caption], CPU)
    prompts = encode_prompts(model, processor, [chat_prompt(processor, CAPTION_PROMPT)], [[image]])
    batch = append_responses(prompts, ids, mask)
    maps = model(**batch, output_attentions=True, use_cache=False).attentions
    visual = batch["input_ids"][0] == model.config.image_token_id
    return [layer[0].mean(0) for layer in maps], visual, ids.shape[1]


def slow_scores(model, processor, image, caption, layers):
    """(visual shares, density ratios) of the caption's tokens by full maps, with loops and all."""
    maps, is_visual, S = full_attention_maps(model, processor, image, caption)
    N = len(is_visual)
    visual = [x for x in range(N) if is_visual[x]]
    shares = []
    ratios = []
    for t in range(N - S, N):
        share = 0
        ratio = 0
        for layer in layers:
            to_visual = sum(maps[layer][t, v].item() for v in visual)
            to_text = sum(maps[layer][t, x].item() for x in range(N - S, N))
            share += to_visual / (to_visual + to_text)
            visible = t - (N - S) + 1
            ratio += math.log((to_visual / len(visual)) / (to_text / visible))
        shares.append(share / len(layers))
        ratios.append(ratio / len(layers))
    return shares, ratios


# ---------------------------------------------------------------- equation (1), row by row


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_equal_those_of_full_attention_maps_in_a_padded_batch(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    images = [random_image(0), random_image(1, (48, 80))]
    scorer = Scorer(model, processor, [1, 2])
    fused = scorer([scorer.prepare(*pair) for pair in zip(images, CAPTIONS)])
    slow, _ = load_vlm(checkpoint(family), CPU)
    slow.set_attn_implementation("eager")
    for image, caption, (rows, _, offsets) in zip(images, CAPTIONS, fused):
        shares, ratios = slow_scores(slow, processor, image, caption, [1, 2])
        assert len(shares) == len(offsets)
        # the row that predicts the first token sees no text
        assert rows["d_vis"] == pytest.approx([1, *shares], abs=1e-5)
        assert rows["density"] == pytest.approx([ratios[0], *ratios], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_scorer_leaves_the_model_as_it_was(checkpoint, family):
    """Logits, layers and attention; several Scorers on one model do not see each other."""
    model, processor = load_vlm(checkpoint(family), CPU)
    ids, mask, _ = encode_responses(processor, CAPTIONS, CPU)
    prompts = [chat_prompt(processor, CAPTION_PROMPT)] * 2
    images = [[random_image(0)], [random_image(1, (48, 80))]]
    batch = append_responses(encode_prompts(model, processor, prompts, images), ids, mask)
    attention = model.config.get_text_config()._attn_implementation
    layers = list(model.get_decoder().layers)
    before = model(**batch).logits

    results = []
    for chosen in ([0], [1, 2], [0]):
        scorer = Scorer(model, processor, chosen)
        results.append(scorer([scorer.prepare(random_image(2), "x y")])[0])
    assert results[0] == results[2] != results[1]
    assert list(model.get_decoder().layers) == layers
    assert model.config.get_text_config()._attn_implementation == attention
    assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
def test_a_pass_that_fails_leaves_the_model_as_it_was(checkpoint, monkeypatch):
    model, processor = load_vlm(checkpoint("qwen3_vl"), CPU)
    scorer = Scorer(model, processor, [0])
    prepared = scorer.prepare(random_image(0), "x y")

    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(score_dependency, "attention_mass", out_of_memory)
        scorer([prepared])
    assert len(model.get_decoder().layers) == 4
    assert scorer([prepared])[0][0]["d_vis"][0] == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recording_leaves_the_logits_as_they_are(checkpoint, family):
    """With --ablation, log-probs come from the very pass that records the attention."""
    model, processor = load_vlm(checkpoint(family), CPU)
    scorer = Scorer(model, processor, ablation=True)
    prompts, ids, _ = scorer.prepare(random_image(0), CAPTIONS[0])
    ids = ids[None]
    mask = torch.ones_like(ids)
    recorded = scorer._run([prompts[0]], ids, mask)
    encoded = encode_prompts(
        model, processor, [chat_prompt(processor, CAPTION_PROMPT)], [[random_image(0)]]
    )
    logits = model(**append_responses(encoded, ids, mask)).logits[:, -ids.shape[1] - 1 : -1]
    plain = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(recorded, plain, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_the_chosen_ones_are_not_run_and_not_missed(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    calls = []
    for i, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    results = []
    for ablation, layers_run in ((False, [0, 1, 2]), (True, [0, 1, 2, 3] * 2)):
        calls.clear()
        scorer = Scorer(model, processor, [0, 2], ablation)
        results.append(scorer([scorer.prepare(random_image(0), CAPTIONS[0])])[0][0])
        assert calls == layers_run
    assert results[0] == results[1] and len(set(results[0]["d_vis"])) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_a_difference_of_log_probs_and_needs_the_image(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    scorer = Scorer(model, processor, ablation=True)
    _, gains, offsets = scorer([scorer.prepare(random_image(0), CAPTIONS[0])])[0]

    @torch.no_grad()
    def log_probs(image):
        """Token by token, from a growing sequence without any padding."""
        ids, mask, _ = encode_responses(processor, CAPTIONS[:1], CPU)
        text = chat_prompt(processor, CAPTION_PROMPT)
        prompt = encode_prompts(model, processor, [text], [[image]])
        values = []
        for i in range(ids.shape[1]):
            batch = append_responses(prompt, ids[:, :i], mask[:, :i]) if i else prompt
            hidden = model.model(**batch).last_hidden_state
            values.append(model.lm_head(hidden)[0, -1].log_softmax(-1)[ids[0, i]].item())
        return values

    grey = Image.new("RGB", random_image(0).size, (127, 127, 127))
    expected = [a - b for a, b in zip(log_probs(random_image(0)), log_probs(grey))]
    assert len(gains) == len(offsets)
    assert gains == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1e-3


def test_visual_share_by_hand():
    """Visual keys 0 and 1, caption keys 2 and 3; all logits 0 except that of key 0, log 3."""
    key = torch.tensor([[3.0], [1], [1], [1]]).log()[None, None]
    visual = torch.tensor([[True, True, False, False]])
    text = torch.tensor([[True, True]])
    mass = attention_mass(torch.ones(1, 1, 4, 1), key, None, 1.0, visual, text)
    # row 1 sees keys 0-1, row 2 keys 0-2, row 3 keys 0-3
    assert visual_share(*mass)[0].tolist() == pytest.approx([1, 4 / 5, 4 / 6])


def test_density_ratio_by_hand():
    """The keys of the test above: the image gets 4 for 2 tokens, the text 1 per visible token."""
    to_visual = torch.tensor([[1, 4 / 5, 4 / 6]])
    to_text = torch.tensor([[0, 1 / 5, 2 / 6]])
    ratio = density_ratio(to_visual, to_text, torch.tensor([[2]]), torch.tensor([[0, 1, 2]]))
    # (4/5 / 2) / (1/5 / 1) = 2, and (4/6 / 2) / (2/6 / 2) = 2; the first row takes the second's
    assert ratio[0].tolist() == pytest.approx([math.log(2)] * 3)


def test_density_ratio_of_even_attention_is_zero_whatever_the_place():
    """Where every key gets the same attention, the published share falls and the ratio does not."""
    visual = torch.zeros(1, 16, dtype=torch.bool)
    visual[:, :6] = True
    text = torch.ones(1, 10, dtype=torch.bool)
    zeros = torch.zeros(1, 1, 16, 4)
    mass = attention_mass(zeros, zeros, None, 1.0, visual, text)
    share = visual_share(*mass)[0]
    assert share.tolist() == pytest.approx([6 / (6 + n) for n in range(11)])
    ratio = density_ratio(*mass, torch.tensor([[6]]), torch.arange(11)[None])
    assert ratio.abs().max() < 1e-5


def test_density_ratio_stays_finite_where_a_softmax_underflows():
    mass = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert density_ratio(*mass, torch.tensor([[4]]), torch.tensor([[0, 1, 2]])).isfinite().all()


@pytest.mark.parametrize("masked", ("causal", "boolean", "additive"))
def test_rows_in_chunks_give_the_shares_of_one_softmax_over_everything(masked):
    """Grouped keys, padding on both sides, and chunks of 3 rows that do not divide the 8."""
    torch.manual_seed(0)
    B, N, S = 2, 20, 7
    query = torch.randn(B, 4, N, 8)
    key = torch.randn(B, 2, N, 8)
    visual = torch.zeros(B, N, dtype=torch.bool)
    visual[:, 2:9] = True
    text = torch.ones(B, S, dtype=torch.bool)
    text[1, 5:] = False
    seen = torch.ones(N, N, dtype=torch.bool).tril()[None, None].repeat(B, 1, 1, 1)
    if masked != "causal":
        seen[1, :, 3:, :2] = False  # left padding

    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    maps = logits.masked_fill(~seen, float("-inf")).softmax(-1).mean(1)
    to_visual = (maps * visual[:, None]).sum(-1)[:, -S - 1 :]
    to_text = (maps[:, -S - 1 :, -S:] * text[:, None]).sum(-1)
    additive = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    mask = {"causal": None, "boolean": seen, "additive": additive}[masked]
    mass = attention_mass(query, key, mask, 0.3, visual, text, chunk=3)
    assert torch.allclose(mass[0], to_visual, atol=1e-6)
    assert torch.allclose(mass[1], to_text, atol=1e-6)
    assert (visual_share(*mass)[:, 0] == 1).all()


def test_heads_are_averaged_before_the_ratio():
    """Keys: a sink, in neither V nor T; a visual token; a text token. Softmax over all three."""
    key = torch.stack([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])]).log().view(1, 2, 2, 1)
    key = torch.cat([torch.full((1, 2, 1, 1), 8.0).log(), key], 2)
    visual = torch.tensor([[False, True, False]])
    mass = attention_mass(torch.ones(1, 2, 3, 1), key, None, 1.0, visual, torch.tensor([[True]]))
    to_visual = 3 / 12 + 1 / 10
    to_text = 1 / 12 + 1 / 10
    assert visual_share(*mass)[0, 1].item() == pytest.approx(to_visual / (to_visual + to_text))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_longer_than_the_model_is_refused_and_never_cut(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    limit = model.config.get_text_config().max_position_embeddings
    prompt = chat_prompt(processor, "word " * 2 * limit)
    with pytest.raises(BadRecord, match=f"exceeds the model's {limit}"):
        encode_prompts(model, processor, [prompt], [[random_image(0)]])


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_contains_an_image_token_is_refused(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    with pytest.raises(BadRecord, match="image token"):
        chat_prompt(processor, f"a {processor.image_token} in the text")
    with pytest.raises(BadRecord, match="image token"):
        encode_responses(processor, [f"a {processor.image_token} in the text"], CPU)


def test_a_layer_that_is_named_twice_counts_once():
    assert layer_list("2,2") == [2] and layer_list("3-5,5,1") == [1, 3, 4, 5]
    with pytest.raises(argparse.ArgumentTypeError, match="14-20"):
        layer_list("7-5")


def test_a_layer_that_the_decoder_lacks_is_refused(checkpoint):
    model, processor = load_vlm(checkpoint("internvl"), CPU)
    with pytest.raises(SystemExit, match="layers 0 to 3"):
        Scorer(model, processor, [2, 4])
