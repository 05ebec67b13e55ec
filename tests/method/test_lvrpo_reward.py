"""LVRPO's rewards, against numbers worked out by hand; its judges, against the plain computation."""

import argparse
import math

import open_clip
import pytest
import torch
from PIL import Image
from tiny import random_image
from torchvision.ops import box_iou
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

import lvrpo.reward
from common import judges
from common.drawing_prompts import check_prompts, keywords_of
from common.judges import Detection, Knowledge, class_of, crop_of, crops_of, load_detector
from lvrpo.reward import (
    DRAWING_COMPONENTS,
    READING_COMPONENTS,
    DrawingReward,
    RawSum,
    ReadingReward,
    add_lvrpo_reward_flags,
    check_judges,
    load_drawing_reward,
    load_judges,
)
from lvrpo.train import judged_by
from reward import COMPONENTS, ClipScorer, Reward, advantages

CPU = torch.device("cpu")
PROMPT = {"id": "p1", "prompt": "A red circle. A blue square."}
RED_CIRCLE = {"class": "circle", "count": 1, "color": "red"}
BLUE_SQUARE = {"class": "square", "count": 1, "color": "blue"}
OBJECTS = PROMPT | {"include": [RED_CIRCLE, BLUE_SQUARE]}
RIVALS = ["A cat.", "A dog."]


def numbered(*numbers):
    """Images that TableClip tells apart by these numbers."""
    return [Image.new("RGB", (1, 1), (number, 0, 0)) for number in numbers]


class TableClip:
    """A CLIP whose logits, scale times cosine, are given: {text: [that of image 0, 1, ...]}.

    An image is numbered by its first pixel; one of 4 x 4 pixels is number 15.
    """

    def __init__(self, table, scale=10.0):
        self.table = table
        self.scale = scale

    def logit_scale(self):
        # as in a model, a parameter
        return torch.tensor(self.scale, requires_grad=True)

    def image_features(self, images):
        numbers = [15 if im.size == (4, 4) else im.getpixel((0, 0))[0] for im in images]
        return torch.eye(16)[numbers]

    def text_features(self, texts):
        columns = torch.zeros(len(texts), 16)
        for t, text in enumerate(texts):
            logits = torch.tensor(self.table[text])
            columns[t, : len(logits)] = logits
        return columns / self.scale


# ---------------------------------------------------------------- sem


SEM_TABLE = {
    "A cat.": [0.0, 0.0],
    "A dog.": [math.log(3), 0.0],
    "A red circle.": [2.0, 0.0],
    # as good as the rivals: the log of (1 + 3) / 2
    "A blue square.": [math.log(2), 1.0],
}


def test_sem_is_the_mean_over_sentences_of_their_pmi():
    reward = DrawingReward({"sem": 1}, TableClip(SEM_TABLE), rivals=RIVALS)
    sem = reward([PROMPT], [numbered(0, 1)])["sem"]
    first = 1 / (1 + math.exp(math.log(2) - 2))
    assert first == pytest.approx(0.79, abs=0.005)
    # of image 1: sigmoid(0) and sigmoid(1)
    second = (0.5 + 1 / (1 + math.exp(-1))) / 2
    assert sem.tolist() == [pytest.approx([(first + 0.5) / 2, second])]
    assert sem[0, 0].item() == pytest.approx(0.64, abs=0.005)
    # or the advantage would carry a graph
    assert not sem.requires_grad


def test_a_rival_that_is_the_sentence_itself_does_not_take_part():
    # an outer full stop and the case make no difference
    table = SEM_TABLE | {"a RED circle": [50.0, 50.0]}
    reward = DrawingReward({"sem": 1}, TableClip(table), rivals=[*RIVALS, "a RED circle"])
    record = {"id": 1, "prompt": "A red circle."}
    sem = reward([record], [numbered(0)])["sem"]
    assert sem.item() == pytest.approx(1 / (1 + math.exp(math.log(2) - 2)))
    other = reward([{"id": 1, "prompt": "A blue square."}], [numbered(0)])["sem"]
    assert other.item() < 1e-9


