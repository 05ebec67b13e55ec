"""The reward, part by part, against numbers worked out by hand; and what must not be able to earn it."""
import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

import reward
from reward import (ClipScorer, Reward, add_arguments, advantages, against_answers, against_images, exact_match,
                    length_factor, load_reward, normalise, parse_completion, prefix_credit, semantic_credit, target_completion,
                    word_credit)
from tiny import picture, tokenizer_of

RECORD = {"sentence": "The top left holds a [MASK].", "answer": "large red circle"}
RED, NOISE = picture(1), [picture(seed) for seed in (2, 3, 4)]


def completion(answer):
    return f"<think>I look.</think><answer>{answer}</answer>"


# ------------------------------------------------------------------- format


@pytest.mark.parametrize("text, answer", [
    ("<think>a disc</think><answer> red circle\n</answer>", "red circle"),
    ("<think></think><answer>red</answer>", "red"),
    (" <think>two\nlines</think>\n\n<answer>a < b > c</answer>\n", "a < b > c"),
    ("<think>x</think><answer></answer>", None),
    ("<think>x</think><answer> \n </answer>", None),
    ("<think>x</think><answer>...</answer>", None),                         # nothing but punctuation hides no text
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
])
def test_only_one_thought_and_one_answer_pass_the_gate(text, answer):
    assert parse_completion(text) == answer


def test_what_imitation_learns_to_write_passes_the_gate():
    target = target_completion({"sentence": "It is [MASK] wide.", "answer": "3.5 m (large)"})
    assert target == "<think>It is</think><answer>3.5 m (large)</answer>" and parse_completion(target) == "3.5 m (large)"


# ------------------------------------------------------------------- semantic


@pytest.mark.parametrize("answer, target", [
    ("Red  Circle.", "red circle"), ("“red circle”", "red circle"), ("ＲＥＤ circle", "red circle"), ("Straße", "STRASSE"), ("红色。", "红色")])
def test_case_width_spaces_and_outer_punctuation_do_not_count(answer, target):
    assert exact_match(answer, target) == exact_match(target, answer) == 1


@pytest.mark.parametrize("answer, target", [("red", "red circle"), ("redcircle", "red circle"), ("", ""), (".", "!"),
                                            ("well lit", "well-lit")])
def test_other_words_and_no_words_are_no_match(answer, target):
    assert exact_match(answer, target) == 0


def test_inner_punctuation_stays():
    assert normalise(" 'The 3.5 m, well-lit room!' ") == "the 3.5 m, well-lit room"


@pytest.mark.parametrize("answer, credit", [
    ("large", 5 / 16), ("large red", 9 / 16), ("Large RED", 9 / 16), ("large red circle", 1), ("large r", 0), ("lar", 0), ("red", 0),
    ("large blue", 0), ("large red circles", 0), ("", 0)])
def test_a_prefix_earns_credit_only_where_a_token_of_the_target_ends(answer, credit):
    boundaries = {5, 9, 16}                                                                  # large| red| circle
    assert prefix_credit(answer, "large red circle", boundaries, graded=True) == credit
    assert prefix_credit(answer, "large red circle", boundaries) == (credit > 0)


@pytest.mark.parametrize("answer, credit", [
    ("large red circle", 1), ("large blue circle", 2 / 3), ("circle red large", 1 / 3), ("red", 1 / 2), ("a large red circle", 6 / 7),
    ("red red red", 1 / 3), ("Large, blue", 0), ("blue", 0), ("", 0)])
def test_words_are_credited_in_order_and_against_both_lengths(answer, credit):
    assert word_credit(answer, "large red circle") == pytest.approx(credit)


@pytest.mark.parametrize("kind, credits", [
    ("exact", [1, 0, 0, 0]), ("prefix", [1, 1, 0, 0]), ("graded", [1, 9 / 16, 0, 0]), ("words", [1, 4 / 5, 2 / 3, 0])])
def test_each_kind_of_credit_at_the_boundaries_of_a_real_tokenizer(kind, credits):
    tokenizer, target = tokenizer_of("qwen3_vl"), "large red circle"
    answers = ["Large red circle.", "large red", "large blue circle", "star"]
    assert [semantic_credit(a, target, kind, tokenizer) for a in answers] == pytest.approx(credits)


# ------------------------------------------------------------------- visual


