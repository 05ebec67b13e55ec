"""The shared prefix is exact: log-probs and every gradient are those of each completion run alone
with a prompt of its own."""

import pytest
import torch
from tiny import FAMILIES, random_image

import common.policy
from common.policies import freeze_unused
from common.policy import Policy, decode
from common.training import uniforms_of
from common.vlm import append_responses, chat_prompt, encode_prompts, load_vlm, token_logps

CPU = torch.device("cpu")
G = 4  # completions per prompt
S = 6  # tokens per completion
TEMPERATURE = 0.8
TEXTS = ["A red thing.", "What is it? The large [MASK] circle is in the left."]
IMAGES = [random_image(0), random_image(1, (48, 80))]


@pytest.fixture
def policy(checkpoint, request):
    model, processor = load_vlm(checkpoint(request.param), CPU)
    return Policy(model, processor, TEMPERATURE)


def encode(policy, which=(0, 1), repeat=1):
    """The batch of prompts `which`, each `repeat` times."""
    indices = [i for i in which for _ in range(repeat)]
    prompts = [chat_prompt(policy.processor, TEXTS[i]) for i in indices]
    images = [[IMAGES[i]] for i in indices]
    return encode_prompts(policy.model, policy.processor, prompts, images)


def uniforms(places=(0, 1), length=S):
    return uniforms_of(1, places, G, length, seed=0)


def plain_logps(policy, batch, ids, mask):
    """Every prompt with its completion in one ordinary pass, without a cache."""
    joined = append_responses(batch, ids, mask)
    hidden = policy.model.model(**joined, use_cache=False).last_hidden_state
    logits = policy.model.lm_head(hidden[:, -ids.shape[1] - 1 : -1]) / TEMPERATURE
    logits[..., policy.suppressed_ids] = float("-inf")
    return token_logps(logits, ids)


def present_gradients(policy):
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return present_gradients(policy)


def assert_same_gradients(actual, expected):
    """Relative to each, but a gradient that is 0 in theory consists of rounding only."""
    assert actual.keys() == expected.keys()
    scale = max(g.norm() for g in expected.values())
    for name in expected:
        difference = (actual[name] - expected[name]).norm()
        assert difference < 1e-5 * expected[name].norm() + 1e-7 * scale, name


def is_of_vision_tower(name):
    return "vision" in name or "visual" in name


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_prompts_encoded_alone_and_joined_are_the_batch_of_the_processor(policy):
    """Three prompts of several lengths, with images of several shapes; one has two images."""
    processor = policy.processor
    prompts = [chat_prompt(processor, text) for text in TEXTS]
    prompts.append(chat_prompt(processor, TEXTS[0], images=2))
    images = [[IMAGES[0]], [IMAGES[1]], IMAGES]
    joined = encode_prompts(policy.model, processor, prompts, images)
    batch = dict(
        processor(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
        )
    )
    assert set(batch) - {"mm_token_type_ids"} == set(joined) - {"position_ids"}
    for name in set(batch) & set(joined):
        ours = joined[name]
        theirs = batch[name]
        if name == "input_ids":
            # ids of padding may differ
            ours = ours * joined["attention_mask"]
            theirs = theirs * batch["attention_mask"]
        assert torch.equal(ours, theirs), name


