"""Families beyond the usual: each is exact, or computed plainly, or refused in one line.

The truth is the model's own forward() of one prompt and one completion, without padding or cache.
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from test_attention_maps import load_with_tiles
from test_shared_prefix import TEMPERATURE, TEXTS, assert_same_gradients, present_gradients
from tiny import FAMILIES, random_image
from tiny_more import MORE_FAMILIES, WINDOW, changed

import common.vlm
from common import exactness
from common.exactness import choose_computation, forward_logps
from common.plain import plain_logps, plain_sample
from common.policies import freeze_unused
from common.policy import Policy, generate
from common.records import BadRecord
from common.training import uniforms_of
from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompt,
    encode_responses,
    join_prompts,
    load_vlm,
    token_logps,
)
from grpo_train import FillMask
from score_dependency import CAPTION_PROMPT, Scorer

CPU = torch.device("cpu")
G = 2
S = 5
CAPTIONS = ["A large red circle is in the middle.", "Two dogs run."]
# cut into one, two or three tiles or crops, by the families that cut images
IMAGES = [random_image(0, (64, 48)), random_image(1, (48, 80))]
# the longest prompt with its completion that may be shared
LIMITS = dict.fromkeys(FAMILIES + MORE_FAMILIES, math.inf) | {"gemma3": 512}
PLAIN = ("aya_vision", "mllama", "lfm2_vl", "qwen3_5")
LIMITS |= dict.fromkeys(PLAIN, 0)
# the layers that D_vis is taken from: of two, or of three of which the middle one is attention
SCORED = [family for family in MORE_FAMILIES if family != "mllama"]


def encode(policy):
    """Two prompts of different lengths, as encode_prompt() returns them."""
    prompts = []
    for text, image in zip(TEXTS, IMAGES):
        prompt = chat_prompt(policy.processor, text)
        prompts.append(encode_prompt(policy.model, policy.processor, prompt, [image]))
    assert prompts[0]["input_ids"].shape != prompts[1]["input_ids"].shape
    return prompts


def load(folder, temperature=TEMPERATURE):
    return Policy(*load_vlm(folder, CPU), temperature)


def chosen(folder, trains=True):
    """A Policy that has chosen its computation."""
    policy = load(folder)
    choose_computation(policy, encode(policy), G, S, trains)
    return policy


def true_logps(model, prompt, ids, policy):
    """Log-probs (S,) of one completion (S,), by nothing but the model's forward()."""
    batch = append_responses(join_prompts(model, [prompt]), ids[None], torch.ones_like(ids)[None])
    logits = model(**batch, use_cache=False).logits[:, -len(ids) - 1 : -1] / TEMPERATURE
    logits[..., policy.suppressed_ids] = float("-inf")
    return token_logps(logits, ids[None])[0]