def test_against_images_by_hand():
    own, others = torch.tensor([2.0]), torch.tensor([[0.0, math.log(3)]])                     # log mean exp = log 2
    assert against_images(own, others).item() == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    itself = torch.cat([others, torch.tensor([[-math.inf]])], -1)                             # does not take part
    assert against_images(own, itself).item() == pytest.approx(math.exp(2) / (math.exp(2) + 2))


def test_text_that_fits_every_picture_gets_one_half_and_a_bonus_of_the_text_cancels():
    own, others = torch.tensor([[3.0, -1.0]]), torch.tensor([[[3.0] * 5, [2.0, -3.0, 0.5, 1.0, -9.0]]])
    assert against_images(own, others)[0, 0].item() == pytest.approx(0.5)
    wordy = torch.tensor([[7.0, 100.0]])
    torch.testing.assert_close(against_images(own + wordy, others + wordy[..., None]), against_images(own, others))


def test_against_answers_is_a_distribution_over_distinct_answers_in_which_the_picture_cancels():
    scores, texts = torch.tensor([0.0, math.log(3), 0.0, math.log(4)]), ["a", "b", "a", "c"]
    p = against_answers(scores, texts)
    assert p.tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 8, 4 / 8])                          # a counts once
    torch.testing.assert_close(against_answers(scores + 50, texts), p)


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipScorer(str(clip_folder), others=NOISE)


def logits(clip, images, texts):
    """S by hand, one image and one text at a time: (images, texts)."""
    with torch.no_grad():
        rows = [[clip.model.logit_scale.exp() * torch.cosine_similarity(clip.model.encode_image(clip.preprocess(i)[None]),
                                                                       clip.model.encode_text(clip.tokenizer([t])))[0]
                 for t in texts] for i in images]
    return torch.tensor(rows)


def test_the_logit_is_scale_times_cosine_and_every_text_gets_its_own(clip):
    texts = [["a red dog", "a cat", "a cat"], ["a cat", "no", "a red dog"]]                    # repeated, in another order
    own = torch.stack([logits(clip, [i], t)[0] for i, t in zip((RED, NOISE[0]), texts)])
    others = torch.stack([logits(clip, NOISE, t).T for t in texts])
    score = lambda relative: clip([RED, NOISE[0]], texts, relative)
    scale = clip.model.logit_scale.exp().item()
    torch.testing.assert_close(score("none"), (own / scale).clamp(0, 1), atol=1e-5, rtol=0)
    prior = torch.stack([others[0].exp().mean(-1), others[1, :, 1:].exp().mean(-1)])           # NOISE[0] not against itself
    torch.testing.assert_close(score("images"), torch.sigmoid(own - prior.log()), atol=1e-5, rtol=0)
    first, second = own.exp()
    expected = torch.stack([first / first[:2].sum(), second / second.sum()])
    torch.testing.assert_close(score("answers"), expected, atol=1e-5, rtol=0)
    assert score("images").std() > 1e-3                                                       # the tiny model tells them apart