def test_what_a_drawing_adds_to_every_text_cancels_and_so_does_a_bias():
    shifted = {text: [logit + 3 for logit in logits] for text, logits in SEM_TABLE.items()}
    plain = DrawingReward({"sem": 1}, TableClip(SEM_TABLE), rivals=RIVALS)
    biased = DrawingReward({"sem": 1}, TableClip(shifted), rivals=RIVALS)
    expected = plain([PROMPT], [numbered(0, 1)])["sem"]
    torch.testing.assert_close(biased([PROMPT], [numbered(0, 1)])["sem"], expected)


def test_relative_to_nothing_sem_is_the_cosine_and_needs_no_rivals():
    table = {"A red circle.": [4.0, -4.0], "A blue square.": [2.0, 6.0]}
    reward = DrawingReward({"sem": 1}, TableClip(table))
    # a cosine of -0.4 counts as 0
    assert reward([PROMPT], [numbered(0, 1)])["sem"].tolist() == [pytest.approx([0.3, 0.3])]


def test_one_rival_is_none_as_it_may_be_the_sentence_itself():
    with pytest.raises(SystemExit, match="prompts of two texts or more"):
        DrawingReward({"sem": 1}, TableClip(SEM_TABLE), rivals=["A cat.", "a cat"])


# ---------------------------------------------------------------- ins


def detect_by_number(images, records):
    """Image 0 has a red circle and a green square, image 1 both as asked, image 2 nothing."""
    circle = Detection((0, 0, 4, 4), 0.9, "red")
    square = Detection((8, 8, 12, 12), 0.9, "green")
    found = [
        {"circle": [circle], "square": [square]},
        {"circle": [circle], "square": [square._replace(colour="blue")]},
        {"circle": [], "square": []},
    ]
    assert len(images) == len(records)
    return [found[image.getpixel((0, 0))[0]] for image in images]


@pytest.mark.parametrize(
    "verdict, scores", [("graded", [[0.75, 1], [0, 0.75]]), ("binary", [[0, 1], [0, 0]])]
)
def test_ins_is_the_share_of_clauses_or_whether_all_hold(verdict, scores):
    reward = DrawingReward({"ins": 1}, detector=detect_by_number, verdict=verdict)
    ins = reward([OBJECTS, OBJECTS], [numbered(0, 1), numbered(2, 0)])["ins"]
    assert ins.dtype == torch.float32 and ins.tolist() == scores


def test_each_drawing_is_judged_by_the_record_of_its_group():
    circle_only = PROMPT | {"include": [RED_CIRCLE]}
    reward = DrawingReward({"ins": 1}, detector=detect_by_number)
    ins = reward([circle_only, OBJECTS], [numbered(0, 2), numbered(0, 2)])["ins"]
    assert ins.tolist() == [[1, 0], [0.75, 0]]


@pytest.mark.parametrize("more", [{}, {"include": []}])
def test_a_prompt_without_objects_is_named_before_training(more):
    record = PROMPT | more
    with pytest.raises(SystemExit, match="^error: prompt p1 has no objects") as error:
        check_prompts([OBJECTS, record], {"ins": 1})
    assert "\n" not in str(error.value)
    # nobody asks for objects
    assert check_prompts([record], {"ins": 0, "sem": 1}) is None
    assert check_prompts([PROMPT | {"exclude": [RED_CIRCLE]}], {"ins": 1}) is None


def test_a_prompt_without_words_is_named_before_training():
    with pytest.raises(SystemExit, match="prompt 7 has no words"):
        check_prompts([{"id": 7, "prompt": " ... "}], {"sem": 1})


# ---------------------------------------------------------------- kn