def assert_exact(policy, folder):
    """Samples, and compares log-probs and every gradient with the model as it was loaded."""
    model, _ = load_vlm(folder, CPU)
    prompts = encode(policy)
    drawn = uniforms_of(1, [0, 1], G, S, seed=0)
    ids, mask, logps, entropy = policy(join_prompts(policy.model, prompts), G, drawn)
    # drawn, and not the likeliest of each prompt
    assert len({tuple(completion) for completion in ids.tolist()}) > 2
    weight = torch.randn(2 * G, 1, generator=torch.Generator().manual_seed(0)) * mask
    policy.zero_grad()
    (logps * weight).sum().backward()

    for i in range(2 * G):
        length = int(mask[i].sum())
        expected = true_logps(model, prompts[i // G], ids[i, :length], policy)
        assert (logps[i, :length] - expected).abs().max() < 1e-5
        (expected * weight[i, :length]).sum().backward()
    actual = present_gradients(policy)
    expected = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(actual, expected)
    assert any("vision" in name or "visual" in name for name in actual)
    assert entropy.isfinite().all()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_log_probs_and_every_gradient_are_those_of_the_models_own_forward(checkpoint, family):
    policy = chosen(checkpoint(family))
    assert policy.shared_limit == LIMITS[family]
    assert_exact(policy, checkpoint(family))


@pytest.mark.parametrize("family", ("qwen2_5_vl", "idefics3"))
def test_the_plain_computation_is_right_for_those_that_need_it_not(checkpoint, family):
    policy = load(checkpoint(family))
    policy.shared_limit = 0
    assert_exact(policy, checkpoint(family))


@pytest.mark.parametrize("family", ("idefics3", "internvl"))
def test_prompts_with_images_in_tiles_are_shared_exactly(checkpoint, family):
    """The images of the two prompts are cut into tiles and run in one pass."""
    policy = Policy(*load_with_tiles(checkpoint, family), TEMPERATURE)
    prompts = encode(policy)
    tiles = [prompt["pixel_values"].shape[:-3].numel() for prompt in prompts]
    assert max(tiles) > 3
    choose_computation(policy, prompts, G, S, trains=True)
    assert policy.shared_limit == math.inf

    scorer = Scorer(policy.model, policy.processor, [1, 2])
    results = scorer([scorer.prepare(*pair) for pair in zip(IMAGES, CAPTIONS)])
    slow, processor = load_with_tiles(checkpoint, family)
    slow.load_state_dict(policy.model.state_dict())
    slow.set_attn_implementation("eager")
    for image, caption, (rows, _, _) in zip(IMAGES, CAPTIONS, results):
        expected = full_rows(slow, processor, image, caption, [1, 2])
        assert rows["d_vis"][1:] == pytest.approx(expected, abs=1e-5)


def test_a_generate_that_would_not_draw_what_it_is_told_is_refused(checkpoint):
    """That of Janus leaves out the sampler: its samples would all be greedy."""
    policy = load(checkpoint("janus"))
    with pytest.raises(RuntimeError, match="logits_processor"):
        plain_sample(policy, encode(policy), torch.zeros(2, 3))


@pytest.mark.parametrize("family", ("qwen2_5_vl", "paligemma", "gemma3", "mllama"))
def test_the_check_says_in_one_line_what_it_chose(checkpoint, family, capsys):
    policy = load(checkpoint(family))
    capsys.readouterr()
    choose_computation(policy, encode(policy), 8, 64)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(family)]
    if LIMITS[family] == math.inf:
        assert "completions share their prompt; checked" in line
    elif LIMITS[family]:
        assert "exact within the 512 tokens" in line
    else:
        longest = encode(policy)[1]["input_ids"].shape[1]
        ratio = 8 * (longest + 64) / (longest + 8 * 64)
        assert "would be wrong" in line and f"{ratio:.1f} times the tokens" in line


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_greedy_decoding_equals_generate(checkpoint, family):
    policy = chosen(checkpoint(family))
    policy.temperature = 0
    prompts = encode(policy)
    texts = generate(policy, policy.processor, prompts, 8)
    model, processor = load_vlm(checkpoint(family), CPU)
    for text, prompt in zip(texts, prompts):
        ids = model.generate(
            **prompt, do_sample=False, max_new_tokens=8, suppress_tokens=policy.suppressed_ids
        )
        ids = ids[:, prompt["input_ids"].shape[1] :]
        assert text == processor.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_plain_completions_end_with_the_first_eos_and_differ_in_length(checkpoint):
    policy = chosen(checkpoint("mllama"))
    policy.media["text"] = policy.media["text"]._replace(stop_ids=tuple(range(100)))
    drawn = uniforms_of(1, [0, 1], G, 12, seed=0)
    ids, mask, logps, _ = policy(join_prompts(policy.model, encode(policy)), G, drawn)
    assert len(set(mask.sum(1).tolist())) > 1
    for tokens, token_mask in zip(ids.tolist(), mask.tolist()):
        ends = [s for s, token in enumerate(tokens) if token < 100]
        length = ends[0] + 1 if ends else len(tokens)
        assert token_mask == [1] * length + [0] * (len(tokens) - length)


def test_plain_and_shared_completions_are_the_same(checkpoint):
    """The same uniforms draw the same tokens, whichever way they are computed."""
    policy = load(checkpoint("qwen2_5_vl"))
    drawn = uniforms_of(1, [0, 1], G, S, seed=0)
    shared, _, _, shared_entropy = policy(join_prompts(policy.model, encode(policy)), G, drawn)
    policy.shared_limit = 0
    plain, _, _, entropy = policy(join_prompts(policy.model, encode(policy)), G, drawn)
    assert torch.equal(shared, plain)
    assert torch.allclose(shared_entropy, entropy, atol=1e-5)


def test_settings_of_generation_config_do_not_reach_plain_sampling(checkpoint):
    policy = chosen(checkpoint("lfm2_vl"))
    drawn = uniforms_of(1, [0, 1], G, S, seed=0)
    ids, _, _, _ = policy(join_prompts(policy.model, encode(policy)), G, drawn)
    own = policy.model.generation_config
    own.repetition_penalty = 50.0
    own.suppress_tokens = ids[:, 0].tolist()
    again, _, _, _ = policy(join_prompts(policy.model, encode(policy)), G, drawn)
    assert torch.equal(ids, again) and policy.model.generation_config is own


def test_parameters_without_gradient_are_frozen_in_plain_passes_too(checkpoint):
    policy = chosen(checkpoint("mllama"))
    freeze_unused(policy, {"text": join_prompts(policy.model, encode(policy)[:1])})
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert any("cross_attn" in name for name in trained)
    assert any("vision_model" in name for name in trained)


def test_the_reference_computes_as_the_policy_does(checkpoint):
    policy = load(checkpoint("mllama"))
    reference = load(checkpoint("mllama"))
    prompts = encode(policy)
    choose_computation(policy, prompts, G, S, trains=True, reference=reference)
    ids = torch.arange(2 * G * S).view(2 * G, S) + 100
    results = []
    for one in (policy, reference):
        batch = join_prompts(one.model, prompts)
        results.append(one(batch, G, ids=ids, mask=torch.ones_like(ids))[2])
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "mllama"))
def test_rounding_to_bf16_is_no_difference(checkpoint, family):
    """The check of a run on a GPU: in fp32, and again under autocast."""
    policy = load(checkpoint(family))
    computation = (plain_sample, plain_logps)
    if family == "qwen2_5_vl":
        computation = (exactness.shared_sample, exactness.shared_logps)
    precisions = [contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)]
    assert exactness.difference(policy, encode(policy), True, precisions, *computation) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert exactness.dtype_of(policy) == torch.bfloat16


