"""The reward, component by component, against numbers worked out by hand; what earns nothing."""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import random_image, tokenizer_of

import common.clip
import reward
from common.answers import exact_match, normalise, prefix_credit, rouge_l
from reward import (
    COMPONENTS,
    ClipScorer,
    Reward,
    add_reward_flags,
    brevity_penalty,
    contest,
    for_each_answer,
    load_reward,
    parse_completion,
    pmi_over_images,
    rival_answers,
    semantic_credit,
    target_completion,
)

RECORD = {"sentence": "The top left holds a [MASK].", "answer": "large red circle"}
RECORD["masked_caption"] = "A square has four sides. " + RECORD["sentence"]
RED = random_image(1)
NOISE = [random_image(seed) for seed in (2, 3, 4)]


def completion(answer):
    return f"<think>I look.</think><answer>{answer}</answer>"


# ---------------------------------------------------------------- form: the gate


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>a disc</think><answer> red circle\n</answer>", "red circle"),
        ("<think></think><answer>red</answer>", "red"),
        (" <think>two\nlines</think>\n\n<answer>a < b > c</answer>\n", "a < b > c"),
        ("<think>x</think><answer></answer>", None),
        ("<think>x</think><answer> \n </answer>", None),
        # nothing but punctuation hides no text
        ("<think>x</think><answer>...</answer>", None),
        ("<think>x</think><answer>red", None),
        ("<think>x<answer>red</answer>", None),
        ("<answer>red</answer>", None),
        ("red", None),
        ("", None),
        ("<think>x</think><answer>red</answer> and so on", None),
        ("So: <think>x</think><answer>red</answer>", None),
        ("<think>x</think> so <answer>red</answer>", None),
        ("<answer>red</answer><think>x</think>", None),
        ("<think>x</think><answer>red</answer><answer>blue</answer>", None),
        ("<think>x</think><answer><answer>red</answer></answer>", None),
        ("<think><think>x</think></think><answer>red</answer>", None),
        ("<think>x<answer>blue</answer></think><answer>red</answer>", None),
        ("<think>x</think><think>y</think><answer>red</answer>", None),
    ],
)
def test_only_one_thought_and_one_answer_pass_the_gate(text, answer):
    assert parse_completion(text) == answer


def test_what_imitation_learns_to_write_passes_the_gate():
    target = target_completion({"sentence": "It is [MASK] wide.", "answer": "3.5 m (large)"})
    assert target == "<think>It is</think><answer>3.5 m (large)</answer>"
    assert parse_completion(target) == "3.5 m (large)"


# ---------------------------------------------------------------- semantic


@pytest.mark.parametrize(
    "answer, target",
    [
        ("Red  Circle.", "red circle"),
        ("“red circle”", "red circle"),
        ("ＲＥＤ circle", "red circle"),
        ("Straße", "STRASSE"),
        ("红色。", "红色"),
    ],
)
def test_case_width_spaces_and_outer_punctuation_do_not_count(answer, target):
    assert exact_match(answer, target) == exact_match(target, answer) == 1


@pytest.mark.parametrize(
    "answer, target",
    [
        ("red", "red circle"),
        ("redcircle", "red circle"),
        ("", ""),
        (".", "!"),
        ("well lit", "well-lit"),
    ],
)
def test_other_words_and_no_words_are_no_match(answer, target):
    assert exact_match(answer, target) == 0


def test_inner_punctuation_stays():
    assert normalise(" 'The 3.5 m, well-lit room!' ") == "the 3.5 m, well-lit room"


@pytest.mark.parametrize(
    "answer, credit",
    [
        ("large", 1),
        ("large red", 1),
        ("Large RED", 1),
        ("large red circle", 1),
        ("large r", 0),
        ("lar", 0),
        ("red", 0),
        ("large blue", 0),
        ("large red circles", 0),
        ("", 0),
    ],
)
def test_a_prefix_earns_credit_only_where_a_token_of_the_target_ends(answer, credit):
    boundaries = {5, 9, 16}  # large| red| circle
    assert prefix_credit(answer, "large red circle", boundaries) == credit