class Oracle:
    """A Knowledge with given answers, which remembers what it was asked."""

    def __init__(self, *p):
        self.p = torch.tensor(p)

    def p_yes(self, images, texts):
        self.asked = list(zip(images, texts))
        return self.p[: len(texts)]


def test_kn_asks_for_each_drawing_whether_it_shows_its_prompt():
    oracle = Oracle(0.1, 0.2, 0.3, 0.4)
    dog = {"id": 2, "prompt": "A dog."}
    drawings = [numbered(0, 1), numbered(2, 3)]
    kn = DrawingReward({"kn": 1}, knowledge=oracle)([PROMPT, dog], drawings)["kn"]
    torch.testing.assert_close(kn, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    texts = [PROMPT["prompt"]] * 2 + ["A dog."] * 2
    assert oracle.asked == list(zip(drawings[0] + drawings[1], texts))


@pytest.fixture(scope="module")
def knowledge(checkpoint):
    return Knowledge(str(checkpoint("qwen3_vl")), CPU)


@torch.no_grad()
def test_p_yes_is_that_of_a_plain_pass_for_prompts_of_different_lengths(knowledge, monkeypatch):
    monkeypatch.setattr(judges, "BATCH", 2)
    texts = ["A cat.", "A large red circle is to the left of the small blue square.", "Stars"]
    sizes = [(64, 48), (32, 32), (48, 64)]
    images = [random_image(seed, size) for seed, size in enumerate(sizes)]
    model, processor = knowledge.model, knowledge.processor
    expected = []
    for image, text in zip(images, texts):
        question = f'Does this figure show "{text}"? Please answer yes or no.'
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        p = model(**inputs).logits[0, -1].softmax(-1)
        expected.append(p[knowledge.yes_ids].sum())
    p_yes = knowledge.p_yes(images, texts)
    torch.testing.assert_close(p_yes, torch.stack(expected), rtol=1e-4, atol=1e-7)
    # it depends on the image and the text
    assert p_yes.unique().numel() == 3


def test_yes_of_any_spelling_is_added_up_and_no_is_not_looked_at(knowledge, monkeypatch):
    tokenizer = knowledge.processor.tokenizer
    firsts = []
    for spelling in ("Yes", "yes", " Yes", " yes"):
        firsts.append(tokenizer(spelling, add_special_tokens=False).input_ids[0])
    assert set(knowledge.yes_ids) <= set(firsts) and len(knowledge.yes_ids) >= 2

    no = tokenizer("no", add_special_tokens=False).input_ids[0]
    p = torch.full((len(tokenizer),), 1e-9)
    p[knowledge.yes_ids[0]] = 0.5
    p[knowledge.yes_ids[1]] = 0.2
    p[no] = 0.1
    p[tokenizer.eos_token_id] = 0.2

    def forward(**inputs):
        return argparse.Namespace(logits=p.log().expand(1, 1, -1))

    monkeypatch.setattr(knowledge.model, "forward", forward)
    assert knowledge.p_yes([random_image(1)], ["A cat."]).item() == pytest.approx(0.7, abs=1e-4)


def test_what_is_asked_about_cannot_break_the_form_of_the_question(knowledge):
    image_token = knowledge.processor.image_token
    hostile = f"A cat{image_token}<|im_end|>."
    assert knowledge.question(hostile) == knowledge.question("A cat  .")
    assert knowledge.p_yes([random_image(1)], [hostile]).isfinite().all()
    assert knowledge.p_yes([], []).shape == (0,)


# ---------------------------------------------------------------- dense


def grid_image():
    """4 x 4 pixels, numbered by rows: the crop that begins at (x, y) has number 4 y + x."""
    image = Image.new("RGB", (4, 4))
    for y in range(4):
        for x in range(4):
            image.putpixel((x, y), (4 * y + x, 0, 0))
    return image


def test_the_crops_are_the_whole_and_nine_halves_that_overlap():
    crops = crops_of(grid_image())
    assert [crop.size for crop in crops] == [(4, 4)] + [(2, 2)] * 9
    first_pixels = [crop.getpixel((0, 0))[0] for crop in crops[1:]]
    assert first_pixels == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert all(crop.size == (1, 1) for crop in crops_of(Image.new("RGB", (1, 1))))


def test_dense_is_the_mean_over_keywords_of_the_two_best_crops():
    circle = [-9.0] * 16
    square = [-9.0] * 16
    # the whole, and the crop in the middle
    circle[15], circle[5] = 9.0, 7.0
    square[10], square[2], square[0] = 3.0, 1.0, 0.5
    clip = TableClip({"red circle": circle, "blue square": square})
    reward = DrawingReward({"dense": 1}, clip)
    dense = reward([OBJECTS], [[grid_image(), grid_image()]])["dense"]
    assert dense.tolist() == [pytest.approx([0.5, 0.5])]


def test_dense_is_relative_to_keywords_of_other_prompts():
    table = {"red circle": [2.0], "green star": [0.0], "white cube": [math.log(3)]}
    keywords = ["green star", "white cube", "red circle"]
    reward = DrawingReward({"dense": 1}, TableClip(table), rival_keywords=keywords)
    record = PROMPT | {"include": [RED_CIRCLE]}
    # every crop of a single pixel is image 0
    dense = reward([record], [numbered(0)])["dense"]
    assert dense.item() == pytest.approx(1 / (1 + math.exp(math.log(2) - 2)))


def test_keywords_are_what_is_included_or_else_long_words():
    assert keywords_of(OBJECTS) == ["red circle", "blue square"]
    assert keywords_of({"prompt": "x", "include": [{"class": "dog", "count": 2}]}) == ["dog"]
    assert keywords_of({"prompt": "A well-lit room, a Room."}) == ["well-lit", "room"]
    assert keywords_of({"prompt": "A cat."}) == ["A cat."]


# ---------------------------------------------------------------- the reward of a drawing


class Untouchable:
    """A judge that may not be used."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was used for nothing")


def test_a_component_of_weight_0_computes_nothing():
    weights = {"ins": 2, "sem": 0, "kn": 0, "dense": 0}
    reward = DrawingReward(weights, Untouchable(), detect_by_number, Untouchable())
    assert reward.weights == {"ins": 2}
    assert set(reward([OBJECTS], [numbered(0, 1)])) == {"ins"}


def test_every_component_is_between_0_and_1_and_has_no_graph(clip_folder):
    def detect(images, records):
        found = Detection((0, 0, 9, 9), 0.8, "red")
        return [{"circle": [found], "square": []} for _ in images]

    args = flags("--draw-reward", "sem=1", "ins=1", "kn=1", "dense=1")
    other = {"id": "p2", "prompt": "A large green star!", "include": [RED_CIRCLE]}
    third = {"id": "p3", "prompt": "One more.", "include": [{"class": "hat", "count": 1}]}
    clip = ClipScorer(str(clip_folder))
    reward = load_drawing_reward(args, [OBJECTS, other, third], clip, detect, Oracle(*[0.5] * 6))
    drawings = [[random_image(3 * b + g) for g in range(3)] for b in range(2)]
    components = reward([OBJECTS, other], drawings)
    assert set(components) == set(DRAWING_COMPONENTS)
    for name, component in components.items():
        assert component.shape == (2, 3) and component.dtype == torch.float32, name
        assert ((component >= 0) & (component <= 1)).all(), name
        assert not component.requires_grad, name
    # the tiny model tells drawings apart
    assert components["sem"].std(-1).min() > 1e-4
    assert components["dense"].std(-1).min() > 1e-4


# ---------------------------------------------------------------- reading


MASKED = {"sentence": "The top left holds a [MASK].", "answer": "red circle"}
MASKED["masked_caption"] = MASKED["sentence"]


def completion(answer):
    return f"<think>I look.</think><answer>{answer}</answer>"


def test_reading_asks_about_the_filled_sentence_and_no_answer_gets_0():
    oracle = Oracle(0.9, 0.4)
    reward = ReadingReward({"kn": 1, "ins": 1, "sem": 0}, knowledge=oracle)
    image = random_image(1)
    completions = [[completion("red circle"), "no", completion("blue circle")]]
    components = reward([MASKED], [image], completions)
    assert set(components) == {"format", "kn", "ins"}
    assert components["kn"].tolist() == [pytest.approx([0.9, 0, 0.4])]
    assert components["ins"].tolist() == [pytest.approx([1, 0, 0.5])]
    expected = ["The top left holds a red circle.", "The top left holds a blue circle."]
    assert oracle.asked == [(image, text) for text in expected]
    # nobody is asked for a group without an answer
    assert not reward([MASKED], [image], [["no", "no"]])["kn"].any()


def test_sem_and_ins_of_reading_are_the_components_of_stage_3(clip_folder):
    clip = ClipScorer(str(clip_folder))
    records = [MASKED, MASKED | {"answer": "blue square"}]
    hidden = [record["answer"] for record in records]
    ours = ReadingReward({"sem": 1, "ins": 2}, clip=clip, hidden=hidden)
    theirs = Reward({"semantic": 1, "visual": 1}, clip=clip, hidden=["red circle", "blue square"])
    completions = [[completion("red circle"), completion("red"), "no"]]
    components = ours([MASKED], [random_image(1)], completions)
    expected = theirs([MASKED], [random_image(1)], completions)
    assert ours.weights == {"sem": 1, "ins": 2}
    torch.testing.assert_close(components["sem"], expected["visual"])
    torch.testing.assert_close(components["ins"], expected["semantic"])
    assert components["sem"][0, 0] > 0
    assert set(COMPONENTS).isdisjoint(READING_COMPONENTS)


# ---------------------------------------------------------------- detectors


def tiny_owl(folder):
    """An Owlv2 of random weights, whose tokens are letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *letters]
    tokens += [f"{letter}</w>" for letter in letters]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=small | text, vision_config=small | vision, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer.model_max_length = 16
    image = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(image, tokenizer).save_pretrained(folder)