def test_under_autocast_plain_passes_give_every_parameter_its_gradient(checkpoint):
    """Weights that were cast to bf16 while sampling have none: scoring must not reuse them."""
    policy = chosen(checkpoint("mllama"))
    drawn = uniforms_of(1, [0, 1], G, S, seed=0)
    gradients = []
    for precision in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        policy.zero_grad()
        with precision:
            batch = join_prompts(policy.model, encode(policy))
            policy(batch, G, drawn)
            ids = torch.arange(100, 100 + 2 * G * S).view(2 * G, S)
            _, _, logps, _ = policy(batch, G, ids=ids, mask=torch.ones_like(ids))
        logps.sum().backward()
        gradients.append(present_gradients(policy))
    in_fp32, in_bf16 = gradients
    assert in_fp32.keys() == in_bf16.keys()
    flat = [torch.cat([g[name].flatten() for name in in_fp32]) for g in gradients]
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


def test_a_micro_batch_counts_the_tokens_of_the_computation_that_runs(checkpoint):
    task = SimpleNamespace(policy=load(checkpoint("gemma3")), max_length=24)
    # of 8 completions of 24 tokens, within the window of 512 and beyond it
    assert FillMask.tokens_of(task, 488, 8) == 488 + 8 * 24
    assert FillMask.tokens_of(task, 489, 8) == 8 * (489 + 24)