def folder_with_a_hub_tokenizer(clip_folder, tmp_path):
    """As clip_folder, but its tokenizer pads with another id than 0, as that of SigLIP does."""
    import open_clip
    tokenizer, config = tokenizer_of("qwen3_vl"), json.loads((clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"vocab_size": len(tokenizer), "hf_tokenizer_name": "this folder", "pool_type": "last"}
    torch.save(open_clip.CLIP(**config["model_cfg"]).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_texts_beyond_the_context_are_counted(clip_folder, tmp_path, own_tokenizer):
    scorer = ClipScorer(str(folder_with_a_hub_tokenizer(clip_folder, tmp_path) if own_tokenizer else clip_folder))
    scorer([RED], [["a cat", "the red circle " * 12, "one", "a large area " * 20]], "answers")
    assert scorer.cut == 2


@pytest.mark.parametrize("name, weights", [("no-such-model", None), ("ViT-B-32", "no-such-tag"), ("hf-hub:no/such", None), ("empty", None),
                                           ("ViT-S-32-alt", None), ("no weights", None)])
def test_a_clip_that_cannot_be_loaded_ends_in_one_line(clip_folder, tmp_path, name, weights):
    """The last two would load, with random weights, and reward noise."""
    for folder in ("empty", "no weights"):
        (tmp_path / folder).mkdir()
    (tmp_path / "no weights" / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    name = str(tmp_path / name) if (tmp_path / name).exists() else name
    with pytest.raises(SystemExit) as e:
        ClipScorer(name, weights)
    assert name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


# ------------------------------------------------------------------- the reward


class Generous:
    """A CLIP that likes everything, and remembers what it was shown."""
    def __call__(self, images, texts, relative):
        self.texts = texts
        return torch.ones(len(texts), len(texts[0]))


def test_a_wordy_answer_earns_no_visual_credit_and_a_broken_one_earns_nothing():
    answers = ["large red circle", "big red disc", "a red circle that is large and round and nicely drawn", "circle" * 20]
    clip = Generous()
    parts = Reward({"semantic": 1, "visual": 1}, clip=clip)([RECORD], [RED], [[*map(completion, answers), "large red circle"]])
    assert parts["format"].tolist() == [[1, 1, 1, 1, 0]]
    assert parts["visual"].tolist() == [pytest.approx([1, 1, 0, math.exp(-2), 0])]
    assert parts["semantic"].tolist() == [pytest.approx([1, 1 / 3, 2 / 7, 0, 0])]
    assert clip.texts[0][1] == "The top left holds a big red disc."


def test_visual_credit_falls_with_the_ratio_of_lengths_both_ways_and_is_nothing_far_above():
    assert length_factor("large red circle", "large red circle") == 1
    assert length_factor("large red", "large red circle") == pytest.approx(math.exp(-1 / 2))
    assert length_factor("a large red circle", "large red circle") == pytest.approx(math.exp(-1 / 3))
    assert length_factor("one two three four five six seven eight", "large red circle") > 0               # 2 x 3 + 2
    assert length_factor("one two three four five six seven eight nine", "large red circle") == 0
    assert length_factor("红色", "红色圆形") == pytest.approx(math.exp(-1)) and length_factor("", "red") == 0


def test_a_part_of_weight_0_loads_nothing_and_is_not_computed(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a CLIP was loaded for nothing")
    monkeypatch.setattr(reward, "ClipScorer", never)
    monkeypatch.setattr(reward.open_clip, "create_model_and_transforms", never)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--w-visual", "0", "--clip", "no-such-model"])
    parts = load_reward(args, [RECORD | {"image": "no.png"}], "nowhere", 100, "cpu")([RECORD], [RED], [[completion("red"), "no"]])
    assert set(parts) == {"format", "semantic"}
    assert set(Reward({"semantic": 0, "visual": 1}, clip=Generous())([RECORD], [RED], [["no"]])) == {"format", "visual"}


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "large", " red", "circle", ".", " ", "圆", "[MASK]", "\n"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=9), max_size=9).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS | TEXTS.map(completion), min_size=2, max_size=4), st.sampled_from(["exact", "prefix", "graded", "words"]),
       st.sampled_from(["images", "answers", "none"]))
@example([completion("large red circle"), completion("large red circle")], "words", "answers")
def test_every_part_is_between_0_and_1_whatever_is_written(clip, completions, credit, relative):
    parts = Reward({"semantic": 1, "visual": 1}, credit, relative, tokenizer_of("qwen3_vl"), clip)([RECORD], [RED], [completions])
    for name, part in parts.items():
        assert part.shape == (1, len(completions)) and part.isfinite().all() and (0 <= part).all() and (part <= 1 + 1e-6).all(), name
        assert not part[parts["format"] == 0].any()


# ------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    parts = {"a": torch.tensor([[1.0, 0, 0, 1], [4, 0, 0, 0]])}                               # means 1/2, 1; stds 3^-1/2, 2
    expected = torch.tensor([[.866, -.866, -.866, .866], [1.5, -.5, -.5, -.5]])
    torch.testing.assert_close(advantages(parts, {"a": 1.0}, eps=1e-4), expected, atol=1e-3, rtol=0)
    expected = torch.tensor([[.5, -.5, -.5, .5], [3, -1, -1, -1]]) / torch.tensor([[3 ** -0.5 + 0.1], [2.1]])
    torch.testing.assert_close(advantages(parts, {"a": 1.0}), expected)
    torch.testing.assert_close(advantages(parts, {"a": 2.0}, scale=False), torch.tensor([[1.0, -1, -1, 1], [6, -2, -2, -2]]))


