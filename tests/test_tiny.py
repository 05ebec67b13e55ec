"""The tiny checkpoints are worth testing with: they load like a user's, see the picture, and padding is harmless."""
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from tiny import FAMILIES, build, picture

SHORT, LONG = "What is the area?", "Describe the picture in one sentence, and count how many red circles are in it."
A, B = picture(1), picture(2, size=(40, 70))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, checkpoint):
    folder = checkpoint(request.param)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def encode(processor, samples):
    """samples: list of (text, images) -> processor output, left-padded"""
    texts = [processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}],
        add_generation_prompt=True, tokenize=False) for text, images in samples]
    return processor(text=texts, images=[images for _, images in samples], padding=True, padding_side="left",
                     return_tensors="pt")


def positions(model, inputs):
    """(3, B, S) for the M-RoPE families, else (B, S); counted from the first real token of each row"""
    if hasattr(model.model, "get_rope_index"):
        return model.model.get_rope_index(**inputs)[0]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def last_logits(model, inputs):
    return model(**inputs, position_ids=positions(model, inputs)).logits[:, -1]  # (B, V)


def test_it_is_small_and_its_ids_are_told_apart(loaded):
    model, processor = loaded
    assert model.num_parameters() < 1_000_000
    text, tokenizer = model.config.get_text_config(), processor.tokenizer
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (4, 4, 2)
    assert model.config.image_token_id == processor.image_token_id != tokenizer.unk_token_id
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    assert tokenizer.eos_token_id in eos and model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len({*eos, tokenizer.pad_token_id, model.config.image_token_id}) == len(eos) + 2
    assert max(tokenizer.get_vocab().values()) < model.get_input_embeddings().num_embeddings


def test_any_text_survives_encoding_and_decoding(loaded):
    tokenizer = loaded[1].tokenizer
    text = "Where is it? \\boxed{12} \n ünïcødé 日本"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_message_may_be_a_string_or_a_list_of_parts(loaded):
    def prompt(content):
        return loaded[1].apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert prompt(SHORT) == prompt([{"type": "text", "text": SHORT}]) and SHORT in prompt(SHORT)


def test_the_picture_reaches_the_last_logits(loaded):
    model, processor = loaded
    with torch.no_grad():
        one, other = (last_logits(model, encode(processor, [(SHORT, [image])])) for image in (A, picture(5)))
    assert (one - other).abs().max() > 0.1


def test_a_batch_of_unequal_pictures_and_texts_gives_visual_tokens_and_a_dynamic_cache(loaded):
    model, processor = loaded
    inputs = encode(processor, [(SHORT, [A]), (LONG, [B])])
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) > 0).all()
    assert not inputs["attention_mask"].all() and inputs["attention_mask"][:, -1].all()  # padded, and on the left
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_a_row_of_a_left_padded_batch_equals_the_row_alone(loaded):
    model, processor = loaded
    samples = [(SHORT, [A]), (LONG, [B])]
    batch = encode(processor, samples)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions(model, batch)).logits
        for row, sample in enumerate(samples):
            alone = encode(processor, [sample])
            expected = model(**alone, position_ids=positions(model, alone)).logits[0]
            real = logits[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(real, expected, atol=1e-4, rtol=0)


def test_two_images_in_one_prompt_are_both_seen_and_in_order(loaded):
    model, processor = loaded
    with torch.no_grad():
        forward, swapped, changed = (last_logits(model, encode(processor, [(SHORT, images)]))
                                     for images in ([A, B], [B, A], [A, picture(5, B.size)]))
    assert (forward - swapped).abs().max() > 0.1 and (forward - changed).abs().max() > 0.1


def test_the_gradient_reaches_every_part_of_the_vision_tower(loaded):
    model, processor = loaded
    model.zero_grad()
    last_logits(model, encode(processor, [(SHORT, [A])])).logsumexp(-1).sum().backward()
    # LLaVA-OneVision reads the hidden states before SigLIP's last norm, so that norm never learns, as released
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    model.zero_grad()
    assert all(name.startswith("model.vision_tower.post_layernorm") for name in silent), silent


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights_and_nothing_else(family, checkpoint, tmp_path):
    state = torch.get_rng_state()
    same, other = build(family, tmp_path / "same"), build(family, tmp_path / "other", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (same / name).read_bytes() == (checkpoint(family) / name).read_bytes(), name
    assert (same / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert (same / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