# ---------------------------------------------------------------- windows


def test_a_prompt_is_shared_exactly_as_long_as_it_fits_the_window(checkpoint, tmp_path):
    """31 and 59 tokens and a completion of 5 in a window of 64, 63 ... 36, 35."""
    for window, is_shared in ((64, True), (63, False)):
        folder = changed(tmp_path / str(window), checkpoint("aya_vision"), sliding_window=window)
        policy = chosen(folder)
        assert policy.shared_limit == window
        prompts = encode(policy)
        assert [prompt["input_ids"].shape[1] for prompt in prompts] == [31, 59]
        assert policy.shares_prompt(59 + S) == is_shared
        assert_exact(policy, folder)


def test_a_prompt_that_fits_the_window_without_its_completion_is_not_shared(checkpoint, tmp_path):
    """What no check on short prompts sees: prompt < window < prompt + completion."""
    folder = changed(tmp_path / "40", checkpoint("aya_vision"), sliding_window=40)
    policy = load(folder)
    prompt = encode(policy)[0]
    choose_computation(policy, [prompt], G, 20, trains=True)
    assert policy.shared_limit == 40
    ids = torch.arange(100, 120).repeat(G, 1)
    batch = join_prompts(policy.model, [prompt])
    _, _, logps, _ = policy(batch, G, ids=ids, mask=torch.ones_like(ids))
    model, _ = load_vlm(folder, CPU)
    expected = true_logps(model, prompt, ids[0], policy)
    assert (logps - expected).abs().max() < 1e-5

    # and shared it would be wrong
    policy.shared_limit = math.inf
    _, _, shared, _ = policy(batch, G, ids=ids, mask=torch.ones_like(ids))
    assert (shared - expected).abs().max() > 0.05


# ---------------------------------------------------------------- what the check sees


def test_inputs_per_token_that_are_padded_on_the_wrong_side_are_seen(checkpoint, monkeypatch):
    """As token_type_ids of Gemma3 were: log-probs 0.9 nats off, without any error."""
    pad = common.vlm._pad_to_largest

    def pad_on_the_right(model, name, tensor, prompts):
        padded = pad(model, name, tensor, prompts)
        gap = padded.shape[1] - tensor.shape[1]
        return padded.roll(-gap, 1) if name == "token_type_ids" else padded

    assert chosen(checkpoint("gemma3")).shared_limit == 512
    monkeypatch.setattr(common.vlm, "_pad_to_largest", pad_on_the_right)
    assert chosen(checkpoint("gemma3")).shared_limit == 0


def test_completions_that_see_each_other_are_seen(checkpoint):
    policy = load(checkpoint("qwen2_5_vl"))
    extend = policy.extend

    def without_blocks(batch, cache, ids, positions, block_mask, medium="text"):
        return extend(batch, cache, ids, positions, torch.ones_like(block_mask).tril(), medium)

    policy.extend = without_blocks
    choose_computation(policy, encode(policy), G, S, trains=False)
    assert policy.shared_limit == 0


def test_a_wrong_gradient_with_right_log_probs_is_seen(checkpoint, capsys):
    policy = load(checkpoint("qwen3_vl"))
    policy.prefill = torch.no_grad()(policy.prefill)
    choose_computation(policy, encode(policy), G, S, trains=True)
    assert policy.shared_limit == 0
    assert "the gradient is" in capsys.readouterr().out


def test_wrong_decoding_with_right_log_probs_is_seen(checkpoint):
    policy = load(checkpoint("internvl"))
    sample = policy.sample

    def one_token_late(*args):
        ids, mask = sample(*args)
        return ids.roll(1, 1), mask

    policy.sample = one_token_late
    choose_computation(policy, encode(policy), G, S, trains=False)
    assert policy.shared_limit == 0