@pytest.mark.parametrize(
    "answer, credit",
    [
        ("large red circle", 1),
        ("large blue circle", 2 / 3),
        ("circle red large", 1 / 3),
        ("red", 1 / 2),
        ("a large red circle", 6 / 7),
        ("red red red", 1 / 3),
        ("Large, blue", 0),
        ("blue", 0),
        ("", 0),
    ],
)
def test_rouge_l_credits_words_in_order_and_against_both_lengths(answer, credit):
    assert rouge_l(answer, "large red circle") == pytest.approx(credit)


@pytest.mark.parametrize(
    "kind, credits",
    [("exact", [1, 0, 0, 0]), ("prefix", [1, 1, 0, 0]), ("rouge_l", [1, 4 / 5, 2 / 3, 0])],
)
def test_each_kind_of_credit_at_the_boundaries_of_a_real_tokenizer(kind, credits):
    tokenizer = tokenizer_of("qwen3_vl")
    answers = ["Large red circle.", "large red", "large blue circle", "star"]
    given_credits = [semantic_credit(a, "large red circle", kind, tokenizer) for a in answers]
    assert given_credits == pytest.approx(credits)


# ---------------------------------------------------------------- visual


def test_pmi_over_images_by_hand():
    score = torch.tensor([2.0])
    others = torch.tensor([[0.0, math.log(3)]])  # log mean exp = log 2
    expected = pytest.approx(math.exp(2) / (math.exp(2) + 2))
    assert pmi_over_images(score, others).item() == expected
    # the image itself does not take part
    with_itself = torch.cat([others, torch.tensor([[-math.inf]])], -1)
    assert pmi_over_images(score, with_itself).item() == expected


def test_without_any_other_image_the_pmi_is_one_half_and_not_nan():
    alone = torch.full((2, 3, 1), -math.inf)
    assert pmi_over_images(torch.randn(2, 3), alone).tolist() == [[0.5] * 3] * 2


def test_text_that_fits_every_image_gets_one_half_and_a_bonus_of_the_text_cancels():
    score = torch.tensor([[3.0, -1.0]])
    others = torch.tensor([[[3.0] * 5, [2.0, -3.0, 0.5, 1.0, -9.0]]])
    assert pmi_over_images(score, others)[0, 0].item() == pytest.approx(0.5)
    bonus = torch.tensor([[7.0, 100.0]])
    with_bonus = pmi_over_images(score + bonus, others + bonus[..., None])
    torch.testing.assert_close(with_bonus, pmi_over_images(score, others))


def test_contrast_within_a_group_is_a_distribution_over_distinct_answers_and_the_image_cancels():
    scores = torch.tensor([0.0, math.log(3), 0.0, math.log(4)])
    texts = ["a", "b", "a", "c"]
    p = contest(scores, texts)
    # "a" counts once
    assert p.tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 8, 4 / 8])
    torch.testing.assert_close(contest(scores + 50, texts), p)
    # and so does a text that another one differs from in case or a full stop
    p = contest(torch.tensor([math.log(2), math.log(2), 0.0]), ["A b", "a b.", "c"])
    assert p.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipScorer(str(clip_folder), others=NOISE)


@torch.no_grad()
def plain_logits(clip, images, texts):
    """S by hand, one image and one text at a time: (images, texts)."""
    logits = torch.zeros(len(images), len(texts))
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            image_features = clip.model.encode_image(clip.preprocess(image)[None])
            text_features = clip.model.encode_text(clip.tokenizer([text]))
            cosine = torch.cosine_similarity(image_features, text_features)[0]
            logits[i, j] = clip.model.logit_scale.exp() * cosine
    return logits