def tiny_dino(folder):
    """A GroundingDINO of random weights, whose words are those of the labels."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "circle", "blue", "square"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    layers = {}
    for part in ("encoder", "decoder"):
        layers |= {f"{part}_ffn_dim": 16, f"{part}_attention_heads": 2}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(**small, vocab_size=len(words), num_attention_heads=2),
        num_queries=5,
        encoder_layers=1,
        decoder_layers=2,
        d_model=64,
        disable_custom_kernels=True,
        **layers,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    GroundingDinoProcessor(image, tokenizer).save_pretrained(folder)


BUILD = {"owlv2": tiny_owl, "grounding_dino": tiny_dino}


@pytest.fixture(scope="module", params=BUILD)
def detector(request, tmp_path_factory):
    """A detector of either family, without a CLIP."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        # a seed whose GroundingDINO is sure of some boxes and unsure of others
        torch.manual_seed(3)
        BUILD[request.param](folder)
    return load_detector(str(folder), None, CPU)


def corners(boxes, width, height):
    """Boxes (centre x, centre y, width, height), from 0 to 1, as corners in pixels."""
    x, y, w, h = boxes.unbind(-1)
    relative = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    return relative * torch.tensor([width, height, width, height])


@torch.no_grad()
def test_a_detector_gives_boxes_in_pixels_as_a_plain_pass_has_them(detector, monkeypatch):
    # the boxes of a random model overlap
    monkeypatch.setattr(judges, "OVERLAP", 1.0)
    image = random_image(1)
    inputs = detector.processor(images=[image], text=[["circle"]], return_tensors="pt")
    outputs = detector.model(**inputs)
    p = outputs.logits[0].sigmoid()
    if "owl" in type(detector.model).__name__.lower():
        # it pads an image of 64 x 48 to a square
        score = p[:, 0]
        boxes = corners(outputs.pred_boxes[0], 64, 64)
        is_circle = score > 0.1
    else:
        score = p.amax(-1)
        boxes = corners(outputs.pred_boxes[0], 64, 48)
        # [CLS] circle . [SEP]
        is_circle = p[:, 1] > 0.3
    order = score[is_circle].argsort(descending=True)
    assert len(order) > 1

    record = PROMPT | {"include": [{"class": "circle", "count": 1}]}
    (found,) = detector([image], [record])
    assert set(found) == {"circle"}
    detected = torch.tensor([d.box for d in found["circle"]])
    torch.testing.assert_close(detected, boxes[is_circle][order], atol=1e-3, rtol=1e-4)
    assert detected.max() > 2
    scores = torch.tensor([d.score for d in found["circle"]])
    torch.testing.assert_close(scores, score[is_circle][order])
    assert all(d.colour is None for d in found["circle"])