# ---------------------------------------------------------------- log-probs and gradients


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_shared_prefix_equals_repeated_prompts_in_log_probs_and_every_gradient(policy):
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    weight = torch.randn(2 * G, 1, generator=torch.Generator().manual_seed(0)) * mask
    actual = gradients(policy, (logps * weight).sum())

    expected_logps = torch.zeros_like(logps)
    policy.zero_grad()
    for i in range(2 * G):
        # one completion at a time, without any padding
        length = int(mask[i].sum())
        prompt = encode(policy, [i // G])
        alone = plain_logps(policy, prompt, ids[i : i + 1, :length], mask[i : i + 1, :length])
        (alone * weight[i, :length]).sum().backward()
        expected_logps[i, :length] = alone[0].detach()
    expected = present_gradients(policy)

    assert ((logps - expected_logps) * mask).abs().max() < 2e-5
    assert_same_gradients(actual, expected)
    assert any(is_of_vision_tower(name) for name in actual)
    assert all(g.isfinite().all() for g in actual.values())


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_a_prompt_run_under_no_grad_would_give_another_gradient(policy):
    """The trap of a shared prefix: it would train neither vision tower nor projector."""
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    full = gradients(policy, (logps * mask).sum())
    tower = [name for name in full if is_of_vision_tower(name) and name.endswith("weight")]
    assert tower
    assert min(full[name].norm() for name in tower) > 0

    policy.prefill = torch.no_grad()(policy.prefill)
    _, _, logps, _ = policy(encode(policy), G, ids=ids, mask=mask)
    cut = gradients(policy, (logps * mask).sum())
    assert not set(tower) & set(cut)
    keys = [name for name in cut if "k_proj.weight" in name]
    assert max((cut[name] - full[name]).norm() / full[name].norm() for name in keys) > 0.05


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_under_autocast_a_sampled_pass_equals_a_given_one_and_keeps_no_weight_twice(policy):
    mlp_sizes = {p.numel() for name, p in policy.named_parameters() if "mlp" in name}
    with torch.autocast("cpu", torch.bfloat16):
        ids, mask, _, _ = policy(encode(policy), G, uniforms())

    def gradients_and_kept_casts(**completions):
        """Gradients, and the storages kept for backward that are as large as a weight in bf16."""
        kept = set()

        def keep(tensor):
            storage = tensor.untyped_storage()
            if tensor.dtype == torch.bfloat16 and storage.nbytes() // 2 in mlp_sizes:
                kept.add(storage.data_ptr())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            _, _, logps, _ = policy(encode(policy), G, **completions)
        return gradients(policy, (logps * mask).sum()), kept

    sampled, kept_sampled = gradients_and_kept_casts(uniforms=uniforms())
    given, kept_given = gradients_and_kept_casts(ids=ids, mask=mask)
    assert sampled.keys() == given.keys()
    assert all(torch.equal(sampled[name], given[name]) for name in given)
    # two may share a size by chance; all twice would be 12 more
    assert 0 < len(kept_sampled) <= len(kept_given) + 2


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_autocast_gives_every_parameter_the_gradient_of_fp32_within_bf16(policy):
    """Weights cast to bf16 in the no_grad rollout have no gradient: scoring must not reuse them."""
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    expected = gradients(policy, (logps * mask).sum())
    with torch.autocast("cpu", torch.bfloat16):
        hidden, cache = policy.prefill(encode(policy))
        policy.sample(encode(policy), hidden, cache, torch.rand(2 * G, S))
        _, _, logps, _ = policy(encode(policy), G, ids=ids, mask=mask)
    assert logps.dtype == torch.float32

    actual = gradients(policy, (logps * mask).sum())
    assert actual.keys() == expected.keys()
    flat = [torch.cat([g[name].flatten() for name in expected]) for g in (actual, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_a_prompt_of_a_batch_samples_and_scores_as_alone(policy):
    ids, mask, logps, entropy = policy(encode(policy), G, uniforms())
    for i in (0, 1):
        alone = policy(encode(policy, [i]), G, uniforms([i]))
        alone_ids, alone_mask, alone_logps, alone_entropy = alone
        group = slice(i * G, i * G + G)
        length = alone_ids.shape[1]
        assert (mask[group, :length] == alone_mask).all()
        assert not mask[group, length:].any()
        assert (ids[group, :length] * alone_mask == alone_ids * alone_mask).all()
        assert ((logps[group, :length] - alone_logps) * alone_mask).abs().max() < 2e-5
        assert ((entropy[group, :length] - alone_entropy) * alone_mask).abs().max() < 1e-4


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_logits_in_chunks_give_what_all_at_once_give_and_never_exist_together(policy, monkeypatch):
    """Log-probs, entropies and gradients."""
    ids, mask, _, _ = policy(encode(policy), G, uniforms())
    logits = policy.logits
    sizes = []

    def measured_logits(hidden, medium):
        sizes.append(hidden[..., 0].numel())
        return logits(hidden, medium)

    policy.logits = measured_logits
    results = []
    for chunk in (7, 1000):
        monkeypatch.setattr(common.policy, "LOGITS_CHUNK", chunk)
        sizes.clear()
        _, _, logps, entropy = policy(encode(policy), G, ids=ids, mask=mask)
        results.append((logps, entropy, gradients(policy, (logps * mask).sum())))
        assert max(sizes) == min(chunk, ids.numel())
        assert sum(sizes) == 2 * ids.numel()  # once more in the backward pass
    chunked, whole = results
    assert torch.allclose(chunked[0], whole[0], atol=1e-6)
    assert torch.allclose(chunked[1], whole[1], atol=1e-6)
    assert_same_gradients(chunked[2], whole[2])


@pytest.mark.parametrize("policy", FAMILIES[:1], indirect=True)
def test_entropy_is_not_computed_again_in_the_backward_pass(policy, monkeypatch):
    monkeypatch.setattr(common.policy, "LOGITS_CHUNK", 7)
    entr = torch.special.entr
    sizes = []

    def counted(p):
        sizes.append(len(p))
        return entr(p)

    monkeypatch.setattr(torch.special, "entr", counted)
    ids, mask, logps, entropy = policy(encode(policy), G, uniforms())
    (logps * mask).sum().backward()
    assert sum(sizes) == ids.numel() and max(sizes) == 7
    monkeypatch.undo()
    # of the first tokens, from their logits
    p = policy.logits(policy.prefill(encode(policy))[0]).softmax(-1)
    expected = -(p * p.clamp(min=1e-30).log()).sum(-1)
    assert torch.allclose(entropy.view(2, G, -1)[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_completions_of_one_token_are_scored_by_the_prompt_alone(policy):
    ids = torch.arange(100, 100 + 2 * G)[:, None]
    mask = torch.ones_like(ids)
    _, _, logps, _ = policy(encode(policy), G, ids=ids, mask=mask)
    plain = plain_logps(policy, encode(policy, repeat=G), ids, mask)
    assert logps.shape == (2 * G, 1)
    assert (logps - plain).abs().max() < 2e-5

    actual = gradients(policy, logps.sum())
    expected = gradients(policy, plain.sum())
    shared = [name for name in expected if expected[name].abs().max() > 0]
    assert shared
    for name in shared:
        difference = (actual[name] - expected[name]).norm()
        assert difference < 1e-4 * expected[name].norm() + 1e-6, name


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_greedy_decoding_equals_generate(policy):
    policy.temperature = 0
    for i in (0, 1):
        batch = encode(policy, [i])
        hidden, cache = policy.prefill(batch)
        ids, mask = policy.sample(batch, hidden, cache, torch.zeros(1, 12))

        prompt = chat_prompt(policy.processor, TEXTS[i])
        raw = dict(policy.processor(text=[prompt], images=[[IMAGES[i]]], return_tensors="pt"))
        generated = policy.model.generate(
            **raw, do_sample=False, max_new_tokens=12, suppress_tokens=policy.suppressed_ids
        )
        generated = generated[0, raw["input_ids"].shape[1] :]
        assert ids[0][mask[0].bool()].tolist() == generated[: mask[0].sum()].tolist()


@pytest.mark.parametrize("policy", FAMILIES[:2], indirect=True)
def test_tokens_are_sampled_with_the_probabilities_they_are_scored_with(policy):
    batch = encode(policy, [0])
    n = 4000
    ids, _, logps, _ = policy(
        batch, n, torch.rand(n, 1, generator=torch.Generator().manual_seed(1))
    )
    probabilities = policy.logits(policy.prefill(batch)[0])[0, 0].softmax(-1)
    frequencies = torch.bincount(ids[:, 0], minlength=len(probabilities)) / n
    four_standard_errors = 4 * 0.5 / n**0.5
    assert (frequencies - probabilities).abs().max() < four_standard_errors
    assert torch.allclose(logps[:, 0].exp(), probabilities[ids[:, 0]], atol=1e-6)
    # first tokens of a group differ
    assert ids[:, 0].unique().numel() > 5


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_image_tokens_are_never_sampled(policy):
    image_token = policy.model.config.image_token_id
    hidden, _ = policy.prefill(encode(policy))
    with torch.no_grad():
        policy.model.lm_head.weight[image_token] = 100 * hidden[0, 0]
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    assert image_token not in ids
    assert (logps * mask).isfinite().all()


def test_the_mask_includes_the_first_eos_token_and_nothing_after_it(checkpoint):
    policy = Policy(*load_vlm(checkpoint("idefics3"), CPU))
    assert len(policy.eos_ids) == 2  # generation_config holds two
    for eos in policy.eos_ids:
        with torch.no_grad():
            hidden, _ = policy.prefill(encode(policy))
            policy.model.lm_head.weight.zero_()
            policy.model.lm_head.weight[eos] = 3 * hidden[0, 0] / hidden[0, 0].norm()
        ids, mask, _, _ = policy(encode(policy), 8, uniforms_of(1, [0, 1], 8, S, 0))
        for tokens, token_mask in zip(ids.tolist(), mask.tolist()):
            ends = [s for s, token in enumerate(tokens) if token in policy.eos_ids]
            length = ends[0] + 1 if ends else len(tokens)
            assert token_mask == [1] * length + [0] * (len(tokens) - length)
        assert (mask.sum(1) < S).any()


def test_the_pad_token_is_not_an_eos_token(checkpoint):
    policy = Policy(*load_vlm(checkpoint("idefics3"), CPU))
    assert policy.processor.tokenizer.pad_token_id not in policy.eos_ids


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_sampled_ids_are_scored_as_they_are_and_not_re_tokenised(policy):
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    sampled = [tokens[m.bool()].tolist() for tokens, m in zip(ids, mask)]
    texts = decode(policy.processor, ids, mask)
    again = [policy.processor.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    # decoding and encoding gives other ids
    assert again != sampled
    plain = plain_logps(policy, encode(policy, repeat=G), ids, mask)
    assert ((logps - plain) * mask).abs().max() < 2e-5


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_decoding_stops_when_every_completion_has_ended(policy):
    batch = encode(policy)
    ids, _ = policy.sample(batch, *policy.prefill(batch), uniforms(length=20))
    # so that all end within three tokens
    stop_ids = [*policy.eos_ids, *ids[:, :3].flatten().tolist()]
    policy.media["text"] = policy.media["text"]._replace(stop_ids=stop_ids)
    again, mask = policy.sample(batch, *policy.prefill(batch), uniforms(length=20))
    assert again.shape[1] <= 3
    assert (again == ids[:, : again.shape[1]]).all()
    assert mask[:, 0].all()


@pytest.mark.parametrize("policy", FAMILIES[:2], indirect=True)
def test_logits_that_are_not_numbers_end_in_ids_of_the_vocabulary(policy):
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(float("nan"))
    ids, mask, logps, _ = policy(encode(policy), G, uniforms())
    assert (ids < policy.model.config.get_text_config().vocab_size).all()
    assert not (logps * mask).isfinite().all()


@pytest.mark.parametrize("policy", FAMILIES[:2], indirect=True)
def test_the_largest_uniform_samples_a_token_that_can_be_sampled(policy):
    size = policy.model.config.get_text_config().vocab_size
    banned_ids = [*policy.suppressed_ids, *range(size - 5, size)]
    policy.media["text"] = policy.media["text"]._replace(banned_ids=banned_ids)
    largest = torch.full((2 * G, S), 1 - 2**-24)  # that torch.rand can give
    ids, mask, logps, _ = policy(encode(policy), G, largest)
    assert not torch.isin(ids, torch.tensor(policy.suppressed_ids)).any()
    assert (logps * mask).isfinite().all()


@pytest.mark.parametrize("policy", FAMILIES[:1], indirect=True)
@pytest.mark.parametrize("step", (1e-7, -1e-7))
def test_a_sum_that_steps_at_a_banned_id_never_samples_it(policy, monkeypatch, step):
    """A sum in parallel may be an ulp too high, or too low, anywhere: on CUDA it is."""
    logits = torch.zeros(1, 3, 8)
    logits[..., 3] = 1.0
    logits[..., [2, 5, 7]] = float("-inf")
    cdf = logits.softmax(-1).cumsum(-1)
    cdf[..., 2] += step
    cdf[..., 5] += step
    cdf[..., 7] += abs(step)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *args: cdf)
    # on the steps at 2, 5 and 7, beside them, and at the ends
    near = torch.stack([cdf[0, 0, 1], cdf[0, 0, 4], cdf[0, 0, 6]]) / cdf[0, 0, -1]
    for nudge in (-1e-7, 0.0, 6e-8, 1e-7):
        tokens = policy.sample_token(logits, (near + nudge).clamp(0, 1 - 2**-24)[None])
        assert not torch.isin(tokens, torch.tensor([2, 5, 7])).any()
    tokens = policy.sample_token(logits, torch.tensor([[0.0, 0.5, 0.95]]))
    assert tokens.tolist() == [[0, 3, 6]]


# ---------------------------------------------------------------- the model that is wrapped


@pytest.mark.parametrize("policy", FAMILIES, indirect=True)
def test_a_loaded_policy_samples_and_scores_in_eval_mode(policy):
    policy(encode(policy), G, uniforms())
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("policy", FAMILIES[:3], indirect=True)
def test_dropping_the_cache_by_gradient_checkpointing_is_an_error(policy):
    policy.model.train()
    policy.model.gradient_checkpointing_enable()
    with pytest.raises((RuntimeError, ValueError)):
        policy(encode(policy), G, uniforms())


def test_parameters_without_gradient_are_frozen_and_all_others_are_not(checkpoint):
    policy = Policy(*load_vlm(checkpoint("llava_onevision"), CPU))
    freeze_unused(policy, {"text": encode(policy)})
    frozen = [name for name, p in policy.model.named_parameters() if not p.requires_grad]
    norm = "model.vision_tower.post_layernorm"
    assert frozen == [f"{norm}.weight", f"{norm}.bias"]