def test_the_logit_is_scale_times_cosine_and_every_text_gets_that_of_its_image(clip):
    # texts are repeated, in another order
    texts = [["a red dog", "a cat", "a cat"], ["a cat", "no", "a red dog"]]
    images = [RED, NOISE[0]]
    logits = torch.stack([plain_logits(clip, [i], t)[0] for i, t in zip(images, texts)])
    others = torch.stack([plain_logits(clip, NOISE, t).T for t in texts])  # (B, G, J)

    scale = clip.model.logit_scale.exp().item()
    cosine = clip(images, texts, "none")
    torch.testing.assert_close(cosine, (logits / scale).clamp(0, 1), atol=1e-5, rtol=0)

    # NOISE[0] is not compared with itself
    prior = torch.stack([others[0].exp().mean(-1), others[1, :, 1:].exp().mean(-1)])
    pmi = clip(images, texts, "images")
    torch.testing.assert_close(pmi, torch.sigmoid(logits - prior.log()), atol=1e-5, rtol=0)
    # the tiny model tells them apart
    assert pmi.std() > 1e-3

    first, second = logits.exp()
    expected = torch.stack([first / first[:2].sum(), second / second.sum()])
    torch.testing.assert_close(clip(images, texts, "answers"), expected, atol=1e-5, rtol=0)


def test_in_a_pool_the_hidden_text_and_other_hidden_texts_compete_with_the_group(clip):
    hidden = ["large red circle", "small blue square", "red", "a big green cube"]
    scorer = Reward({"visual": 1}, relative="pool", clip=clip, hidden=hidden)
    answers = ["large blue circle", "large red circle", "large blue circle"]
    completions = [[completion(answer) for answer in answers]]
    pooled = scorer([RECORD], [RED], completions)["visual"][0]

    # by hand: of the other hidden texts only one has three words
    texts = ["large blue circle", "large red circle", "small blue square"]
    logits = plain_logits(clip, [RED], [f"The top left holds a {text}." for text in texts])[0]
    p = logits.exp() / logits.exp().sum()
    torch.testing.assert_close(pooled, p[[0, 1, 0]], atol=1e-5, rtol=0)
    # alone, two answers share all there is
    scorer.relative = "answers"
    alone = scorer([RECORD], [RED], completions)["visual"][0]
    assert alone[:2].sum().item() == pytest.approx(1, abs=1e-5)
    assert pooled[:2].sum().item() < 0.99


def test_the_rivals_of_a_record_are_always_the_same_and_as_long_as_its_text():
    hidden = {2: [f"a {i}" for i in range(9)], 3: ["large red circle", "the other one"]}
    two_words = {"answer": "a 4", "masked_caption": "Here is [MASK]."}
    rivals = rival_answers(two_words, hidden)
    assert rivals[0] == "a 4" and len(set(rivals)) == 8 and set(rivals) <= set(hidden[2])
    assert rival_answers(two_words, hidden) == rivals
    # another place in the data, another draw
    other = {**two_words, "masked_caption": "There is [MASK]."}
    assert set(rival_answers(other, hidden)) != set(rivals)
    assert rival_answers(RECORD, hidden) == ["large red circle", "the other one", *[None] * 6]


# ---------------------------------------------------------------- the reward


class Generous:
    """A CLIP that likes everything and remembers the texts that it was shown."""

    def __call__(self, images, texts, relative):
        self.texts = texts
        return torch.ones(len(texts), len(texts[0]))


def test_a_wordy_answer_earns_no_visual_reward_and_a_broken_completion_earns_nothing():
    answers = [
        "large red circle",
        "big red disc",
        "a red circle that is large and round and nicely drawn",
        "circle" * 20,
    ]
    completions = [*map(completion, answers), "large red circle"]
    clip = Generous()
    components = Reward({"semantic": 1, "visual": 1}, clip=clip)([RECORD], [RED], [completions])
    assert components["format"].tolist() == [[1, 1, 1, 1, 0]]
    assert components["visual"].tolist() == [pytest.approx([1, 1, 0, math.exp(-2), 0])]
    assert components["semantic"].tolist() == [pytest.approx([1, 1 / 3, 2 / 7, 0, 0])]
    assert clip.texts[0][1] == "The top left holds a big red disc."


def test_the_brevity_penalty_grows_with_the_ratio_of_lengths_both_ways():
    target = "large red circle"
    assert brevity_penalty(target, target) == 1
    assert brevity_penalty("large red", target) == pytest.approx(math.exp(-1 / 2))
    assert brevity_penalty("a large red circle", target) == pytest.approx(math.exp(-1 / 3))
    # at most 2 x 3 + 2 words
    assert brevity_penalty("one two three four five six seven eight", target) > 0
    assert brevity_penalty("one two three four five six seven eight nine", target) == 0
    # each CJK character is a word
    assert brevity_penalty("红色", "红色圆形") == pytest.approx(math.exp(-1))
    assert brevity_penalty("", "red") == 0