def test_each_image_gets_the_classes_of_its_own_record(detector):
    circle = PROMPT | {"include": [{"class": "circle", "count": 1}]}
    two = {"class": "red square", "count": 1}
    both = circle | {"include": [two], "exclude": [{"class": "blue circle", "count": 2}]}
    images = [random_image(seed) for seed in range(4)]
    found = detector(images, [circle, circle, both, both])
    classes = [{"circle"}] * 2 + [{"red square", "blue circle"}] * 2
    assert [set(objects) for objects in found] == classes
    # as alone, and in the order of the images
    (alone,) = detector(images[3:], [both])
    for name in classes[3]:
        assert len(found[3][name]) == len(alone[name])
        for together, single in zip(found[3][name], alone[name]):
            assert together.box == pytest.approx(single.box, abs=1e-2)
    assert sum(len(found[3][name]) for name in classes[3]) > 0


def test_clip_names_the_colours_of_objects_that_are_asked_for_by_colour(detector, monkeypatch):
    class Red:
        """Fits the texts with these colours best, and remembers the sizes of the crops."""

        def __init__(self):
            self.sizes = []
            self.colours = ["red"]
            self.choices = 10

        def image_features(self, images):
            self.sizes += [image.size for image in images]
            return torch.ones(len(images), 1)

        def text_features(self, texts):
            assert len(texts) == self.choices
            fits = [any(f"{c} circle" in text for c in self.colours) for text in texts]
            return torch.tensor(fits).float()[:, None]

    clip = Red()
    monkeypatch.setattr(detector, "clip", clip)
    square = {"class": "square", "count": 1}
    (found,) = detector([random_image(1)], [PROMPT | {"include": [RED_CIRCLE, square]}])
    assert {d.colour for d in found["circle"]} <= {"red"}
    assert {d.colour for d in found["square"]} <= {None}
    assert len(clip.sizes) == len(found["circle"])
    (found,) = detector([random_image(1)], [PROMPT | {"include": [RED_CIRCLE]}])
    assert found["circle"] and all(d.colour == "red" for d in found["circle"])

    # a colour that is not one of GenEval's ten can be obeyed too
    clip.colours = ["grey"]
    clip.choices = 11
    grey_circle = {"class": "circle", "count": 1, "color": "grey"}
    (found,) = detector([random_image(1)], [PROMPT | {"include": [grey_circle]}])
    assert found["circle"] and all(d.colour == "grey" for d in found["circle"])