def test_parts_are_normalised_before_they_are_added_so_their_scales_do_not_decide():
    a, b, weights = torch.tensor([[1.0, 0, 0.5, 0]]), torch.tensor([[0.2, 0.9, 0.4, 0.4]]), {"a": 1.0, "b": 3.0}
    small, large = (advantages({"a": a, "b": b * k}, weights, eps=1e-4) for k in (1, 100))
    torch.testing.assert_close(small, large, atol=2e-3, rtol=0)
    torch.testing.assert_close(small, advantages({"a": a}, {"a": 1.0}, eps=1e-4) + advantages({"b": b}, {"b": 3.0}, eps=1e-4))
    assert not torch.allclose(*(advantages({"a": a, "b": b * k}, weights, scale=False) for k in (1, 100)), atol=0.5)


def test_a_hair_between_two_right_answers_is_not_blown_up_to_right_and_wrong():
    hair = advantages({"visual": torch.tensor([[0.999, 0.998, 0.999, 0.998]])}, {"visual": 1.0})
    apart = advantages({"visual": torch.tensor([[0.999, 0.1, 0.999, 0.1]])}, {"visual": 1.0})
    assert hair.abs().max() < 0.02 * apart.abs().max()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, 2 / 3, 0.99])
def test_a_part_that_is_equal_for_the_whole_group_drops_out(value):
    """Rounding in the mean, divided by eps, must not become an advantage: zero_std_fraction counts below 1e-6."""
    a, same = torch.tensor([[1.0, 0, 0, 0, 0, 0, 1, 0]]), torch.full((1, 8), value)
    assert advantages({"same": same}, {"same": 1.0}).abs().max() < 1e-6
    torch.testing.assert_close(advantages({"a": a, "same": same}, {"a": 1.0, "same": 1.0}), advantages({"a": a}, {"a": 1.0}))


# ------------------------------------------------------------------- the script


def test_the_script_scores_predictions_and_a_broken_record_costs_only_itself(stage, clip_folder, tmp_path):
    RED.save(tmp_path / "a.png")
    NOISE[0].save(tmp_path / "b.png")
    good = [{**RECORD, "image": "a.png", "prediction": completion("large red circle")},
            {**RECORD, "image": "b.png", "prediction": "large red circle"}]
    bad = [{**RECORD, "image": "no.png", "prediction": completion("a")}, {**RECORD, "image": "a.png", "prediction": None},
           {**RECORD, "image": "a.png", "answer": 3, "prediction": completion("a")}, {**RECORD, "image": 7, "prediction": completion("a")},
           {**RECORD, "image": "a.png"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [good[0], *bad, good[1]]) + '{"image": "a.p')
    arguments = ("--predictions", tmp_path / "p.jsonl", "--image-root", tmp_path, "--clip", clip_folder)
    error, printed = stage(reward, *arguments)
    assert error is None and all(f"skipped {tmp_path}/p.jsonl:{n}: " in printed for n in (2, 3, 4, 5, 6, 8)), printed
    rows = [json.loads(line) for line in (tmp_path / "p.rewards.jsonl").open()]
    assert [(r["image"], r["format"], r["semantic"]) for r in rows] == [("a.png", 1, 1), ("b.png", 0, 0)]
    assert 0 < rows[0]["visual"] < 1 and rows[1]["visual"] == 0 and "2 predictions scored, 6 skipped" in printed


def test_token_credit_without_a_policy_is_refused_in_one_line(stage, tmp_path):
    error, _ = stage(reward, "--predictions", tmp_path / "p.jsonl", "--credit", "prefix")
    assert "--credit prefix" in error and "\n" not in error


def test_the_worked_example_of_the_readme_is_what_the_reward_returns():
    text = (Path(reward.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.partition("| answer | semantic")[2].splitlines()[2:7]]
    number = lambda cell: float(cell.strip("* "))
    answers = [None if "no" in row[0] else row[0] for row in rows]
    semantic = [reward.semantic_credit(a, "large red circle", "words") if a else 0.0 for a in answers]
    assert len(rows) == 5 and semantic == pytest.approx([number(row[1]) for row in rows], abs=0.005)
    parts = {"semantic": torch.tensor([semantic]), "visual": torch.tensor([[number(row[2]) for row in rows]])}
    for column, weights in ((3, {"semantic": 1.0}), (4, {"semantic": 1.0, "visual": 1.5})):
        assert reward.advantages(parts, weights)[0].tolist() == pytest.approx([number(row[column]) for row in rows], abs=0.005)