def reward_of_flags(*flags):
    """load_reward() of these flags, of one record whose image does not exist."""
    parser = argparse.ArgumentParser()
    add_reward_flags(parser)
    args = parser.parse_args(flags)
    args.reward = dict(args.reward)
    args.max_pixels = 100
    policy = SimpleNamespace(
        model=SimpleNamespace(device="cpu"), processor=SimpleNamespace(tokenizer=None)
    )
    return load_reward(args, [RECORD | {"image": "no.png"}], "nowhere", policy)


def test_a_component_of_weight_0_loads_nothing_and_is_not_computed(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a CLIP was loaded for nothing")

    monkeypatch.setattr(reward, "ClipScorer", never)
    monkeypatch.setattr(common.clip.open_clip, "create_model_and_transforms", never)
    for flags in (["semantic=1", "visual=0"], ["semantic=1"]):
        scorer = reward_of_flags("--reward", *flags, "--clip", "no-such-model")
        assert scorer.weights == {"semantic": 1}
        components = scorer([RECORD], [RED], [[completion("red"), "no"]])
        assert set(components) == {"format", "semantic"}

    visual_only = Reward({"semantic": 0, "visual": 1}, clip=Generous())
    assert set(visual_only([RECORD], [RED], [["no"]])) == {"format", "visual"}


def test_the_gate_holds_for_a_component_that_does_not_look(monkeypatch):
    def generous(reward, records, images, answers):
        return torch.ones(len(answers), len(answers[0]))

    monkeypatch.setitem(COMPONENTS, "generous", generous)
    completions = [[completion("red"), "red", completion("")]]
    components = Reward({"generous": 1.0})([RECORD], [RED], completions)
    assert components["generous"].tolist() == [[1, 0, 0]]


def test_a_new_component_is_one_function_and_one_entry(monkeypatch):
    def is_short(reward, record, answer):
        return float(len(answer.split()) < 3)

    monkeypatch.setitem(COMPONENTS, "short", for_each_answer(is_short))
    scorer = reward_of_flags("--reward", "semantic=1", "short=0.5")
    completions = [completion("a red circle"), completion("circle"), "circle"]
    components = scorer([RECORD], [RED], [completions])
    # the gate holds for it too
    assert components["short"].tolist() == [[0, 1, 0]]
    assert scorer.weights == {"semantic": 1, "short": 0.5}


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "large", " red", "circle", ".", " ", "圆"]
PIECES += ["[MASK]", "\n"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=9), max_size=9).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS | TEXTS.map(completion), min_size=2, max_size=4),
    st.sampled_from(["exact", "prefix", "rouge_l"]),
    st.sampled_from(["images", "answers", "pool", "none"]),
)
@example([completion("large red circle"), completion("large red circle")], "rouge_l", "answers")
@example([completion("large red circle"), "no"], "rouge_l", "pool")
def test_every_component_is_between_0_and_1_whatever_is_written(
    clip, completions, credit, relative
):
    weights = {"semantic": 1, "visual": 1}
    scorer = Reward(weights, credit, relative, tokenizer_of("qwen3_vl"), clip)
    components = scorer([RECORD], [RED], [completions])
    assert set(components) == {"format", "semantic", "visual"}
    for name, component in components.items():
        assert component.shape == (1, len(completions)), name
        assert component.isfinite().all(), name
        assert (component >= 0).all() and (component <= 1 + 1e-6).all(), name
        assert not component[components["format"] == 0].any(), name


def test_the_component_of_the_readme_works_as_written(monkeypatch):
    readme = (Path(reward.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    namespace = dict(vars(reward))
    exec(code, namespace)
    monkeypatch.setitem(COMPONENTS, "colour", namespace["COMPONENTS"]["colour"])
    completions = [[completion("Red circle"), completion("circle"), "red circle"]]
    components = Reward({"colour": 0.2})([RECORD], [RED], completions)
    assert components["colour"].tolist() == [[1, 0, 0]]