def test_a_phrase_is_the_class_with_which_it_shares_most_words():
    names = ["dog", "hot dog", "cell phone"]
    phrases = ["dog", "hot dog", "hot", "Phone", "[CLS] cell phone .", "##g", ""]
    classes = [class_of(phrase, names) for phrase in phrases]
    assert classes == ["dog", "hot dog", "hot dog", "cell phone", "cell phone", None, None]


def test_a_crop_stays_within_the_image_and_has_a_pixel():
    image = random_image(1)
    assert crop_of(image, (-5, 10.2, 20.5, 30)).size == (21, 21)
    assert crop_of(image, (63.9, 47.9, 200, 200)).size == (1, 1)
    assert crop_of(image, (90, 90, 80, 80)).size == (1, 1)
    assert crop_of(image, (-9, -9, -5, -5)).size == (1, 1)


def test_of_boxes_that_overlap_the_surest_stays(detector):
    record = PROMPT | {"include": [{"class": "circle", "count": 1}]}
    (found,) = detector([random_image(1)], [record])
    boxes = torch.tensor([d.box for d in found["circle"]])
    overlap = box_iou(boxes, boxes) - torch.eye(len(boxes))
    assert len(boxes) and overlap.max() <= judges.OVERLAP
    scores = [d.score for d in found["circle"]]
    assert scores == sorted(scores, reverse=True)


