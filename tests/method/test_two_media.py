"""Drawing: codes of an image are sampled and scored as a plain computation and transformers do."""

import pytest
import torch
from test_shared_prefix import assert_same_gradients, gradients

from common.policy import Policy
from common.training import uniforms_of
from common.vlm import chat_prompt, encode_prompt, join_prompts, load_vlm

CPU = torch.device("cpu")
G = 3
N = 16  # codes of an image
TEXTS = ["A red thing.", "What is it? The large green circle is in the left."]


def encode(policy, texts=TEXTS):
    """Prompts of different lengths, which end with the token that begins an image."""
    begin = policy.processor.image_start_token
    prompts = [chat_prompt(policy.processor, text, images=0) + begin for text in texts]
    encoded = [encode_prompt(policy.model, policy.processor, text, [], N) for text in prompts]
    return join_prompts(policy.model, encoded)


def plain_logits(model, prompt_ids, codes):
    """(N, codebook) of one prompt (P,) and its codes (N,), in one pass without a cache."""
    prompt = model.get_input_embeddings()(prompt_ids)
    drawn = model.prepare_embeddings_for_image_generation(codes[:-1])
    hidden = model.model.language_model(inputs_embeds=torch.cat([prompt, drawn])[None])
    # the state at the begin of the image predicts the first code
    return model.model.generation_head(hidden.last_hidden_state[0, len(prompt_ids) - 1 :])


def plain_logps(policy, batch, ids, guidance):
    """Log-probs (B*G, N), one completion at a time; with guidance of two passes each."""
    tokenizer = policy.processor.tokenizer
    begin = tokenizer.convert_tokens_to_ids("<begin_of_image>")
    rows = []
    for i, codes in enumerate(ids):
        prompt = batch["input_ids"][i // G][batch["attention_mask"][i // G].bool()]
        logits = plain_logits(policy.model, prompt, codes)
        if guidance != 1:
            keep = (prompt == tokenizer.bos_token_id) | (prompt == begin)
            empty = torch.where(keep, prompt, tokenizer.pad_token_id)
            unconditional = plain_logits(policy.model, empty, codes)
            logits = unconditional + guidance * (logits - unconditional)
        logps = (logits / policy.temperature).log_softmax(-1)
        rows.append(logps.gather(1, codes[:, None])[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_codes_are_scored_as_each_image_alone_would_be_gradients_included(guidance, checkpoint):
    policy = Policy(*load_vlm(checkpoint("janus"), CPU), temperature=0.8, guidance=guidance)
    batch = encode(policy)
    # the prompts differ in length, so one is padded
    assert not batch["attention_mask"].all()
    uniforms = uniforms_of(1, [0, 1], G, N, seed=0)
    ids, mask, logps, entropy = policy(batch, G, uniforms, medium="image")
    assert ids.shape == (2 * G, N) and mask.all() and ids.max() < 48
    expected = plain_logps(policy, batch, ids, guidance)
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=0)

    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    expected = gradients(policy, (expected * weights).sum())
    _, _, logps, _ = policy(batch, G, ids=ids, mask=mask, medium="image")
    actual = gradients(policy, (logps * weights).sum())
    # through the Llama and what draws, and not through what reads
    assert any("generation_head" in name for name in actual)
    assert not any("vision_model" in name or "lm_head" in name for name in actual)
    assert_same_gradients(actual, expected)


def draw(policy, batch, guidance):
    """The codes that transformers draws greedily."""
    tokenizer = policy.processor.tokenizer
    config = policy.model.generation_config
    config.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<begin_of_image>")}
    config.bos_token_id = tokenizer.bos_token_id
    return policy.model.generate(
        inputs=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_mode="image",
        guidance_scale=guidance,
        do_sample=False,
    )


@pytest.mark.parametrize("text", TEXTS)
def test_greedy_with_guidance_equals_what_transformers_draws(text, checkpoint):
    policy = Policy(*load_vlm(checkpoint("janus"), CPU), temperature=0, guidance=5.0)
    batch = encode(policy, [text])
    ids, _, _, _ = policy(batch, 1, torch.zeros(1, N), medium="image")
    plain = Policy(*load_vlm(checkpoint("janus"), CPU))
    plain.model.set_attn_implementation("sdpa")
    assert ids.tolist() == draw(plain, batch, 5.0).tolist()
    assert len(set(ids[0].tolist())) > 2


def test_a_model_that_has_learned_two_images_draws_them(checkpoint):
    """A shift by one position would show here, as it does not in an untrained model."""
    model, processor = load_vlm(checkpoint("janus"), CPU)
    policy = Policy(model, processor, temperature=0)
    batch = encode(policy)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 48, (2, N), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = 0
        for prompt, mask, codes in zip(batch["input_ids"], batch["attention_mask"], images):
            logits = plain_logits(model, prompt[mask.bool()], codes)
            loss = loss + torch.nn.functional.cross_entropy(logits, codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    ids, _, _, _ = policy(batch, 1, torch.zeros(2, N), medium="image")
    assert ids.tolist() == images.tolist()