def test_the_check_leaves_no_gradient_and_the_policy_as_it_was(checkpoint):
    policy = load(checkpoint("gemma3"))
    media = dict(policy.media)
    choose_computation(policy, encode(policy), G, S, trains=True)
    assert policy.media == media and policy.temperature == TEMPERATURE
    assert all(p.grad is None for p in policy.parameters())


def test_all_ranks_compute_as_the_first_one_does(checkpoint, monkeypatch):
    monkeypatch.setattr(exactness, "broadcast", lambda value: "it is so on rank 0")
    policy = load(checkpoint("qwen2_5_vl"))
    monkeypatch.setattr(exactness, "check_plain", lambda *args: None)
    choose_computation(policy, encode(policy), G, S, trains=False)
    assert policy.shared_limit == 0


def test_a_cache_that_lies_is_not_used(checkpoint, capsys):
    policy = load(checkpoint("qwen3_5"))
    generate_ids = policy.model.generate

    def generate_with_a_broken_cache(*args, use_cache, **kwargs):
        ids = generate_ids(*args, use_cache=use_cache, **kwargs)
        if use_cache:
            ids[:, -3:] = 7
        return ids

    policy.model.generate = generate_with_a_broken_cache
    choose_computation(policy, encode(policy), G, S, trains=False)
    assert not policy.uses_cache
    assert "without a cache" in capsys.readouterr().out


@pytest.mark.parametrize("error", (RuntimeError, None))
def test_a_family_that_fails_both_ways_is_refused_in_one_line(checkpoint, monkeypatch, error):
    policy = load(checkpoint("mllama"))

    def head(hidden):
        if error:
            raise error("no such mask\nand more lines")
        return policy.model.lm_head(hidden).sin()

    policy.media["text"] = policy.media["text"]._replace(head=head)
    with pytest.raises(SystemExit) as refused:
        choose_computation(policy, encode(policy), G, S, trains=False)
    message = str(refused.value)
    assert "mllama cannot be used" in message and "\n" not in message and len(message) <= 200


def test_nan_among_the_weights_is_refused_in_one_line(checkpoint):
    policy = load(checkpoint("internvl"))
    with torch.no_grad():
        policy.model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(SystemExit, match="is NaN among the weights"):
        choose_computation(policy, encode(policy), G, S, trains=True)


def test_logits_that_are_capped_are_capped_here_too(checkpoint, tmp_path):
    folder = changed(tmp_path / "capped", checkpoint("paligemma"), final_logit_softcapping=2.0)
    policy = chosen(folder)
    assert policy.shared_limit == math.inf
    _, best = forward_logps(policy, encode(policy)[0], torch.tensor([[1, 2]]))
    most = 2 * 2 / TEMPERATURE - math.log(len(policy.processor.tokenizer))
    assert (best < most).all()
    assert_exact(policy, folder)


@pytest.mark.parametrize(
    "family, token", [("gemma3", "<image_soft_token>"), ("aya_vision", "<|IMG_PATCH|>")]
)
def test_the_token_that_stands_for_an_image_is_refused_in_text(checkpoint, family, token):
    """Of these families it is another one than the token that a prompt has for an image."""
    model, processor = load_vlm(checkpoint(family), CPU)
    with pytest.raises(BadRecord, match="contains the image token"):
        prompt = chat_prompt(processor, f"a {token} b")
        encode_prompt(model, processor, prompt, [IMAGES[0]])
    with pytest.raises(BadRecord, match="contains the image token"):
        encode_responses(processor, [f"a {token} b"], CPU)


# ---------------------------------------------------------------- scoring