FUNCTIONS = """
def right(images, records):
    return [{"circle": []} for _ in images]

def short(images, records):
    return [{}]

def raises(images, records):
    raise KeyError("red")

number = 7
"""


def test_a_detector_may_be_a_function_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "some_detectors.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    images = [random_image(seed) for seed in range(2)]
    detect = load_detector("some_detectors:right", None, CPU)
    assert detect(images, [PROMPT] * 2) == [{"circle": []}] * 2
    for name, message in (("short", "a dict for each image"), ("raises", "failed: KeyError")):
        with pytest.raises(SystemExit, match=message):
            load_detector(f"some_detectors:{name}", None, CPU)(images, [PROMPT] * 2)
    with pytest.raises(SystemExit, match="is no function"):
        load_detector("some_detectors:number", None, CPU)


NOT_LOADED = ["no_such:detect", "./no_such:detect", "common.geneval:detect", ":x", "no/such", "."]


@pytest.mark.parametrize("name", NOT_LOADED)
def test_a_detector_that_cannot_be_loaded_ends_in_one_line(name):
    with pytest.raises(SystemExit, match="^error: --detector ") as error:
        load_detector(name, None, CPU)
    assert name in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- flags and loading


def flags(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="policy")
    add_lvrpo_reward_flags(parser)
    args = parser.parse_args(arguments)
    args.draw_reward = dict(args.draw_reward)
    args.read_reward = dict(args.read_reward)
    args.objective = "grpo"
    return args


