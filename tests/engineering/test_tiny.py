"""The tiny checkpoints are worth testing with.

They load like a user's, the image reaches their logits, and padding is harmless.
"""

import pytest
import torch
from tiny import FAMILIES, build, random_image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

SHORT = "What is the area?"
LONG = "Describe the picture in one sentence, and count how many red circles are in it."
A = random_image(1)
B = random_image(2, size=(40, 70))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, checkpoint):
    folder = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def encode(processor, samples):
    """The left-padded processor output of samples, a list of (text, images)."""
    prompts = []
    for text, images in samples:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompts.append(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    return processor(
        text=prompts,
        images=[images for _, images in samples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def positions(model, inputs):
    """(3, B, S) for the M-RoPE families, else (B, S), counted from the first real token."""
    if hasattr(model.model, "get_rope_index"):
        return model.model.get_rope_index(**inputs)[0]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def last_logits(model, inputs):
    return model(**inputs, position_ids=positions(model, inputs)).logits[:, -1]  # (B, vocabulary)


def test_it_is_small_and_its_ids_are_told_apart(loaded):
    model, processor = loaded
    assert model.num_parameters() < 1_000_000
    text = model.config.get_text_config()
    assert text.num_hidden_layers == 4
    assert text.num_attention_heads == 4
    assert text.num_key_value_heads == 2

    tokenizer = processor.tokenizer
    image_token = model.config.image_token_id
    assert image_token == tokenizer.convert_tokens_to_ids(processor.image_token)
    assert image_token != tokenizer.unk_token_id
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    assert tokenizer.eos_token_id in eos
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len({*eos, tokenizer.pad_token_id, image_token}) == len(eos) + 2
    largest_id = max(tokenizer.get_vocab().values())
    assert largest_id < model.get_input_embeddings().num_embeddings


def test_any_text_survives_encoding_and_decoding(loaded):
    tokenizer = loaded[1].tokenizer
    text = "Where is it? \\boxed{12} \n ünïcødé 日本"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_message_may_be_a_string_or_a_list_of_parts(loaded):
    def prompt(content):
        messages = [{"role": "user", "content": content}]
        return loaded[1].apply_chat_template(messages, tokenize=False)

    assert SHORT in prompt(SHORT)
    assert prompt(SHORT) == prompt([{"type": "text", "text": SHORT}])


def test_the_image_reaches_the_last_logits(loaded):
    model, processor = loaded
    with torch.no_grad():
        logits = last_logits(model, encode(processor, [(SHORT, [A])]))
        of_another_image = last_logits(model, encode(processor, [(SHORT, [random_image(5)])]))
    assert (logits - of_another_image).abs().max() > 0.1


def test_a_batch_of_unequal_images_and_texts_gives_visual_tokens_and_a_dynamic_cache(loaded):
    model, processor = loaded
    inputs = encode(processor, [(SHORT, [A]), (LONG, [B])])
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) > 0).all()
    # padded, and on the left
    assert not inputs["attention_mask"].all()
    assert inputs["attention_mask"][:, -1].all()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_a_sample_of_a_left_padded_batch_equals_the_sample_alone(loaded):
    model, processor = loaded
    samples = [(SHORT, [A]), (LONG, [B])]
    batch = encode(processor, samples)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions(model, batch)).logits
        for i, sample in enumerate(samples):
            alone = encode(processor, [sample])
            expected = model(**alone, position_ids=positions(model, alone)).logits[0]
            unpadded = logits[i, batch["attention_mask"][i].bool()]
            torch.testing.assert_close(unpadded, expected, atol=1e-4, rtol=0)


def test_two_images_in_one_prompt_are_both_seen_and_in_order(loaded):
    model, processor = loaded

    @torch.no_grad()
    def logits_of(*images):
        return last_logits(model, encode(processor, [(SHORT, list(images))]))

    logits = logits_of(A, B)
    assert (logits - logits_of(B, A)).abs().max() > 0.1
    assert (logits - logits_of(A, random_image(5, B.size))).abs().max() > 0.1


def test_the_gradient_reaches_every_part_of_the_vision_tower(loaded):
    model, processor = loaded
    model.zero_grad()
    last_logits(model, encode(processor, [(SHORT, [A])])).logsumexp(-1).sum().backward()
    without_gradient = []
    for name, weight in model.named_parameters():
        if weight.grad is None or not weight.grad.any():
            without_gradient.append(name)
    model.zero_grad()
    # LLaVA-OneVision reads the hidden states before SigLIP's last norm, so that norm never
    # learns, as released
    norm = "model.vision_tower.post_layernorm"
    # what Janus draws with
    drawing = ("model.vqmodel", "model.generation_")
    assert all(name.startswith((norm, *drawing)) for name in without_gradient), without_gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights_and_nothing_else(family, checkpoint, tmp_path):
    state = torch.get_rng_state()
    same = build(family, tmp_path / "same")
    other = build(family, tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (same / name).read_bytes() == (checkpoint(family) / name).read_bytes(), name

    assert (same / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (same, other)]
    assert weights[0] != weights[1]