def full_rows(model, processor, image, caption, layers):
    """D_vis of a caption's tokens from the eager maps of `layers`: (S,)."""
    ids, mask, _ = encode_responses(processor, [caption], CPU)
    prompt = encode_prompt(model, processor, chat_prompt(processor, CAPTION_PROMPT), [image])
    batch = append_responses(join_prompts(model, [prompt]), ids, mask)
    maps = model(**batch, output_attentions=True, use_cache=False).attentions
    if len(maps) < len(model.get_decoder().layers):
        # only the layers of attention give one
        kinds = model.config.get_text_config().layer_types
        attention = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        maps = dict(zip(attention, maps))
    visual = batch["input_ids"][0] == model.config.image_token_id
    n = ids.shape[1]
    share = 0
    for layer in layers:
        rows = maps[layer][0].mean(0)[-n:]
        to_visual = rows[:, visual].sum(-1)
        share = share + to_visual / (to_visual + rows[:, -n:].sum(-1)) / len(layers)
    return share.tolist()


@pytest.mark.parametrize("family", SCORED)
@torch.no_grad()
def test_d_vis_equals_full_attention_maps_in_a_batch(checkpoint, family):
    model, processor = load_vlm(checkpoint(family), CPU)
    scorer = Scorer(model, processor)
    # the windowed layer of Gemma3 and Aya, and those without softmax, have number 0 or 2
    assert list(scorer.layers) == [1]
    results = scorer([scorer.prepare(*pair) for pair in zip(IMAGES, CAPTIONS)], maps=True)
    slow, _ = load_vlm(checkpoint(family), CPU)
    slow.set_attn_implementation("eager")
    for image, caption, (rows, _, _, cells) in zip(IMAGES, CAPTIONS, results):
        expected = full_rows(slow, processor, image, caption, [1])
        assert rows["d_vis"][1:] == pytest.approx(expected, abs=1e-5)
        assert cells.sum(-1).tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_window_on_all_layers_is_a_limit_and_not_a_score(checkpoint, tmp_path):
    """An image that the caption cannot see would get D_vis = NaN, or 0."""
    folder = changed(tmp_path / "w", checkpoint("mistral3"), sliding_window=48)
    model, processor = load_vlm(folder, CPU)
    scorer = Scorer(model, processor)
    short = scorer.prepare(IMAGES[0], "A dog.")
    rows, _, _ = scorer([short])[0]
    slow, _ = load_vlm(folder, CPU)
    slow.set_attn_implementation("eager")
    expected = full_rows(slow, processor, IMAGES[0], "A dog.", [1])
    assert rows["d_vis"][1:] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(BadRecord, match="exceed the 48 that the model's layers see"):
        scorer.prepare(IMAGES[0], CAPTIONS[0])


@pytest.mark.parametrize("family, layer", [("aya_vision", 0), ("lfm2_vl", 2), ("qwen3_5", 0)])
def test_layers_that_do_not_see_the_whole_sequence_are_refused(checkpoint, family, layer):
    model, processor = load_vlm(checkpoint(family), CPU)
    with pytest.raises(SystemExit, match="only these attend to all of image and caption: 1"):
        Scorer(model, processor, [layer, 1])


def test_cross_attention_has_no_d_vis(checkpoint):
    model, processor = load_vlm(checkpoint("mllama"), CPU)
    with pytest.raises(SystemExit, match="mllama reads images by cross-attention"):
        Scorer(model, processor)


def test_captions_run_one_by_one_where_padding_could_reach_the_state_of_a_layer(checkpoint):
    sizes = []

    def see_batch(module, args, kwargs, out):
        sizes.append(len(kwargs["inputs_embeds"]))

    for family in ("qwen3_5", "lfm2_vl", "glm4v"):
        model, processor = load_vlm(checkpoint(family), CPU)
        scorer = Scorer(model, processor)
        model.get_decoder().register_forward_hook(see_batch, with_kwargs=True)
        scorer([scorer.prepare(*pair) for pair in zip(IMAGES, CAPTIONS)])
    assert sizes == [1, 1, 1, 1, 2]


def test_the_window_of_the_tiny_aya_is_shorter_than_its_prompts(checkpoint):
    policy = load(checkpoint("aya_vision"))
    assert policy.shared_limit == WINDOW < encode(policy)[0]["input_ids"].shape[1]