def test_the_flags_and_their_defaults():
    args = flags()
    assert args.draw_reward == args.read_reward == {"sem": 1, "ins": 1}
    assert (args.verdict, args.draw_relative) == ("graded", "prompts")
    # open_clip has it
    assert (args.clip, args.clip_weights) in open_clip.list_pretrained()
    args = flags("--draw-reward", "kn=0.5", "dense=2", "--read-reward", "kn=1")
    assert (args.draw_reward, args.read_reward) == ({"kn": 0.5, "dense": 2}, {"kn": 1})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--draw-reward", "semantic=1"], "no such component; there are sem, ins, kn, dense"),
        # an image that is given has no crops to reward
        (["--read-reward", "dense=1"], "no such component; there are sem, ins, kn\n"),
        (["--draw-reward", "sem"], "write NAME=WEIGHT, as sem=1"),
        (["--draw-reward", "sem=-1"], "invalid component_weight value: 'sem=-1'"),
        (["--verdict", "strict"], "invalid choice: 'strict'"),
    ],
)
def test_a_wrong_flag_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit):
        flags(*arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def loaded(monkeypatch):
    """The names of the judges that load_judges() loads, in place of the judges."""
    names = []

    def loads(name):
        def load(*args, **kwargs):
            names.append(name)
            return name

        return load

    monkeypatch.setattr(judges, "OpenVocabularyDetector", loads("OpenVocabularyDetector"))
    for name in ("ClipScorer", "Knowledge"):
        monkeypatch.setattr(lvrpo.reward, name, loads(name))
    return names


@pytest.mark.parametrize(
    "draw, read, detector, expected",
    [
        (["sem=1"], ["ins=1"], None, ["ClipScorer"]),
        (["dense=1"], ["ins=1"], None, ["ClipScorer"]),
        (["kn=1"], ["sem=1"], None, ["ClipScorer", "Knowledge"]),
        (["ins=1"], ["ins=1"], "common.geneval:verdict", []),
        # CLIP names colours
        (["ins=1"], ["ins=1"], "owl", ["ClipScorer", "OpenVocabularyDetector"]),
        (["ins=0", "sem=0"], ["kn=1", "sem=0"], "owl", ["Knowledge"]),
    ],
)
def test_only_judges_that_a_weight_needs_are_loaded(loaded, draw, read, detector, expected):
    args = flags("--draw-reward", *draw, "--read-reward", *read, "--knowledge", "judge")
    args.detector = detector
    judged = load_judges(args, judged_by(args), CPU)
    assert loaded == expected
    assert [judge is not None for judge in judged] == [
        "ClipScorer" in expected,
        detector is not None and args.draw_reward["ins"] > 0,
        "Knowledge" in expected,
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--draw-reward ins needs a --detector"),
        (["--draw-reward", "kn=1"], "the component kn needs --knowledge"),
        (["--draw-reward", "kn=1", "--knowledge", "policy"], "may not judge itself"),
        (["--draw-reward", "kn=1", "--knowledge", "./policy/"], "may not judge itself"),
    ],
)
def test_judges_that_are_missing_end_in_one_line(arguments, message):
    args = flags(*arguments)
    with pytest.raises(SystemExit, match=message) as error:
        check_judges(args, judged_by(args))
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


def test_a_raw_sum_is_decided_by_the_component_with_the_larger_spread():
    """One component prefers the first completion by 0.1, another the second by 1, with like weight.

    Normalised one by one they all but balance; summed first, the second decides.
    """
    small = torch.tensor([[0.6, 0.5]])
    large = torch.tensor([[0.0, 1.0]])

    class Both:
        weights = {"a": 1.0, "b": 1.0}

        def __call__(self):
            return {"a": small, "b": large}

    one_by_one = advantages(Both()(), Both.weights, eps=1e-4)
    raw = RawSum(Both())
    components = raw()
    summed = advantages(components, raw.weights, eps=1e-4)
    assert raw.weights == {"sum": 1.0}
    torch.testing.assert_close(components["sum"], torch.tensor([[0.6, 1.5]]))
    # what was added is still there to be logged
    assert components["a"] is small and components["b"] is large
    assert one_by_one.abs().max() < 2e-3
    assert summed[0, 1] > 0.7


def test_other_parts_of_the_same_prompt_are_no_rivals(monkeypatch):
    """A drawing that shows the cat as well fits "A dog runs. A cat sits." better, and not worse."""
    texts = ["A dog runs.", "A cat sits.", *[f"Rival {i}." for i in range(6)]]
    scores = torch.zeros(2, len(texts))
    scores[:, 0] = 2.0
    scores[1, 1] = 5.0

    class Clip:
        """Features that make `scores` the logits of two drawings."""

        def logit_scale(self):
            return torch.tensor(1.0)

        def image_features(self, images):
            return scores[torch.tensor(images)]

        def text_features(self, asked):
            return torch.eye(len(texts))[[texts.index(text) for text in asked]]

    reward = DrawingReward({"sem": 1}, clip=Clip(), rivals=texts)
    record = {"id": "a", "prompt": "A dog runs. A cat sits."}
    without, both = reward([record], [[0, 1]])["sem"][0].tolist()
    # sigmoid(2) and sigmoid(0); sigmoid(2) and sigmoid(5)
    assert without == pytest.approx((0.8808 + 0.5) / 2, abs=1e-3)
    assert both == pytest.approx((0.8808 + 0.9933) / 2, abs=1e-3)
